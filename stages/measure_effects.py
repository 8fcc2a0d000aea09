"""What each latent does at the logits: data/effects/<model>/<slot>.parquet and
metrics/measure_effects/<model>-<slot>.json.

Reads data/clips, data/models/<model>, data/activations/<model>/<slot> and
data/sae/<model>/<slot>/seed-0. Columns: see musicscope.features.output_effects. An audio model has
no logits: its table has no rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from musicscope.ablation.run import spread_clips
from musicscope.activations.store import ActivationStore
from musicscope.config import load_params
from musicscope.core.distributed import resolve_device
from musicscope.core.io import write_json
from musicscope.core.seeding import seed_for
from musicscope.data.clips import ClipStore, main_clips
from musicscope.data.concepts import concepts_of
from musicscope.dictionaries.codes import encode_clips
from musicscope.dictionaries.core import TopKSAE
from musicscope.features import output_effects
from musicscope.models.interface import AudioModel, Batch
from musicscope.models.registry import load_model
from stages import run_stage, stage_args


def main() -> None:
    name, slot = stage_args(__doc__, "model", "slot")
    params = load_params()
    section, device = params.measure_effects, resolve_device(params.compute.device)
    torch.set_num_threads(1)  # stages run beside one another; the numbers depend on it
    out, report = (
        f"data/effects/{name}/{slot}.parquet",
        f"metrics/measure_effects/{name}-{slot}.json",
    )
    model = load_model(f"data/models/{name}", device)
    if isinstance(model, AudioModel):
        output_effects.write(out, pd.DataFrame({"feature": np.empty(0, np.int64)}))
        write_json(report, {"left_out": "an audio model has no logits"})
        return
    clips = ClipStore.open("data/clips")
    store = ActivationStore.open(f"data/activations/{name}/{slot}")
    sae = TopKSAE.load(f"data/sae/{name}/{slot}/seed-0", device)
    samples = round(section.seconds * model.sample_rate)

    def batches(rows: np.ndarray) -> Iterator[Batch]:
        for first in range(0, len(rows), section.batch):
            part = rows[first : first + section.batch]
            captions = clips.rows["caption"].iloc[part].tolist()
            captions = captions if store.config["captions"] else [None] * len(part)
            audio = clips.audio(part)
            start = (audio.shape[1] - samples) // 2  # the middle: clips may begin softly
            yield model.encode(audio[:, max(0, start) :][:, :samples], captions)

    def spread(split: str, count: int) -> np.ndarray:
        count = min(count, len(main_clips(clips.rows, split)))
        return spread_clips(clips.rows, split, count, seed_for(params.seed, "effects", split))

    train = spread("train", section.train_clips)
    codes = encode_clips(store, train, sae.encode, sae.n_latents, 1, device)
    labels = {
        concept: clips.rows[f"has_{concept}"]
        .iloc[train]
        .astype("boolean")
        .to_numpy(float, na_value=np.nan)
        for concept in concepts_of(clips.rows, params.concepts)
    }
    table, metrics = output_effects.measure(
        model, store.config["layer"], sae, output_effects.usual_values(codes),
        list(batches(spread("validation", section.clips))), batches(train), labels,
        section.draws, section.checked, seed_for(params.seed, "effects", name, slot) % 2**32,
    )  # fmt: skip
    output_effects.write(out, table)
    write_json(report, metrics)


if __name__ == "__main__":
    run_stage(main)
