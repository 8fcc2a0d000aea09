"""The report's first half, from the committed metrics: data, models, layers, SAEs, concepts.

Every builder takes `Sources` and returns one `Section`. A file or key that is not there becomes a
visible note or a dash, never an error: the page must also tell about a line that ran in part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from musicscope.report.charts import Series, dot_chart, line_chart
from musicscope.report.metrics import Sources, cell, get, scored
from musicscope.report.parts import (
    Cell,
    Details,
    Figure,
    Group,
    Note,
    Section,
    Table,
    number,
    plain,
)

RENDERED = (
    "All clips are rendered from compositions with known instruments, so labels are exact. No "
    "composition lies in two splits. Features are found on the soundfont TimGM6mb; FluidR3Mono, "
    "an independent sample family, is held out."
)
RECORDED = (
    "Clips are recordings, labelled by their captions or tags, which leave things out. No artist "
    "and no source clip lies in two splits. There is no held-out soundfont."
)


def data_section(sources: Sources) -> Section:
    """Clips by set, what trivial cues tell, and how well the models learned."""
    parts: list[Any] = [Note(RENDERED if sources.rendered else RECORDED)]
    data = sources.metrics("prepare_data")
    if data is None:
        parts.append(sources.missing("prepare_data", "prepare_data"))
    else:
        sets = get(data, "trivial_cue_auroc") or {}
        cues = sorted({cue for found in sets.values() for cue in found})
        names = {"clips": "clips, TimGM6mb", "timgm6mb_pairs": "matched pairs, TimGM6mb",
                 "fluidr3mono_pairs": "matched pairs, FluidR3Mono"}  # fmt: skip
        rows = tuple(
            (names.get(key, key), *(number(found.get(cue)) for cue in cues))
            for key, found in sets.items()
        )
        counts = tuple((k, plain(v)) for k, v in (get(data, "clips") or {}).items())
        counts += tuple((f"compositions, {k}", plain(v))
                        for k, v in (get(data, "compositions") or {}).items())  # fmt: skip
        parts += [
            Table(
                "How far single trivial cues tell guitar (AUROC)",
                ("set", *(cue.replace("_", " ") for cue in cues)),
                rows,
                "Chance is .5. A probe that does no better than these has learned loudness or "
                "brightness, not guitar. In matched pairs only the target's program changes.",
            ),
            Details("Clips and compositions", (Table("Clips by set", ("set", "count"), counts),)),
        ]
    if (table := _models_table(sources)) is not None:
        parts.append(table)
    else:
        parts.append(sources.missing("pretrain/<model>", "pretrain"))
    return Section("data", "Data and models", tuple(parts))


def _models_table(sources: Sources) -> Table | None:
    found = {model: sources.metrics(f"pretrain/{model}") for model in sources.models}
    if not any(found.values()):
        return None
    rows = (
        ("codec: log-mel distance (dB)", "codec.log_mel_distance_db"),
        ("codec: SI-SDR (dB)", "codec.si_sdr_db"),
        ("codec: loss of musicnn's guitar AUROC", "codec.musicnn_guitar_auroc_loss"),
        ("decoder: cross-entropy (nats a code)", "decoder.ce"),
        ("control: unigram", "decoder.ce_unigram"),
        ("control: previous frame", "decoder.ce_previous_frame"),
        ("wrong minus right caption (nats)", "decoder.caption_gain"),
        ("generated guitar against other prompts, family judge (AUROC)",
         "generation.family_judge_guitar_auroc"),
        ("the same, musicnn (AUROC)", "generation.musicnn_guitar_auroc"),
    )  # fmt: skip
    return Table(
        "How well the models learned music",
        ("", *sources.models),
        tuple((label, *(cell(found[m], key) for m in sources.models)) for label, key in rows),
        "95 % bootstrap intervals over compositions. The unigram and the previous frame are what a "
        "decoder must beat to have learned anything. Judges never heard generated audio and chose "
        "no feature. What follows can be no better than these models.",
    )


def layers_section(sources: Sources) -> Section:
    """Ablation curves of every layer and the table behind them."""
    parts: list[Any] = [
        Note(
            "Each layer is put out of action in turn: mean puts its average update in its place, "
            "skip drops the update, zero cuts the whole stream. Layers are ranked by the KL "
            "divergence at the logits under mean ablation; the first and last are left out. Audio "
            "models have no logits: the spectral distance between what they make with and without "
            "the layer takes that place, and mean and zero replace the layer's whole output."
        )
    ]
    charts, tables = [], []
    for model in sources.models:
        found = sources.metrics(f"ablate/{model}")
        if found is None:
            parts.append(sources.missing(f"ablate/{model}", "ablate"))
            continue
        layers = sorted(found["layers"], key=int)
        kinds = sorted({kind for layer in layers for kind in found["layers"][layer]})
        other = found.get("counterparts")  # of an audio model, which has no logits
        kl, dce = ("kl", "dce") if other is None else (other["kl"], other["dce"])
        unit = "KL (nats a code)" if other is None else "spectral distance"
        series = [
            Series(
                kind,
                [int(layer) for layer in layers],
                *([get(found, f"layers.{layer}.{kind}.{key}") for layer in layers]
                  for key in (kl, f"{kl}_low", f"{kl}_high")),
            )
            for kind in kinds
        ]  # fmt: skip
        clips = f"{plain(found.get('clips'))} clips of {plain(found.get('groups'))} compositions"
        charts.append(
            Figure(
                line_chart(model, "layer", unit, series, log_y=True),
                f"{model}, {clips}. Shaded: 95 % bootstrap over compositions; log scale.",
            )
        )
        rows = tuple(
            (f"{layer} {get(found, 'hook_points') and found['hook_points'][layer] or ''}".strip(),
             *(cell(found["layers"][layer].get(kind), key, digits=4)
               for kind in kinds for key in (kl, dce)))
            for layer in layers
        )  # fmt: skip
        shown = ("KL", "rise of CE") if other is None else ("change", "rise of distance to clip")
        columns = tuple(f"{kind} {what}" for kind in kinds for what in shown)
        title = f"{model}: {'nats a code' if other is None else 'spectral distance'}"
        tables.append(Table(title, ("layer", *columns), rows))
    if charts:
        parts.append(Group(tuple(charts)))
        parts.append(
            Note(
                "There is no null here: zero ablation is the upper anchor, no change is 0. Not "
                "shown: that a layer with a large effect holds readable features.",
                "note",
            )
        )
        parts.append(Details("Numbers behind the curves", tuple(tables)))
    return Section("layers", "Which layers matter", tuple(parts))


FINE = ("explained_variance", "ce_recovered")  # near 1: a fourth digit tells them apart


def sae_section(sources: Sources) -> Section:
    """How faithful each SAE is, beside PCA and random dictionaries."""
    names, found = [], []
    parts: list[Any] = []
    for model in sources.models:
        for slot in sources.slots:
            numbers = sources.metrics(f"train_sae/{model}-{slot}")
            if numbers is None:
                parts.append(sources.missing(f"train_sae/{model}-{slot}", "train_sae"))
                continue
            layer = str(numbers.get("layer", "")).replace("layers.", "layer ")
            names.append(f"{model} {slot}" + (f" ({layer})" if layer else ""))
            found.append(numbers)
    rows = (
        ("latents", "n_latents"), ("active a frame", "k"),
        ("explained variance", "explained_variance"),
        ("the same, held-out soundfont", "explained_variance_heldout_font"),
        ("control: PCA of k components", "explained_variance_pca"),
        ("control: random dictionary", "explained_variance_random"),
        ("cross-entropy recovered", "ce_recovered"),
        ("audio models: spectral distance recovered", "spectral_recovered"),
        ("dead latents", "dead_fraction"),
        ("stability between seeds (cosine)", "stability"),
        ("control: random rows of equal mean and covariance", "stability_null"),
    )  # fmt: skip
    if found:
        parts.append(
            Table(
                "Sparse autoencoders on test compositions",
                ("", *names),
                tuple(
                    (label, *(cell(one, key, 4 if key.startswith(FINE) else 3) for one in found))
                    for label, key in rows
                    if key != "spectral_recovered" or any(key in one for one in found)
                ),
                "Explained variance is about the per-dimension mean, so predicting the mean gives "
                "0. Cross-entropy recovered: 0 is mean ablation of the layer, 1 is no loss. A high "
                "explained variance does not show that single features mean anything: where "
                "stability is near its control, another seed finds other features.",
            )
        )
    return Section("saes", "Sparse autoencoders", tuple(parts))


REPRESENTATIONS = (
    ("SAE", "sae"), ("activations", "dense"), ("log-mel", "logmel"), ("codec", "codec"),
    ("trivial cues", "trivial"), ("shuffled labels", "shuffled"),
)  # fmt: skip
CHARTED = ("SAE", "activations", "log-mel", "shuffled labels")


def concepts_section(sources: Sources) -> Section:
    """Instrument probes in SAE space against every other representation."""
    parts: list[Any] = [
        Note(
            "One logistic probe a concept, fitted on training compositions, chosen on validation, "
            "scored on test compositions that no model, SAE or probe has heard."
        )
    ]
    charts, tables = [], []
    for model in sources.models:
        for slot in sources.slots:
            found = sources.metrics(f"probe/{model}-{slot}")
            if found is None:
                parts.append(sources.missing(f"probe/{model}-{slot}", "probe"))
                continue
            tables.append(_concept_table(f"{model} {slot}", found))
            if slot == sources.slots[0]:
                charts.append(_concept_chart(f"{model} {slot}", found))
    if charts:
        parts.append(Group(tuple(charts)))
    if tables:
        parts += [tables[0], *([Details("Other models and slots", tuple(tables[1:]))]
                               if tables[1:] else [])]  # fmt: skip
        parts.append(
            Note(
                "The control is the same probe trained on labels dealt to other compositions "
                "(shuffled). Log-mel and trivial cues need no model at all: where they win, the "
                "features add nothing for that concept. Intervals overlap across concepts and are "
                "not corrected for their number. Not shown: that the model uses these features.",
                "note",
            )
        )
    return Section("concepts", "Concepts in SAE space", tuple(parts))


def _concept_chart(name: str, found: dict[str, Any]) -> Figure:
    concepts = sorted(found["concepts"])
    series = [
        (label, [_point(found["concepts"][c], f"{key}.test") for c in concepts])
        for label, key in REPRESENTATIONS
        if label in CHARTED
    ]
    labels = [concept.replace("_", " ") for concept in concepts]
    return Figure(
        dot_chart(name, "AUROC on test compositions", labels, series, 0.5),
        f"{name}: 95 % bootstrap over compositions; dashed: chance.",
    )


def _point(tree: Any, key: str) -> tuple[float | None, float | None, float | None]:
    found = get(tree, key)
    return get(found, "auroc"), get(found, "ci_low"), get(found, "ci_high")


def _concept_table(name: str, found: dict[str, Any]) -> Table:
    def row(concept: str, entry: dict[str, Any]) -> Sequence[Cell | str]:
        cells = [scored(entry, f"{key}.test") for _, key in REPRESENTATIONS]
        cells.append(scored(entry, "sae.heldout_font"))
        cells.append(scored(entry, "sae.pairs_timgm6mb", "accuracy"))
        positives = plain(get(entry, "positives.test"))
        return (concept.replace("_", " "), positives, *cells)

    columns = ("concept", "test clips with it", *(label for label, _ in REPRESENTATIONS))
    return Table(
        f"{name}: AUROC by representation",
        (*columns, "SAE, held-out soundfont", "SAE, matched pairs (accuracy)"),
        tuple(tuple(row(c, found["concepts"][c])) for c in sorted(found["concepts"])),
    )
