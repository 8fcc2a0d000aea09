"""The evaluation: prompts, verdicts with known answers, choice, and a whole run on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from musicscope.core.io import read_json
from musicscope.core.mmd import GaussianKernel
from musicscope.core.stats import Estimate
from musicscope.data.taxonomy import FAMILIES, KEYS
from musicscope.steering import conditions, report, search
from musicscope.steering import evaluation as ev
from musicscope.steering.conditions import Measurement
from musicscope.steering.methods import FROZEN, METHODS, Condition, Selection
from musicscope.steering.recipes import Settings, load_recipe
from musicscope.steering.subjects import FORMS, Clips, Prompts, make_prompts
from tests.support.steered import LAYER, SECTION, tiny_context

# --- prompts ----------------------------------------------------------------------------------


def test_prompts_name_what_is_to_go_and_not_what_is_to_come():
    wanted = Selection("test", 60, named=("guitar", "drums"), without=("organ", "electric_piano"))
    texts = make_prompts(wanted, seed=1)
    assert all("guitar" in t and "drums" in t for t in texts)
    assert not any("organ" in t or "electric" in t for t in texts)
    assert len(set(texts)) > 40
    assert texts[:7] == make_prompts(Selection("test", 7, *((wanted.named, wanted.without))), 1)
    assert texts != make_prompts(wanted, seed=2)
    # An accompaniment never leads, as in the clips.
    drums = make_prompts(Selection("test", 60, named=("drums",)), 1)
    assert not any(t.lower().startswith(("drums", "bass")) for t in drums)
    with pytest.raises(ValueError, match="unknown concept 'kazoo'"):
        make_prompts(Selection("test", 1, ("kazoo",)), 0)
    with pytest.raises(ValueError, match="named and absent"):
        make_prompts(Selection("test", 1, ("guitar",), ("guitar",)), 0)


def test_validation_and_test_share_no_phrasing_and_no_prompt():
    assert not set(FORMS["validation"]) & set(FORMS["test"])
    sets = [
        make_prompts(Selection(split, 200, named, without), 3)
        for named, without in ((("guitar",), ()), ((), ("guitar",)))
        for split in ("validation", "test")
    ]
    for validation, test in (sets[:2], sets[2:]):
        assert not set(validation) & set(test)
    assert any(key in t for t in sets[1] for key in KEYS)


# --- verdicts ---------------------------------------------------------------------------------

NAMES = ("guitar", "organ", "drums")


def measured(guitar, tagger=None, ce=0.0, organ=0.2, embeddings=None) -> Measurement:
    """Pieces with these probabilities for guitar by the two judges."""
    guitar = np.asarray(guitar, dtype=float)
    family = np.stack([guitar, np.full(len(guitar), organ), np.full(len(guitar), 0.1)], 1)
    family[np.isnan(guitar)] = np.nan
    tags = np.full_like(family, np.nan)
    tags[:, 0] = guitar if tagger is None else tagger
    if embeddings is None:
        embeddings = np.repeat(guitar[:, None], 5, 1)
    ces = np.full(len(guitar), ce)
    judged = {"family_judge": family, "musicnn": tags}
    return Measurement(judged, embeddings, ces, np.zeros((0, 1)))


def scorer(**changes) -> ev.Scorer:
    known = {"guitar": 0.5, "organ": 0.4, "drums": 0.3}
    thresholds = {"family_judge": known, "musicnn": {**known, "organ": np.nan}}
    heard = {"musicnn": changes.get("heard", {"guitar": 0.9, "drums": 0.9})}
    return ev.Scorer(NAMES, thresholds, heard, GaussianKernel(np.ones(5), 1.0), 200, 1)


def test_success_is_of_all_pieces_by_judges_that_never_chose_less_another_seed():
    plain = measured([0.9] * 4, tagger=[0.9, 0.9, 0.9, 0.1])
    steered = measured([0.9] * 4, tagger=[0.1, 0.1, 0.9, 0.1])
    again = measured([0.1] * 4, tagger=[0.1, 0.9, 0.9, 0.9])
    found = ev.outcome(scorer(), plain, steered, "guitar", "off", again)
    # 3 of 4 lack guitar after the edit, 1 of 4 with another seed; the choosing judge is deaf to it.
    assert found["success"]["value"] == pytest.approx(3 / 4 - 1 / 4)
    assert found["success_choosing"]["value"] == pytest.approx(0 - 1)
    assert (
        ev.outcome(scorer(), plain, steered, "guitar", "off")["success"]["value"] == 3 / 4 - 1 / 4
    )
    assert found["musicnn"]["moved"] == pytest.approx(2 / 3)
    assert (found["musicnn"]["to_change"], found["family_judge"]["to_change"]) == (3, 4)
    assert found["gain"]["value"] == pytest.approx(0.4 / np.std([0.9, 0.9, 0.9, 0.1]))
    assert found["not_judged"] is False


def test_regression_to_the_mean_is_no_success():
    """An edit that redraws every piece moves half of the unwanted verdicts: no success."""
    rng = np.random.default_rng(0)
    plain, steered, again = (measured(rng.choice([0.1, 0.9], 400)) for _ in range(3))
    found = ev.outcome(scorer(), plain, steered, "guitar", "off", again)
    assert found["musicnn"]["moved"] == pytest.approx(0.5, abs=0.08)
    assert found["success"]["low"] < 0 < found["success"]["high"]
    assert abs(found["success"]["value"]) < 0.1


def test_a_defined_concept_without_a_judge_is_not_judged_and_spoils_no_other_number():
    """Its column is NaN for every judge; what is kept of the families is as without it."""

    def wider(of: Measurement) -> Measurement:
        more = {j: np.pad(p, ((0, 0), (0, 1)), constant_values=np.nan)
                for j, p in of.probabilities.items()}  # fmt: skip
        return replace(of, probabilities=more)

    one = scorer()
    limits = {judge: {**known, "song": np.nan} for judge, known in one.thresholds.items()}
    own = replace(one, families=(*NAMES, "song"), thresholds=limits)
    rng = np.random.default_rng(0)
    plain, steered = measured(rng.random(6)), measured(rng.random(6), organ=0.4)
    found = ev.outcome(own, wider(plain), wider(steered), "song", "off")
    assert found["not_judged"] is True
    assert np.isnan(found["success"]["value"])
    assert not {"family_judge", "musicnn"} & set(found)
    before = ev.outcome(one, plain, steered, "guitar", "off")
    after = ev.outcome(own, wider(plain), wider(steered), "guitar", "off")
    assert after == before
    with pytest.raises(ValueError, match=r"know no 'kazoo'.*define it in params\.concepts"):
        own.column("kazoo")


@pytest.mark.parametrize(("concept", "auroc", "say"), [
    ("guitar", 0.68, []), ("guitar", 0.7, ["musicnn"]),
    ("song", 0.64, []), ("song", 0.65, ["musicnn"]),
])  # fmt: skip
def test_a_defined_concept_needs_less_of_a_judge_than_a_family(concept, auroc, say):
    own = scorer(heard={concept: auroc})
    limits = {judge: {**known, "song": 0.5} for judge, known in own.thresholds.items()}
    own = replace(own, families=(*NAMES, "song"), thresholds=limits)
    assert own.judges(measured([0.5]), concept, choosing=False) == say


def test_a_judge_that_does_not_detect_the_concept_has_no_say():
    plain, steered = measured([0.9, 0.9]), measured([0.1, 0.1])
    deaf = scorer(heard={"guitar": 0.69})
    found = ev.outcome(deaf, plain, steered, "guitar", "off")
    assert found["not_judged"] is True
    for key in ("success", "headline", "gain"):
        assert np.isnan([found[key][end] for end in ("value", "low", "high")]).all()
    assert found["success_choosing"]["value"] == 1.0
    assert scorer().judges(plain, "guitar", choosing=False) == ["musicnn"]
    assert scorer().judges(plain, "guitar", choosing=True) == ["family_judge"]
    assert scorer().judges(plain, "organ", choosing=False) == []


def test_on_is_the_other_way_round_and_silence_is_never_wanted():
    plain = measured([0.1, 0.9, 0.2, 0.2], organ=0.3)
    steered = measured([0.9, 0.9, np.nan, 0.2], organ=0.5)
    found = ev.outcome(scorer(), plain, steered, "guitar", "on")
    assert found["success"]["value"] == pytest.approx(2 / 4 - 1 / 4)
    assert found["silent"] == 0.25
    organ = ev.outcome(scorer(), plain, steered, "organ", "on")
    assert "musicnn" not in organ
    assert organ["success_choosing"]["value"] == 3 / 4
    assert organ["change"]["value"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="know no 'kazoo'"):
        ev.outcome(scorer(), plain, steered, "kazoo", "on")


def planted_set(shift: float, seed: int, n: int = 40) -> Measurement:
    """Pieces without guitar by both judges, whose embeddings lie `shift` from the plain ones."""
    rng = np.random.default_rng(seed)
    pieces = measured(np.full(n, 0.1), embeddings=shift + 0.7 * rng.standard_normal((n, 5)))
    pieces.probabilities["family_judge"][:, 1] = rng.random(n)
    pieces.probabilities["family_judge"][:, 2] = rng.random(n)
    return pieces


def test_damage_lowers_quality_and_leaks_lower_what_is_kept():
    plain = replace(planted_set(0.0, 0), probabilities=measured(np.full(40, 0.9)).probabilities)
    plain.probabilities["family_judge"][:, 1:] = np.random.default_rng(9).random((40, 2))
    again = replace(planted_set(0.0, 1), probabilities=dict(plain.probabilities))
    clean, damaged, leaky = planted_set(0.0, 2), planted_set(1.5, 3), planted_set(0.0, 4)
    leaky.probabilities["family_judge"][:, 1] += 2.0  # organ comes with every edit
    found = {name: ev.outcome(scorer(), plain, m, "guitar", "off", again)
             for name, m in (("clean", clean), ("damaged", damaged), ("leaky", leaky))}  # fmt: skip
    assert found["clean"]["distance"]["low"] < 0.02
    assert found["damaged"]["distance"]["low"] > 0.2
    assert found["clean"]["quality"]["value"] > 0.9 > found["damaged"]["quality"]["value"]
    assert found["leaky"]["kept"]["value"] < 0.6 < 0.8 < found["clean"]["kept"]["value"]
    assert found["clean"]["success"]["value"] == 1.0
    parts = [found["leaky"][key]["value"] for key in ("success", "kept", "quality")]
    assert found["leaky"]["headline"]["value"] == pytest.approx(3 / sum(1 / p for p in parts))
    assert found["leaky"]["headline"]["value"] < found["clean"]["headline"]["value"]
    assert ev.harmonic_mean(np.array([0.5, -0.2, np.nan]), np.ones(3))[:2].tolist() == [2 / 3, 0.0]


def test_a_method_against_itself_and_against_a_worse_one():
    plain = measured(np.full(20, 0.9))
    good, bad = measured(np.repeat([0.1, 0.9], [15, 5])), measured(np.repeat([0.1, 0.9], [5, 15]))
    same = ev.advantage(scorer(), plain, good, good, "guitar", "off")
    assert same == Estimate(0.0, 0.0, 0.0, 20, "share").as_dict()
    gap = ev.advantage(scorer(), plain, good, bad, "guitar", "off")
    assert gap["value"] == pytest.approx(0.5)
    assert 0.2 < gap["low"] < 0.5 < gap["high"]


def test_all_fulfilled_must_hold_at_once_by_one_judge_that_never_chose():
    plain, steered = measured([0.9, 0.9, 0.1, 0.9]), measured([0.1, 0.9, 0.1, 0.1])
    plain.probabilities["musicnn"][:, 2] = [0.1, 0.1, 0.1, 0.1]
    steered.probabilities["musicnn"][:, 2] = [0.9, 0.9, 0.9, 0.1]
    requests = (("guitar", "off"), ("drums", "on"))
    found = ev.all_fulfilled(scorer(), plain, steered, requests)
    assert found["all_wanted_plain"]["value"] == 0.0
    assert found["all_wanted"]["value"] == 0.5
    unheard = ev.all_fulfilled(scorer(), plain, steered, (("guitar", "off"), ("organ", "on")))
    assert np.isnan(unheard["all_wanted"]["value"])


def test_thresholds_lie_halfway_between_prompts_with_and_without():
    named, absent = measured([0.8, 0.6, np.nan]), measured([0.2, 0.3, 0.1])
    found = ev.fix_thresholds(NAMES, {"guitar": (named, absent), "organ": (named, absent)})
    assert found["family_judge"]["guitar"] == pytest.approx((0.7 + 0.2) / 2)
    assert np.isnan(found["musicnn"]["organ"])


def test_the_unit_of_gain_is_the_spread_over_music_with_and_without_the_concept():
    """Plain pieces without the concept sound alike: in their own spread any gain is huge."""
    named, absent = measured([0.9, 0.7]), measured([0.1, 0.1])
    scales = ev.fix_scales(NAMES, {"guitar": (named, absent)})
    assert scales["musicnn"]["guitar"] == pytest.approx(np.std([0.9, 0.7, 0.1, 0.1]))
    fixed = replace(scorer(), scales=scales)
    found = ev.gains(fixed, absent, measured([0.5, 0.1]), "guitar", "on")
    np.testing.assert_allclose(found, [0.4 / scales["musicnn"]["guitar"], 0.0])


# --- choice -----------------------------------------------------------------------------------


def trial(method, strength, change, cost, branch="both", direction="off", distance=0.01):
    return {"concept": "guitar", "direction": direction, "method": method, "strength": strength,
            "n_features": 4, "score": "share", "branch": branch, "loop": "open",
            "change": change, "ce_cost": cost, "distance": distance}  # fmt: skip


BUDGETS = SimpleNamespace(quality_budget=0.1, distance_budget=0.02)


def test_the_choice_moves_judges_most_within_the_budgets():
    table = pd.DataFrame(
        [
            trial("sae", 1.0, 0.1, 0.01), trial("sae", 2.0, 0.3, -0.09),
            trial("sae", 4.0, 0.9, 0.5), trial("sae", 8.0, 0.95, -0.5),
            trial("sae", 3.0, 0.8, 0.0, distance=0.021),
            trial("diff_means", 1.0, 0.9, 0.4), trial("diff_means", 2.0, 0.99, 0.6),
        ]
    )  # fmt: skip
    found = search.choose(table, BUDGETS)
    assert found["sae", ("guitar", "off")].strength == 2.0
    assert found["diff_means", ("guitar", "off")].strength == 1.0  # none is: the cheapest


def test_every_method_tries_as_many_settings():
    section = SimpleNamespace(**vars(SECTION))
    section.scores, section.branches = ("effect", "share"), ("conditional", "both")
    section.direction_strengths, section.strengths = (2.0, 0.125), (0.25, 0.5, 1.0)
    tried = {m: search.grid(section, m) for m in search.searched_methods(tuple(METHODS))}
    assert {m: len(set(own)) for m, own in tried.items()} == {
        "sae": 12, "diff_means": 12, "probe_direction": 12, "frozen_decoder": 12, "sae_words": 2,
        "diff_means_words": 2,
    }  # fmt: skip
    strengths = [s.strength for s in tried["diff_means"] if s.branch == "both"]
    assert (strengths[0], strengths[-1]) == (0.125, 2.0)
    ratios = np.array(strengths[1:]) / strengths[:-1]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)
    assert [s.strength for s in search.grid(SimpleNamespace(**{**vars(SECTION), "strengths": (1,)}),
                                            "diff_means")] == [1.0]  # fmt: skip


def test_an_edit_over_the_budget_is_said_to_be():
    table = pd.DataFrame([trial("sae", 1.0, 0.5, 0.01, distance=d) for d in (0.01, 0.03, np.nan)])
    assert (search.costs_in_budgets(table, BUDGETS) <= 1).tolist() == [True, False, False]
    table["ce_cost"] = np.nan  # unknown, unless there is none to keep
    assert not (search.costs_in_budgets(table, BUDGETS) <= 1).any()
    table["spectral_cost"] = 0.3
    assert (search.costs_in_budgets(table, BUDGETS) <= 1).tolist() == [True, False, False]


def test_one_branch_serves_all_requests_of_a_method():
    rows = [
        trial("sae", 1.0, 0.5, 0.0, "conditional"), trial("sae", 1.0, 0.4, 0.0, "both"),
        trial("sae", 1.0, 0.1, 0.0, "conditional", "on"), trial("sae", 2.0, 0.6, 0.0, "both", "on"),
    ]  # fmt: skip
    found = search.choose(pd.DataFrame(rows), BUDGETS)
    assert {s.branch for s in found.values()} == {"both"}
    assert found["sae", ("guitar", "on")].strength == 2.0


# --- a tiny model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def context(tiny_musicgen):
    return tiny_context(tiny_musicgen)


REQUEST = ("guitar", "on")  # to raise latents always does something, to ablate them may not
PROMPTS = Selection("test", 3, without=("guitar",))


def edited(strength: float, method: str = "sae", branch: str = "conditional") -> Condition:
    return Condition(PROMPTS, method, (REQUEST,), (Settings(strength, 2, branch=branch),))


def test_all_methods_share_prompts_and_noise(context):
    def batches(condition: Condition) -> list:
        return list(context.subject.batches(context.model.name, condition))

    def codes_of(condition: Condition) -> torch.Tensor:
        hooks = conditions.condition_hooks(context, condition)
        return context.subject.render(context.model, condition, hooks).codes

    plain = batches(Condition(PROMPTS))
    assert [len(texts) for texts, _ in plain] == [2, 1]
    assert batches(edited(2.0)) == plain
    words = batches(Condition(PROMPTS, "prompt_edit", (REQUEST,)))
    for method in ("sae_words", "diff_means_words"):
        assert batches(edited(2.0, method)) == words
    assert [seed for _, seed in words] == [seed for _, seed in plain]
    assert all(text.endswith(" with guitar") for texts, _ in words for text in texts)
    again = batches(Condition(PROMPTS, "reseed"))
    assert [texts for texts, _ in again] == [texts for texts, _ in plain]
    assert not {seed for _, seed in again} & {seed for _, seed in plain}
    codes = codes_of(Condition(PROMPTS))
    for strength, same in ((0.0, True), (4.0, False)):
        steered = codes_of(edited(strength))
        assert torch.equal(codes, steered) == same
    # The first piece of a longer set is the same piece.
    longer = codes_of(Condition(Selection("test", 4, without=("guitar",))))
    assert torch.equal(codes[:2], longer[:2])


@pytest.mark.parametrize("method", Prompts(0, 1, 1, 1, (), True, True).methods)
def test_methods_do_what_their_names_say(context, method):
    if method in ("plain", "reseed", "passthrough"):
        condition = Condition(PROMPTS, method)
    elif method == "prompt_edit":
        condition = Condition(PROMPTS, method, (REQUEST,))
    else:
        condition = edited(3.0, method)
    hooks = conditions.condition_hooks(context, condition)
    method = method.removesuffix("_words")
    if method in ("plain", "reseed", "prompt_edit"):
        assert not hooks
        return
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(4, 1, 48, generator=generator)
    added = hooks[LAYER](x, torch.tensor([1])) - x
    found = context.recipes["guitar"]
    if method == "passthrough":
        torch.testing.assert_close(added, context.sae.reconstruct(x) - x)
    elif method in ("diff_means", "probe_direction"):
        wanted = 3.0 * found.directions["difference" if method == "diff_means" else "probe"]
        torch.testing.assert_close(added, wanted.expand_as(x))
    else:
        ours = conditions.condition_hooks(context, edited(3.0))[LAYER](x, torch.tensor([1])) - x
        if method == "random_direction":
            torch.testing.assert_close(added.norm(dim=-1), ours.norm(dim=-1))
        for own, sae, recipe in (
            ("sae", context.sae, found), (FROZEN, context.frozen[0], context.frozen[1]["guitar"])
        ):  # fmt: skip
            rows = sae.W_dec[recipe.ranked("effect")[:2]]
            part = torch.linalg.lstsq(rows.T, added.flatten(0, 1).T)[0].T @ rows
            assert ((added.flatten(0, 1) - part).norm() < 1e-4) == (method == own)


def test_latents_of_the_frozen_decoder_are_searched_like_those_of_the_sae(context):
    assert FROZEN not in Prompts(0, 1, 1, 1, (), words=True).methods
    assert FROZEN not in Clips.methods
    assert search.grid(SECTION, FROZEN) == search.grid(SECTION, "sae")
    conditions_ = search.search_conditions(SECTION, context.subject, REQUEST, PROMPTS)
    assert len(conditions_[FROZEN]) == len(conditions_["sae"])
    with pytest.raises(ValueError, match="needs the frozen decoder"):
        conditions.condition_hooks(replace(context, frozen=None), edited(1.0, FROZEN))


def test_random_latents_stand_in_for_both_sides(context):
    found = replace(context.recipes["guitar"], both_sides="when_off")
    settings = Settings(1.0, 3)
    ours, theirs = (
        found.latents("off", settings),
        conditions.control_latents(found, "off", settings, 1),
    )
    assert [len(side) for side in theirs] == [3, 3]
    evident = {f for sign in (1, -1) for f in found.ranked("effect", sign)[:12]}
    assert not evident & {f for side in (*theirs,) for f in side}
    assert {f for side in ours for f in side} <= evident
    ops = [edit.op for edit in found.edits("off", settings, theirs)]
    assert ops == ["ablate", "clamp_min"]
    assert [len(side) for side in conditions.control_latents(found, "on", settings, 1)] == [3]
    free = (found.statistics["mean_with"] > 0).nonzero().flatten().tolist()
    pool = torch.zeros(len(found.statistics["mean_with"]), dtype=torch.bool)
    pool[free[::2]] = True
    few = replace(found, pool=pool, both_sides="never")
    drawn = conditions.control_latents(few, "on", settings, 1)[0]
    assert pool[list(drawn)].all()
    assert not set(drawn) & set(few.ranked("effect", every=True)[:12])


def test_steered_tokens_are_less_natural_to_the_plain_model(context):
    """The cross-entropy of the unsteered model rises after a senseless edit."""
    # Without guidance plain pieces follow the very probabilities that they are held to.
    subject, ce = replace(context.subject, guidance=1.0, batch=4), []
    for strength in (0.0, 3.0):
        condition = edited(strength, "diff_means", "both")
        condition = replace(condition, selection=replace(PROMPTS, n=8))
        hooks = conditions.condition_hooks(context, condition)
        rendering = subject.render(context.model, condition, hooks)
        ce.append(subject.costs(context.model, condition, rendering)["ce"])
        # As the model itself says, clip by clip.
        batch = context.model.with_captions(rendering.codes[2:3], [None])
        own = context.model.cross_entropy(batch).mean().item()
        assert ce[-1][2] == pytest.approx(own, abs=1e-5)
    assert np.isfinite(ce).all()
    assert (ce[1] - ce[0]).mean() > 0.1


def test_conditions_that_a_killed_run_finished_are_not_run_again(context, tmp_path):
    opened = []

    def open_context():
        opened.append(1)
        return context

    condition = Condition(PROMPTS, keep=1)
    first = conditions.run_condition(open_context, tmp_path, condition)
    again = conditions.run_condition(open_context, tmp_path, condition)
    assert len(opened) == 1
    np.testing.assert_array_equal(first.ce, again.ce)
    np.testing.assert_array_equal(first.audio, again.audio)
    assert first.audio.shape[0] == 1
    for judge, values in first.probabilities.items():
        np.testing.assert_array_equal(values, again.probabilities[judge])
    conditions.run_condition(
        open_context, tmp_path, Condition(Selection("test", 2, without=("guitar",)))
    )
    assert len(opened) == 2


def test_a_whole_run_writes_its_results_and_again_the_same(context, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    learnt = {c: (r, {"gate_auroc": 0.7, "probe_auroc": 0.8}) for c, r in context.recipes.items()}
    made = []
    for _ in range(2):
        result = search.run(SECTION, lambda: context, tmp_path / "scratch", 1, 5)
        outs = report.Outs("data/steering/tiny", "metrics/steer/tiny.json", "plots/steer/tiny")
        report.write(result, learnt, context, outs)
        names = [p for p in tmp_path.rglob("*") if p.is_file() and "scratch" not in p.parts]
        made.append({p.relative_to(tmp_path): p.read_bytes() for p in names})
    assert made[0] == made[1]
    names = {str(p) for p in made[0]}
    for suffix in (".csv", "-search.csv", "-crosstalk.csv", "-dose.csv"):
        assert f"plots/steer/tiny{suffix}" in names
    assert len(result.measured) <= len(list((tmp_path / "scratch").iterdir()))

    found = read_json("metrics/steer/tiny.json")
    methods = found["concepts"]["guitar"]["off"]["methods"]
    assert set(methods) == set(METHODS) - {"plain", "original"}
    ours, joint = methods["sae"], found["joint"]["guitar-off+organ-on"]["sae"]
    gap = found["concepts"]["guitar"]["off"]["sae_minus"]["diff_means"]
    for estimate in (ours["success"], ours["ce_cost"], joint["all_wanted"], gap):
        assert Estimate.read(estimate).n == 3
    assert set(joint["organ"]) == {"success", "change"}
    assert all(isinstance(value, float | None) for value in joint["organ"].values())
    tests = pd.read_csv("plots/steer/tiny.csv")
    assert not [column for column in tests if "_ci_" in column]
    row = tests[(tests["concept"] == "guitar") & (tests["direction"] == "off")]
    row = row[row["method"] == "sae"].iloc[0]
    shown = [row[column] for column in ("success", "success_low", "success_high", "ce_cost_low")]
    stored = [*(ours["success"][key] for key in ("value", "low", "high")), ours["ce_cost"]["low"]]
    np.testing.assert_allclose(shown, np.array(stored, float), rtol=1e-5)
    assert found["prompts"] == 3
    validation = found["concepts"]["guitar"]["on"]["chosen"]["sae"]["validation"]
    assert set(validation) == {"change", "success_choosing", "ce_cost", "distance"}
    talked = found["concepts"]["guitar"]["on"]
    assert talked["curves"]["sae"]["settings"] == talked["curves"]["diff_means"]["settings"] == 2
    assert set(talked["null"]) == {"sae", "random_feature", "random_direction"}
    assert isinstance(talked["chosen"]["sae"]["within_budget"], bool)
    assert set(found["noise"]["guitar"]["family_judge"]) == set(conditions.AGAIN)
    assert 0 <= found["grounding"]["guitar"]["auroc"]["value"] <= 1
    # The chosen settings are in the recipes, and among those of the grid.
    kept = load_recipe("data/steering/tiny", "guitar")
    assert kept.chosen["off"].strength in SECTION.strengths
    assert kept.grounding == pytest.approx(found["grounding"]["guitar"]["auroc"]["value"], rel=1e-5)
    # A cell of the table, from the verdicts of single pieces.
    verdicts = pd.read_parquet("data/steering/tiny/verdicts.parquet")
    for (concept, direction), cell in tests.groupby(["concept", "direction"]):
        own = verdicts[verdicts["edit"] == f"{concept} {direction}"]
        means = {}
        for judge in ("family_judge", "musicnn"):
            limit = found["thresholds"][judge][concept]
            heard = own[judge].astype(float)
            wanted = heard > limit if direction == "on" else heard <= limit
            by_method = {"heard": heard, "wanted": wanted}
            means[judge] = pd.DataFrame(by_method).groupby(own["method"], observed=True).mean()
        cell = cell.set_index("method")
        assert set(own["method"]) == set(cell.index) | {"plain"}
        chosen = means["family_judge"].loc[cell.index]
        again = means["family_judge"].loc["reseed", "wanted"]
        np.testing.assert_allclose(cell["success_choosing"], chosen["wanted"] - again, atol=1e-5)
        change = chosen["heard"] - means["family_judge"].loc["plain", "heard"]
        change *= 1 if direction == "on" else -1
        np.testing.assert_allclose(cell["change"], change, atol=1e-5)
        if concept == "guitar":  # the only one that the judge who never chose detects
            wanted = means["musicnn"]["wanted"]
            success = wanted[cell.index] - wanted["reseed"]
            np.testing.assert_allclose(cell["success"], success, atol=1e-5)
    table = pd.read_csv("plots/steer/tiny-search.csv")
    assert (table.groupby(["concept", "direction", "method"])["chosen"].sum() == 1).all()
    talk = pd.read_csv("plots/steer/tiny-crosstalk.csv", index_col=0)
    assert list(talk.columns) == list(FAMILIES)
    assert "guitar-off+organ-on: both" in talk.index
    index = read_json("data/steering/tiny/examples/index.json")
    assert len(index["examples"]) == 5
    for example in index["examples"]:
        for kind in ("plain", "steered"):
            assert (tmp_path / "data/steering/tiny/examples" / example[kind]).stat().st_size > 44
