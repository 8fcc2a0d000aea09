"""One flat file of headline numbers, read with ``dvc metrics diff``, and its table and picture.

Keys are dotted and the file is one level deep: DVC shows both layouts alike, and a flat file can
be searched by the very key that the diff prints. Everything is looked up by params.models and
params.slots, never by a glob: files of a model that was dropped stay in Git and must not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from musicscope.core import plots
from musicscope.core.io import read_json
from musicscope.dictionaries import evaluation
from musicscope.features import report as match_report
from musicscope.finder import plots as concept_plots
from musicscope.judges import training as judge_training
from musicscope.maximisation import report as maximization_report
from musicscope.steering import report as steering_report

SAE_KEYS = ("explained_variance", "dead_fraction", "ce_recovered", "l0", "stability")
# Summary key -> where it is in concepts.guitar of metrics/probe/<model>-<slot>.json.
GUITAR_KEYS = {
    "sae_auroc": "sae.test.auroc",
    "sae_auroc_ci_low": "sae.test.ci_low",
    "sae_auroc_ci_high": "sae.test.ci_high",
    "sae_k16_auroc": "k_sparse.016.test.auroc",
    "dense_auroc": "dense.test.auroc",
    "sae_minus_dense": "sae_minus_dense.test.difference",
    "sae_minus_dense_ci_low": "sae_minus_dense.test.ci_low",
    "sae_minus_dense_ci_high": "sae_minus_dense.test.ci_high",
    "logmel_auroc": "logmel.test.auroc",
    "codec_auroc": "codec.test.auroc",
    "trivial_auroc": "trivial.test.auroc",
    "shuffled_auroc": "shuffled.test.auroc",
    "heldout_font_sae_auroc": "sae.heldout_font.auroc",
    "heldout_font_dense_auroc": "dense.heldout_font.auroc",
    "pair_accuracy": "sae.pairs_timgm6mb.accuracy",
    "heldout_font_pair_accuracy": "sae.pairs_fluidr3mono.accuracy",
}
# A small smoke run has no held-out font, no pairs, or fewer latents: null there, not an error.
OPTIONAL = ("k_sparse.", "heldout_font", "pairs_")


class MissingMetric(ValueError):
    """A metrics file or key that the summary needs is not there; the message names the stage."""


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one level with dotted keys; lists are left out, as DVC ignores them."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            flat[f"{prefix}{key}"] = value
    return flat


def _read(path: Path, stage: str) -> dict[str, Any]:
    if not path.is_file():
        raise MissingMetric(f"{path} is missing: run dvc repro {stage}")
    return read_json(path)


def _lookup(tree: dict[str, Any], dotted: str, path: Path, stage: str) -> Any:
    value: Any = tree
    for part in dotted.split("."):
        if not isinstance(value, dict) or part not in value:
            if any(word in dotted for word in OPTIONAL):
                return None
            raise MissingMetric(f"{path} has no {dotted}: run dvc repro -f {stage}")
        value = value[part]
    return value


def _top_layer(path: Path, slot: str) -> int:
    """The layer that the selection rule put first, from metrics/layers/<model>.yaml."""
    if not path.is_file():
        raise MissingMetric(f"{path} is missing: run dvc repro select_layers")
    chosen = OmegaConf.load(path)
    if slot not in chosen:
        raise MissingMetric(f"{path} has no {slot}: run dvc repro -f select_layers")
    return int(chosen[slot])


def summarize(
    models: Sequence[str], slots: Sequence[str], metrics: str | Path = "metrics"
) -> dict[str, Any]:
    """Headline numbers of all models and slots, {dotted key: number}.

    ``<model>.ablate.top_layer``; ``<model>.sae.<slot>.<SAE_KEYS>``;
    ``<model>.probe.<slot>.guitar.<GUITAR_KEYS>``; ``data.trivial_cue_auroc.*``; and, where they
    are (pretraining is frozen), ``pretrain.codec.*`` and ``pretrain.<model>.*``; and what
    `shared_numbers` and `concept_numbers` give.
    """
    metrics = Path(metrics)
    summary: dict[str, Any] = {}
    for model in models:
        layers = metrics / "layers" / f"{model}.yaml"
        summary[f"{model}.ablate.top_layer"] = _top_layer(layers, slots[0])
        for slot in slots:
            path = metrics / "train_sae" / f"{model}-{slot}.json"
            found = _read(path, f"train_sae@{model}-{slot}")
            for key in SAE_KEYS:
                value = _lookup(found, key, path, f"train_sae@{model}-{slot}")
                summary[f"{model}.sae.{slot}.{key}"] = value
            path = metrics / "probe" / f"{model}-{slot}.json"
            found = _read(path, f"probe@{model}-{slot}")
            for key, dotted in GUITAR_KEYS.items():
                value = _lookup(found, f"concepts.guitar.{dotted}", path, f"probe@{model}-{slot}")
                summary[f"{model}.probe.{slot}.guitar.{key}"] = value
    for name in ("codec", *models):
        if (path := metrics / "pretrain" / f"{name}.json").is_file():
            summary |= flatten(read_json(path), f"pretrain.{name}.")
    data = _read(metrics / "prepare_data.json", "prepare_data")
    cues = _lookup(data, "trivial_cue_auroc", metrics / "prepare_data.json", "prepare_data")
    summary |= flatten(cues, "data.trivial_cue_auroc.")
    return summary | shared_numbers(models, metrics) | concept_numbers(models, metrics)


def shared_numbers(models: Sequence[str], metrics: Path) -> dict[str, Any]:
    """What spans models: ``usae.*``, ``crosscoder.*``, ``match.*``, ``maximize.<model>.*``.

    The stages' own modules say which of their numbers these are. ``maximize.shared.*`` is of
    features maximised in all models at once.
    """
    found: dict[str, Any] = {}
    for name in ("usae", "crosscoder"):
        numbers = _read(metrics / f"train_{name}.json", f"train_{name}")
        found |= {f"{name}.{k}": v for k, v in evaluation.summary_keys(numbers).items()}
    found |= match_report.summary_keys(_read(metrics / "match_features.json", "match_features"))
    for model in models:
        path = metrics / "maximize_activation" / f"{model}.json"
        numbers = _read(path, f"maximize_activation@{model}")
        found |= maximization_report.summary_keys(numbers, model)
    numbers = _read(metrics / "maximize_shared.json", "maximize_shared")
    return found | maximization_report.summary_keys(numbers, "shared")


def concept_numbers(models: Sequence[str], metrics: Path) -> dict[str, Any]:
    """``judge.*``, ``find_concept.*`` and ``<model>.steer.*``.

    ``<model>.steer.*`` is of the whole evaluation (steer_full, frozen) where a model has one, and
    ``<model>.steer_quick.*`` then of the stage steer; else the former is of steer.
    """
    found = judge_training.judge_summary(_read(metrics / "train_judge.json", "train_judge"))
    for model in models:
        path = metrics / "find_concept" / f"{model}.json"
        found |= concept_plots.find_summary(model, _read(path, f"find_concept@{model}"))
        runs = {"steer": _read(metrics / "steer" / f"{model}.json", f"steer@{model}")}
        if (path := metrics / "steer_full" / f"{model}.json").is_file():
            runs = {"steer": read_json(path), "steer_quick": runs["steer"]}
        for prefix, numbers in runs.items():
            keys = steering_report.summary_keys(numbers)
            found |= {f"{model}.{prefix}.{key}": value for key, value in keys.items()}
    return found


def summary_table(
    summary: dict[str, Any], models: Sequence[str], slots: Sequence[str]
) -> pd.DataFrame:
    """One row a number, one column a (model, slot): what the README and the terminal show."""
    rows: dict[str, dict[str, Any]] = {}
    for model in models:
        for slot in slots:
            column = rows.setdefault(f"{model} {slot}", {})
            for key in SAE_KEYS:
                column[f"SAE {key}"] = summary[f"{model}.sae.{slot}.{key}"]
            for key in GUITAR_KEYS:
                if not key.endswith(("_low", "_high")):
                    value = summary[f"{model}.probe.{slot}.guitar.{key}"]
                    low, high = (
                        summary.get(f"{model}.probe.{slot}.guitar.{key}_ci_{end}")
                        for end in ("low", "high")
                    )
                    column[f"guitar {key}"] = (value, low, high)
    return pd.DataFrame({name: {k: _cell(v) for k, v in c.items()} for name, c in rows.items()})


def _cell(value: Any) -> str:
    """A number, or (value, low, high), as text."""
    if not isinstance(value, tuple):
        return "n/a" if value is None else f"{value:.4g}"
    value, low, high = value
    text = "n/a" if value is None else f"{value:.3f}"
    return text if low is None or high is None else f"{text} [{low:.3f}, {high:.3f}]"


def plot_summary(
    ablations: dict[str, dict], probes: dict[str, dict], kind: str, concept: str = "guitar"
) -> Figure:
    """The picture of the README: KL of every layer (of an audio model: its counterpart), and one
    concept's AUROC beside its baselines.

    `ablations`: {model: metrics/ablate/<model>.json}, of which one `kind` is drawn; `probes`:
    {"<model> <slot>": metrics/probe/<model>-<slot>.json}.
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
