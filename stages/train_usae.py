"""Universal sparse autoencoders over all models of params.yaml: data/usae/{seed,mispaired}-<i>.

Trains on timgm6mb clips of split train, paired by (clip id, frame); evaluates on split test.
"""

from __future__ import annotations

import argparse
import shutil

import torch

from musicscope import artifacts, usae_plots, usae_runs
from musicscope.config import load_params
from musicscope.sae_runs import sole_user


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    params = load_params()
    section, device = params.train_usae, params.compute.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(params.compute.threads)
    plan = usae_runs.plan_of(
        section, section.rule, params.models, section.slot, params.seed, device
    )
    scratch = artifacts.partial_dir(usae_runs.scratch_key(plan))
    with sole_user(scratch):
        outcomes = usae_runs.run_all(usae_runs.jobs_of(plan, scratch), params.compute.processes)
        found = usae_runs.report(plan, outcomes)
        usae_plots.write_r2("plots/train_usae", found)
        usae_plots.write_entropy("plots/train_usae", outcomes)
        usae_plots.write_loss("plots/train_usae", outcomes)
        artifacts.publish_dir(scratch / "out", "data/usae")
        artifacts.write_json("metrics/train_usae.json", found)
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
