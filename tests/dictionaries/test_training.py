"""Training: finds planted features, resumes to the bit, revives the dead, refuses NaN."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from musicscope.activations.store import ActivationStore
from musicscope.config import ParamsError
from musicscope.dictionaries import data, evaluation
from musicscope.dictionaries import step as step_module
from musicscope.dictionaries.core import UniversalSAE
from musicscope.dictionaries.data import TEST, TRAIN, pair
from musicscope.dictionaries.evaluation import evaluate
from musicscope.dictionaries.step import initial_state, step
from musicscope.dictionaries.training import (
    count_latents,
    learning_rate,
    live_logger,
    normalisation,
    train,
)
from tests.support.dictionaries import OWN_FACTORS as OWN
from tests.support.dictionaries import PAIRED_WIDTHS as WIDTHS
from tests.support.dictionaries import SHARED_FACTORS as SHARED
from tests.support.dictionaries import (
    WIDTH,
    planted_frames,
    sae_section,
    sae_weights,
    usae_section,
    write_paired,
    write_planted,
)

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return write_planted(tmp_path_factory.mktemp("store"))


def held_out_clips(store: ActivationStore):
    return (x for (x,) in pair([store], TEST).clips())


def fit_sae(store: ActivationStore, seed: int = 0, **changes):
    return train(pair([store], TRAIN), sae_section(**changes), "sae", seed)


def test_recovers_a_planted_dictionary(store: ActivationStore):
    result = fit_sae(store, seed=3, samples=600 * 256, batch_size=256, learning_rate=1e-2)
    dictionary = planted_frames(1, 0)[1]
    best = (torch.from_numpy(dictionary).float() @ result.dictionary.W_dec.T).amax(1)
    assert (best > 0.97).float().mean() > 0.9
    test = evaluate(result.dictionary, held_out_clips(store))
    assert test.explained_variance > 0.9
    assert test.l0 == pytest.approx(3, abs=0.01)
    assert result.history[-1]["loss"] < 0.1 < result.history[0]["loss"]


def test_saved_decoder_has_unit_norm_and_bias_is_in_activation_units(store: ActivationStore):
    sae = fit_sae(store, samples=128, learning_rate=1e-6).dictionary
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(72))
    np.testing.assert_allclose(sae.b_dec.numpy(), store.mean, atol=1e-4)


def test_batchtopk_threshold_keeps_k_on_average(store: ActivationStore):
    sae = fit_sae(store, activation="batchtopk", samples=200 * 256, batch_size=256).dictionary
    clips = list(held_out_clips(store))
    found = evaluate(sae, clips)
    assert sae.threshold > 0
    assert found.l0 == pytest.approx(3, rel=0.05)
    counts = (sae.encode(torch.from_numpy(clips[0]))[0] > 0).sum(1)
    assert counts.unique().numel() > 1  # not k in every frame: the point of BatchTopK


def test_jumprelu_learns_thresholds_that_keep_about_k(store: ActivationStore):
    sae = fit_sae(
        store, activation="jumprelu", samples=600 * 256, batch_size=256, learning_rate=1e-2
    ).dictionary
    found = evaluate(sae, list(held_out_clips(store)))
    assert found.l0 == pytest.approx(3, rel=0.3)
    assert found.explained_variance > 0.85
    assert sae.threshold.unique().numel() > 1


def test_a_matryoshka_prefix_reconstructs_alone(store: ActivationStore):
    """Better than as many latents of a flat SAE, which are any of its latents."""
    shares = {}
    x = torch.from_numpy(np.concatenate(list(held_out_clips(store))))
    for prefixes in ((), (12, 36)):
        sae = fit_sae(
            store, matryoshka=prefixes, samples=400 * 256, batch_size=256, learning_rate=1e-2
        ).dictionary
        values, indices = sae.encode(x)
        error = x - sae.decode(values * (indices < 12), indices)
        shares[prefixes] = 1 - float(error.square().sum() / (x - x.mean(0)).square().sum())
    assert shares[12, 36] > shares[()] + 0.1


def test_prefixes_that_do_not_rise_or_are_no_part_are_refused(store):
    with pytest.raises(ParamsError, match=r"train_sae.matryoshka = \[36, 12\] must rise"):
        sae_section(matryoshka=(36, 12)).check("train_sae")
    with pytest.raises(ParamsError, match=r"matryoshka = \[12, 72\].*below 72"):
        fit_sae(store, matryoshka=(12, 72))


@pytest.mark.parametrize(
    ("changes", "dead_every"),
    [
        ({"activation": "topk"}, 1),
        ({"activation": "batchtopk"}, 1),
        ({"activation": "jumprelu"}, 1),
        ({"activation": "topk", "matryoshka": (12, 36), "resample_every": 30}, 1),
        ({"activation": "topk"}, 16),
    ],
    ids=["topk", "batchtopk", "jumprelu", "matryoshka and resampling", "dead listed seldom"],
)
def test_resumed_equals_unbroken_bit_for_bit(
    store, tmp_path: Path, changes, dead_every, monkeypatch
):
    """With dead latents listed in each step, and as on a GPU."""
    monkeypatch.setattr(step_module, "DEAD_EVERY", {"cpu": dead_every})
    dead_after = 1000 if dead_every == 1 else 128  # so that the list differs between steps
    settings = sae_section(samples=100 * 128, dead_after_samples=dead_after, **changes)
    fit = functools.partial(train, pair([store], TRAIN), settings, "sae", 5)
    whole = fit(on_log=live_logger(tmp_path / "whole"))

    class Killed(Exception):
        pass

    def kill_at_61(row):
        if row["step"] >= 61:
            raise Killed

    checkpoint = tmp_path / "c.pt"
    with pytest.raises(Killed):
        fit(checkpoint=checkpoint, checkpoint_every=25, on_log=kill_at_61)
    log = live_logger(tmp_path / "resumed")
    resumed = fit(checkpoint=checkpoint, checkpoint_every=25, on_log=log)
    finished = fit(checkpoint=checkpoint)  # nothing left to do
    for other in (resumed, finished):
        assert other.history == whole.history
        assert other.dead_fraction == whole.dead_fraction
        thresholds = [torch.as_tensor(t.dictionary.threshold) for t in (other, whole)]
        assert torch.equal(*thresholds)
        assert all(map(torch.equal, sae_weights(other.dictionary), sae_weights(whole.dictionary)))
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.*"))
    assert Path("plots/metrics/loss.tsv") in files
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "resumed" / name
        ).read_bytes()
    text = (tmp_path / "whole/plots/metrics/loss.tsv").read_text()
    assert text.splitlines()[0] == "step\tloss"


def test_seeds_differ(store: ActivationStore):
    first, second = (fit_sae(store, s, samples=256).dictionary for s in (0, 1))
    assert not torch.equal(first.W_dec, second.W_dec)


def test_checkpoint_of_another_sae_is_refused(store: ActivationStore, tmp_path: Path):
    chosen = pair([store], TRAIN)
    train(chosen, sae_section(samples=256), "sae", 0, checkpoint=tmp_path / "c.pt")
    other = sae_section(samples=256, expansion=4)
    with pytest.raises(ValueError, match=r"c\.pt is of another dictionary"):
        train(chosen, other, "sae", 0, checkpoint=tmp_path / "c.pt")


def test_learning_rate_warms_up_and_decays():
    c = sae_section(samples=100 * 128, learning_rate=1.0, warmup_fraction=0.1)
    rates = [learning_rate(c, i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == [1.0] * 72
    assert rates[99] == pytest.approx(0.05)
    assert sorted(rates[80:], reverse=True) == rates[80:]


def test_aux_revives_dead_latents():
    """Weak encoder rows are never among the k largest: only AuxK gives them a gradient.

    Half as many latents are left as there are features, so that the revived have work to do.
    """
    frames = planted_frames(128 * 50, seed=0)[0] - np.linspace(-20, 20, WIDTH)
    frames = torch.from_numpy(frames).float()
    left = {}
    for weight in (0.0, 1 / 32):
        state = initial_state(60, [WIDTH], seed=0, device="cpu")
        state.weights[0].W_enc[:40] *= 0.02
        for i in range(300):
            x = frames[128 * (i % 50) :][:128]
            step(state, [x], 3e-3, k=3, aux_k=12, aux_weight=weight, dead_after=128 * 20)
        left[weight] = (state.unfired[:40] >= 128 * 20).double().mean().item()
    assert left[0.0] > 0.9
    assert left[1 / 32] < 0.3


def test_dvclive_leaves_a_repository_without_commits_alone(tmp_path: Path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    row = {"samples": 1, "learning_rate": 0.1, "loss": 0.5, "aux_loss": 0.0, "dead_fraction": 0.0}
    log = live_logger("plots/live")
    log({"step": 0, **row})
    log({"step": 7, **row, "loss": 0.25})
    assert Path("plots/live/plots/metrics/loss.tsv").read_text() == "step\tloss\n0\t0.5\n7\t0.25\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".git", "plots"]
    assert not (tmp_path / ".git/index").exists()


# --- several models ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory):
    return write_paired(tmp_path_factory.mktemp("stores"))


def shared_section(**changes):
    settings = {"expansion": 2, "learning_rate": 1e-2, "decay_fraction": 0.4}
    return usae_section(**{**settings, "dead_after_samples": 10_000, **changes})


def fit(paired, method="paper", seed=0, **changes):
    names = [f"m{j}" for j in range(len(paired.stores))]
    return train(paired, shared_section(**changes), method, seed, names, "top1")


def test_normalised_models_have_the_same_mean_square(stores):
    paired = data.pair(stores, TRAIN)
    means, scales = normalisation(paired.stores)
    for j, (mean, scale) in enumerate(zip(means, scales, strict=True)):
        x = np.concatenate([clip[j] for clip in paired.clips()])
        assert np.square((x - mean) / scale).sum(1).mean() == pytest.approx(sum(WIDTHS) / 3, 1e-4)


@pytest.fixture(scope="module")
def trained(stores):
    """Two models, paired and mispaired, by the paper's rule, evaluated on paired test clips."""
    pairing, test = data.pair(stores[:2], TRAIN), data.pair(stores[:2], TEST)
    found = {}
    for name, paired in (("paired", pairing), ("mispaired", data.mispair(pairing, 1))):
        usae = fit(paired, samples=900 * 128).dictionary
        found[name] = usae, evaluation.evaluate_shared(usae, test.clips(), test.groups, tau=0.5)
    return found


def factor_latents(usae: UniversalSAE) -> np.ndarray:
    """[M, SHARED] the latent whose decoder row is nearest to each planted direction."""
    best = []
    for j in range(2):
        directions = np.random.default_rng([99, j]).standard_normal((SHARED + OWN, WIDTHS[j]))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        best.append((directions[:SHARED] @ usae.decoder(j).numpy().T).argmax(1))
    return np.array(best)


def test_paired_training_finds_the_shared_factors_and_mispaired_does_not(trained):
    same = {name: np.equal(*factor_latents(usae)).mean() for name, (usae, _) in trained.items()}
    assert same["paired"] > 0.8
    assert same["mispaired"] < 0.3
    numbers = {name: evaluation.numbers(found) for name, (_, found) in trained.items()}
    for i in (0, 1):
        assert numbers["paired"][f"r2_{i}_{i}"] > 0.7
        assert numbers["mispaired"][f"r2_{i}_{i}"] > 0.5
        assert numbers["paired"][f"cofire_proportion_{i}"] > 0.5
        assert numbers["mispaired"][f"cofire_proportion_{i}"] < 0.25
    for i, j in ((0, 1), (1, 0)):
        assert numbers["paired"][f"r2_{i}_{j}"] > 0.4
        assert numbers["mispaired"][f"r2_{i}_{j}"] < 0.05
    usae, found = trained["paired"]
    shared = factor_latents(usae)[0]
    fires, cofires = found.fires.sum(0), found.cofires.sum(0)
    assert np.median(evaluation.firing_entropy(fires)[shared]) > 0.9
    assert np.median(evaluation.cofire_proportion(cofires, fires)[:, shared]) > 0.6


def test_a_trained_dictionary_has_unit_rows_and_biases_near_the_mean(trained):
    usae, _ = trained["paired"]
    for j in range(2):
        torch.testing.assert_close(usae.decoder(j).norm(dim=1), torch.ones(48))


def test_crosscoder_tells_shared_from_own_factors(stores):
    paired = data.pair(stores[:2], TRAIN)
    usae = fit(paired, "crosscoder", samples=700 * 128, k=4).dictionary
    test = data.pair(stores[:2], TEST)
    found = evaluation.evaluate_shared(usae, test.clips(), test.groups, tau=0.1)
    numbers = evaluation.numbers(found)
    assert min(numbers["r2_0"], numbers["r2_1"]) > 0.8
    assert set(numbers) == {"r2_0", "r2_1", "l0", "dead_fraction"}
    shares = evaluation.relative_norms(found.norms)
    np.testing.assert_allclose(shares.sum(0), 1)
    assert np.square(found.norms).sum(0) == pytest.approx(np.ones(48), abs=1e-4)
    # Each planted direction's nearest latent: both models' for shared factors, one's for its own.
    for j in range(2):
        directions = np.random.default_rng([99, j]).standard_normal((SHARED + OWN, WIDTHS[j]))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        best = (directions @ usae.decoder(j).numpy().T).argmax(1)
        assert np.median(shares[j, best[:SHARED]]) < 0.75
        assert np.median(shares[j, best[SHARED:]]) > 0.85


@pytest.mark.parametrize("method", ["paper", "all_decoders", "crosscoder"])
def test_three_widths_train_and_resume_to_the_bit(stores, tmp_path: Path, method):
    paired = data.pair(stores, TRAIN)
    settings = shared_section(dead_after_samples=1000)
    names = ["a", "b", "c"]
    whole = train(paired, settings, method, 5, names, "top1")
    assert whole.dictionary.widths == WIDTHS

    def kill(row):
        if row["step"] >= 27:
            raise InterruptedError

    file = tmp_path / "c.pt"
    with pytest.raises(InterruptedError):
        train(paired, settings, method, 5, names, "top1", "cpu", file, 10, kill)
    resumed = train(paired, settings, method, 5, names, "top1", "cpu", file, 10)
    finished = train(paired, settings, method, 5, names, "top1", "cpu", file)
    for other in (resumed, finished):
        assert other.history == whole.history
        assert other.dead_fraction == whole.dead_fraction
        for a, b in zip(other.dictionary.weights, whole.dictionary.weights, strict=True):
            assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in vars(a))
    if method != "crosscoder":
        assert {row["drawn"] for row in whole.history} == {0, 1, 2}


@pytest.mark.parametrize("method", ["sae", "paper", "crosscoder"])
def test_nan_activations_stop_training(stores, monkeypatch, method):
    """A store refuses to hold NaN, so this takes a stand-in for one damaged on disk."""
    section = sae_section if method == "sae" else usae_section
    paired = data.pair(stores[:1] if method == "sae" else stores, TRAIN)

    def damaged(*_, **__):
        xs = [np.zeros((128, d), np.float32) for d in paired.widths]
        xs[-1][2, 3] = np.nan
        return iter([xs])

    monkeypatch.setattr(data.Paired, "batches", damaged)
    last = f"m{len(paired.stores) - 1}"
    with pytest.raises(FloatingPointError, match=rf"step 0 on .*{last}.*NaN"):
        train(paired, section(samples=128), method, 0, ["a", "b", "c"], "top1")


def test_a_constant_layer_and_an_unknown_method_are_errors(stores):
    paired = data.pair(stores, TRAIN)
    with pytest.raises(ValueError, match="'naive'"):
        fit(paired, "naive")
    flat = SimpleNamespace(width=4, std=np.zeros(4), mean=np.zeros(4), folder="data/flat")
    with pytest.raises(ValueError, match="data/flat: all train activations are equal"):
        normalisation((flat, stores[0]))


def test_more_active_latents_than_latents_is_refused():
    section = sae_section(k=65, expansion=4)
    assert count_latents(section, [17]) == 68
    with pytest.raises(ParamsError, match=r"k = 65 .* at most 64.*expansion = 4.*width 16"):
        count_latents(section, [16])
