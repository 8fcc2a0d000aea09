"""Pieces that a model generates on captions drawn at random: data/gallery/<model>.

Nothing is picked: captions are those of random test clips, and every piece is kept. index.json
lists ``caption``, ``file`` and, for comparison, the clip of that caption as ``real``. An audio
model generates nothing; its list is empty.
"""

from __future__ import annotations

import numpy as np
import soundfile
import torch

from musicscope.config import load_params
from musicscope.core.distributed import resolve_device
from musicscope.core.io import atomic_dir, write_json
from musicscope.core.seeding import seed_for
from musicscope.data.clips import ClipStore, at_rate, main_clips
from musicscope.models.interface import LanguageModel
from musicscope.models.registry import load_model
from stages import run_stage, stage_args


def main() -> None:
    """Generate, write sound and index."""
    (name,) = stage_args(__doc__, "model")
    params = load_params()
    section, seed = params.gallery, seed_for(params.seed, "gallery")
    torch.set_num_threads(params.compute.threads)
    model = load_model(f"data/models/{name}", resolve_device(params.compute.device))
    clips = at_rate(ClipStore.open("data/clips"), model.sample_rate)
    with atomic_dir(f"data/gallery/{name}") as folder:
        pieces: list[dict[str, str]] = []
        if isinstance(model, LanguageModel):
            rows = main_clips(clips.rows, "test")
            count = min(section.pieces, len(rows))
            rows = np.random.default_rng(seed).choice(rows, count, replace=False)
            captions = clips.rows["caption"].iloc[rows].tolist()
            audio, _ = model.generate(captions, section.seconds, seed)
            samples = round(section.seconds * model.sample_rate)
            for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
                files = {"file": f"{i:02d}-generated.flac", "real": f"{i:02d}-real.flac"}
                sounds = audio[i].cpu().numpy(), clips.audio([row])[0]
                for file, sound in zip(files.values(), sounds, strict=True):
                    sound = np.clip(sound[:samples], -1, 1)
                    soundfile.write(folder / file, sound, model.sample_rate, subtype="PCM_16")
                pieces.append({"caption": caption, **files})
        write_json(folder / "index.json", {"pieces": pieces})


if __name__ == "__main__":
    run_stage(main)
