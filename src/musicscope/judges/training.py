"""Trains the family judge and its two cross-font controls, and asks all judges about test clips."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from musicscope.core import plots, stats
from musicscope.core.seeding import seed_for
from musicscope.data.taxonomy import FAMILIES
from musicscope.judges.dataset import (
    FONTS,
    Chunk,
    batches,
    make_chunk,
    open_clips,
    plan_chunks,
    read_chunk,
)
from musicscope.judges.instrument_classifier import (
    FamilyJudge,
    JudgeConfig,
    family_report,
    load_family_judge,
)
from musicscope.judges.instrument_training import train_family_judge
from musicscope.judges.musicnn import load_musicnn, silent
from musicscope.judges.pair import TAGS, Judges

BOTH = "both"
SETS = {
    "timgm6mb": "test, TimGM6mb",
    "fluidr3mono": "test, FluidR3Mono",
    "codec_source": "before the codec",
    "codec": "behind the codec",
}
PAIR_CHUNK = 20


@dataclass(frozen=True)
class Lesson:
    """One network to train."""

    name: str
    """Both fonts: the judge itself; one font: the control that is tested on the other."""
    chunks: tuple[Chunk, ...]
    epochs: int
    seed: int


def train_lesson(scratch: Path, clips: str, lesson: Lesson) -> str:
    """Train and save `scratch`/<name>, unless it is there; its name."""
    folder = scratch / lesson.name
    if not (folder / "config.json").exists():
        torch.set_num_threads(1)
        judge = train_family_judge(
            batches(scratch, clips, lesson.chunks), FAMILIES, lesson.seed,
            replace(JudgeConfig(), epochs=lesson.epochs), scratch,
        )  # fmt: skip
        judge.save(folder)
    return lesson.name


@functools.lru_cache(maxsize=1)
def open_judges(scratch: Path, musicnn: Path) -> tuple[dict[str, FamilyJudge], Judges]:
    """The three family judges by name, and the pair of judges, loaded once a process."""
    trained = {name: load_family_judge(scratch / name) for name in (BOTH, *FONTS)}
    return trained, Judges(trained[BOTH], load_musicnn(musicnn))


@dataclass(frozen=True)
class Answers:
    """What every judge says of some clips, and what is true."""

    name: str
    """One of `SETS`, or "pairs"."""
    found: Mapping[str, np.ndarray]
    """"family_judge", "musicnn" and one name a font -> probabilities [n, F]"""
    labels: np.ndarray
    groups: np.ndarray
    pairs: np.ndarray
    """[n] name of the pair, "" for single clips"""


def ask(scratch: Path, clips: str, musicnn: Path, job: Chunk | tuple[int, ...]) -> list[Answers]:
    """Answers about a chunk of test clips, plain and behind the codec, or about rows of pairs."""
    torch.set_num_threads(1)
    trained, judges = open_judges(scratch, musicnn)
    if isinstance(job, tuple):
        store, rows = open_clips(clips), list(job)
        table = store.rows.iloc[rows]
        labels = table[[f"has_{f}" for f in FAMILIES]].to_numpy(bool)
        facts = [table[c].to_numpy(str) for c in ("group", "pair_id")]
        return [Answers("pairs", judges.predict(store.audio(rows)), labels, *facts)]
    heard = read_chunk(scratch, clips, job)
    result = []

    def add(name: str, found: dict[str, np.ndarray], at: np.ndarray) -> None:
        single = np.full(len(at), "")
        result.append(Answers(name, found, heard.labels[at], heard.groups[at], single))

    plain = judges.predict(heard.audio)
    plain |= {font: trained[font].predict(heard.audio) for font in FONTS}
    add(job.font, plain, np.arange(len(heard.audio)))
    if len(heard.coded):
        add("codec_source", {k: v[heard.coded] for k, v in plain.items()}, heard.coded)
        behind = judges.predict(heard.codec)
        behind |= {font: trained[font].predict(heard.codec) for font in FONTS}
        add("codec", behind, heard.coded)
    return result


def gather(answers: Sequence[Answers]) -> dict[str, Answers]:
    """Answers of the same set, one after another."""
    result = {}
    for name in dict.fromkeys(a.name for a in answers):
        own = [a for a in answers if a.name == name]
        found = {k: np.concatenate([a.found[k] for a in own]) for k in own[0].found}
        parts = (
            np.concatenate([getattr(a, k) for a in own]) for k in ("labels", "groups", "pairs")
        )
        result[name] = Answers(name, found, *parts)
    return result


@dataclass(frozen=True)
class Work:
    """All that a run makes, before it starts."""

    train: Mapping[str, Sequence[Chunk]]
    """By font"""
    test: Sequence[Chunk]
    pairs: Sequence[int]
    """Rows of the clip store, side by side"""
    lessons: Sequence[Lesson]


def plan_work(store: Any, section: Any, seed: int) -> Work:
    """From a `ClipStore` and params.train_judge."""
    train, test = (
        {font: plan_chunks(store, split, font, clips, codec_clips, seed) for font in FONTS}
        for split, clips, codec_clips in (
            ("train", section.clips, section.codec_clips),
            ("test", section.test_clips, section.codec_test_clips),
        )
    )
    wanted = [(BOTH, FONTS, section.epochs)]
    wanted += [(font, (font,), section.cross_font_epochs) for font in FONTS]
    lessons = [
        Lesson(
            name, tuple(c for font in fonts for c in train[font]), epochs,
            seed_for(seed, "train_judge", name),
        )
        for name, fonts, epochs in wanted
    ]  # fmt: skip
    pairs = store.select(kind="pair")[: 2 * section.pairs].tolist()
    return Work(train, [c for font in FONTS for c in test[font]], pairs, lessons)


def do_work(
    run: Callable, work: Work, scratch: Path, clips: str, model: str, musicnn: Path, device: str
) -> dict[str, Answers]:
    """Make the clips, train, ask; `run` is the map of `parallel.workers`. Answers by set."""
    chunks = [c for of in (*work.train.values(), work.test) for c in of]
    chunks.sort(key=lambda c: -len(c.coded))  # the codec takes the longest
    total, coded = sum(c.count for c in chunks), sum(len(c.coded) for c in chunks)
    print(f"{total} clips, {coded} of them through the codec", file=sys.stderr)
    pairs = [tuple(work.pairs[i : i + PAIR_CHUNK]) for i in range(0, len(work.pairs), PAIR_CHUNK)]
    bar = functools.partial(tqdm, file=sys.stderr, mininterval=1)
    with bar(total=total, desc="clips", unit="clip") as progress:
        for count in run(functools.partial(make_chunk, scratch, clips, model, device), chunks):
            progress.update(count)
    learn = functools.partial(train_lesson, scratch, clips)
    list(bar(run(learn, work.lessons), "judges", len(work.lessons), unit="judge"))
    questions = [*work.test, *pairs]
    answer = functools.partial(ask, scratch, clips, musicnn)
    parts = list(bar(run(answer, questions), "asking", len(questions), unit="chunk"))
    return gather([found for part in parts for found in part])


# --- how far to trust them --------------------------------------------------------------------


def _report(probabilities: np.ndarray, of: Answers, judge: str, n: int, seed: int) -> dict:
    """`family_report` over the families that the judge knows."""
    columns = [i for i, f in enumerate(FAMILIES) if judge != "musicnn" or f in TAGS]
    names = [FAMILIES[i] for i in columns]
    return family_report(
        probabilities[:, columns], of.labels[:, columns], names, of.groups, n, seed
    )


def _pairs(scores: np.ndarray, of: Answers, n: int, seed: int) -> dict[str, Any]:
    """Share of matched pairs whose guitar side has the higher guitar probability [clips]."""
    lost = np.unique(of.pairs[silent(scores[:, None])])
    kept = ~np.isin(of.pairs, lost)
    guitar = of.labels[kept, FAMILIES.index("guitar")]
    wins, groups = stats.pair_wins(scores[kept], guitar, of.pairs[kept], of.groups[kept])
    low, high = stats.bootstrap_groups(wins, groups, n, seed_for(seed, "train_judge", "pairs"))
    return {"pairs": len(wins), "silent": len(lost), "accuracy": wins.mean(), "ci_low": low,
            "ci_high": high}  # fmt: skip


def measure(answers: Mapping[str, Answers], bootstrap: int, seed: int) -> dict[str, Any]:
    """Numbers of metrics/train_judge.json.

    <judge>.<set>: AUROC of every family with intervals over compositions; <judge>.shuffled: the
    same on single clips with the labels of other compositions (the null); <judge>.pairs.
    cross_font.<train>_to_<test>: judges that heard one soundfont, tested on each.
    """
    result: dict[str, Any] = {"clips": {name: len(a.labels) for name, a in answers.items()}}
    guitar = FAMILIES.index("guitar")
    for judge in ("family_judge", "musicnn"):
        result[judge] = {
            name: _report(answers[name].found[judge], answers[name], judge, bootstrap, seed)
            for name in SETS
            if name in answers
        }
        whole = gather([replace(answers[font], name="") for font in FONTS])[""]
        dealt = stats.permute_labels(
            whole.labels, whole.groups, seed_for(seed, "train_judge", "null")
        )
        null = replace(whole, labels=dealt)
        result[judge]["shuffled"] = _report(whole.found[judge], null, judge, bootstrap, seed)
        if "pairs" in answers:
            of = answers["pairs"]
            result[judge]["pairs"] = _pairs(of.found[judge][:, guitar], of, bootstrap, seed)
    result["cross_font"] = {
        f"{font}_to_{test}": _report(
            answers[test].found[font], answers[test], font, bootstrap, seed
        )
        for font in FONTS
        for test in FONTS
    }
    return result


def judge_summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Headline numbers for metrics/summary.json, {"judge....": number}."""
    found: dict[str, Any] = {}
    for judge in ("family_judge", "musicnn"):
        for name, report in metrics[judge].items():
            prefix = f"judge.{judge}.{name}"
            if name == "pairs":
                found[f"{prefix}_accuracy"] = report["accuracy"]
                continue
            found[f"{prefix}.mean_auroc"] = report["mean_auroc"]
            for key in ("auroc", "ci_low", "ci_high"):
                found[f"{prefix}.guitar_{key}"] = report["guitar"][key]
    for name, report in metrics["cross_font"].items():
        found[f"judge.cross_font.{name}.mean_auroc"] = report["mean_auroc"]
        found[f"judge.cross_font.{name}.guitar_auroc"] = report["guitar"]["auroc"]
    return found


def judge_table(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """One row a family and set: judge, set, family, auroc, ci_low, ci_high, positives."""
    reports = [(j, s, r) for j in ("family_judge", "musicnn") for s, r in metrics[j].items()]
    reports += [("one font", s, r) for s, r in metrics["cross_font"].items()]
    return pd.DataFrame(
        [
            {"judge": judge, "set": name, "family": family, **report[family]}
            for judge, name, report in reports
            for family in FAMILIES
            if family in report
        ]
    )


def judge_figure(metrics: Mapping[str, Any]) -> Figure:
    """AUROC of every family, by either judge, behind the codec, where generated music is."""
    figure, ((axis,),) = plots.new_figure(size=(12.0, 4.2))
    for series, judge in enumerate(("family_judge", "musicnn")):
        report = metrics[judge].get("codec") or metrics[judge][FONTS[0]]
        entries = [report.get(f, {}) for f in FAMILIES]
        values, low, high = (
            [np.nan if e.get(k) is None else e[k] for e in entries]
            for k in ("auroc", "ci_low", "ci_high")
        )
        plots.interval_bars(
            axis, [f.replace("_", "\n") for f in FAMILIES], values, low, high, offset=series * 0.4,
            colour=plots.COLOURS[series], name=judge.replace("_", " "), width=0.4,
            show_values=False,
        )  # fmt: skip
    plots.reference_line(axis, 0.5, "chance")
    axis.set(title="Judges on codec output of unheard compositions", ylabel="AUROC (95 %)",
             ylim=(0.3, 1.02))  # fmt: skip
    axis.legend(loc="lower right")
    return figure
