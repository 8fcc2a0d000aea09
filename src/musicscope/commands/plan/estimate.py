"""Estimate the cost of a configuration before anything runs: clips, frames, disk, memory, hours.

Neither the data nor the models need to be local: sizes of published ones are known. Hours come from
rates measured on this machine (--measure) or stored in benchmarks/results. Rates of other models
are scaled from the nearest measured one, and marked.
"""

from __future__ import annotations

import argparse
import difflib
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from musicscope.commands.plan import rates as plan_rates
from musicscope.commands.plan.published_sizes import DATA_SETS, DataSet, Shape, shape_of
from musicscope.commands.plan.rates import Rate, StepRate
from musicscope.config import Params, load_params
from musicscope.core.distributed import resolve_device
from musicscope.data.audio_files import SUFFIXES, list_files
from musicscope.models.interface import language_model
from musicscope.models.registry import load_model

EMBEDDED_RATE = 16_000  # Hz, as render.py makes clips; importing it would load the synthesiser
STORED_BYTES = 2  # per number in float16 or bfloat16, per sample in int16
SHUFFLE_BYTES = 256 * 2**20  # shuffle window of a store (ActivationStore.train_batches)


class Clips(NamedTuple):
    """Number and format of the clips."""

    number: int
    train: int
    seconds: float
    sample_rate: int
    origin: str


class Row(NamedTuple):
    """Cost of one stage of one model."""

    stage: str
    what: str
    disk: float = 0.0
    """bytes"""
    memory: float | None = None
    """bytes per process"""
    hours: float | None = None
    note: str = ""
    """Device of the time measurement."""
    runs: bool = True
    """False: takes disk only."""


def overridden(path: str | Path, sets: Sequence[str]) -> Params:
    """Load params.yaml with overrides in the grammar of ``dvc exp run -S``, validated.

    ParamsError or ValueError names the key that is wrong.
    """
    if not sets:
        return load_params(path)
    _check_keys(path, sets)
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / Path(path).name
        copy.write_text(Path(path).read_text(encoding="utf-8"), encoding="utf-8")
        try:
            apply_overrides(copy, list(sets))
        except DvcException as error:
            raise ValueError(f"{' '.join(sets)}: {error.__cause__ or error}") from error
        return load_params(copy)


def _check_keys(path: str | Path, sets: Sequence[str]) -> None:
    """Refuse an override of a key that the file lacks; ValueError names the nearest key."""

    def keys(tree: object, above: str = "") -> list[str]:
        if not isinstance(tree, dict):
            return []
        return [n for k, v in tree.items() for n in (f"{above}{k}", *keys(v, f"{above}{k}."))]

    known = keys(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    for text in sets:
        key = text.partition("=")[0]
        if key not in known and not key.startswith(("+", "~")):
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"-S {text}: {path} has no key {key}{hint}")


def count_clips(params: Params, given: int | None = None) -> Clips:
    """Count the clips that prepare_data will make, at most; `given` overrides their number.

    ValueError for a folder without recordings to count.
    """
    section = params.prepare_data
    if section.source == "embedded":
        held_out = section.heldout_font_clips + 2 * section.heldout_font_pairs
        splits = section.clips
        number = splits.train + splits.validation + splits.test + held_out + 2 * section.pairs
        rate, train, origin = EMBEDDED_RATE, splits.train, "params.yaml"
    else:
        settings, (data, origin) = section.recordings, _data_set(params, given)
        windows = max(1, min(settings.windows, int(data.seconds / section.seconds + 1e-6)))
        # A data set without a split gives up a share of train for it.
        test = data.test or round(data.train * settings.test_share)
        train = data.train - (0 if data.test else test)
        validation = data.validation or round(train * settings.validation_share)
        train -= 0 if data.validation else validation
        limits, rate = settings.limits, settings.sample_rate
        pairs = ((train, limits.train), (validation, limits.validation), (test, limits.test))
        counts = [windows * min(have, limit or have) for have, limit in pairs]
        number, train = sum(counts), counts[0]
    if given is not None:
        train, number, origin = round(train * given / max(number, 1)), given, "--clips"
    return Clips(number, train, section.seconds, rate, origin)


def _data_set(params: Params, given: int | None) -> tuple[DataSet, str]:
    section = params.prepare_data
    if section.source in DATA_SETS:
        return DATA_SETS[section.source], "published size, an upper bound"
    longest = section.seconds * section.recordings.windows  # unknown: as long as asked for
    if given is not None:
        return DataSet(given, 0, 0, longest), "--clips"
    folder = Path(section.recordings.audio or section.recordings.folder)
    names = list_files(folder)[0] if folder.is_dir() else []
    count = sum(Path(name).suffix.lower() in SUFFIXES for name in names)
    if not count:
        raise ValueError(
            f"prepare_data.recordings.folder: {folder} holds no audio files to count; say how many "
            "clips there will be with --clips"
        )
    return DataSet(count, 0, 0, longest), f"files in {folder}"


def frames_of(clips: Clips, shape: Shape) -> int:
    """Count the frames of one clip, as extraction does."""
    return math.ceil(clips.seconds * shape.frame_rate - 1e-6)


def rows_of(
    params: Params,
    clips: Clips,
    shapes: Sequence[Shape],
    rates: Mapping[str, Rate | None],
    step: StepRate | None = None,
) -> list[Row]:
    """Estimate every stage whose size depends on data or models, in the order of the DAG."""
    samples = clips.number * clips.seconds * clips.sample_rate
    rows = [Row("prepare_data", "data/clips", samples * STORED_BYTES, runs=False)]
    for shape in shapes:
        rows.append(Row("weights", f"data/models/{shape.name}", shape.weight_bytes(), runs=False))
        if shape.layers:
            rows.append(_ablation(params, shape, rates[shape.name], clips))
        rows.append(_extraction(params, shape, rates[shape.name], clips))
    for shape in shapes:
        for slot in params.slots:
            what = f"{shape.name} {slot}"
            rows.append(_dictionaries("train_sae", what, params, [shape.width], step))
    if len(shapes) > 1:
        widths = [shape.width for shape in shapes]
        for stage in ("train_usae", "train_crosscoder"):
            rows.append(_dictionaries(stage, getattr(params, stage).slot, params, widths, step))
    return rows


def _timed(
    row: Row, params: Params, clips: Clips, rate: Rate | None, pass_of: str, batch: int,
    spent: Callable[[Rate], float],
) -> Row:  # fmt: skip
    """Add memory and hours of passes over clips: `spent` seconds of clips as long as measured.

    Processes share the work, but not on a GPU.
    """
    if rate is None:
        return row
    shared = rate.device.startswith("cpu") or params.compute.engine != "processes"
    processes = params.compute.processes if shared else 1
    hours = spent(rate) * clips.seconds / rate.clip_seconds / 3600 / processes
    memory = rate.memory(pass_of, batch, clips.seconds)
    return row._replace(memory=memory, hours=hours, note=rate.note)


def _ablation(params: Params, shape: Shape, rate: Rate | None, clips: Clips) -> Row:
    count, kinds = params.ablate.clips, len(params.ablate.kinds)
    row = Row("ablate", f"{shape.name}: {shape.layers} layers x {kinds} kinds, {count} clips")

    def spent(rate: Rate) -> float:
        passes = 2 * count  # train clips for the means, scored clips for their inputs
        return passes * rate.extract_seconds + count * rate.seconds_to_ablate(kinds, shape.layers)

    return _timed(row, params, clips, rate, "ablate", 4, spent)


def _extraction(params: Params, shape: Shape, rate: Rate | None, clips: Clips) -> Row:
    rows, slots = clips.number * frames_of(clips, shape), len(params.slots)
    what = f"{shape.name}: {rows:,} frames of {shape.width} x {slots} slots"
    row = Row("extract_activations", what, rows * shape.width * STORED_BYTES * slots)
    batch = params.extract_activations.batch_clips
    return _timed(
        row, params, clips, rate, "extract", batch, lambda r: clips.number * r.extract_seconds
    )


def _dictionaries(
    stage: str, what: str, params: Params, widths: Sequence[int], step: StepRate | None
) -> Row:
    """Estimate the training of all dictionaries of a stage, over models of these widths."""
    section, total = getattr(params, stage), sum(widths)
    latents = section.expansion * max(widths)
    count = section.seeds + getattr(section, "null_seeds", 0)
    weights = 4 * (2 * latents * total + latents * len(widths) + total)
    # Weights, gradients and Adam's two moments; pre-activations of a batch; the shuffle's window.
    memory = 4 * weights + 4 * section.batch_size * latents + SHUFFLE_BYTES
    hours, note = None, ""
    if step is not None:
        # A universal SAE encodes one model per step, a crosscoder all.
        encoded = total if stage == "train_crosscoder" else total / len(widths)
        each = step.seconds(section.batch_size, latents, encoded)
        spent = each * (section.samples // section.batch_size) * count
        shared = step.note.startswith("cpu") or params.compute.engine != "processes"
        processes = min(params.compute.processes, count) if shared else 1
        hours, note = spent / 3600 / processes, step.note
    copies = 2 if stage == "train_sae" else 1  # also in the format of dictionary_learning
    text = f"{what}: {count} x {latents:,} latents, {section.samples:,} frames"
    return Row(stage, text, copies * count * weights, memory, hours, note)


def table(rows: Sequence[Row]) -> str:
    """Format the rows and their sum as text; "?" where nothing was measured."""

    def shown(value: float | None, scale: float = 1.0) -> str:
        if value is None:
            return "?"
        value /= scale
        return f"{value:,.1f}" if value >= 100 else f"{value:.3g}"

    lines = [("stage", "what", "disk GB", "memory GB", "hours", "measured on")]
    for row in rows:
        cost = (shown(row.memory, 1e9), shown(row.hours), row.note) if row.runs else ("", "", "")
        lines.append((row.stage, row.what, shown(row.disk, 1e9), *cost))
    hours = [row.hours for row in rows if row.hours is not None]
    disk = sum(row.disk for row in rows)
    lines.append(("in all", "", shown(disk, 1e9), "", shown(sum(hours)) if hours else "?", ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "  ".join(f"{{:{side}{w}}}" for side, w in zip("<<>>><", widths, strict=True))
    return "\n".join(form.format(*line).rstrip() for line in lines)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Print the estimate for a params.yaml with overrides."""
    params = overridden(args.params, args.sets)
    clips = count_clips(params, args.clips)
    shapes = [shape_of(name) for name in params.models]
    print(
        f"{params.prepare_data.source}: {clips.number:,} clips of {clips.seconds:g} s at "
        f"{clips.sample_rate} Hz, {clips.train:,} of them train ({clips.origin})"
    )
    rates = plan_rates.load(args.results, shapes, params.compute.device)
    for shape in shapes:
        total = shape.decoder_parameters + shape.other_parameters
        size = f"{total / 1e6:,.0f} M parameters, " if total else ""
        print(
            f"{shape.name}: {size}{shape.layers or 'no'} layers of {shape.width}, "
            f"{frames_of(clips, shape)} frames a clip ({shape.origin})"
        )
        if shape.sample_rate != clips.sample_rate:
            print(f"  works at {shape.sample_rate} Hz: clips are resampled as they are read")
        if args.measure:
            model = load_model(shape.name, resolve_device(params.compute.device))
            rates[shape.name] = plan_rates.measure(language_model(model), clips.seconds)
    step = plan_rates.step_rate(args.results, params.compute.device)
    rows = rows_of(params, clips, shapes, rates, step)
    print("\n" + table(rows))
    print(
        "\nDVC keeps a second copy of outs in its cache unless `dvc config cache.type` links them "
        "(reflink, hardlink or symlink). Hours: with compute.processes = "
        f"{params.compute.processes} of compute.engine = {params.compute.engine}."
    )
    if args.memory is not None:
        print(plan_rates.batches(rates, clips.seconds, args.memory))
    if missing := [name for name, rate in rates.items() if rate is None]:
        print(
            f"No rate is known for {', '.join(missing)}: run with --measure, or python -m "
            "benchmarks.full_size",
            file=sys.stderr,
        )
    return {"clips": clips._asdict(), "rows": [row._asdict() for row in rows]}
