import contextlib
import io
import re
import sys

from musicscope.core import progress
from musicscope.core.progress import Bar


def test_a_log_gets_one_line_that_says_how_many_and_how_long(capsys):
    assert list(Bar(range(500), desc="listening", unit="clips")) == list(range(500))
    assert re.fullmatch(
        r"listening: 500 of 500 clips in 00:0\d, 00:00 left\n", capsys.readouterr().err
    )


def test_long_work_gets_lines_in_between_and_none_before_it_begins(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with Bar(total=10, initial=4, desc="a", unit="clips") as bar:
        for _ in range(3):
            bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [f"a: {n} of 10 clips" for n in (6, 8, 10)]


def test_a_bar_that_is_disabled_or_was_stopped_says_so(capsys):
    Bar(total=3, desc="a", unit="clips", disable=True).close()
    assert not capsys.readouterr().err
    bar = Bar(total=3, desc="a", unit="clips")
    with contextlib.suppress(KeyboardInterrupt), bar:
        bar.update()
        raise KeyboardInterrupt
    assert capsys.readouterr().err.startswith("a: 1 of 3 clips")


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    list(Bar(range(3), desc="listening", unit="clips"))
    assert terminal.getvalue().startswith("\r")
    assert "100%|" in terminal.getvalue()
