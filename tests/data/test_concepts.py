"""Concepts of params.yaml as labels: captions, tags, columns, folders, and their errors."""

from __future__ import annotations

import pandas as pd
import pytest

from musicscope.config.concepts import ConceptDefinition
from musicscope.data import clips
from musicscope.data.clips import ClipStore, known_labels
from musicscope.data.concepts import READY, completed, concepts_of
from musicscope.data.sources import build, folder, labels
from musicscope.data.taxonomy import FAMILIES, PITCHED_FAMILIES
from musicscope.embedded import clip_set
from musicscope.judges.musicnn import TAGS
from tests.support.source_archives import (
    configured,
    encoded,
    make_jamendo,
    make_musicbench,
    tone,
)

EMPTY = ConceptDefinition()
VOICES = completed({"vocals": EMPTY, "male_vocal": EMPTY, "female_vocal": EMPTY})


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "dvc"))
    monkeypatch.setattr(clips, "SHARD_BYTES", 4 * 2 * 4000)


def test_families_are_the_taxonomy_and_ready_made_tags_are_those_of_musicnn():
    assert (*PITCHED_FAMILIES, "bass", "drums") == FAMILIES
    assert all(set(of.musicnn) < set(TAGS) for of in READY.values())
    assert set(READY) < set(clip_set.LABELS)


@pytest.mark.parametrize(
    ("caption", "answers"),
    [
        ("A male vocalist sings over an acoustic guitar.", "present present unlisted"),
        ("Male vocals with piano.", "present present unlisted"),
        ("A female singer with piano and drums.", "present unlisted present"),
        ("Male and female vocals over a synth.", "present present present"),
        ("A singer with a guitar.", "present unknown unknown"),
        ("A guitar and drums play a calm tune.", "unlisted unlisted unlisted"),
        ("An instrumental rock song by a band.", "unlisted unlisted unlisted"),
        ("A guitar tune without vocals.", "negated unknown unknown"),
        ("A guitar; there is no male voice.", "negated negated unknown"),
        ("A calm mood.", "unknown unknown unknown"),
        ("A spoken word piece with a guitar.", "unknown unknown unknown"),
    ],
)  # fmt: skip
def test_captions_say_who_sings(caption, answers):
    found = labels.from_caption(caption, VOICES)
    assert [found[name] for name in VOICES] == answers.split()
    assert {f: found[f] for f in FAMILIES} == labels.from_caption(caption)


def test_words_of_a_concept_match_whole_words_in_any_spelling():
    own = {"lofi": ConceptDefinition(tags=("lo-fi", "analog synth"), unclear=("tape",))}
    say = {
        "A LO-FI beat on piano.": "present", "Two analog-synths and a bass.": "present",
        "Analog  synth.": "present", "A piano on tape.": "unknown", "A flo-fi guitar.": "unlisted",
    }  # fmt: skip
    assert {text: labels.from_caption(text, own)["lofi"] for text in say} == say
    silent = {"own": ConceptDefinition()}  # no words: captions say nothing of it
    assert labels.from_caption("A guitar.", silent)["own"] == "unknown"


def test_tags_of_all_categories_are_labels():
    own = {"jazz": ConceptDefinition(tags=("jazz", "bebop")), **VOICES}
    found = labels.from_tags({"guitar", "drums"}, 2, own, {"jazz"})
    assert (found["jazz"], found["vocals"], found["male_vocal"]) == ("present", *["unlisted"] * 2)
    found = labels.from_tags({"guitar", "voice"}, 2, own, {"rock"})
    assert (found["jazz"], found["vocals"], found["male_vocal"]) == (
        "unlisted", "present", "unknown",
    )  # fmt: skip
    assert labels.from_tags({"guitar"}, 3, own, {"rock"})["jazz"] == "unknown"
    assert {f: found[f] for f in FAMILIES} == labels.from_tags({"guitar", "voice"}, 2)


def recordings(root, rows: dict[str, str], header: str):
    """A folder with a tone per row, and its labels.csv."""
    for i, name in enumerate(rows):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(tone(300 + 20 * i)))
    if header:
        lines = "".join(f"{name},{row}\n" for name, row in rows.items())
        (root / "labels.csv").write_text(header + "\n" + lines)
    return configured("folder", root)


ROWS = {f"{i}.wav": f"{value}" for i, value in enumerate(["1", "0", "", "yes", "no", "1"])}


def store_of(tmp_path, config, concepts) -> ClipStore:
    build.write_recordings(tmp_path / "clips", config, 0, concepts=concepts)
    return ClipStore.open(tmp_path / "clips")


def test_a_defined_column_becomes_a_label_with_unknowns(tmp_path, capsys):
    config = recordings(tmp_path / "mine", ROWS, "path,Has_Male_Vocal")
    store = store_of(tmp_path, config, {"male_vocal": EMPTY})
    has = store.rows["has_male_vocal"]
    assert has.dtype == "boolean"
    assert has.tolist() == [True, False, pd.NA, True, False, True]
    assert "not used" not in capsys.readouterr().err
    metrics = build.measure(store, 0)
    assert metrics["labels"]["male_vocal"]["with"] == 3
    assert metrics["labels"]["male_vocal"]["unknown"] == 1
    assert list(metrics["labels"])[:-1] == list(FAMILIES)
    assert "concept_rule" in metrics
    assert concepts_of(store.rows, ["male_vocal"]) == (*FAMILIES, "male_vocal")


def test_a_column_that_is_not_defined_is_named_with_its_key(tmp_path, capsys):
    config = recordings(tmp_path / "mine", ROWS, "path,male_vocal")
    store = store_of(tmp_path, config, {})
    said = capsys.readouterr().err
    assert "not used: male_vocal" in said
    assert "`male_vocal: {}` under `concepts` in params.yaml" in said
    assert "has_male_vocal" not in store.rows
    assert "concept_rule" not in build.measure(store, 0)
    with pytest.raises(ValueError, match=r"concepts\.male_vocal: data/clips has no labels for it"):
        concepts_of(store.rows, ["male_vocal"])


def test_another_column_and_captions_label_together(tmp_path):
    rows = {
        "a.wav": "1,A female singer and a piano.", "b.wav": ",A male singer and a guitar.",
        "c.wav": ",A guitar.", "d.wav": "0,A male singer.", "e.wav": ",Music.",
    }  # fmt: skip
    config = recordings(tmp_path / "mine", rows, "path,man,caption")
    found = store_of(tmp_path, config, {"male_vocal": ConceptDefinition(column="Man")})
    assert found.rows["has_male_vocal"].tolist() == [True, True, False, False, pd.NA]


def test_two_folders_are_labels_and_no_groups(tmp_path):
    names = [*(f"sung/{i}.wav" for i in range(3)), "sung/more/a.wav", "sung/more/b.wav",
             *(f"played/{i}.wav" for i in range(3)), "other.wav"]  # fmt: skip
    config = recordings(tmp_path / "mine", dict.fromkeys(names, ""), "")
    pair = ConceptDefinition(folder_with="sung", folder_without=str(tmp_path / "mine/played"))
    rows = store_of(tmp_path, config, {"song": pair}).rows.set_index("recording")
    assert [rows.loc[name, "has_song"] for name in names] == [*[True] * 5, *[False] * 3, pd.NA]
    groups = rows["group"].to_dict()
    assert len({groups[name] for name in names}) == len(names) - 1
    assert groups["sung/more/a.wav"] == groups["sung/more/b.wav"]
    known, _ = known_labels(rows.reset_index(), "song")
    assert len(known) == 8


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        (("sung", "sung"), "folder_with and folder_without are the same"),
        (("sung", "nowhere"), r"folder_without = 'nowhere' is no folder below .*mine"),
        (("sung", "../away"), r"folder_without = '\.\./away' is no folder below .*mine"),
    ],
)
def test_a_folder_elsewhere_is_an_error(tmp_path, pair, text):
    (tmp_path / "away").mkdir()
    config = recordings(tmp_path / "mine", {"sung/0.wav": "", "x/0.wav": ""}, "")
    with pytest.raises(ValueError, match=rf"concepts\.song.{text}|concepts\.song: {text}"):
        folder.scan(config, 0, {"song": ConceptDefinition(folder_with=pair[0],
                                                          folder_without=pair[1])})  # fmt: skip


def test_a_concept_without_labels_and_folders_of_other_sources_are_errors(tmp_path):
    config = recordings(tmp_path / "mine", dict.fromkeys(ROWS, "1"), "path,mine")
    said = r"concepts\.mine: of 6 recordings 6 have it, 0 lack it and 0 are unknown; .*column"
    with pytest.raises(ValueError, match=said):
        build.prepare(config, 0, {"mine": EMPTY})
    bench = configured("musicbench", tmp_path / "bench")
    pair = ConceptDefinition(folder_with="a", folder_without="b")
    with pytest.raises(ValueError, match=r"concepts\.mine\.folder_with: .*source = folder only"):
        build.prepare(bench, 0, {"mine": pair})


def test_data_sets_have_columns_of_concepts(tmp_path):
    make_musicbench(tmp_path / "bench")
    own = {"calm": ConceptDefinition(tags=("calm",), absent=("acoustic",))}
    bench = store_of(tmp_path, configured("musicbench", tmp_path / "bench"), own)
    assert (bench.rows["has_calm"] == bench.rows["has_piano"]).all()
    make_jamendo(tmp_path / "jamendo")
    scan = build.prepare(configured("mtg_jamendo", tmp_path / "jamendo"), 0, {
        "plucked_guitar": ConceptDefinition(tags=("guitar", "acoustic guitar"))
    })  # fmt: skip
    found = {r.labels["plucked_guitar"] for r in scan.recordings}
    assert {True, False} <= found


def test_rendered_music_has_labels_for_voices_only():
    clip_set.check_concepts(["vocals", "male_vocal"])
    with pytest.raises(ValueError, match=r"concepts\.theremin: .*embedded.*female_vocal; take"):
        clip_set.check_concepts(["theremin"])
