"""Crosscoders over all models of params.yaml: data/crosscoder/{seed,mispaired}-<i>.

Trains on timgm6mb clips of split train, paired by (clip id, frame); evaluates on split test.
"""

from __future__ import annotations

import argparse
import shutil

import torch

from musicscope.config import Params, load_params
from musicscope.core import distributed
from musicscope.core import io as artifacts
from musicscope.dictionaries import usae_plots, usae_runs, usae_training
from musicscope.dictionaries.runs import sole_user


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    params = load_params()
    torch.set_num_threads(params.compute.threads)
    with distributed.start(params.compute) as engine:
        train(params, engine)


def train(params: Params, engine: distributed.Engine) -> None:
    """Train, report and publish; every rank comes here, the first one writes."""
    section, ranks = params.train_crosscoder, engine.ranks
    plan = usae_runs.plan_of(
        section, usae_training.CROSSCODER, params.models, section.slot, params.seed, engine.device
    )
    scratch = artifacts.partial_dir(usae_runs.scratch_key(plan))
    with sole_user(scratch, ranks):
        jobs = usae_runs.jobs_of(plan, scratch)
        outcomes = usae_runs.run_all(jobs, engine.processes, ranks, engine.workers)
        if not ranks.leads:
            return
        found = usae_runs.report(plan, outcomes)
        usae_plots.write_norms("plots/train_crosscoder", outcomes, plan.names)
        usae_plots.write_loss("plots/train_crosscoder", outcomes)
        artifacts.publish_dir(scratch / "out", "data/crosscoder")
        artifacts.write_json("metrics/train_crosscoder.json", found)
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
