"""Recipes on planted clips: they find the latents, hear the concept, and never read test clips."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from musicscope.core.io import folder_sha256
from musicscope.core.stats import auroc
from musicscope.dictionaries.core import TopKSAE
from musicscope.steering import learning, recipes, report

F, FRAMES, RATE = 12, 40, 50.0
FOR, AGAINST, RARE, DEAD = 3, 7, 5, 11
"""Latents that sound with guitar and without it; that says little; that never fires."""
OPTIONS = dict(
    model="m", slot="top1", layer="layers.1", sae="", target="active", both_sides="never",
    gate_features=2, gate_seconds=0.2, frame_rate=RATE,
)  # fmt: skip


@dataclass
class Store:
    data: np.ndarray
    folder: Path = Path("data/activations/planted")

    def __post_init__(self) -> None:
        self.frames = np.full(len(self.data), FRAMES)

    def clip(self, i: int) -> np.ndarray:
        return self.data[i]


def sae() -> TopKSAE:
    eye = torch.eye(F)
    return TopKSAE(eye, torch.zeros(F), eye, torch.zeros(F), k=F)


def plant(seed: int = 0) -> tuple[pd.DataFrame, Store]:
    """Clips whose latents (= dimensions) FOR and AGAINST sound in 80 % of the right clips' frames,
    at 4 and 2, and in 10 % of the others'; the rest are noise."""
    rng, rows, data = np.random.default_rng(seed), [], []
    for split, n in (("train", 60), ("validation", 40), ("test", 40)):
        for i in range(n):
            has = bool(rng.random() < 0.5)
            x = rng.uniform(0, 1, (FRAMES, F)) * (rng.random((FRAMES, F)) < 0.3)
            for latent, level, usual in ((FOR, 4.0, has), (AGAINST, 2.0, not has)):
                x[:, latent] = level * (rng.random(FRAMES) < (0.8 if usual else 0.1))
            x[:, RARE] = 0.3 * has * (rng.random(FRAMES) < 0.05)
            x[:, DEAD] = -1.0
            data.append(x.astype(np.float32))
            rows.append(
                {"id": f"{split}{i}", "group": f"{split}{i % 8}", "split": split, "kind": "clip",
                 "font": "mixed", "has_guitar": has, "has_drums": True}
            )  # fmt: skip
    return pd.DataFrame(rows), Store(np.stack(data))


def best(n: int) -> recipes.Settings:
    return recipes.Settings(1.0, n)


def read_planted() -> tuple[pd.DataFrame, Store, learning.Clips]:
    rows, store = plant()
    return rows, store, learning.read_clips(store, sae(), rows)


@pytest.fixture(scope="module")
def case():
    rows, store, clips = read_planted()
    return rows, store, clips, *learning.learn_recipe(clips, "guitar", **OPTIONS)


@pytest.mark.parametrize("score", recipes.SCORES)
def test_every_score_puts_the_planted_latents_first(case, score):
    recipe = case[3]
    assert recipe.ranked(score)[0] == FOR
    assert recipe.ranked(score, -1)[0] == AGAINST
    assert DEAD not in recipe.ranked(score) + recipe.ranked(score, -1)
    assert (recipe.statistics[score][recipe.ranked(score)] > 0).all()
    with pytest.raises(ValueError, match="known share, effect, partial, auroc"):
        recipe.ranked("luck")


def test_the_partial_score_is_the_t_of_a_regression_and_sees_through_company():
    rng = np.random.default_rng(0)
    guitar, drums = rng.random(200) < 0.5, rng.random(200) < 0.5
    drums |= guitar  # there is no guitar without drums
    means = rng.normal(size=(200, 3))
    means[:, 0] += 2 * drums
    means[:, 1] += 0.6 * guitar
    basis = np.column_stack([guitar, drums, np.ones(200)]).astype(float)
    wanted = []
    for column in means.T:
        beta = np.linalg.solve(basis.T @ basis, basis.T @ column)
        noise = ((column - basis @ beta) ** 2).sum() / (200 - 3)
        wanted.append(beta[0] / np.sqrt(noise * np.linalg.inv(basis.T @ basis)[0, 0]))
    found = learning.latent_scores(means, guitar, "partial", drums[:, None])
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    simple = learning.latent_scores(means, guitar, "effect", drums[:, None])
    assert simple[0] > simple[1]
    assert found[0] < 2 < found[1]


def test_only_latents_that_return_are_edited_unless_too_few_do(case, tmp_path):
    clips = case[2]
    returning = np.ones(F, bool)
    returning[FOR] = False
    stable, _ = learning.learn_recipe(clips, "guitar", **OPTIONS, returning=returning)
    assert stable.pool is not None
    assert FOR not in stable.ranked("auroc")
    assert stable.ranked("auroc", every=True)[0] == FOR
    assert FOR not in stable.latents("off", best(4))[0]
    recipes.save_recipe(stable, tmp_path)
    assert torch.equal(recipes.load_recipe(tmp_path, "guitar").pool, stable.pool)
    assert report.pool_of(stable) == {"of": "returning", "latents": F - 1}
    one = np.arange(F) == FOR
    few, _ = learning.learn_recipe(clips, "guitar", **OPTIONS, returning=one, n_features=2)
    assert few.pool is None
    assert report.pool_of(few) == {"of": "all", "latents": F}
    enough, _ = learning.learn_recipe(clips, "guitar", **OPTIONS, returning=one, n_features=1)
    assert enough.ranked("share") == [FOR]


def test_targets_are_the_means_of_train_clips(case):
    rows, store, _, recipe, _ = case
    train = (rows["split"] == "train").to_numpy()
    has = rows["has_guitar"].to_numpy()
    for side, mask in (("with", train & has), ("without", train & ~has)):
        codes = np.maximum(store.data[mask].reshape(-1, F), 0)
        found = recipe.statistics
        np.testing.assert_allclose(found[f"mean_{side}"], codes.mean(0), rtol=1e-5)
        active = codes.sum(0) / np.maximum((codes > 0).sum(0), 1)
        np.testing.assert_allclose(found[f"active_{side}"], active, rtol=1e-5)
    means = [store.data[m].mean((0, 1)) for m in (train & has, train & ~has)]
    difference = recipe.directions["difference"].numpy()
    np.testing.assert_allclose(difference, means[0] - means[1], atol=1e-5)
    probe = recipe.directions["probe"].numpy()
    assert np.linalg.norm(probe) == pytest.approx(np.linalg.norm(difference), rel=1e-5)
    assert probe[FOR] > 0 > probe[AGAINST]
    # The probe direction tells the classes apart on clips that it did not learn from.
    test = (rows["split"] == "test").to_numpy()
    assert auroc(store.data[test].mean(1) @ probe, has[test]) > 0.95


def test_edits_raise_to_the_target_and_ablate(case):
    recipe = case[3]
    (on,) = recipe.edits("on", best(1))
    assert (on.op, on.features) == ("clamp_min", (FOR,))
    assert on.values == (pytest.approx(4.0),)
    (off,) = recipe.edits("off", best(1))
    assert (off.op, off.features) == ("ablate", (FOR,))
    mean = replace(recipe, target="mean").edits("on", best(1))[0].values[0]
    assert mean == pytest.approx(3.2, abs=0.2)
    both = replace(recipe, both_sides="always")
    ops = {d: [(e.op, e.features) for e in both.edits(d, best(1))] for d in ("on", "off")}
    assert ops["on"] == [("clamp_min", (FOR,)), ("ablate", (AGAINST,))]
    assert ops["off"] == [("ablate", (FOR,)), ("clamp_min", (AGAINST,))]
    raised = both.edits("off", best(1))[1].values
    assert raised == (pytest.approx(2.0),)
    assert recipe.edits("off", best(9), ((0, 1),))[0].features == (0, 1)
    when_off = replace(recipe, both_sides="when_off")
    assert when_off.edits("off", best(1)) == both.edits("off", best(1))
    assert when_off.edits("on", best(1)) == recipe.edits("on", best(1))
    with pytest.raises(ValueError, match="known off, on"):
        recipe.edits("up", best(1))


def test_the_gate_hears_the_concept_on_test_clips(case):
    rows, store, _, recipe, quality = case
    assert {FOR, AGAINST} == set(recipe.gate.features)
    test = (rows["split"] == "test").to_numpy()
    x = np.maximum(store.data[test], 0)[..., list(recipe.gate.features)]
    late = x[:, FRAMES // 2 :].mean(1) @ np.array(recipe.gate.weights) + recipe.gate.bias
    assert ((late > 0) == rows["has_guitar"][test]).mean() > 0.95
    assert quality["gate_auroc"] > 0.95
    assert quality["probe_auroc"] > 0.95
    settings = recipes.Settings(1.0, 2, loop="closed")
    opens = [recipe.concept_edit(d, settings).gate.opens for d in ("off", "on")]
    assert opens == ["present", "absent"]
    assert recipe.concept_edit("off", replace(settings, loop="open")).gate is None


def test_test_clips_change_nothing_and_validation_clips_only_what_they_choose(case, tmp_path):
    rows, store, _, recipe, _ = case

    def saved(name: str, changed: pd.DataFrame, data: np.ndarray) -> bytes:
        clips = learning.read_clips(Store(data), sae(), changed)
        found, _ = learning.learn_recipe(clips, "guitar", **OPTIONS)
        recipes.save_recipe(found, tmp_path / name)
        return (tmp_path / name / "guitar.safetensors").read_bytes()

    as_is = saved("a", rows, store.data)
    test = (rows["split"] == "test").to_numpy()
    other, labels = store.data.copy(), rows.copy()
    other[test] = 9.0 - other[test]
    labels.loc[test, "has_guitar"] = ~rows["has_guitar"][test]
    assert saved("b", labels, other) == as_is
    validation = (rows["split"] == "validation").to_numpy()
    other = store.data.copy()
    other[validation] *= 0.5
    clips = learning.read_clips(Store(other), sae(), rows)
    found, _ = learning.learn_recipe(clips, "guitar", **OPTIONS)
    for name, values in recipe.statistics.items():
        assert torch.equal(found.statistics[name], values)
    assert found.gate.weights == recipe.gate.weights
    assert found.gate.bias != recipe.gate.bias


def test_held_out_font_and_pairs_are_left_out(case):
    rows, store, clips, _, _ = case
    odd = rows.copy()
    odd.loc[0, "font"], odd.loc[1, "kind"] = "fluidr3mono", "pair"
    assert len(learning.read_clips(store, sae(), odd).rows) == len(clips.rows) - 2


def test_a_recipe_comes_back_from_its_files_as_it_was(case, tmp_path):
    chosen = {
        "off": recipes.Settings(4.0, 2, "share", "both"),
        "on": recipes.Settings(0.5, 2, "effect", "both"),
        "off with words": recipes.Settings(1.0, 2, "share", "both"),
    }
    recipe = replace(case[3], chosen=chosen)
    recipes.save_recipe(recipe, tmp_path / "m")
    found = recipes.load_recipe(tmp_path / "m", "guitar")
    assert found.gate == recipe.gate
    assert found.chosen == chosen
    for part in ("statistics", "directions"):
        for name, values in getattr(recipe, part).items():
            assert torch.equal(getattr(found, part)[name], values)
    edit = recipes.concept_edit(found, "off", 0.5)
    assert (edit.strength, len(edit.edits[0].features)) == (2.0, 2)
    assert edit.edits[0].features[0] == FOR
    other = recipes.concept_edit(found, "on", n_features=1, loop="closed")
    assert (other.strength, other.edits[0].features) == (0.5, (FOR,))
    assert other.gate.opens == "absent"

    assert recipes.concept_edit(found, "off", words=True).strength == 1.0
    assert (
        recipes.concept_edit(found, "on", words=True).strength == 0.5
    )  # none for words: the usual


def in_use(recipe, root):
    """The recipe, with settings, in the folders of steer and steer_full; the SAE in data/sae."""
    dictionary = root / "data/sae/m/top1/seed-0"
    sae().save(dictionary)
    chosen = {"off": recipes.Settings(4.0, 2, "share", "both")}
    recipe = replace(recipe, sae=folder_sha256(dictionary), chosen=chosen)
    recipes.save_recipe(recipe, root / "data/steering/m")
    better = {"off": replace(chosen["off"], strength=3.0)}
    recipes.save_recipe(replace(recipe, chosen=better), root / "data/steering_full/m")
    return dictionary


def test_recipes_of_the_whole_evaluation_serve_while_the_sae_is_theirs(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dictionary = in_use(case[3], tmp_path)
    layer, steering = recipes.load_steering("m", {"guitar": "off"})
    assert (layer, steering.branch, steering.concepts[0].strength) == ("layers.1", "both", 3.0)
    _, steering = recipes.load_steering("m", {"guitar": "off"}, folder="data/steering/m")
    assert steering.concepts[0].strength == 4.0
    (dictionary / "more").write_text("another SAE")
    assert recipes.recipe_folder("m") == Path("data/steering/m")
    with pytest.raises(ValueError, match="recipes of another SAE"):
        recipes.load_steering("m", {"guitar": "off"})


def test_what_is_missing_is_named(case, tmp_path):
    clips, recipe = case[2], case[3]
    with pytest.raises(
        ValueError,
        match=r"drums: (\d+) of \1 labelled train clips have it.*params\.steer\.concepts",
    ):
        learning.learn_recipe(clips, "drums", **OPTIONS)
    recipes.save_recipe(recipe, tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=r"no recipe for 'organ' \(it has: guitar\)"):
        recipes.load_recipe(tmp_path / "m", "organ")
    with pytest.raises(ValueError, match="nothing is chosen for 'on'"):
        recipes.concept_edit(recipe, "on")
    with pytest.raises(ValueError, match="at least one concept"):
        recipes.load_steering("m", {}, folder=tmp_path)
    silent = replace(recipe, statistics={**recipe.statistics, "effect": torch.zeros(F)})
    with pytest.raises(ValueError, match="no latent has evidence for guitar"):
        silent.edits("on", best(4))


def test_the_best_threshold_is_that_of_an_exhaustive_search():
    rng = np.random.default_rng(0)
    labels = rng.random(40) < 0.3
    scores = rng.normal(size=40) + labels
    best = learning.best_threshold(scores, labels)

    def accuracy(cut: float) -> float:
        return (scores[labels] > cut).mean() + (scores[~labels] <= cut).mean()

    assert accuracy(best) == max(accuracy(c) for c in np.linspace(-4, 4, 4001))


def test_output_scores_rank_within_the_shortlist(case, monkeypatch):
    *_, clips, plain, _ = case
    kl = np.arange(F, dtype=float)
    table = pd.DataFrame({"feature": range(F), "kl": kl, "toward_guitar": 5.0 - kl})
    found, _ = learning.learn_recipe(clips, "guitar", **OPTIONS, effects=table)
    order = plain.ranked("share")
    assert found.ranked("share") == order  # the evidence itself is as before
    assert found.ranked("share+output") == sorted(order, reverse=True)
    assert found.ranked("output") == sorted(order, reverse=True)
    assert found.ranked("toward") == [0, 1, 2, 3, 4]
    assert found.ranked("toward", -1) == list(range(F - 1, 5, -1))
    assert found.ranked("share+toward") == sorted(order)
    against = plain.ranked("share", -1)
    assert found.ranked("share+toward", -1) == sorted(against, reverse=True)
    monkeypatch.setattr(recipes, "SHORTLIST", 2)
    assert found.ranked("share+output") == [*sorted(order[:2], reverse=True), *order[2:]]


def test_missing_output_scores_are_named(case):
    *_, clips, plain, _ = case
    with pytest.raises(ValueError, match="no output is measured.*dvc repro measure_effects"):
        plain.ranked("share+output")
    for score in ("output+share", "share+", "share+effect", "loudness"):
        with pytest.raises(ValueError, match="known share"):
            plain.ranked(score)
    with pytest.raises(ValueError, match="3 latents for a dictionary of 12"):
        learning.learn_recipe(
            clips, "guitar", **OPTIONS, effects=pd.DataFrame({"kl": [1.0, 2.0, 3.0]})
        )
    found, _ = learning.learn_recipe(clips, "guitar", **OPTIONS, effects=pd.DataFrame())
    assert set(found.statistics) == set(plain.statistics)  # an audio model


def test_without_logits_only_input_scores_are_searched():
    assert recipes.input_parts(("share", "share+toward", "partial+output")) == ("share", "partial")
    assert recipes.input_parts(("toward", "output")) == ("share",)
