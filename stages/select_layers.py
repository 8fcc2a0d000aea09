"""Choose the layers to study: metrics/layers/<model>.yaml, slot to layer, from the ablation."""

from __future__ import annotations

from musicscope.ablation.scores import select_layers
from musicscope.config import load_params
from musicscope.core.io import read_json, write_text
from stages import run_stage, stage_args


def main() -> None:
    (name,) = stage_args(__doc__, "model")
    params = load_params()
    rule = params.select_layers
    chosen = select_layers(
        read_json(f"metrics/ablate/{name}.json"),
        params.slots,
        kind=rule.kind,
        score=rule.score,
        skip_first=rule.skip_first,
        skip_last=rule.skip_last,
        name=name,
    )
    lines = [f"{slot}: {layer}\n" for slot, layer in chosen.items()]
    write_text(f"metrics/layers/{name}.yaml", "".join(lines))


if __name__ == "__main__":
    run_stage(main)
