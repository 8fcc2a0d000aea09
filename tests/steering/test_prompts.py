"""Prompts of concepts that params.concepts defines: templates, captions, and several at once."""

from __future__ import annotations

import pandas as pd
import pytest

from musicscope.config.concepts import ConceptDefinition
from musicscope.data.taxonomy import FAMILIES
from musicscope.steering.methods import Condition
from musicscope.steering.subjects import Prompts, phrasing_of

TEMPLATES = ConceptDefinition(
    prompts_with=("a {tempo} song by a man", "a man sings in {key}", "sung by him, {dense}"),
    prompts_without=("a {tempo} tune with {lead}", "{every}, {bpm} BPM", "{dense} instrumental"),
)


def table(captions: int = 6) -> pd.DataFrame:
    """Per split `captions` clips with a man's voice, as many without, and one of unknown label."""
    rows = []
    for split in ("train", "validation", "test"):
        for i in range(2 * captions + 1):
            sung = None if i == 2 * captions else i % 2 == 0
            caption = f"{split} song {i} by a male singer" if sung and i else f"{split} tune {i}"
            caption += " by a female singer" if i == 3 else ""
            rows.append(
                {"kind": "clip", "font": "recording", "split": split, "group": f"{split}{i // 3}",
                 "caption": caption, "has_song": sung, "has_guitar": i % 4 == 1}
            )  # fmt: skip
    rows[-2]["caption"] = "a tune without any male singer"  # test, without it
    found = pd.DataFrame(rows)
    return found.assign(has_song=found["has_song"].astype("boolean"))


def subject(definition: ConceptDefinition, rows: pd.DataFrame | None, *more: str) -> Prompts:
    concepts = ("guitar", "song", *more)
    own = {"song": definition} | {name: TEMPLATES for name in more}
    phrasings = {name: phrasing_of(name, own, rows, concepts, 3) for name in own}
    return Prompts(3, 1.0, 4, 3.0, concepts, words=False, phrasings=phrasings)


def texts_of(subject: Prompts, split: str, n: int, *requests: tuple[str, str]) -> list[str]:
    return subject.titles(subject.select(split, n, requests))


def test_templates_are_filled_and_split_between_validation_and_test():
    own = subject(TEMPLATES, None)
    validation = texts_of(own, "validation", 6, ("song", "off"))
    test = texts_of(own, "test", 6, ("song", "off"))
    assert len(set(validation)) == len(validation) == 6
    assert all(t.startswith(("a ", "sung by him")) and "sings" not in t for t in validation)
    assert all(t.startswith("a man sings in ") for t in test)
    assert not set(validation) & set(test)
    on = texts_of(own, "validation", 8, ("song", "on"))
    assert all("tune with" in t or "instrumental" in t for t in on)
    assert not any("guitar" in t for t in on)  # it is steered too, and not asked for
    assert on[:3] == texts_of(own, "validation", 3, ("song", "on"))
    for_guitar = texts_of(own, "validation", 4, ("guitar", "on"))
    plain = Prompts(3, 1.0, 4, 3.0, ("guitar", "song"), words=False, phrasings=own.phrasings)
    assert for_guitar == texts_of(plain, "validation", 4, ("guitar", "on"))


def test_prompts_that_do_not_vary_are_as_many_as_there_are():
    fixed = ConceptDefinition(prompts_with=("a", "b", "c", "d", "e"), prompts_without=("x", "y"))
    own = subject(fixed, None)
    assert own.select("validation", 8, [("song", "off")]).n == 3
    with pytest.raises(ValueError, match=r"1 test prompts without song.*concepts\.song\.prompts_w"):
        own.select("test", 8, [("song", "on")])


def test_captions_take_the_place_of_templates():
    own = subject(ConceptDefinition(tags=("male singer",)), table())
    off = texts_of(own, "test", 9, ("song", "off"))
    assert len(off) == 6
    assert all(t.startswith("test ") for t in off)
    # A caption that has no word of the concept gets one.
    assert "test tune 0 with song" in off
    on = texts_of(own, "test", 9, ("song", "on"))
    # Not one that denies the concept. Clips with a guitar, which is steered too, come last.
    assert sorted(on[:2]) == ["test tune 3 by a female singer", "test tune 7"]
    assert sorted(on[2:]) == ["test tune 1", "test tune 5", "test tune 9"]
    assert own.select("validation", 4, [("song", "off")]).n == 4


def test_too_few_captions_name_concept_split_count_and_key():
    said = (
        r"0 validation prompts with song, at least 2 are needed: give concepts\.song\.prompts_with"
    )
    with pytest.raises(ValueError, match=said):
        subject(ConceptDefinition(), None).select("validation", 4, [("song", "off")])
    rows = table(2).assign(caption="the same")
    with pytest.raises(ValueError, match=r"1 validation prompts with song"):
        subject(ConceptDefinition(), rows).select("validation", 4, [("song", "off")])
    with pytest.raises(ValueError, match=r"0 test prompts with song"):  # all are in validation
        subject(ConceptDefinition(), rows).select("test", 4, [("song", "off")])


def test_several_at_once_are_named_together():
    own = subject(TEMPLATES, None, "choirboy")
    both = texts_of(own, "test", 4, ("song", "off"), ("guitar", "off"))
    assert all(t.startswith("a man sings") and t.endswith(" with guitar") for t in both)
    voices = texts_of(own, "test", 2, ("choirboy", "off"), ("song", "off"))
    assert all(t.endswith(" with song") for t in voices)
    mixed = texts_of(own, "test", 5, ("guitar", "off"), ("song", "on"))
    assert all("guitar" in t and "song" not in t and "man" not in t.split() for t in mixed)


def test_batches_are_of_the_concepts_own_prompts():
    own = subject(TEMPLATES, None)
    selection = own.select("validation", 6, [("song", "off")])
    texts = [t for part, _ in own.batches("m", Condition(selection)) for t in part]
    assert texts == own.titles(selection)
    words = Condition(selection, "prompt_edit", (("song", "off"),))
    edited = [t for part, _ in own.batches("m", words) for t in part]
    assert edited == [f"{t}, no song" for t in texts]


def test_families_are_as_without_definitions():
    own, without = subject(TEMPLATES, None), Prompts(3, 1.0, 4, 3.0, ("guitar", "song"), False)
    for requests in ([("guitar", "off")], [("guitar", "off"), ("drums", "off")]):
        assert own.select("test", 5, requests) == without.select("test", 5, requests)
        assert texts_of(own, "test", 5, *requests) == texts_of(without, "test", 5, *requests)
    assert "song" not in FAMILIES
