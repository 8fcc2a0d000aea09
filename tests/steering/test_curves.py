"""Trade-off curves, dose response, draws, noise floor and grounding, on planted effects."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from musicscope.core.mmd import GaussianKernel
from musicscope.core.stats import Estimate
from musicscope.steering import conditions, curves
from musicscope.steering.conditions import DRAWS, Measurement
from musicscope.steering.evaluation import Scorer
from musicscope.steering.recipes import Settings

NAMES, N, ON = ("guitar", "organ"), 40, ("guitar", "on")
SCORER = Scorer(
    NAMES, {j: {"guitar": 0.5} for j in ("family_judge", "musicnn")},
    {"musicnn": {"guitar": 0.9}}, GaussianKernel(np.ones(3), 1.5), 200, 1,
)  # fmt: skip
ONE = np.ones((1, N))


def pieces(guitar: np.ndarray | float, shift: float = 0.0, seed: int = 0, again=None):
    """Pieces with this probability by the judge that never chooses; the other one is deaf."""
    rng = np.random.default_rng(seed)
    heard, deaf = np.full((N, 2), 0.1), np.full((N, 2), 0.3)
    heard[:, 0] = guitar
    sound = shift + 0.5 * rng.standard_normal((N, 3))
    judged = {"family_judge": deaf, "musicnn": heard}
    return Measurement(judged, sound, np.zeros(N), np.zeros((0, 1)), again=again)


BEFORE = np.random.default_rng(5).uniform(0.2, 0.4, N)
PLAIN = pieces(BEFORE)
UNIT = BEFORE.std()


def tried(gain_per_dose: float, shift_per_dose: float, doses=(1.0, 2.0, 4.0), seed: int = 1):
    return [
        (Settings(d, 0), pieces(BEFORE + gain_per_dose * d, shift_per_dose * d, seed + i))
        for i, d in enumerate(doses)
    ]


# --- gain against distance --------------------------------------------------------------------


def test_methods_on_one_curve_are_equal_whatever_their_strengths_are_called():
    """The same edits under other names and strengths, one of them far over the budget."""
    ours = tried(0.05, 0.2)
    theirs = [(Settings(100 * s.strength, 8, "share"), m) for s, m in reversed(ours)]
    found = [curves.envelope(SCORER, PLAIN, t, ON, 0.3) for t in (ours, theirs)]
    for one, other in zip(*found, strict=True):
        assert one(ONE) == pytest.approx(other(ONE))


def test_the_same_gain_at_more_damage_has_less_area():
    gentle, rough = (curves.envelope(SCORER, PLAIN, tried(0.05, by), ON, 0.3) for by in (0.1, 0.5))
    assert gentle[0](ONE)[0] > rough[0](ONE)[0] > 0
    assert gentle[1](ONE)[0] == pytest.approx(0.2 / UNIT)  # the strongest is within the distance
    assert rough[1](ONE)[0] < 0.2 / UNIT
    nothing = curves.envelope(SCORER, PLAIN, tried(0.05, 50.0), ON, 0.3)
    assert [part(ONE)[0] for part in nothing] == [0.0, 0.0]
    worse = curves.envelope(SCORER, PLAIN, tried(-0.05, 0.0), ON, 0.3)
    assert [part(ONE)[0] for part in worse] == [0.0, 0.0]


def test_the_area_is_that_of_the_steps():
    settings = tried(0.1, 0.0)
    far = [0.1, 0.2, 9.0]  # planted, in place of the distances of the embeddings

    def fixed(scorer, plain, steered):
        at = next(i for i, (_, m) in enumerate(settings) if m is steered)
        return lambda w: (np.full(len(w), far[at]), np.ones(len(w)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "distances", fixed)
        area, at_most = curves.envelope(SCORER, PLAIN, settings, ON, 0.4)
        assert area(ONE)[0] == pytest.approx((0.1 * 0.1 + 0.2 * 0.2) / 0.4 / UNIT)
        assert at_most(ONE)[0] == pytest.approx(0.2 / UNIT)


# --- dose -------------------------------------------------------------------------------------


def test_the_dose_slope_is_the_planted_one_and_noise_has_none():
    found = curves.curves(
        SCORER, PLAIN, {"sae": tried(0.05, 0.1), "diff_means": tried(0.0, 0.1)},
        {"sae": Settings(2.0, 0), "diff_means": Settings(1.0, 0)}, ON, 0.3,
    )  # fmt: skip
    ours, theirs = found["sae"], found["diff_means"]
    assert ours["slope"]["value"] == pytest.approx(0.05 / UNIT)
    assert (ours["doses"], ours["settings"], ours["monotone_share"]) == (3, 3, 1.0)
    assert ours["smoothness"] == pytest.approx(np.std([1, 1, 2]) * 0.05 / UNIT)
    assert theirs["slope"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert theirs["monotone_share"] == 0.0
    gap = found["area_minus"]["diff_means"]
    assert 0 < gap["low"] <= gap["value"]
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((4, N))
    slope = Estimate.read(SCORER.estimates(PLAIN)(curves.slope_of(np.arange(1.0, 5.0), noise), ""))
    assert slope.low < 0 < slope.high
    assert curves.monotone_share(np.arange(1.0, 5.0), noise) < 0.3


def test_only_settings_that_differ_in_strength_are_doses():
    other = [(Settings(s.strength, 9), m) for s, m in tried(-0.1, 0.0)]
    own = [*other, *tried(0.05, 0.0)]
    found = curves.curves(SCORER, PLAIN, {"sae": own}, {"sae": Settings(1.0, 0)}, ON, 0.3)["sae"]
    assert (found["doses"], found["settings"]) == (3, 6)
    assert found["slope"]["value"] == pytest.approx(0.05 / UNIT)


def test_latents_stand_against_the_spread_of_ten_draws():
    """A lucky draw moves the judge as latents do; the mean over draws does not."""
    draws = conditions.draw_of(np.arange(N), 32)
    assert set(draws) == set(range(DRAWS))
    assert draws[32] == 0  # batches start anew
    lucky = pieces(BEFORE + 0.2 * (draws == 3))
    measured = {"sae": pieces(BEFORE + 0.2), "random_feature": lucky, "random_direction": PLAIN}
    found = curves.null_slopes(SCORER, PLAIN, measured, 4.0, ON, 32)
    assert found["sae"]["slope"]["value"] == pytest.approx(0.05 / UNIT)
    null = found["random_feature"]
    assert null["draws"] == DRAWS
    assert null["highest"] == pytest.approx(0.05 / UNIT)
    assert null["slope"]["value"] < 0.3 * found["sae"]["slope"]["value"]
    assert null["spread"] > 0
    assert null["sae_minus"]["low"] > 0
    assert found["random_direction"]["spread"] == 0.0


def test_each_row_gets_its_own_draw_and_its_unconditional_half_the_same():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 2, 5, generator=generator)
    plain = lambda x, positions, conditional: x  # noqa: E731
    directions = torch.randn(DRAWS, 5, generator=generator)
    added = conditions.matched_change(plain, directions)(x, torch.arange(2), 12)
    torch.testing.assert_close(added.norm(dim=-1), x.norm(dim=-1))
    units = directions / directions.norm(dim=1, keepdim=True)
    for row in range(24):
        along = added[row] @ units[row % 12 % DRAWS]
        torch.testing.assert_close(along, x[row].norm(dim=-1))
    scaled = [lambda x, p, c, i=i: None if i == 4 else i * x for i in range(DRAWS)]
    dealt = conditions.dealt_change(scaled)(x, torch.arange(2), 12)
    for row in range(24):
        draw = row % 12 % DRAWS
        torch.testing.assert_close(dealt[row], (0 if draw == 4 else draw) * x[row])
    assert conditions.dealt_change(scaled)(x[:3], torch.arange(2), 3).shape == (3, 2, 5)


# --- judges on plain music --------------------------------------------------------------------


def test_the_noise_floor_is_what_a_judge_does_to_one_piece():
    again = np.full((2, 2, 4, 2), 0.3)  # crop, codec; family judge, musicnn
    again[0, 1, :, 0], again[1, 1, :, 0] = BEFORE[:4], BEFORE[:4] + 0.4
    found = curves.noise_floor(SCORER, [pieces(BEFORE, again=again)], "guitar")
    assert found["musicnn"]["crop"] == {"pieces": 4, "deviation": 0.0, "flipped": 0.0}
    assert found["musicnn"]["codec"]["deviation"] == pytest.approx(0.4)
    assert found["musicnn"]["codec"]["flipped"] == 1.0
    assert found["family_judge"]["codec"]["deviation"] == pytest.approx(0.0)
    assert curves.noise_floor(SCORER, [PLAIN], "guitar") == {}


def test_grounding_is_high_where_the_prompt_is_heeded():
    rng = np.random.default_rng(2)
    named, absent, other = (
        pieces(rng.uniform(*ends, N)) for ends in ((0.4, 0.9), (0.1, 0.5), (0.1, 0.5))
    )
    heeds = curves.grounding(SCORER, named, absent, "guitar")
    deaf = curves.grounding(SCORER, other, absent, "guitar")
    assert heeds["auroc"]["low"] > 0.8
    assert deaf["auroc"]["low"] < 0.5 < deaf["auroc"]["high"]
    assert heeds["judges"]["family_judge"] == 0.5  # it hears nothing, and has no say
