"""Instrument labels from captions and tags: what is said, what is denied, what is left open."""

from __future__ import annotations

import time

import pytest

from musicscope.data.sources import labels
from musicscope.data.sources.labels import NEGATED, PRESENT, UNKNOWN, UNLISTED
from musicscope.data.taxonomy import FAMILIES


def guitar(caption: str) -> str:
    return labels.from_caption(caption)["guitar"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A mellow acoustic guitar over soft drums.", PRESENT),
        ("Two GUITARS and a flute", PRESENT),
        ("A guitarist strums", PRESENT),
        ("A 12-string acoustic guitar", PRESENT),
        ("no drums but an electric guitar", PRESENT),
        ("There is no singer, a guitar plays the melody.", PRESENT),
        ("No vocals and a guitar.", PRESENT),
        ("Not only piano: guitar too.", PRESENT),
        ("A no-frills guitar tune", PRESENT),
        ("No instruments other than guitar", PRESENT),
        ("No electric guitar here. An acoustic guitar instead.", PRESENT),
        ("Electric and bass guitars with drums", PRESENT),
        # explicitly absent
        ("Drums with no guitar.", NEGATED),
        ("A song without guitar", NEGATED),
        ("without any electric guitars, only piano", NEGATED),
        ("A harp instead of a guitar", NEGATED),
        ("piano rather than an electric guitar", NEGATED),
        ("no drums or guitars, piano", NEGATED),
        ("no drums, guitars or bass", NEGATED),
        ("There isn't a guitar in this piano song", NEGATED),
        ("The guitar is absent, the piano plays.", NEGATED),
        ("A guitar-free piano piece", NEGATED),
        # other instruments named, guitar not: weak absence
        ("A slow piano ballad", UNLISTED),
        ("A bass guitar and drums", UNLISTED),
        ("A bass guitarist with a drummer", UNLISTED),
        ("someone plays air guitar to drums", UNLISTED),
        ("a synth with a guitar-like timbre", UNLISTED),
        ("The synth sounds like an electric guitar", UNLISTED),
        ("Ukulele and flute", UNLISTED),
        # no instrument named, or words that may hide one
        ("Heavy metal, aggressive and fast", UNKNOWN),
        ("", UNKNOWN),
        ("A rock band with drums", UNKNOWN),
        ("Various instruments and a piano", UNKNOWN),
        ("a man strums steel strings with drums", UNKNOWN),
        ("guitarron tuning", UNKNOWN),
        ("Just a man singing", UNKNOWN),
    ],
)
def test_guitar_in_captions(caption, expected):
    assert guitar(caption) == expected


@pytest.mark.parametrize(
    ("family", "caption", "expected"),
    [
        ("bass", "A bass guitar and drums", PRESENT),
        ("bass", "bass drum and trumpet", UNLISTED),
        ("bass", "drum and bass track with a piano", UNLISTED),
        ("bass", "a bass clarinet solo", UNLISTED),
        ("drums", "a bass drum", PRESENT),
        ("drums", "piano with tambourine", UNKNOWN),
        ("piano", "an electric piano groove", UNLISTED),
        ("electric_piano", "an electric piano groove", PRESENT),
        ("electric_piano", "warm Rhodes and drums", PRESENT),
        ("piano", "keyboard and drums", UNKNOWN),
        ("organ", "blues harp and mouth organ with drums", UNLISTED),
        ("plucked", "blues harp with drums", UNLISTED),
        ("plucked", "a harp", PRESENT),
        ("plucked", "a harpsichord", UNKNOWN),
        ("brass", "an English horn", UNLISTED),
        ("reed", "an English horn", PRESENT),
        ("strings", "a nylon string guitar", UNLISTED),
        ("strings", "a string quartet", PRESENT),
        ("mallets", "steel drums", UNKNOWN),
        ("choir", "A piano and a female singer", UNKNOWN),
        ("choir", "A piano solo", UNLISTED),
        ("flute", "captured on a tape recorder, piano", UNLISTED),
        ("drums", "the beat kicks in with a piano", UNKNOWN),
    ],
)
def test_other_families_in_captions(family, caption, expected):
    assert labels.from_caption(caption)[family] == expected


def test_a_long_caption_of_negations_takes_no_time():
    start = time.perf_counter()
    labels.from_caption("no " + "drums, guitars bass " * 400 + "without " * 400)
    assert time.perf_counter() - start < 2


def test_tags_are_matched_whole():
    for tag in ("guitar", "acousticguitar", "classicalguitar", "electricguitar"):
        assert labels.from_tags({tag}, 2)["guitar"] == PRESENT
    bass = labels.from_tags({"acousticbassguitar", "drums"}, 2)
    assert (bass["guitar"], bass["bass"]) == (UNLISTED, PRESENT)


INSTRUMENT_TAGS = (
    "accordion", "acousticbassguitar", "acousticguitar", "bass", "beat", "bell", "bongo",
    "brass", "cello", "clarinet", "classicalguitar", "computer", "doublebass", "drummachine",
    "drums", "electricguitar", "electricpiano", "flute", "guitar", "harmonica", "harp",
    "horn", "keyboard", "oboe", "orchestra", "organ", "pad", "percussion", "piano",
    "pipeorgan", "rhodes", "sampler", "saxophone", "strings", "synthesizer", "trombone",
    "trumpet", "ukulele", "viola", "violin", "voice",
)  # fmt: skip
"""The 41 instrument tags of MTG-Jamendo."""
TAGS = {
    "guitar": {"guitar", "acousticguitar", "classicalguitar", "electricguitar"},
    "piano": {"piano"}, "electric_piano": {"electricpiano", "rhodes"},
    "organ": {"organ", "pipeorgan"}, "strings": {"strings", "violin", "viola", "cello"},
    "brass": {"brass", "trumpet", "trombone", "horn"}, "reed": {"saxophone", "clarinet", "oboe"},
    "flute": {"flute"}, "synth": {"synthesizer"}, "plucked": {"harp", "ukulele"},
    "bass": {"bass", "acousticbassguitar", "doublebass"}, "drums": {"drums", "drummachine"},
}  # fmt: skip
UNCLEAR_TAGS = {
    "piano": {"keyboard"}, "electric_piano": {"keyboard", "piano"}, "organ": {"keyboard"},
    "strings": {"orchestra"}, "brass": {"orchestra"}, "reed": {"orchestra"},
    "flute": {"orchestra"}, "synth": {"keyboard", "computer", "pad", "sampler"},
    "plucked": {"orchestra"}, "drums": {"percussion", "beat", "bongo", "computer", "sampler"},
}  # fmt: skip


@pytest.mark.parametrize("tag", INSTRUMENT_TAGS)
def test_each_tag_means_what_its_words_mean_in_captions(tag):
    answers = labels.from_tags({tag, "other"}, 2)
    caption = labels.from_caption(labels.SPELLED.get(tag, tag))
    for family in FAMILIES:
        expected = (
            PRESENT if tag in TAGS.get(family, ())
            else UNKNOWN if family in ("mallets", "choir") or tag in UNCLEAR_TAGS.get(family, ())
            else UNLISTED
        )  # fmt: skip
        assert answers[family] == expected, family
        assert (caption[family] == PRESENT) == (expected == PRESENT), family
    assert labels.is_known_tag(tag)
    assert not labels.is_known_tag("vuvuzela")


def test_a_missing_tag_is_absence_only_beside_enough_others():
    assert labels.from_tags({"piano"}, 2)["guitar"] == UNKNOWN
    assert labels.from_tags({"piano", "flute"}, 2)["guitar"] == UNLISTED
    assert labels.from_tags({"piano"}, 1)["guitar"] == UNLISTED
    hidden = labels.from_tags({"orchestra", "keyboard"}, 2)
    assert {hidden[f] for f in ("strings", "brass", "reed", "flute", "piano", "synth")} == {UNKNOWN}
    voice = labels.from_tags({"voice", "piano"}, 1)
    assert (voice["choir"], voice["mallets"]) == (UNKNOWN, UNKNOWN)


def test_combining_answers():
    assert labels.combine([PRESENT, UNLISTED]) is True
    assert labels.combine([PRESENT, UNKNOWN]) is True
    assert labels.combine([NEGATED, UNLISTED]) is False
    assert labels.combine([UNKNOWN, UNLISTED]) is False
    assert labels.combine([UNKNOWN, UNKNOWN]) is None
    assert labels.combine([PRESENT, NEGATED]) is None
    assert labels.combine([]) is None
    assert set(labels.merge([])) == set(FAMILIES)


def test_agreement_counts_each_pair_once():
    pairs = [(PRESENT, PRESENT), (PRESENT, UNLISTED), (NEGATED, PRESENT), (UNKNOWN, PRESENT),
             (NEGATED, UNLISTED)]  # fmt: skip
    assert labels.agreement(pairs) == {
        "agree": 2, "only_first": 1, "only_second": 1, "unknown_in_either": 1,
    }  # fmt: skip
