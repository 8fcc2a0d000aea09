"""Effect of ablating each layer."""

from __future__ import annotations

from musicscope.report.elements import Figure, Section, Table
from musicscope.report.metrics import Sources, Tree, cell, in_words, missing, plain, read


def section(sources: Sources) -> Section:
    """Which layers matter."""
    figures, tables, absent = [], [], []
    for model in sources.models:
        if (found := sources.metrics(f"ablate/{model}")) is None:
            absent.append(missing(f"ablate/{model}", "ablate"))
            continue
        figures.append(_figure(sources, model, found))
        tables.append(_table(model, found))
    content = {"figures": figures, "tables": tables}
    return Section("layers", "Which layers matter", content, tuple(absent))


def _layers(found: Tree) -> tuple[list[str], list[str]]:
    """Layers and kinds of ablation."""
    layers: list[str] = sorted(found["layers"], key=int)
    return layers, sorted({kind for layer in layers for kind in found["layers"][layer]})


def scores_of(found: Tree) -> tuple[str, str, str]:
    """Keys of both scores and their unit; an audio model has counterparts, for lack of logits."""
    other = found.get("counterparts")
    if other is None:
        return "kl", "dce", "nats per code"
    return other["kl"], other["dce"], "spectral distance"


def _figure(sources: Sources, model: str, found: Tree) -> Figure | str:
    (layers, kinds), (kl, _, unit) = _layers(found), scores_of(found)
    series = {k: [read(found, f"layers.{layer}.{k}.{kl}").value for layer in layers] for k in kinds}
    what = f"KL ({unit})" if kl == "kl" else unit
    clips = f"{plain(found.get('clips'))} clips of {plain(found.get('groups'))} compositions"
    return sources.figure(
        f"ablate/{model}",
        in_words(model, what, "layer", [int(layer) for layer in layers], series),
        f"{model}, {clips}. Shaded: 95 % bootstrap over compositions.",
    )


def _table(model: str, found: Tree) -> Table:
    (layers, kinds), (kl, dce, unit) = _layers(found), scores_of(found)
    names = found.get("hook_points") or {}
    rows = (
        (
            f"{layer} {names.get(layer, '')}".strip(),
            *(cell(found["layers"][layer].get(k), key, 4) for k in kinds for key in (kl, dce)),
        )
        for layer in layers
    )
    heads = ("KL", "rise of CE") if kl == "kl" else ("change", "rise of distance to clip")
    columns = (f"{kind} {head}" for kind in kinds for head in heads)
    return Table(f"{model}: {unit}", ("layer", *columns), tuple(rows))
