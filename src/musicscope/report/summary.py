"""Collect the headline numbers into one flat file, and draw the overview figure.

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
from matplotlib.figure import Figure

from musicscope.core import plots
from musicscope.core.io import read_json

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
    interval: tuple[str, str] | None = None
    """Dotted paths of the ends of the 95 % interval; shown in the table, not in the file."""
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
        (f"{at}.sae.success_ci_low", f"{at}.sae.success_ci_high"),
        absent=(concept, f"{at}.prompt_edit"),  # no clips to edit; an audio model has no prompts
    )


_SAE, _PROBE = ("train_sae/{model}-{slot}.json",), ("probe/{model}-{slot}.json",)
_FINDER, _JUDGES = ("find_concept/{model}.json",), ("train_judge.json",)
_GUITAR = "concepts.guitar"

# fmt: off
HEADLINES: tuple[Headline, ...] = (
    Headline("{model}.sae.explained_variance", _SAE, "explained_variance", "share",
             {"pca": "explained_variance_pca"},
             ("explained_variance_low", "explained_variance_high")),
    Headline("{model}.sae.ce_recovered", _SAE, "ce_recovered", "share (0: mean ablation)",
             interval=("ce_recovered_low", "ce_recovered_high")),
    Headline("{model}.sae.stability", _SAE, "stability", "mean cosine",
             {"null": "stability_null"}),
    Headline("{model}.probe.guitar_auroc", _PROBE, f"{_GUITAR}.sae.test.auroc", "AUROC",
             {"activations": f"{_GUITAR}.dense.test.auroc",
              "logmel": f"{_GUITAR}.logmel.test.auroc",
              "shuffled": f"{_GUITAR}.shuffled.test.auroc"},
             (f"{_GUITAR}.sae.test.ci_low", f"{_GUITAR}.sae.test.ci_high")),
    Headline("usae.r2_first_to_second", ("train_usae.json",), "headline.r2_0_1.value", "R2",
             {"mispaired": "null.mispaired.r2_0_1"},
             ("headline.r2_0_1.low", "headline.r2_0_1.high")),
    Headline("usae.r2_second_to_first", ("train_usae.json",), "headline.r2_1_0.value", "R2",
             {"mispaired": "null.mispaired.r2_1_0"},
             ("headline.r2_1_0.low", "headline.r2_1_0.high")),
    Headline("usae.cofire_proportion", ("train_usae.json",), "headline.cofire_proportion_0.value",
             "share of firings", {"mispaired": "null.mispaired.cofire_proportion_0"},
             ("headline.cofire_proportion_0.low", "headline.cofire_proportion_0.high")),
    Headline("crosscoder.r2", ("train_crosscoder.json",), "headline.r2_0.value", "R2",
             {"mispaired": "null.mispaired.r2_0"}, ("headline.r2_0.low", "headline.r2_0.high")),
    Headline("match.common", ("match_features.json",), "sets.common", "features",
             {"null": "sets.null_common"}, ("sets.common_low", "sets.common_high"),
             absent=("sets.null_common",)),  # more than two models
    Headline("{model}.finder.guitar_features", _FINDER, "sae.guitar.discoveries", "features",
             {"null": "sae.guitar.null.discoveries"}, absent=("sae.guitar.null",)),
    Headline("{model}.finder.guitar_best_auroc", _FINDER, "sae.guitar.test.best_auroc", "AUROC",
             {"all_features": "sae.guitar.test.tested_auroc"},
             ("sae.guitar.test.best_ci_low", "sae.guitar.test.best_ci_high"),
             absent=("sae.guitar.test.best_auroc",)),  # folders have no test clips
    Headline("{model}.maximise.sound", ("maximize_activation/{model}.json",),
             "headline.heard_reached", "ratio to the best real clip",
             {"random_direction": "headline.heard_null_reached"},
             ("headline.heard_reached_low", "headline.heard_reached_high"),
             absent=("headline.heard_reached", "headline.heard_null_reached")),  # no tokens
    Headline("judge.classifier_guitar_auroc", _JUDGES, "family_judge.codec.guitar.auroc", "AUROC",
             {"shuffled": "family_judge.shuffled.guitar.auroc"},
             ("family_judge.codec.guitar.ci_low", "family_judge.codec.guitar.ci_high")),
    Headline("judge.musicnn_guitar_auroc", _JUDGES, "musicnn.codec.guitar.auroc", "AUROC",
             {"shuffled": "musicnn.shuffled.guitar.auroc"},
             ("musicnn.codec.guitar.ci_low", "musicnn.codec.guitar.ci_high")),
    _steer("off"),
    _steer("on"),
)
# fmt: on


@dataclass(frozen=True)
class Row:
    """A headline number of one run."""

    key: str
    value: float | None
    unit: str
    controls: dict[str, float | None]
    interval: tuple[float | None, ...]
    """Low and high end of the 95 % interval, null where a run has none; empty: never."""


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


def _lookup(tree: Json, dotted: str, absent: Sequence[str] = ()) -> float | None:
    """Follow a dotted path; null where `absent` allows it, else KeyError with the path."""
    parts = dotted.split(".")
    for n, part in enumerate(parts, 1):
        if not isinstance(tree, dict) or part not in tree:
            missing = ".".join(parts[:n])
            if any(f"{path}.".startswith(f"{missing}.") for path in absent):
                return None
            raise KeyError(dotted)
        tree = tree[part]
    if isinstance(tree, dict | list | str):
        raise KeyError(dotted)
    return tree


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
            ends = tuple(_lookup(tree, end, [end]) for end in row.interval or ())
            yield Row(row.key.format(**names), value, row.unit, controls, ends)


def summarize(
    models: Sequence[str], slots: Sequence[str], metrics: str | Path = "metrics"
) -> dict[str, float | None]:
    """Collect {key: number}: each of `HEADLINES`, followed by its controls.

    Raises:
        MissingMetric: as `headline_rows`.
    """
    summary: dict[str, float | None] = {}
    for row in headline_rows(models, slots, metrics):
        summary[row.key] = row.value
        summary |= {f"{row.key}_{name}": value for name, value in row.controls.items()}
    return summary


def summary_table(
    models: Sequence[str], slots: Sequence[str], metrics: str | Path = "metrics"
) -> pd.DataFrame:
    """Tabulate the headline numbers: value with interval, unit and controls as text."""
    return pd.DataFrame(
        [
            {
                "number": row.key,
                "value": with_interval(row),
                "controls": ", ".join(
                    f"{name} {number(control, digits(row))}"
                    for name, control in row.controls.items()
                ),
                "unit": row.unit,
            }
            for row in headline_rows(models, slots, metrics)
        ]
    ).set_index("number")


def digits(row: Row) -> int:
    """Give the decimals of a row's numbers: none for counts."""
    return 0 if isinstance(row.value, int) else 3


def number(value: float | None, decimals: int = 3) -> str:
    """Write a number as text, n/a for null."""
    return "n/a" if value is None else f"{value:.{decimals}f}"


def with_interval(row: Row) -> str:
    """Write a row's value and interval as ``value [low, high]``."""
    text = number(row.value, digits(row))
    if not row.interval or None in row.interval:
        return text
    return f"{text} [{', '.join(number(end, digits(row)) for end in row.interval)}]"


def plot_summary(
    ablations: Mapping[str, dict], probes: Mapping[str, dict], kind: str, concept: str = "guitar"
) -> Figure:
    """Draw the KL divergence of every layer, and one concept's AUROC beside its baselines.

    Args:
        ablations: {model: metrics/ablate/<model>.json}; an audio model has a counterpart of KL.
        probes: {"<model> <slot>": metrics/probe/<model>-<slot>.json}.
        kind: of ablation: skip, zero or mean.
    """
    figure, (axes,) = plots.new_figure(1, 2, size=(13.0, 4.4), width_ratios=[1, 1.8])
    for series, (model, found) in enumerate(ablations.items()):
        layers = sorted(found["layers"], key=int)
        score = found.get("counterparts", {}).get("kl", "kl")
        kl, low, high = (
            [found["layers"][layer][kind][key] for layer in layers]
            for key in (score, f"{score}_low", f"{score}_high")
        )
        name = model if score == "kl" else f"{model} (spectral distance)"
        plots.interval_curve(axes[0], list(map(int, layers)), kl, low, high, name, series)
    axes[0].set(title=f"{kind} ablation", xlabel="layer", ylabel="KL (nats per code)", yscale="log")
    axes[0].legend()
    names = ["sae", "dense", "logmel", "codec", "trivial", "shuffled"]
    labels = ["SAE", "activations", "log-mel", "codec", "trivial", "shuffled"]
    width = 0.84 / max(1, len(probes))
    for series, (name, found) in enumerate(probes.items()):
        entries = [found["concepts"][concept][key]["test"] for key in names]
        auroc, low, high = ([e[key] for e in entries] for key in ("auroc", "ci_low", "ci_high"))
        plots.interval_bars(
            axes[1], labels, auroc, low, high,
            colour=plots.COLOURS[series % len(plots.COLOURS)], name=name, width=width,
            offset=width * (series - (len(probes) - 1) / 2), show_values=len(probes) < 3,
        )  # fmt: skip
    axes[1].axhline(0.5, color="#555555", lw=1, ls="--")
    axes[1].set(title=f"{concept} on unheard compositions", ylabel="AUROC (95 %)", ylim=(0.3, 1.05))
    handles, texts = axes[1].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower right", ncols=4)
    return figure
