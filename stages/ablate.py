"""Score every layer of a model: metrics/ablate/<model>.json, plots/ablate/<model>.{csv,png}.

Reads data/clips and data/models/<model>.
"""

from __future__ import annotations

import argparse
import functools

import numpy as np
import torch
from tqdm import tqdm

from musicscope import plots
from musicscope.artifacts import seed_for, write_json, write_text
from musicscope.clips import ClipStore
from musicscope.config import load_params
from musicscope.layers import ablation
from musicscope.models import MusicModel, load_model
from musicscope.parallel import workers

BATCH = 4  # the logits of a batch, 4 x 4 x 500 x 1024 floats, are held three times


@functools.cache
def sources(name: str, device: str) -> tuple[MusicModel, ClipStore]:
    """Once a process."""
    return load_model(f"data/models/{name}", device), ClipStore.open()


def work(
    name: str, device: str, kinds: tuple[str, ...], means: torch.Tensor | None, rows: np.ndarray
) -> ablation.UpdateSums | ablation.AblationScores:
    """One batch: update sums as long as there are no means, then scores."""
    model, clips = sources(name, device)
    batch = model.encode(clips.audio(rows), clips.rows["caption"].iloc[rows].tolist())
    if means is None:
        return ablation.update_sums(model, batch)
    return ablation.ablate(model, batch, kinds, means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a name in params.yaml: models")
    name = parser.parse_args().model
    params = load_params()
    section, device = params.ablate, params.compute.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    processes = params.compute.processes if device == "cpu" else 1

    table = ClipStore.open().rows
    train, scored = (
        ablation.spread_clips(
            table, split, section.clips, seed_for(params.seed, "ablate", "clips", split)
        )
        for split in ("train", section.split)
    )

    def each_batch(run, rows: np.ndarray, means: torch.Tensor | None, what: str) -> list:
        batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        results = run(functools.partial(work, name, device, section.kinds, means), batches)
        return list(tqdm(results, f"{name}: {what}", len(batches), unit="batch", mininterval=1))

    with workers(processes) as run:
        sums = each_batch(run, train, None, "mean updates")
        means = functools.reduce(ablation.UpdateSums.__add__, sums).means
        scores = ablation.join(each_batch(run, scored, means, "ablations"))

    groups = table["group"].iloc[scored].tolist()
    results = ablation.ablation_table(
        scores, groups, section.bootstrap, seed_for(params.seed, "ablate", "bootstrap")
    )
    write_json(f"metrics/ablate/{name}.json", ablation.ablation_metrics(scores, results, groups))
    write_text(f"plots/ablate/{name}.csv", results.to_csv(index=False, float_format="%.6g"))
    plots.save_figure(ablation.ablation_figure(results, name), f"plots/ablate/{name}.png")


if __name__ == "__main__":
    main()
