"""A YAML file as a typed, frozen dataclass, with errors that name the key.

The file is read with OmegaConf and merged into the structured config made of the dataclass. What
a field may hold stands in its metadata, so that one place says what the checks and the errors
need. Every field is required.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class ParamsError(ValueError):
    """A value in params.yaml that cannot be used; the message names its full key."""


class Sections(dict):
    """Sections by a name that whoever writes the file chooses; not to be changed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


def number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Any:
    """A required number (or tuple of numbers) in [low, high]; `above`/`below` open that end."""

    def ok(value: float) -> bool:
        return (
            math.isfinite(value)
            and low <= value <= high
            and not ((above and value == low) or (below and value == high))
        )

    text = f"{'>' if above else '>='} {low}"
    if high < math.inf:
        text += f" and {'<' if below else '<='} {high}"
    return dataclasses.field(metadata={"ok": ok, "text": text})


def choice(*allowed: str) -> Any:
    """A required string (or tuple of strings) out of `allowed`."""
    text = "one of " + ", ".join(allowed)
    return dataclasses.field(metadata={"ok": lambda value: value in allowed, "text": text})


def pattern(regex: re.Pattern[str], text: str, *, empty: bool = False) -> Any:
    """A required string (or tuple of strings, with `empty` of none) that `regex` matches whole."""
    ok = lambda value: regex.fullmatch(value) is not None  # noqa: E731
    return dataclasses.field(metadata={"ok": ok, "text": text, "empty": empty})


def name() -> Any:
    """A required string (or tuple of strings) that becomes a folder name."""
    return pattern(SAFE_NAME, "letters, digits, '_', '.', '-' only (it becomes a folder name)")


def may_be_empty() -> Any:
    """A required list that may have no entry."""
    return dataclasses.field(metadata={"empty": True})


TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


@functools.cache
def _types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _element(hint: Any) -> type:
    """The scalar type of a field: `int` for both `int` and `tuple[int, ...]`."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def _entries(hint: Any) -> type | None:
    """The dataclass of a list of sections, ``tuple[Section, ...]``; None for any other field."""
    of = _element(hint)
    return of if of is not hint and dataclasses.is_dataclass(of) else None


def _named(hint: Any) -> type | None:
    """The dataclass of sections by name, ``dict[str, Section]``; None for any other field."""
    return typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None


def _leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """All (full key, field, type) below `cls` that are not sections themselves."""
    for field in dataclasses.fields(cls):
        hint = _types(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, hint


def _allowed(field: dataclasses.Field, hint: Any) -> str:
    if named := _named(hint):
        keys = ", ".join(f.name for f in dataclasses.fields(named))
        return f"sections by name (letters, digits, '_', '-'), each with the keys {keys}"
    if entries := _entries(hint):
        keys = ", ".join(f.name for f in dataclasses.fields(entries))
        return f"a list of sections with the keys {keys}"
    kind = TYPE_NAMES[_element(hint)]
    if typing.get_origin(hint) is tuple:
        kind = f"a list, each entry {kind}"
    return f"{kind}, {field.metadata['text']}" if "text" in field.metadata else kind


def _check_shape(raw: Any, cls: type, path: str, root: type, prefix: str = "") -> None:
    """Every key known, every key there, sections mappings and tuples lists."""
    where = prefix.rstrip(".") or "the top level"
    if not isinstance(raw, Mapping):
        raise ParamsError(f"{path}: {where} = {raw!r} is not a section of keys and values")
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in raw.items():
        full = f"{prefix}{key}"
        if key not in known:
            every = [leaf for leaf, _, _ in _leaves(root)]
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            near = [prefix + near[0]] if near else difflib.get_close_matches(full, every, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            raise ParamsError(f"{path}: unknown key {full} (value {value!r}); {hint}")
        hint = _types(cls)[key]
        if dataclasses.is_dataclass(hint):
            _check_shape(value, hint, path, root, f"{full}.")
            continue
        allowed = _allowed(known[key], hint)
        if named := _named(hint):
            # A name with a dot could not be told from two keys where DVC names params.
            if not isinstance(value, Mapping) or any(
                not SAFE_NAME.fullmatch(str(k)) or "." in str(k) for k in value
            ):
                raise ParamsError(f"{path}: {full} = {value!r}: allowed is {allowed}")
            for own, entry in value.items():
                _check_shape(entry, named, path, root, f"{full}.{own}.")
            continue
        if isinstance(value, list) != (typing.get_origin(hint) is tuple):
            raise ParamsError(
                f"{path}: {full} = {value!r} has the wrong type: allowed is {allowed}"
            )
        if entries := _entries(hint):
            for index, entry in enumerate(value):
                _check_shape(entry, entries, path, root, f"{full}[{index}].")
            continue
        if any(
            "${" in v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)
        ):
            raise ParamsError(
                f"{path}: {full} = {value!r} refers to another key, whose changes DVC would not "
                f"see; write the value itself: allowed is {allowed}"
            )
    for key, field in known.items():
        if key not in raw:
            hint = _types(cls)[key]
            need = "a section" if dataclasses.is_dataclass(hint) else _allowed(field, hint)
            raise ParamsError(f"{path}: {prefix}{key} is missing: allowed is {need}")


def _build(raw: Mapping[str, Any], cls: type, path: str, prefix: str = "") -> Any:
    """Typed by OmegaConf: `raw` merged into the structured config of `cls`, lists as tuples."""
    types = _types(cls)
    sections = {key: hint for key, hint in types.items() if dataclasses.is_dataclass(hint)}
    values = {
        key: _build(raw[key], hint, path, f"{prefix}{key}.") for key, hint in sections.items()
    }
    for key, entries in ((key, _entries(hint)) for key, hint in types.items()):
        if entries:
            values[key] = tuple(
                _build(entry, entries, path, f"{prefix}{key}[{index}].")
                for index, entry in enumerate(raw[key])
            )
    for key, named in ((key, _named(hint)) for key, hint in types.items()):
        if named:
            values[key] = Sections(
                (str(own), _build(entry, named, path, f"{prefix}{key}.{own}."))
                for own, entry in raw[key].items()
            )
    node = OmegaConf.structured(cls)
    OmegaConf.set_readonly(node, False)  # a frozen dataclass gives a node that takes no values
    for field in dataclasses.fields(cls):
        key, hint = field.name, types[field.name]
        if key in values:
            continue
        try:
            node.merge_with({key: raw[key]})
        except OmegaConfBaseException as error:
            at = (error.full_key or key).removeprefix(key)  # the entry's index, if in a list
            raise ParamsError(
                f"{path}: {prefix}{key}{at} = {error.value if at else raw[key]!r} has the wrong "
                f"type: allowed is {_allowed(field, hint)}"
            ) from error
        values[key] = tuple(node[key]) if typing.get_origin(hint) is tuple else node[key]
    return cls(**values)


def _check_ranges(typed: Any, path: str, prefix: str = "") -> None:
    for key, field, hint in _leaves(type(typed)):
        value = functools.reduce(getattr, key.split("."), typed)
        full, allowed = f"{prefix}{key}", _allowed(field, hint)
        is_tuple = isinstance(value, tuple)
        if _named(hint):
            for own, entry in value.items():
                _check_ranges(entry, path, f"{full}.{own}.")
            continue
        if is_tuple and not value and not field.metadata.get("empty"):
            raise ParamsError(f"{path}: {full} is empty: allowed is {allowed}, at least one")
        if _entries(hint):
            for index, entry in enumerate(value):
                _check_ranges(entry, path, f"{full}[{index}].")
            continue
        ok = field.metadata.get("ok", lambda _: True)
        for index, entry in enumerate(value if is_tuple else (value,)):
            if not ok(entry):
                at = f"{full}[{index}]" if is_tuple else full
                raise ParamsError(f"{path}: {at} = {entry!r} is out of range: allowed is {allowed}")
        if is_tuple and len(set(value)) < len(value):  # it would run, or count, twice
            raise ParamsError(f"{path}: {full} = {list(value)} has an entry twice")


def load_typed(path: str | Path, cls: type[T]) -> T:
    """Read the YAML file at `path` into the frozen dataclass `cls`, lists as tuples.

    Raises ParamsError, naming the file, the full key, the value and what is allowed, for an
    unknown or missing key, a wrong type or a value out of range.
    """
    path = str(path)
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ParamsError(f"{path} does not exist; run from the repository's root") from error
    except Exception as error:  # PyYAML and OmegaConf share no base class; the file is at fault
        raise ParamsError(f"{path} is not readable YAML: {error}") from error
    raw = OmegaConf.to_container(loaded)
    _check_shape(raw, cls, path, root=cls)
    typed = _build(raw, cls, path)
    _check_ranges(typed, path)
    return typed
