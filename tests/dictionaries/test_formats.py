"""SAEs in the files of SAELens and dictionary_learning, each read by the library itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musicscope.dictionaries.core import ModelWeights, TopKSAE, UniversalSAE
from musicscope.dictionaries.formats import (
    About,
    load_sae_folder,
    one_model,
    save_dictionary_learning,
    save_sae_lens,
)

F, D, K = 96, 12, 5
ABOUT = About("nano-small", "layers.3", 500, "embedded clips", {"lr": 1e-3, "seed": 0})
THRESHOLDS = torch.linspace(0.5, 4, F)
KINDS = [("topk", -1.0), ("batchtopk", 3.5), ("jumprelu", THRESHOLDS)]


def make(activation="topk", threshold=-1.0) -> TopKSAE:
    g = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    W_enc, b_enc = torch.randn(F, D, generator=g), 0.2 * torch.randn(F, generator=g)
    return TopKSAE(W_enc, b_enc, W_dec, 5 + torch.randn(D, generator=g), K, activation, threshold)


def frames(n=300) -> torch.Tensor:
    return 5 + torch.randn(n, D, generator=torch.Generator().manual_seed(1))


def dense(sae: TopKSAE, x: torch.Tensor) -> torch.Tensor:
    values, indices = sae.encode(x)
    return torch.zeros(len(x), sae.n_latents).scatter_add_(1, indices, values)


def assert_equal(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Equal within 1e-5, relative to the norm of each frame; both are sparse and not empty."""
    assert 0 < (ours > 0).float().mean() < 0.5
    error = (theirs - ours).norm(dim=1) / ours.norm(dim=1).clamp_min(1e-6)
    assert error.max() < 1e-5


def same(one: TopKSAE, other: TopKSAE, x: torch.Tensor) -> None:
    assert_equal(dense(other, x), dense(one, x))
    torch.testing.assert_close(other.reconstruct(x), one.reconstruct(x), rtol=1e-5, atol=1e-5)


# --- SAELens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "threshold"), KINDS)
def test_sae_lens_opens_what_is_written_and_encodes_the_same(tmp_path, activation, threshold):
    lens = pytest.importorskip("sae_lens", reason="needs SAELens: pip install -e '.[bench]'")
    sae, x = make(activation, threshold), frames()
    save_sae_lens(sae, tmp_path, ABOUT)
    theirs = lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.metadata.hook_name == "layers.3"
    with torch.no_grad():
        assert_equal(theirs.encode(x), dense(sae, x))
        torch.testing.assert_close(theirs(x), sae.reconstruct(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["topk", "topk rescaled", "standard", "jumprelu", "added"])
def test_saes_that_sae_lens_saved_load_here(tmp_path, kind):
    lens = pytest.importorskip("sae_lens", reason="needs SAELens: pip install -e '.[bench]'")
    name = kind.split()[0] if kind != "added" else "standard"
    extra = {"k": K, "rescale_acts_by_decoder_norm": "rescaled" in kind} if name == "topk" else {}
    cfg, cls = {
        "topk": (lens.TopKSAEConfig, lens.TopKSAE),
        "standard": (lens.StandardSAEConfig, lens.StandardSAE),
        "jumprelu": (lens.JumpReLUSAEConfig, lens.JumpReLUSAE),
    }[name]
    theirs = cls(cfg(d_in=D, d_sae=F, apply_b_dec_to_input=kind != "added", **extra))
    sae = make()
    with torch.no_grad():
        theirs.W_enc.copy_(sae.W_enc.T)
        theirs.W_dec.copy_(sae.W_dec * torch.linspace(0.5, 2, F)[:, None])
        theirs.b_dec.copy_(sae.b_dec)
        theirs.b_enc.copy_(sae.b_enc - 1 - (sae.W_enc @ sae.b_dec if kind == "added" else 0))
        if name == "jumprelu":
            theirs.threshold.copy_(THRESHOLDS)
        theirs.save_model(tmp_path)
        ours, _ = load_sae_folder(tmp_path, k=7)
        x = frames()
        assert_equal(dense(ours, x), theirs.encode(x))
        torch.testing.assert_close(ours.reconstruct(x), theirs(x), rtol=1e-5, atol=1e-4)
    assert ours.k == (K if name == "topk" else 7)


@pytest.mark.parametrize(("activation", "threshold"), KINDS)
def test_what_is_written_for_sae_lens_comes_back(tmp_path: Path, activation, threshold):
    sae = make(activation, threshold)
    save_sae_lens(sae, tmp_path, ABOUT)
    found, about = load_sae_folder(tmp_path)
    same(sae, found, frames())
    assert (found.k, about.model, about.layer, about.frames) == (K, "nano-small", "layers.3", 500)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["d_in"], config["d_sae"]) == (D, F)
    # The layout by hand: SAELens computes (x - b_dec) @ W_enc + b_enc.
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    z = (frames() - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    if activation == "topk":
        best = z.topk(config["k"]).indices
        expected = torch.zeros_like(z).scatter(1, best, z.gather(1, best).relu())
    else:
        expected = torch.where(z > tensors["threshold"], z, 0.0)
    assert_equal(expected, dense(sae, frames()))


def test_what_a_foreign_sae_has_and_this_package_lacks_is_refused(tmp_path: Path):
    save_sae_lens(make("batchtopk", 1.0), tmp_path, ABOUT)
    path = tmp_path / "cfg.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"architecture": "gated"}, "architecture 'gated' is not supported"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations = 'layer_norm'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations = 'hook_z'"),
        ({"metadata": {}}, "does not say k: give --k"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_sae_folder(tmp_path)
    path.write_text(json.dumps(config))
    weights = tmp_path / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "scaling_factor": torch.tensor([2.0])}, weights)
    with pytest.raises(ValueError, match="scaling_factor is not supported"):
        load_sae_folder(tmp_path)
    del tensors["b_dec"]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"sae_weights.safetensors has no tensor b_dec"):
        load_sae_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no SAE"):
        load_sae_folder(tmp_path / "none")


# --- dictionary_learning ----------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "threshold"), KINDS)
def test_dictionary_learning_opens_what_is_written(tmp_path: Path, activation, threshold):
    utils = pytest.importorskip("dictionary_learning.utils", reason="needs dictionary_learning")
    sae, x = make(activation, threshold), frames()
    save_dictionary_learning(sae, tmp_path, ABOUT)
    theirs, config = utils.load_dictionary(str(tmp_path), device="cpu")
    with torch.no_grad():
        assert_equal(theirs.encode(x), dense(sae, x))
    trainer = config["trainer"]
    assert (config["buffer"]["ctx_len"], trainer["layer"], trainer["lr"]) == (500, 3, 1e-3)
    found, about = load_sae_folder(tmp_path)
    same(sae, found, x)
    assert (about.layer, about.model, about.frames) == ("layers.3", "nano-small", 500)
    with pytest.raises(ValueError, match="'latent' has no number"):
        save_dictionary_learning(sae, tmp_path, About(layer="latent"))


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
def test_sae_lens_converts_the_dictionary_learning_export(tmp_path: Path, kind, monkeypatch):
    lens = pytest.importorskip("sae_lens", reason="needs SAELens: pip install -e '.[bench]'")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    sae, x = make(kind, dict(KINDS)[kind]), frames()
    save_dictionary_learning(sae, tmp_path, ABOUT)
    monkeypatch.setattr(
        loaders,
        "hf_hub_download",
        lambda repo_id, filename, **_: str(tmp_path / Path(filename).name),
    )

    def converter(path, device, cfg_overrides=None):
        found = loaders.dictionary_learning_sae_huggingface_loader_1(
            "any/name", "folder", device, cfg_overrides=cfg_overrides
        )
        return found[:2]

    theirs = lens.SAE.load_from_disk(tmp_path, converter=converter)
    with torch.no_grad():
        assert_equal(theirs.encode(x), dense(sae, x))


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderNew", "JumpRelu", "Matryoshka"])
def test_saes_that_dictionary_learning_saved_load_here(tmp_path: Path, kind):
    dl = pytest.importorskip("dictionary_learning.dictionary", reason="needs dictionary_learning")
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE

    sae, x = make(), frames()
    folded = sae.b_enc - 1 - sae.W_enc @ sae.b_dec
    if kind == "Matryoshka":
        theirs, name = MatryoshkaBatchTopKSAE(D, F, K, [32, 64]), "MatryoshkaBatchTopKSAE"
        state = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        state["threshold"] = torch.tensor(3.0)
    elif kind == "JumpRelu":
        theirs, name = dl.JumpReluAutoEncoder(D, F), "JumpReluAutoEncoder"
        state = {"W_enc": sae.W_enc.T, "b_enc": folded, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        state["threshold"] = THRESHOLDS
    else:
        theirs, name = getattr(dl, kind)(D, F), kind
        state = {"encoder.weight": sae.W_enc, "decoder.weight": 2 * sae.W_dec.T}
        new = {"encoder.bias": folded, "decoder.bias": sae.b_dec}
        state |= (
            new if kind == "AutoEncoderNew" else {"encoder.bias": sae.b_enc - 1, "bias": sae.b_dec}
        )
    theirs.load_state_dict({**theirs.state_dict(), **state})
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": name, "layer": 4, "lm_name": "m"}
    trainer |= {"k": K} if kind == "Matryoshka" else {}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    ours, about = load_sae_folder(tmp_path, k=7)
    with torch.no_grad():
        assert_equal(dense(ours, x), theirs.encode(x))
        torch.testing.assert_close(ours.reconstruct(x), theirs(x), rtol=1e-5, atol=1e-4)
    assert (about.layer, ours.k) == ("layers.4", K if kind == "Matryoshka" else 7)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "Gated"}}))
    with pytest.raises(ValueError, match="dict_class 'Gated'"):
        load_sae_folder(tmp_path)


def test_one_model_of_a_universal_sae_becomes_an_sae(tmp_path: Path):
    sae, x = make(), frames()
    mean, scale = torch.linspace(-1, 1, D), torch.tensor(2.5)
    side = ModelWeights(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, mean, scale)
    usae = UniversalSAE(("a", "b"), "top1", "usae", K, (side, side))
    found = one_model(usae, "b")
    values, indices = usae.encode(x, 1)
    shared = torch.zeros(len(x), F).scatter_add_(1, indices, values)
    assert_equal(dense(found, x), 2.5 * shared)
    torch.testing.assert_close(found.reconstruct(x), usae.reconstruct(x, 1), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="of a, b, not of c"):
        one_model(usae, "c")
    with pytest.raises(ValueError, match="crosscoder"):
        one_model(UniversalSAE(("a",), "top1", "crosscoder", K, (side,)), "a")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
FOREIGN = {
    "SAELens": (save_sae_lens, "sae_weights.safetensors", "cfg.json"),
    "dictionary_learning": (save_dictionary_learning, "ae.pt", "config.json"),
    "this package": (lambda sae, folder, about: sae.save(folder), "sae.safetensors", "config.json"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_a_file_that_cannot_be_read_is_named_with_the_remedy(tmp_path: Path, kind, activation):
    save, weights, settings = FOREIGN[kind]
    save(make(activation, THRESHOLDS if activation == "jumprelu" else -1.0), tmp_path, ABOUT)
    whole = (tmp_path / weights).read_bytes()
    for content, told in ((POINTER, "git-lfs pointer"), (whole[:300], "cut short or damaged")):
        (tmp_path / weights).write_bytes(content)
        with pytest.raises(ValueError, match=f"{weights} is .*{told}"):
            load_sae_folder(tmp_path)
    (tmp_path / weights).write_bytes(whole)
    (tmp_path / settings).write_text("[1]")
    with pytest.raises(ValueError, match=f"{settings} holds a list"):
        load_sae_folder(tmp_path)


def test_weights_that_are_nan_are_refused(tmp_path: Path):
    save_sae_lens(make(), tmp_path, ABOUT)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["b_enc"][3] = torch.nan
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="NaN or infinity in b_enc"):
        load_sae_folder(tmp_path)
