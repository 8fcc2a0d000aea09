"""Put numbers beside their interval, target and controls, and say whether the target is met."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from musicscope.core.io import write_json
from musicscope.core.stats import Estimate, Statistic, bootstrap_groups

MIN_CLIPS = 4
"""Positives and negatives that an AUROC needs to be reported."""
TARGETS = {
    "log_mel_distance": 4.0,
    "si_sdr": 8.0,
    "perplexity_share": 0.60,
    "auroc_loss": 0.02,
    "caption_gain": 0.03,
    "layer_kl": 0.05,
    "guitar_auroc": 0.90,
    "codec_ratio": 1.3,
    "generated_ratio": 2.0,
    "beat_periodicity": 0.4,
}

Direction = Literal["at_least", "at_most", "within"]


@dataclass(frozen=True)
class Row:
    """One number of the table, with its interval, target and controls."""

    name: str
    value: float
    low: float
    high: float
    n: int
    """Clips."""
    unit: str
    target: float | tuple[float, float] | None = None
    direction: Direction | None = None
    control: dict[str, float] = field(default_factory=dict)
    """The same number of other data or of a null."""
    note: str = ""

    def __post_init__(self) -> None:
        if (self.target is None) != (self.direction is None):
            raise ValueError(f"{self.name}: target and direction go together")
        if (self.direction == "within") != isinstance(self.target, tuple):
            raise ValueError(f"{self.name}: the direction 'within' takes a pair, others a number")

    def _meets(self, *values: float) -> bool | None:
        if self.target is None:
            return None
        low, high = self.target if isinstance(self.target, tuple) else (
            (self.target, np.inf) if self.direction == "at_least" else (-np.inf, self.target)
        )  # fmt: skip
        return all(np.isfinite(v) and low <= v <= high for v in values)

    @property
    def estimate_meets(self) -> bool | None:
        """Whether the value meets the target; None without a target."""
        return self._meets(self.value)

    @property
    def verdict(self) -> bool | None:
        """Whether the value and the interval's worse end meet the target; False if undefined."""
        ends = {"at_least": (self.low,), "at_most": (self.high,)}
        return self._meets(self.value, *ends.get(self.direction or "", (self.low, self.high)))

    def as_dict(self) -> dict[str, object]:
        """All fields, the number as an `Estimate`, with `verdict` and `estimate_meets`."""
        fields = asdict(self)
        estimate = {part: fields.pop(part) for part in ("value", "low", "high", "n", "unit")}
        verdicts = {"verdict": self.verdict, "estimate_meets": self.estimate_meets}
        return {**fields, "estimate": estimate, **verdicts}


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of compositions: how many, and from which seed."""

    n: int = 1000
    seed: int = 0

    def row(
        self, name: str, statistic: Statistic | np.ndarray, groups: np.ndarray, unit: str, **more
    ) -> Row:
        """A row whose interval resamples `groups` [clips]; an array stands for its mean."""
        groups = np.asarray(groups)
        if callable(statistic):
            value = float(statistic(np.ones((1, len(groups))))[0])
        else:
            value = float(np.mean(statistic))
        low, high = bootstrap_groups(statistic, groups, self.n, self.seed)
        return Row(name, value, low, high, len(groups), unit, **more)


def estimate_row(name: str, found: Estimate, n: int, **more) -> Row:
    """A row of an `Estimate` from `n` clips."""
    return Row(name, found.value, found.low, found.high, n, found.unit, **more)


def median_of(values: np.ndarray) -> Statistic:
    """Weighted median of `values` [items] as a `Statistic`."""
    order = np.argsort(values)

    def statistic(weights: np.ndarray) -> np.ndarray:
        total = np.cumsum(weights[:, order], 1)
        return np.asarray(values)[order][(total < total[:, -1:] / 2).sum(1)]

    return statistic


def perplexity_row(
    name: str, codes: np.ndarray, groups: np.ndarray, card: int, **more: object
) -> Row:
    """Perplexity of one codebook [clips, T] over its size, with a jackknife over groups.

    Not the bootstrap: codes drawn twice narrow a distribution and lower its entropy.
    """
    names, member = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), card))
    for group, clip in zip(member, codes, strict=True):
        counts[group] += np.bincount(clip, minlength=card)

    def share(total: np.ndarray) -> float:
        p = total[total > 0] / total.sum()
        return float(np.exp(-(p * np.log(p)).sum()) / card)

    value = share(counts.sum(0))
    without = np.array([share(counts.sum(0) - one) for one in counts])
    spread = 1.96 * np.sqrt((len(names) - 1) * without.var())
    return Row(name, value, value - spread, value + spread, len(codes), "share of size", **more)


def both_classes(labels: np.ndarray) -> bool:
    """Whether `labels` holds `MIN_CLIPS` positives and as many negatives."""
    return min(int(labels.sum()), int((~labels).sum())) >= MIN_CLIPS


@dataclass(frozen=True)
class Table:
    """All rows, and the seconds that each part took."""

    rows: list[Row]
    seconds: dict[str, float]

    def save(self, path: str | Path) -> None:
        """Write one JSON object: rows by name, seconds by part."""
        rows = {row.name: row.as_dict() for row in self.rows}
        write_json(path, {"rows": rows, "seconds": self.seconds})
