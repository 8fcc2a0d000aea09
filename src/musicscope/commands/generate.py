"""Generate music plain and with concepts switched off or on, with both judges' scores.

    musicscope generate --model nano-small --prompt "calm guitar music" --on bass
    musicscope generate --model my-rave --audio song.flac --on bass
    musicscope generate --concept data/found/voice --off --prompt "a song"
    musicscope generate --concept data/found/voice --off --on bass

A model that turns audio into audio (RAVE) edits recordings: both sounds are its reconstructions.
The stages `steer_full` and `steer` learn the concepts; --concept names a folder that find-concept
wrote, whose features are edited as they are. Without --prompt it plays without a caption.

Writes two WAV files and a JSON file with all settings. The names contain the prompt, the seed and a
hash of the settings, so other settings make other files, and the same settings the same bytes.
Files are added to the folder of --out: if a file of that name has other content, all three new
files get a number.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from musicscope.config import load_params
from musicscope.core.io import Metrics, sha256, write_json
from musicscope.core.user_outputs import add_files, folder_to_add_to
from musicscope.judges.pair import Judges, load_judges
from musicscope.steering.edit import ALWAYS, BRANCHES, Steering
from musicscope.steering.found import FoundConcept, is_found, load_found
from musicscope.steering.recipes import doubts, load_recipe, load_steering, recipe_folder
from musicscope.steering.session import (
    KINDS,
    MODELS,
    AudioInput,
    Scores,
    Session,
    Sound,
    TextInput,
    check_model,
    check_requests,
    judge,
    read_audio,
    score_table,
)
from musicscope.steering.subjects import edit_prompt

JUDGES = "data/judge"
TRUST = "scores of one sound are rough; metrics/train_judge.json shows how reliable they are"


def usual_guidance() -> float | None:
    """Return the scale at which strengths were chosen (params.steer.guidance).

    None without params.yaml: the model's own scale.
    """
    return load_params().steer.guidance if Path("params.yaml").is_file() else None


def requests_of(off: list[str], on: list[str], pending: Sequence[str] = ()) -> dict[str, str]:
    """Make {"guitar": "off"} from the options; ValueError for none, or for both at once.

    `pending`: folders of --concept that no --off or --on follows.
    """
    if pending:
        raise ValueError(f"--concept {pending[0]}: add --off or --on after it")
    if both := set(off) & set(on):
        raise ValueError(f"{', '.join(sorted(both))}: off or on, not both")
    if not off and not on:
        raise ValueError("name a concept: --off CONCEPT, --on CONCEPT, or several of them")
    return {**dict.fromkeys(off, "off"), **dict.fromkeys(on, "on")}


def wav_bytes(sound: Sound) -> bytes:
    """Encode a sound as 16-bit WAV."""
    stream = io.BytesIO()
    audio = np.clip(sound.audio, -1, 1)
    soundfile.write(stream, audio, sound.rate, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def slug(prompt: str) -> str:
    """Shorten a prompt to a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "music"


def write_files(
    folder: Path, stem: str, sounds: Mapping[str, bytes], about: Mapping[str, object]
) -> dict[str, Path]:
    """Add <stem>-<kind>.wav of every kind to a folder, and `about` beside them.

    Existing files with the same content are reused. If one has other content (made with another
    model, say), it stays and all new files get a number.

    Raises:
        OutputError: the folder cannot be written.
    """

    def contents(number: str) -> dict[str, bytes]:
        names = {kind: f"{stem}-{kind}{number}.wav" for kind in sounds}
        files = {names[kind]: sound for kind, sound in sounds.items()}
        with tempfile.TemporaryDirectory() as scratch:
            path = (Path(scratch) / names["steered"]).with_suffix(".json")
            write_json(path, {**about, "files": names})
            return {**files, path.name: path.read_bytes()}

    paths = [path for path in add_files(folder, contents).values() if path.suffix == ".wav"]
    return dict(zip(sounds, paths, strict=True))


def describe(steering: Steering) -> dict[str, object]:
    """List the edits, JSON-able."""
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


def table(scores: Scores, requests: Mapping[str, str]) -> str:
    """Format the scores of requested and of the most probable other families as lines."""
    heads, rows = score_table(scores, requests)
    lines = ["  ".join(["family".ljust(20), *(head.rjust(len(head)) for head in heads)])]
    for label, values in rows:
        cells = [
            ("-" if v is None else f"{v:.3f}").rjust(len(h))
            for v, h in zip(values, heads, strict=True)
        ]
        lines.append("  ".join([label.ljust(20), *cells]))
    return "\n".join(lines)


# --- the command ------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> list[Metrics]:
    """Generate, write, judge. ValueError and FileNotFoundError say what is wrong with the input."""
    asked = requests_of(args.off, args.on, getattr(args, "pending", ()))
    found = {concept: load_found(concept) for concept in asked if is_found(concept)}
    if found and not args.model:
        args.model = next(iter(found.values())).model
    if not args.model:
        raise ValueError("give --model")
    if found and not args.prompt and not args.audio:
        args.prompt = [""]
        print("no --prompt: music without a caption", file=sys.stderr)
    if bool(args.prompt) == bool(args.audio):
        raise ValueError("give --prompt TEXT, or --audio FILE to a model that edits audio (RAVE)")
    name, requests = Path(args.model).name, _by_name(asked, found)
    with folder_to_add_to(args.out, _inputs(args, found)) as out:
        edit = partial(_steering, args, asked, found)
        jobs = (_from_audio if args.audio else _from_prompts)(args, requests, edit)
        judges, made = None, []
        for number, (settings, title, pair) in enumerate(jobs):
            judges = _judges() if number == 0 else judges
            made.append(_hand_over(out, requests, {"model": name, **settings}, title, pair, judges))
    if judges is not None:
        print(TRUST)
    return made


def _by_name(asked: Mapping[str, str], found: Mapping[str, FoundConcept]) -> dict[str, str]:
    """Return requests with the names of found concepts in place of their folders."""
    names = [found[c].concept if c in found else c for c in asked]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two concepts are called {twice[0]}: give one, or rename a folder")
    return dict(zip(names, asked.values(), strict=True))


def _inputs(args: argparse.Namespace, found: Mapping[str, FoundConcept]) -> dict[str, Path]:
    """Return all inputs by their name in error messages."""
    given, name = Path(args.model), Path(args.model).name
    return {
        "the model": given if given.exists() else Path(MODELS) / given,
        "the SAEs": Path(args.sae or Path("data/sae") / name),
        "the recipes": Path(args.recipes or recipe_folder(name)),
        "the judges": Path(JUDGES),
        **{f"--concept {folder}": Path(folder) for folder in found},
        **{f"the SAE of {c.concept}": c.folder() for c in found.values()},
        **{f"--audio {file}": Path(file) for file in args.audio or ()},
    }


Job = tuple[dict[str, object], str, tuple[Sound, Sound]]
"""Settings, title, and both sounds."""


def _steering(
    args: argparse.Namespace, asked: Mapping[str, str], found: Mapping[str, FoundConcept]
) -> tuple[str, Steering]:
    """Make hook point and edits of learnt concepts, and of found ones by their folder."""
    name = Path(args.model).name
    folder = Path(args.recipes or recipe_folder(name))
    requests = {concept: direction for concept, direction in asked.items() if concept not in found}
    if not args.recipes and requests:
        check_requests(name, requests)
    for doubt in [*doubts(folder, requests), *(c.caution(args.features) for c in found.values())]:
        print(f"warning: {doubt}", file=sys.stderr)
    schedule = ALWAYS if args.schedule is None else tuple(args.schedule)
    if not 0 <= schedule[0] < schedule[1]:
        raise ValueError(f"--schedule {schedule[0]:g} {schedule[1]:g}: seconds, 0 <= START < END")
    if args.features is not None and args.features < 1:
        raise ValueError(f"--features {args.features}: at least 1")
    if requests:
        layer, steering = load_steering(
            name, requests, args.strength, branch=args.branch, schedule=schedule,
            n_features=args.features, loop=args.loop, words=args.words, folder=args.recipes,
            sae_path=args.sae, device=args.device,
        )  # fmt: skip
        sae = load_recipe(folder, next(iter(requests))).sae
    else:
        first = next(iter(found.values()))
        layer, sae = first.layer, first.sae_sha256
        steering = Steering(
            first.load_sae(args.device, args.sae), (), args.branch or BRANCHES[0], schedule
        )
    if found and args.loop == "closed":
        raise ValueError("--loop closed: find-concept learns no probe that tells when to edit")
    for concept in found.values():
        if concept.model_name != name:
            raise ValueError(f"{concept.concept} was found in {concept.model_name}, not in {name}")
        if (concept.layer, concept.sae_sha256) != (layer, sae):
            raise ValueError(
                f"{concept.concept} was found at {concept.layer} in another layer or SAE than the "
                f"other concepts ({layer}): switch them one at a time"
            )
    edits = [c.edit(asked[key], args.strength, args.features) for key, c in found.items()]
    return layer, replace(steering, concepts=(*steering.concepts, *edits))


def _from_prompts(
    args: argparse.Namespace, requests: Mapping[str, str], edit: Callable[[], tuple[str, Steering]]
) -> Iterator[Job]:
    """Generate both sounds of every prompt."""
    seconds = 5.0 if args.seconds is None else args.seconds
    guidance = usual_guidance() if args.guidance is None else args.guidance
    sources = [TextInput(prompt, seconds, args.seed, guidance) for prompt in args.prompt]
    check_model(args.model)
    layer, steering = edit()
    session = Session.open(args.model, args.device)
    for source in sources:
        settings = {"layer": layer, **asdict(source), **describe(steering)}
        steered = source
        if args.words:
            steered = replace(source, prompt=edit_prompt(source.prompt, requests))
            settings["prompt_steered"] = steered.prompt
        pair = session.draw_pair(source, layer, steering, steered_source=steered)
        yield settings, source.prompt, pair


def _from_audio(
    args: argparse.Namespace, requests: Mapping[str, str], edit: Callable[[], tuple[str, Steering]]
) -> Iterator[Job]:
    """Reconstruct every file plain and steered."""
    given = {"--guidance": args.guidance, "--branch": args.branch, "--words": args.words or None}
    if wrong := [option for option, value in given.items() if value is not None]:
        raise ValueError(f"{', '.join(wrong)}: of prompts alone, not of --audio")
    check_model(args.model)
    session = Session.open(args.model, args.device, audio=True)
    layer, steering = edit()
    rate = session.model.sample_rate
    sources = {
        Path(file): AudioInput(read_audio(file, rate, args.seconds), args.seed)
        for file in args.audio
    }
    for path, source in sources.items():
        about = {
            "audio": path.name, "audio_sha256": sha256(path), "seed": args.seed,
            "seconds": len(source.audio) / rate,
        }  # fmt: skip
        settings = {"layer": layer, **about, **describe(steering)}
        yield settings, path.name, session.draw_pair(source, layer, steering)


def _judges() -> Judges | None:
    """Load the judges; without them print what to do and return None."""
    try:
        return load_judges(JUDGES)
    except FileNotFoundError as error:
        print(f"no scores: {error} (or fetch it: dvc pull {JUDGES})", file=sys.stderr)
        return None


def _hand_over(
    out: Path, requests: Mapping[str, str], settings: dict[str, object], title: str,
    pair: tuple[Sound, Sound], judges: Judges | None,
) -> Metrics:  # fmt: skip
    """Write both sounds with their settings, and print files and scores."""
    plain, steered = pair
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    stem = f"{slug(title)}-seed{settings['seed']}-{digest}"
    sounds = {kind: wav_bytes(sound) for kind, sound in zip(KINDS, pair, strict=True)}
    scores = None if judges is None else judge(judges, pair)
    files = write_files(out, stem, sounds, {**settings, "wishes": requests, "scores": scores})
    asked = ", ".join(f"{concept} {direction}" for concept, direction in requests.items())
    made = f"{settings['model']}, seed {settings['seed']}, {settings['seconds']:g} s"
    print(f"{made}, {asked}: {title}")
    for kind, path in files.items():
        print(f"{kind.ljust(8)} {path}")
    if plain.same_as(steered):
        unit = "sample" if plain.codes is None else "token"
        print(f"the edit changed no {unit}: both sounds are the same")
    if scores is not None:
        print(table(scores, requests))
        for concept in sorted(set(requests) - {f for of in scores.values() for f in of}):
            print(f"{concept}: not judged, since no judge knows it; compare the sounds by ear")
    names = {kind: str(path) for kind, path in files.items()}
    return {"title": title, "requests": dict(requests), "files": names, "scores": scores}
