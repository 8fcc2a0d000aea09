"""Write the headline numbers: metrics/summary.json.

With --show: print them as a table, with intervals, and write nothing.
"""

from __future__ import annotations

from musicscope.config import load_params
from musicscope.core.command_line import Parser
from musicscope.core.io import write_json
from musicscope.report.summary import summarize, summary_table
from stages import run_stage


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--show", action="store_true", help="print the table and write nothing")
    show = parser.parse_args().show
    params = load_params()
    models, slots = params.models, params.slots
    if not show:
        write_json("metrics/summary.json", summarize(models, slots))
    print(summary_table(models, slots).to_string())


if __name__ == "__main__":
    run_stage(main)
