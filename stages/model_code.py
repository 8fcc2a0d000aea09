"""Write digests of the loader files of a model's family: data/model_code/<model>.json.

Stages that run the model depend on this file instead of every family's loader, so an edit of one
family reruns nothing of another. Reads data/models/<model> to tell the family.
"""

from __future__ import annotations

from pathlib import Path

from musicscope.core.io import write_json
from musicscope.models.registry import detect_system
from stages import run_stage, stage_args
from tools.import_closure import digest, loader_files

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    (name,) = stage_args(__doc__, "model")
    system = detect_system(Path("data/models") / name)
    files = {file: digest([file], ROOT) for file in loader_files(ROOT, system)}
    write_json(f"data/model_code/{name}.json", {"system": system, "files": files})


if __name__ == "__main__":
    run_stage(main)
