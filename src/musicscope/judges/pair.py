"""The two judges of generated music, in one object: what they hear, and how far two sets differ.

They share nothing with the models under study nor with each other: musicnn is trained on recordings
with listeners' tags, the family judge on renderings with exact labels. Neither chooses features.
How far to trust them is in metrics/train_judge.json: over many clips their means say which way the
music moved; one clip's verdict is little better than a guess for most families.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from musicscope.core.io import atomic_dir
from musicscope.judges.instrument_classifier import FamilyJudge, load_family_judge
from musicscope.judges.musicnn import PARAMETERS, Musicnn, check_audio, silent

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
"""Family -> tags of musicnn that say it, chosen by their meaning alone; the highest counts. It has
no tag for the other families."""
JACKKNIFE_BLOCKS = 32
JUDGES = ("family_judge", "musicnn")


def family_probabilities(tags: np.ndarray, names: tuple[str, ...], families: tuple[str, ...]):
    """musicnn's tags [n, len(names)] as families [n, F]: NaN columns where it has no tag."""
    found = np.full((len(tags), len(families)), np.nan, np.float32)
    for column, family in enumerate(families):
        if chosen := [names.index(tag) for tag in TAGS.get(family, ())]:
            found[:, column] = tags[:, chosen].max(1)
    return found


@dataclass(frozen=True)
class Judges:
    """Both judges. All audio is float [n, samples], 16 kHz, mono; its level does not matter."""

    family_judge: FamilyJudge
    musicnn: Musicnn
    _heard: dict[str, object] = field(default_factory=dict, repr=False, compare=False)

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the columns of `predict`."""
        return self.family_judge.families

    def predict(self, audio: np.ndarray) -> dict[str, np.ndarray]:
        """Probability of each family, float32 [n, F] by judge.

        "family_judge" knows all families; "musicnn" has NaN columns where it has no tag. A silent
        clip is a row of NaN in both. ValueError: another rank, no samples, NaN or infinity.
        """
        tags, _ = self._tags(audio)
        return {
            "family_judge": self.family_judge.predict(audio),
            "musicnn": family_probabilities(tags, self.musicnn.tags, self.families),
        }

    def embed(self, audio: np.ndarray) -> np.ndarray:
        """musicnn's penultimate layer, float32 [n, 200], for `frechet_distance`; NaN if silent."""
        return self._tags(audio)[1]

    def _tags(self, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """musicnn's tags and embeddings; those of the last audio are kept, for it is slow."""
        audio = check_audio(audio)
        key = hashlib.sha256(repr(audio.shape).encode() + audio.tobytes()).digest()
        if self._heard.get("key") != key:
            self._heard.update(key=key, found=self.musicnn.predict(audio))
        return self._heard["found"]

    def save(self, folder: str | Path = FOLDER) -> None:
        """Write family_judge/ and musicnn.safetensors, all or nothing."""
        with atomic_dir(folder) as temporary:
            self.family_judge.save(temporary / "family_judge")
            weights = {name: value.contiguous() for name, value in self.musicnn.weights.items()}
            save_file(weights, temporary / "musicnn.safetensors")


def load_judges(folder: str | Path = FOLDER) -> Judges:
    """Read what `Judges.save` wrote; no network is needed.

    Raises:
        FileNotFoundError, ValueError: naming the file and the stage to run.
    """
    folder = Path(folder)
    path = folder / "musicnn.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run dvc repro train_judge")
    weights = load_file(path)
    if sum(value.numel() for value in weights.values()) != PARAMETERS:
        raise ValueError(f"{path} does not hold the whole of musicnn: run dvc repro -f train_judge")
    return Judges(load_family_judge(folder / "family_judge"), Musicnn(weights))


# --- distance of two sets ---------------------------------------------------------------------


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of Gaussians fitted to embeddings a [n, d] and b [m, d] (1706.08500).

    |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)). The last trace is the sum of the singular
    values of X_a X_b^T over sqrt((n - 1)(m - 1)), X centred: exact also where n < d, with no matrix
    square root. Rows with NaN (silent clips) are left out. The estimate is too high by about
    tr(A) / n + tr(B) / m, so compare sets of equal size only.

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


def frechet_interval(a: np.ndarray, b: np.ndarray, paired: bool = False) -> tuple[float, float]:
    """95 % interval of `frechet_distance`, by the jackknife over blocks of clips.

    Not the bootstrap: clips drawn twice narrow a covariance, which would move the distance itself.
    `paired`: row i of both sets is of one prompt and leaves together with the other.
    """
    whole = frechet_distance(a, b)
    if paired and len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} embeddings are not paired")
    variance = 0.0
    for sides in ((True, True),) if paired else ((True, False), (False, True)):
        n = len(a) if sides[0] else len(b)
        blocks = np.arange(n) % min(JACKKNIFE_BLOCKS, n)
        values = []
        for block in range(blocks.max() + 1):
            kept = blocks != block
            values.append(frechet_distance(a[kept] if sides[0] else a, b[kept] if sides[1] else b))
        values = np.array(values)
        variance += (len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum()
    spread = 1.96 * np.sqrt(variance)
    return max(0.0, whole - spread), whole + spread
