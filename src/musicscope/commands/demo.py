"""First sound: a piece as a model plays it, and again with one concept switched off or on.

    musicscope demo

Takes the edit with the highest headline number in metrics/steer_full, and the prompt of its first
test piece. Models, recipes and their SAEs are in the repository: no stage needs to have run. Adds
two WAV files, their settings and a page to listen to them to the folder of --out.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import jinja2

from musicscope.commands import cli, generate
from musicscope.core.io import Metrics, read_json
from musicscope.core.stats import Estimate
from musicscope.core.user_outputs import add_files
from musicscope.steering.recipes import FULL_FOLDER

METRICS = Path("metrics/steer_full")


@dataclass(frozen=True)
class Best:
    """An edit with its numbers on test prompts."""

    model: str
    concept: str
    direction: str
    headline: Estimate
    """Harmonic mean of success, prompt kept and quality"""
    success: Estimate
    random: Estimate
    """Success of random latents"""
    prompt: str


def best_edit() -> Best:
    """Find the edit of latents with the highest headline number.

    FileNotFoundError outside a checkout; ValueError if no judge can tell any concept.
    """
    if not (files := sorted(METRICS.glob("*.json"))):
        raise FileNotFoundError(f"{METRICS} holds no results: run this in a checkout of musicscope")
    found = []
    for file in files:
        examples = read_json(Path(FULL_FOLDER) / file.stem / "examples" / "index.json")["examples"]
        prompts = {tuple(example["wishes"]): example.get("prompt") for example in examples}
        for concept, directions in read_json(file)["concepts"].items():
            for direction, entry in directions.items():
                ours, random = (entry["methods"][m] for m in ("sae", "random_feature"))
                prompt = prompts.get((f"{concept} {direction}",))
                if ours["headline"]["value"] is not None and prompt is not None:
                    numbers = (ours["headline"], ours["success"], random["success"])
                    found.append(
                        Best(file.stem, concept, direction, *map(Estimate.read, numbers), prompt)
                    )
    if not found:
        raise ValueError(f"{METRICS}: no judge can tell any of the concepts, so nothing is shown")
    return max(found, key=lambda best: best.headline.value)


def run(args: argparse.Namespace) -> Metrics:
    """Generate the pair and write the page."""
    best = best_edit()
    words = ["generate", "--model", best.model, "--prompt", best.prompt, "--out", args.out,
             f"--{best.direction}", best.concept, "--device", args.device]  # fmt: skip
    (made,) = generate.run(cli.build("generate")[0].parse_args(words))
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_suffix(".jinja").read_text(encoding="utf-8")
    )
    files = {kind: Path(path).name for kind, path in made["files"].items()}
    text = page.render(best=best, files=files, command=" ".join(map(quoted, words)))
    (path,) = add_files(args.out, lambda n: {f"index{n}.html": text.encode()}).values()
    print(f"listen: {path}")
    return {**made, "page": str(path)}


def quoted(word: str) -> str:
    """Quote a word of a command line if it has spaces."""
    return f'"{word}"' if " " in word else word
