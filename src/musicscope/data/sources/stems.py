"""Music without vocals: existing stems, or Demucs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from musicscope.core.audio import resample
from musicscope.data.audio_files import SUFFIXES, Problem, Separator
from musicscope.data.sources.recordings import Audio, Recording, Scan, unsafe

DEMUCS_MODEL = "htdemucs"


def from_folder(scan: Scan, folder: str) -> Scan:
    """Replace each recording's audio by its stem in `folder`.

    File names: <name>.<suffix>, <stem>.<suffix> and <stem>/no_vocals.<suffix> (the output of
    ``demucs --two-stems=vocals``), where stem is the last part of the recording's name without
    suffix. A recording without a stem counts as missing; its mix is never used. A file that could
    be the stem of several recordings is used for none.
    """
    root = Path(folder)
    if not folder or not root.is_dir():
        raise FileNotFoundError(
            f"prepare_data.recordings.stems_folder: {folder!r} is no folder; name the folder of "
            "stems or set prepare_data.recordings.stems to none"
        )

    def stem_of(recording: Recording) -> str:
        path = PurePosixPath(recording.name)
        bases = [str(path.with_suffix("")), path.stem, f"{path.stem}/no_vocals"]
        names = [base + suffix for base in bases for suffix in SUFFIXES]
        found = (n for n in names if not unsafe(n) and (root / n).is_file())
        return next(found, f"{path.stem}/no_vocals.wav")

    recordings = [replace(r, key=stem_of(r)) for r in scan.recordings]
    uses = Counter(r.key for r in recordings)
    shared = tuple(
        Problem(r.name, "ambiguous stem", f"{r.key} could be of {uses[r.key]} recordings")
        for r in recordings if uses[r.key] > 1
    )  # fmt: skip
    kept = tuple(r for r in recordings if uses[r.key] == 1)
    audio, problems = Audio("folder", (root,)), (*scan.problems, *shared)
    return replace(scan, recordings=kept, audio=audio, problems=problems)


def demucs_separator() -> Separator:
    """Load Demucs' four-stem model; the separator sums all stems except vocals.

    Random shifts are off, so that equal audio gives equal stems.

    Raises:
        RuntimeError: demucs is not installed.
    """
    try:
        import torch
        from demucs.apply import apply_model
        from demucs.pretrained import get_model
    except ImportError as error:
        raise RuntimeError(
            f"prepare_data.recordings.stems = demucs needs the package demucs ({error}); install "
            "it, or separate beforehand and set stems to folder"
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = get_model(DEMUCS_MODEL).eval()
    kept = [i for i, name in enumerate(model.sources) if name != "vocals"]

    def separate(audio: np.ndarray, rate: int) -> np.ndarray:
        stereo = resample(np.stack([audio[0], audio[-1]]), rate, model.samplerate)
        mean, scale = float(stereo.mean()), float(stereo.std()) + 1e-8
        mix = torch.from_numpy((stereo - mean) / scale)
        with torch.inference_mode():
            stems = apply_model(model, mix[None], device=device, shifts=0, split=True)[0]
        rest = stems[kept].sum(0).cpu().numpy() * scale + mean
        return resample(rest, model.samplerate, rate)[:, : audio.shape[1]]

    return separate
