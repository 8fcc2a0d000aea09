"""Layer ablation against naive full forwards, its cost, and the choice of layers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from musicscope.ablation import language
from musicscope.ablation import scores as ablation
from musicscope.ablation.run import spread_clips
from musicscope.models.musicgen.model import MusicgenModel
from musicscope.models.registry import load_model
from tests.conftest import CAPTIONS


@pytest.fixture(scope="module")
def model(tiny_musicgen) -> MusicgenModel:
    return load_model(tiny_musicgen)


@pytest.fixture(scope="module")
def batches(model):
    audio = torch.randn(5, 1600, generator=torch.Generator().manual_seed(2))
    captions = [*CAPTIONS, None]
    return [model.encode(audio[:3], captions[:3]), model.encode(audio[3:], captions[3:])]


def update_means(model, batches) -> dict[str, torch.Tensor]:
    first, second = (language.sums(model, batch) for batch in batches)
    return (first + second).means


def ablate(model, batches, **options) -> ablation.Scores:
    return ablation.join([language.ablate(model, batch, **options) for batch in batches])


@pytest.fixture(scope="module")
def means(model, batches):
    return update_means(model, batches)


@pytest.fixture(scope="module")
def scores(model, batches, means):
    return ablate(model, batches, means=means)


def naive(model, batch, layer: int, replace) -> torch.Tensor:
    """Logits of transformers' own forward with layer's output := replace(input, output)."""
    modules = model.hf.decoder.model.decoder.layers
    handle = modules[layer].register_forward_hook(
        lambda module, args, output: replace(args[0], output)
    )
    ids = model.sequence(batch)
    try:
        with torch.no_grad():
            logits = model.hf(
                encoder_outputs=(batch.text,),
                attention_mask=batch.text_mask,
                decoder_input_ids=ids.flatten(0, 1),
            ).logits.view(len(batch), 4, -1, 64)
    finally:
        handle.remove()
    return torch.stack([logits[:, k, k : k + batch.frames] for k in range(4)], 1)


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("kind", language.KINDS)
def test_scores_are_those_of_whole_forwards(model, batches, means, scores, kind, layer):
    def mean_update(x, y):
        start, rest = means[f"layers.{layer}"]
        return torch.cat([x[:, :1] + start, x[:, 1:] + rest], 1)

    replace = {
        "skip": lambda x, y: x,
        "zero": lambda x, y: y * 0,
        "mean": mean_update,
    }[kind]
    kl, rise = [], []
    for batch in batches:
        p = naive(model, batch, layer, lambda x, y: y).double().softmax(-1)
        q = naive(model, batch, layer, replace).double().softmax(-1)
        kl.append((p * (p / q).log()).sum(-1).mean(-1))
        gain = [
            (p[b, k, t, c] / q[b, k, t, c]).log()
            for (b, k, t), c in np.ndenumerate(batch.codes.numpy())
        ]
        rise.append(torch.stack(gain).view(batch.codes.shape).mean(-1))
    j = scores.kinds.index(kind)
    np.testing.assert_allclose(scores["kl"][j, layer], torch.cat(kl), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores["dce"][j, layer], torch.cat(rise), rtol=1e-4, atol=1e-6)


def test_scores_on_a_device_are_those_of_the_cpu(tiny_musicgen, batches, means, scores, device):
    model = load_model(tiny_musicgen, device)
    moved = [model.with_captions(b.codes, list(b.captions)) for b in batches]
    there = update_means(model, moved)
    for name, mean in means.items():
        torch.testing.assert_close(there[name].cpu(), mean, rtol=1e-3, atol=1e-5)
    found = ablate(model, moved, means=there)
    for score in ("kl", "dce"):
        np.testing.assert_allclose(found[score], scores[score], rtol=1e-2, atol=1e-4)


def test_mean_update_by_hand(model, batches, means):
    rest, start = [], []
    for batch in batches:
        stream = model.layer_inputs(batch)
        update = stream[3] - stream[2]
        start.append(update[:, 0])
        rest.append(update[:, 1 : batch.frames + 1].flatten(0, 1))
    torch.testing.assert_close(means["layers.2"][0], torch.cat(start).mean(0))
    torch.testing.assert_close(means["layers.2"][1], torch.cat(rest).mean(0))


def test_position_groups_are_start_frames_and_tail(model, batches):
    for batch in batches:
        groups, width = model.position_groups(batch), model.layer_inputs(batch)[0].shape[1]
        tail = [-1] * (width - 1 - batch.frames)
        assert groups.tolist() == [[0] + [1] * batch.frames + tail] * len(batch)
        assert len(tail) == 2
        assert language.sums(model, batch).counts["layers.1"].tolist() == [
            len(batch), len(batch) * batch.frames,
        ]  # fmt: skip


def test_cost_is_half_a_forward_a_layer(model, batches, means, scores):
    layers, clips = 4, 5
    a_kind = layers * (layers - 1) // 2
    assert scores.layer_forwards == clips * (layers + 3 * a_kind)
    assert language.summary(scores)["full_forward_equivalents"] == 1 + 3 * (layers - 1) / 2
    # The count is of calls that torch saw, not of calls that were planned.
    calls = []
    handles = [
        module.register_forward_hook(lambda m, i, o: calls.append(len(o)))
        for module in model.hf.decoder.model.decoder.layers
    ]
    try:
        again = ablate(model, batches, kinds=["skip"])
    finally:
        for handle in handles:
            handle.remove()
    assert sum(calls) == again.layer_forwards == clips * (layers + a_kind)


def test_skipping_a_layer_that_does_nothing_costs_nothing(tiny_musicgen, batches):
    model = load_model(tiny_musicgen)
    idle = model.hf.decoder.model.decoder.layers[1]
    for linear in (idle.self_attn.out_proj, idle.encoder_attn.out_proj, idle.fc2):
        linear.weight.zero_()
    means = update_means(model, batches)
    scores = ablate(model, batches, means=means)
    assert means["layers.1"].abs().max() == 0
    for kind, idle_is_free in (("skip", True), ("mean", True), ("zero", False)):
        j = scores.kinds.index(kind)
        assert (np.abs(scores["kl"][j, 1]).max() == 0) == idle_is_free
        assert (np.abs(scores["dce"][j, 1]).max() == 0) == idle_is_free
        assert scores["kl"][j, 2].min() > 1e-3


def test_kl_is_not_negative_and_layers_differ(scores):
    assert scores["kl"].shape == (3, 4, 5, 4)
    assert scores["kl"].min() > -1e-6
    assert scores["kl"].mean((2, 3)).std(1).min() > 1e-3


def test_table_and_metrics(scores):
    groups = ["a", "a", "b", "b", "c"]
    table = ablation.ablation_table(scores, groups, bootstrap=200, seed=1)
    assert len(table) == 12
    for name, values in (("kl", scores["kl"]), ("dce", scores["dce"])):
        row = table[(table["layer"] == 2) & (table["kind"] == "mean")].iloc[0]
        np.testing.assert_allclose(row[name], values[2, 2].mean())
        np.testing.assert_allclose(row[f"{name}_codebook_3"], values[2, 2, :, 3].mean())
        for column in (name, *(f"{name}_codebook_{k}" for k in range(4))):
            assert (table[f"{column}_low"] <= table[column]).all()
            assert (table[column] <= table[f"{column}_high"]).all()
            assert (table[f"{column}_low"] < table[f"{column}_high"]).any()
    metrics = ablation.ablation_metrics(scores, table, groups) | language.summary(scores)
    assert metrics["groups"] == 3
    row = table.iloc[7]
    assert metrics["layers"]["3"]["zero"]["kl"] == {
        "value": row["kl"], "low": row["kl_low"], "high": row["kl_high"], "n": 3,
        "unit": "nats per code",
    }  # fmt: skip
    assert metrics["full_forward_equivalents_per_kind"] == pytest.approx(1.5)
    assert not any(isinstance(value, list) for value in metrics.values())
    with pytest.raises(ValueError, match="2 groups for 5 clips"):
        ablation.ablation_table(scores, ["a", "b"], 10, 0)


def test_unknown_and_unready_kinds(model, batches):
    with pytest.raises(ValueError, match="swap"):
        ablate(model, batches, kinds=["swap"])
    with pytest.raises(ValueError, match="language.sums"):
        ablate(model, batches, kinds=["mean"])


def test_select_layers_ranks_inner_layers():
    kl = [9.0, 0.2, 0.7, 0.7, 0.4, 8.0]
    metrics = {
        "layers": {
            str(i): {"mean": {"kl": {"value": v}, "dce": {"value": -v}}} for i, v in enumerate(kl)
        }
    }
    slots = ["top1", "top2"]
    assert ablation.select_layers(metrics, slots, "mean", "kl") == {"top1": 2, "top2": 3}
    assert ablation.select_layers(metrics, slots, "mean", "dce") == {"top1": 1, "top2": 4}
    every = ablation.select_layers(metrics, slots, "mean", "kl", skip_first=False, skip_last=False)
    assert every == {"top1": 0, "top2": 5}
    # A rank is that of the name, whatever else is in the list and in which order.
    some = ["layer5", "top3", "cross2", "top1"]
    expected = {"layer5": 5, "top3": 4, "cross2": "layers.2.cross_attention", "top1": 2}
    assert ablation.select_layers(metrics, some, "mean", "kl") == expected
    with pytest.raises(ValueError, match=r"top5, but 4 of nano's 6 layers.*skip_last"):
        ablation.select_layers(metrics, ["top1", "top5"], "mean", "kl", name="nano")
    with pytest.raises(ValueError, match=r"layer6, cross7, but nano has.*layer5.*--models"):
        ablation.select_layers(metrics, ["layer6", "top1", "cross7"], "mean", "kl", name="nano")


def test_spread_clips_takes_compositions_in_turn():
    rows = pd.DataFrame({"group": list("aaaaaabbbcc"), "split": "train", "kind": "clip"})
    rows["font"] = "mixed"
    rows.loc[0, "kind"], rows.loc[6, "font"], rows.loc[9, "split"] = "pair", "fluidr3mono", "test"
    chosen = spread_clips(rows, "train", 5, seed=0)
    assert rows["group"].iloc[chosen].value_counts().to_dict() == {"a": 2, "b": 2, "c": 1}
    assert not {0, 6, 9} & set(chosen)
    assert list(chosen) == sorted(set(chosen))
    other = [tuple(spread_clips(rows, "train", 5, seed)) for seed in range(8)]
    assert tuple(chosen) == other[0]
    assert len(set(other)) > 1
    with pytest.raises(ValueError, match=r"ablate.clips.*recordings\.limits"):
        spread_clips(rows, "train", 9, seed=0)
    rows["font"] = "recording"
    assert len(spread_clips(rows, "train", 9, seed=0)) == 9
