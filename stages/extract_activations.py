"""Extract activations of the chosen layers for every clip: data/activations/<model>/<slot>.

Reads metrics/layers/<model>.yaml (slot: layer), data/clips and data/models/<model>.
"""

from __future__ import annotations

import functools
import sys

from omegaconf import DictConfig, OmegaConf

from musicscope.activations import extraction
from musicscope.config import Params, load_params
from musicscope.core import distributed
from musicscope.core.io import folder_sha256, write_json
from musicscope.models.registry import open_sources
from stages import run_stage, stage_args

CLIPS = "data/clips"


def main() -> None:
    (name,) = stage_args(__doc__, "model")
    params = load_params()
    with distributed.start(params.compute) as engine:
        extract(name, params, engine)


def extract(name: str, params: Params, engine: distributed.Engine) -> None:
    """Plan, run and sum up the extraction of model `name`; every rank comes here."""
    section = params.extract_activations
    chosen = DictConfig(OmegaConf.load(f"metrics/layers/{name}.yaml"))
    if missing := [slot for slot in params.slots if slot not in chosen]:
        sys.exit(f"metrics/layers/{name}.yaml lacks {missing}: run dvc repro select_layers")
    folder = f"data/models/{name}"
    sources = functools.partial(open_sources, folder, CLIPS, engine.device)
    model, clips = sources()
    plans = extraction.plan(
        model,
        clips,
        extraction.hook_names(model, {slot: chosen[slot] for slot in params.slots}),
        captions=section.captions,
        dtype=section.dtype,
        shard_mb=section.shard_mb,
        batch_clips=section.batch_clips,
        model_sha256=folder_sha256(folder),
        clips_sha256=folder_sha256(CLIPS),
    )
    if engine.ranks.leads:
        for plan in plans:
            print(f"{name}: {plan.describe()}", file=sys.stderr, flush=True)
    folders = {slot: f"data/activations/{name}/{slot}" for slot in params.slots}
    stores = extraction.extract(
        plans, sources, folders, engine.processes, ranks=engine.ranks, workers=engine.workers
    )
    if engine.ranks.leads:
        write_json(f"metrics/extract_activations/{name}.json", extraction.summary(plans, stores))


if __name__ == "__main__":
    run_stage(main)
