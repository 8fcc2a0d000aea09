"""Make the clips, rendered or from recordings: data/clips and metrics/prepare_data.json."""

import sys

from musicscope.config import PrepareData, load_params
from musicscope.core.io import atomic_dir, write_json
from musicscope.data.clips import ClipStore
from musicscope.data.copies import count_copies
from musicscope.data.sources import build
from musicscope.embedded import clip_set
from stages import run_stage, stage_args

OUT = "data/clips"


def render(config: PrepareData, seed: int, processes: int) -> None:
    """The embedded data set."""
    jobs = clip_set.plan_jobs(config, seed)
    clips = sum(job.count * (2 if job.kind == "pair" else 1) for job in jobs)
    megabytes = clips * config.seconds * 32_000 / 1e6
    print(f"{clips} clips of {config.seconds:g} s, {megabytes:.0f} MB", file=sys.stderr)
    with atomic_dir(OUT) as folder:
        clip_set.write_embedded(folder, config, seed, processes)


def main() -> None:
    """Read params.yaml, render or read recordings, measure."""
    stage_args(__doc__)
    params = load_params()
    config, compute = params.prepare_data, params.compute
    if config.source == "embedded":
        clip_set.check_concepts(params.concepts)
        render(config, params.seed, compute.processes)
        store = ClipStore.open(OUT)
        # Groups are compositions by construction: copies among them are counted, not joined.
        metrics = clip_set.measure(store) | {"copies": count_copies(store)}
    else:
        build.write_recordings(
            OUT, config, params.seed, compute.processes, concepts=params.concepts
        )
        metrics = build.measure(ClipStore.open(OUT), params.seed)
    write_json("metrics/prepare_data.json", metrics)


if __name__ == "__main__":
    run_stage(main)
