"""Published sizes with random weights: time and memory of extraction and ablation on this machine.

    python -m benchmarks.full_size --models musicgen-small musicgen-medium

Built from the configuration alone, offline; what is heard and what the weights are changes neither
time nor memory. A model that would not fit into the memory that is free is left out, and said so.
New results are added to those of other models and devices in benchmarks/results/full_size.json.
`musicscope plan` reads them there, and scales them to sizes that were not measured; afterwards
`python -m experiments.table --write` puts its hours into experiments/README.md.

With one thread on a CPU times are that thread's own, so that a busy machine does not matter. On one
core of an ordinary server the small model takes about 4 minutes, the medium one 15 (5 with
`--ablations`, that is with none).

* codec, pass: seconds a clip for audio to codes, and codes to the deepest layer's activations.
* ablate: seconds a clip for the given ablations of every layer, scored at the logits.
* memory: weights, and the peaks of codec, pass and ablation, as so much fixed and so much a clip.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402

from benchmarks.records import OUT_HELP, open_record  # noqa: E402
from musicscope.commands.plan.published_sizes import DATA_SETS, MUSICGEN, musicgen_config, shape_of  # noqa: E402
from musicscope.commands.plan.rates import Rate, measure
from musicscope.core.command_line import Parser, number, run_program, whole

RESULT = "benchmarks/results/full_size.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TINY = "tiny"
"""Not a published size: to try this script."""


def tiny_config() -> Any:
    """MusicGen small with everything cut to almost nothing."""
    config = musicgen_config("musicgen-small")
    config.decoder.update({"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2})
    config.decoder.update({"ffn_dim": 64})
    config.text_encoder.update({"num_layers": 1, "d_ff": 64})
    config.audio_encoder.update({"num_filters": 2, "hidden_size": 8, "codebook_dim": 8})
    return config


def random_musicgen(config: Any, name: str, dtype: torch.dtype, device: str) -> Any:
    """A MusicgenModel with random weights: decoder in `dtype`, codec and text encoder float32."""
    from transformers import MusicgenForConditionalGeneration

    from musicscope.models.musicgen.model import MusicgenModel

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        hf = MusicgenForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    hf.audio_encoder.float()
    hf.text_encoder.float()
    hf.generation_config.decoder_start_token_id = config.decoder.bos_token_id
    return MusicgenModel(hf.requires_grad_(False).to(device), None, name)


def free_bytes(device: str) -> int:
    """Memory that can be had now."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    found = dict(line.split(":") for line in lines)
    return int(found["MemAvailable"].split()[0]) * 1024


def report(name: str, rate: Rate) -> None:
    """What it means for all of MusicBench."""
    data, clips = DATA_SETS["musicbench"], f"{DATA_SETS['musicbench'].train:,} clips of 10 s"
    scale = data.train * data.seconds / rate.clip_seconds / 3600
    print(
        f"{name} on {rate.device} in {rate.dtype}: a clip of {rate.clip_seconds:g} s takes "
        f"{rate.codec_seconds:.2f} s of codec and {rate.pass_seconds:.2f} s of decoder"
        + (f", {rate.ablate_seconds:.1f} s to ablate" if rate.ablate_seconds else "")
        + f"; weights {rate.weight_bytes / 1e9:.2f} GB"
    )
    if rate.extract_fixed_bytes is not None:
        print(
            f"  a pass peaks at {rate.extract_fixed_bytes / 1e9:.2f} GB and "
            f"{rate.extract_clip_bytes / 1e6:.0f} MB a clip, the codec at "
            f"{rate.codec_fixed_bytes / 1e9:.2f} GB and {rate.codec_clip_bytes / 1e6:.0f} MB a clip"
        )
    print(f"  MusicBench ({clips}): {rate.extract_seconds * scale:,.1f} hours")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["musicgen-small"],
                        choices=[*MUSICGEN, TINY])  # fmt: skip
    parser.add_device()
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--seconds", type=number(above=0), default=10.0, help="length of a clip")
    parser.add_argument("--clips", type=whole(1), default=2, help="clips a batch")
    parser.add_argument("--rounds", type=whole(1), default=3, help="of which the median counts")
    parser.add_argument("--threads", type=whole(1), default=1, help="of torch on a CPU")
    parser.add_argument("--ablations", nargs="*", default=["mean"], help="kinds; none: leave out")
    parser.add_argument("--out", metavar="FILE", help=OUT_HELP.format(RESULT))
    options = parser.parse_args()
    record = open_record(options.out, RESULT)
    torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    for name in options.models:
        config = tiny_config() if name == TINY else musicgen_config(name)
        needed = 0 if name == TINY else shape_of(name).weight_bytes(dtype.itemsize)
        if needed * 1.25 > (free := free_bytes(options.device)):
            print(
                f"{name}: left out, its weights take {needed / 1e9:.1f} GB and "
                f"{free / 1e9:.1f} GB are free",
                file=sys.stderr,
            )
            continue
        print(f"{name}: drawing {needed / 1e9:.1f} GB of weights", flush=True)
        model = random_musicgen(config, name, dtype, options.device)
        rate = measure(
            model, options.seconds, options.clips, options.rounds, options.ablations, dtype=dtype,
            say=lambda text, name=name: print(f"{name}: {text}", flush=True),
        )  # fmt: skip
        del model
        report(name, rate)
        known = record.read()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        entry = asdict(rate) | {"process_peak_bytes": peak, "torch": torch.__version__}
        known.setdefault(name, {})[f"{rate.device}, {rate.dtype}"] = entry
        print(f"written to {record.write(known)}")


if __name__ == "__main__":
    run_program(main)
