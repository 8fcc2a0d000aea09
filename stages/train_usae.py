"""Dictionaries of all models of params.yaml: data/<kind>/{seed,mispaired}-<i>.

<kind> is usae (universal sparse autoencoders) or crosscoder. Trains on split train (of rendered
clips: family of sounds mixed), paired by (clip id, frame); evaluates on split test.
"""

from __future__ import annotations

from functools import partial

import torch

from musicscope.config import load_params
from musicscope.core import distributed
from musicscope.core.command_line import Parser
from musicscope.dictionaries import runs, tables
from musicscope.dictionaries.core import CROSSCODER, KINDS
from stages import run_stage


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("kind", choices=KINDS, help="what to train")
    kind = parser.parse_args().kind
    params, stage = load_params(), f"train_{kind}"
    torch.set_num_threads(params.compute.threads)
    if kind == CROSSCODER:
        section, method, write = params.train_crosscoder, CROSSCODER, tables.write_crosscoder
    else:
        section, method, write = params.train_usae, params.train_usae.rule, tables.write_usae
    with distributed.start(params.compute) as engine:
        plan = runs.shared_plan(section, method, params.models, params.seed, engine.device)
        runs.execute(
            plan, engine, f"data/{kind}", f"metrics/{stage}.json", partial(write, f"plots/{stage}")
        )


if __name__ == "__main__":
    run_stage(main)
