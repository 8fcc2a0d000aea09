"""Checkpoints of which a part is absent, damaged or of another model: an error that names it."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from tests.models.conftest import FAMILIES, load
from tests.support import rave_export

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
Damage = Callable[[Path], None]


def copied(source: Path, out: Path, damage: Damage) -> Path:
    shutil.copytree(source, out)
    damage(out)
    return out


def weights(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Rewrite the weights of a safetensors file, of the shard that is named, or of a .bin."""

    def damage(folder: Path) -> None:
        path = folder / file
        if path.suffix == ".safetensors":
            held = load_file(path)
            change(held)
            return save_file(held, path, metadata={"format": "pt"})
        package = torch.load(path, weights_only=True)
        change(package["best_state"])
        return torch.save(package, path)

    return damage


def without(start: str) -> Callable[[dict], None]:
    def change(held: dict) -> None:
        names = [name for name in held if name.startswith(start)]
        assert names, start
        for name in names:
            del held[name]

    return change


def cut(name: str) -> Callable[[dict], None]:
    return lambda held: held.update({name: held[name][:-1].clone()})


def extra(name: str) -> Callable[[dict], None]:
    return lambda held: held.update({name: torch.zeros(3)})


def settings(file: str, change: Callable[[dict], object]) -> Damage:
    def damage(folder: Path) -> None:
        held = json.loads((folder / file).read_text())
        change(held)
        (folder / file).write_text(json.dumps(held))

    return damage


def all_of(*parts: Damage) -> Damage:
    return lambda folder: [part(folder) for part in parts] and None


def removed(*files: str) -> Damage:
    return lambda folder: [(folder / file).unlink() for file in files] and None


def other_ids(folder: Path) -> None:
    """A tokenizer in which padding and the end of a text have one another's ids."""
    text = (folder / "tokenizer.json").read_text()
    text = text.replace("<pad>", "<x>").replace("</s>", "<pad>").replace("<x>", "</s>")
    (folder / "tokenizer.json").write_text(text)


def more_ids(folder: Path) -> None:
    """A tokenizer with more ids than the text encoder's embedding has rows."""
    held = json.loads((folder / "tokenizer.json").read_text())
    held["model"]["vocab"] += [[f"word{i}", -20.0] for i in range(200)]
    (folder / "tokenizer.json").write_text(json.dumps(held))


def in_audiocraft(key: str, value: object, file: str) -> Damage:
    def damage(folder: Path) -> None:
        package = torch.load(folder / file, weights_only=True)
        config = OmegaConf.create(package["xp.cfg"])
        OmegaConf.update(config, key, value, merge=False, force_add=True)
        torch.save({**package, "xp.cfg": OmegaConf.to_yaml(config)}, folder / file)

    return damage


def within(sub: str, damage: Damage) -> Damage:
    return lambda folder: damage(folder / sub)


def fewer_codes(held: dict) -> None:
    """A codec with codebooks of 32 codes."""
    for name in list(held):
        if name.split(".")[-1] in ("embed", "embed_avg", "cluster_size") and "codebook" in name:
            held[name] = held[name][:32].clone()


def silent_codebook(name: str) -> Callable[[dict], None]:
    return lambda held: held.update({name: torch.zeros_like(held[name])})


HF, CODEC = "model.safetensors", "compression_state_dict.bin"
LAYER = "decoder.model.decoder.layers.3."
SHARD = "model-00002-of-00002.safetensors"
KINDS: dict[str, tuple[str, Damage, str]] = {
    # ---- absent
    "musicgen: tokenizer": ("musicgen", removed("tokenizer.json"), r"no tokenizer.*<unk>"),
    "musicgen: text encoder": ("musicgen", weights(HF, without("text_encoder.")),
                               r"missing \['text_encoder"),
    "musicgen: codec": ("musicgen", weights(HF, without("audio_encoder.")),
                        r"missing \['audio_encoder"),
    "musicgen: layer": ("musicgen", weights(HF, without(LAYER)), r"missing \['decoder.*layers\.3"),
    "musicgen: tensor": ("musicgen", weights(HF, without("decoder.lm_heads.2")), r"lm_heads\.2"),
    "musicgen: weights": ("musicgen", removed(HF), r"holds no weights"),
    "audiocraft: tokenizer": ("audiocraft", within("text_encoder", removed("tokenizer.json")),
                              r"text_encoder holds no tokenizer"),
    "audiocraft: text encoder's layer": (
        "audiocraft", within("text_encoder", weights(HF, without("encoder.block.1."))),
        r"text_encoder are not.*missing \['encoder\.block\.1"),
    "audiocraft: layer": ("audiocraft", weights("state_dict.bin", without("transformer.layers.3.")),
                          r"state_dict\.bin are not.*missing.*layers\.3"),
    "audiocraft: codec's part": ("audiocraft", weights(CODEC, without("quantizer.vq.layers.1.")),
                                 r"compression_state_dict\.bin are not.*missing.*vq\.layers\.1"),
    "audiocraft: codec": ("audiocraft", removed(CODEC), r"compression_state_dict\.bin is missing"),
    "yue: layer": ("yue", lambda f: [weights(p.name, lambda h: [h.pop(n) for n in list(h)
                   if ".layers.1." in n])(f) for p in f.glob("model-*")] and None,
                   r"yue-x are not.*missing \['model\.layers\.1"),
    "yue: head": ("yue", lambda f: [weights(p.name, lambda h: h.pop("lm_head.weight", None))(f)
                  for p in f.glob("model-*")] and None, r"missing \['lm_head"),
    "yue: shard": ("yue", removed(SHARD), rf"lacks the weights {SHARD}"),
    "yue: codec's layer": ("yue", within("xcodec", weights(HF, without("quantizer.quantizers.0"))),
                           r"xcodec are not.*missing \['quantizer\.quantizers\.0"),
    "yue: tokenizer": ("yue", removed("tokenizer.model"), r"tokenizer\.model is missing"),
    "rave: part of the archive": (
        "rave", lambda f: _rewrite(f, lambda n: None if n.endswith("data/3") else b""),
        r"one\.ts: torch cannot read"),
    # ---- of another model
    "musicgen: unknown tensor": ("musicgen", weights(HF, extra("decoder.extra.weight")),
                                 r"1 unknown \['decoder\.extra"),
    "musicgen: unknown layer": ("musicgen", weights(HF, extra(LAYER.replace("3", "7") + "x")),
                                r"unknown.*layers\.7"),
    "musicgen: shape": ("musicgen", weights(HF, cut("decoder.lm_heads.0.weight")),
                        r"lm_heads\.0\.weight \[63, 48\] for \[64, 48\]"),
    "musicgen: ids of the tokenizer": ("musicgen", other_ids, r"not the tokenizer.*pad 1 for 0"),
    "musicgen: more ids": ("musicgen", more_ids, r"not the tokenizer.*242 ids for 128 rows"),
    "musicgen: codes of the codec": (
        "musicgen", all_of(weights(HF, fewer_codes),
                           settings("config.json",
                                    lambda c: c["audio_encoder"].update(codebook_size=32))),
        r"codebooks of 32 codes, the decoder needs 4 of 64"),
    "musicgen: bandwidth of the codec": (
        "musicgen", settings("config.json",
                             lambda c: c["audio_encoder"].update(target_bandwidths=[0.6, 1.2])),
        r"the codec has 2 codebooks of 64 codes, the decoder needs 4"),
    "musicgen: start token": (
        "musicgen", settings("generation_config.json",
                             lambda c: c.update(decoder_start_token_id=0)),
        r"generation_config\.json: decoder_start_token_id is 0, .* special id is 64"),
    "audiocraft: rate of the codec": (
        "audiocraft", in_audiocraft("sample_rate", 1600, CODEC),
        r"compression_state_dict\.bin: the codec works at 1600 Hz, the language model at 3200"),
    "musicgen: untrained codec": (
        "musicgen", weights(HF, silent_codebook("audio_encoder.quantizer.layers.1.codebook.embed")),
        r"layers\.1\.codebook\.embed of the codec is all zero"),
    "audiocraft: unknown tensor": ("audiocraft", weights("state_dict.bin", extra("more.weight")),
                                   r"unknown \['more\.weight"),
    "audiocraft: shape": ("audiocraft", weights("state_dict.bin", cut("emb.1.weight")),
                          r"emb\.1\.weight \[64, 48\] for \[65, 48\]"),
    "audiocraft: codec's shape": (
        "audiocraft", weights(CODEC, cut("quantizer.vq.layers.0._codebook.embed")),
        r"compression_state_dict.*_codebook\.embed \[63, 16\] for \[64, 16\]"),
    "audiocraft: codes of the codec": (
        "audiocraft", all_of(weights(CODEC, fewer_codes), in_audiocraft("rvq.bins", 32, CODEC)),
        r"compression_state_dict\.bin: the codec has 4 codebooks of 32 codes"),
    "audiocraft: codebooks of the codec": (
        "audiocraft", all_of(weights(CODEC, without("quantizer.vq.layers.3.")),
                             in_audiocraft("rvq.n_q", 3, CODEC)),
        r"the codec has 3 codebooks of 64 codes, the decoder needs 4"),
    "audiocraft: text encoder's shape": (
        "audiocraft", within("text_encoder", weights(HF, cut("encoder.final_layer_norm.weight"))),
        r"text_encoder are not.*final_layer_norm\.weight \[31\] for \[32\]"),
    "audiocraft: ids of the tokenizer": ("audiocraft", within("text_encoder", other_ids),
                                         r"text_encoder/tokenizer\.json is not the tokenizer"),
    "audiocraft: untrained codec": (
        "audiocraft", weights(CODEC, silent_codebook("quantizer.vq.layers.2._codebook.embed")),
        r"layers\.2\._codebook\.embed of the codec is all zero"),
    "yue: unknown tensor": ("yue", weights(SHARD, extra("model.layers.5.x")),
                            r"unknown.*layers\.5"),
    "yue: codec's unknown tensor": ("yue", within("xcodec", weights(HF, extra("more"))),
                                    r"xcodec are not.*unknown \['more'\]"),
    "yue: codec's shape": ("yue", within("xcodec", weights(HF, cut("fc2.bias"))),
                           r"xcodec are not.*of another shape \['fc2\.bias"),
    "yue: untrained codec": (
        "yue", within("xcodec", weights(
            HF, silent_codebook("quantizer.quantizers.0.codebook.embed"))), r"is all zero"),
    "rave: other latents": ("rave", lambda f: _resave(f, "encode_params", [1, 1, 3, 64]),
                            r"gives 4 latents per 64 samples.*say 3 per 64"),
    "rave: not numbers": ("rave",
                          lambda f: _resave(f, "latent_mean", [torch.nan] * rave_export.FULL),
                          r"NaN or infinity on noise"),
    # ---- cut short or damaged
    **{f"{family}: {file} cut short": (family, lambda f, file=file: _halve(f / file),
                                       rf"{Path(file).name} is (cut short|not a TorchScript)")
       for family, file in (("musicgen", HF), ("audiocraft", "state_dict.bin"),
                            ("audiocraft", CODEC), ("audiocraft", f"text_encoder/{HF}"),
                            ("yue", SHARD), ("yue", f"xcodec/{HF}"), ("rave", "one.ts"),
                            ("musicgen", "tokenizer.json"), ("yue", "tokenizer.model"))},
    "rave: flipped bytes": ("rave", lambda f: _flip(f / "one.ts"), r"is damaged.*checksum"),
    # ---- a git-lfs pointer in its place
    **{f"{family}: {file} is a pointer": (
        family, lambda f, file=file: (f / file).write_text(POINTER) and None,
        rf"{Path(file).name} is a git-lfs pointer.*git lfs pull")
       for family, file in (
           ("musicgen", "config.json"), ("musicgen", HF), ("musicgen", "tokenizer.json"),
           ("audiocraft", "state_dict.bin"), ("audiocraft", CODEC),
           ("audiocraft", f"text_encoder/{HF}"), ("audiocraft", "text_encoder/config.json"),
           ("yue", "config.json"), ("yue", "model.safetensors.index.json"), ("yue", SHARD),
           ("yue", "tokenizer.model"), ("yue", f"xcodec/{HF}"), ("yue", "xcodec/config.json"),
           ("rave", "one.ts"))},
}  # fmt: skip


def _halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _flip(path: Path) -> None:
    """Change one byte of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size * ("/data/" in e.filename))
    content = bytearray(path.read_bytes())
    content[entry.header_offset + 200 + entry.file_size // 2] ^= 255
    path.write_bytes(bytes(content))


def _rewrite(folder: Path, change: Callable[[str], bytes | None]) -> None:
    path = folder / "one.ts"
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in held.items():
            if change(name) is not None:
                archive.writestr(name, content)


def _resave(folder: Path, name: str, values: list[float]) -> None:
    module = rave_export.TinyRave()
    module.get_buffer(name).copy_(torch.tensor(values))
    rave_export.save(module, folder / "one.ts")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_absent_damaged_or_foreign_is_named(checkpoints, tmp_path, kind):
    family, damage, message = KINDS[kind]
    folder = copied(checkpoints[family], tmp_path / f"{family}-x", damage)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value) or family == "rave"
    assert "\n" not in str(caught.value).strip() or family == "rave"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_copy_loads_without_a_word(checkpoints, tmp_path, family):
    folder = copied(checkpoints[family], tmp_path / "copy", lambda f: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(folder)


def test_generation_settings_that_are_absent_are_said(checkpoints, tmp_path):
    folder = copied(checkpoints["musicgen"], tmp_path / "x", removed("generation_config.json"))
    with pytest.warns(UserWarning, match=r"generation_config\.json is missing.*guidance_scale \(3"):
        assert load(folder).guidance_scale == 3.0
    shutil.copy(checkpoints["musicgen"] / "generation_config.json", folder)
    settings("generation_config.json", lambda c: c.pop("guidance_scale"))(folder)
    with pytest.warns(UserWarning, match=r"generation_config\.json lacks guidance_scale"):
        load(folder)
    lacking = in_audiocraft("classifier_free_guidance", {}, "state_dict.bin")
    folder = copied(checkpoints["audiocraft"], tmp_path / "y", lacking)
    with pytest.warns(UserWarning, match=r"state_dict\.bin lacks classifier_free.*: 3\.0 is used"):
        assert load(folder).guidance_scale == 3.0
    module = rave_export.TinyRave()
    del module.encode_params
    rave_export.save(module, tmp_path / "bare.ts")
    with pytest.warns(UserWarning, match="lacks encode_params: input of one channel is assumed"):
        load(tmp_path / "bare.ts")
