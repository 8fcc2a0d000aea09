"""The table of presets in experiments/README.md and docs/recipes.md, as `musicscope plan` says.

python -m experiments.table            print it
python -m experiments.table --write    put it into both pages
"""

from __future__ import annotations

import os
from pathlib import Path

from experiments.preset import presets
from musicscope.commands.plan import estimate as plan
from musicscope.commands.plan import rates as plan_rates
from musicscope.commands.plan.published_sizes import shape_of
from musicscope.core.command_line import Parser, run_program

PAGES = (Path("experiments/README.md"), Path("docs/recipes.md"))
PLANNED_CLIPS = {"folder": 2000}
"""For sources whose number of recordings nobody publishes."""
BEGIN, END = "<!-- plan: python -m experiments.table --write -->\n", "<!-- end -->\n"


def line(name: str, sets: list[str], params: str = "params.yaml") -> str:
    """One row of the table; hours on two CPU processes and on a GPU, at the stored rates."""
    hours, origins, rows, shapes = {}, [], [], []
    for device in ("cuda", "cpu"):  # disk and memory are those of the CPU
        typed = plan.overridden(params, [*sets, f"compute.device={device}", "compute.processes=2"])
        clips = plan.count_clips(typed, PLANNED_CLIPS.get(typed.prepare_data.source))
        shapes = [shape_of(model) for model in typed.models]
        rates = plan_rates.load("benchmarks/results", shapes, device)
        step = plan_rates.step_rate("benchmarks/results", device)
        rows = plan.rows_of(typed, clips, shapes, rates, step)
        timed = [row for row in rows if row.hours is not None]
        unknown = any(row.runs and row.hours is None for row in rows)
        spent = sum(row.hours or 0 for row in timed)
        hours[device] = (f"{spent:,.2g}" if spent < 10 else f"{spent:,.0f}") if timed else ""
        hours[device] += " + ?" * unknown
        origins = sorted({row.note for row in timed})
    memory = max(*(row.memory or 0 for row in rows), *(shape.weight_bytes() for shape in shapes))
    cells = [
        f"`{name}`", f"{clips.number:,}", f"{sum(row.disk for row in rows) / 1e9:,.0f} GB",
        f"{memory / 1e9:,.1f} GB", hours["cpu"], hours["cuda"], "; ".join(origins),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table(text: str) -> str:
    """The table of all presets, under the header that the page has."""
    head = text.split(BEGIN)[1].split("\n|---")[0]
    rule = "|" + "---|" * (head.count("|") - 1)
    return "\n".join([head, rule, *(line(n, s) for n, s in presets().items())]) + "\n"


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into both pages")
    write = parser.parse_args().write
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = table(text)
        if write:
            before, rest = text.split(BEGIN)
            page.write_text(before + BEGIN + new + END + rest.split(END)[1], encoding="utf-8")
        else:
            print(new, end="")


if __name__ == "__main__":
    run_program(main)
