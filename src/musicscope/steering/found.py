"""Concepts that find-concept found, ready to steer with: steering.json in its result folder.

Latents come from recordings alone: neither their number nor their strength was chosen on generated
music. Strength 1 raises a latent to its usual value, or ablates it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from musicscope.core.io import folder_sha256, read_json, write_json
from musicscope.dictionaries.core import TopKSAE
from musicscope.dictionaries.formats import load_sae_folder
from musicscope.steering.edit import ConceptEdit, Edit
from musicscope.steering.recipes import DICTIONARY, load_recipe, sae_folder

FILE = "steering.json"
FORMAT = 1
KEPT = 16
"""Latents that are kept at least, found or not."""
USUAL = 8
"""Latents that are edited by default, at most."""


@dataclass(frozen=True)
class FoundLatent:
    """One latent of a found concept."""

    feature: int
    sign: int
    """1: higher with the concept; -1: lower, so that it is edited in the opposite way."""
    usual: float
    """Mean value where it fires in recordings of the side on which it is higher."""
    auroc: float
    q: float
    """Corrected p."""


@dataclass(frozen=True)
class FoundConcept:
    """A concept in the latents of one SAE, from recordings."""

    concept: str
    model: str
    """Name of a model under data/models, or its folder."""
    layer: str
    slot: str
    sae: str
    """Folder of the SAE; empty: that of the slot under data/sae."""
    sae_sha256: str
    """`sae_digest` of it."""
    discoveries: int
    """Latents with q up to the limit of the search, which come first."""
    latents: tuple[FoundLatent, ...]
    """Best first."""

    @property
    def model_name(self) -> str:
        return Path(self.model).name

    def folder(self) -> Path:
        """Return the folder of the SAE."""
        return Path(self.sae) if self.sae else sae_folder(self.model_name, self.slot)

    def load_sae(self, device: str = "cpu", folder: str | Path | None = None) -> TopKSAE:
        """Load the SAE, from `folder` if given; ValueError if it is another than was searched."""
        folder = Path(folder) if folder else self.folder()
        sae, _ = load_sae_folder(folder, device)
        if sae_digest(folder) != self.sae_sha256:
            raise ValueError(
                f"{self.concept} was found in another SAE than {folder}: run find-concept again, "
                "or name its SAE with --sae"
            )
        return sae

    def edit(self, direction: str, strength: float = 1.0, n: int | None = None) -> ConceptEdit:
        """Edit the best `n` latents; by default the discoveries, at most `USUAL`.

        on: latents are raised to their usual value; off: ablated. Those of sign -1 the other way.

        ValueError: nothing was found, and no `n` is given.
        """
        n = n or min(USUAL, self.discoveries)
        if not n or not self.latents:
            raise ValueError(
                f"{self.concept}: no feature was found in the recordings. Add recordings and run "
                "find-concept again, or edit its best features all the same with --features N"
            )
        raised = {1: [], -1: []}
        for latent in self.latents[:n]:
            raised[latent.sign * (1 if direction == "on" else -1)].append(latent)
        edits = []
        if up := raised[1]:
            features = tuple(x.feature for x in up)
            edits.append(Edit(features, "clamp_min", tuple(x.usual for x in up)))
        if down := raised[-1]:
            edits.append(Edit(tuple(x.feature for x in down), "ablate"))
        return ConceptEdit(f"{self.concept} {direction}", tuple(edits), strength)

    def caution(self, n: int | None = None) -> str:
        """Say what nobody has measured."""
        used = min(n or USUAL, len(self.latents) if n else self.discoveries)
        return (
            f"{self.concept}: {used} of {self.discoveries} features found; their number and "
            "strength are not chosen on generated music, so try other --strength and --features"
        )


def sae_digest(folder: str | Path) -> str:
    """Return `folder_sha256`; for the copy beside committed recipes, that of its original."""
    folder = Path(folder)
    if folder.name == DICTIONARY and (recipes := sorted(folder.parent.glob("*.safetensors"))):
        return load_recipe(folder.parent, recipes[0].stem).sae
    return folder_sha256(folder)


def latents_of(table: pd.DataFrame, usual: np.ndarray, limit: float) -> tuple[FoundLatent, ...]:
    """Take the discoveries of a table (`association.COLUMNS`), and `KEPT` latents at least."""
    table = table[table["auroc"] > 0.5]  # the search is one-sided
    table = table.head(max(KEPT, int((table["q"] <= limit).sum())))
    return tuple(
        FoundLatent(int(row.feature), 1, float(usual[int(row.feature)]), row.auroc, row.q)
        for row in table.itertuples()
    )


def save_found(found: FoundConcept, folder: str | Path) -> None:
    """Write steering.json."""
    write_json(Path(folder) / FILE, {"format": FORMAT, **asdict(found)})


def is_found(name: str) -> bool:
    """Whether a name on the command line is a result folder of find-concept."""
    return "/" in name or (Path(name) / FILE).is_file()


def load_found(folder: str | Path) -> FoundConcept:
    """Read steering.json of a result folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, or a damaged file.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {FILE}: name a folder that find-concept wrote, with --features sae "
            "or both (older results lack the file: run find-concept again)"
        )
    content = read_json(path)
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of format {FORMAT}: run find-concept again")
    try:
        rows = tuple(FoundLatent(**row) for row in content["latents"])
        if any(row.sign not in (1, -1) for row in rows):
            raise ValueError("a sign is neither 1 nor -1")
        rest = {k: v for k, v in content.items() if k not in ("format", "latents")}
        return FoundConcept(**rest, latents=rows)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): run find-concept again") from error
