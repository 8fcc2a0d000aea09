"""Features of an SAE as a table, and as one JSON file per feature in Neuronpedia's layout.

All numbers are of clips of split test in the activation store. Where Neuronpedia has a token there
is a frame, written as its time. Fields of the vocabulary (pos_str, neg_str, logits) stay empty: a
latent acts on several codebooks, whose entries have no names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from musicscope.activations.store import ActivationStore
from musicscope.core.io import write_json
from musicscope.dictionaries.core import TopKSAE
from musicscope.dictionaries.formats import About
from musicscope.features.activity import nearest_rows

BARS, MOMENTS, NEAREST, AROUND = 30, 8, 5, 25
"""Bars of a histogram; best clips and nearest features; frames shown on each side of a maximum."""
TABLE = Path("data/features/features.parquet")
COLUMNS = {
    "model": "name of the model",
    "layer": "hook point",
    "feature": "number of the latent",
    "firing_rate": "share of test frames on which the latent fires",
    "mean_active": "mean value over the frames on which it fires; NaN if it never does",
    "max_value": "highest value; 0 if it never fires",
    "top_clip": "id of the clip with the highest value",
    "top_seconds": "time of that value in the clip; NaN if it never fires",
    "nearest": "latents with the most similar decoder row, best first",
    "nearest_cosine": "cosines of these decoder rows",
}
"""Columns of features.parquet. Those of data/features/features.parquet follow where that table is
of the same layer; see docs/formats.md."""


def test_codes(
    store: ActivationStore, sae: TopKSAE, clips: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Encode clips; return value, latent, clip and frame of all active latents, by latent."""
    parts: list[tuple[np.ndarray, ...]] = []
    for clip in clips:
        values, indices = sae.encode(torch.from_numpy(store.clip(clip)))
        rows, columns = (values > 0).nonzero().unbind(1)
        found = (values[rows, columns], indices[rows, columns].int(), rows.int())
        value, latent, frame = (t.numpy() for t in found)
        parts.append((value, latent, np.full(len(value), clip, np.int32), frame))
    value, latent, clip, frame = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((frame, clip, latent))
    return value[order], latent[order], clip[order], frame[order]


def write(
    out: Path, sae: TopKSAE, about: About, model: str, slot: str, folder: Path, most: int
) -> None:
    """Write features.parquet, columns.json and features/<number>.json.

    Args:
        most: clips of split test that are read, evenly spaced over all.

    Raises:
        StoreError: the activation store is missing or incomplete.
        ValueError: the store has no test clips, or another width or layer than the SAE.
    """
    store = ActivationStore.open(folder)
    if (store.width, store.config["layer"]) != (sae.width, about.layer):
        raise ValueError(
            f"{folder} is of {store.config['layer']} of width {store.width}, the SAE of "
            f"{about.layer} of width {sae.width}: give --activations"
        )
    clips = np.flatnonzero(store.split == "test").tolist()
    if not clips:
        raise ValueError(f"{folder} has no clips of split test")
    places = np.linspace(0, len(clips) - 1, min(most, len(clips))).round().astype(int)
    clips = [clips[place] for place in places]
    codes = test_codes(store, sae, clips)
    frames, rate = int(store.frames[clips].sum()), float(store.config["frame_rate"])
    cosines, near = nearest_rows(sae.W_dec, NEAREST)
    rows = []
    for feature, (value, clip, frame) in enumerate(_by_latent(sae.n_latents, *codes)):
        best = _best(value, clip)
        rows.append({
            "model": model, "layer": about.layer, "feature": feature,
            "firing_rate": len(value) / frames,
            "mean_active": float(value.mean()) if len(value) else float("nan"),
            "max_value": float(value.max(initial=0)),
            "top_clip": store.ids[clip[best[0]]] if best else "",
            "top_seconds": frame[best[0]] / rate if best else float("nan"),
            "nearest": near[feature].tolist(), "nearest_cosine": cosines[feature].tolist(),
        })  # fmt: skip
        heights, edges = np.histogram(value, BARS) if len(value) else (np.array([]), np.array([]))
        middles = (edges[:-1] + edges[1:]) / 2
        write_json(out / "features" / f"{feature}.json", {
            "modelId": model, "layer": f"{about.number}-{slot}", "index": str(feature),
            "sourceSetName": slot, "hookName": about.layer,
            "maxActApprox": rows[-1]["max_value"], "frac_nonzero": rows[-1]["firing_rate"],
            "freq_hist_data_bar_heights": heights.tolist(),
            "freq_hist_data_bar_values": middles.tolist(),
            "topkCosSimIndices": rows[-1]["nearest"],
            "topkCosSimValues": rows[-1]["nearest_cosine"],
            "pos_str": [], "pos_values": [], "neg_str": [], "neg_values": [],
            "logits_hist_data_bar_heights": [], "logits_hist_data_bar_values": [],
            "vector": sae.W_dec[feature].tolist(), "hasVector": True, "explanations": [],
            "activations": [
                _moment(store, int(clip[i]), int(frame[i]), rate, clip, frame, value) for i in best
            ],
        })  # fmt: skip
    table, columns = pd.DataFrame(rows), dict(COLUMNS)
    more = _known(model, table)
    table = table.join(more)
    columns |= {name: "see docs/formats.md, feature table" for name in more}
    table.to_parquet(out / "features.parquet", index=False)
    write_json(out / "columns.json", {"clips": len(clips), "frames": frames, "columns": columns})


def _by_latent(
    latents: int, value: np.ndarray, latent: np.ndarray, clip: np.ndarray, frame: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    edges = np.searchsorted(latent, np.arange(latents + 1))
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        yield value[start:end], clip[start:end], frame[start:end]


def _best(value: np.ndarray, clip: np.ndarray) -> list[int]:
    """Places of the highest values of the best clips, one per clip, best first."""
    order = np.argsort(-value, kind="stable")
    _, first = np.unique(clip[order], return_index=True)
    return order[np.sort(first)[:MOMENTS]].tolist()


def _moment(
    store: ActivationStore, clip: int, at: int, rate: float,
    clips: np.ndarray, frames: np.ndarray, values: np.ndarray,
) -> dict[str, object]:  # fmt: skip
    """Describe the frames around a maximum as Neuronpedia describes an activating text."""
    first, last = max(0, at - AROUND), min(int(store.frames[clip]), at + AROUND + 1)
    curve = np.zeros(last - first)
    shown = (clips == clip) & (frames >= first) & (frames < last)
    curve[frames[shown] - first] = values[shown]
    return {
        "tokens": [f"{frame / rate:.2f} s" for frame in range(first, last)],
        "values": curve.tolist(), "maxValue": float(curve.max()), "minValue": float(curve.min()),
        "maxValueTokenIndex": at - first, "dataIndex": store.ids[clip],
        "audio": {"clip": store.ids[clip], "start_seconds": first / rate,
                  "end_seconds": last / rate},
    }  # fmt: skip


def _known(model: str, table: pd.DataFrame) -> pd.DataFrame:
    """Return further columns of data/features, if that table is of this SAE.

    It names no layer, so its firing rates must be those that were counted here.
    """
    if not TABLE.is_file():
        return pd.DataFrame(index=table.index)
    found = pd.read_parquet(TABLE)
    found = found[(found["kind"] == "sae") & (found["model"] == model)].sort_values("feature")
    same = len(found) == len(table) and np.allclose(
        found["firing_rate"], table["firing_rate"], atol=1e-3
    )
    if not same:
        return pd.DataFrame(index=table.index)
    names = [
        n for n in found.columns if n.startswith(("energy", "set", "partner", "seed_", "concept"))
    ]
    return found[names].reset_index(drop=True)
