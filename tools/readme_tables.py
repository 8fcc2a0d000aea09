"""README's tables, written from the committed metrics, so that no number there is typed.

    python tools/readme_tables.py            say what differs, exit 1 if anything does
    python tools/readme_tables.py --write    rewrite the tables (`just tables`)

A table stands between `<!-- table: name -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from musicscope.config import load_params  # noqa: E402
from musicscope.core.io import read_json  # noqa: E402

BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = Sequence[str]


def number(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def table(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


class Numbers:
    """metrics/summary.json, with intervals where it has them."""

    def __init__(self) -> None:
        self.all: dict[str, Any] = read_json(ROOT / "metrics/summary.json")
        params = load_params(ROOT / "params.yaml")
        self.models, self.slots = params.models, params.slots

    def __call__(self, key: str, digits: int = 3) -> str:
        """The number, and its interval if there is one under `<key>_low` or `<key>_ci_low`."""
        text = number(self.all[key], digits)
        for infix in ("", "_ci"):
            low, high = (self.all.get(f"{key}{infix}_{end}") for end in ("low", "high"))
            if low is not None and high is not None:
                return f"{text} [{number(low, digits)}, {number(high, digits)}]"
        return text


def features(numbers: Numbers) -> str:
    """SAEs and guitar probes, one column a model and slot."""
    columns = [(m, s) for m in numbers.models for s in numbers.slots]
    layers = {
        m: yaml.safe_load((ROOT / f"metrics/layers/{m}.yaml").read_text()) for m in numbers.models
    }
    named = {
        "explained variance": "sae.{}.explained_variance",
        "dead latents": "sae.{}.dead_fraction",
        "cross-entropy recovered": "sae.{}.ce_recovered",
        "L0": "sae.{}.l0",
        "stability between seeds": "sae.{}.stability",
        "guitar AUROC: SAE codes": "probe.{}.guitar.sae_auroc",
        "16 SAE features": "probe.{}.guitar.sae_k16_auroc",
        "activations": "probe.{}.guitar.dense_auroc",
        "SAE minus activations": "probe.{}.guitar.sae_minus_dense",
        "log-mel statistics": "probe.{}.guitar.logmel_auroc",
        "codec latents": "probe.{}.guitar.codec_auroc",
        "seven trivial cues": "probe.{}.guitar.trivial_auroc",
        "shuffled labels": "probe.{}.guitar.shuffled_auroc",
        "held-out soundfont: SAE codes": "probe.{}.guitar.heldout_font_sae_auroc",
        "held-out soundfont: activations": "probe.{}.guitar.heldout_font_dense_auroc",
        "matched pairs: SAE accuracy": "probe.{}.guitar.pair_accuracy",
        "matched pairs, held-out soundfont": "probe.{}.guitar.heldout_font_pair_accuracy",
    }
    rows = [
        [label, *(numbers(f"{m}.{key.format(s)}") for m, s in columns)]
        for label, key in named.items()
    ]
    return table(["", *(f"{m} {s} (layer {layers[m][s]})" for m, s in columns)], rows)


def models(numbers: Numbers) -> str:
    """Evidence that the nano models learned music, beside what was wanted."""
    named = [
        ("codec: log-mel distance (dB)", "codec.log_mel_distance_db", 2, ""),
        ("codec: SI-SDR (dB)", "codec.si_sdr_db", 2, ""),
        ("codec: loss of musicnn's guitar AUROC", "codec.musicnn_guitar_auroc_loss", 3,
         "at most .05"),
        ("decoder: cross-entropy (nats a code)", "decoder.ce", 3, ""),
        ("unigram", "decoder.ce_unigram", 3, "above the decoder"),
        ("previous frame", "decoder.ce_previous_frame", 3, "above the decoder"),
        ("first codebook: decoder", "decoder.ce_0", 3, ""),
        ("first codebook: previous frame", "decoder.ce_0_previous_frame", 3, "above the decoder"),
        ("cross-entropy: wrong minus right caption", "decoder.caption_gain", 4, "above 0"),
        ("prompted guitar against other prompts: AUROC, family judge",
         "generation.family_judge_guitar_auroc", 3, "at least .80"),
        ("the same, musicnn", "generation.musicnn_guitar_auroc", 3, ""),
        ("the family judge on rendered test clips", "judge.guitar_auroc", 3, ""),
    ]  # fmt: skip
    rows = [
        [label, *(numbers(f"pretrain.{m}.{key}", digits) for m in numbers.models), wanted]
        for label, key, digits, wanted in named
    ]
    below = numbers("pretrain.nano-medium.decoder.below_small", 4)
    rows.append(["cross-entropy: small minus medium", "", below, "above 0"])
    return table(["", *numbers.models, "wanted"], rows)


def cues(_: Numbers) -> str:
    """AUROC of trivial cues for guitar, on pairs and on other clips."""
    found = read_json(ROOT / "metrics/prepare_data.json")["trivial_cue_auroc"]
    names = sorted(found["clips"])
    labels = {
        "timgm6mb_pairs": "pairs, TimGM6mb",
        "fluidr3mono_pairs": "pairs, FluidR3Mono",
        "clips": "other clips, TimGM6mb",
    }
    rows = [[label, *(number(found[key][n]) for n in names)] for key, label in labels.items()]
    return table(["", *(n.replace("_", " ") for n in names)], rows)


def shared(numbers: Numbers) -> str:
    """The universal SAE: each number beside its nulls."""
    first, second = numbers.models
    named = {
        f"R2 of {first} from {first}'s code": "r2_0_0",
        f"R2 of {second} from {second}'s code": "r2_1_1",
        f"R2 of {second} from {first}'s code": "r2_0_1",
        f"R2 of {first} from {second}'s code": "r2_1_0",
        "firing entropy, median": "firing_entropy_median",
        f"co-fires, share of {first}'s firings": "cofire_proportion_0",
        f"co-fires, share of {second}'s firings": "cofire_proportion_1",
        "log energy against log co-fires, r": "energy_cofire_correlation",
    }
    rows = []
    for label, key in named.items():
        seeds = f"{numbers(f'usae.{key}_mean_of_seeds')} ± {numbers(f'usae.{key}_sd_of_seeds')}"
        nulls = [numbers(f"usae.null_{n}_{key}") for n in ("mispaired", "shuffled", "random")]
        rows.append([label, numbers(f"usae.{key}"), seeds, *nulls])
    head = ["", "paired", "over seeds", "trained on mispaired clips", "tested on mispaired clips"]
    return table([*head, "random dictionary"], rows)


def matched(numbers: Numbers) -> str:
    """Features matched one to one, beside their nulls and their ceiling."""
    found = read_json(ROOT / "metrics/match_features.json")
    (pair,) = found["sae_sae"].values()
    rows = []
    for model in numbers.models:
        seeds, usae = found["seeds"][model], found["sae_usae"][model]
        low, high = (number(pair[f"musical_{model}_{end}"]) for end in ("low", "high"))
        interval = f"[{low}, {high}]"
        rows += [
            [f"{model}: with the other model's SAE, by activation",
             f"{number(pair[f'musical_{model}'])} {interval}",
             number(pair[f"null_musical_{model}"])],
            [f"{model}: between two of its own SAEs (the ceiling)",
             f"{number(seeds['musical'])} [{number(seeds['musical_low'])}, "
             f"{number(seeds['musical_high'])}]", number(seeds["null_musical"])],
            [f"{model}: with the USAE, by decoder cosine", number(usae["matched"]),
             number(usae["null_matched"])],
        ]  # fmt: skip
    return table(["share of latents matched above .5", "found", "null"], rows)


def found(numbers: Numbers) -> str:
    """What the finder finds with the SAE, by model and concept."""
    rows = []
    for model in numbers.models:
        concepts = read_json(ROOT / f"metrics/find_concept/{model}.json")["sae"]
        for concept in concepts:
            key = f"find_concept.{model}.sae.{concept}"
            all_ = numbers.all
            rows.append([
                f"{model}: {concept}", str(all_[f"{key}.discoveries"]),
                number(all_[f"{key}.found_above_half"], 2),
                numbers(f"{key}.best_test_auroc", 2), number(all_[f"{key}.tested_test_auroc"], 2),
                number(all_[f"{key}.few_any_discovery"], 2),
                number(all_[f"{key}.null_any_discovery"], 2),
            ])  # fmt: skip
    head = ["", "features found", "of them on the same side in test", "best feature, test AUROC"]
    few = ["draws of ten that find any", "the same without a concept"]
    return table([*head, "all features, test AUROC", *few], rows)


STEERING = {
    "sae": "**SAE latents**",
    "sae_words": "**latents and words**",
    "diff_means": "difference of means",
    "diff_means_words": "difference of means and words",
    "probe_direction": "probe direction",
    "prompt_edit": "prompt edit",
    "random_feature": "random latents",
    "random_direction": "random direction",
    "passthrough": "passthrough",
    "reseed": "another seed",
}


def wishes(numbers: Numbers) -> Iterator[tuple[str, dict[str, Any]]]:
    """("<model>: <concept> <direction>", numbers by method) of all models with steer_full."""
    for model in numbers.models:
        if (path := ROOT / f"metrics/steer_full/{model}.json").is_file():
            for concept, directions in read_json(path)["concepts"].items():
                for direction, entry in directions.items():
                    yield f"{model}: {concept} {direction}", entry["methods"]


def steering(numbers: Numbers) -> str:
    """Success of every method by model and wish; of the latents with intervals."""
    rows = []
    for wish, of in wishes(numbers):
        cells = [number(of[m]["success"], 2) for m in STEERING]
        for i, method in enumerate(("sae", "sae_words")):
            ends = [number(of[method][f"success_ci_{end}"], 2) for end in ("low", "high")]
            cells[i] += f" [{', '.join(ends)}]"
        rows.append([wish, *cells])
    return table(["success", *STEERING.values()], rows)


def costs(numbers: Numbers) -> str:
    """What the same edits cost."""
    shown = ("sae", "sae_words", "diff_means", "diff_means_words", "prompt_edit", "reseed")
    keys = {"ce_cost": "+.2f", "frechet": ".1f", "others_change": ".3f"}
    rows = [
        [wish, *(", ".join(format(of[m][key], spec) for key, spec in keys.items()) for m in shown)]
        for wish, of in wishes(numbers)
    ]
    return table(["cross-entropy, Fréchet, other families", *(STEERING[m] for m in shown)], rows)


SEARCH = {
    "search-base": "8 latents, layer 1, captioned rows, one side, raised to the mean where active",
    "search-32-latents": "32 latents",
    "search-both-rows": "both halves of guidance",
    "search-guidance": "the opposite on the half without caption",
    "search-closed-loop": "closed loop",
    "search-mean-target": "raised to the mean over all frames",
    "search-both-sides": "also 8 latents against the concept",
    "search-second-layer": "layer of top2",
}


def search(_: Numbers) -> str:
    """Success on validation prompts by experiment of experiments/steering_search.csv."""
    found = pd.read_csv(ROOT / "experiments/steering_search.csv")
    wishes = sorted(set(zip(found["direction"], found["concept"], strict=True)))
    rows = []
    for name, part in found.groupby("experiment", sort=False):
        at = {(row.direction, row.concept): row for row in part.itertuples()}
        cells = [
            f"{at[w].success:.2f}{'' if at[w].within_budget else ' (over)'}" if w in at else "-"
            for w in wishes
        ]
        means = [part.loc[part["direction"] == d, "change"].mean() for d in ("off", "on")]
        rows.append([SEARCH[str(name)], *cells, *(f"{mean:.2f}" for mean in means)])
    heads = [f"{concept} {direction}" for direction, concept in wishes]
    return table(["", *heads, "mean change, off", "on"], rows)


def judges(_: Numbers) -> str:
    """How far to trust the judges: AUROC by family behind the codec."""
    found = read_json(ROOT / "metrics/train_judge.json")
    reports = found["family_judge"]["codec"]
    families = [name for name, entry in reports.items() if isinstance(entry, dict)]
    rows = []
    for family in families:
        cells = []
        for judge in ("family_judge", "musicnn"):
            entry = found[judge]["codec"].get(family)
            cells.append(
                "no tag"
                if entry is None
                else f"{number(entry['auroc'], 2)} [{number(entry['ci_low'], 2)}, "
                f"{number(entry['ci_high'], 2)}]"
            )
        crossed = [
            number(found["cross_font"][name][family]["auroc"], 2)
            for name in ("timgm6mb_to_fluidr3mono", "fluidr3mono_to_timgm6mb")
        ]
        rows.append([family.replace("_", " "), *cells, *crossed])
    head = ["AUROC, test compositions", "family judge, codec output", "musicnn, codec output"]
    fonts = ["TimGM6mb judge on FluidR3Mono", "FluidR3Mono judge on TimGM6mb"]
    return table([*head, *fonts], rows)


TABLES: dict[str, Callable[[Numbers], str]] = {
    "features": features,
    "models": models,
    "cues": cues,
    "shared": shared,
    "matched": matched,
    "found": found,
    "steering": steering,
    "costs": costs,
    "search": search,
    "judges": judges,
}


def filled(text: str) -> str:
    """README's text with every table made anew; KeyError for a table that nothing here makes."""
    numbers = Numbers()
    return BLOCK.sub(lambda m: f"{m[1]}{TABLES[m[2]](numbers)}{m[3]}", text)


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if (new := filled(text)) == text:
        return
    if "--write" not in sys.argv[1:]:
        sys.exit("README.md's tables are not those of metrics/: run `just tables`")
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
