"""Train one nano model on rendered music and measure it (hours; frozen in dvc.yaml)."""

import sys
from pathlib import Path

import numpy as np
import torch

from musicscope.config import Params, load_params
from musicscope.core.command_line import Parser
from musicscope.core.io import atomic_dir, read_json, scratch_dir, write_json
from musicscope.core.seeding import seed_for
from musicscope.core.stats import estimate, mean_of
from musicscope.data import wheel_assets as assets
from musicscope.data.clips import ClipStore
from musicscope.data.taxonomy import FAMILIES
from musicscope.embedded.nano.evaluation import (
    encode_rows,
    evaluate_codec,
    evaluate_decoder,
    evaluate_generation,
)
from musicscope.embedded.nano.model_card import model_card
from musicscope.embedded.nano.pretraining import (
    get_codec,
    get_codes,
    get_decoder,
    get_judge,
    get_text_encoder,
    render_corpus,
    save_model,
)
from musicscope.judges.musicnn import load_musicnn
from musicscope.judges.report import family_report
from musicscope.models.musicgen.model import MusicgenModel
from musicscope.models.registry import load_model
from stages import run_stage


def main() -> None:
    """Train (or go on training), save data/models/<model>, write metrics/pretrain/<model>.json."""
    parser = Parser(description=__doc__)
    parser.add_argument("model", choices=("nano-small", "nano-medium"))
    parser.add_argument("--evaluate-only", action="store_true", help="keep the saved weights")
    args = parser.parse_args()
    params = load_params()
    config, seed = params.pretrain, params.seed
    torch.set_num_threads(1)  # small tensors: a second thread gains nothing, another model does
    key = {
        "pretrain": config.clips,
        "codec": [config.codec_clips, config.codec_steps],
        "seed": seed,
    }
    with scratch_dir(key) as folder:  # of both models, which share a codec
        train(args.model, params, folder, args.evaluate_only)


def train(name: str, params: Params, folder: Path, evaluate_only: bool) -> None:
    """Train and measure one model, with unfinished work in `folder`."""
    config, seed = params.pretrain, params.seed
    print(f"work in progress is kept in {folder}", file=sys.stderr)
    out = f"data/models/{name}"

    corpus = render_corpus(folder, config.clips, seed, params.compute.processes)
    codec = get_codec(folder, corpus, config, seed)
    if not evaluate_only:
        text, tokenizer = get_text_encoder(folder, config, seed)
        model = get_decoder(
            folder, name, config, codec, text, tokenizer, corpus, seed,
            params.compute.processes,
        )  # fmt: skip
        with atomic_dir(out) as saved:
            save_model(saved, model, tokenizer, model_card(name, config))

    model, store = load_model(out), ClipStore.open()
    if not isinstance(model, MusicgenModel):
        raise TypeError(f"{out} holds a {type(model).__name__}")
    bootstrap = config.bootstrap
    musicnn = load_musicnn(assets.fetch(assets.MUSICNN))
    train_codes = get_codes(folder, config.clips, params.compute.processes)
    judge = get_judge(folder, codec, corpus, train_codes, config, seed)
    rows = store.select(split="test", kind="clip")
    groups = store.rows["group"].to_numpy()[rows]
    metrics: dict[str, object] = {}
    codes = encode_rows(model, store, rows)
    if not (folder / "codec.json").exists():  # the models share it: measured once
        found = evaluate_codec(model, store, rows, codes, musicnn, bootstrap, seed)
        write_json(folder / "codec.json", found)
    metrics["codec"] = read_json(folder / "codec.json")
    labels = store.rows[[f"has_{f}" for f in FAMILIES]].to_numpy()[rows]
    report = family_report(
        judge.predict(store.audio(rows)), labels, FAMILIES, groups, bootstrap, seed
    )
    metrics["judge"] = {
        "guitar_auroc": report["guitar"]["auroc"]["value"],
        "mean_auroc": report["mean_auroc"],
    }
    validation = store.select(split="validation")
    validation_codes = encode_rows(model, store, validation)
    metrics["decoder"], ce = evaluate_decoder(
        model,
        store,
        rows,
        codes,
        train_codes,
        validation_codes,
        bootstrap,
        seed,
    )
    np.save(folder / f"ce-{name}.npy", ce)
    small = folder / "ce-nano-small.npy"
    if name == "nano-medium" and small.exists():
        saved = mean_of(np.load(small) - ce)
        below = estimate(saved, groups, bootstrap, seed, "nats per code")
        metrics["decoder"]["below_small"] = below.as_dict()
    metrics["generation"], _ = evaluate_generation(
        model, judge, musicnn, config.generations, bootstrap, seed_for(seed, "generation")
    )
    write_json(f"metrics/pretrain/{name}.json", metrics)
    print(read_json(f"metrics/pretrain/{name}.json"), file=sys.stderr)


if __name__ == "__main__":
    run_stage(main)
