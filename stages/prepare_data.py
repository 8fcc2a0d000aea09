"""Make the clips, rendered or from recordings: data/clips and metrics/prepare_data.json."""

import os
import sys

from musicscope.config import PrepareData, load_params
from musicscope.core.io import atomic_dir, write_json
from musicscope.data import wheel_assets as assets
from musicscope.data.clips import ClipStore
from musicscope.data.copies import count_copies
from musicscope.data.sources import build
from musicscope.embedded.midi_set import embedded
from stages import stage_args

OUT = "data/clips"


def render(config: PrepareData, seed: int, processes: int) -> None:
    """The embedded data set."""
    jobs = embedded.plan_jobs(config)
    clips = sum(job.count * (2 if job.kind == "pair" else 1) for job in jobs)
    megabytes = clips * config.seconds * 32_000 / 1e6
    print(f"{clips} clips of {config.seconds:g} s, {megabytes:.0f} MB", file=sys.stderr)
    with atomic_dir(OUT) as folder:
        embedded.write_embedded(folder, config, seed, processes)


def prepare() -> None:
    """Read params.yaml, render or read recordings, measure."""
    params = load_params()
    config, compute = params.prepare_data, params.compute
    if os.path.lexists(OUT) and not os.path.isdir(OUT):
        raise FileExistsError(f"{OUT} is a file; move it away, the clips go into a folder there")
    if config.source == "embedded":
        render(config, params.seed, compute.processes)
        store = ClipStore.open(OUT)
        # Groups are compositions by construction: copies among them are counted, not joined.
        metrics = embedded.measure(store) | {"copies": count_copies(store)}
    else:
        build.write_recordings(OUT, config, params.seed, compute.processes)
        metrics = build.measure(ClipStore.open(OUT), params.seed)
    write_json("metrics/prepare_data.json", metrics)


def main() -> None:
    """Run the stage; an error of inputs or of the file system ends it with one line."""
    stage_args(__doc__)
    try:
        prepare()
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        sys.exit(f"prepare_data: {what}; see prepare_data in params.yaml")
    except (ValueError, assets.AssetError) as error:
        sys.exit(f"prepare_data: {error}")


if __name__ == "__main__":
    main()
