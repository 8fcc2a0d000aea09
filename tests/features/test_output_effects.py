"""Output effects against true edits, and planted latents that fire without an effect."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from musicscope.dictionaries.core import TopKSAE
from musicscope.features import output_effects
from musicscope.models.interface import points_of
from musicscope.models.registry import load_model
from musicscope.steering import learning
from tests.conftest import CAPTIONS
from tests.steering.test_recipes import OPTIONS, best, read_planted

LAYER, WIDTH, LATENTS = "layers.1", 48, 40
SILENT = 2
"""Latent whose row is the constant vector, which every layer norm removes."""


@pytest.fixture(scope="module")
def model(tiny_musicgen):
    return load_model(tiny_musicgen)


@pytest.fixture(scope="module")
def batches(model):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, model.card, (6, model.num_codebooks, 12), generator=generator)
    captions = [[*CAPTIONS[:2], None], [None, *CAPTIONS[2:]]]
    return [model.with_captions(c, t) for c, t in zip(codes.split(3), captions, strict=True)]


def dictionary() -> TopKSAE:
    W = torch.randn(LATENTS, WIDTH, generator=torch.Generator().manual_seed(1))
    W[SILENT] = 1.0
    W = F.normalize(W, dim=1)
    return TopKSAE(W, torch.zeros(LATENTS), W, torch.zeros(WIDTH), k=4)


@pytest.mark.parametrize("layer", [LAYER, "layers.2.cross_attention"])
def test_first_order_equals_small_edits(model, batches, layer):
    slopes = output_effects.first_order(model, layer, batches, draws=400, seed=0)
    size = float(model.capture(batches[0], [LAYER])[LAYER].norm(dim=-1).mean())
    shifts = dictionary().W_dec * size * 0.02
    kl, confidence = output_effects.true_edits(model, layer, batches, shifts)
    rows = shifts.double()
    first = 0.5 * ((rows @ slopes.fisher) * rows).sum(1).numpy()
    others = np.arange(LATENTS) != SILENT
    assert np.allclose(first[others], kl[others], rtol=0.25)  # 2,400 draws: 3 % and the rounding
    assert np.median(np.abs(first[others] / kl[others] - 1)) < 0.08
    gained = (rows @ slopes.confidence).numpy()
    assert np.corrcoef(gained, confidence)[0, 1] > 0.99
    if layer == LAYER:  # what crosses into the stream is normalised as well
        assert kl[SILENT] < 1e-3 * kl[others].min()
        assert first[SILENT] < 1e-3 * first[others].min()


def test_pull_is_the_slope_of_the_likelihood(model, batches):
    found = output_effects.likelihood_gradients(model, LAYER, batches)
    direction = dictionary().W_dec[0].double() * 0.01
    rises = []
    for batch in batches:
        each = []
        for sign in (1, -1):
            logits = output_effects.shifted(model, LAYER, batch, sign * direction.float())
            picked = logits.double().log_softmax(-1).gather(-1, batch.codes[..., None])
            each.append(picked.mean((1, 2, 3)))
        rises.append((each[0] - each[1]) / 2)
    assert torch.allclose(found @ direction, torch.cat(rises).detach(), rtol=0.05, atol=1e-7)


def measured(model, batches, **changes):
    values = np.full(LATENTS, 0.5)
    values[7] = 0.0
    labels = {"guitar": np.array([1, 0, 1, 0, np.nan, np.nan]), "organ": np.zeros(6)}
    options = {"labels": labels, "draws": 60, "checked": 10, "seed": 0} | changes
    if "values" in options:
        values = options.pop("values")
    args = (model, LAYER, dictionary(), values, batches, batches)
    labels = options.pop("labels")
    return output_effects.measure(*args, labels, **options)


def test_table_has_every_latent_and_says_how_exact_it_is(model, batches):
    table, metrics = measured(model, batches)
    assert table["feature"].tolist() == list(range(LATENTS))
    assert metrics["method"] == "first order"
    assert metrics["kl_rank_correlation"] > 0.9
    assert (metrics["latents"], metrics["live"], metrics["checked"]) == (LATENTS, LATENTS - 1, 10)
    assert (table.loc[7, ["kl", "kl_per_unit", "confidence", "value"]] == 0).all()
    assert table["kl"].drop([7, SILENT]).min() > 100 * table.loc[SILENT, "kl"]
    assert np.allclose(table["kl_per_unit"] * table["value"], table["kl"])
    assert "toward_guitar" in table
    assert "toward_organ" not in table  # no clip has it
    pulls = output_effects.likelihood_gradients(model, LAYER, batches)
    difference = pulls[[0, 2]].mean(0) - pulls[[1, 3]].mean(0)  # of the others it is not known
    assert np.allclose(table["toward_guitar"], dictionary().W_dec.double() @ difference)
    again, _ = measured(model, batches)
    assert again.equals(table)


def test_where_first_order_disagrees_every_latent_is_edited(model, batches, monkeypatch):
    monkeypatch.setattr(output_effects, "AGREES", 1.1)
    table, metrics = measured(model, batches)
    assert metrics["method"] == "true edits"
    kl, confidence = output_effects.true_edits(model, LAYER, batches, 0.5 * dictionary().W_dec)
    kl[7] = confidence[7] = 0.0
    assert np.allclose(table["kl"], kl)
    assert np.allclose(table["confidence"], confidence)


def test_every_hook_point_can_be_measured(model, batches):
    for name in points_of(model):
        if name != f"layers.{model.num_layers - 1}":
            assert output_effects.first_order(model, name, batches, 2, 0).fisher.trace() > 0, name


def test_a_latent_that_fires_but_does_nothing_ranks_below_one_that_acts(model, batches):
    """Both fire for guitar; the more telling one writes what every layer norm removes."""
    rows, store, clips = read_planted()
    W = torch.zeros(clips.codes.n_latents, WIDTH)
    W[:, :] = torch.randn(W.shape, generator=torch.Generator().manual_seed(2))
    plain, _ = learning.learn_recipe(clips, "guitar", **OPTIONS)
    silent, acting = plain.ranked("share")[:2]
    W[silent] = 1.0
    W = F.normalize(W, dim=1)
    planted = TopKSAE(W, torch.zeros(len(W)), W, torch.zeros(WIDTH), k=2)
    values = output_effects.usual_values(clips.codes)
    table, _ = output_effects.measure(
        model, LAYER, planted, values, batches, batches, {}, draws=40, checked=8, seed=0
    )
    recipe, _ = learning.learn_recipe(clips, "guitar", **OPTIONS, effects=table)
    assert recipe.ranked("share")[0] == silent
    chosen = recipe.ranked("share+output")
    assert chosen.index(acting) < chosen.index(silent)
    assert chosen[-1] == silent
    assert recipe.ranked("output")[-1] == silent
    settings = dataclasses.replace(best(1), score="share+output")
    assert silent not in recipe.latents("on", settings)[0]
