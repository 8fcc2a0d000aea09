"""What every live feature does on test clips: data/feature_activity/{features,samples}.parquet.

All dictionaries: the SAE (seed 0) of every model and slot, the universal SAE through each model,
and the crosscoder. Reads data/clips, data/activations/<model>/<slot>, data/sae/<model>/<slot>,
data/usae/seed-0 and data/crosscoder/seed-0. Columns: see musicscope.features.activity.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from scipy.sparse import vstack

from musicscope.activations.alignment import common_frames, frame_rate
from musicscope.activations.store import ActivationStore
from musicscope.config import load_params
from musicscope.core.distributed import resolve_device
from musicscope.data.clips import ClipStore
from musicscope.data.concepts import concepts_of
from musicscope.dictionaries.codes import Codes, by_batch, encode_clips, to_csr
from musicscope.dictionaries.core import TopKSAE, UniversalSAE
from musicscope.features import activity
from musicscope.features.activity import ALL, Dictionary
from musicscope.features.matching import raw_decoder
from stages import run_stage, stage_args


def main() -> None:
    stage_args(__doc__)
    params = load_params()
    device, workers = resolve_device(params.compute.device), params.compute.processes
    rows, slot = ClipStore.open("data/clips").rows, params.match_features.slot
    dictionaries = []
    for model in params.models:
        for place in params.slots:
            store = ActivationStore.open(f"data/activations/{model}/{place}")
            if list(store.ids) != rows["id"].tolist():
                raise ValueError(f"{store.folder} holds other clips than data/clips: run dvc repro")
            sae = TopKSAE.load(f"data/sae/{model}/{place}/seed-0", device)
            dictionaries.append(
                Dictionary(
                    "sae", model, place, store.config["layer"], (model,), frame_rate(store),
                    sae.W_dec.cpu().numpy(),
                    partial(_each, [store], [sae.encode], sae.n_latents, workers, device),
                    described=place == slot,
                )
            )  # fmt: skip
    for kind in ("usae", "crosscoder"):
        shared = UniversalSAE.load(f"data/{kind}/seed-0", device)
        folders = [f"data/activations/{model}/{shared.slot}" for model in shared.names]
        stores = [ActivationStore.open(folder) for folder in common_frames(folders)]
        if shared.joint:
            models, codes = (ALL,), partial(_joint, stores, shared, workers, device)
        else:
            encoders = [partial(shared.encode, model=i) for i in range(len(stores))]
            models = shared.names
            codes = partial(_each, stores, encoders, shared.n_latents, workers, device)
        decoder = np.concatenate([raw_decoder(shared, i) for i in range(len(stores))], axis=1)
        layer = ", ".join(dict.fromkeys(store.config["layer"] for store in stores))
        dictionaries.append(
            Dictionary(kind, "", shared.slot, layer, models, frame_rate(stores[0]), decoder,
                       codes, described=kind == "usae")
        )  # fmt: skip
    activity.write(
        "data/feature_activity", dictionaries, rows, params.feature_activity,
        params.match_features, params.seed, concepts_of(rows, params.concepts),
    )  # fmt: skip


def _each(
    stores: Sequence[ActivationStore], encoders: Sequence, latents: int, workers: int, device: str,
    clips: np.ndarray,
) -> list[Codes]:  # fmt: skip
    """Codes of clips from each store through its encoder."""
    pairs = zip(stores, encoders, strict=True)
    return [encode_clips(store, clips, e, latents, workers, device) for store, e in pairs]


def _joint(
    stores: Sequence[ActivationStore], shared: UniversalSAE, workers: int, device: str,
    clips: np.ndarray,
) -> list[Codes]:  # fmt: skip
    """Codes of clips of a crosscoder, from paired frames of all stores."""

    @torch.no_grad()
    def batch(rows: list[int]):
        frames = (np.concatenate([store.clip(row) for row in rows]) for store in stores)
        xs = [torch.from_numpy(x).to(device) for x in frames]
        return to_csr(*shared.encode_all(xs), shared.n_latents)

    parts = by_batch(batch, clips, workers)
    return [Codes(vstack(parts, format="csr"), np.asarray(stores[0].frames)[clips])]


if __name__ == "__main__":
    run_stage(main)
