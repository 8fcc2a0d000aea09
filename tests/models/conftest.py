"""Small random checkpoints of all four families, in their true layouts on disk."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from musicscope.models.audiocraft.convert import to_audiocraft
from musicscope.models.interface import MusicModel
from musicscope.models.registry import load_model
from tests.support import rave_export
from tests.support.yue_export import build_tiny_yue

FAMILIES = ("musicgen", "audiocraft", "yue", "rave")


def load(folder: Path, **options) -> MusicModel:
    """Load; YuE's own tokenizer is not ours to copy, so a stand-in gives a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*tokenizer.model has sha256")
        return load_model(folder, **options)


@pytest.fixture(scope="session")
def checkpoints(tiny_musicgen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder."""
    root = tmp_path_factory.mktemp("families")
    to_audiocraft(tiny_musicgen, root / "audiocraft")
    build_tiny_yue(root / "yue")
    (root / "rave").mkdir()
    rave_export.save(rave_export.TinyRave(), root / "rave/one.ts")
    return {family: root / family for family in FAMILIES} | {"musicgen": tiny_musicgen}
