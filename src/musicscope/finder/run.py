"""Find the features of concepts, in two folders of recordings or in the clips of params.yaml.

`find_concept` is the library's and the command's entry, `find_all` the stage's. The latter writes
data/find_concept/<model>: features.parquet (dictionary, concept and `association.COLUMNS`; for
clips also test_auroc, heldout_font_auroc and heldout_source_auroc; for the SAE also seed_cosine and
returns; all tested features, best first), moments.parquet (concept and `scores.MOMENTS`; recording
is a clip's id or a file) and the WAV files in its column file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from musicscope.activations.store import ActivationStore
from musicscope.config.concepts import Concept, FindConcept
from musicscope.core.audio import TRIVIAL_CUES, trivial_cues
from musicscope.core.seeding import seed_for
from musicscope.data.audio_files import Problem
from musicscope.data.clips import ClipStore
from musicscope.dictionaries.codes import by_batch
from musicscope.dictionaries.core import TopKSAE, UniversalSAE
from musicscope.features.association import rank_by_auroc, smallest_p
from musicscope.finder.confounding import Confounding, known_cues, measure
from musicscope.finder.evaluation import Sets, concept_sets, examine, is_query
from musicscope.finder.recordings import (
    Plan,
    differing_cues,
    plan_recordings,
    recording_cues,
)
from musicscope.finder.scores import (
    MOMENTS,
    dictionary,
    excerpt,
    pool_all,
    recording_moments,
    score_recordings,
    top_moments,
)
from musicscope.judges.musicnn import level
from musicscope.models.interface import MusicModel
from musicscope.models.registry import load_model

Described = tuple[pd.DataFrame, dict[str, int]]


@dataclass(frozen=True)
class ConceptReport:
    """Features found in recordings, and what limits the finding."""

    tables: Mapping[str, pd.DataFrame]
    """By dictionary: all tested features, best first (`association.COLUMNS`)"""
    moments: pd.DataFrame
    """Where the best features are highest in recordings with the concept (`scores.MOMENTS`)"""
    recordings: Mapping[str, int]
    """Number of usable ones, "with" and "without" """
    problems: tuple[Problem, ...]
    """Files, or windows of files, that were left out, and why"""
    plan: Plan
    cues: Mapping[str, float]
    """AUROC of trivial cues in which the folders differ too"""
    confounding: Confounding
    """Whether cues separate the folders as well as the best feature does"""
    q: float
    smallest_p: float
    excerpts: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """File name -> audio of a moment, mono, at `rate`"""
    rate: int = 0
    usual: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """By dictionary: [F] mean value where a feature fires in recordings with the concept, or 0"""

    @property
    def table(self) -> pd.DataFrame:
        """Table of the first dictionary."""
        return next(iter(self.tables.values()))

    def discoveries(self, name: str | None = None) -> pd.DataFrame:
        """Select rows with q at most the limit, of the first dictionary unless named."""
        table = self.table if name is None else self.tables[name]
        return table[table["q"] <= self.q]

    def text(self, rows: int = 10) -> str:
        """Format everything that a user should read, with the best `rows` features."""
        plan, n = self.plan, self.recordings
        lines = [
            f"{n['with']} recordings with and {n['without']} without the concept, "
            f"up to {plan.windows} windows of {plan.seconds:.3g} s each"
        ]
        lines += [f"left out: {p.name}: {p.reason} {p.detail}".rstrip() for p in self.problems]
        lines += [self.confounding.text()] if self.confounding.warns else []
        for name, value in self.cues.items():
            lines.append(
                f"warning: the folders also differ in {name.replace('_', ' ')} (AUROC {value:.2f});"
                " features may follow that instead of the concept"
            )
        if self.smallest_p > self.q:
            lines.append(
                f"warning: with so few recordings no p is below {self.smallest_p:.2g}: nothing "
                f"can be found at q = {self.q:g}; add recordings"
            )
        for name, table in self.tables.items():
            if discoveries := len(self.discoveries(name)):
                lines.append(
                    f"{name}: {discoveries} of {len(table)} features found at q = {self.q:g}"
                )
            else:
                best = f"; the best has q = {table['q'].min():.2g}" if len(table) else ""
                lines.append(
                    f"{name}: nothing to find: none of {len(table)} features separates the folders "
                    f"better than chance (q = {self.q:g}){best}"
                )
            if len(table):
                lines.append(table.head(rows).to_string(index=False, float_format="%.3g"))
        return "\n".join(lines)


def find_concept(
    model: MusicModel,
    features: TopKSAE | UniversalSAE | Mapping[str, TopKSAE | UniversalSAE],
    with_dir: str | Path,
    without_dir: str | Path,
    layer: str,
    *,
    seconds: float = 10.0,
    windows: int = 4,
    permutations: int = 2000,
    draws: int = 200,
    q: float = 0.05,
    audible: int = 4,
    moments: int = 3,
    seed: int = 0,
    tick: Callable[[float], None] = lambda share: None,
) -> ConceptReport:
    """Find features of `layer` that are higher in one folder of recordings than in another.

    Args:
        features: an SAE, a universal SAE that includes the model, or several by name.
        seconds, windows: upper limits of the windows read from each recording.
        permutations: of the labels, for p; draws: of recordings, for the stability.
        q: limit of the corrected p for a discovery.
        audible: best features with excerpts; moments: excerpts per feature.
        tick: gets the share of recordings that are done; an error in it ends the search.

    Raises:
        FileNotFoundError: a folder does not exist or is empty.
        ValueError: fewer than two usable recordings in a folder; the message names the others.
    """
    if not isinstance(features, Mapping):
        features = {"usae" if isinstance(features, UniversalSAE) else "sae": features}
    dictionaries = {name: dictionary(of, model.name) for name, of in features.items()}
    plan, problems = plan_recordings((with_dir, without_dir), seconds, windows)
    scored, more = score_recordings(model, layer, dictionaries, plan, tick)
    problems += more
    labels = scored.labels
    usable = {"with": int(labels.sum()), "without": int((~labels).sum())}
    if min(usable.values()) < 2:
        left = "; ".join(f"{p.name}: {p.reason}" for p in problems[:8]) or "no other files"
        raise ValueError(
            f"{usable['with']} usable recordings in {with_dir}, {usable['without']} in "
            f"{without_dir}: at least two of each are needed, ten to find anything ({left})"
        )
    tables = {
        name: rank_by_auroc(
            of.mean, labels, permutations, draws, seed_for(seed, "find_concept", name)
        )
        for name, of in scored.scores.items()
    }
    best = max((t["auroc"].iloc[0] for t in tables.values() if len(t)), default=float("nan"))
    cues = recording_cues(scored.recordings, scored.cues)
    table, excerpts = recording_moments(scored, tables, plan, model.sample_rate, audible, moments)
    return ConceptReport(
        tables,
        table,
        usable,
        tuple(problems),
        plan,
        differing_cues(scored.cues, labels),
        measure(cues, labels, float(best), seed),
        q,
        smallest_p(labels),
        excerpts,
        model.sample_rate,
        {n: active_mean(of.mean[labels], of.fires[labels]) for n, of in scored.scores.items()},
    )


@dataclass(frozen=True)
class RankedSound:
    """Features of recordings without others to compare them with: a ranking, not a test."""

    table: pd.DataFrame
    """feature, excess, mean; best first. excess: mean above its mean on the training clips, in
    units of its usual value there."""
    usual: np.ndarray
    """[F] mean value where a feature fires in the recordings, or 0"""
    problems: tuple[Problem, ...]
    moments: pd.DataFrame
    excerpts: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)


def rank_sound(
    model: MusicModel, sae: TopKSAE, folder: str | Path, layer: str, typical: np.ndarray,
    usual: np.ndarray, *, seconds: float = 10.0, windows: int = 4, audible: int = 4,
    moments: int = 3, tick: Callable[[float], None] = lambda share: None,
) -> RankedSound:  # fmt: skip
    """Rank features of `layer` by how far they are above their mean on the training clips.

    Args:
        typical, usual: [F] means on the training clips, over all frames and where they fire.

    Raises:
        FileNotFoundError: the folder does not exist or is empty.
        ValueError: no usable recording.
    """
    plan, problems = plan_recordings((folder,), seconds, windows)
    of = {"sae": dictionary(sae, model.name)}
    scored, more = score_recordings(model, layer, of, plan, tick)
    problems += more
    if not len(scored.recordings):
        left = "; ".join(f"{p.name}: {p.reason}" for p in problems[:8]) or "no files"
        raise ValueError(f"no usable recording ({left})")
    scores = scored.scores["sae"]
    mean = scores.mean.mean(0, dtype=np.float64)
    excess = np.divide(mean - typical, usual, out=np.zeros(len(mean)), where=usual > 0)
    order = np.argsort(-excess, kind="stable")
    order = order[(excess[order] > 0) & (mean[order] > 0)]
    table = pd.DataFrame({"feature": order, "excess": excess[order], "mean": mean[order]})
    found, excerpts = recording_moments(
        scored, {"sae": table}, plan, model.sample_rate, audible, moments
    )
    usual = active_mean(scores.mean, scores.fires)
    return RankedSound(table, usual, tuple(problems), found, excerpts)


def active_mean(means: np.ndarray, fires: np.ndarray) -> np.ndarray:
    """Mean value [F] where a feature fires, from means and shares of frames [n, F]; or 0."""
    total, share = means.sum(0, dtype=np.float64), fires.sum(0)
    return np.divide(total, share, out=np.zeros(len(share)), where=share > 0)


def write_excerpts(folder: Path, excerpts: Mapping[str, np.ndarray], rate: int) -> None:
    """Write excerpts {file name: audio [samples]} as 16-bit WAV files."""
    for name, audio in excerpts.items():
        soundfile.write(folder / name, np.clip(audio, -1, 1), rate, subtype="PCM_16")


@dataclass(frozen=True)
class Subject:
    """One model: its clips, activations and dictionaries."""

    name: str
    clips: ClipStore
    store: ActivationStore
    features: Mapping[str, TopKSAE | UniversalSAE]
    device: str = "cpu"
    workers: int = 1
    stability: pd.DataFrame | None = None
    """Which latents of the SAE return in other seeds (`dictionaries.stability`)"""

    def describe(self, table: pd.DataFrame, name: str, concept: str, q: float) -> Described:
        """Add concept, dictionary and, for the SAE, seed_cosine and returns to a table.

        Also returns the number of discoveries that return in other seeds, for the metrics.
        """
        table = table.assign(dictionary=name, concept=concept)
        if name != "sae" or self.stability is None:
            return table, {}
        own = self.stability.set_index("feature")[["seed_cosine", "returns"]]
        table = table.join(own, on="feature")
        returning = (table["q"] <= q) & table["returns"]
        return table, {"discoveries_returning": int(returning.sum())}

    baselines: Mapping[str, TopKSAE] = field(default_factory=dict)
    """Dictionaries that queries to clips are examined with for comparison; in no table, and
    without draws of a few recordings."""


def _find_in_folders(
    subject: Subject, concepts: Sequence[Concept], section: FindConcept, seed: int
) -> Iterator[tuple[Concept, ConceptReport]]:
    """Apply `find_concept` to concepts given by folders; the model is loaded if there are any."""
    if not concepts:
        return
    model = load_model(f"data/models/{subject.name}", subject.device)
    for c in concepts:
        yield c, find_concept(
            model, subject.features, c.positive, c.negative, subject.store.config["layer"],
            seconds=section.seconds, windows=section.windows, permutations=section.permutations,
            draws=section.stability_draws, q=section.q, audible=section.features,
            moments=section.moments, seed=seed,
        )  # fmt: skip


def clip_cues(clips: ClipStore, sets: Mapping[str, Sets], workers: int) -> pd.DataFrame:
    """Tabulate trivial and known cues of all clips; trivial ones are NaN outside train sets."""
    learnt = np.unique(np.concatenate([of.train for of in sets.values()]))
    trivial = np.full((len(clips), len(TRIVIAL_CUES)), np.nan)
    trivial[learnt] = np.concatenate(
        by_batch(lambda at: trivial_cues(clips.audio(at), clips.sample_rate), learnt, workers)
    )
    return pd.concat(
        [pd.DataFrame(trivial, columns=list(TRIVIAL_CUES)), known_cues(clips.rows)], axis=1
    )


def find_all(
    subject: Subject, section: FindConcept, seed: int, out: Path
) -> tuple[list[pd.DataFrame], dict[str, dict[str, object]]]:
    """Find every concept of params.find_concept and write the folder `out`.

    Returns tables and {dictionary or baseline: {concept: numbers}}. ValueError if one side of a
    concept is a query and the other a folder.
    """
    rows, clips, store = subject.clips.rows, subject.clips, subject.store
    groups = rows["group"].to_numpy(str)
    for c in section.concepts:
        if is_query(c.positive) != is_query(c.negative):
            raise ValueError(
                f"find_concept.concepts: {c.name} compares clips with a folder; give two queries "
                "that begin with clips: or two folders"
            )
    sets = {
        c.name: concept_sets(rows, c.positive, c.negative)
        for c in section.concepts
        if is_query(c.positive)
    }
    tables, moments, metrics = [], [], {name: {} for name in subject.features}
    used = np.unique(np.concatenate([np.zeros(0, int), *(of.used for of in sets.values())]))
    hop = clips.samples / clips.sample_rate / int(store.frames[0])
    cues = clip_cues(clips, sets, subject.workers) if sets else pd.DataFrame()
    for name, features in subject.features.items() if sets else ():
        encoder = dictionary(features, subject.name)
        pools = pool_all(store, encoder, used, subject.workers, subject.device)
        times = pools.frame * hop
        for concept, of in sets.items():
            table, metrics[name][concept] = examine(
                pools.mean, groups, of, section, seed, subject.name, name, concept, cues=cues
            )
            described, returning = subject.describe(table, name, concept, section.q)
            metrics[name][concept] |= returning
            tables.append(described)
            best, with_ = table["feature"].head(section.features), of.train[of.labels]
            for feature, rank, i in top_moments(pools.highest, with_, best, section.moments):
                seconds, value = (float(of[i, feature]) for of in (times, pools.highest))
                file, clip = f"{concept}-{name}-{feature}-{rank}.wav", rows["id"].iloc[i]
                audio = excerpt(level(clips.audio([i]))[0][0], seconds, clips.sample_rate)
                write_excerpts(out, {file: audio}, clips.sample_rate)
                moments.append((concept, name, feature, rank, clip, seconds, value, file))
    whole = replace(section, few_draws=0)  # draws of a few recordings take most of the time
    for name, features in subject.baselines.items() if sets else ():
        encoder = dictionary(features, subject.name)
        means = pool_all(store, encoder, used, subject.workers, subject.device).mean
        metrics[name] = {
            concept: examine(means, groups, of, whole, seed, subject.name, name, concept)[1]
            for concept, of in sets.items()
        }
    folders = [c for c in section.concepts if c.name not in sets]
    for c, report in _find_in_folders(subject, folders, section, seed):
        print(f"{c.name}: {report.text()}")
        for name, table in report.tables.items():
            described, returning = subject.describe(table, name, c.name, section.q)
            metrics[name][c.name] = {
                **{k: report.recordings[k] for k in ("with", "without")},
                "tested": len(table), "discoveries": len(report.discoveries(name)),
                "left_out": {"files": len({p.name for p in report.problems})},
                "cues": dict(report.cues), "confounding": report.confounding.as_metrics(),
                **returning,
            }  # fmt: skip
            tables.append(described)
        files = {f"{c.name}-{file}": audio for file, audio in report.excerpts.items()}
        write_excerpts(out, files, report.rate)
        for *moment, file in report.moments.itertuples(index=False, name=None):
            moments.append((c.name, *moment, f"{c.name}-{file}"))
    pd.concat(tables, ignore_index=True).to_parquet(out / "features.parquet", index=False)
    frame = pd.DataFrame(moments, columns=["concept", *MOMENTS])
    frame.to_parquet(out / "moments.parquet", index=False)
    return tables, metrics
