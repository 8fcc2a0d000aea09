"""The table in experiments/README.md: what `musicscope plan` says about each line there.

python -m experiments.table            print it
python -m experiments.table --write    put it into the README
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from musicscope.commands.plan import estimate as plan
from musicscope.commands.plan import rates as plan_rates
from musicscope.commands.plan.published_sizes import shape_of
from musicscope.core.command_line import Parser, run_program

README = Path("experiments/README.md")
PLANNED_CLIPS = {"folder": 2000}
"""For sources whose number of recordings nobody publishes."""
BEGIN, END = "<!-- plan: python -m experiments.table --write -->\n", "<!-- end -->\n"


def commands(text: str) -> dict[str, list[str]]:
    """Name (-n) -> overrides (-S) of every `dvc exp run` in a page."""
    found = {}
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        words = shlex.split(block.replace("\\\n", " "))
        if words[:3] == ["dvc", "exp", "run"]:
            options = words[3:]
            pairs = list(zip(options[::2], options[1::2], strict=True))
            if unknown := {flag for flag, _ in pairs} - {"-n", "-S"}:
                raise ValueError(f"{README}: {unknown} in {' '.join(words[:6])}")
            (name,) = (value for flag, value in pairs if flag == "-n")
            found[name] = [value for flag, value in pairs if flag == "-S"]
    return found


def line(name: str, sets: list[str], params: str = "params.yaml") -> str:
    """One row of the table; rates as measured on a CPU."""
    typed = plan.overridden(params, [*sets, "compute.device=cpu", "compute.processes=2"])
    clips = plan.count_clips(typed, PLANNED_CLIPS.get(typed.prepare_data.source))
    shapes = [shape_of(model) for model in typed.models]
    rates = plan_rates.load("benchmarks/results", shapes, typed.compute.device)
    step = plan_rates.step_rate("benchmarks/results")
    rows = plan.rows_of(typed, clips, shapes, rates, step)
    memory = max(*(row.memory or 0 for row in rows), *(shape.weight_bytes() for shape in shapes))
    hours = [row.hours for row in rows if row.hours is not None]
    known = {row.note for row in rows if row.hours is not None}
    unknown = any(row.runs and row.hours is None for row in rows)
    cells = [
        f"`{name}`", f"{clips.number:,}", f"{sum(row.disk for row in rows) / 1e9:,.0f} GB",
        f"{memory / 1e9:,.1f} GB",
        (f"{sum(hours):,.0f}" if hours else "") + (" + ?" if unknown else ""),
        "; ".join(sorted(known)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table(text: str) -> str:
    """The table for a page's commands, header included."""
    head = text.split(BEGIN)[1].split("\n|---")[0]
    rule = "|" + "---|" * (head.count("|") - 1)
    return "\n".join([head, rule, *(line(n, s) for n, s in commands(text).items())]) + "\n"


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into the README")
    write = parser.parse_args().write
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    text = README.read_text(encoding="utf-8")
    new = table(text)
    print(new, end="")
    if write:
        before, rest = text.split(BEGIN)
        README.write_text(before + BEGIN + new + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
