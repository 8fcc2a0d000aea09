"""Draw docs/images/overview.png from committed metrics.

    python -m tools.readme_figure

Left: how much each layer matters (mean ablation). Right: how often each method switches guitar off.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from musicscope.config import load_params
from musicscope.core import plots
from musicscope.core.command_line import run_program
from musicscope.core.io import read_json

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs/images/overview.png"
METHODS = {
    "sae": "SAE\nlatents",
    "diff_means": "difference\nof means",
    "prompt_edit": "prompt\nedit",
    "random_feature": "random\nlatents",
    "reseed": "another\nseed",
}


def draw(path: Path = OUT) -> None:
    """Draw both panels into the PNG `path`."""
    params = load_params(ROOT / "params.yaml")
    figure, (axes,) = plots.new_figure(1, 2, size=(11.0, 3.6))
    kind = params.select_layers.kind
    for series, model in enumerate(params.models):
        found = read_json(ROOT / f"metrics/ablate/{model}.json")["layers"]
        layers = sorted(found, key=int)
        kl, low, high = ([found[i][kind][k] for i in layers] for k in ("kl", "kl_low", "kl_high"))
        plots.interval_curve(axes[0], list(map(int, layers)), kl, low, high, model, series)
        chosen = yaml.safe_load((ROOT / f"metrics/layers/{model}.yaml").read_text())
        at = [int(chosen[slot]) for slot in params.slots]
        colour = plots.COLOURS[series]
        axes[0].plot(at, [kl[i] for i in at], "o", ms=11, mfc="none", mec=colour, ls="none")

        entry = read_json(ROOT / f"metrics/steer_full/{model}.json")["concepts"]["guitar"]["off"]
        success, low, high = (
            [entry["methods"][m][f"success{end}"] for m in METHODS]
            for end in ("", "_ci_low", "_ci_high")
        )
        width = 0.8 / len(params.models)
        offset = width * (series - (len(params.models) - 1) / 2)
        plots.interval_bars(
            axes[1], list(METHODS.values()), success, low, high,
            colour=colour, name=model, width=width, offset=offset, show_values=True,
        )  # fmt: skip
    axes[0].set(title="Which layers matter (circles: chosen)", xlabel="layer",
                ylabel="KL, nats per code (mean ablation)", yscale="log")  # fmt: skip
    axes[1].set(title="Guitar off: success on 128 prompts", ylabel="share (95 %)", ylim=(0, 1.1))
    axes[0].legend()
    plots.save_figure(figure, path)


if __name__ == "__main__":
    run_program(draw)
