"""Judges of concepts that params.concepts defines, learnt from labels of data/clips.

A classifier, which chooses settings of steering, and centroids in musicnn's embedding, which never
do, as for families; a definition may also name tags of musicnn. A judge whose AUROC on codec output
of test clips is below `OWN_FIT` refuses: its probabilities are NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from musicscope.core.io import read_json, write_json
from musicscope.judges.embedding_distance import EmbeddingJudge, load_embedding_judge
from musicscope.judges.instrument_classifier import FamilyJudge, load_family_judge

OWN_FIT = 0.65
"""Least AUROC of a judge that has a say on a defined concept: labels of recordings are few and
rough, so that even a good judge scores less than on rendered clips."""
FOLDER = "concepts"
CENTROIDS = "centroids.safetensors"


@dataclass(frozen=True)
class ConceptJudges:
    """Judges of defined concepts."""

    names: tuple[str, ...]
    """All defined concepts, in the order of params.yaml"""
    tags: Mapping[str, tuple[str, ...]]
    """Concept -> tags of musicnn that mean it"""
    network: FamilyJudge | None = None
    """Classifier of the concepts with enough labels; None: none has them"""
    centroids: EmbeddingJudge | None = None
    """Of the same concepts"""

    def predict(self, audio: np.ndarray, embeddings: np.ndarray) -> dict[str, np.ndarray]:
        """Predict probabilities [n, concepts] per judge of 16 kHz audio [n, samples].

        NaN for silent clips, and for concepts without enough labels.
        """
        if self.network is None or self.centroids is None:
            return {}
        at = [self.names.index(name) for name in self.network.families]
        parts = {
            "family_judge": self.network.predict(audio),
            "embedding_judge": self.centroids.predict(embeddings),
        }
        found = {}
        for judge, values in parts.items():
            found[judge] = np.full((len(audio), len(self.names)), np.nan, np.float32)
            found[judge][:, at] = values
        return found

    def save(self, folder: Path) -> None:
        """Write concepts.json and, if there are any, the classifier and the centroids."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "concepts.json", {"names": self.names, "musicnn": self.tags})
        if self.network is not None and self.centroids is not None:
            self.network.save(folder / "network")
            self.centroids.save(folder / CENTROIDS)


def load_concept_judges(folder: Path) -> ConceptJudges | None:
    """Read what `ConceptJudges.save` wrote; None if there is nothing.

    FileNotFoundError or ValueError names the file and the stage to run.
    """
    if not (folder / "concepts.json").is_file():
        return None
    found, network, centroids = read_json(folder / "concepts.json"), None, None
    if (folder / "network").is_dir():
        network = load_family_judge(folder / "network")
        centroids = load_embedding_judge(folder / CENTROIDS, network.families)
    tags = {name: tuple(of) for name, of in found["musicnn"].items()}
    return ConceptJudges(tuple(found["names"]), tags, network, centroids)
