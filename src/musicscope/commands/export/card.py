"""The model card of an exported SAE: README.md with the front matter of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from musicscope.core.io import write_text
from musicscope.core.stats import Estimate
from musicscope.dictionaries.core import TopKSAE
from musicscope.dictionaries.formats import About

MEASURES = {
    "explained_variance": "explained variance",
    "explained_variance_pca": "the same, PCA of k components",
    "explained_variance_random": "the same, random dictionary",
    "ce_recovered": "recovered cross-entropy",
    "l0": "active latents per frame",
    "dead_fraction": "dead latents",
    "stability": "agreement of seeds, decoder cosine",
    "stability_null": "the same, null",
}
"""Keys of metrics/train_sae/*.json, by their name in the card."""


def license_of(weights: Path) -> str:
    """Read the licence in the front matter of a model's README.md; ValueError without one."""
    path = weights / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    found = front.get("license") if isinstance(front, dict) else None
    if not found:
        raise ValueError(f"{path} names no licence: give --license, such as cc-by-nc-4.0")
    return str(found)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return Estimate.read(value).text()
    return "undefined" if value is None else f"{value:.3g}"


def _metrics(numbers: Mapping[str, Any]) -> list[str]:
    own = numbers.get("train_sae", {})
    rows = [f"| {text} | {_shown(own[key])} |" for key, text in MEASURES.items() if key in own]
    for concept, by_kind in numbers.get("probe", {}).get("concepts", {}).items():
        probes = {kind: by_kind.get(kind, {}).get("test", {}) for kind in ("sae", "shuffled")}
        if all("auroc" in test for test in probes.values()):
            code, null = (_shown(test["auroc"]) for test in probes.values())
            rows.append(
                f"| AUROC of *{concept}* from the codes | {code} (shuffled labels: {null}) |"
            )
    if not rows:
        return ["Not measured: `metrics/` holds no results of this SAE."]
    return ["| on test clips | value [95 %] |", "|---|---|", *rows]


def _data(numbers: Mapping[str, Any], about: About) -> str:
    found = numbers.get("prepare_data", {})
    if not (clips := found.get("clips")):
        return f"{about.data or 'Not recorded'}."
    counts = ", ".join(f"{count:,} {name}" for name, count in clips.items())
    return (
        f"Clips of the stage `prepare_data`: {counts}. Splits are by composition, artist or "
        "source clip."
    )


def write(
    folder: Path, sae: TopKSAE, about: About, slot: str, numbers: Mapping[str, Any], licence: str
) -> None:
    """Write README.md: what the SAE is, its data, metrics, use, limits and licence."""
    front = {
        "license": licence,
        "library_name": "saelens",
        "tags": ["sparse-autoencoder", "interpretability", "music", "text-to-music"],
    }
    frames = f"[{about.frames or 'frames'}, {sae.width}]"
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "",
        f"# SAE of {about.model}, {about.layer}", "",
        f"A sparse autoencoder ({sae.activation}, k = {sae.k}, {sae.n_latents:,} latents) on the "
        f"activations of `{about.model}` after `{about.layer}` ({sae.width} dimensions, {slot} of "
        "the ablation). Its features can be found, heard and steered with musicscope.", "",
        "## Data", "", _data(numbers, about), "",
        "## Metrics", "", *_metrics(numbers), "",
        "## Use", "",
        "```python",
        "from sae_lens import SAE", "",
        'sae = SAE.load_from_disk(".")  # this folder, downloaded',
        f"codes = sae.encode(x)  # x: {frames} activations in their own units",
        "```", "",
        "```",
        f"musicscope find-concept --model {about.model} --sae . --with guitars --without others",
        "```", "",
        "x comes from teacher forcing with the start column and the delay pattern, frame t at the "
        "position whose newest input is codebook 0 of frame t. There is no BOS token and no "
        "normalisation.", "",
        "## Limits", "",
        "A feature that does not return when another seed is trained is not *the* feature of a "
        "model; the agreement of seeds, where measured, is above with its null. Features describe "
        "the data above, and may not hold on other music.", "",
        "## Licence", "",
        f"{licence}. The model and the data have licences of their own.", "",
    ]  # fmt: skip
    write_text(folder / "README.md", "\n".join(lines))
