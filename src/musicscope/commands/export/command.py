"""Export an SAE, or its features, in the files of other tools.

    musicscope export --model nano-small --to sae-lens
    musicscope export --model nano-small --to hugging-face --push OWNER/NAME
    musicscope export --model nano-small --to features

sae-lens             cfg.json and sae_weights.safetensors, for SAE.load_from_disk
dictionary-learning  config.json and ae.pt, for load_dictionary
hugging-face         the files of sae-lens beside README.md, a model card, and metrics.json
features             features.parquet, columns.json, and one JSON file per feature in Neuronpedia's
                     layout; needs the activation store

Writes into --out, a new or empty folder. The default is data/exported/<model>-<slot>-<format>, with
a number if that exists. --push uploads that folder with the token of `hf auth login`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from musicscope.core.io import read_json, write_json
from musicscope.core.user_outputs import new_folder

if TYPE_CHECKING:
    from musicscope.dictionaries.core import TopKSAE
    from musicscope.dictionaries.formats import About

METRICS, ACTIVATIONS = Path("metrics"), Path("data/activations")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Write the folder, and with --push upload it; errors say which file or option is wrong."""
    if args.push and args.to != "hugging-face":
        raise ValueError("--push uploads a folder with a model card: give --to hugging-face")
    given, name = Path(args.model), Path(args.model).name
    folder = Path(args.sae or Path("data/sae") / name / args.slot / "seed-0")
    store = Path(args.activations or ACTIVATIONS / name / args.slot)
    inputs = {"the SAE": folder, "the activations": store}
    if (weights := given if given.exists() else Path("data/models") / name).exists():
        inputs["the model"] = weights
    default = Path("data/exported") / f"{name}-{args.slot}-{args.to}"
    with new_folder(args.out, default, inputs) as out:
        _write(args, name, folder, store, weights, out.scratch)
        placed = out.publish()
        print(f"{args.to}: {placed}")
        result: dict[str, object] = {"format": args.to, "folder": str(placed)}
        if args.push:
            result["url"] = push(placed, args.push, args.private)
            print(f"uploaded: {result['url']}")
    return result


def _write(
    args: argparse.Namespace, name: str, folder: Path, store: Path, weights: Path, out: Path
) -> None:
    from musicscope.commands.export import card, features
    from musicscope.dictionaries.formats import save_dictionary_learning, save_sae_lens

    sae, about = load(folder, name, store)
    if args.to == "features":
        features.write(out, sae, about, name, args.slot, store, args.clips)
    elif args.to == "dictionary-learning":
        save_dictionary_learning(sae, out, about)
    else:
        save_sae_lens(sae, out, about)
    if args.to == "hugging-face":
        # Metrics are of the SAE of the slot, and say nothing about another.
        numbers = {} if args.sae else measured(name, args.slot)
        licence = args.license or card.license_of(weights)
        card.write(out, sae, about, args.slot, numbers, licence)
        write_json(out / "metrics.json", numbers)


def load(folder: Path, model: str, store: Path) -> tuple[TopKSAE, About]:
    """Load an SAE, or a model's side of a universal SAE, and what is known about it."""
    from dataclasses import replace

    from musicscope.dictionaries.core import USAE_FILE, UniversalSAE
    from musicscope.dictionaries.formats import About, load_sae_folder, one_model

    manifest = store / "manifest.json"
    known = read_json(manifest) if manifest.is_file() else {}
    if (folder / USAE_FILE).is_file():
        sae, about = one_model(UniversalSAE.load(folder), model), About()
    else:
        sae, about = load_sae_folder(folder)
    layer = about.layer or known.get("config", {}).get("layer", "")
    if not layer:
        raise ValueError(f"{folder}/config.json names no hook point, and {manifest} is missing")
    frames = max(known.get("clips", {}).get("frames", ()), default=about.frames)
    data = "" if not known else f"clips {known['config']['clips_sha256'][:12]}"
    return sae, replace(
        about, model=model, layer=layer, frames=int(frames), data=about.data or data
    )


def measured(model: str, slot: str) -> dict[str, object]:
    """Read the committed metrics of an SAE and of the data; empty where there are none."""
    files = {
        "train_sae": METRICS / "train_sae" / f"{model}-{slot}.json",
        "probe": METRICS / "probe" / f"{model}-{slot}.json",
        "prepare_data": METRICS / "prepare_data.json",
    }
    return {name: read_json(path) for name, path in files.items() if path.is_file()}


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to a model repository of the Hugging Face hub and return its address.

    ValueError: the hub refuses, or cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add an SAE")
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError) as error:
        raise ValueError(
            f"--push {repo}: {error}; the files are in {folder}. Check the name, the network and "
            "the token (hf auth login)"
        ) from error
    return f"{api.endpoint}/{repo}"
