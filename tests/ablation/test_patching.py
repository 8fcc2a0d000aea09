"""Patching on models of which one layer alone reads the caption."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from musicscope.ablation import patching
from musicscope.models.registry import load_model

SPEAKS = 2
"""Layer whose cross-attention is left on."""


@pytest.fixture
def model(tiny_musicgen):
    return load_model(tiny_musicgen)


def mute(model, *but: int) -> None:
    for i, layer in enumerate(model.decoder.layers):
        if i not in but:
            layer.encoder_attn.out_proj.weight.zero_()


def pair(model, clips: int = 3):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, model.card, (clips, 4, 10), generator=generator)
    both = model.with_captions(
        codes.repeat(2, 1, 1), ["fast strings"] * clips + ["fast strings with guitar"] * clips
    )
    halves = zip(both.codes.split(clips), both.text.split(clips), both.text_mask.split(clips),
                 strict=True)  # fmt: skip
    return [type(both)(*half, both.captions[:clips]) for half in halves]


def shares(patches: patching.Patches) -> np.ndarray:
    return 1 - patches.left.sum(0) / patches.whole.sum()


@torch.no_grad()
def test_the_one_layer_that_reads_the_caption_carries_everything(model):
    mute(model, SPEAKS)
    found = patching.patch(model, *pair(model))
    assert found.left.shape == (3, model.num_layers)
    assert (found.whole > 1e-8).all()
    assert np.allclose(np.delete(shares(found), SPEAKS), 0, atol=1e-9)
    assert shares(found)[SPEAKS] == pytest.approx(1, abs=1e-6)


@torch.no_grad()
def test_all_layers_together_bring_the_whole_change(model):
    mute(model, 0, SPEAKS, 3)
    every = [list(range(model.num_layers)), [0, SPEAKS, 3], [1], []]
    found = shares(patching.patch(model, *pair(model), layers=every))
    assert found == pytest.approx([1, 1, 0, 0], abs=1e-6)
    alone = shares(patching.patch(model, *pair(model)))
    assert alone[[0, SPEAKS, 3]].max() < 1


@torch.no_grad()
def test_specific_is_the_share_beyond_that_of_the_control(model):
    """The concept's layer and the control's layer differ; a third one carries half of each."""
    whole = np.array([2.0, 4.0, 2.0, 4.0])
    own = patching.Patches(whole, whole[:, None] * np.array([0.1, 1.0, 0.5]))
    control = patching.Patches(whole * 3, 3 * whole[:, None] * np.array([1.0, 0.2, 0.5]))
    found = patching.localisation(own, control, ["a", "a", "b", "b"], 50, 0)
    specific = [found["layers"][str(i)]["specific"]["value"] for i in range(3)]
    assert specific == pytest.approx([0.9, -0.8, 0.0])
    assert found["layers"]["0"]["share"]["value"] == pytest.approx(0.9)
    assert (found["best"], found["clips"], found["kl"], found["kl_control"]) == (0, 4, 3.0, 9.0)


def test_batches_of_other_codes_and_models_without_text_are_refused(model):
    without, with_ = pair(model)
    other = model.with_captions((with_.codes + 1) % model.card, with_.captions)
    with pytest.raises(ValueError, match="same codes"):
        patching.patch(model, without, other)
    model.cross_points = ()
    with pytest.raises(ValueError, match="no cross-attention"):
        patching.patch(model, without, with_)


def test_captions_differ_in_the_concept_alone():
    rows = pd.DataFrame({"caption": ["slow brass.", "a fast piece"]})
    bare, with_, control = patching.caption_pairs(rows, "electric_piano", "drums")
    assert bare == ["slow brass", "a fast piece"]
    assert with_ == ["slow brass with electric piano", "a fast piece with electric piano"]
    assert control == ["slow brass with drums", "a fast piece with drums"]
    assert patching.control_of("drums", ("bass", "drums")) == "bass"
    with pytest.raises(ValueError, match="needs two"):
        patching.control_of("drums", ("drums",))
