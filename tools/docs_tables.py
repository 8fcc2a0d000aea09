"""Write the tables of README.md and docs/ from metrics/ and benchmarks/, so that none can go stale.

    python -m tools.docs_tables            exit 1 and name the files whose tables differ
    python -m tools.docs_tables --write    rewrite the tables (`just tables`)

A table stands between `<!-- table: name -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from scipy import stats

from musicscope.config import load_params
from musicscope.core.command_line import run_program
from musicscope.core.io import read_json
from musicscope.core.stats import Estimate
from musicscope.report.metrics import short
from musicscope.report.sections.data import measure_name, row_estimate, target_text

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/results.md", "docs/performance.md")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PARAMS = load_params(ROOT / "params.yaml")
MODELS, SLOTS = PARAMS.models, PARAMS.slots


@cache
def metrics(name: str) -> dict[str, Any]:
    """Read metrics/<name>.json."""
    return read_json(ROOT / f"metrics/{name}.json")


@cache
def benchmark(name: str) -> dict[str, Any]:
    """Read benchmarks/results/<name>.json."""
    return read_json(ROOT / f"benchmarks/results/{name}.json")


def look(tree: dict[str, Any], dotted: str) -> Any:
    """Follow a dotted path; KeyError names the part that is absent."""
    for part in dotted.split("."):
        tree = tree[part]
    return tree


def number(entry: Any, digits: int = 3) -> str:
    """Write a number without its interval."""
    return Estimate(Estimate.read(entry).value).text(digits)


def estimate(tree: dict[str, Any], dotted: str, digits: int = 3) -> str:
    """Write the number at a dotted path, with its 95 % interval where the file has one."""
    return Estimate.read(look(tree, dotted)).text(digits)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def layer(model: str, slot: str) -> int:
    return yaml.safe_load((ROOT / f"metrics/layers/{model}.yaml").read_text())[slot]


# --- README -------------------------------------------------------------------------------------


def capabilities() -> str:
    """Seven capabilities of the pipeline: one number and its null or control each."""
    model, slot = MODELS[0], SLOTS[0]
    ablated = metrics(f"ablate/{model}")["layers"]
    kind, chosen = PARAMS.select_layers.kind, str(layer(model, slot))
    inner = [i for i in sorted(ablated, key=int)[1:-1] if i != chosen]
    weakest = min((ablated[i][kind]["kl"]["value"] for i in inner), default=None)
    sae, probe = metrics(f"train_sae/{model}-{slot}"), metrics(f"probe/{model}-{slot}")
    usae, finder = metrics("train_usae"), metrics(f"find_concept/{model}")["sae"]["bass"]
    best = metrics(f"maximize_activation/{model}")["headline"]
    off = metrics(f"steer_full/{model}")["concepts"]["guitar"]["off"]["methods"]
    rows = [
        ["Rank layers by ablation", f"KL of layer {chosen}, mean-ablated",
         estimate(ablated[chosen][kind], "kl"), f"weakest inner layer {number(weakest)}"],
        ["Train sparse autoencoders", "explained variance, k = " + str(sae["k"]),
         estimate(sae, "explained_variance"),
         f"PCA of k components {number(sae['explained_variance_pca'])}"],
        ["Probe for concepts", "guitar AUROC of SAE codes",
         estimate(probe, "concepts.guitar.sae.test.auroc"),
         f"log-mel {number(look(probe, 'concepts.guitar.logmel.test.auroc'))}, "
         f"shuffled labels {number(look(probe, 'concepts.guitar.shuffled.test.auroc'))}"],
        ["Share one code between models", f"R2 of {MODELS[1]} from {model}'s code",
         estimate(usae, "headline.r2_0_1"),
         f"trained on mispaired clips {number(look(usae, 'null.mispaired.r2_0_1'))}"],
        ["Find a concept's features", "features of bass in "
         f"{finder['with']} against {finder['without']} clips", str(finder["discoveries"]),
         f"both sides without bass {finder['null']['discoveries']}"],
        ["Maximise a feature", "activation, as a ratio to the best real clip",
         estimate(best, "heard_reached"),
         f"random direction {number(best['heard_null_reached'])}"],
        ["Switch a concept off", "share of guitar pieces that lose it",
         estimate(off["sae"], "success"),
         f"prompt edit {number(off['prompt_edit']['success'])}, "
         f"random latents {number(off['random_feature']['success'])}"],
    ]  # fmt: skip
    return table(["capability", f"number ({model})", "value [95 %]", "null or control"], rows)


# --- results ------------------------------------------------------------------------------------


def features() -> str:
    """SAEs and guitar probes, one column per model and slot."""
    columns = [(m, s) for m in MODELS for s in SLOTS]
    sae = {
        "explained variance": "explained_variance",
        "PCA of k components": "explained_variance_pca",
        "random dictionary": "explained_variance_random",
        "dead latents": "dead_fraction",
        "cross-entropy recovered": "ce_recovered",
        "stability between seeds": "stability",
        "null of stability": "stability_null",
    }
    probe = {
        "guitar AUROC: SAE codes": "sae.test.auroc",
        "16 SAE features": "k_sparse.016.test.auroc",
        "activations": "dense.test.auroc",
        "SAE minus activations": "sae_minus_dense.test.difference",
        "log-mel statistics": "logmel.test.auroc",
        "codec latents": "codec.test.auroc",
        "seven trivial cues": "trivial.test.auroc",
        "shuffled labels": "shuffled.test.auroc",
        "held-out soundfont: SAE codes": "sae.heldout_font.auroc",
        "held-out soundfont: activations": "dense.heldout_font.auroc",
        "matched pairs: SAE accuracy": "sae.pairs_mixed.accuracy",
        "matched pairs, held-out soundfont": "sae.pairs_fluidr3mono.accuracy",
    }
    rows = [
        [label, *(estimate(metrics(f"train_sae/{m}-{s}"), key) for m, s in columns)]
        for label, key in sae.items()
    ] + [
        [
            label,
            *(estimate(metrics(f"probe/{m}-{s}")["concepts"]["guitar"], key) for m, s in columns),
        ]
        for label, key in probe.items()
    ]
    return table(["", *(f"{m} {s} (layer {layer(m, s)})" for m, s in columns)], rows)


def models() -> str:
    """Evidence that the nano models learned music: all measures with a target, with controls."""
    of = {m: metrics(f"pretrain/{m}")["rows"] for m in MODELS}
    rows = []
    for key in dict.fromkeys(k for found in of.values() for k in found):
        entries = {m: found[key] for m, found in of.items() if key in found}
        first = next(iter(entries.values()))
        if first["target"] is None and key != "decoder.cross_entropy":
            continue
        met = [m for m, entry in entries.items() if entry["verdict"]]
        controls = []
        for name in first["control"]:
            shown = dict.fromkeys(short(e["control"].get(name), 3) for e in entries.values())
            controls.append(f"{name.replace('_', ' ')} {' / '.join(shown)}")
        rows.append([
            f"{measure_name(first)} ({first['estimate']['unit']})",
            *(row_estimate(entries[m]).text() if m in entries else "" for m in MODELS),
            target_text(first),
            "" if first["target"] is None else ", ".join(met) or "none",
            ", ".join(controls),
        ])  # fmt: skip
    return table(["", *MODELS, "target", "met by", "control"], rows)


def cues() -> str:
    """AUROC of trivial cues for guitar, on pairs and on other clips."""
    found = metrics("prepare_data")["trivial_cue_auroc"]
    names = sorted(found["clips"])
    labels = {
        "mixed_pairs": "pairs, TimGM6mb and synthesis",
        "fluidr3mono_pairs": "pairs, FluidR3Mono",
        "clips": "other clips, TimGM6mb and synthesis",
    }
    rows = [[label, *(number(found[key][n]) for n in names)] for key, label in labels.items()]
    return table(["", *(n.replace("_", " ") for n in names)], rows)


def ablation() -> str:
    """KL of every layer under each kind of ablation."""
    rows = []
    for model in MODELS:
        found = metrics(f"ablate/{model}")["layers"]
        for i in sorted(found, key=int):
            slots = [s for s in SLOTS if str(layer(model, s)) == i]
            cells = [estimate(found[i][kind], "kl") for kind in ("mean", "skip", "zero")]
            rows.append([f"{model} layer {i}", *cells, ", ".join(slots)])
    return table(["KL, nats per code", "mean", "skip", "zero", "slot"], rows)


def shared() -> str:
    """The universal SAE: each number beside its nulls."""
    usae = metrics("train_usae")
    first, second = MODELS
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
        seeds = "{mean:.3f} ± {sd:.3f}".format(**usae["over_seeds"][key])
        nulls = [number(usae["null"][n][key]) for n in ("mispaired", "shuffled", "random")]
        rows.append([label, estimate(usae["headline"], key), seeds, *nulls])
    head = ["", "paired", "over seeds", "trained on mispaired clips", "tested on mispaired clips"]
    return table([*head, "random dictionary"], rows)


def matched() -> str:
    """Features matched one to one, beside their nulls and their ceiling."""
    found = metrics("match_features")
    (pair,) = found["sae_sae"].values()
    rows = []
    for model in MODELS:
        seeds, usae = found["seeds"][model], found["sae_usae"][model]
        rows += [
            [f"{model}: with the other model's SAE, by activation",
             estimate(pair, f"musical_{model}"), number(pair[f"null_musical_{model}"])],
            [f"{model}: between two of its own SAEs (the ceiling)",
             estimate(seeds, "musical"), number(seeds["null_musical"])],
            [f"{model}: with the USAE, by decoder cosine", number(usae["matched"]),
             number(usae["null_matched"])],
        ]  # fmt: skip
    return table(["share of latents matched above .5", "value", "null"], rows)


def sets() -> str:
    """Sizes of the common, own and unmatched sets."""
    found = metrics("match_features")["sets"]
    rows = [
        [m, estimate(found, "common", 0), number(found["null_common"], 0), str(found[f"own_{m}"]),
         str(found[f"unmatched_{m}"])]
        for m in MODELS
    ]  # fmt: skip
    head = ["features", "common", "null of common", "own (stable, no partner)", "unmatched"]
    return table(head, rows)


def maximised() -> str:
    """What the token search reaches, as ratios to the best real clip, beside a random direction."""
    rows = []
    for name, file in (*((m, f"maximize_activation/{m}") for m in MODELS),
                       ("shared features", "maximize_shared")):  # fmt: skip
        h = metrics(file)["headline"]
        for variant, label in (("prior", "tokens, under the model's prior"), ("heard", "sound")):
            if f"{variant}_reached" in h:
                again = number(h.get(f"{variant}_sound"), 2) if variant == "prior" else ""
                rows.append([f"{name}: {label}", estimate(h, f"{variant}_reached", 2),
                             number(h.get(f"{variant}_null_reached"), 2), again])  # fmt: skip
    head = ["ratio to the best real clip", "reached", "random direction"]
    return table([*head, "after decoding and encoding"], rows)


def found() -> str:
    """What the finder finds with the SAE, by model and concept."""
    rows = []
    for model in MODELS:
        for concept, entry in metrics(f"find_concept/{model}")["sae"].items():
            test = entry["test"]
            rows.append([
                f"{model}: {concept}", str(entry["discoveries"]),
                str(entry["null"]["discoveries"]), number(test["found_above_half"], 2),
                estimate(test, "best_auroc", 2), number(test["tested_auroc"], 2),
                number(entry["few"]["any_discovery"], 2), number(entry["null"]["any_discovery"], 2),
            ])  # fmt: skip
    head = ["", "features found", "null", "same side in test", "best feature, test AUROC"]
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


def conditions() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("<model>: <concept> <direction>", entry) of all models with steer_full."""
    for model in MODELS:
        if (ROOT / f"metrics/steer_full/{model}.json").is_file():
            for concept, directions in metrics(f"steer_full/{model}")["concepts"].items():
                for direction, entry in directions.items():
                    yield f"{model}: {concept} {direction}", entry


def steering() -> str:
    """Success of every method by model and condition; intervals for the latents."""
    rows = []
    for name, entry in conditions():
        of = entry["methods"]
        cells = [number(of[m]["success"], 2) for m in STEERING]
        cells[:2] = [estimate(of[m], "success", 2) for m in ("sae", "sae_words")]
        rows.append([name, *cells])
    return table(["success", *STEERING.values()], rows)


def gaps() -> str:
    """Success of the latents minus each rival's, with intervals."""
    rivals = {
        "diff_means": "difference of means",
        "prompt_edit": "prompt edit",
        "random_feature": "random latents",
    }
    with_words = {"prompt_edit": "prompt edit", "diff_means_words": "difference of means and words"}
    rows = [
        [name, *(estimate(entry["sae_minus"], m, 2) for m in rivals),
         *(estimate(entry["sae_words_minus"], m, 2) for m in with_words)]
        for name, entry in conditions()
    ]  # fmt: skip
    head = [f"latents minus {name}" for name in rivals.values()]
    return table(["", *head, *(f"latents and words minus {n}" for n in with_words.values())], rows)


def costs() -> str:
    """Cost of the same edits."""
    shown = ("sae", "sae_words", "diff_means", "diff_means_words", "prompt_edit", "reseed")
    keys = {"ce_cost": "+.2f", "frechet": ".1f", "others_change": ".3f"}
    rows = [
        [name, *(", ".join(format(Estimate.read(e["methods"][m][key]).value, spec)
                           for key, spec in keys.items())
                 for m in shown)]
        for name, e in conditions()
    ]  # fmt: skip
    return table(["cross-entropy, Fréchet, other families", *(STEERING[m] for m in shown)], rows)


def joint() -> str:
    """Two concepts at once: share of pieces with both changes."""
    rows = []
    for model in MODELS:
        for name, entry in metrics(f"steer_full/{model}")["joint"].items():
            cells = [estimate(entry[m], "all_wanted", 2)
                     for m in ("sae", "sae_words", "diff_means", "prompt_edit")]  # fmt: skip
            plain = number(entry["sae"]["all_wanted_plain"], 2)
            rows.append([f"{model}: {name.replace('+', ', ')}", plain, *cells])
    names = [STEERING[m] for m in ("sae", "sae_words", "diff_means", "prompt_edit")]
    return table(["both wanted", "unedited", *names], rows)


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


def search() -> str:
    """Success on validation prompts by experiment of experiments/steering_search.csv."""
    data = pd.read_csv(ROOT / "experiments/steering_search.csv")
    columns = sorted(set(zip(data["direction"], data["concept"], strict=True)))
    rows = []
    for name, part in data.groupby("experiment", sort=False):
        columns_of = ["direction", "concept", "success", "within_budget"]
        at = {(d, c): numbers for d, c, *numbers in part[columns_of].itertuples(index=False)}
        cells = [
            f"{at[c][0]:.2f}{'' if at[c][1] else ' (over)'}" if c in at else "-" for c in columns
        ]
        means = [part.loc[part["direction"] == d, "change"].mean() for d in ("off", "on")]
        rows.append([SEARCH[str(name)], *cells, *(f"{mean:.2f}" for mean in means)])
    heads = [f"{concept} {direction}" for direction, concept in columns]
    return table(["", *heads, "mean change, off", "on"], rows)


def judges() -> str:
    """AUROC of the judges by family, on codec output, and across soundfonts."""
    of = metrics("train_judge")
    reports = of["family_judge"]["codec"]
    rows = []
    for family in (name for name, entry in reports.items() if isinstance(entry, dict)):
        cells = []
        for judge in ("family_judge", "musicnn"):
            known = family in of[judge]["codec"]
            cells.append(estimate(of[judge]["codec"], f"{family}.auroc", 2) if known else "no tag")
        crossed = [
            number(of["cross_font"][name][family]["auroc"], 2)
            for name in ("mixed_to_fluidr3mono", "fluidr3mono_to_mixed")
        ]
        rows.append([family.replace("_", " "), *cells, *crossed])
    head = ["AUROC, test compositions", "classifier, codec output", "musicnn, codec output"]
    fonts = ["classifier of mixed sounds on FluidR3Mono", "FluidR3Mono classifier on mixed sounds"]
    return table([*head, *fonts], rows)


# --- performance --------------------------------------------------------------------------------


def _steps(name: str, sizes: dict[str, str], steps: dict[str, str]) -> str:
    found = benchmark(name)
    rows = []
    for step, label in steps.items():
        cells = []
        for size in sizes:
            entry = found[size]["steps"].get(step)
            cells.append("" if entry is None else f"{entry['x_gemm']:.2f} ({entry['ms']:.0f} ms)")
        rows.append([label, *cells])
    return table([f"step, batch {found['batch']}", *sizes.values()], rows)


def sae_step() -> str:
    """CPU time of the SAE step, as ratios to one encode product."""
    sizes = {"d1024_F8192": "d 1024, F 8192", "d192_F1536": "d 192, F 1536",
             "d128_F1024": "d 128, F 1024"}  # fmt: skip
    return _steps("sae_step", sizes, {
        "gemm": "encode product (the floor)", "ours": "**musicscope**",
        "ours_auxk": "musicscope, AuxK on 10 % dead", "sparsify": "sparsify",
        "sparsify_auxk": "sparsify, AuxK", "dictionary_learning": "dictionary_learning",
        "dictionary_learning_auxk": "dictionary_learning, AuxK",
    })  # fmt: skip


def usae_step() -> str:
    """CPU time of the step over two models; a crosscoder's ratio is to both models' products."""
    sizes = {"d1024_1024_F8192": "d 1024, F 8192", "d128_192_F1536": "d 128 and 192, F 1536"}
    return _steps("usae_step", sizes, {
        "paper": "**paper's rule**", "paper_auxk": "paper's rule, AuxK on 10 % dead",
        "all_decoders": "all decoders", "released": "step of the paper's released code",
        "crosscoder": "crosscoder",
    })  # fmt: skip


def extraction() -> str:
    """CPU time of extraction, nano-small, as ratios."""
    found = benchmark("extraction")
    named = {
        "capture, against a bare forward that stops at the same layer": "capture_vs_truncated",
        "capture and store, against the same": "capture_and_store_vs_truncated",
        "whole forward, against the same": "full_vs_truncated",
        "transformers' output_hidden_states, against capture": "hidden_states_vs_capture",
    }
    rows = [[label, number(found[key], 2)] for label, key in named.items()]
    rows.append(
        ["milliseconds per clip, all", number(found["ms_cpu_a_clip"]["extract"]["median"], 0)]
    )
    rows.append(["of which the codec", number(found["ms_cpu_a_clip"]["codec"]["median"], 0)])
    return table(["extraction", "ratio"], rows)


def generation() -> str:
    """CPU time of steering against plain generation, and of generation against transformers."""
    ratios = benchmark("steering")["ratio_to_plain"]
    named = {
        "no change (strength 0)": "strength_0",
        "16 latents, captioned rows": "conditional",
        "16 latents, both halves of guidance": "both",
        "16 latents, closed loop": "closed_loop",
        "four concepts at once": "joint",
    }
    rows = [[label, number(ratios[key], 2)] for label, key in named.items()]
    slower = benchmark("generation")["ratio_to_ours"]["transformers"]
    rows.append(["transformers' generate, no edit", number(slower, 2)])
    return table(["generation, 32 guided prompts", "ratio to plain generation"], rows)


def full_size() -> str:
    """Seconds and bytes of published sizes with random weights, one CPU thread."""
    rows = []
    for model, runs in sorted(benchmark("full_size").items(), reverse=True):
        for device, of in runs.items():
            ablate = of["ablate_seconds"]
            rows.append([
                model, device, f"{of['codec_seconds']:.1f}", f"{of['pass_seconds']:.1f}",
                "not measured" if ablate is None else f"{ablate:.0f}",
                f"{of['weight_bytes'] / 1e9:.1f} GB", f"{of['extract_clip_bytes'] / 1e6:.0f} MB",
            ])  # fmt: skip
    head = ["model", "device", "codec, s per clip", "decoder, s per clip", "ablation, s per clip"]
    return table([*head, "weights", "memory per further clip"], rows)


def synthetic_features() -> str:
    """Recovery of known features: mean over seeds, with the t interval for MCC and F1."""
    labels = {
        "null": "random directions (null)",
        "ours_default": "musicscope, TopK, settings of params.yaml",
        "ours_topk": "musicscope, TopK",
        "ours_matryoshka": "**musicscope, TopK, Matryoshka**",
        "ours_batchtopk_matryoshka": "musicscope, BatchTopK, Matryoshka",
        "saelens_batchtopk": "SAELens, BatchTopK, published settings",
        "saelens_batchtopk_tuned": "SAELens, BatchTopK",
        "saelens_matryoshka_tuned": "SAELens, Matryoshka BatchTopK",
    }
    rows = []
    for name, runs in benchmark("synthetic_features")["recipes"].items():
        scores = pd.DataFrame(runs.values())
        mean, n = scores.mean(), len(scores)
        half = stats.t.ppf(0.975, n - 1) * scores.std() / n**0.5
        cells = [
            Estimate(mean[key], mean[key] - half[key], mean[key] + half[key], n).text()
            for key in ("mcc", "f1")
        ]
        cells += [f"{mean[key]:.3f}" for key in ("r2", "dead", "unique")]
        rows.append(
            [labels[name], str(n), *cells, f"{mean['l0']:.1f}", f"{mean['cpu_seconds']:.0f} s"]
        )
    head = ["recipe", "seeds", "MCC", "F1", "R2", "dead", "unique", "L0", "CPU time"]
    return table(head, rows)


GPU = "gpu-nvidia-h200"
SAE, USAE = "sae d1536 F24576 k64 B8192", "usae 2 models d1536 F24576 k64 B8192"
GOAL, SMALL_GOAL = "sae goal d1536 F12288 k64 B4096", "sae goal d768 F4096 k25 B1024"
UNMEASURED = "not yet measured"


def gpu(part: str) -> dict[str, Any]:
    """Read one part of the checks on a GPU."""
    return benchmark(GPU)["parts"][part]


def gpu_goals() -> str:
    """Goals for a GPU, each with its value and verdict."""
    steps, waits = gpu("d")["steps"], gpu("d")["waits"]
    errors = {
        name: max(
            error
            for check, entry in gpu("d")["check"].items()
            if check.endswith(name)
            for error in entry["gradient_errors"].values()
        )
        for name in ("float32", "tf32")
    }
    codes = [
        entry["equal_codes"]
        for codec in gpu("b")["codec"].values()
        for setting, entry in codec.items()
        if setting.endswith("TF32 off")
    ]
    passed = list(benchmark(GPU)["parts"].get("tests", {}).get("tests", {}).values())
    models = gpu("c")["model"]
    ablated = [
        f"{name}: {entry['ablation']['s_per_clip']:.2f} s per clip"
        for name, entry in models.items()
        if "s_per_clip" in entry.get("ablation", {})
    ]
    medium = any("extraction" in e for name, e in models.items() if "medium" in name)
    ratio = steps[USAE]["ours tf32"]["ms"] / steps[SAE]["ours tf32"]["ms"]
    dense = steps[GOAL]["ours tf32"]["per_s"] / steps[GOAL]["dense bfloat16"]["per_s"]
    small, large = (steps[name]["ours tf32"]["per_s"] for name in (SMALL_GOAL, GOAL))
    made = gpu("c")["model"]["musicgen-small float32"]
    real_time = [made[f"generation, {n} prompts"]["real_time_factor"] for n in (1, 8)]
    rows: list[tuple[str, str, bool | str]] = [
        ("all device tests pass", f"{passed.count('passed')} of {len(passed)}" if passed else "",
         all(test in ("passed", "skipped") for test in passed) if passed else UNMEASURED),
        ("codes equal on CPU and GPU, TF32 off", f"{min(codes):.4f}", min(codes) == 1),
        ("gradients within 1e-3 of float64, float32", f"{errors['float32']:.1e}",
         errors["float32"] < 1e-3),
        ("the same, TF32", f"{errors['tf32']:.1e}", errors["tf32"] < 1e-3),
        ("d 768, F 4,096, k 25, batch 1,024: 1,000 steps/s from GPU memory", f"{small:.0f}",
         small >= 1000),
        ("the same from the store: 500 steps/s", "", UNMEASURED),
        ("d 1,536, F 12,288, k 64, batch 4,096: 300 steps/s", f"{large:.0f}", large >= 300),
        ("the same: twice sparsify and dictionary_learning", "not installed there", UNMEASURED),
        ("the same: faster than dense autograd in bfloat16", f"{dense:.2f} of its rate",
         dense > 1),
        ("universal step of two models: at most 1.5 SAE steps (F 24,576, batch 8,192)",
         f"{ratio:.2f}", ratio <= 1.5),
        ("no wait for the device in a step", f"{waits['sae step']['count']} waits, "
         f"{waits['sae step auxk']['count']} with AuxK", waits["sae step"]["count"] == 0),
        ("capture and store: at most 1.05 of a bare forward pass", "", UNMEASURED),
        ("ablation of all layers, MusicGen small and medium", ", ".join(ablated),
         "reported" if ablated else UNMEASURED),
        ("extraction and generation, MusicGen medium", "", "below" if medium else UNMEASURED),
        ("generation as real-time factor, MusicGen small, float32",
         f"{real_time[0]:.2f} for 1 prompt, {real_time[1]:.1f} for 8", "reported"),
    ]  # fmt: skip
    cells = [
        [goal, value, verdict if isinstance(verdict, str) else "met" if verdict else "missed"]
        for goal, value, verdict in rows
    ]
    return table(["goal", "measured", "verdict"], cells)


def gpu_codes() -> str:
    """Share of the codec's codes on the GPU that equal the CPU's, with and without TF32."""
    rows = []
    for codec, found in gpu("b")["codec"].items():
        clips = next(e["clips"] for n, e in found.items() if n.startswith("cpu"))
        for batch in (1, clips):
            settings = [found[f"batch {batch}, TF32 {s}"] for s in ("off", "torch default", "on")]
            shares = [f"{s['equal_codes']:.4f} ({s['equal_frames']:.4f})" for s in settings]
            rows.append([f"{codec}, batch {batch}", *shares])
    return table(["equal codes (whole frames)", "TF32 off", "torch's default", "on"], rows)


def gpu_steps() -> str:
    """Milliseconds of a training step on a GPU, beside the product and dense autograd."""
    steps = gpu("d")["steps"]
    names = {SMALL_GOAL: "d 768, F 4,096, k 25, batch 1,024",
             GOAL: "d 1,536, F 12,288, k 64, batch 4,096",
             SAE: "d 1,536, F 24,576, k 64, batch 8,192", USAE: "the same, two models"}  # fmt: skip
    labels = {"product": "encode product (the floor)", "ours": "**musicscope**",
              "ours_auxk": "musicscope, AuxK on 10 % dead", "dense": "dense autograd"}  # fmt: skip
    rows = []
    for method, label in labels.items():
        for precision in ("float32", "tf32", "bfloat16"):
            if (method, precision) == ("ours", "bfloat16"):
                continue  # autocast does not reach its product
            found = [steps[name].get(f"{method} {precision}") for name in names]
            cells = [f"{e['ms']:.3g} ms, {e['share_of_ceiling']:.3f}" if e else "" for e in found]
            if any(cells):
                rows.append([f"{label}, {precision}", *cells])
    return table(["step: time, share of the card's product rate", *names.values()], rows)


def gpu_pieces() -> str:
    """Milliseconds of the parts of a step on a GPU, each alone."""
    pieces = gpu("d")["pieces"]
    rows = [[name, f"{entry['ms']:.2f}"] for name, entry in sorted(pieces.items())]
    return table(["d 1,536, F 24,576, k 64, batch 8,192", "ms"], rows)


def gpu_models() -> str:
    """MusicGen with random weights on a GPU, and the nano models' training."""
    rows = []
    for model, found in gpu("c")["model"].items():
        if "extraction" not in found:
            rows.append([model, *[UNMEASURED] * 6])
            continue
        e, made = found["extraction"], [found[f"generation, {n} prompts"] for n in (1, 8)]
        rows.append([
            model, f"{e['clips_per_s']:.0f}", f"{e['codec_ms']:.1f}", f"{e['pass_ms']:.1f}",
            f"{e['peak_gb']:.1f} GB",
            *(f"{m['ms_per_step']:.1f} ms ({m['real_time_factor']:.2f})" for m in made),
        ])  # fmt: skip
    head = ["clips of 10 s, 16 at a time", "clips/s", "codec, ms per clip", "decoder, ms per clip"]
    per_step = [f"generation step, {n} (real-time factor)" for n in ("1 prompt", "8 prompts")]
    return table([*head, "peak", *per_step], rows)


def gpu_training() -> str:
    """Rates of the nano models' training on a GPU."""
    found = gpu("e")["training"]
    rows = [
        ["codec, steps/s at 64 crops of 1 s", f"{found['codec']['steps_per_s']:.0f}"],
        ["encoding, clips of 10 s per second", f"{found['tokens']['clips_per_s']:.0f}"],
    ]
    for model in MODELS:
        rate, ce = (found[model][key] for key in ("steps_per_s", "held_out_ce"))
        rows.append([f"{model}, steps/s at 64 clips, beside the other", f"{rate:.1f}"])
        rows.append([f"{model}, held-out cross-entropy at the end", f"{ce:.2f}"])
    return table(["training", "value"], rows)


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        capabilities, features, models, cues, ablation, shared, matched, sets, maximised, found,
        steering, gaps, costs, joint, search, judges, sae_step, usae_step, extraction, generation,
        full_size, synthetic_features, gpu_goals, gpu_codes, gpu_steps, gpu_pieces, gpu_models,
        gpu_training,
    )
}  # fmt: skip


def filled(text: str) -> str:
    """Fill every table of a page anew; KeyError for a table that nothing here makes."""
    return BLOCK.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[3]}", text)


def main() -> None:
    stale = []
    for name in PAGES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            stale.append(name)
            if "--write" in sys.argv[1:]:
                path.write_text(new, encoding="utf-8")
    if stale and "--write" not in sys.argv[1:]:
        sys.exit(f"tables of {', '.join(stale)} differ from metrics/: run `just tables`")


if __name__ == "__main__":
    run_program(main)
