import pytest

from musicscope.embedded.rendering.soundfonts import FLUIDR3MONO
from tools.subset_soundfont import KEPT, subset


def test_the_committed_soundfont_is_its_own_subset():
    """So nothing is left out of a subset, and nothing else is in this one."""
    content = FLUIDR3MONO.read_bytes()
    assert subset(content) == content


def test_a_soundfont_without_a_preset_is_refused(monkeypatch):
    monkeypatch.setattr("tools.subset_soundfont.KEPT", KEPT | {(0, 127)})
    with pytest.raises(ValueError, match=r"no preset \(bank, program\) \[\(0, 127\)\]"):
        subset(FLUIDR3MONO.read_bytes())


def test_what_is_no_soundfont_is_refused():
    with pytest.raises(ValueError, match="not a soundfont"):
        subset(b"RIFF\0\0\0\0WAVE")
