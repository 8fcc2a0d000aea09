"""From a folder of recordings with a concept and one without it to features of a model.

Reads whatever libsndfile reads; what the statistics mean is in `concept_stats`. The command
``musicscope find-concept`` is in `concept_command`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from musicscope.core.seeding import seed_for
from musicscope.data.sources.recordings import Problem
from musicscope.dictionaries.core import TopKSAE, UniversalSAE
from musicscope.finder import recordings as reading
from musicscope.finder import statistics as concept_stats
from musicscope.finder.recordings import Plan
from musicscope.finder.scores import dictionary, hear, top_moments


@dataclass(frozen=True)
class ConceptReport:
    """What was found, and what to know about it."""

    tables: Mapping[str, pd.DataFrame]
    """By dictionary: all tested features, best first (`concept_stats.COLUMNS`)"""
    moments: pd.DataFrame
    """Where the best features are highest in recordings with the concept; columns MOMENTS of
    `concept_listening`"""
    recordings: Mapping[str, int]
    """Usable ones, "with" and "without" """
    problems: tuple[Problem, ...]
    """Files, or windows of files, that were left out, and why"""
    plan: Plan
    cues: Mapping[str, float]
    """AUROC of trivial cues by which the folders differ too"""
    q: float
    smallest_p: float
    excerpts: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """File name -> audio of a moment, mono, at `rate`"""
    rate: int = 0

    @property
    def table(self) -> pd.DataFrame:
        """That of the first dictionary."""
        return next(iter(self.tables.values()))

    def discoveries(self, name: str | None = None) -> pd.DataFrame:
        """Rows with q at most the limit; of the first dictionary unless named."""
        table = self.table if name is None else self.tables[name]
        return table[table["q"] <= self.q]

    def text(self, rows: int = 10) -> str:
        """All that a user should read, as lines."""
        plan, n = self.plan, self.recordings
        lines = [
            f"{n['with']} recordings with and {n['without']} without the concept, "
            f"up to {plan.windows} windows of {plan.seconds:.3g} s each"
        ]
        lines += [f"left out: {p.name}: {p.reason} {p.detail}".rstrip() for p in self.problems]
        for name, value in self.cues.items():
            lines.append(
                f"warning: the folders also differ in {name.replace('_', ' ')} (AUROC {value:.2f});"
                " what is found may be that instead of the concept"
            )
        if self.smallest_p > self.q:
            lines.append(
                f"warning: with so few recordings no p is below {self.smallest_p:.2g}: nothing "
                f"can be found at q = {self.q:g}; add recordings"
            )
        for name, table in self.tables.items():
            found = int((table["q"] <= self.q).sum())
            if found:
                lines.append(f"{name}: {found} of {len(table)} features found at q = {self.q:g}")
            else:
                best = f"; the best has q = {table['q'].min():.2g}" if len(table) else ""
                lines.append(
                    f"{name}: nothing to find: of {len(table)} features none tells the folders "
                    f"apart better than chance (q = {self.q:g}){best}"
                )
            if len(table):
                lines.append(table.head(rows).to_string(index=False, float_format="%.3g"))
        return "\n".join(lines)


def find_concept(
    model: Any, features: TopKSAE | UniversalSAE | Mapping[str, Any], with_dir: str | Path,
    without_dir: str | Path, layer: str, *, seconds: float = 10.0, windows: int = 4,
    permutations: int = 2000, draws: int = 200, q: float = 0.05, audible: int = 4, moments: int = 3,
    seed: int = 0,
) -> ConceptReport:  # fmt: skip
    """Features of `layer` of a model that are higher in one folder of recordings than in another.

    Args:
        features: an SAE, a universal SAE that knows the model, or several by name.
        seconds, windows: most that is heard of a recording: windows spread over it.
        permutations, draws: of the labels for p, of recordings for the stability.
        q: limit of the corrected p for a discovery.
        audible, moments: so many features get so many excerpts.

    Raises:
        FileNotFoundError: a folder is not there or empty.
        ValueError: fewer than two usable recordings in a folder; the message names the others.
    """
    if not isinstance(features, Mapping):
        features = {"usae" if isinstance(features, UniversalSAE) else "sae": features}
    dictionaries = {name: dictionary(of, model.name) for name, of in features.items()}
    plan, problems = reading.plan_recordings((with_dir, without_dir), seconds, windows)
    heard, more = hear(model, layer, dictionaries, plan)
    problems += more
    usable = {"with": int(heard.labels.sum()), "without": int((~heard.labels).sum())}
    if min(usable.values()) < 2:
        left = "; ".join(f"{p.name}: {p.reason}" for p in problems[:8]) or "nothing else is there"
        raise ValueError(
            f"{usable['with']} usable recordings in {with_dir}, {usable['without']} in "
            f"{without_dir}: at least two of each are needed, ten to find anything ({left})"
        )
    tables = {
        name: concept_stats.rank_features(
            scores.mean, heard.labels, permutations, draws, seed_for(seed, "find_concept", name)
        )
        for name, scores in heard.scores.items()
    }
    rate = model.sample_rate
    table, excerpts = top_moments(heard, tables, plan, rate, audible, moments)
    return ConceptReport(
        tables, table, usable, tuple(problems), plan,
        reading.telling_cues(heard.cues, heard.labels), q,
        concept_stats.smallest_p(heard.labels), excerpts, rate,
    )  # fmt: skip
