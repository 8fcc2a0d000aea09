"""Common, own and unmatched features of all models: metrics/match_features.json,
data/features/{features,top_clips,moments}.parquet and plots/match_features/.

Matches SAE against SAE between models and SAE against universal SAE within each, with their nulls,
on common frames (those of the slowest model, where frame rates differ).
Reads data/clips, data/usae/seed-0 and, for every model in params.yaml, its folders
data/activations/<model>/<slot>, data/sae/<model>/<slot> and data/effects/<model>/<slot>.parquet.
"""

from __future__ import annotations

import sys

from musicscope.activations.alignment import common_frames, frame_rate
from musicscope.activations.store import ActivationStore
from musicscope.config import load_params
from musicscope.core.distributed import resolve_device
from musicscope.core.io import write_json
from musicscope.data.clips import ClipStore
from musicscope.data.concepts import concepts_of
from musicscope.dictionaries import stability
from musicscope.dictionaries.core import TopKSAE, UniversalSAE
from musicscope.features import moments, output_effects, report, table
from musicscope.features.run import REPORT, Inputs, ModelSAEs, compare, describe_features
from stages import run_stage, stage_args


def main() -> None:
    stage_args(__doc__)
    params = load_params()
    section, device = params.match_features, resolve_device(params.compute.device)

    clips, slot, models = ClipStore.open("data/clips"), section.slot, []
    stores = common_frames([f"data/activations/{model}/{slot}" for model in params.models])
    for model, store in zip(params.models, stores, strict=True):
        folders = [f"data/sae/{model}/{slot}/seed-{i}" for i in range(params.train_sae.seeds)]
        saes = [TopKSAE.load(folder, device) for folder in folders]
        returning = stability.read(f"data/sae/{model}/{slot}")
        models.append(ModelSAEs(model, ActivationStore.open(store), saes, returning))
    usae = UniversalSAE.load("data/usae/seed-0", device)
    inputs = Inputs(models, usae, clips.rows, slot, concepts_of(clips.rows, params.concepts))
    comparison = compare(inputs, section, params.seed, params.compute.processes, device)
    rate = frame_rate(models[0].store)
    features, top, skipped = describe_features(
        inputs,
        comparison,
        section,
        params.train_usae.fire_threshold,
        rate,
        params.seed,
    )
    for name in params.concepts:
        if name in skipped:
            print(
                f"concepts.{name} is not compared: its rarer class has {skipped[name]} clips in "
                f"validation or test, match_features.min_clips is {section.min_clips}",
                file=sys.stderr,
            )
    effects = {model: output_effects.read(model, slot) for model in params.models}
    features = table.with_effects(features, effects)
    table.write("data/features", features, top)
    codes = {key: sets[REPORT] for key, sets in comparison.codes.items()}
    ids = clips.rows["id"].to_numpy(str)[inputs.clips[REPORT]]
    wanted = moments.wanted(features, top, params.models, section.top_clips)
    moments.write("data/features/moments.parquet", moments.cut(codes, ids, wanted), rate)
    report.write_comparison("plots/match_features", comparison)
    metrics = report.metrics(comparison, features, skipped, section)
    write_json("metrics/match_features.json", metrics)


if __name__ == "__main__":
    run_stage(main)
