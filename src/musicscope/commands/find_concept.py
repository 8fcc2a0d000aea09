"""Find the features of a concept from a folder of recordings with it and one without it.

    musicscope find-concept --model nano-small --with guitars --without others
    musicscope find-concept --model PATH --sae PATH --with guitars --without others

Reads all formats that libsndfile reads. Writes features.csv, moments.csv, report.json and excerpts
as WAV files into --out, a new or empty folder. The default is data/found/<name of the --with
folder>, with a number if that exists. steering.json holds what `musicscope generate --concept
FOLDER --off` needs. See `musicscope.features.association` for the statistics.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from musicscope.core.io import write_json
from musicscope.core.user_outputs import NewFolder, new_folder
from musicscope.dictionaries.core import TopKSAE, UniversalSAE
from musicscope.dictionaries.formats import load_sae_folder
from musicscope.finder.recordings import list_recordings
from musicscope.finder.run import ConceptReport, find_concept, write_excerpts
from musicscope.steering.found import FoundConcept, latents_of, sae_digest, save_found
from musicscope.steering.recipes import load_sae, sae_folder

DEFAULT_OUT = "data/found"
"""Holds one folder per search without --out."""
USAE = "data/usae/seed-0"


def run(args: argparse.Namespace) -> dict[str, object]:
    """Find, print and save; ValueError or FileNotFoundError if an input cannot be used."""
    for folder in (args.with_dir, args.without_dir):
        list_recordings(folder)
    name = Path(args.model).name
    default = Path(DEFAULT_OUT) / (Path(args.with_dir).resolve().name or "recordings")
    inputs = {
        "the folder of --with": args.with_dir,
        "the folder of --without": args.without_dir,
        "the model": args.model if Path(args.model).exists() else Path("data/models") / args.model,
        "the SAE": args.sae or Path("data/sae") / name / args.slot,
        "the universal SAE": Path("data/usae"),
    }
    with new_folder(args.out, default, inputs) as out:
        return _find_into(out, args, name)


def _find_into(out: NewFolder, args: argparse.Namespace, name: str) -> dict[str, object]:
    from musicscope.models.registry import load_model

    layer, sae = _sae(args, name)
    features: dict[str, TopKSAE | UniversalSAE] = {}
    if args.features in ("sae", "both"):
        features["sae"] = sae
    if args.features in ("usae", "both"):
        usae = features["usae"] = UniversalSAE.load(USAE, args.device)
        if usae.slot != args.slot:
            raise ValueError(f"data/usae is of slot {usae.slot}: give --slot {usae.slot}")
    model = load_model(args.model, args.device)
    report = find_concept(
        model, features, args.with_dir, args.without_dir, layer, seconds=args.seconds,
        windows=args.windows, permutations=args.permutations, q=args.q, seed=args.seed,
    )  # fmt: skip
    print(report.text())  # before writing: a full disk must not lose it
    save_report(report, out.scratch)
    if "sae" in features:
        save_found(_steerable(args, report, layer), out.scratch)
    folder = out.publish()
    print(f"tables and {len(report.excerpts)} excerpts are in {folder}")
    if "sae" in features and len(report.discoveries("sae")):
        print(f"steer with these features: musicscope generate --concept {folder} --off")
    found = {name: report.discoveries(name).to_dict("records") for name in report.tables}
    return {"folder": str(folder), "recordings": dict(report.recordings), "found": found}


def _steerable(args: argparse.Namespace, report: ConceptReport, layer: str) -> FoundConcept:
    """Collect what steering with the features of the SAE needs."""
    sae = str(Path(args.sae).absolute()) if args.sae else ""
    name = Path(args.model).name
    return FoundConcept(
        concept=Path(args.with_dir).resolve().name or "recordings",
        model=str(Path(args.model).absolute()) if Path(args.model).exists() else args.model,
        layer=layer,
        slot=args.slot,
        sae=sae,
        sae_sha256=sae_digest(sae or sae_folder(name, args.slot)),
        discoveries=len(report.discoveries("sae")),
        latents=latents_of(report.tables["sae"], report.usual["sae"], report.q),
    )


def _sae(args: argparse.Namespace, name: str) -> tuple[str, TopKSAE]:
    """Load hook point and SAE: of a slot, or of a folder in any format that is known."""
    if not args.sae:
        return load_sae(name, args.slot, args.device)
    sae, about = load_sae_folder(args.sae, args.device)
    if not (layer := args.layer or about.layer):
        raise ValueError(f"{args.sae} names no hook point: give --layer, such as layers.3")
    return layer, sae


def save_report(report: ConceptReport, folder: Path) -> None:
    """Write features.csv, moments.csv, report.json and the excerpts into a new folder."""
    tables = [t.assign(dictionary=name) for name, t in report.tables.items()]
    pd.concat(tables).to_csv(folder / "features.csv", index=False, float_format="%.6g")
    report.moments.to_csv(folder / "moments.csv", index=False, float_format="%.6g")
    write_excerpts(folder, report.excerpts, report.rate)
    about = {
        "recordings": dict(report.recordings),
        "problems": [p.texts() for p in report.problems],
        "window_seconds": report.plan.seconds,
        "windows": report.plan.windows,
        "cues": dict(report.cues),
        "confounding": report.confounding.as_metrics(),
        "q": report.q,
        "smallest_p": report.smallest_p,
        "discoveries": {n: len(report.discoveries(n)) for n in report.tables},
    }
    write_json(folder / "report.json", about)
