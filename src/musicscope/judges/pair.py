"""The judges of generated music as one object, and the distance between two sets of clips.

One judge chooses, the others never do. `CHOOSING`, a classifier of rendered clips, picks settings
of steering on validation prompts. `HELD_OUT` judges only report: musicnn, trained on recordings
with listeners' tags; a classifier that heard only the soundfont that no recipe is learnt on; and
the distance to centroids in musicnn's embedding. What they share with what they judge: the choosing
classifier and the centroids know the compositions and the codec that recipes are learnt on; the
centroids also know musicnn's network.

metrics/train_judge.json says how far to trust them. Where a judge's AUROC on codec output is below
`FIT`, it has no say. Concepts that params.concepts defines have judges of their own (`concepts`),
whose numbers stand beside those of families. Means over many clips show the direction of a change;
for most families a single clip is little better than a guess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from musicscope.core.io import atomic_dir, read_json, write_json
from musicscope.data.taxonomy import FAMILIES
from musicscope.judges.concepts import FOLDER as CONCEPTS
from musicscope.judges.concepts import OWN_FIT, ConceptJudges, load_concept_judges
from musicscope.judges.embedding_distance import EmbeddingJudge, load_embedding_judge
from musicscope.judges.instrument_classifier import FamilyJudge, load_family_judge
from musicscope.judges.musicnn import Musicnn, check_audio, silent, whole
from musicscope.models.checkpoint import read_safetensors

FOLDER = "data/judge"
TAGS: dict[str, tuple[str, ...]] = {
    "guitar": ("guitar",),
    "piano": ("piano",),
    "strings": ("strings", "violin", "cello"),
    "choir": ("choir", "choral"),
    "flute": ("flute",),
    "synth": ("synth",),
    "plucked": ("harp", "sitar", "harpsichord"),
    "drums": ("drums",),
}
"""Family -> tags of musicnn, chosen by their meaning alone; the highest counts. Other families have
no tag."""
JUDGES = ("family_judge", "musicnn")
"""Judges that `generate` and the studio show."""
CHOOSING = ("family_judge",)
HELD_OUT = ("musicnn", "other_font_judge", "embedding_judge")
FIT = 0.7
"""Least AUROC on codec output of a judge whose verdict on a family counts."""


def least_auroc(concept: str) -> float:
    """Least AUROC on codec output of a judge whose verdict on a family or concept counts."""
    return FIT if concept in FAMILIES else OWN_FIT


def family_probabilities(
    tags: np.ndarray, names: tuple[str, ...], families: tuple[str, ...],
    meanings: Mapping[str, tuple[str, ...]] = TAGS,
) -> np.ndarray:  # fmt: skip
    """Convert musicnn's tags [n, len(names)] to families [n, F]; NaN where it has no tag."""
    values = np.full((len(tags), len(families)), np.nan, np.float32)
    for column, family in enumerate(families):
        if chosen := [names.index(tag) for tag in meanings.get(family, ())]:
            values[:, column] = tags[:, chosen].max(1)
    return values


@dataclass(frozen=True)
class Judges:
    """All judges. All audio is float [n, samples], 16 kHz, mono; level has no effect."""

    family_judge: FamilyJudge
    musicnn: Musicnn
    other_font_judge: FamilyJudge | None = None
    """Trained on the soundfont of the held-out clips alone."""
    embedding_judge: EmbeddingJudge | None = None
    reliability: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Judge -> family -> AUROC on codec output of test compositions."""
    own: ConceptJudges | None = None
    """Of concepts that params.concepts defines"""
    _last: dict[bytes, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the columns of `predict`."""
        return self.family_judge.families + (() if self.own is None else self.own.names)

    def predict(self, audio: np.ndarray) -> dict[str, np.ndarray]:
        """Predict family probabilities, float32 [n, F] per judge.

        "musicnn" has NaN columns where it has no tag, and every judge where it refuses to judge a
        defined concept. A silent clip is a row of NaN in both.
        ValueError: another rank, no samples, NaN or infinity.
        """
        return self._with_own(self._of_families(audio), audio)

    def _of_families(self, audio: np.ndarray) -> dict[str, np.ndarray]:
        tags, _ = self._tags(audio)
        known = self.family_judge.families
        return {
            "family_judge": self.family_judge.predict(audio),
            "musicnn": family_probabilities(tags, self.musicnn.tags, known),
        }

    def predict_own(self, audio: np.ndarray) -> dict[str, np.ndarray]:
        """Predict defined concepts, trusted or not: float32 [n, concepts] per judge."""
        if self.own is None:
            return {}
        tags, embeddings = self._tags(audio)
        found = self.own.predict(audio, embeddings)
        meant = family_probabilities(tags, self.musicnn.tags, self.own.names, self.own.tags)
        return found | {"musicnn": meant}

    def _with_own(self, found: dict[str, np.ndarray], audio: np.ndarray) -> dict[str, np.ndarray]:
        """Append columns of defined concepts; NaN where a judge is not to be trusted."""
        if self.own is None:
            return found
        more, unknown = self.predict_own(audio), np.full((len(audio), len(self.own.names)), np.nan)
        for judge, values in found.items():
            columns = more.get(judge, unknown).astype(np.float32)
            for i, name in enumerate(self.own.names):
                if not self.reliability.get(judge, {}).get(name, 0.0) >= OWN_FIT:
                    columns[:, i] = np.nan
            found[judge] = np.concatenate([values, columns], 1)
        return found

    def predict_all(self, audio: np.ndarray) -> dict[str, np.ndarray]:
        """Predict as `predict`, by the judges of `HELD_OUT` too as far as they are there."""
        found = self._of_families(audio)
        if self.other_font_judge is not None:
            found["other_font_judge"] = self.other_font_judge.predict(audio)
        if self.embedding_judge is not None:
            found["embedding_judge"] = self.embedding_judge.predict(self.embed(audio))
        return self._with_own(found, audio)

    def embed(self, audio: np.ndarray) -> np.ndarray:
        """Compute musicnn's penultimate layer, float32 [n, 200]; NaN for silent clips."""
        return self._tags(audio)[1]

    def _tags(self, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """musicnn's tags and embeddings; keeps the last result, because musicnn is slow."""
        audio = check_audio(audio)
        key = hashlib.sha256(repr(audio.shape).encode() + audio.tobytes()).digest()
        if key not in self._last:
            self._last.clear()
            self._last[key] = self.musicnn.predict(audio)
        return self._last[key]

    def save(self, folder: str | Path = FOLDER) -> None:
        """Write every judge and reliability.json, all or nothing."""
        with atomic_dir(folder) as temporary:
            self.family_judge.save(temporary / "family_judge")
            if self.other_font_judge is not None:
                self.other_font_judge.save(temporary / "other_font_judge")
            if self.embedding_judge is not None:
                self.embedding_judge.save(temporary / "embedding_judge.safetensors")
            if self.own is not None:
                self.own.save(temporary / CONCEPTS)
            write_json(temporary / "reliability.json", self.reliability)
            weights = {name: value.contiguous() for name, value in self.musicnn.weights.items()}
            save_file(weights, temporary / "musicnn.safetensors")


def load_judges(folder: str | Path = FOLDER) -> Judges:
    """Load judges from the folder of `Judges.save`; needs no network access.

    FileNotFoundError or ValueError names the file and the stage to run.
    """
    folder = Path(folder)
    path = folder / "musicnn.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run dvc repro train_judge")
    musicnn = whole(read_safetensors(path), f"{path}", "run dvc repro -f train_judge")
    family_judge = load_family_judge(folder / "family_judge")
    more: dict[str, Any] = {}
    if (folder / "reliability.json").is_file():
        more["reliability"] = read_json(folder / "reliability.json")
    if (folder / "other_font_judge").is_dir():
        more["other_font_judge"] = load_family_judge(folder / "other_font_judge")
    if (path := folder / "embedding_judge.safetensors").is_file():
        more["embedding_judge"] = load_embedding_judge(path, family_judge.families)
    return Judges(family_judge, musicnn, own=load_concept_judges(folder / CONCEPTS), **more)


# --- distance of two sets ---------------------------------------------------------------------


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the Frechet distance of embeddings a [n, d] and b [m, d] (1706.08500).

    For fitted Gaussians: |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)). The last trace is the sum
    of the singular values of X_a X_b^T / sqrt((n - 1)(m - 1)), X centred, which is exact also for
    n < d. Rows with NaN (silent clips) are left out. The bias is about tr(A) / n + tr(B) / m, so
    compare sets of equal size only.

    Raises:
        ValueError: fewer than two clips that sound, or other widths.
    """
    a, b = _sounding(a), _sounding(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"embeddings of {a.shape[1]} and {b.shape[1]} dimensions do not compare")
    centred = [x - x.mean(0) for x in (a, b)]
    total = sum((x**2).sum() / (len(x) - 1) for x in centred)
    cross = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(max(0.0, gap + total - 2 * cross / np.sqrt((len(a) - 1) * (len(b) - 1))))


def _sounding(embeddings: np.ndarray) -> np.ndarray:
    """Rows without NaN, float64."""
    embeddings = np.asarray(embeddings, np.float64)
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be [clips, dimensions], not {embeddings.shape}")
    kept = embeddings[~silent(embeddings)]
    if len(kept) < 2:
        raise ValueError(f"{len(kept)} of {len(embeddings)} clips sound: 2 are needed")
    return kept
