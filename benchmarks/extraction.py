"""Extraction against a bare forward of the same model, as ratios from one interleaved run.

    python -m benchmarks.extraction --model data/models/nano-small

One thread, process CPU time (robust to other processes), everything interleaved, median
[min, max] over rounds, one batch of noise a round (time does not depend on what is heard).

* truncated: transformers' own decoder cut off after the deepest slot's layer: the floor.
* full: transformers' own forward to the logits.
* hidden_states: the same with output_hidden_states=True, the usual way to get activations.
* capture: our pass over the same batch, both slots.
* store: float16, statistics, hashes and the two shards on disk, from captured values.
* codec: EnCodec's encoder, which every way of listening to audio has to run.
* extract: all of it, from audio to shards, through the code of the stage.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402

from benchmarks.records import OUT_HELP, open_record  # noqa: E402
from musicscope.activations import extraction
from musicscope.activations import token_cache as codes
from musicscope.core.command_line import Parser, number, run_program, whole
from musicscope.models.registry import load_model  # noqa: E402

RESULT = "benchmarks/results/extraction.json"


def noise_clips(count: int, seconds: float, rate: int) -> SimpleNamespace:
    """As much of a ClipStore as extraction needs."""
    samples = np.random.default_rng(0).standard_normal((count, round(seconds * rate)))
    rows = pd.DataFrame({"id": [str(i) for i in range(count)], "split": "train", "font": ""})
    audio = (0.1 * samples).astype(np.float32)
    return SimpleNamespace(
        rows=rows.assign(kind="clip", group="", caption=""),
        sample_rate=rate,
        audio=lambda chosen: audio[chosen],
    )


def measure(folder: str, slots: list[int], clips: int, seconds: float, budget: float) -> dict:
    """CPU seconds a clip of every part, by interleaved rounds until `budget` seconds are over."""
    model = load_model(folder)
    source = noise_clips(clips, seconds, model.sample_rate)
    layers = {f"top{n}": f"layers.{i}" for n, i in enumerate(slots, 1)}
    options = {"dtype": "float16", "shard_mb": 1024, "batch_clips": clips, "captions": False}
    hashes = {"model_sha256": "", "clips_sha256": ""}
    (plan,) = extraction.plan(model, source, layers, **options, **hashes)

    audio, silent = source.audio(list(range(clips))), [None] * clips
    batch = model.encode(audio, silent)
    ids = model.sequence(batch).flatten(0, 1)
    text = {"encoder_hidden_states": batch.text, "encoder_attention_mask": batch.text_mask}
    if hasattr(model.hf, "enc_to_dec_proj"):
        text["encoder_hidden_states"] = model.hf.enc_to_dec_proj(batch.text)
    core = model.hf.decoder.model.decoder
    cut = copy.copy(core)  # shares the weights, has its own list of layers
    cut._modules = dict(core._modules)
    cut.layers = core.layers[: max(slots) + 1]
    plain = {"input_ids": ids, "use_cache": False, **text}
    captured = model.capture(batch, list(layers.values()))

    # Both must be the same computation, or the ratio means nothing.
    ours = model.capture(batch, [f"layers.{max(slots)}"]).popitem()[1]
    theirs = cut(**plain).last_hidden_state[:, 1 : batch.frames + 1]
    difference = (core.layer_norm(ours) - theirs).abs().max().item()
    assert difference < 1e-3, f"capture and the truncated forward differ by {difference}"

    with tempfile.TemporaryDirectory() as scratch:
        writers = {s: plan.writer(s, Path(scratch) / "store" / s) for s in layers}

        def store() -> None:
            for slot, writer in writers.items():
                writer.write(0, list(captured[layers[slot]].numpy()))

        def extract() -> None:
            target = Path(tempfile.mkdtemp(dir=scratch))
            for chunk in range(-(-clips // codes.CHUNK)):
                codes.write_chunk(lambda: (model, source), target, chunk)
            extraction._write_shard(plan, lambda: (model, source), target, target, 0)

        parts = {
            "truncated": lambda: cut(**plain),
            "full": lambda: model.hf.decoder(**plain).logits,
            "hidden_states": lambda: model.hf.decoder(**plain, output_hidden_states=True),
            "capture": lambda: model.capture(batch, list(layers.values())),
            "store": store,
            "codec": lambda: model.encode(audio, silent),
            "extract": extract,
        }
        times: dict[str, list[float]] = {name: [] for name in parts}
        end = time.monotonic() + budget
        with torch.no_grad():
            for run in parts.values():
                run()
            while time.monotonic() < end or len(times["full"]) < 3:
                for name, run in parts.items():
                    start = time.process_time()
                    run()
                    times[name].append((time.process_time() - start) / clips)
    middle = {name: statistics.median(t) for name, t in times.items()}
    return {
        "layers": slots,
        "of_layers": len(model.hook_points),
        "width": plan.widths["top1"],
        "clips_a_batch": clips,
        "seconds_a_clip": seconds,
        "rounds": len(times["full"]),
        "ms_cpu_a_clip": {
            name: {"median": 1e3 * middle[name], "min": 1e3 * min(t), "max": 1e3 * max(t)}
            for name, t in times.items()
        },
        "capture_vs_truncated": middle["capture"] / middle["truncated"],
        "capture_and_store_vs_truncated": (middle["capture"] + middle["store"])
        / middle["truncated"],
        "extract_vs_codec_and_truncated": middle["extract"]
        / (middle["codec"] + middle["truncated"]),
        "full_vs_truncated": middle["full"] / middle["truncated"],
        "hidden_states_vs_capture": middle["hidden_states"] / middle["capture"],
    }


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="data/models/nano-small", help="a model folder")
    parser.add_argument(
        "--layers", type=whole(0), nargs="+", default=[2, 4], help="one for each slot"
    )
    parser.add_argument("--clips", type=whole(1), default=8, help="clips a batch")
    parser.add_argument("--seconds", type=number(above=0), default=10.0, help="length of a clip")
    parser.add_argument(
        "--budget", type=number(above=0), default=40.0, help="seconds to measure for"
    )
    parser.add_argument("--out", metavar="FILE", help=OUT_HELP.format(RESULT))
    options = parser.parse_args()
    record = open_record(options.out, RESULT)
    torch.set_num_threads(1)
    result = measure(
        options.model, options.layers, options.clips, options.seconds, options.budget
    ) | {"model": Path(options.model).name, "torch": torch.__version__}
    for key, value in sorted(result.items()):
        if isinstance(value, float):
            print(f"{key:34} {value:.3f}")
    for name, ms in result["ms_cpu_a_clip"].items():
        print(f"{name:34} {ms['median']:.1f} ms a clip [{ms['min']:.1f}, {ms['max']:.1f}]")
    print(f"written to {record.write(result)}")


if __name__ == "__main__":
    run_program(main)
