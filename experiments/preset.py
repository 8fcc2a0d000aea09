"""Run the pipeline with the keys of experiments/<name>.yaml (`just experiment <name>`).

python -m experiments.preset musicgen-folder               dvc exp run -n musicgen-folder -S ...
python -m experiments.preset musicgen-folder --plan        what `musicscope plan` says about it
python -m experiments.preset musicgen-folder train_sae     further words go to dvc exp run

`slots` may be a rule of experiments.slots, here and in -S: all, or top 3. DVC gets the list.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from experiments import slots
from musicscope.commands.plan.estimate import overridden
from musicscope.core.command_line import Parser, run_program

FOLDER = Path(__file__).resolve().parent


def override(key: str, value: object) -> str:
    """Write a key as `dvc exp run -S` takes it."""
    if isinstance(value, list):
        return f"{key}=[{','.join(map(str, value))}]"
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def expanded(text: str, models: list[str]) -> str:
    """Replace a rule in an override of slots by the list that DVC needs."""
    key, _, rule = text.partition("=")
    if key != "slots" or rule.startswith("["):
        return text
    return slots.overrides(rule.split(), models)[0]


def read_presets() -> dict[str, dict[str, Any]]:
    """Name -> content of every preset."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.yaml"))}
    return {name: yaml.safe_load(text) for name, text in files.items()}


def models_of(values: dict[str, Any]) -> list[str]:
    """Models that a preset studies."""
    return values.get("models") or slots.listed_models()


def presets() -> dict[str, list[str]]:
    """Name -> overrides (`key=value`) of every preset."""
    return {
        name: [expanded(override(key, value), models_of(values)) for key, value in values.items()]
        for name, values in read_presets().items()
    }


def command(name: str, words: list[str]) -> list[str]:
    """Return the command of a preset; ValueError names those that there are, or a wrong value."""
    known = presets()
    if name not in known:
        raise ValueError(f"no experiments/{name}.yaml; there are: {', '.join(known)}")
    models = models_of(read_presets()[name])
    words = [expanded(word, models) for word in words]
    params = overridden(slots.PARAMS, known[name])
    slots.check(params, {model: slots.depth(model) for model in params.models})
    sets = [word for text in known[name] for word in ("-S", text)]
    if "--plan" in words:
        more = [word for word in words if word != "--plan"]
        return [sys.executable, "-m", "musicscope.commands.cli", "plan", *sets, *more]
    return ["dvc", "exp", "run", "-n", name, *sets, *words]


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="name of a file of this folder, without .yaml")
    args, words = parser.parse_known_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(subprocess.run(command(args.name, words)).returncode)


if __name__ == "__main__":
    run_program(main)
