"""Charts: same numbers, same bytes, whatever the user's matplotlib settings say."""

import hashlib

import matplotlib as mpl
import numpy as np

from musicscope.core import plots


def draw(path, values=(0.5, 0.8)):
    figure, axes = plots.new_figure(1, 2, (6, 3))
    plots.interval_bars(axes[0, 0], ["a", "b"], values, [0.4, 0.7], [0.6, np.nan])
    plots.interval_curve(axes[0, 1], [1, 2, 4], [0.5, 0.6, 0.7], [0.4] * 3, [0.8] * 3, "line")
    plots.reference_line(axes[0, 1], 0.5, "chance")
    axes[0, 1].legend()
    plots.save_figure(figure, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_same_bytes_twice_and_under_other_settings(tmp_path):
    first = draw(tmp_path / "a.png")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 30}):
        assert draw(tmp_path / "deeper" / "b.png") == first
    assert draw(tmp_path / "c.png", values=(0.5, 0.7)) != first
    assert [p.name for p in (tmp_path / "deeper").iterdir()] == ["b.png"]


def test_png_carries_no_version_or_date(tmp_path):
    draw(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert b"Matplotlib" not in data
    assert b"tEXt" not in data
    assert b"tIME" not in data
