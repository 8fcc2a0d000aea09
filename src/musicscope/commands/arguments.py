"""Options of every command, without the imports that running it takes.

`musicscope <command> --help` and shell completion read them in a tenth of a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from musicscope.core.command_line import Parser, number, whole

BRANCHES = ("conditional", "both", "guidance")
"""As `musicscope.steering.edit.BRANCHES`, whose import takes seconds."""
FORMATS = ("sae-lens", "dictionary-learning", "hugging-face", "features")


def find_concept(parser: Parser) -> None:
    """Add the arguments of ``musicscope find-concept``."""
    add = parser.add_argument
    add("--model", required=True, help="a folder, or a name under data/models")
    add("--with", required=True, dest="with_dir", metavar="DIR", help="recordings with the concept")
    add(
        "--without",
        required=True,
        dest="without_dir",
        metavar="DIR",
        help="recordings without the concept",
    )
    add(
        "--features",
        choices=("sae", "usae", "both"),
        default="sae",
        help="dictionary to search: the model's SAE, the universal SAE, or both",
    )
    add("--slot", default="top1", help="slot of the SAE")
    add("--sae", metavar="DIR", help="folder of an SAE; default that of the slot in data/sae")
    add("--layer", help="hook point of --sae, where its files do not name it")
    add(
        "--out",
        metavar="DIR",
        help="new or empty folder for tables and excerpts (default: "
        "data/found/<name of the --with folder>)",
    )
    add("--seconds", type=number(above=0), default=10.0, help="longest window, in seconds")
    add("--windows", type=whole(1), default=4, help="most windows per recording")
    add(
        "--q",
        type=number(above=0, at_most=1),
        default=0.05,
        help="limit of the corrected p for a discovery",
    )
    add("--permutations", type=whole(1), default=2000, help="permutations of the labels, for p")
    add("--seed", type=whole(0), default=0, help="seed of permutations and resamples")
    parser.add_device()


class _Request(argparse.Action):
    """Collects concepts per direction; a bare --off or --on is of the --concept before it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        pending = getattr(namespace, "pending", [])
        if self.dest == "concept":
            namespace.pending = [*pending, values]
            return
        if values is None:
            if not pending:
                parser.error(f"{option_string}: name a concept, or give --concept before it")
            namespace.pending = []
        asked = pending if values is None else [values]
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), *asked])


def generate(parser: Parser) -> None:
    """Add the arguments of ``musicscope generate``."""
    add = parser.add_argument
    add("--model", help="a folder, or a name under data/models; default that of --concept")
    add("--prompt", action="append", help="description of the music; repeatable")
    add("--audio", action="append", metavar="FILE",
        help="recording to edit, for a model that turns audio into audio; repeatable")  # fmt: skip
    add("--off", action=_Request, nargs="?", default=[], metavar="CONCEPT",
        help="concept to switch off; repeatable")  # fmt: skip
    add("--on", action=_Request, nargs="?", default=[], metavar="CONCEPT",
        help="concept to switch on; repeatable")  # fmt: skip
    add("--concept", action=_Request, metavar="FOLDER",
        help="result of find-concept, followed by --off or --on; repeatable")  # fmt: skip
    add("--strength", type=number(), default=1.0,
        help="multiple of the strength chosen on validation prompts; default 1")  # fmt: skip
    add("--seed", type=whole(0), default=0, help="random seed, the same for both sounds; default 0")
    add("--seconds", type=number(above=0), help="duration; default 5, for --audio the whole file")
    add("--out", default="data/generated", metavar="DIR",
        help="folder to add the files to; default data/generated")  # fmt: skip
    add("--guidance", type=number(), help="guidance scale; default params.steer.guidance")
    add("--branch", choices=BRANCHES,
        help="rows of guided generation to edit; default as chosen by steer")  # fmt: skip
    add("--loop", choices=("open", "closed"),
        help="closed: edit only while a probe detects a need; default as chosen")  # fmt: skip
    add("--schedule", type=number(at_least=0), nargs=2, metavar=("START", "END"),
        help="seconds in which to edit; default all")  # fmt: skip
    add("--features", type=whole(1), metavar="N",
        help="number of features per concept; default as chosen by steer")  # fmt: skip
    add("--recipes", metavar="DIR", help="folder of recipes; default those of steer_full or steer")
    add("--sae", metavar="DIR", help="folder of the SAE of the recipes; default that in data/sae")
    add("--words", action="store_true", help="ask in the steered prompt too (... no guitar)")
    parser.add_device()


def demo(parser: Parser) -> None:
    """Add the arguments of ``musicscope demo``."""
    parser.add_argument("--out", default="data/demo", metavar="DIR",
                        help="folder to add the files to; default data/demo")  # fmt: skip
    parser.add_device()


def plan(parser: Parser) -> None:
    """Add the arguments of `musicscope plan`."""
    parser.add_argument("--params", default="params.yaml", help="the configuration to plan")
    parser.add_argument(
        "-S", "--set-param", action="append", default=[], metavar="KEY=VALUE", dest="sets",
        help="an override, as in dvc exp run; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--clips", type=whole(1), help="number of clips, in place of the size of the data set"
    )
    parser.add_argument(
        "--measure", action="store_true",
        help="time each local model on two clips of noise, in place of stored rates",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=number(above=0), metavar="GB",
        help="print the largest extract_activations.batch_clips for this memory per process",
    )  # fmt: skip
    parser.add_argument("--results", default="benchmarks/results", help="folder of stored rates")


def studio(parser: Parser) -> None:
    """Add the arguments of ``musicscope studio``."""
    add = parser.add_argument
    add(
        "--port",
        type=whole(1, 65535),
        help="port of the page; default the first free one from 7860",
    )
    parser.add_device()
    add("--open", action="store_true", help="open the page in the browser")
    add("--workspace", metavar="DIR", help="folder that holds data/; default this one")


def view(parser: Parser) -> None:
    """Add the arguments of ``musicscope view``."""
    add = parser.add_argument
    add(
        "--port",
        type=whole(1, 65535),
        help="port of the pages; default the first free one from 8000",
    )
    add("--open", action="store_true", help="open the report in the browser")
    add("--workspace", metavar="DIR", help="folder that holds data/; default this one")


def export(parser: Parser) -> None:
    """Add the arguments of ``musicscope export``."""
    add = parser.add_argument
    add("--model", required=True, help="name of the model, or its folder")
    add("--to", required=True, choices=FORMATS, help="format of the files")
    add("--slot", default="top1", help="slot of the SAE; default top1")
    add("--sae", metavar="DIR", help="folder of an SAE or universal SAE; default data/sae/...")
    add("--activations", metavar="DIR",
        help="activation store of the layer; default data/activations/<model>/<slot>")  # fmt: skip
    add("--out", metavar="DIR", help="new or empty folder; default data/exported/...")
    add("--license", help="licence in the model card; default that of the model's README.md")
    add("--push", metavar="OWNER/NAME", help="upload to this model repository of the hub")
    add("--private", action="store_true", help="make a new repository private")
    add("--clips", type=whole(1), default=500,
        help="most test clips that numbers of features are of; default 500")  # fmt: skip


def import_sae(parser: Parser) -> None:
    """Add the arguments of ``musicscope import``."""
    add = parser.add_argument
    add("folder", help="folder that SAELens or dictionary_learning saved")
    add("--model", required=True, help="name of the model, or its folder")
    add("--layer", help="hook point, such as layers.11; default as the files say")
    add("--k", type=whole(1), help="average of active latents, where the files lack it")
    add("--check", action="store_true", help="load the model, and compare the width of the layer")
    add("--out", metavar="DIR", help="new or empty folder; default data/imported/<name>")


def completion(parser: Parser) -> None:
    """Add the arguments of ``musicscope completion``."""
    parser.add_argument("shell", choices=("bash", "zsh"), help="shell to print the script for")


ARGUMENTS: dict[str, Callable[[Parser], None]] = {
    "completion": completion,
    "demo": demo,
    "export": export,
    "find-concept": find_concept,
    "generate": generate,
    "import": import_sae,
    "plan": plan,
    "studio": studio,
    "view": view,
}
"""Command -> the function that adds its options."""
