"""Read a YAML file into frozen dataclasses, with errors that name the key.

Sections are dataclasses below `Section`; pydantic checks a file against their annotations. Every
field is required. Only files are checked: code may build or `replace` sections with any values.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

from omegaconf import OmegaConf
from pydantic import AfterValidator, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

T = TypeVar("T")
Location = tuple[str | int, ...]


class ParamsError(ValueError):
    """A value in params.yaml that cannot be used; the message names its full key."""


# --- types of fields --------------------------------------------------------------------------


class Section:
    """Base of all sections: no unknown key, no conversion of types, no infinity."""

    __pydantic_config__ = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Sections(dict[str, T]):
    """Sections under names that the file chooses; hashable, and not to be changed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):  # it would run, or count, twice
        raise ValueError("has an entry twice")
    return values


FOLDER_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
SECTION_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"  # DVC would read a dot as the end of the name
SLOT = r"^(top[1-9]\d*|(layer|cross)\d+)$"
DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
PAIR = r"^\w+-(on|off)(\+\w+-(on|off))+$"
LATENT_SCORE = r"^(output|toward|(share|effect|partial|auroc)(\+(output|toward))?)$"
ALLOWED = {
    FOLDER_NAME: "letters, digits, '_', '.', '-' only (it becomes a folder name)",
    SECTION_NAME: "a name of letters, digits, '_', '-'",
    SLOT: "top<n> (rank in the ablation), layer<i> or cross<i>",
    DEVICE: "auto, cpu, cuda or cuda:<index>",
    LATENT_SCORE: "share, effect, partial, auroc, output, toward, or two such as share+output",
    PAIR: "<concept>-off+<concept>-on and the like",
}
"""What each pattern means, for error messages."""

FolderName = Annotated[str, Field(pattern=FOLDER_NAME)]
SlotName = Annotated[str, Field(pattern=SLOT)]
Text = Annotated[str, Field(min_length=1)]
_UNIQUE: dict[str, JsonValue] = {"uniqueItems": True}
Distinct = Annotated[
    tuple[T, ...], Field(min_length=1, json_schema_extra=_UNIQUE), AfterValidator(_distinct)
]
"""A list of at least one entry, without repeated entries."""
DistinctOrNone = Annotated[
    tuple[T, ...], Field(json_schema_extra=_UNIQUE), AfterValidator(_distinct)
]
"""A list without repeated entries, which may be empty."""
ByName = Annotated[
    dict[Annotated[str, Field(pattern=SECTION_NAME)], T],
    Field(json_schema_extra={"additionalProperties": False}),
    AfterValidator(Sections),
]
"""Sections under names that the file chooses."""


# --- errors -----------------------------------------------------------------------------------

Known = dict[str, "Known"]
"""Known keys; each with the keys below it, or with none."""


def _known(cls: type) -> Known:
    known: Known = {}
    for name, hint in typing.get_type_hints(cls).items():
        below = (t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t))
        known[name] = next((_known(section) for section in below), {})
    fields = dataclasses.fields(cls)  # ty: ignore[invalid-argument-type]  sections are dataclasses
    return {field.name: known[field.name] for field in fields}


def _leaves(known: Known, prefix: str = "") -> Iterator[str]:
    for name, below in known.items():
        yield from _leaves(below, f"{prefix}{name}.") if below else [prefix + name]


def _full(location: Location) -> str:
    """Full key, such as ``find_concept.concepts[0].name``."""
    parts = (f"[{p}]" if isinstance(p, int) else f".{p}" for p in location if p != "[key]")
    return "".join(parts).removeprefix(".") or "the top level"


def _nearest(location: Location, known: Known) -> str:
    """Suggest a key in place of the unknown one at `location`: beside it, else anywhere."""
    beside = known
    for part in location[:-1]:
        beside = beside.get(part, beside)  # type: ignore[call-overload]
    if near := difflib.get_close_matches(str(location[-1]), beside, n=1, cutoff=0.5):
        return f"did you mean {_full((*location[:-1], near[0]))}?"
    if near := difflib.get_close_matches(_full(location), list(_leaves(known)), n=1):
        return f"did you mean {near[0]}?"
    return f"known here: {', '.join(beside)}"


def _explain(error: ErrorDetails, known: Known) -> str:
    """Say in one line which key is wrong, its value, and what is allowed."""
    key, given, context = _full(error["loc"]), error["input"], error.get("ctx", {})
    match error["type"]:
        case "unexpected_keyword_argument":
            return f"unknown key {key} (value {given!r}); {_nearest(error['loc'], known)}"
        case "missing":
            return f"{key} is missing; docs/params.schema.json says what it may hold"
        case "dataclass_type" | "dict_type":
            return f"{key} = {given!r} is not a section of keys and values"
        case "too_short" | "string_too_short":
            return f"{key} is empty: at least one entry or letter is needed"
        case "value_error":
            return f"{key} = {given!r} {context['error']}"
        case "string_pattern_mismatch":
            return f"{key} = {given!r} is out of range: allowed is {ALLOWED[context['pattern']]}"
        case kind:
            problem = "has the wrong type" if kind.endswith("_type") else "is out of range"
            return f"{key} = {given!r} {problem}: {error['msg'].replace('Input', 'it', 1)}"


# --- reading ----------------------------------------------------------------------------------


def _references(value: object, location: Location = ()) -> Iterator[tuple[Location, str]]:
    """Places and texts of all strings that refer to another key."""
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _references(entry, (*location, key))
    elif isinstance(value, str) and "${" in value:
        yield location, value


def _completed(raw: dict, cls: type, bases: Mapping[str, str]) -> dict:
    """Fill each section of `bases` up with the values of the section that it is based on."""
    types, complete = typing.get_type_hints(cls), dict(raw)
    for name, base in bases.items():
        if isinstance(raw.get(name), dict) and isinstance(raw.get(base), dict):
            keys = {field.name for field in dataclasses.fields(types[name])}
            complete[name] = {k: v for k, v in raw[base].items() if k in keys} | raw[name]
    return complete


def load_typed(path: str | Path, cls: type[T], bases: Mapping[str, str] | None = None) -> T:
    """Read the YAML file at `path` into the frozen dataclass `cls`, lists as tuples.

    Args:
        bases: sections that hold only what differs from another section, with the name of that.

    Raises:
        ParamsError: an unknown or missing key, a wrong type or a value out of range. The message
            has one line per problem, with the file, the full key, the value and what is allowed.
    """
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise ParamsError(f"{path} does not exist; run from the repository's root") from error
    except Exception as error:  # PyYAML and OmegaConf share no base class; the file is at fault
        raise ParamsError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ParamsError(f"{path}: the top level is not a section of keys and values")
    for location, text in _references(raw):
        raise ParamsError(
            f"{path}: {_full(location)} = {text!r} refers to another key, whose changes DVC would "
            "not see; write the value itself"
        )
    bases = bases or {}
    try:
        # From JSON, pydantic takes a list for a tuple, and is strict with everything else.
        text = json.dumps(_completed(raw, cls, bases), default=str)
        return TypeAdapter(cls).validate_json(text)
    except ValidationError as error:
        # Inherited values are reported once, under the section that the file has them in.
        problems = [
            e for e in error.errors(include_url=False)
            if not (e["loc"][0] in bases and e["loc"][1:2] and e["loc"][1] not in raw[e["loc"][0]])
        ]  # fmt: skip
        known = _known(cls)
        lines = [f"{path}: {_explain(e, known)}" for e in problems]
        raise ParamsError("\n".join(lines)) from None
