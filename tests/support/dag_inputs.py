"""What the DAG is run on in test_dag.py: recordings with guitar and without, tiny models, params.

Everything is in the on-disk layout of the real thing; sizes are what a test has time for.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import source_archives
from tests.support.source_archives import bench_row, encoded, write_lines, write_tar

SECONDS = 2.0
TRAIN, COPIES, VALIDATION, TEST = 12, 1, 6, 8
"""Source clips of a split, and augmented copies of each train one."""

PARAMS: dict[str, Any] = {
    "prepare_data": {"seconds": SECONDS},
    "train_sae": {"k": 8, "expansion": 2, "batch_size": 256, "samples": 8192, "seeds": 2,
                  "dead_after_samples": 4096, "ce_clips": 4},
    "train_usae": {"k": 8, "expansion": 2, "batch_size": 256, "samples": 8192, "seeds": 1,
                   "dead_after_samples": 4096},
    "train_crosscoder": {"k": 8, "expansion": 2, "batch_size": 256, "samples": 8192, "seeds": 1,
                         "dead_after_samples": 4096},
    "maximize_activation": {"seconds": 0.4, "window_seconds": 0.2, "steps": 1},
    "steer": {"concepts": ["guitar"], "pairs": [], "seconds": 0.2},
    "probe": {"null_seeds": 1},
    "compute": {"device": "cpu", "threads": 1, "processes": 1, "engine": "processes"},
}  # fmt: skip
"""Laid over tools/smoke_params.yaml."""


def piece(number: int, guitar: bool, rate: int, seconds: float = SECONDS) -> np.ndarray:
    """A phrase of four notes: plucked strings (Karplus-Strong) or steady tones."""
    rng = np.random.default_rng(number)
    notes, length = [], round(seconds * rate / 4)
    for hertz in rng.uniform(110, 440, 4):
        period = max(2, round(rate / hertz))
        if guitar:
            note = rng.uniform(-1, 1, length)
            for i in range(period + 1, length):
                note[i] = 0.498 * (note[i - period] + note[i - period - 1])
        else:
            t = np.arange(length) / rate
            note = np.sin(2 * np.pi * hertz * t) + 0.4 * np.sin(4 * np.pi * hertz * t)
        notes.append(note * rng.uniform(0.3, 0.6))
    return np.concatenate(notes).astype(np.float32)


def caption(guitar: bool) -> str:
    return "An acoustic guitar plays a melody." if guitar else "A calm piano piece."


def write_musicbench(folder: Path, rate: int = 8000) -> dict[str, int]:
    """A MusicBench with copies, and one damaged file; clips that must come out of it, by split.

    Validation is a share of the train groups, so only the sum of those two is fixed.
    """
    folder.mkdir(parents=True)
    files: dict[str, bytes] = {}
    rows: dict[str, list[dict]] = {"train": [], "test_A": []}
    for i in range(TRAIN + VALIDATION + TEST):
        test, base = i >= TRAIN + VALIDATION, f"{i:02d}_clip_{i:02d}__"[:11]
        names = [f"data/{base}.wav"]
        names += [] if test else [f"data_aug2/{base}_{n + 1}.wav" for n in range(COPIES)]
        for number, name in enumerate(names):
            audio = piece(i, i % 2 == 0, rate) * (1 - 0.1 * number)
            files[f"datashare/{name}"] = encoded(audio, rate)
            rows["test_A" if test else "train"].append(bench_row(name, caption(i % 2 == 0)))
    rows["train"].append(bench_row("data/broken_____.wav", caption(True)))
    files["datashare/data/broken_____.wav"] = b"RIFF and no more"
    for name, lines in {**rows, "test_B": rows["test_A"]}.items():
        write_lines(folder / f"MusicBench_{name}.json", lines)
    write_tar(folder / "MusicBench.tar.gz", files)
    return {"learn": (TRAIN + VALIDATION) * (1 + COPIES), "test": TEST, "skipped": 1}


def write_folder(folder: Path, rate: int = 8000) -> dict[str, int]:
    """A user's folder of wav and flac files with labels.csv; clips of each split."""
    folder.mkdir(parents=True)
    counts = {"train": 2 * TRAIN, "validation": VALIDATION + 2, "test": TEST}
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "caption", "group", "split", "guitar", "piano"])
        number = 0
        for split, count in counts.items():
            for i in range(count):
                suffix = ("wav", "flac")[i % 2]
                name = f"{split}-{i:02d}.{suffix}"
                audio = piece(number, number % 2 == 0, rate)
                (folder / name).write_bytes(encoded(audio, rate, suffix.upper()))
                guitar = number % 2 == 0
                table.writerow(
                    [name, caption(guitar), f"song-{number}", split, int(guitar), int(not guitar)]
                )
                number += 1
    (folder / "notes.txt").write_text("no audio")
    return counts


def recordings(source: str, folder: str, rate: int = source_archives.RATE) -> dict[str, Any]:
    """Params of a data set below `folder`, clips at `rate` Hz: no model's own rate."""
    section = {"folder": folder, "sample_rate": rate, "validation_share": 0.33}
    return {"prepare_data": {"source": source, "recordings": section}}


def build_musicgens(folder: Path) -> dict[str, dict[str, Any]]:
    """Two tiny MusicGens with one codec, laid out below `folder` as on the hub: the first in
    transformers' format, the second in both with the T5 on a page of its own.

    Their sections of download_model: the second is taken in audiocraft's format.
    """
    from transformers import MusicgenForConditionalGeneration

    from musicscope.models.audiocraft.convert import to_audiocraft
    from musicscope.models.audiocraft.loading import CODEC_FILE, MODEL_FILE, TEXT_FOLDER
    from tests.conftest import build_tiny_musicgen

    small, medium = folder / "musicgen-small", folder / "musicgen-medium"
    for seed, path in enumerate((small, medium)):
        build_tiny_musicgen(path, seed)
    first, second = (MusicgenForConditionalGeneration.from_pretrained(p) for p in (small, medium))
    second.audio_encoder.load_state_dict(first.audio_encoder.state_dict())
    second.save_pretrained(medium)
    to_audiocraft(medium, folder / "audiocraft")
    for file in (MODEL_FILE, CODEC_FILE):
        (folder / "audiocraft" / file).rename(medium / file)
    (folder / "audiocraft" / TEXT_FOLDER).rename(folder / "t5-base")
    (folder / "audiocraft").rmdir()
    text = {"into": TEXT_FOLDER, "source": str(folder / "t5-base"), "revision": "", "files": ["*"]}
    taken = {"revision": "", "system": "auto", "files": ["*"], "parts": []}
    return {
        small.name: taken | {"source": str(small)},
        medium.name: taken
        | {"source": str(medium), "system": "audiocraft", "files": [MODEL_FILE, CODEC_FILE],
           "parts": [text]},
    }  # fmt: skip


def build_yues(folder: Path) -> tuple[str, str]:
    """Two tiny YuEs of different width with one codec, as all of them have; their names."""
    from tests.support.yue_export import build_tiny_yue

    names = ("YuE-s1-7B-anneal-en-cot", "YuE-s1-7B-anneal-en-icl")
    for seed, name in enumerate(names):
        build_tiny_yue(folder / name, layers=4, width=16 + 8 * seed, seed=seed)
    shutil.copytree(folder / names[0] / "xcodec", folder / names[1] / "xcodec", dirs_exist_ok=True)
    return names


def build_rave_and_musicgen(folder: Path) -> tuple[str, str]:
    """A RAVE export and a tiny MusicGen; their names."""
    from tests.conftest import build_tiny_musicgen
    from tests.support import rave_export

    (folder / "rave").mkdir(parents=True)
    rave_export.save(rave_export.TinyRave(), folder / "rave" / "mine.ts")
    build_tiny_musicgen(folder / "musicgen-small")
    return "rave", "musicgen-small"
