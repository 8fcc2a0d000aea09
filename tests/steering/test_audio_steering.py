"""Steering of an audio model: clips for prompts, edits of latents with known effects, all outs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from musicscope.core.audio import spectra, spectral_distance
from musicscope.core.mmd import paired_mmd
from musicscope.core.stats import Estimate
from musicscope.data.clips import ClipStore, known_labels
from musicscope.data.taxonomy import FAMILIES
from musicscope.steering import evaluation as ev
from musicscope.steering import search
from musicscope.steering.conditions import (
    Context,
    Measurement,
    condition_hooks,
    measure,
    run_condition,
)
from musicscope.steering.methods import Condition, Selection
from musicscope.steering.recipes import Settings
from musicscope.steering.report import plan_metrics
from musicscope.steering.subjects import Clips
from tests.support import tone_rave as tone

COUNTS = {"train": 24, "validation": 16, "test": 16}
OFF, ON = ("guitar", "off"), ("guitar", "on")
WITH, WITHOUT = (Selection("test", 5, ("guitar",)), Selection("test", 5, (), ("guitar",)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tones")
    tone.write_world(root, tone.labelled_rows(COUNTS))
    return root


@pytest.fixture(scope="module")
def context(world) -> Context:
    return tone.open_tone_context(str(world))


def edited(request, strength: float, method: str = "sae", keep: int = 5, **more) -> Condition:
    clips = WITH if request[1] == "off" else WITHOUT
    settings = Settings(strength, 1, branch="both", **more)
    return Condition(clips, method, (request,), (settings,), keep)


def levels(found: Measurement) -> np.ndarray:
    return tone.level_of(found.audio, tone.SR)


# --- clips ------------------------------------------------------------------------------------


def test_clips_have_what_is_to_go_and_lack_what_is_to_come(world):
    clips = Clips(3, 0.4, 3, ClipStore.open(world / "data/clips"))
    rows = clips.rows
    both = clips.candidates(Selection("test", 1, ("guitar",), ("drums",)))
    assert len(both) == 4
    chosen = rows.iloc[both]
    assert set(chosen["split"]) == {"test"}
    assert chosen["has_guitar"].all()
    assert not chosen["has_drums"].any()
    # A label that is not known is neither.
    for side in (("piano",), ()), ((), ("piano",)):
        assert not len(clips.candidates(Selection("test", 1, *side)))
    # Every group comes before any comes twice; a smaller set begins a larger one.
    four, eight = (clips.chosen(replace(WITH, n=n)) for n in (4, 100))
    assert len(eight) == 8
    assert rows["group"].iloc[four].nunique() == 4
    assert eight[:4].tolist() == four.tolist()
    others = [replace(clips, seed=seed).chosen(WITH).tolist() for seed in range(4)]
    assert len({tuple(o) for o in others}) > 1


def test_the_plan_uses_what_there_is_and_counts_what_it_leaves_out(world):
    clips = Clips(3, 0.4, 3, ClipStore.open(world / "data/clips"))
    rows = clips.rows

    def plan_of(some: pd.DataFrame) -> search.Plan:
        store = SimpleNamespace(rows=some)
        return search.make_plan(replace(clips, store=store), section)

    section = SimpleNamespace(
        concepts=("guitar", "piano", "drums"), validation_prompts=4, n_prompts=500,
        pairs=("guitar-off+drums-on", "guitar-off+piano-on"),
    )  # fmt: skip
    plan = plan_of(rows)
    assert plan.concepts == ("guitar", "drums")
    assert plan.tests["guitar", "off"].n == 8  # all there are
    assert plan.validation["guitar", "off"].n == 4
    assert plan.joints["guitar-off+drums-on"].n == 4
    assert set(plan.skipped) == {"piano off", "piano on", "guitar-off+piano-on"}
    assert "0 of 0 train clips have piano" in plan.skipped["piano off"]
    assert "nothing is learnt for piano on" in plan.skipped["guitar-off+piano-on"]
    said = plan_metrics(plan)
    assert said["skipped"] == 3
    assert said["clips"]["guitar off"] == {"validation": 4, "test": 8}
    # Test clips that all have it: it can be switched off, not on.
    test = rows["split"] == "test"
    some = rows[~test | rows["has_guitar"]].reset_index(drop=True)
    plan = plan_of(some)
    assert ("guitar", "off") in plan.tests
    assert ("guitar", "on") not in plan.tests
    assert plan.skipped["guitar on"] == "0 test clips without guitar, of 0 groups"
    # One group is no sample.
    one = rows[~test | ~rows["has_guitar"] | (rows["group"] == "test-0")].reset_index(drop=True)
    assert "of 1 groups" in plan_of(one).skipped["guitar off"]


# --- cells ------------------------------------------------------------------------------------


def test_strength_0_gives_the_same_samples_bit_for_bit(context):
    plain = measure(context, Condition(WITH, keep=5))
    for method in ("sae", "diff_means"):
        found = measure(context, edited(OFF, 0.0, method))
        assert np.array_equal(found.audio, plain.audio)
        assert not found.spectral.any()
    assert not plain.spectral.any()
    # Other noise is other samples, the batches do not matter, and the clip is the clip.
    again = measure(context, Condition(WITH, "reseed", keep=5))
    assert not np.array_equal(again.audio, plain.audio)
    np.testing.assert_allclose(again.audio, plain.audio, atol=0.1)
    wide_batches = replace(context, subject=replace(context.subject, batch=50))
    wide = measure(wide_batches, Condition(WITH, keep=5))
    assert np.array_equal(wide.audio, plain.audio)
    original = measure(context, Condition(WITH, "original", keep=5))
    clips = context.subject
    np.testing.assert_array_equal(original.audio, clips.audio(clips.chosen(WITH), tone.SR))
    assert original.audio.shape == (5, round(0.4 * tone.SR))


def test_ablating_the_planted_latent_takes_its_tone_out_and_leaves_the_rest(context):
    plain = measure(context, Condition(WITH, keep=5))
    steered = measure(context, edited(OFF, 1.0))
    before, after = levels(plain), levels(steered)
    assert (before[:, 0] > 0.2).all()
    assert (after[:, 0] < 0.02).all()
    np.testing.assert_allclose(after[:, 1:], before[:, 1:], atol=2e-3)
    half = levels(measure(context, edited(OFF, 0.5)))
    np.testing.assert_allclose(half[:, 0], before[:, 0] / 2, rtol=0.05)
    for i in range(5):
        wanted = spectral_distance(spectra(plain.audio[i]), spectra(steered.audio[i]))
        assert steered.spectral[i] == pytest.approx(wanted)
    assert (steered.spectral > 0.05).all()
    # By the judges, too: nothing else changed.
    limits = {"family_judge": dict.fromkeys(FAMILIES, 0.5)}
    scorer = ev.Scorer(tuple(FAMILIES), limits, {}, None, 20, 1)
    plain, steered = (
        replace(m, probabilities={"family_judge": m.probabilities["family_judge"]})
        for m in (plain, steered)
    )
    found = ev.outcome(scorer, plain, steered, *OFF)
    assert found["success_choosing"]["value"] == 1.0
    assert found["others_change"] < 0.01
    assert np.isnan(found["ce_cost"]["value"])
    assert found["spectral_cost"]["value"] == pytest.approx(steered.spectral.mean())


def test_raising_the_planted_latent_puts_its_tone_in(context):
    before = levels(measure(context, Condition(WITHOUT, keep=5)))
    after = levels(measure(context, edited(ON, 1.0)))
    np.testing.assert_allclose(after[:, 0], (2 / tone.RATIO) ** 0.5, rtol=0.02)
    assert (before[:, 0] < 0.03).all()
    np.testing.assert_allclose(after[:, 1:], before[:, 1:], atol=2e-3)
    added = levels(measure(context, edited(ON, 1.5, "diff_means")))
    gap = (added - before)[:, 0]
    np.testing.assert_allclose(gap, 1.5 * (2 / tone.RATIO) ** 0.5, atol=0.03)


def test_a_random_latent_leaves_the_planted_tone(context):
    before = levels(measure(context, Condition(WITH, keep=5)))
    after = levels(measure(context, edited(OFF, 1.0, "random_feature")))
    np.testing.assert_allclose(after[:, 0], before[:, 0], atol=2e-3)
    assert np.abs(after - before).max() > 0.05
    # The SAE reconstructs all that is positive, so passing through it takes out noise alone.
    through = levels(measure(context, Condition(WITH, "passthrough", keep=5)))
    np.testing.assert_allclose(through, before, atol=0.01)


def test_a_gate_listens_at_the_hook_points_own_rate(context):
    """0.05 s are 5 frames of 100 Hz: where the tone stops, the gate closes soon after."""
    rates = {**context.model.frame_rates}
    assert rates["latent"] == tone.SR / tone.RATIO
    model = SimpleNamespace(frame_rate=1.0, frame_rates=rates, conditional_rows=slice(None),
                            device="cpu", reconstruct=None)  # fmt: skip
    hooks = condition_hooks(replace(context, model=model), edited(OFF, 1.0, loop="closed"))
    import torch

    x = torch.zeros(1, 60, len(tone.BINS))
    x[:, :20, 0] = 2.0
    x[:, 40:, 0] = 0.1
    after = hooks["latent"](x, torch.arange(1, 61))[0, :, 0]
    assert not after[:20].any()
    assert torch.equal(after[40:], x[0, 40:, 0])


def test_a_sound_that_is_not_finite_is_silent_and_no_success(context, monkeypatch):
    play = Clips.play

    def broken(self, model, method, batch, hooks):
        found = play(self, model, method, batch, hooks).clone()
        if hooks:
            found[0, 100] = float("inf")
        return found

    monkeypatch.setattr(Clips, "play", broken)
    found = measure(context, edited(OFF, 1.0))
    assert not found.audio[0].any()
    assert np.isnan(found.probabilities["family_judge"][0]).all()
    assert np.isfinite(found.probabilities["family_judge"][1]).all()
    assert np.isfinite(found.spectral).all()


def test_intervals_resample_groups_of_clips():
    """Two clips of a group rise and fall together, so their mean is as uncertain as one's."""
    values = np.repeat(np.arange(6.0), 2)
    pieces = {"probabilities": {}, "embeddings": np.zeros((12, 2)), "ce": np.zeros(12),
              "audio": np.zeros((0, 1))}  # fmt: skip
    scorer = ev.Scorer(("guitar",), {}, {}, None, 4000, 1)

    def estimate(groups) -> Estimate:
        of = scorer.estimates(Measurement(**pieces, groups=groups))
        return Estimate.read(of(ev.mean_of(values), "share"))

    alone, grouped = estimate(None), estimate(np.repeat(list("abcdef"), 2))
    assert (alone.n, grouped.n) == (12, 6)
    wider = (grouped.high - grouped.low) / (alone.high - alone.low)
    assert wider == pytest.approx(2**0.5, rel=0.1)


def test_kept_cells_are_what_was_measured(context, tmp_path):
    condition = edited(OFF, 1.0, keep=1)
    first = run_condition(lambda: context, tmp_path, condition)
    again = run_condition(lambda: pytest.fail("opened"), tmp_path, condition)
    for name in ("embeddings", "ce", "audio", "spectral", "groups"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    rows, at = context.subject.rows, context.subject.chosen(WITH)
    assert again.groups.tolist() == rows["group"].iloc[at].tolist()
    assert known_labels(rows, "guitar", at)[1].all()
    assert context.subject.titles(WITH) == [f"clip {name}" for name in rows["id"].iloc[at]]


# --- a run ------------------------------------------------------------------------------------

SECTION = SimpleNamespace(
    slot="top1", concepts=("guitar", "drums", "piano"), pairs=("guitar-off+drums-on",),
    scores=("effect",), target="active", both_sides=False, strengths=(0.25, 1.0), n_features=(1,),
    branches=("conditional", "guidance"), loops=("open",), direction_strengths=(0.25, 1.0),
    words=False, frozen_decoder=False, gate_features=2, gate_seconds=0.1, seconds=0.4,
    validation_prompts=4, n_prompts=100, batch=3, guidance=3.0, quality_budget=0.1,
    distance_budget=1e6, examples=1,
    bootstrap=20,
)  # fmt: skip


def result_of(world, scratch: Path, processes: int, **changes):
    scratch.mkdir(exist_ok=True)
    section = SimpleNamespace(**{**vars(SECTION), **changes})
    opening = partial(tone.open_tone_context, str(world))
    return search.run(section, opening, scratch, processes, 5)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Conditions that runs with other budgets or fewer concepts share."""
    return tmp_path_factory.mktemp("scratch")


def test_the_choice_and_the_test_of_a_run(world, scratch):
    found = result_of(world, scratch, 1)
    assert set(found.tests) == {(c, d) for c in ("guitar", "drums") for d in ("off", "on")}
    assert set(found.tests[OFF]) == set(Clips.methods)
    assert (found.search.groupby(["concept", "direction", "method"])["chosen"].sum() == 1).all()
    assert found.search["ce_cost"].isna().all()
    assert set(found.search["branch"]) == {"both"}
    assert found.choices["sae", OFF].strength == 1.0
    # With the smallest budget nothing is allowed, and the cheapest is taken.
    tight = result_of(world, scratch, 1, distance_budget=1e-9)
    assert tight.choices["sae", OFF].strength == 0.25
    plain, steered = (found.measured[found.tests[OFF][m]] for m in ("plain", "sae"))
    assert len(plain.ce) == 8
    assert ev.outcome(found.scorer, plain, steered, *OFF)["success"]["value"] == 1.0
    pair = found.joints["guitar-off+drums-on"]
    requests = (OFF, ("drums", "on"))
    both = ev.all_fulfilled(
        found.scorer, found.measured[pair["plain"]], found.measured[pair["sae"]], requests
    )
    assert both["all_wanted_plain"]["value"] == 0.0
    assert both["all_wanted"]["value"] == 1.0


def test_the_budget_is_the_distance_of_the_edited_pieces_from_the_plain_ones(world, scratch):
    found = result_of(world, scratch, 1, concepts=("guitar",), pairs=())
    table = found.search
    row = table[(table["direction"] == "off") & (table["method"] == "sae")].iloc[-1]
    context = tone.open_tone_context(str(world))
    clips, settings = Selection("validation", 4, ("guitar",)), search._settings(row)
    plain = measure(context, Condition(clips))
    steered = measure(context, Condition(clips, "sae", (OFF,), (settings,)))
    sets = (m.embeddings.astype(float) for m in (plain, steered))
    own = paired_mmd(found.scorer.kernel, *sets, plain.groups)(np.ones((1, 4)))[0][0]
    assert row["distance"] == pytest.approx(own)
    assert own > 0.01
    assert row["within_budget"]


@pytest.mark.slow
def test_numbers_do_not_depend_on_processes(world, tmp_path):
    one, two = (result_of(world, tmp_path / str(n), n) for n in (1, 2))
    pd.testing.assert_frame_equal(one.search, two.search)
    assert one.measured.keys() == two.measured.keys()
    for key, first in one.measured.items():
        for name in ("embeddings", "audio", "spectral"):
            np.testing.assert_array_equal(getattr(first, name), getattr(two.measured[key], name))
