"""Bring a published model to data/models/<model>: from a hub id or a local folder.

The source is in params.yaml, download_model.<model>; metrics/download_model/<model>.json counts the
files. A folder of that name which this stage did not make is refused, never replaced.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from musicscope.config import load_params
from musicscope.core.command_line import Parser
from musicscope.core.io import cache_dir, write_json
from musicscope.models.registry import download
from stages import run_stage


def filled(folder: Path) -> bool:
    """Tell whether a folder exists and is not empty."""
    return folder.is_dir() and any(folder.iterdir())


def made_here(name: str, note: Path) -> bool:
    """Tell by dvc.lock, or by its note, whether an earlier run made data/models/<name>."""
    lock = Path("dvc.lock")
    tree = yaml.safe_load(lock.read_text(encoding="utf-8")) if lock.is_file() else {}
    return f"download_model@{name}" in tree.get("stages", {}) or note.is_file()


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="a name in params.yaml: download_model")
    name = parser.parse_args().model
    params = load_params()
    if name not in params.download_model:
        sys.exit(f"params.yaml has no download_model.{name}; it has {list(params.download_model)}")
    target = Path(f"data/models/{name}")
    # A run that is killed before DVC writes dvc.lock leaves the note.
    note = cache_dir({"stage": "download_model", "name": name}) / "made"
    if filled(target) and not made_here(name, note):
        sys.exit(
            f"{target} is there and no run of download_model made it: move it away, or name the "
            "model otherwise in params.yaml (a folder put there by hand needs no download_model)"
        )
    note.touch()
    try:
        found = download(params.download_model[name], target)
    finally:
        if not filled(target):
            note.unlink(missing_ok=True)
    write_json(f"metrics/download_model/{name}.json", found)
    print(f"data/models/{name}: {found['files']} files, {found['bytes'] / 1e9:.2f} GB")


if __name__ == "__main__":
    run_stage(main)
