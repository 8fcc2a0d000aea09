"""Fetch models from the hub into its local cache: a pinned revision, only the files needed.

Loaders work on local folders, so a hub id and a copied folder load alike, and a second load with
the network off (``HF_HUB_OFFLINE=1``) finds the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

TEXTS = ("*.json", "*.model", "*.txt")
FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    # Hub pages hold every format beside the others: twice 2 GB for musicgen-small.
    "musicgen": ((*TEXTS, "model*.safetensors"), ("pytorch_model*.bin",)),
    "audiocraft": (("state_dict.bin", "compression_state_dict.bin"),),
    "t5": ((*TEXTS, "model*.safetensors"), ("pytorch_model*.bin",)),
}
"""File patterns of each family; the second row only where the first brought no weights."""


def fetch(name: str, revision: str | None, patterns: Sequence[str] | None = None) -> Path:
    """Fetch files of hub model `name` ("owner/model") that fit `patterns` (None: all); the folder.

    ValueError without a `revision` that pins (a branch moves); FileNotFoundError with the remedy
    if hub and cache have none.
    """
    if not revision or revision == "main":
        raise ValueError(
            f"hub model {name} needs revision=: a commit hash from its page (Files, History), "
            "or a tag. A branch such as main moves, and results with it"
        )
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=None if patterns is None else list(patterns)
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise FileNotFoundError(
            f"could not fetch {name} at revision {revision} from the hub or its cache "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check name, revision and "
            "network, or copy the files to a folder and give that"
        ) from error
    return Path(folder)


def fetch_model(name: str, revision: str | None, system: str) -> Path:
    """Fetch the files that the family `system` loads (all if not in `FILES`); the folder."""
    if system not in FILES:
        return fetch(name, revision)
    for patterns in FILES[system]:
        folder = fetch(name, revision, patterns)
        if any(any(folder.glob(p)) for p in patterns if p not in TEXTS):
            return folder
    raise FileNotFoundError(
        f"{name} at revision {revision} has none of {', '.join(sum(FILES[system], ()))}"
    )
