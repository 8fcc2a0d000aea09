"""Clips by set, trivial cues, and how well the models learned."""

from __future__ import annotations

from musicscope.report.elements import Section, Table
from musicscope.report.metrics import Sources, Tree, cell, get, missing, plain

SETS = {
    "clips": "clips, TimGM6mb and synthesis",
    "mixed_pairs": "matched pairs, TimGM6mb and synthesis",
    "fluidr3mono_pairs": "matched pairs, FluidR3Mono",
}
MODEL_ROWS = (
    ("codec: log-mel distance (dB)", "codec.log_mel_distance_db"),
    ("codec: SI-SDR (dB)", "codec.si_sdr_db"),
    ("codec: loss of musicnn's guitar AUROC", "codec.musicnn_guitar_auroc_loss"),
    ("decoder: cross-entropy (nats per code)", "decoder.ce"),
    ("control: unigram", "decoder.ce_unigram"),
    ("control: previous frame", "decoder.ce_previous_frame"),
    ("wrong minus right caption (nats)", "decoder.caption_gain"),
    ("generated guitar against other prompts, family judge (AUROC)",
     "generation.family_judge_guitar_auroc"),
    ("the same, musicnn (AUROC)", "generation.musicnn_guitar_auroc"),
)  # fmt: skip


def section(sources: Sources) -> Section:
    """Data and models."""
    found = sources.metrics("prepare_data")
    runs = {model: sources.metrics(f"pretrain/{model}") for model in sources.models}
    absent = [] if found else [missing("prepare_data", "prepare_data")]
    models = None
    if any(runs.values()):
        rows = ((label, *(cell(run, key) for run in runs.values())) for label, key in MODEL_ROWS)
        models = Table("How well the models learned music", ("", *runs), tuple(rows))
    else:
        absent.append(missing("pretrain/<model>", "pretrain"))
    content = {
        "rendered": sources.rendered,
        "cues": _cues(found) if found else None,
        "clips": _clips(found) if found else None,
        "models": models,
    }
    return Section("data", "Data and models", content, tuple(absent))


def _cues(found: Tree) -> Table:
    sets = get(found, "trivial_cue_auroc") or {}
    cues = sorted({cue for one in sets.values() for cue in one})
    return Table(
        "AUROC of single trivial cues for guitar",
        ("set", *(cue.replace("_", " ") for cue in cues)),
        tuple((SETS.get(key, key), *(cell(one, cue) for cue in cues)) for key, one in sets.items()),
    )


def _clips(found: Tree) -> Table:
    counts = dict(get(found, "clips") or {})
    counts |= {f"compositions, {k}": v for k, v in (get(found, "compositions") or {}).items()}
    rows = tuple((name, plain(count)) for name, count in counts.items())
    return Table("Clips by set", ("set", "count"), rows)
