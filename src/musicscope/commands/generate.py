"""Music with concepts switched off and on, beside the same music without, and both judges' scores.

    musicscope generate --model nano-small --prompt "calm guitar music" --off guitar --on brass
    musicscope generate --model my-rave --audio song.flac --off guitar

A model that turns audio into audio (RAVE) edits recordings: both pieces are its reconstructions.
Concepts are those that the stages `steer_full` and `steer` learnt. Writes two WAV files and a
JSON file that says how they were made; the names hold the prompt, the seed and a hash of the
settings, so another setting makes other files, and the same one the same bytes. Files are added to
the folder of --out: where one of a name has other content, all three new ones get a number.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from musicscope.config import load_params
from musicscope.core.io import sha256, write_json
from musicscope.core.user_outputs import add_files, folder_to_add_to
from musicscope.judges.pair import load_judges
from musicscope.steering import audio_pieces, pieces
from musicscope.steering.baselines import edit_prompt
from musicscope.steering.edit import ALWAYS, BRANCHES, Steering
from musicscope.steering.pieces import Order, Piece, Scores
from musicscope.steering.ready import load_steering, recipe_folder

JUDGES = "data/judge"
TRUST = "one piece's scores are rough; metrics/train_judge.json says how far to trust them"


def usual_guidance() -> float | None:
    """The scale at which strengths were chosen (params.steer.guidance); None without params.yaml:
    the model's own."""
    return load_params().steer.guidance if Path("params.yaml").is_file() else None


def wishes_of(off: list[str], on: list[str]) -> dict[str, str]:
    """{"guitar": "off"} of the two options; ValueError for none, or for both at once."""
    if both := set(off) & set(on):
        raise ValueError(f"{', '.join(sorted(both))}: off or on, not both")
    if not off and not on:
        raise ValueError("name a concept: --off CONCEPT, --on CONCEPT, or several of them")
    return {**dict.fromkeys(off, "off"), **dict.fromkeys(on, "on")}


def wav_bytes(piece: Piece) -> bytes:
    """16-bit WAV."""
    stream = io.BytesIO()
    sound = np.clip(piece.audio, -1, 1)
    soundfile.write(stream, sound, piece.rate, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "music"


def place(
    folder: Path, stem: str, sounds: Mapping[str, bytes], about: Mapping[str, Any]
) -> dict[str, Path]:
    """Write <stem>-<kind>.wav of every kind, and `about` beside them, as new files.

    Files of these names with the same content serve as they are. Where one has other content (made
    with another model, say), it stays and all new ones get a number.

    Raises:
        OutputError: the folder cannot be written.
    """

    def contents(number: str) -> dict[str, bytes]:
        names = {kind: f"{stem}-{kind}{number}.wav" for kind in sounds}
        said = Path(names["steered"]).with_suffix(".json").name
        made = {names[kind]: sound for kind, sound in sounds.items()}
        return {**made, said: _json_bytes({**about, "files": names})}

    paths = [path for path in add_files(folder, contents).values() if path.suffix == ".wav"]
    return dict(zip(sounds, paths, strict=True))


def _json_bytes(value: Any) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        write_json(Path(scratch) / "about.json", value)
        return (Path(scratch) / "about.json").read_bytes()


def describe(steering: Steering) -> dict[str, Any]:
    """The edits that were made, JSON-able."""
    end = steering.schedule[1]
    return {
        "branch": steering.branch,
        "schedule": [steering.schedule[0], None if end == float("inf") else end],
        "concepts": {
            c.name: {
                "strength": c.strength,
                "loop": "closed" if c.gate else "open",
                "edits": [asdict(edit) for edit in c.edits],
            }
            for c in steering.concepts
        },
    }


def table(scores: Scores, wishes: Mapping[str, str]) -> str:
    """What was asked for and the likeliest other families, before and after, as lines."""
    heads = [f"{kind}, {judge.replace('_', ' ')}" for judge in scores for kind in pieces.KINDS]
    lines = ["  ".join(["family".ljust(20), *(head.rjust(len(head)) for head in heads)])]
    for label, values in pieces.score_rows(scores, wishes):
        cells = [
            ("-" if v is None else f"{v:.3f}").rjust(len(h))
            for v, h in zip(values, heads, strict=True)
        ]
        lines.append("  ".join([label.ljust(20), *cells]))
    return "\n".join(lines)


# --- the command ------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``musicscope generate``."""
    add = parser.add_argument
    add("--model", required=True, help="a folder, or a name under data/models")
    add("--prompt", action="append", help="what to play; may be given again")
    add(
        "--audio",
        action="append",
        metavar="FILE",
        help="of a model that turns audio into audio: what to edit; may be given again",
    )
    add(
        "--off",
        action="append",
        default=[],
        metavar="CONCEPT",
        help="switch it off; may be given again",
    )
    add("--on", action="append", default=[], metavar="CONCEPT", help="switch it on; the same")
    add("--strength", type=float, default=1.0,
        help="1: as chosen on validation prompts; 0: no edit")  # fmt: skip
    add("--seed", type=int, default=0, help="of the draws, the same for both pieces; 0")
    add("--seconds", type=float, help="length of a piece; 5, of --audio all of it")
    add("--out", default="data/generated", metavar="DIR",
        help="folder to which the files are added; data/generated")  # fmt: skip
    add("--guidance", type=float, help="its scale; that of params.steer.guidance")
    add("--branch", choices=BRANCHES, help="rows of guided generation to edit; as chosen for steer")
    add(
        "--loop",
        choices=("open", "closed"),
        help="closed: only while a probe hears a need; as chosen",
    )
    add(
        "--schedule",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        help="seconds in which to edit; all",
    )
    add("--features", type=int, metavar="N", help="so many features a concept; as chosen")
    add("--words", action="store_true", help="ask for it in the steered prompt too (... no guitar)")
    add("--device", default="cpu", help="cpu or cuda")


def _steering(args: argparse.Namespace, wishes: Mapping[str, str]) -> tuple[str, Steering]:
    schedule = ALWAYS if args.schedule is None else tuple(args.schedule)
    if not 0 <= schedule[0] < schedule[1]:
        raise ValueError(f"--schedule {schedule[0]:g} {schedule[1]:g}: seconds, 0 <= START < END")
    if args.features is not None and args.features < 1:
        raise ValueError(f"--features {args.features}: at least 1")
    return load_steering(
        Path(args.model).name, wishes, args.strength, branch=args.branch, schedule=schedule,
        n_features=args.features, loop=args.loop, words=args.words, device=args.device,
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Draw, write, judge. ValueError and FileNotFoundError say what is wrong with the input."""
    name, wishes = Path(args.model).name, wishes_of(args.off, args.on)
    if bool(args.prompt) == bool(args.audio):
        raise ValueError("give --prompt TEXT, or --audio FILE to a model that edits audio (RAVE)")
    with folder_to_add_to(args.out, _inputs(args)) as out:
        jobs = _from_audio(args, wishes) if args.audio else _from_prompts(args, wishes)
        judges = None
        for number, (settings, title, pair) in enumerate(jobs):
            judges = _judges() if number == 0 else judges
            _hand_over(out, wishes, {"model": name, **settings}, title, pair, judges)
    if judges is not None:
        print(TRUST)


def _inputs(args: argparse.Namespace) -> dict[str, Path]:
    """What is read, by what it is called."""
    given, name = Path(args.model), Path(args.model).name
    return {
        "the model": given if given.exists() else Path(pieces.MODELS) / given,
        "the SAEs": Path("data/sae") / name,
        "the recipes": Path(recipe_folder(name)),
        "the judges": Path(JUDGES),
        **{f"--audio {file}": Path(file) for file in args.audio or ()},
    }


Job = tuple[dict[str, Any], str, tuple[Piece, Piece]]
"""Settings, what the pieces are called, and both pieces."""


def _from_prompts(args: argparse.Namespace, wishes: Mapping[str, str]) -> Iterator[Job]:
    """Both pieces of every prompt."""
    name, seconds = Path(args.model).name, 5.0 if args.seconds is None else args.seconds
    guidance = usual_guidance() if args.guidance is None else args.guidance
    orders = [Order(prompt, seconds, args.seed, guidance) for prompt in args.prompt]
    pieces.check_model(args.model)
    pieces.check_wishes(name, wishes)
    layer, steering = _steering(args, wishes)
    model = pieces.open_model(args.model, args.device)
    for order in orders:
        plain = pieces.draw(model, order, layer)
        words = edit_prompt(order.prompt, wishes) if args.words else order.prompt
        steered = pieces.draw(model, replace(order, prompt=words), layer, steering)
        settings = {"layer": layer, **asdict(order), **describe(steering)}
        if args.words:
            settings["prompt_steered"] = words
        yield settings, order.prompt, (plain, steered)


def _from_audio(args: argparse.Namespace, wishes: Mapping[str, str]) -> Iterator[Job]:
    """Both reconstructions of every file."""
    asked = {"--guidance": args.guidance, "--branch": args.branch, "--words": args.words or None}
    if wrong := [option for option, value in asked.items() if value is not None]:
        raise ValueError(f"{', '.join(wrong)}: of prompts alone, not of --audio")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"seed {args.seed}: 0 to 2^63 - 1")
    pieces.check_model(args.model)
    model = audio_pieces.open_audio_model(args.model, args.device)
    pieces.check_wishes(Path(args.model).name, wishes)
    layer, steering = _steering(args, wishes)
    files = {
        Path(file): audio_pieces.read_audio(file, model.sample_rate, args.seconds)
        for file in args.audio
    }
    for path, audio in files.items():
        plain = audio_pieces.edit(model, audio, args.seed, layer)
        steered = audio_pieces.edit(model, audio, args.seed, layer, steering)
        about = {
            "audio": path.name, "audio_sha256": sha256(path), "seed": args.seed,
            "seconds": len(audio) / model.sample_rate,
        }  # fmt: skip
        yield {"layer": layer, **about, **describe(steering)}, path.name, (plain, steered)


def _judges() -> Any:
    """The judges; None, and a line that says so, where there are none."""
    try:
        return load_judges(JUDGES)
    except FileNotFoundError as error:
        print(f"no scores: {error} (or fetch it: dvc pull {JUDGES})", file=sys.stderr)
        return None


def _hand_over(
    out: Path, wishes: Mapping[str, str], settings: dict[str, Any], title: str,
    pair: tuple[Piece, Piece], judges: Any,
) -> None:  # fmt: skip
    """Write both pieces and what they are, and print what the judges hear."""
    plain, steered = pair
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    stem = f"{slug(title)}-seed{settings['seed']}-{digest}"
    sounds = {k: wav_bytes(piece) for k, piece in zip(pieces.KINDS, pair, strict=True)}
    scores = None if judges is None else pieces.judge(judges, pair)
    files = place(out, stem, sounds, {**settings, "wishes": wishes, "scores": scores})
    asked = ", ".join(f"{concept} {direction}" for concept, direction in wishes.items())
    made = f"{settings['model']}, seed {settings['seed']}, {settings['seconds']:g} s"
    print(f"{made}, {asked}: {title}")
    for kind, path in files.items():
        print(f"{kind.ljust(8)} {path}")
    if plain.codes is None and np.array_equal(plain.audio, steered.audio):
        print("the edit changed no sample: both pieces are the same")
    elif plain.codes is not None and torch.equal(plain.codes, steered.codes):
        print("the edit changed no token: both pieces are the same")
    if scores is not None:
        print(table(scores, wishes))
