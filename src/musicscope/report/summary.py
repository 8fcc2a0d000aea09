"""Collect the headline numbers into one flat file.

`HEADLINES` is the whole selection: one row per number, with its controls. Everything else stays in
metrics/<stage>/*.json. The summary is one level deep: ``dvc metrics diff`` prints flat keys.
Files are looked up by params.models, never by a glob: Git may still hold a dropped model's files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import pandas as pd

from musicscope.core.io import read_json
from musicscope.core.stats import Estimate

Json: TypeAlias = "dict[str, Json] | list[Json] | str | float | None"


class MissingMetric(ValueError):
    """A metrics file or key that the summary needs is absent; the message names the stage."""


@dataclass(frozen=True)
class Headline:
    """One number of the summary, and where it and its controls are."""

    key: str
    """Key of the value; a control's key is `<key>_<control>`. {model} repeats the row per model."""
    files: tuple[str, ...]
    """Paths below metrics/, the first that exists counts; {slot} is the first slot."""
    path: str
    """Dotted path of the value in the file."""
    unit: str
    controls: Mapping[str, str] = field(default_factory=dict)
    """Name of each null or control -> its dotted path in the same file."""
    absent: tuple[str, ...] = ()
    """Dotted paths that some runs lack; a number at or below them is then null, not an error."""


def _steer(direction: str) -> Headline:
    concept = f"concepts.guitar.{direction}"
    at, controls = f"{concept}.methods", ("diff_means", "prompt_edit", "random_feature")
    return Headline(
        f"{{model}}.steer.guitar_{direction}",
        ("steer_full/{model}.json", "steer/{model}.json"),
        f"{at}.sae.success",
        "share",
        {control: f"{at}.{control}.success" for control in controls},
        absent=(concept, f"{at}.prompt_edit"),  # no clips to edit; an audio model has no prompts
    )


_SAE, _PROBE = ("train_sae/{model}-{slot}.json",), ("probe/{model}-{slot}.json",)
_FINDER, _JUDGES = ("find_concept/{model}.json",), ("train_judge.json",)
_GUITAR = "concepts.guitar"

# fmt: off
HEADLINES: tuple[Headline, ...] = (
    Headline("{model}.sae.explained_variance", _SAE, "explained_variance", "share",
             {"pca": "explained_variance_pca"}),
    Headline("{model}.sae.ce_recovered", _SAE, "ce_recovered", "share (0: mean ablation)"),
    Headline("{model}.sae.stability", _SAE, "stability", "mean cosine",
             {"null": "stability_null"}),
    Headline("{model}.probe.guitar_auroc", _PROBE, f"{_GUITAR}.sae.test.auroc", "AUROC",
             {"activations": f"{_GUITAR}.dense.test.auroc",
              "logmel": f"{_GUITAR}.logmel.test.auroc",
              "shuffled": f"{_GUITAR}.shuffled.test.auroc"},
             absent=(_GUITAR,)),  # recordings labelled with other concepts only
    Headline("usae.r2_first_to_second", ("train_usae.json",), "headline.r2_0_1", "R2",
             {"mispaired": "null.mispaired.r2_0_1"}),
    Headline("usae.r2_second_to_first", ("train_usae.json",), "headline.r2_1_0", "R2",
             {"mispaired": "null.mispaired.r2_1_0"}),
    Headline("usae.cofire_proportion_mean", ("train_usae.json",),
             "headline.cofire_proportion_mean_0", "share of firings",
             {"mispaired": "null.mispaired.cofire_proportion_mean_0"}),
    Headline("crosscoder.r2", ("train_crosscoder.json",), "headline.r2_0", "R2",
             {"mispaired": "null.mispaired.r2_0"}),
    Headline("match.common", ("match_features.json",), "sets.common", "features",
             {"null": "sets.null_common"},
             absent=("sets.null_common",)),  # more than two models
    Headline("{model}.finder.guitar_features", _FINDER, "sae.guitar.discoveries", "features",
             {"null": "sae.guitar.null.discoveries"}, absent=("sae.guitar.null",)),
    Headline("{model}.finder.guitar_best_auroc", _FINDER, "sae.guitar.test.best_auroc", "AUROC",
             {"all_features": "sae.guitar.test.tested_auroc"},
             absent=("sae.guitar.test.best_auroc",)),  # folders have no test clips
    Headline("{model}.maximise.sound", ("maximize_activation/{model}.json",),
             "headline.heard_reached", "ratio to the best real clip",
             {"random_direction": "headline.heard_null_reached"},
             absent=("headline.heard_reached", "headline.heard_null_reached")),  # no tokens
    Headline("judge.classifier_guitar_auroc", _JUDGES, "family_judge.codec.guitar.auroc", "AUROC",
             {"shuffled": "family_judge.shuffled.guitar.auroc"}),
    Headline("judge.musicnn_guitar_auroc", _JUDGES, "musicnn.codec.guitar.auroc", "AUROC",
             {"shuffled": "musicnn.shuffled.guitar.auroc"}),
    _steer("off"),
    _steer("on"),
)
# fmt: on


@dataclass(frozen=True)
class Row:
    """A headline number of one run."""

    key: str
    number: Estimate
    """NaN where a run has none."""
    unit: str
    controls: dict[str, Estimate]

    def text(self, of: Estimate) -> str:
        """Write the number or one of its controls; counts have no decimals."""
        return of.text(0 if isinstance(self.number.value, int) else 3)


def _stage(file: str) -> str:
    """Name the DVC stage that writes a metrics file."""
    path = Path(file)
    return f"{path.parent}@{path.stem}" if path.parent.name else path.stem


def _read(metrics: Path, files: Sequence[str]) -> tuple[str, Json]:
    """Read the first of `files` that exists; name the last, which every run has, if none does."""
    for file in files:
        if (path := metrics / file).is_file():
            return file, read_json(path)
    raise MissingMetric(f"{metrics / files[-1]} is missing: run dvc repro {_stage(files[-1])}")


def _lookup(tree: Json, dotted: str, absent: Sequence[str]) -> Estimate:
    """Follow a dotted path; NaN where `absent` allows it, else KeyError with the path."""
    parts = dotted.split(".")
    for n, part in enumerate(parts, 1):
        if not isinstance(tree, dict) or part not in tree:
            missing = ".".join(parts[:n])
            if any(f"{path}.".startswith(f"{missing}.") for path in absent):
                return Estimate.read(None)
            raise KeyError(dotted)
        tree = tree[part]
    if isinstance(tree, list | str):
        raise KeyError(dotted)
    try:
        return Estimate.read(tree)
    except ValueError:
        raise KeyError(dotted) from None


def headline_rows(
    models: Sequence[str], slots: Sequence[str], metrics: str | Path = "metrics"
) -> Iterator[Row]:
    """Look up every headline number, model after model.

    Raises:
        MissingMetric: a file is missing, or a number that every run has.
    """
    metrics = Path(metrics)
    for row in HEADLINES:
        for model in models if "{model}" in row.key else [""]:
            names = {"model": model, "slot": slots[0]}
            file, tree = _read(metrics, [file.format(**names) for file in row.files])
            try:
                value = _lookup(tree, row.path, row.absent)
                controls = {k: _lookup(tree, path, row.absent) for k, path in row.controls.items()}
            except KeyError as error:
                path = error.args[0]
                raise MissingMetric(
                    f"{metrics / file} has no {path}: run dvc repro -f {_stage(file)}"
                ) from None
            yield Row(row.key.format(**names), value, row.unit, controls)


def summarize(
    models: Sequence[str], slots: Sequence[str], metrics: str | Path = "metrics"
) -> dict[str, float]:
    """Collect {key: number}: each of `HEADLINES`, followed by its controls; NaN if a run has none.

    Raises:
        MissingMetric: as `headline_rows`.
    """
    summary: dict[str, float] = {}
    for row in headline_rows(models, slots, metrics):
        summary[row.key] = row.number.value
        summary |= {f"{row.key}_{name}": control.value for name, control in row.controls.items()}
    return summary


def summary_table(
    models: Sequence[str], slots: Sequence[str], metrics: str | Path = "metrics"
) -> pd.DataFrame:
    """Tabulate the headline numbers: value with interval, unit and controls as text."""
    return pd.DataFrame(
        [
            {
                "number": row.key,
                "value": row.text(row.number),
                "controls": ", ".join(
                    f"{name} {row.text(Estimate(control.value))}"
                    for name, control in row.controls.items()
                ),
                "unit": row.unit,
            }
            for row in headline_rows(models, slots, metrics)
        ]
    ).set_index("number")
