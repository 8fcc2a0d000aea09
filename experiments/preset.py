"""Run the pipeline with the keys of experiments/<name>.yaml (`just experiment <name>`).

python -m experiments.preset musicgen-folder               dvc exp run -n musicgen-folder -S ...
python -m experiments.preset musicgen-folder --plan        what `musicscope plan` says about it
python -m experiments.preset musicgen-folder train_sae     further words go to dvc exp run
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from musicscope.core.command_line import Parser, run_program

FOLDER = Path(__file__).resolve().parent


def override(key: str, value: object) -> str:
    """Write a key as `dvc exp run -S` takes it."""
    if isinstance(value, list):
        return f"{key}=[{','.join(map(str, value))}]"
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def presets() -> dict[str, list[str]]:
    """Name -> overrides (`key=value`) of every preset."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.yaml"))}
    return {
        name: [override(key, value) for key, value in yaml.safe_load(text).items()]
        for name, text in files.items()
    }


def command(name: str, words: list[str]) -> list[str]:
    """Return the command of a preset; ValueError names those that there are."""
    known = presets()
    if name not in known:
        raise ValueError(f"no experiments/{name}.yaml; there are: {', '.join(known)}")
    sets = [word for text in known[name] for word in ("-S", text)]
    if "--plan" in words:
        more = [word for word in words if word != "--plan"]
        return [sys.executable, "-m", "musicscope.commands.cli", "plan", *sets, *more]
    return ["dvc", "exp", "run", "-n", name, *sets, *words]


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="name of a file of this folder, without .yaml")
    args, words = parser.parse_known_args()
    sys.exit(subprocess.run(command(args.name, words)).returncode)


if __name__ == "__main__":
    run_program(main)
