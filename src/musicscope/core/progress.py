"""Progress with the time left: a bar on a terminal, in a log a line per minute and a last one."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 60.0
LINE = "{desc}: {n_fmt} of {total_fmt} {unit} in {elapsed}, {remaining} left"


class Bar(tqdm):
    """tqdm on standard error. `unit` is a plural."""

    def __init__(self, *args: Any, **options: Any):
        self.logs, self._told = not sys.stderr.isatty(), None
        if self.logs:
            options |= {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, "bar_format": LINE}
        super().__init__(*args, file=sys.stderr, dynamic_ncols=True, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or write a line that says something new."""
        if not self.logs:
            super().display(msg, pos)
        elif self.n not in (self.initial, self._told):
            self._told = self.n
            print(msg or str(self), file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar; in a log with a last line."""
        if not self.logs or self.disable:
            return super().close()
        self.display()
        self.disable = True
        self._decr_instances(self)
