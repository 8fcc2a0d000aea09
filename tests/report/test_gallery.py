"""The gallery: every piece is on the page beside its clip; what is missing is said."""

from __future__ import annotations

import json

import soundfile

from musicscope.report.build import page
from musicscope.report.elements import Players
from musicscope.report.sections import gallery
from tests.support.report import HOSTILE, RATE, decoded, similarity, sources, tone


def test_pieces_are_played_in_order_beside_their_clips(tmp_path):
    folder = tmp_path / "data/gallery/tiny"
    folder.mkdir(parents=True)
    pieces = []
    for i, caption in enumerate((HOSTILE, "organ", "lost")):
        files = {"file": f"{i}-generated.flac", "real": f"{i}-real.flac"}
        for name, pitch in zip(files.values(), (300 + i, 600 + i), strict=True):
            if caption != "lost":
                soundfile.write(folder / name, tone(pitch), RATE)
        pieces.append({"caption": caption, **files})
    (folder / "index.json").write_text(json.dumps({"pieces": pieces}))
    made = gallery.section(sources(tmp_path, ("tiny", "rave")))
    assert made is not None
    (entry,) = made.content["models"]
    players = entry["players"]
    assert isinstance(players, Players)
    assert [title for title, _ in players.rows] == [HOSTILE, "organ", "lost"]
    generated, real = players.rows[0][1]
    assert similarity(decoded(generated.audio), tone(300)) > 0.95
    assert similarity(decoded(real.audio), tone(600)) > 0.95
    assert players.rows[2][1] == ()
    assert len(made.missing) == 2  # the unreadable piece, and rave's gallery
    assert HOSTILE not in page("x", [made])


def test_a_model_that_generates_nothing_says_so_and_no_gallery_is_no_section(tmp_path):
    assert gallery.section(sources(tmp_path, ("tiny",))) is None
    folder = tmp_path / "data/gallery/tiny"
    folder.mkdir(parents=True)
    (folder / "index.json").write_text('{"pieces": []}')
    made = gallery.section(sources(tmp_path, ("tiny",)))
    assert "generates nothing" in page("x", [made])
