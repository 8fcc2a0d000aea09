"""Write docs/params.schema.json, with which editors check, complete and explain params.yaml.

Run `python -m tools.params_schema` after an edit of musicscope.config; a test fails until then.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

from pydantic import TypeAdapter

from musicscope.config import BASES, Params
from musicscope.core.command_line import run_program
from tools.import_closure import ROOT

PATH = ROOT / "docs/params.schema.json"


def _descriptions(cls: type) -> dict[str, str]:
    """Description per field; pydantic reads only the docstrings of the class itself."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            fields = TypeAdapter(base).json_schema()["properties"]
            found |= {k: v["description"] for k, v in fields.items() if "description" in v}
    return found


def _finish(section: dict[str, Any], cls: type) -> None:
    """Describe inherited fields; drop titles, which only repeat the names of fields."""
    del section["title"]
    for name, text in _descriptions(cls).items():
        section["properties"][name]["description"] = text
    for value in section["properties"].values():
        value.pop("title", None)
        if "description" in value:
            value["description"] = " ".join(value["description"].split())
    section["description"] = " ".join(section["description"].split())


def _sections(cls: type) -> typing.Iterator[type]:
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from _sections(part)


def schema() -> str:
    """JSON schema of params.yaml as text."""
    whole = TypeAdapter(Params).json_schema()
    for cls in dict.fromkeys(_sections(Params)):
        _finish(whole if cls is Params else whole["$defs"][cls.__name__], cls)
    for name, base in BASES.items():
        cls = typing.get_type_hints(Params)[name].__name__
        section = dict(whole["$defs"][cls])
        del section["required"]
        section["description"] += f" Holds only what differs from {base}."
        whole["properties"][name] = section
        if f'"#/$defs/{cls}"' not in json.dumps(whole):
            del whole["$defs"][cls]
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}
    return json.dumps(whole, indent=1) + "\n"


if __name__ == "__main__":
    run_program(lambda: PATH.write_text(schema(), encoding="utf-8"))
