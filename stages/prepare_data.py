"""Render the embedded data set: data/clips and metrics/prepare_data.json."""

import argparse
import sys

from musicscope.artifacts import atomic_dir, write_json
from musicscope.clips import ClipStore
from musicscope.config import load_params
from musicscope.embedded import measure, plan_jobs, write_embedded

OUT = "data/clips"


def main() -> None:
    """Read params.yaml, render, measure."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    params = load_params()
    config = params.prepare_data
    clips = sum(job.count * (2 if job.kind == "pair" else 1) for job in plan_jobs(config))
    megabytes = clips * config.seconds * 32_000 / 1e6
    print(f"{clips} clips of {config.seconds:g} s, {megabytes:.0f} MB", file=sys.stderr)
    with atomic_dir(OUT) as folder:
        write_embedded(folder, config, params.seed, params.compute.processes)
    write_json("metrics/prepare_data.json", measure(ClipStore.open(OUT)))


if __name__ == "__main__":
    main()
