"""params.yaml as typed, frozen dataclasses: every key, its meaning and its allowed values.

An unknown key, a wrong type or a value out of range is a ``ParamsError`` that names the key, the
value and what is allowed. The docstrings below keys become descriptions in docs/params.schema.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from musicscope.config.analysis import (
    Ablate,
    ExtractActivations,
    FeatureActivity,
    Gallery,
    MatchFeatures,
    MaximizeActivation,
    MeasureEffects,
    Probe,
    Report,
    SelectLayers,
)
from musicscope.config.concepts import (
    FAMILIES,
    QUERY_NAME,
    ConceptDefinition,
    FindConcept,
    Steer,
    TrainJudge,
    nearest,
)
from musicscope.config.data import DownloadModel, PrepareData, Pretrain, RecordingLimits
from musicscope.config.dictionaries import TrainCrosscoder, TrainSae, TrainUsae
from musicscope.config.schema import (
    DEVICE,
    ByName,
    Distinct,
    DistinctOrNone,
    FolderName,
    ParamsError,
    Section,
    SlotName,
    load_typed,
)

__all__ = [
    "BASES",
    "Compute",
    "ConceptDefinition",
    "Params",
    "ParamsError",
    "PrepareData",
    "Pretrain",
    "RecordingLimits",
    "load_params",
]

BASES = {"train_crosscoder": "train_usae", "steer_full": "steer"}
"""Sections that hold only what differs from another section. In dvc.yaml a stage of such a section
must list both."""


@dataclass(frozen=True)
class Compute(Section):
    """Where and how stages run. No result depends on it, so changing it reruns no stage."""

    device: Annotated[str, Field(pattern=DEVICE)]
    """Device of the models: auto, cpu, cuda or cuda:<index>; auto takes CUDA if available."""
    threads: Annotated[int, Field(ge=1, le=1024)]
    """Torch threads per stage."""
    processes: Annotated[int, Field(ge=1, le=1024)]
    """Processes for work that splits by clip or by seed; with torchrun, ranks on this machine."""
    engine: Literal["processes", "torchrun", "ray"]
    """How work is spread: over processes of this machine, with torchrun (one stage as several
    ranks, one GPU per rank), or over a Ray cluster (needs the extra `ray`)."""
    trackers: DistinctOrNone[Literal["wandb", "tensorboard"]]
    """Where curves of training go beside DVCLive, whose files always appear while a stage runs:
    Weights & Biases or TensorBoard, below runs/ (each needs the extra of its name)."""


@dataclass(frozen=True)
class Params(Section):
    """All of params.yaml: shared values, and one section per stage under the stage's name."""

    seed: Annotated[int, Field(ge=0, le=2**62)]
    """The one seed; every generator derives its own seed from it by name."""
    models: Distinct[FolderName]
    """Folders in data/models to study."""
    slots: Distinct[SlotName]
    """Layers to study in each model: top<n> by rank in the ablation, layer<i> by number, cross<i>
    for the cross-attention of a layer. `just slots` writes the list from a rule. The summary shows
    the first."""
    concepts: ByName[ConceptDefinition]
    """Concepts of your own beside the instrument families, by name; none by default."""
    prepare_data: PrepareData
    pretrain: Pretrain
    download_model: ByName[DownloadModel]
    """Models to copy or download, by the name of their folder in data/models."""
    ablate: Ablate
    select_layers: SelectLayers
    extract_activations: ExtractActivations
    train_sae: TrainSae
    measure_effects: MeasureEffects
    probe: Probe
    maximize_activation: MaximizeActivation
    match_features: MatchFeatures
    feature_activity: FeatureActivity
    gallery: Gallery
    report: Report
    train_usae: TrainUsae
    train_crosscoder: TrainCrosscoder
    steer: Steer
    steer_full: Steer
    train_judge: TrainJudge
    find_concept: FindConcept
    compute: Compute


def _check_inputs(params: Params) -> None:
    """Refuse inputs in a folder that the stage which reads them replaces."""
    inputs: list[tuple[str, str, str]] = []
    if params.prepare_data.source != "embedded":
        recordings = params.prepare_data.recordings
        for key in ("folder", "audio", "tags", "song_describer", "stems_folder"):
            full = f"prepare_data.recordings.{key}"
            inputs.append((full, getattr(recordings, key), "data/clips"))
    for concept in params.find_concept.concepts:
        for side in ("positive", "negative"):
            full = f"find_concept.concepts: {side} of {concept.name}"
            inputs.append((full, getattr(concept, side), "data/find_concept"))
    for key, given, out in inputs:
        if given and Path(given).resolve().is_relative_to(Path(out).resolve()):
            raise ParamsError(
                f"{key} = {given!r} lies in {out}, which the stage replaces: move it elsewhere"
            )


def _check_concepts(params: Params) -> None:
    """Refuse definitions of concepts that cannot be used, and names that nothing defines."""
    for name, definition in params.concepts.items():
        definition.check(name)
    named = [("ablate.concepts", name) for name in params.ablate.concepts]
    for section in ("steer", "steer_full"):
        named += [(f"{section}.concepts", name) for name in getattr(params, section).concepts]
    for concept in params.find_concept.concepts:
        for side in ("positive", "negative"):
            query = getattr(concept, side)
            if query.startswith("clips:"):
                key = f"find_concept.concepts: {side} of {concept.name}"
                named += [(key, name) for name in QUERY_NAME.findall(query)]
    known = (*FAMILIES, *params.concepts)
    for key, name in named:
        if name not in known:
            raise ParamsError(
                f"{key} names {name!r}, which is no family and not defined in `concepts`"
                + nearest(name, known)
            )


def _check_together(params: Params) -> None:
    """Refuse values that do not agree with one another."""
    _check_inputs(params)
    _check_concepts(params)
    if params.select_layers.kind not in params.ablate.kinds:
        raise ParamsError(
            f"select_layers.kind = {params.select_layers.kind!r} is not among "
            f"ablate.kinds = {list(params.ablate.kinds)}; add it there or rank by another"
        )
    for section in (
        "match_features",
        "train_usae",
        "train_crosscoder",
        "steer",
        "steer_full",
        "find_concept",
    ):
        slot = getattr(params, section).slot
        if slot not in params.slots:
            raise ParamsError(
                f"{section}.slot = {slot!r} is not among slots = {list(params.slots)}: this stage "
                f"reads one slot, so add {slot!r} to slots or name one of them (`just slots RULE "
                "--single SLOT` sets slots and all of these keys)"
            )
    for section in ("ablate", "train_sae", "train_usae", "train_crosscoder", "steer", "steer_full"):
        getattr(params, section).check(section)
    find, usae = params.find_concept, params.train_usae
    if params.match_features.slot != usae.slot:
        raise ParamsError(
            f"match_features.slot = {params.match_features.slot!r}: allowed is only "
            f"train_usae.slot = {usae.slot!r}, since it compares the SAEs with the universal SAE"
        )
    cross = [slot for slot in params.slots if slot.startswith("cross")]
    if cross and not params.extract_activations.captions:
        raise ParamsError(
            f"slots has {', '.join(cross)}: cross-attention adds nothing without captions, so set "
            "extract_activations.captions to true"
        )
    if find.universal and find.slot != usae.slot:
        raise ParamsError(
            f"find_concept.slot = {find.slot!r}: with find_concept.universal allowed is only "
            f"train_usae.slot = {usae.slot!r}"
        )
    if len({concept.name for concept in find.concepts}) < len(find.concepts):
        raise ParamsError("find_concept.concepts has a name twice")
    if (seconds := params.maximize_activation.seconds) > params.prepare_data.seconds:
        raise ParamsError(
            f"maximize_activation.seconds = {seconds} is out of range: allowed is at most "
            f"prepare_data.seconds = {params.prepare_data.seconds}, the length of a clip"
        )
    if clash := sorted(set(params.download_model) & {"nano-small", "nano-medium"}):
        raise ParamsError(f"download_model.{clash[0]}: this name is of a model in Git")
    if list(params.probe.k_sparse) != sorted(params.probe.k_sparse):
        raise ParamsError(f"probe.k_sparse = {list(params.probe.k_sparse)} must rise")


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check params.yaml; ParamsError names the key (``train_sae.k``) that is wrong."""
    params = load_typed(path, Params, BASES)
    try:
        _check_together(params)
    except ParamsError as error:
        raise ParamsError(f"{path}: {error}") from None
    return params
