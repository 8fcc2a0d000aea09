"""RAVE: what is read and edited is what the export computes, clip by clip, noise and caches alike.

The export that the tests script and save has a twin, the eager module with the same weights: its
own forward hooks are the independent implementation.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from musicscope.ablation import audio as rave_ablation
from musicscope.ablation import scores as ablation
from musicscope.activations import extraction
from musicscope.activations.store import ActivationStore
from musicscope.core.audio import resample
from musicscope.core.seeding import seed_for
from musicscope.data.clips import ResampledClips
from musicscope.models.interface import AudioModel, LanguageModel, on_frames
from musicscope.models.rave.archive_check import check_archive
from musicscope.models.rave.model import RaveModel
from musicscope.models.registry import load_model
from musicscope.report import figures
from tests.support import rave_export as export

SECONDS = 0.5
SAMPLES = 689  # half a second; 10.8 frames of 64, so the last one is mostly padding
FRAMES = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports: a/one.ts as a folder of a model, streaming.ts, frozen.ts."""
    folder = tmp_path_factory.mktemp("rave")
    (folder / "a").mkdir()
    export.save(export.TinyRave(), folder / "a" / "one.ts")
    export.save(export.TinyRave(streaming=True), folder / "streaming.ts")
    export.save(export.TinyRave(), folder / "frozen.ts", freeze=True)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> RaveModel:
    return load_model(folder / "a" / "one.ts")


@pytest.fixture(scope="module")
def streaming(folder: Path) -> RaveModel:
    return load_model(folder / "streaming.ts")


@pytest.fixture(scope="module")
def twin() -> export.TinyRave:
    return export.TinyRave().eval().requires_grad_(False)


def clips(count: int = 3, samples: int = SAMPLES, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, samples, generator=generator) * 0.3


def padded(audio: torch.Tensor) -> torch.Tensor:
    return torch.cat([audio, torch.zeros(len(audio), FRAMES * export.RATIO - SAMPLES)], 1)[:, None]


def eager(twin: nn.Module, module: str, edit=None):
    """Forward hook on a module of the twin: records its output, and replaces it by `edit`."""
    seen = []

    def hook(_, __, output):
        seen.append(output)
        return output if edit is None else edit(output)

    return seen, twin.get_submodule(module).register_forward_hook(hook)


def same_noise(twin: nn.Module, audio: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    """Latents and audio of the twin, with the seeds that the model gives a clip."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "encode"))
        z = twin.encode(audio)
        torch.manual_seed(seed_for(seed, "decode"))
        return z, twin.decode(z)


def test_a_file_and_a_folder_load_and_tell_what_they_offer(folder, model):
    assert isinstance(model, AudioModel)
    assert not isinstance(model, LanguageModel)
    assert model.name == "one"
    assert load_model(folder / "a").name == "a"
    assert (model.sample_rate, model.ratio) == (1378, 64)
    assert model.frame_rate == 1378 / 64
    points = {point.name: point.width for point in model.hook_points}
    assert list(points) == [
        "encoder.encoder.net.0", "encoder.encoder.net.1.net.1", "encoder.encoder.net.3",
        "encoder.encoder.net.5", "encoder.encoder.net.7", "posterior_mean", "latent",
        "decoder.net.0", "decoder.net.2", "decoder.net.4", "decoder.net.5.net.1",
        "decoder.waveform", "decoder.noise.0", "decoder.dead",
    ]  # fmt: skip
    assert points["posterior_mean"] == export.FULL
    assert points["latent"] == export.KEPT
    assert points["encoder.encoder.net.7"] == 2 * export.FULL
    assert model.frame_rates["encoder.encoder.net.0"] == 1378 / 4
    assert model.frame_rates["decoder.net.2"] == 1378 / 16
    assert model.notes == ()


def test_two_exports_in_a_folder_are_ambiguous(folder, tmp_path):
    for name in ("x.ts", "y.ts"):
        (tmp_path / name).write_bytes((folder / "streaming.ts").read_bytes())
    with pytest.raises(ValueError, match=r"x\.ts.*y\.ts.*give one"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["encoder.encoder.net.3", "decoder.net.2", "decoder.noise.0"])
def test_captured_convolutions_are_those_of_the_eager_module(model, twin, name):
    audio = clips()
    batch = model.encode(audio)
    found = model.capture(batch, [name, "posterior_mean", "latent"])
    rate = model.frame_rates[name]
    for i in range(len(audio)):
        seen, handle = eager(twin, name)
        stats, other = eager(twin, "encoder.encoder")
        z, _ = same_noise(twin, padded(audio[i : i + 1]), batch.seeds[i])
        handle.remove(), other.remove()
        frames = int(np.ceil(SAMPLES * rate / 1378))
        torch.testing.assert_close(found[name][i], seen[0][0].T[:frames])
        torch.testing.assert_close(found["posterior_mean"][i], stats[0][0, : export.FULL].T)
        torch.testing.assert_close(found["latent"][i], z[0].T)
    assert found["latent"].shape == (3, FRAMES, export.KEPT)


def test_reconstruction_is_the_exports_own_with_padding_cut_off(model, twin):
    audio = clips(2)
    batch = model.encode(audio)
    expected = [
        same_noise(twin, padded(audio[i : i + 1]), batch.seeds[i])[1][:, 0, :SAMPLES]
        for i in range(2)
    ]
    torch.testing.assert_close(model.reconstruct(batch), torch.cat(expected))


def test_whole_frames_need_no_padding(model):
    batch = model.encode(clips(1, 2 * export.RATIO))
    assert model.latents(batch).shape == (1, 2, export.KEPT)
    assert model.reconstruct(batch).shape == (1, 2 * export.RATIO)


def test_noise_is_seeded_by_the_clip_and_the_global_state_is_left_alone(folder, model):
    audio = clips(1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = model.reconstruct(model.encode(audio))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert torch.equal(first, model.reconstruct(model.encode(audio)))
    other = RaveModel.load(folder / "a", seed=1)
    assert not torch.equal(first, other.reconstruct(other.encode(audio)))
    # Two clips never share their noise, or it would be a feature common to all clips.
    silence = model.encode(torch.stack([torch.zeros(SAMPLES), torch.full((SAMPLES,), 1e-6)]))
    one, two = model.latents(silence)
    assert (one - two).abs().mean() > 0.1


@pytest.mark.parametrize("which", ["model", "streaming"])
def test_neither_order_nor_company_of_clips_matters(which, request):
    model = request.getfixturevalue(which)
    audio = clips(3)
    together = model.reconstruct(model.encode(audio))
    backwards = model.reconstruct(model.encode(audio.flip(0))).flip(0)
    alone = torch.cat([model.reconstruct(model.encode(clip[None])) for clip in audio])
    assert torch.equal(together, backwards)
    assert torch.equal(together, alone)


def test_streaming_caches_are_what_would_have_leaked(streaming):
    assert "encoder.encoder.net.0.pad" in streaming.survey.caches
    audio = clips(2)
    batch = streaming.encode(audio)
    mean = streaming.capture(batch, ["posterior_mean"])["posterior_mean"]
    fresh = export.TinyRave(streaming=True).eval()

    def stats(clip):
        return fresh.encoder(fresh.pqmf(clip)).chunk(2, 1)[0][0].T

    with torch.no_grad():
        first, leaked = (stats(padded(clip[None])) for clip in audio)
    torch.testing.assert_close(mean[0], first)  # the clean state is that of the file
    assert (mean[1] - leaked).abs().max() > 1e-3  # what music after other music gives
    fresh = export.TinyRave(streaming=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(mean[1], stats(padded(audio[1:])))


def test_an_edit_of_strength_zero_changes_no_bit(model, streaming):
    for each in (model, streaming):
        batch = each.encode(clips(2))
        plain = each.reconstruct(batch)
        for point in each.hook_points:
            hooks = {point.name: lambda x, positions: x + 0.0 * torch.ones(x.shape[-1])}
            assert torch.equal(each.reconstruct(batch, hooks), plain), point.name
        assert torch.equal(each.decode(each.latents(batch), batch), plain)


@pytest.mark.parametrize("name", ["encoder.encoder.net.5", "decoder.net.0", "decoder.waveform"])
def test_an_edited_convolution_is_that_of_an_eager_hook(model, twin, name):
    audio = clips(1)
    batch = model.encode(audio)
    edit = lambda x: 0.5 * x + 0.1 * torch.arange(x.shape[-1])  # noqa: E731
    hooks = {name: lambda x, positions: edit(x.transpose(1, 2)).transpose(1, 2)}
    _, handle = eager(twin, name, edit)
    _, expected = same_noise(twin, padded(audio), batch.seeds[0])
    handle.remove()
    torch.testing.assert_close(model.reconstruct(batch, hooks), expected[:, 0, :SAMPLES])
    assert not torch.allclose(model.reconstruct(batch), expected[:, 0, :SAMPLES], atol=1e-3)


def test_steering_the_posterior_mean_moves_the_latents_by_its_pca(model, twin):
    batch = model.encode(clips(2))
    direction = torch.arange(export.FULL, dtype=torch.float32)
    hooks = {"posterior_mean": lambda x, positions: x + direction}
    moved = model.latents(batch, hooks) - model.latents(batch)
    expected = (twin.latent_pca @ direction)[: export.KEPT]
    torch.testing.assert_close(moved, expected.expand_as(moved), rtol=1e-4, atol=1e-4)


def test_steering_the_latents_is_decoding_edited_latents(model):
    batch = model.encode(clips(2))
    z = model.latents(batch)
    hooks = {"latent": lambda x, positions: x * 2 - 1}
    by_hook = model.reconstruct(batch, hooks)
    assert torch.equal(by_hook, model.decode(z * 2 - 1, batch))
    assert (by_hook - model.reconstruct(batch)).abs().mean() > 1e-3
    found = model.capture(batch, ["latent", "decoder.net.0"], hooks)
    assert torch.equal(found["latent"], z * 2 - 1)


def test_hooks_see_frames_from_position_one_as_in_every_model(model):
    batch = model.encode(clips(1))
    positions = []

    def hook(activations, at):
        positions.append(at.tolist())
        return torch.zeros_like(activations)

    plain = model.latents(batch)
    edited = model.latents(batch, {"latent": on_frames(hook, 2, 5)})
    assert positions == [[3, 4, 5]]
    assert torch.equal(edited[:, 2:5], torch.zeros(1, 3, export.KEPT))
    assert torch.equal(edited[:, :2], plain[:, :2])
    assert torch.equal(edited[:, 5:], plain[:, 5:])


def test_bad_hooks_and_names_say_what_is_wrong(model):
    batch = model.encode(clips(1))
    with pytest.raises(
        ValueError, match=r"decoder\.net\.0 must return activations \[1, 11, 16\].*\[1, 2\]"
    ):
        model.reconstruct(batch, {"decoder.net.0": lambda x, positions: x[0, 0, None, :2]})
    with pytest.raises(ZeroDivisionError):  # its own type, not the interpreter's RuntimeError
        model.reconstruct(batch, {"decoder.net.0": lambda x, positions: 1 / 0})
    with pytest.raises(ValueError, match=r"no \['layers.3'\].*posterior_mean"):
        model.capture(batch, ["layers.3"])
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        model.encode(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]))
    with pytest.raises(ValueError, match="float"):
        model.encode(torch.zeros(2, 3, dtype=torch.int16))
    with pytest.raises(ValueError, match="float32"):
        RaveModel.load("x.ts", dtype=torch.float16)


def test_what_makes_no_sense_for_an_autoencoder_is_not_there(model):
    for name, hint in (("generate", "reconstruct"), ("cross_entropy", "use loss")):
        assert not hasattr(model, name)
        with pytest.raises(AttributeError, match=f"RAVE has no '{name}'.*{hint}"):
            getattr(model, name)
    batch = model.encode(clips(1), ["a caption that nobody hears"])
    assert torch.equal(model.latents(batch), model.latents(model.encode(clips(1))))


def test_a_frozen_export_has_its_latents_only_and_says_so(folder, twin):
    frozen = load_model(folder / "frozen.ts")
    assert [point.name for point in frozen.hook_points] == ["latent"]
    assert any("frozen" in note for note in frozen.notes)
    with pytest.raises(ValueError, match=r"decoder\.net\.0.*frozen"):
        frozen.capture(frozen.encode(clips(1)), ["decoder.net.0"])
    batch = frozen.encode(clips(1))
    z, audio = same_noise(twin, padded(clips(1)), batch.seeds[0])
    torch.testing.assert_close(frozen.latents(batch), z.transpose(1, 2))
    torch.testing.assert_close(frozen.reconstruct(batch), audio[:, 0, :SAMPLES])


class Wasserstein(export.TinyRave):
    """No draw: the encoder's output is z, so there is no posterior mean."""

    @torch.jit.export
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.pqmf(x))[:, : self.latent_size]


class Counting(export.TinyRave):
    """State that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    @torch.jit.export
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.encoder(self.pqmf(x))[:, : self.latent_size] * self.calls


class Shortening(export.TinyRave):
    @torch.jit.export
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.pqmf(x))[:, : self.latent_size, 1:]


class NoDecoder(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_other_exports_are_told_apart_by_what_they_compute(tmp_path):
    found = load_model(export.save(Wasserstein(), tmp_path / "w.ts"))
    names = [point.name for point in found.hook_points]
    assert "posterior_mean" not in names
    assert "latent" in names
    assert any("posterior_mean" in note for note in found.notes)
    for module, problem in (
        (Counting(), "state that cannot be reset"),
        (Shortening(), "keep the length"),
        (NoDecoder(), "no method encode and no decode"),
    ):
        with pytest.raises(ValueError, match=problem):
            load_model(export.save(module, tmp_path / "bad.ts"))


# ---- files from strangers


def rewritten(source: Path, target: Path, changes: dict[str, bytes | None]) -> Path:
    """A copy of an archive with entries replaced, added, or (None) left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        top = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            if name.partition("/")[2] not in changes:
                new.writestr(name, old.read(name))
        for name, content in changes.items():
            if content is not None:
                new.writestr(f"{top}/{name}", content)
    return target


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("true",)


def test_files_that_are_no_torchscript_are_refused_by_name(tmp_path, folder):
    text = tmp_path / "page.ts"
    text.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"page\.ts is not a TorchScript archive \(no zip"):
        load_model(text)
    whole = (folder / "streaming.ts").read_bytes()
    (tmp_path / "cut.ts").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="broke off"):
        load_model(tmp_path / "cut.ts")
    disks = b"PK\x06\x07" + bytes(12) + (2).to_bytes(4, "little")  # zip64: two disks in all
    (tmp_path / "disks.ts").write_bytes(whole[:-22] + disks + whole[-22:])
    with pytest.raises(ValueError, match=r"disks\.ts is damaged \(zipfiles that span"):
        load_model(tmp_path / "disks.ts")
    torch.save({"a": torch.zeros(2)}, tmp_path / "checkpoint.ts")
    with pytest.raises(ValueError, match=r"checkpoint of torch\.save.*export"):
        load_model(tmp_path / "checkpoint.ts")
    with zipfile.ZipFile(tmp_path / "zip.ts", "w") as archive:
        archive.writestr("a.txt", "x")
    with pytest.raises(ValueError, match="another zip file"):
        load_model(tmp_path / "zip.ts")
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "absent.ts")


PROGRAM = b"class M(Module):\n  def forward(self: M, x: Tensor) -> Tensor:\n    %s\n    return x\n"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"extra.pkl": pickle.dumps(Evil(), 2)}, "'streaming/extra.pkl' does not belong"),
        ({"../outside.py": b""}, "does not belong"),
        ({"data.pkl": pickle.dumps(Evil(), 2)}, "pickle streaming/data.pkl names"),
        ({"constants.pkl": pickle.dumps(Evil(), 4)}, "constants.pkl names 'STACK_GLOBAL'"),
        ({"constants.pkl": None}, r"no \['constants.pkl'\]"),
        ({"data.pkl": b"\x80\x02oops"}, "is no pickle"),
        ({"code/x.py": PROGRAM % b'torch.save(x, "a")'}, r"code/x.py calls 'torch.save\('"),
        ({"code/x.py": PROGRAM % b"torch . \\\n from_file ('a')"}, r"calls 'torch.from_file\('"),
        ({"code/x.py": PROGRAM % b"y = ops.mylib.run(x)"}, "calls 'ops.mylib.run'"),
        ({"code/x.py": PROGRAM % b"y = ops.aten.save(x)"}, "calls 'ops.aten.save'"),
    ],
)  # fmt: skip
def test_archives_with_more_in_them_are_refused(tmp_path, folder, changes, problem):
    path = rewritten(folder / "streaming.ts", tmp_path / "x.ts", changes)
    with pytest.raises(ValueError, match=problem):
        check_archive(path)


def test_a_copy_that_changes_nothing_still_loads(tmp_path, folder):
    path = rewritten(folder / "a" / "one.ts", tmp_path / "copy.ts", {"extra/note": b"mine"})
    assert load_model(path).sample_rate == export.SR


# ---- ablation


def test_spectral_distance_orders_edits_as_it_should():
    rng = np.random.default_rng(0)
    clip = rng.standard_normal(4000).astype(np.float32) * 0.1
    own = rave_ablation.spectra(clip)
    distances = [
        rave_ablation.spectral_distance(own, rave_ablation.spectra(other.astype(np.float32)))
        for other in (clip, clip + 0.001 * rng.standard_normal(4000), clip * 0.5, clip * 0)
    ]
    assert distances[0] == 0
    assert distances == sorted(distances)
    # Half the level: convergence .5 and ln 2 at every scale.
    assert distances[2] == pytest.approx(0.5 + np.log(2), rel=1e-3)


def test_loss_is_the_distance_of_a_clip_to_its_reconstruction(model):
    batch = model.encode(clips(2))
    hooks = {"decoder.net.2": lambda x, positions: x * 0}
    for edit in ({}, hooks):
        pairs = zip(clips(2).numpy(), model.reconstruct(batch, edit).numpy(), strict=True)
        expected = [rave_ablation.spectral_distance(*map(rave_ablation.spectra, p)) for p in pairs]
        assert model.loss(batch, edit).tolist() == expected


def test_kept_latents_give_the_same_sound(model):
    batch = model.encode(clips(2))
    kept = model.latents(batch)
    for name in ("decoder.net.2", "latent", "posterior_mean"):
        hooks = {name: lambda x, positions: x * 0.5}
        whole = model.reconstruct(batch, hooks)
        assert torch.equal(model.reconstruct(batch, hooks, kept), whole)


def test_ablation_scores_are_distances_of_reconstructions(model):
    batch = model.encode(clips(2))
    sums = rave_ablation.sums(model, model.encode(clips(4, seed=9)))
    halves = [rave_ablation.sums(model, model.encode(clips(4, seed=9)[s]))
              for s in (slice(0, 1), slice(1, 4))]  # fmt: skip
    joined = (halves[0] + halves[1]).means
    for name, mean in sums.means.items():
        torch.testing.assert_close(mean, joined[name])
    train = model.capture(model.encode(clips(4, seed=9)), ["latent"])["latent"]
    torch.testing.assert_close(sums.means["latent"][0], train.mean((0, 1)))

    scores = rave_ablation.ablate(model, batch, ("zero", "mean"), sums.means)
    plain = model.reconstruct(batch).numpy()

    def distance(a, b):
        return rave_ablation.spectral_distance(rave_ablation.spectra(a), rave_ablation.spectra(b))

    for kind, value in (("zero", torch.zeros(16)), ("mean", sums.means["decoder.net.2"])):
        cut = {"decoder.net.2": lambda x, positions, v=value: v.expand_as(x)}
        ablated = model.reconstruct(batch, cut).numpy()
        j, i = scores.kinds.index(kind), scores.points.index("decoder.net.2")
        for c in range(2):
            assert scores["change"][j, i, c, 0] == pytest.approx(distance(plain[c], ablated[c]))
            rise = distance(clips(2)[c].numpy(), ablated[c]) - scores.loss[c, 0]
            assert scores["rise"][j, i, c, 0] == pytest.approx(rise)
    dead = scores.points.index("decoder.dead")
    assert not scores["change"][:, dead].any()
    assert not scores["rise"][:, dead].any()
    assert (scores["change"][:, scores.points.index("decoder.waveform")] > 0.1).all()

    one = [rave_ablation.ablate(model, model.encode(clips(2)[i : i + 1]), ("zero", "mean"),
                                sums.means) for i in range(2)]  # fmt: skip
    np.testing.assert_array_equal(ablation.join(one)["change"], scores["change"])
    table = ablation.ablation_table(scores, ["a", "b"], bootstrap=50, seed=0)
    metrics = ablation.ablation_metrics(scores, table, ["a", "b"]) | rave_ablation.summary(scores)
    chosen = ablation.select_layers(metrics, ["top1"], "mean", metrics["counterparts"]["kl"])
    best = scores["change"][1].mean((-2, -1))
    assert chosen["top1"] == 1 + int(np.argmax(best[1:-1]))
    assert metrics["hook_points"][str(chosen["top1"])] == scores.points[chosen["top1"]]
    change = metrics["layers"]["0"]["zero"]["change"]
    assert change["value"] == scores["change"][0, 0].mean()
    assert change["low"] <= change["value"] <= change["high"]
    assert (change["n"], change["unit"]) == (2, "spectral distance")
    assert len(figures.ablation(table, "tiny").axes) == 2


def test_ablations_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match=r"'skip'.*zero.*mean"):
        rave_ablation.replacing("skip")
    with pytest.raises(ValueError, match="audio.sums"):
        rave_ablation.replacing("mean")


# ---- extraction


class Clips:
    """A ClipStore at 1,000 Hz."""

    sample_rate = 1000

    def __init__(self) -> None:
        names = [f"c{i}" for i in range(5)]
        self.rows = pd.DataFrame(
            {"id": names, "split": ["train", "test", "train", "train", "test"], "font": "f",
             "kind": "clip", "group": names, "caption": "x"}
        )  # fmt: skip

    def audio(self, rows):
        return clips(5, 500, seed=3).numpy()[list(rows)]


def test_resampling_keeps_time_and_level():
    t = np.arange(8000) / 16000
    tone = np.sin(2 * np.pi * 440 * t)
    high = resample(tone, 16000, 44100)
    assert high.shape == (22050,)
    expected = np.sin(2 * np.pi * 440 * np.arange(22050) / 44100)
    np.testing.assert_allclose(high[2000:-2000], expected[2000:-2000], atol=2e-3)
    assert resample(tone, 16000, 16000).dtype == np.float32


def test_extraction_writes_stores_at_each_points_own_rate(model, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    view = ResampledClips(Clips(), model.sample_rate)
    layers = {"top1": "posterior_mean", "top2": "decoder.net.2", "top3": "latent"}
    plans = extraction.plan(
        model, view, layers, dtype="float16", shard_mb=0.001, batch_clips=2,
        model_sha256="m", clips_sha256="c",
    )  # fmt: skip
    assert [sorted(plan.layers) for plan in plans] == [["top1", "top3"], ["top2"]]
    folders = {slot: tmp_path / slot for slot in layers}
    stores = extraction.extract(plans, lambda: (model, view), folders)
    audio = resample(Clips().audio(range(5)), 1000, export.SR)
    assert audio.shape == (5, 689)
    found = model.capture(model.encode(audio), list(layers.values()))
    for slot, layer in layers.items():
        store = ActivationStore.open(folders[slot])
        assert store.config["frame_rate"] == model.frame_rates[layer]
        assert store.config["layer"] == layer
        assert store.ids == Clips().rows["id"].tolist()
        for i in range(5):
            expected = found[layer][i].numpy().astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(store.clip(i), expected)
    numbers = extraction.summary(plans, stores)
    assert numbers["slots"]["top2"]["frame_rate"] == model.frame_rates["decoder.net.2"]
    assert numbers["frames"] == 5 * (11 + 44)
    with pytest.raises(ValueError, match=r"no \['layers.1'\].*posterior_mean"):
        extraction.plan(
            model, view, {"top1": "layers.1"}, dtype="float16", shard_mb=1, batch_clips=2,
            model_sha256="m", clips_sha256="c",
        )  # fmt: skip


# ---- the real package, where somebody has installed it


def test_an_export_of_acids_rave_itself(tmp_path):
    rave = pytest.importorskip("rave", reason="acids-rave is not installed (optional)")
    pytest.importorskip("scripts.export", reason="acids-rave's scripts are hidden by others")
    import gin

    gin.parse_config_file(str(Path(rave.__file__).parent / "configs" / "v2.gin"))
    gin.parse_config(
        ["CAPACITY = 4", "LATENT_SIZE = 8", "RATIOS = [4, 4, 2, 2]", "SAMPLING_RATE = 44100"]
    )
    from scripts.export import VariationalScriptedRAVE

    original = rave.RAVE().eval()
    for module in original.modules():
        if hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)
    original.fidelity.copy_(torch.linspace(0.5, 1, len(original.fidelity)))
    scripted = VariationalScriptedRAVE(pretrained=original, fidelity=0.7)
    scripted.export_to_ts(str(tmp_path / "real.ts"))
    found = load_model(tmp_path / "real.ts")
    names = [point.name for point in found.hook_points]
    assert found.ratio == 16 * 64
    assert {"posterior_mean", "latent", "encoder.encoder.net.0"} <= set(names)
    batch = found.encode(clips(1, 5000))
    x = F.pad(clips(1, 5000), (0, -5000 % found.ratio))[:, None]
    with torch.no_grad():
        expected = original.encoder(original.pqmf(x)).chunk(2, 1)[0]
    mean = found.capture(batch, ["posterior_mean"])["posterior_mean"]
    torch.testing.assert_close(mean, expected.transpose(1, 2), rtol=1e-3, atol=1e-5)
    plain = found.reconstruct(batch)
    for name in names:
        assert torch.equal(found.reconstruct(batch, {name: lambda x, positions: x}), plain)
