"""Read and write whole models, and take their parts over into a run."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    EncodecFeatureExtractor,
    EncodecModel,
    MusicgenForConditionalGeneration,
    MusicgenProcessor,
    T5Tokenizer,
)

from musicscope.core.io import write_json
from musicscope.embedded.pretraining.codec_losses import SAMPLE_RATE
from musicscope.embedded.pretraining.decoder import SIZES

CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-to-audio
---

# {name}

A small MusicGen (`MusicgenForConditionalGeneration`) for interpretability research on a laptop.

| part | what |
|---|---|
| codec | EnCodec, 16 kHz mono, 50 frames per second, 4 codebooks of 1,024 |
| text encoder | T5, 2 layers of width 128, frozen while the decoder trained |
| decoder | {layers} layers of width {width}, {heads} heads, caption dropout {dropout:g} |

**Training data.** Ten-second clips, mixed from scenes of arranged tunes (O'Neill, out of
music21's wheel) and Freedoom pieces (BSD-3-Clause). Instruments are drawn at random and played by
the soundfonts TimGM6mb (GPL-2, used to render only) and FluidR3Mono (MIT), by synthesis, and by
synthetic singers. Captions are written from templates and name instruments, singers, tempo,
density, key and style.

**Training.** {made}.

**Use.**

```python
from transformers import AutoProcessor, MusicgenForConditionalGeneration

folder = "data/models/{name}"
processor = AutoProcessor.from_pretrained(folder)
model = MusicgenForConditionalGeneration.from_pretrained(folder, dtype="float32")
inputs = processor(text=["guitar and drums"], return_tensors="pt", padding=True)
audio = model.generate(**inputs, do_sample=True, max_new_tokens=504)
```

**Limits.** Rendered sounds only. An object of study, not a music tool. Measured:
`metrics/pretrain/{name}.json`.

**Licence.** MIT, like the code that made it.
"""


def load_whole(folder: Path) -> MusicgenForConditionalGeneration:
    """A saved model in float32, for evaluation or more training."""
    return MusicgenForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def save_whole(
    model: MusicgenForConditionalGeneration, tokenizer: T5Tokenizer, folder: Path
) -> None:
    """Write float16 weights in files below 16 MB, with tokenizer and feature extractor."""
    for config in (model.config, model.config.audio_encoder, model.config.text_encoder):
        config._name_or_path = ""  # else the folder on this machine that the part came from
    model.half().save_pretrained(folder, max_shard_size="15MB")
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=SAMPLE_RATE)
    MusicgenProcessor(extractor, tokenizer).save_pretrained(folder)


def model_names(folder: Path) -> list[str]:
    """Names of SIZES that have a model in `folder`.

    Raises:
        FileNotFoundError: there is none.
    """
    names = [name for name in SIZES if (folder / name / "config.json").exists()]
    if not names:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(SIZES)}")
    return names


def load_codec(folder: Path) -> EncodecModel:
    """The codec of a saved codec, or of the models in a folder of `model_names`, in float32."""
    if (folder / "config.json").exists():
        return EncodecModel.from_pretrained(folder, dtype=torch.float32).eval()
    return load_whole(folder / model_names(folder)[0]).audio_encoder


def start_from(folder: Path, work: Path) -> None:
    """Put codec, text encoder and tokenizer of earlier models where their phases leave them."""
    if (work / "text" / "done.json").exists():
        return
    first = folder / model_names(folder)[0]
    model = load_whole(first)
    model.audio_encoder.save_pretrained(work / "codec")
    model.text_encoder.save_pretrained(work / "text")
    T5Tokenizer.from_pretrained(first).save_pretrained(work / "text")
    write_json(work / "text" / "done.json", {"from": first.name})


def model_card(name: str, made: str) -> str:
    """Return Markdown for the README.md in the model's folder; `made` says how it was trained."""
    size = SIZES[name]
    return CARD.format(
        name=name, layers=size.layers, width=size.width, heads=size.heads,
        dropout=size.caption_dropout, made=made,
    )  # fmt: skip
