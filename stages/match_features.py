"""Common, own and unmatched features of all models: metrics/match_features.json,
data/features/{features,top_clips}.parquet and plots/match_features/.

Matches SAE against SAE between models and SAE against universal SAE within each, with their nulls,
on frames that the models have in common (the slowest one's, where their rates differ).
Reads data/clips, data/usae/seed-0 and, for every model in params.yaml, its folders
data/activations/<model>/<slot> and data/sae/<model>/<slot>.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from musicscope.activations.alignment import common_frames, frame_rate
from musicscope.activations.store import ActivationStore
from musicscope.config import load_params
from musicscope.core.distributed import resolve_device
from musicscope.core.io import write_json
from musicscope.data.clips import ClipStore
from musicscope.dictionaries.core import TopKSAE, UniversalSAE
from musicscope.features import report as match_report
from musicscope.features import run as match_run
from musicscope.features import table as feature_table


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    params = load_params()
    section, device = params.match_features, resolve_device(params.compute.device)
    settings = match_run.Settings(
        **asdict(section), fire_threshold=params.train_usae.fire_threshold, seed=params.seed,
        workers=params.compute.processes, device=device,
    )  # fmt: skip

    clips, slot, subjects = ClipStore.open("data/clips"), section.slot, []
    stores = common_frames([f"data/activations/{model}/{slot}" for model in params.models])
    for model, store in zip(params.models, stores, strict=True):
        folders = [f"data/sae/{model}/{slot}/seed-{i}" for i in range(params.train_sae.seeds)]
        saes = [TopKSAE.load(folder, device) for folder in folders]
        subjects.append(match_run.Subject(model, ActivationStore.open(store), saes))
    usae = UniversalSAE.load("data/usae/seed-0", device)
    match_run.check(subjects, usae, clips.rows, slot)
    at = match_run.clip_positions(clips.rows)
    found = match_run.compare(subjects, usae, clips.rows, at, settings)
    features, top, skipped = match_run.describe_features(
        found, subjects, usae, clips.rows, at, frame_rate(subjects[0].store), settings
    )
    metrics = match_report.metrics(found, features, skipped, at, settings)
    feature_table.write("data/features", features, top)
    match_report.write_plots("plots/match_features", found, section.threshold)
    write_json("metrics/match_features.json", metrics)


if __name__ == "__main__":
    main()
