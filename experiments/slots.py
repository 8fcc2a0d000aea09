"""Write `slots` of params.yaml from a rule (`just slots RULE`).

python -m experiments.slots all             layer0, layer1, ...: the layers that all models have
python -m experiments.slots top 3           the three highest in the ablation of each model
python -m experiments.slots top1 layer4     these
python -m experiments.slots                 check params.yaml, and write nothing

DVC makes stages from a list in params.yaml and knows no rules, so the rule is applied here. The
list is common to all models: `all` ends with the shallowest one, and names what it leaves out.
`--models MODEL` studies a model alone, with all of its layers.

match_features, train_usae, train_crosscoder, find_concept, steer and steer_full read one slot.
`--single SLOT` names it for all of them; without it they keep theirs, which must be in the list.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from dvc.utils.hydra import apply_overrides

from musicscope.ablation.scores import check_slots
from musicscope.commands.plan.estimate import overridden
from musicscope.commands.plan.published_sizes import shape_of
from musicscope.config import Params
from musicscope.core.command_line import Parser, run_program
from musicscope.core.io import read_json

PARAMS = "params.yaml"
SINGLE = ("match_features", "train_usae", "find_concept", "steer")
"""Sections with a slot of their own; train_crosscoder and steer_full inherit it."""


def depth(model: str) -> int | None:
    """Count the layers of a model; None if neither its files nor its ablation say it."""
    try:
        if layers := shape_of(model).layers:
            return layers
    except ValueError:  # not fetched yet
        pass
    scores = Path(f"metrics/ablate/{model}.json")
    return len(read_json(scores)["layers"]) if scores.is_file() else None


def expand(rule: Sequence[str], depths: Mapping[str, int | None]) -> list[str]:
    """Turn a rule, as words, into slots. ValueError for one that needs an unknown depth.

    Args:
        depths: model -> number of layers, or None.
    """
    match list(rule):
        case ["all"]:
            if unknown := [model for model, layers in depths.items() if layers is None]:
                raise ValueError(
                    f"slots all: the number of layers of {', '.join(unknown)} is known after "
                    "`dvc repro ablate`; until then name the layers: layer0 layer1 ..."
                )
            return [f"layer{i}" for i in range(min(n for n in depths.values() if n is not None))]
        case ["top", number] if number.isdecimal() and int(number) > 0:
            return [f"top{i + 1}" for i in range(int(number))]
        case ["top", *_]:
            raise ValueError("slots top: give a number of layers, such as `just slots top 3`")
    return list(rule)


def left_out(slots: Sequence[str], depths: Mapping[str, int | None]) -> dict[str, list[int]]:
    """Model -> layers that none of `slots` names, for slots that are all numbered layers."""
    named = {int(slot[5:]) for slot in slots if slot.startswith("layer")}
    if len(named) < len(slots):
        return {}
    found = {m: sorted(set(range(n or 0)) - named) for m, n in depths.items()}
    return {model: layers for model, layers in found.items() if layers}


def check(params: Params, depths: Mapping[str, int | None]) -> None:
    """Check that every model has all slots; ValueError names the slot and the remedy."""
    rule = params.select_layers
    for model, layers in depths.items():
        if layers is not None:
            check_slots(params.slots, model, layers, rule.skip_first, rule.skip_last)


def listed_models() -> list[str]:
    """Read `models` of params.yaml, whose slots may be wrong as yet."""
    return yaml.safe_load(Path(PARAMS).read_text(encoding="utf-8"))["models"]


def check_list() -> None:
    """Refuse a rule in params.yaml, of which DVC says only that it failed."""
    written = yaml.safe_load(Path(PARAMS).read_text(encoding="utf-8")).get("slots")
    if isinstance(written, str):
        raise ValueError(
            f"{PARAMS}: slots = {written!r} is a rule, and DVC needs a list: "
            f"`just slots {written}` writes it"
        )


def overrides(rule: Sequence[str], models: Sequence[str], single: str | None = None) -> list[str]:
    """Return the overrides of params.yaml, in the grammar of ``dvc exp run -S``, of a rule."""
    slots = expand(rule, {model: depth(model) for model in models})
    one = [f"{section}.slot={single}" for section in SINGLE] if single else []
    return [f"slots=[{','.join(slots)}]", *one]


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", nargs="*", metavar="RULE", help="all, top N, or names of slots")
    parser.add_argument("--single", metavar="SLOT", help="slot of the stages that read one")
    parser.add_argument("--models", nargs="+", help="set models, too")
    args = parser.parse_args()
    if not args.rule and (args.single or args.models):
        parser.error("give a rule: all, top N, or names of slots")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sets = [f"models=[{','.join(args.models)}]"] if args.models else []
    if args.rule:
        sets += overrides(args.rule, args.models or listed_models(), args.single)
    else:
        check_list()
    params = overridden(PARAMS, sets)
    depths = {model: depth(model) for model in params.models}
    check(params, depths)
    if sets:
        apply_overrides(PARAMS, sets)
        print(f"{PARAMS}: slots {' '.join(params.slots)}")
        singles = ", ".join(f"{section} {getattr(params, section).slot}" for section in SINGLE)
        print(f"of the stages that read one slot: {singles}")
        for model, layers in left_out(params.slots, depths).items():
            print(f"left out of {model}: layers {', '.join(map(str, layers))}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
