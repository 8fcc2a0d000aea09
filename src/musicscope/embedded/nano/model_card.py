"""The model card that is saved beside each nano model's weights."""

from musicscope.config import Pretrain

CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-to-audio
---

# {name}

A very small MusicGen (`MusicgenForConditionalGeneration`) for interpretability research on a
laptop.

| part | what |
|---|---|
| codec | EnCodec, 16 kHz mono, 50 frames a second, {codebooks} codebooks of 1,024 |
| text encoder | T5, 2 layers of width 128, frozen while the decoder trained |
| decoder | {layers} layers of width {width}, {heads} heads, delay pattern, caption dropout 0.15 |

**Training data.** {clips:,} ten-second clips rendered from the train split of the 75 Freedoom MIDI
pieces (BSD-3-Clause), with instruments drawn at random, through the soundfonts TimGM6mb (GPL-2,
used to render only) and FluidR3Mono (MIT). Codec {codec_steps:,} steps, decoder {decoder_steps:,}
steps. Captions are written from templates and name instruments, tempo, density and key.

**Use.**

```python
from transformers import AutoProcessor, MusicgenForConditionalGeneration

folder = "data/models/{name}"
processor = AutoProcessor.from_pretrained(folder)
model = MusicgenForConditionalGeneration.from_pretrained(folder, dtype="float32")
inputs = processor(text=["guitar and drums"], return_tensors="pt", padding=True)
audio = model.generate(**inputs, do_sample=True, max_new_tokens={tokens})
```

**Limits.** Instrumental General MIDI sounds only, from a codec and a decoder trained for minutes on
two CPU cores. An object of study, not a music tool. Measured: `metrics/pretrain/{name}.json`.

**Licence.** MIT, like the code that made it.
"""


def model_card(name: str, config: Pretrain) -> str:
    """Markdown for the README.md in the model's folder."""
    size = config.size(name)
    return CARD.format(
        name=name, codebooks=config.codebooks, layers=size.layers, width=size.width,
        heads=size.heads, clips=config.clips, codec_steps=config.codec_steps,
        decoder_steps=config.decoder_steps, tokens=500 + config.codebooks,
    )  # fmt: skip
