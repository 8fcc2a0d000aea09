"""Train the embedded models within a time budget, on CPU or GPU; resumable.

    python -m musicscope.embedded.pretraining.run --out weights --minutes 600
    python -m musicscope.embedded.pretraining.run --out weights --minutes 8 --device cuda

Scenes are rendered by all processes while the codec already trains on those that are ready. Then
clips are mixed and encoded, and the decoders train one after the other. Work in progress stays in
`--work`; a run with the same folder goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EncodecModel,
    T5EncoderModel,
    T5Tokenizer,
)

from musicscope.core.command_line import Parser, json_object, number, run_program, whole
from musicscope.core.io import write_json
from musicscope.core.seeding import seed_for
from musicscope.core.user_outputs import new_folder
from musicscope.embedded.pretraining.codec import (
    SAMPLE_RATE,
    CodecConfig,
    CodecTrainer,
    keep_shapes_on_cpu,
    plain_weights,
    restart_codebooks,
    start_codec,
)
from musicscope.embedded.pretraining.codec_quality import code_use, log_mel_distance, si_sdr
from musicscope.embedded.pretraining.corpus import (
    SAMPLES,
    SCENES_PER_CHUNK,
    SECONDS,
    Corpus,
    Renderers,
    add_material_options,
    claim_work,
    material_of,
)
from musicscope.embedded.pretraining.decoder import (
    SIZES,
    DecoderTrainer,
    TokenSet,
    encode_captions,
)
from musicscope.embedded.pretraining.phases import Log, Phase
from musicscope.embedded.pretraining.saved_models import (
    load_codec,
    load_whole,
    model_names,
    save_whole,
    start_from,
)
from musicscope.embedded.pretraining.text import TextConfig, train_text_encoder
from musicscope.embedded.rendering.captions import facts, random_description, write_caption
from musicscope.embedded.rendering.mixing import Rooms, captions, draw_mixes, mix_audio
from musicscope.embedded.rendering.styles import STYLES

SHARES = {"codec": 0.55, "tokens": 0.08, "nano-small": 0.12, "nano-medium": 0.25}
"""Of the time budget."""
HELD_OUT = ("validation", "test")
HELD_OUT_CHUNKS = 4
START_CLIPS, START_SAMPLES = 128, 48_000
TEXT = TextConfig(vocabulary=640, captions=20_000, steps=900)
STYLE_WORDS = tuple(STYLES)


# --- text -------------------------------------------------------------------------------------


def get_text_encoder(work: Path, seed: int, log: Log) -> tuple[T5EncoderModel, T5Tokenizer]:
    """The text encoder, trained to read facts off captions, and its tokenizer."""
    path = work / "text"
    if not (path / "done.json").exists():
        rng = np.random.default_rng(seed_for(seed, "captions"))
        about = [random_description(rng, STYLE_WORDS) for _ in range(TEXT.captions)]
        texts = [write_caption(a, rng) for a in about]
        truth = np.stack([facts(a, STYLE_WORDS) for a in about])
        encoder, tokenizer, loss = train_text_encoder(texts, truth, TEXT, seed)
        encoder.save_pretrained(path)
        tokenizer.save_pretrained(path)
        write_json(path / "done.json", {"loss": loss})
        log("text", loss=loss)
    return T5EncoderModel.from_pretrained(path), T5Tokenizer.from_pretrained(path)


# --- codec ------------------------------------------------------------------------------------


def train_codec(
    trainer: CodecTrainer, phase: Phase, corpus: Corpus, seed: int, refill: Callable[[], None],
    log: Log,
) -> EncodecModel:  # fmt: skip
    """Train on random crops of random mixes until the phase's time is used."""
    if phase.state:
        trainer.load(phase.state)
    config, rooms, good = trainer.config, Rooms(corpus.bank.device), trainer.snapshot()
    while phase.progress < 1:
        rng = np.random.default_rng(seed_for(seed, "codec-step", trainer.step_count))
        mixes = draw_mixes(corpus.table, config.batch, rng, SECONDS)
        starts = rng.integers(SAMPLES - config.crop + 1, size=config.batch)
        audio = mix_audio(corpus.bank, mixes, rooms, starts, config.crop)
        losses = trainer.step(audio, phase.progress)
        if trainer.step_count % 10 == 0:
            found = {k: float(v) for k, v in losses.items()}  # waits for the device
            if not phase.check(list(found.values()), trainer.step_count):
                trainer.restore(good)
                log(phase.name, step=trainer.step_count, restored=True)
            elif trainer.step_count % 500 == 0:
                good = trainer.snapshot()
            refill()
            if phase.due():
                log(phase.name, step=trainer.step_count, progress=phase.progress,
                    scenes=len(corpus), **found)  # fmt: skip
        phase.save(trainer.state())
    phase.save(trainer.state(), force=True)
    return trainer.finished()


def get_codec(
    work: Path, corpus: Corpus, held_out: Corpus, config: CodecConfig, minutes: float, seed: int,
    refill: Callable[[], None], log: Log, graphs: bool = True, earlier: Path | None = None,
) -> EncodecModel:  # fmt: skip
    """The codec, kept in `work`; trained for `minutes` unless it is there.

    Training goes on from the codec in `earlier` (a codec, or models that hold one) if there is one,
    else it starts anew.
    """
    path = work / "codec"
    if not (path / "config.json").exists():
        device, rooms = corpus.bank.device, Rooms(corpus.bank.device)
        if earlier:
            codec = load_codec(earlier)
            log("codec before", **measure_codec(codec, held_out, seed))
            config, start = codec_config(codec, config), restart_codebooks(plain_weights(codec))
        else:
            rng = np.random.default_rng(seed_for(seed, "codec-start"))
            mixes = draw_mixes(corpus.table, START_CLIPS, rng, SECONDS)
            starts = rng.integers(SAMPLES - START_SAMPLES + 1, size=START_CLIPS)
            audio = mix_audio(corpus.bank, mixes, rooms, starts, START_SAMPLES)
            start = start_codec(config, seed_for(seed, "codec"), audio)
        trainer = CodecTrainer(config, start, seed_for(seed, "codec"), device, graphs=graphs)
        phase = Phase("codec", work, minutes)
        codec = train_codec(trainer, phase, corpus, seed, refill, log)
        unfinished = work / "codec.unfinished"
        codec.save_pretrained(unfinished)
        unfinished.rename(path)
        del trainer
        log("codec held out", **measure_codec(codec, held_out, seed))
    return EncodecModel.from_pretrained(path)


def codec_config(codec: EncodecModel, like: CodecConfig) -> CodecConfig:
    """`like` with the architecture of `codec`."""
    return replace(
        like, num_filters=codec.config.num_filters, hidden_size=codec.config.hidden_size,
        codebooks=codec.config.num_quantizers, codebook_size=codec.config.codebook_size,
        upsampling_ratios=tuple(codec.config.upsampling_ratios),
    )  # fmt: skip


REFINE = {
    "adversarial_from": 0.0, "average_from": 0.3,
    "weights": (("mel", 1.0), ("waveform", 0.5), ("generator", 1.0), ("feature", 2.0)),
}  # fmt: skip


def refine_codec(
    source: Path, work: Path, corpus: Corpus, held_out: Corpus, batch: int,
    minutes: float, seed: int, refill: Callable[[], None], log: Log, graphs: bool = True,
) -> None:  # fmt: skip
    """Train the codec's decoder alone and write the models of `source` with it to `work`/models.

    Codes stay what they are, so the language models need no training after it.
    """
    names = model_names(source)
    model = load_whole(source / names[0])
    log("refine before", **measure_codec(model.audio_encoder, held_out, seed))
    config = codec_config(model.audio_encoder, replace(CodecConfig(batch=batch), **REFINE))
    trainer = CodecTrainer(
        config, plain_weights(model.audio_encoder), seed_for(seed, "refine"), corpus.bank.device,
        decoder_only=True, graphs=graphs,
    )  # fmt: skip
    codec = train_codec(trainer, Phase("refine", work, minutes), corpus, seed, refill, log)
    log("refine after", **measure_codec(codec, held_out, seed))
    for name in names:
        model = load_whole(source / name)
        tokenizer = T5Tokenizer.from_pretrained(source / name)
        model.audio_encoder.load_state_dict(codec.state_dict())
        save_whole(model, tokenizer, work / "models" / name)


@torch.inference_mode()
def measure_codec(codec: EncodecModel, held_out: Corpus, seed: int) -> dict[str, object]:
    """Reconstruction of 48 held-out clips: distance, SI-SDR and perplexity per codebook.

    Runs on a copy of `codec`, on the device of the clips.
    """
    rooms = Rooms(held_out.bank.device)
    codec = keep_shapes_on_cpu(deepcopy(codec).to(held_out.bank.device)).eval()
    rng = np.random.default_rng(seed_for(seed, "codec-held-out"))
    mixes = draw_mixes(held_out.table, 48, rng, SECONDS)
    distance, sdr, codes = [], [], []
    for at in range(0, len(mixes), 8):
        part = mixes[at : at + 8]
        audio = mix_audio(held_out.bank, part, rooms, np.zeros(len(part), np.int64), SAMPLES)
        found = codec.encode(audio[:, None])
        decoded = codec.decode(found.audio_codes, found.audio_scales).audio_values[:, 0]
        codes.append(found.audio_codes[0].cpu().numpy())
        x, y = audio.cpu().numpy(), decoded[:, :SAMPLES].float().cpu().numpy()
        distance.append(log_mel_distance(x, y, SAMPLE_RATE))
        sdr.append(si_sdr(x, y))
    size = codec.config.codebook_size
    use = [u["perplexity"] / size for u in code_use(np.concatenate(codes), size)]
    return {
        "log_mel_distance_db": float(np.concatenate(distance).mean()),
        "si_sdr_db": float(np.concatenate(sdr).mean()),
        "si_sdr_db_median": float(np.median(np.concatenate(sdr))),
        "perplexity_share": [round(u, 3) for u in use],
    }


# --- tokens -----------------------------------------------------------------------------------


@torch.inference_mode()
def make_tokens(
    codec: EncodecModel, tokenizer: T5Tokenizer, corpus: Corpus, rng: np.random.Generator,
    clips: int, seconds: float, batch: int, pad: int,
) -> dict[str, Tensor]:  # fmt: skip
    """Mix and encode up to `clips` clips, all scenes in turn, or as many as `seconds` allow.

    Returns:
        On the CPU: codes int16 [clips, K, frames], padded caption ids int16 [clips, pad] and their
        mask int8 [clips, pad].
    """
    rooms = Rooms(corpus.bank.device)
    codes, texts, begin = [], [], time.monotonic()
    order = np.concatenate([rng.permutation(len(corpus)) for _ in range(-(-clips // len(corpus)))])[
        :clips
    ]
    for at in range(0, clips, batch):
        if codes and time.monotonic() - begin > seconds:
            break
        scenes = order[at : at + batch]
        mixes = draw_mixes(corpus.table, len(scenes), rng, SECONDS, scenes)
        audio = mix_audio(corpus.bank, mixes, rooms, np.zeros(len(scenes), np.int64), SAMPLES)
        codes.append(codec.encode(audio[:, None]).audio_codes[0].to(torch.int16))
        texts += captions(corpus.table, mixes, SECONDS)
    tokens = tokenizer(
        texts, return_tensors="pt", padding="max_length", truncation=True, max_length=pad
    )
    return {
        "codes": torch.cat(codes).cpu(), "ids": tokens.input_ids.short(),
        "mask": tokens.attention_mask.to(torch.int8),
    }  # fmt: skip


def get_tokens(
    work: Path, name: str, codec: EncodecModel, tokenizer: T5Tokenizer, corpus: Corpus, clips: int,
    seconds: float, seed: int, log: Log,
) -> None:  # fmt: skip
    """Encode random mixes of the corpus into `work`, unless that is done."""
    path = work / f"tokens-{name}.pt"
    if not path.exists():
        begin, device = time.monotonic(), corpus.bank.device
        rng = np.random.default_rng(seed_for(seed, "tokens", name))
        batch = 32 if device.type == "cuda" else 1
        codec = keep_shapes_on_cpu(codec.to(device)).eval()
        tokens = make_tokens(codec, tokenizer, corpus, rng, clips, seconds, batch, pad=64)
        torch.save(tokens, path)
        log("tokens", split=name, clips=len(tokens["codes"]), took=time.monotonic() - begin)


def load_tokens(
    work: Path, name: str, text: T5EncoderModel, device: str | torch.device
) -> TokenSet:
    """Tokens of `get_tokens` on the device, their captions encoded by `text`."""
    found = torch.load(work / f"tokens-{name}.pt", weights_only=True)
    codes, ids, mask = (found[part].to(device) for part in ("codes", "ids", "mask"))
    return TokenSet(codes, encode_captions(text.to(device).eval(), ids, mask), mask)


# --- decoders ---------------------------------------------------------------------------------


def train_decoder(
    work: Path, name: str, codec: EncodecModel, text: T5EncoderModel,
    tokenizer: T5Tokenizer, train: TokenSet, held_out: TokenSet, batch: int, minutes: float,
    seed: int, start: Path | None, log: Log, graphs: bool = True,
) -> None:  # fmt: skip
    """Train one decoder for `minutes`; save the whole model to `work`/models/`name`."""
    folder = work / "models" / name
    if (folder / "processor_config.json").exists():
        return
    config = replace(SIZES[name], batch=batch)
    trainer = DecoderTrainer(config, codec, text, seed, train.codes.device, graphs)
    phase = Phase(name, work, minutes)
    if phase.state:
        trainer.load(phase.state)
    elif start:
        trainer.take_over(load_whole(start / name))
    measured = time.monotonic()
    every = max(20.0, 60 * minutes / 12)
    while phase.progress < 1:
        losses = trainer.step(train, phase.progress)
        if trainer.step_count % 10 == 0:
            found = losses.tolist()  # waits for the device
            phase.check(found, trainer.step_count)
            if phase.due():
                log(name, step=trainer.step_count, progress=phase.progress,
                    ce=float(np.mean(found)))  # fmt: skip
            if time.monotonic() - measured > every:
                measured = time.monotonic()
                found = trainer.evaluate(held_out)
                log(name, step=trainer.step_count, held_out_ce=float(found.mean()))
        phase.save(trainer.state())
    phase.save(trainer.state(), force=True)
    found = trainer.evaluate(held_out)
    log(name, step=trainer.step_count, held_out_ce=float(found.mean()),
        per_codebook=[round(x, 4) for x in found.tolist()],
        parameters=sum(p.numel() for p in trainer.average.values()))  # fmt: skip
    save_whole(trainer.finished(), tokenizer, folder)


# --- command ----------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the command."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder for the models")
    add_material_options(parser)
    parser.add_argument("--minutes", type=number(above=0), default=600.0, help="for everything")
    parser.add_argument("--shares", type=json_object(SHARES), default={}, metavar="JSON",
                        help=f"per phase; default {json.dumps(SHARES)}")  # fmt: skip
    parser.add_device()
    parser.add_argument("--processes", type=whole(1), default=max((os.cpu_count() or 2) - 1, 1))
    parser.add_argument("--scenes", type=whole(1), default=1000, help="scenes to render")
    parser.add_argument(
        "--first-scenes", type=whole(1), default=100, help="wait for so many at first"
    )
    parser.add_argument(
        "--clips", type=whole(1), default=4000, help="clips to encode for the decoders"
    )
    parser.add_argument(
        "--codec-batch", type=whole(1), default=8, help="crops of a second per step"
    )
    parser.add_argument("--decoder-batch", type=whole(1), default=4, help="clips per step")
    codec = json_object(asdict(CodecConfig()))
    parser.add_argument("--codec", type=codec, default={}, metavar="JSON",
                        help="fields of CodecConfig to change")  # fmt: skip
    parser.add_argument("--no-graphs", action="store_true", help="run each GPU kernel by itself")
    parser.add_argument("--start", type=Path, metavar="FOLDER",
                        help="keep codec and text encoder of the models in this folder and "
                        "train their decoders on")  # fmt: skip
    parser.add_argument("--codec-start", type=Path, metavar="FOLDER",
                        help="train the codec of the models in this folder on, all of it; "
                        "decoders trained on its old codes are of no use afterwards")  # fmt: skip
    parser.add_argument("--refine", type=Path, metavar="FOLDER",
                        help="train the codec's decoder alone, of the models in this folder, "
                        "and write them to --out; their codes do not change")  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES),
                        help="decoders to train in this run; each has its own share")  # fmt: skip
    parser.add_argument("--until", choices=("codec", "tokens", "all"), default="all")
    parser.add_argument("--seed", type=whole(0), default=20)
    return parser.parse_args(argv)


def make_training_set(
    args: argparse.Namespace, minutes: dict[str, float], tokenizer: T5Tokenizer | None, log: Log
) -> None:
    """Render scenes, train the codec on their mixes and encode clips, as far as not done yet."""
    stems = args.work / "stems"
    few = HELD_OUT_CHUNKS * SCENES_PER_CHUNK
    sets = {
        "train": Corpus(stems, args.scenes, args.device),
        **{split: Corpus(stems, few, args.device) for split in HELD_OUT},
    }
    with closing(Renderers(stems, material_of(args), args.seed, args.processes)) as renderers:
        for split in HELD_OUT:
            renderers.submit(split, range(HELD_OUT_CHUNKS))
        renderers.submit("train", range(-(-args.scenes // SCENES_PER_CHUNK)))

        def refill() -> None:
            for name in renderers.finished():
                sets[name.split("-")[0]].add(name)

        while len(sets["train"]) < args.first_scenes or any(len(sets[s]) < few for s in HELD_OUT):
            refill()
            time.sleep(0.1)
        log("rendering", scenes=len(sets["train"]))
        if args.refine:
            refine_codec(
                args.refine, args.work, sets["train"], sets["test"], args.codec_batch,
                args.minutes, args.seed, refill, log, not args.no_graphs,
            )  # fmt: skip
            return
        config = replace(CodecConfig(batch=args.codec_batch), **args.codec)
        codec = get_codec(
            args.work, sets["train"], sets["test"], config, minutes["codec"], args.seed, refill,
            log, not args.no_graphs, args.codec_start,
        )  # fmt: skip
        refill()
    if args.until == "codec":
        return
    for split, clips in (("validation", 4 * few), ("train", args.clips)):
        get_tokens(
            args.work, split, codec, tokenizer, sets[split], clips, 60 * minutes["tokens"],
            args.seed, log,
        )  # fmt: skip


def train(args: argparse.Namespace, log: Log) -> None:
    """Train, as far as not done yet, what the arguments ask for.

    Models go to `work`/models; a run that ends before the decoders leaves the codec there.
    """
    if args.device.startswith("cuda"):
        # Codes must not depend on the device: float32 products stay float32 outside autocast.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    else:
        torch.set_num_threads(1)
    minutes = {name: share * args.minutes for name, share in {**SHARES, **args.shares}.items()}
    if args.refine:
        make_training_set(args, minutes, None, log)
        return
    if args.start:
        start_from(args.start, args.work)
    text, tokenizer = get_text_encoder(args.work, args.seed, log)
    if not (args.work / "tokens-train.pt").exists():
        make_training_set(args, minutes, tokenizer, log)
    codec = EncodecModel.from_pretrained(args.work / "codec")
    if args.until != "all":
        codec.half().save_pretrained(args.work / "models" / "codec")
        return
    train_set, held_out = (
        load_tokens(args.work, s, text, args.device) for s in ("train", "validation")
    )
    for name in args.models:
        train_decoder(
            args.work, name, codec, text.cpu(), tokenizer, train_set, held_out, args.decoder_batch,
            minutes[name], args.seed, args.start, log, not args.no_graphs,
        )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Train everything, or go on with what a former run left."""
    args = parse_arguments(argv)
    read = {
        "--work": args.work, "--refine": args.refine, "--start": args.start,
        "--codec-start": args.codec_start,
    }  # fmt: skip
    inputs = {option: path for option, path in read.items() if path}
    with new_folder(args.out, inputs=inputs):
        pass  # a wrong folder is refused now; a claim held for hours would stop the next run
    kept = {"seed": args.seed, "codec": args.codec}
    kept |= {
        k: str(v.resolve())
        for k, v in (
            ("start", args.start),
            ("refine", args.refine),
            ("codec-start", args.codec_start),
        )
        if v
    }
    claim_work(args.work, kept)
    models = args.work / "models"
    train(args, Log(models / "log.jsonl"))
    with new_folder(args.out, inputs=inputs) as out:
        shutil.copytree(models, out.scratch, dirs_exist_ok=True)
        print(f"models: {out.publish()}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
