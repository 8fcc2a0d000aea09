"""How faithful each SAE is, beside PCA and random dictionaries."""

from __future__ import annotations

from musicscope.report.elements import Section, Table
from musicscope.report.metrics import Sources, cell, missing

ROWS = (
    ("latents", "n_latents"), ("active per frame", "k"),
    ("explained variance", "explained_variance"),
    ("the same, held-out soundfont", "explained_variance_heldout_font"),
    ("control: PCA of k components", "explained_variance_pca"),
    ("control: random dictionary", "explained_variance_random"),
    ("cross-entropy recovered", "ce_recovered"),
    ("audio models: spectral distance recovered", "spectral_recovered"),
    ("dead latents", "dead_fraction"),
    ("stability between seeds (cosine)", "stability"),
    ("control: random rows of equal mean and covariance", "stability_null"),
    ("latents that return in other seeds (share)", "returning.share"),
    ("control: random rows that return", "returning.null_share"),
    ("their share of all firings", "returning.share_of_firings"),
    ("mean cosine of different decoder rows", "decoder_cosine"),
    ("overlap of the spans of the latents used most", "subspaces.used.overlap"),
    ("control: random rows", "subspaces.used.null"),
)  # fmt: skip
FINE = ("explained_variance", "ce_recovered")
"""Near 1: a fourth digit shows the difference."""


def section(sources: Sources) -> Section:
    """Sparse autoencoders."""
    found, absent = {}, []
    for name in (f"{model}-{slot}" for model in sources.models for slot in sources.slots):
        if (numbers := sources.metrics(f"train_sae/{name}")) is None:
            absent.append(missing(f"train_sae/{name}", "train_sae"))
            continue
        model, slot = name.rsplit("-", 1)
        layer = str(numbers.get("layer", "")).replace("layers.", "layer ")
        found[f"{model} {slot}" + (f" ({layer})" if layer else "")] = numbers
    rows = tuple(
        (label, *(cell(one, key, 4 if key.startswith(FINE) else 3) for one in found.values()))
        for label, key in ROWS
        if key != "spectral_recovered" or any(key in one for one in found.values())
    )
    caption = "Sparse autoencoders on test compositions"
    table = Table(caption, ("", *found), rows) if found else None
    return Section("dictionaries", "Sparse autoencoders", {"table": table}, tuple(absent))
