"""Checks of command-line options: types for argparse that say which values are allowed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def _limits(above: float | None, at_least: float | None, at_most: float | None) -> str:
    parts = [
        f"{word} {value:g}"
        for word, value in (("above", above), ("at least", at_least), ("at most", at_most))
        if value is not None
    ]
    return " and ".join(parts)


def number(
    above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> Callable[[str], float]:
    """Return a type for finite numbers within limits."""
    limits = _limits(above, at_least, at_most)

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = (
            math.isfinite(value)
            and (above is None or value > above)
            and (at_least is None or value >= at_least)
            and (at_most is None or value <= at_most)
        )
        if not inside:
            wanted = f"a number {limits}" if limits else "a finite number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return read


def whole(at_least: int | None = None, at_most: int | None = None) -> Callable[[str], int]:
    """Return a type for whole numbers within limits."""
    limits = _limits(None, at_least, at_most)

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if (
            value is None
            or (at_least is not None and value < at_least)
            or (at_most is not None and value > at_most)
        ):
            wanted = f"a whole number {limits}".rstrip()
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return read


def device(text: str) -> str:
    """Resolve a device: auto, cpu, cuda or cuda:<index>; an absent GPU is an error."""
    import torch  # slow to import, and most mistakes are found before

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cpu":
        return text
    kind, _, index = text.partition(":")
    if kind != "cuda" or (index and not index.isdigit()) or text.endswith(":"):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:<index>")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        have = f"GPUs: {count}" if count else "torch finds no GPU"
        raise argparse.ArgumentTypeError(f"{text!r} is not on this machine ({have}); use cpu")
    return text
