"""MusicGen in audiocraft: against audiocraft's own forward and generate(), and against the same
weights in transformers. Needs audiocraft (requirements-nodeps.txt), like everything else here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from musicscope.activations.token_cache import codec_sha256
from musicscope.maximisation.moments import StudiedModel
from musicscope.maximisation.run import unsearchable
from musicscope.maximisation.search import Objective, Target, exact, gains, search
from musicscope.models.audiocraft import convert
from musicscope.models.audiocraft import loading as audiocraft_loading
from musicscope.models.audiocraft.loading import read_checkpoint
from musicscope.models.registry import load_model
from tests.conftest import CAPTIONS, ROOT

PROMPTS = [CAPTIONS[0], None, CAPTIONS[2]]  # of different lengths, so that one is padded
NAMES = [f"layers.{i}" for i in range(4)]


@pytest.fixture(scope="module")
def folder(tiny_musicgen: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("audiocraft") / "tiny"
    convert.to_audiocraft(tiny_musicgen, out)
    return out


@pytest.fixture(scope="module")
def hf(tiny_musicgen: Path):
    return load_model(tiny_musicgen)


@pytest.fixture(scope="module")
def model(folder: Path):
    return load_model(folder)


@pytest.fixture(scope="module")
def audio():
    return torch.randn(3, 3200, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def batch(model, audio):
    return model.encode(audio, PROMPTS)


def own_conditions(model, captions):
    """What audiocraft itself makes of captions."""
    from audiocraft.modules.conditioners import ConditioningAttributes

    return [ConditioningAttributes(text={"description": caption}) for caption in captions]


def own_pass(model, batch, row: int):
    """audiocraft's teacher forcing of one clip alone: logits, validity, outputs of all layers."""
    found = []
    handles = [
        layer.register_forward_hook(lambda module, inputs, output: found.append(output))
        for layer in model.lm.transformer.layers
    ]
    conditions = own_conditions(model, batch.captions[row : row + 1])
    try:
        with torch.no_grad():
            made = model.lm.compute_predictions(batch.codes[row : row + 1], conditions)
    finally:
        for handle in handles:
            handle.remove()
    return made.logits[0], made.mask[0], found


def rewritten(folder: Path, out: Path, change, file: str = "state_dict.bin") -> Path:
    """A copy of the checkpoint folder with `change(package)` applied to one file."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).symlink_to(path)
    package = torch.load(folder / file, weights_only=True)
    change(package)
    (out / file).unlink()
    torch.save(package, out / file)
    return out


def set_in_yaml(key: str, value):
    def change(package):
        config = OmegaConf.create(package["xp.cfg"])
        OmegaConf.update(config, key, value, force_add=True)
        package["xp.cfg"] = OmegaConf.to_yaml(config)

    return change


def test_forward_is_audiocrafts_own_clip_by_clip(model, batch):
    logits, found = model.forward(batch), model.capture(batch, NAMES)
    for row in range(3):
        own, valid, layers = own_pass(model, batch, row)
        assert valid.any(1).all()
        torch.testing.assert_close(logits[row][valid], own[valid], atol=1e-5, rtol=0)
        for name, output in zip(NAMES, layers, strict=True):
            steps = output[0, 1:]  # audiocraft stops where the first codebook ends
            assert len(steps) >= batch.frames - 1
            mine = found[name][row, : len(steps)]
            torch.testing.assert_close(mine, steps[: len(mine)], atol=1e-5, rtol=0)


def test_generate_gives_the_tokens_of_audiocraft(model):
    captions, frames = [CAPTIONS[0]], 20
    _, codes = model.generate(captions, seconds=0.4, seed=0, temperature=0.0)
    own = model.lm.generate(
        conditions=own_conditions(model, captions), max_gen_len=frames, use_sampling=False,
        cfg_coef=3.0,
    )  # fmt: skip
    assert torch.equal(codes, own)
    assert len(codes.unique()) > 3
    # And nothing of the run stays behind in audiocraft's modules.
    assert not model.lm.get_streaming_state()


def test_the_same_weights_compute_the_same_in_both_libraries(hf, model, batch, audio):
    theirs = hf.encode(audio, PROMPTS)
    assert torch.equal(batch.codes, theirs.codes)
    assert len(batch.codes.unique()) > 20
    assert torch.equal(batch.text_mask, theirs.text_mask)
    torch.testing.assert_close(batch.text, theirs.text)
    torch.testing.assert_close(model.forward(batch), hf.forward(theirs), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        model.cross_entropy(batch), hf.cross_entropy(theirs), atol=1e-5, rtol=0
    )
    mine, found = model.capture(batch, NAMES), hf.capture(theirs, NAMES)
    for name in NAMES:
        torch.testing.assert_close(mine[name], found[name], atol=1e-4, rtol=0)
    assert model.hook_points == hf.hook_points
    assert (model.sample_rate, model.frame_rate) == (hf.sample_rate, hf.frame_rate)
    codes = theirs.codes
    torch.testing.assert_close(model.decode(codes), hf.decode(codes), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.codec_latents(codes), hf.codec_latents(codes))
    edit = {"layers.1": lambda x, positions: x * 0.5}
    torch.testing.assert_close(
        model.forward(batch, edit), hf.forward(theirs, edit), atol=1e-4, rtol=0
    )
    _, one = model.generate(PROMPTS, 0.4, seed=5, hooks=edit)
    _, other = hf.generate(PROMPTS, 0.4, seed=5, hooks=edit)
    assert torch.equal(one, other)  # padded captions, guidance and hooks at once
    assert not torch.equal(one, model.generate(PROMPTS, 0.4, seed=5)[1])


def studied(name: str, model) -> StudiedModel:
    return StudiedModel(name, model, "layers.1", None, None, 0, torch.zeros(48), 0)


def test_tokens_are_searched_for_as_in_transformers(hf, model, batch):
    weight = torch.randn(48, generator=torch.Generator().manual_seed(2))
    one, other = (
        Objective((Target(m, "layers.1", weight, 0.1, scale=2.0),), window=4, naturalness=0.5)
        for m in (model, hf)
    )
    codes = batch.codes[:, :, :12]
    for mine, theirs in zip(exact(one, codes), exact(other, codes), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    mine, theirs = gains(one, codes[0]), gains(other, codes[0])
    assert mine.activation.abs().max() > 0.01
    torch.testing.assert_close(mine.activation, theirs.activation, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(mine.log_prob, theirs.log_prob, atol=1e-4, rtol=1e-3)
    found = [
        search(objective, codes[0], seed=3, steps=2, proposals=8, kept=4)
        for objective in (one, other)
    ]
    assert torch.equal(found[0].codes, found[1].codes)
    assert not torch.equal(found[0].codes, codes[0])


def test_one_codec_in_two_formats_is_one(hf, model, folder, tmp_path):
    pair = (studied("theirs", hf), studied("ours", model))
    assert codec_sha256(hf) != codec_sha256(model)  # names and settings are spelt differently
    assert unsearchable(pair) == ""
    assert unsearchable(pair[::-1]) == ""

    def retrained(package):  # one of many codewords tables is another
        name = "quantizer.vq.layers.3._codebook.embed"
        package["best_state"][name] = package["best_state"][name].flip(0).clone()

    other = rewritten(folder, tmp_path / "other", retrained, "compression_state_dict.bin")
    found = unsearchable((pair[0], studied("other", load_model(other))))
    assert found.startswith("theirs, other have different codecs")


def test_an_empty_caption_is_none_to_audiocraft(model, batch):
    empty = model.with_captions(batch.codes[1:2], [""])
    none = model.with_captions(batch.codes[1:2], [None])
    assert not empty.text_mask.any()
    assert torch.equal(model.forward(empty), model.forward(none))
    own, valid, _ = own_pass(model, empty, 0)
    torch.testing.assert_close(model.forward(empty)[0][valid], own[valid], atol=1e-5, rtol=0)


def test_generation_hooks_see_what_teacher_forcing_sees(model):
    seen, halves = [], []

    def hook(activations, positions):
        assert activations.shape == (4, 1, 48)
        halves.append(activations[model.conditional_rows])
        seen.extend(positions.tolist())
        return activations

    captions = list(CAPTIONS[:2])
    before = model.layer_calls
    _, codes = model.generate(captions, 0.4, 0, {"layers.2": hook})
    assert model.layer_calls - before == 4 * 23
    assert seen == list(range(20 + 3))
    assert model.conditional_rows == slice(None)
    forced = model.capture(model.with_captions(codes, captions), ["layers.2"])["layers.2"]
    torch.testing.assert_close(torch.cat(halves, 1)[:, 1:21], forced, atol=1e-5, rtol=0)


def test_forward_from_any_layer_is_forward(model, batch):
    expected = model.forward(batch)
    for layer, hidden in enumerate(model.layer_inputs(batch)):
        before = model.layer_calls
        assert torch.equal(model.forward_from(batch, layer, hidden), expected)
        assert model.layer_calls - before == 4 - layer


def test_there_and_back_is_the_same_model_bit_for_bit(hf, folder, tmp_path):
    convert.to_transformers(folder, tmp_path / "back")
    back = load_model(tmp_path / "back")
    expected, found = hf.hf.state_dict(), back.hf.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for part in ("decoder", "audio_encoder", "text_encoder"):
        one, other = getattr(hf.hf.config, part), getattr(back.hf.config, part)
        for key in ("hidden_size", "num_attention_heads", "ffn_dim", "d_ff", "pad_mode",
                    "use_conv_shortcut", "num_quantizers", "upsampling_ratios"):  # fmt: skip
            assert getattr(one, key, None) == getattr(other, key, None), (part, key)
    assert back.special == hf.special
    assert back.tokenizer(CAPTIONS[0])["input_ids"] == hf.tokenizer(CAPTIONS[0])["input_ids"]


def test_keys_without_a_counterpart_are_named(hf, folder):
    weights, _ = read_checkpoint(folder / "state_dict.bin")
    for name in ("transformer.layers.0.self_attn.in_proj_bias", "transformer.layers.1.norm3.weight",
                 "condition_provider.conditioners.self_wav.output_proj.weight"):  # fmt: skip
        with pytest.raises(KeyError, match=name.replace(".", r"\.")):
            convert.decoder_to_transformers({**weights, name: torch.zeros(3)})
    with pytest.raises(KeyError, match="audio_enc_to_dec_proj"):
        convert.decoder_to_audiocraft({"audio_enc_to_dec_proj.weight": torch.zeros(3)})


def test_checkpoints_as_training_writes_them(model, folder, batch, tmp_path):
    def as_trained(package):
        # One level deeper, the config as an OmegaConf object with interpolations, and the rest.
        package["best_state"] = {"model": package["best_state"]}
        package["xp.cfg"] = OmegaConf.create(package["xp.cfg"])
        package["xp.cfg"].nothing = None
        package.update({"history": [{"train": {"ce": 1.5}}], "fsdp_best_state": {}, "ema": None})

    trained = rewritten(folder, tmp_path / "trained", as_trained)
    weights, config = read_checkpoint(trained / "state_dict.bin")
    expected, exported = read_checkpoint(folder / "state_dict.bin")
    assert OmegaConf.to_container(config) == {**OmegaConf.to_container(exported), "nothing": None}
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert torch.equal(load_model(trained).forward(batch), model.forward(batch))

    codec = rewritten(folder, tmp_path / "codec", as_trained, "compression_state_dict.bin")
    _, config = read_checkpoint(codec / "compression_state_dict.bin")
    assert config.seanet.channels == 1  # "${channels}", resolved
    assert config.encodec.sample_rate == 3200


class Stranger:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["xp.cfg", "best_state", "history"])
def test_no_strangers_objects_are_unpickled(folder, tmp_path, where):
    mark = tmp_path / "ran"
    bad = rewritten(folder, tmp_path / "bad", lambda p: p.update({where: Stranger(mark)}))
    with pytest.raises(ValueError, match=r"state_dict\.bin is cut short or damaged.*export"):
        load_model(bad)
    assert not mark.exists()


def test_damaged_and_missing_files_are_named(folder, tmp_path):
    cut = rewritten(folder, tmp_path / "cut", lambda p: None)
    content = (cut / "state_dict.bin").read_bytes()
    (cut / "state_dict.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut/state_dict\.bin is cut short or damaged"):
        load_model(cut)
    (cut / "state_dict.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"state_dict\.bin is missing"):
        load_model(cut, system="audiocraft")
    few = rewritten(folder, tmp_path / "few", set_in_yaml("transformer_lm.num_layers", 3))
    with pytest.raises(ValueError, match=r"not those of its own config.*layers\.3"):
        load_model(few)
    no_text = rewritten(folder, tmp_path / "no_text", lambda p: None)
    (no_text / "text_encoder").unlink()
    with pytest.raises(FileNotFoundError, match=r"no text_encoder/.*t5-base.*text_revision"):
        load_model(no_text)
    moved = load_model(no_text, text_encoder=folder / "text_encoder")
    assert moved.encode_text(["flute"])[1].any()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("conditioners.self_wav", {"model": "chroma_stem"}, "melody.*not supported"),
        ("interleave_stereo_codebooks", {"use": True}, "stereo is not supported"),
        ("codebooks_pattern.delay.delays", [0, 0, 1, 1], "stereo models delay"),
        ("lm_model", "transformer_lm_magnet", "lm_model is 'transformer_lm_magnet'"),
        ("codebooks_pattern.modeling", "parallel", "codebooks_pattern.modeling is 'parallel'"),
        ("codebooks_pattern.delay.flatten_first", 2, "flatten_first is 2"),
        ("fuser.prepend", ["description"], r"fuser is \['prepend'\]"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(folder, tmp_path, key, value, message):
    other = rewritten(folder, tmp_path / "other", set_in_yaml(key, value))
    with pytest.raises(ValueError, match=f"other/state_dict.bin: .*{message}"):
        load_model(other)


def test_a_codec_by_name_or_of_another_model_is_refused(folder, tmp_path):
    named = rewritten(folder, tmp_path / "named", lambda p: p.update(pretrained="some/codec"),
                      "compression_state_dict.bin")  # fmt: skip
    with pytest.raises(ValueError, match="only names the codec 'some/codec'"):
        load_model(named)
    card = rewritten(folder, tmp_path / "card", lambda p: (
        set_in_yaml("transformer_lm.card", 63)(p),
        p["best_state"].update(
            {n: v[:-1] for n, v in p["best_state"].items() if n.startswith(("emb.", "linears."))}
        ),
    ))  # fmt: skip
    with pytest.raises(ValueError, match="do not belong together"):
        load_model(card)


def test_attention_without_the_fused_kernel_is_the_same(model, folder, batch, tmp_path):
    # audiocraft then uses torch's MultiheadAttention, with its weights one module deeper.
    plain = rewritten(folder, tmp_path / "plain", set_in_yaml("transformer_lm.memory_efficient",
                                                              False))  # fmt: skip
    other = load_model(plain)
    assert hasattr(other.lm.transformer.layers[0].self_attn, "mha")
    torch.testing.assert_close(other.forward(batch), model.forward(batch), atol=1e-5, rtol=0)
    _, one = other.generate(PROMPTS, 0.2, seed=1, temperature=0.0)
    assert torch.equal(one, model.generate(PROMPTS, 0.2, seed=1, temperature=0.0)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_decoders_alone(model, folder, audio, batch, dtype):
    half = load_model(folder, dtype=dtype)
    seen = half.encode(audio, PROMPTS)
    assert torch.equal(seen.codes, batch.codes)
    assert next(half.conditioner.t5.parameters()).dtype == torch.float32
    logits = half.forward(seen)
    assert logits.dtype == dtype
    error = (logits.float() - model.forward(batch)).abs().max()
    assert 1e-5 < error < 0.2
    assert half.weight_bytes < model.weight_bytes


def test_stand_ins_leave_no_trace_for_other_libraries(model):
    import audiocraft  # noqa: F401 (imported with stand-ins by `model`)
    from transformers.utils import is_torchaudio_available

    for package in ("torchaudio", "librosa", "av", "spacy", "num2words"):
        module = sys.modules.get(package)
        assert not isinstance(module, audiocraft_loading._StandIn)
    assert is_torchaudio_available() == (importlib.util.find_spec("torchaudio") is not None)
    assert audiocraft_loading.import_audiocraft() is sys.modules["audiocraft"]
    stand_in = audiocraft_loading._StandIn("av")
    with pytest.raises(ImportError, match=r"av\.open needs av, which is not installed"):
        stand_in.open("file.mp3")


def test_without_audiocraft_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "audiocraft", raising=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "audiocraft" else find(name)
    )
    with pytest.raises(ImportError, match=r"--no-deps -r requirements-nodeps\.txt"):
        audiocraft_loading.import_audiocraft()


SCRIPT = """
import importlib, sys
import musicscope.models as guarded
from musicscope.models.audiocraft import loading as compat
from musicscope.models.registry import load_model
guard = sys.meta_path.pop(0)
assert isinstance(guard, guarded.TorchaudioGuard), guard
try:
    import torchaudio
    raise SystemExit("the wheel loads by itself: nothing is tested")
except OSError:
    pass
guarded.install_guard()
guarded.install_guard()
assert sum(isinstance(f, guarded.TorchaudioGuard) for f in sys.meta_path) == 1
import torchaudio
assert torchaudio.resample() == "plain torch works"
assert not torchaudio._extension._IS_ALIGN_AVAILABLE
for package in set(compat.ABSENT) - {"torchaudio"}:
    sys.modules[package] = None  # as if it were not installed
compat.import_audiocraft()
assert not {"librosa", "av", "spacy", "num2words"} & set(sys.modules)
from transformers import MusicgenForConditionalGeneration
import torch
one, other = load_model(sys.argv[1]), load_model(sys.argv[2])
assert type(one).__name__ == "AudiocraftModel" and type(other).__name__ == "MusicgenModel"
codes = torch.arange(40).reshape(1, 4, 10)
a, b = (m.cross_entropy(m.with_captions(codes, ["flute"])) for m in (one, other))
assert torch.allclose(a, b, atol=1e-5)
print("both work")
"""


def test_both_work_in_one_process_beside_a_torchaudio_that_cannot_load(
    folder, tiny_musicgen, tmp_path
):
    package = tmp_path / "torchaudio"
    package.mkdir()
    # As the wheels are made: the package imports its extension, which is linked to CUDA.
    (package / "__init__.py").write_text(
        "from torchaudio import _extension, transforms\ndef resample(): return 'plain torch works'"
    )
    (package / "_extension.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    (package / "transforms.py").write_text("Spectrogram = MelSpectrogram = Loudness = None")
    paths = [str(tmp_path), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(tiny_musicgen)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("both work\n"), done.stderr[-2000:]
