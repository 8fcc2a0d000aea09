"""Write the tables of README.md and docs/ from metrics/ and benchmarks/, so that none can go stale.

    python -m tools.docs_tables            exit 1 and name the files whose tables differ
    python -m tools.docs_tables --write    rewrite the tables (`just tables`)

A table stands between `<!-- table: name -->` and `<!-- end -->`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
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
from musicscope.report.sections.probes import goals

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/results.md", "docs/performance.md")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PARAMS = load_params(ROOT / "params.yaml")
MODELS, SLOTS = PARAMS.models, PARAMS.slots
UNMEASURED = "not yet measured"


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


def measured(tree: dict[str, Any], dotted: str, digits: int = 3) -> str:
    """Write as `estimate` does, or that the number is not yet measured."""
    try:
        return estimate(tree, dotted, digits)
    except KeyError:
        return UNMEASURED


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
    added = metrics(f"steer_full/{model}")["concepts"]["bass"]["on"]["methods"]
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
        ["Switch a concept on", "share of pieces that get bass, less another seed's",
         estimate(added["sae"], "success"),
         f"prompt edit {number(added['prompt_edit']['success'])}, "
         f"random latents {number(added['random_feature']['success'])}"],
    ]  # fmt: skip
    return table(["capability", f"number ({model})", "value [95 %]", "null or control"], rows)


# --- results ------------------------------------------------------------------------------------


AGREEMENT = {
    "latents that return in other seeds": "returning.share",
    "the same of random rows": "returning.null_share",
    "their share of all firings": "returning.share_of_firings",
    "mean cosine of different rows (c_dec)": "decoder_cosine",
    "overlap of subspaces between seeds, latents used most": "subspaces.used.overlap",
    "its null": "subspaces.used.null",
    "overlap, unstable latents used most": "subspaces.unstable.overlap",
    "null of that": "subspaces.unstable.null",
}
BASELINES = {name: name.replace("_", " ") for name in PARAMS.train_sae.baselines}


def features() -> str:
    """SAEs, probes and the SAE's baselines, one column per model and slot."""
    columns = [(m, s) for m in MODELS for s in SLOTS]
    sae = {
        "explained variance": "explained_variance",
        "PCA of k components": "explained_variance_pca",
        "random dictionary": "explained_variance_random",
        "dead latents": "dead_fraction",
        "cross-entropy recovered": "ce_recovered",
        "stability between seeds": "stability",
        "null of stability": "stability_null",
        **AGREEMENT,
    }
    for key, label in (
        ("explained_variance", "explained variance"),
        ("ce_recovered", "cross-entropy recovered"),
        ("stability", "cosine with the seeds"),
        ("stability_null", "null of this cosine"),
    ):
        sae |= {f"{name}: {label}": f"baselines.{n}.{key}" for n, name in BASELINES.items()}
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
    for n, name in BASELINES.items():
        probe |= {
            f"guitar AUROC: {name}": f"{n}.test.auroc",
            f"16 features of the {name}": f"{n}.k_sparse.016.test.auroc",
            f"SAE minus {name}": f"sae_minus_{n}.test.difference",
        }
    mean = {
        "SAE codes": "sae", "16 SAE features": "sae_k016", "activations": "dense",
        "log-mel statistics": "logmel",
    }  # fmt: skip
    for n, name in BASELINES.items():
        mean |= {
            name: n, f"16 features of the {name}": f"{n}_k016",
            f"SAE minus {name}": f"sae_minus_{n}",
        }  # fmt: skip
    mean = {f"mean AUROC over concepts: {label}": key for label, key in mean.items()}
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
    rows += [
        [label, *(estimate(metrics(f"probe/{m}-{s}")["mean"]["test"], key) for m, s in columns)]
        for label, key in mean.items()
    ]
    return table(["", *(f"{m} {s} (layer {layer(m, s)})" for m, s in columns)], rows)


REPRESENTATIONS = {
    "sae": "SAE codes", "dense": "activations", "logmel": "log-mel statistics",
    "codec": "codec latents", "trivial": "seven trivial cues", "sae_minus_dense":
    "SAE minus activations", "sae_minus_logmel": "SAE minus log-mel",
}  # fmt: skip
CONTROLLED = {
    "test": "test", "heldout_source": "held-out source", "heldout_font": "held-out soundfont",
    "pairs_mixed": "matched pairs", "pairs_fluidr3mono": "matched pairs, held-out soundfont",
}  # fmt: skip


def _by_slot(rows: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """Table with one column per model and slot, of functions of metrics/probe."""
    columns = [(m, s) for m in MODELS for s in SLOTS]
    cells = [
        [label, *(of(metrics(f"probe/{m}-{s}")) for m, s in columns)] for label, of in rows.items()
    ]
    return table(["", *(f"{m} {s}" for m, s in columns)], cells)


def controls() -> str:
    """Guitar, and the mean over concepts, on every test set: the controls beside the codes."""
    rows: dict[str, Callable[[dict[str, Any]], str]] = {}
    for clip_set, label in CONTROLLED.items():
        pairs = clip_set.startswith("pairs")
        for key, name in REPRESENTATIONS.items():
            number = "accuracy" if pairs else "auroc"
            if key.startswith("sae_minus"):
                number = "difference"
            if number != "difference" or not pairs:
                path = f"concepts.guitar.{key}.{clip_set}.{number}"
                rows[f"{label}, guitar: {name}"] = partial(measured, dotted=path)
        for key in () if pairs else ("sae", "dense", "logmel", "trivial", "sae_minus_logmel"):
            name = f"{label}, mean over concepts: {REPRESENTATIONS[key]}"
            rows[name] = partial(measured, dotted=f"mean.{clip_set}.{key}")
    return _by_slot(rows)


def transfer() -> str:
    """Probes on a family of sounds that was left out of their training."""
    rows: dict[str, Callable[[dict[str, Any]], str]] = {}
    paths = {"mean over concepts": "transfer.mean", "guitar": "transfer.concepts.guitar.mean"}
    for font, name in (("timgm6mb", "TimGM6mb"), ("synthesis", "synthesis"),
                       ("fluidr3mono", "FluidR3Mono")):  # fmt: skip
        paths[f"guitar, {name} left out"] = f"transfer.concepts.guitar.families.{font}"
    for label, path in paths.items():
        for key in ("sae", "dense", "logmel", "sae_minus_dense", "sae_minus_logmel"):
            rows[f"{label}: {REPRESENTATIONS[key]}"] = partial(measured, dotted=f"{path}.{key}")
    return _by_slot(rows)


def transfer_goals() -> str:
    """Goals for transfer, each with value and verdict per model and slot."""
    labels = [(label, target) for label, _, target, _ in goals({})]
    return _by_slot({
        f"{label} {target}": lambda found, i=i: " ".join(
            (goals(found)[i][1].text(), f"({goals(found)[i][3]})")
        )
        for i, (label, target) in enumerate(labels)
    })  # fmt: skip


def dictionary_cost() -> str:
    """What replacing a layer by its SAE costs, in nats, beside the recovered share."""
    columns = [(m, s) for m in MODELS for s in SLOTS]

    def row(label: str, of: Callable[[dict[str, Any], float], str]) -> list[str]:
        cells = []
        for m, s in columns:
            gain = metrics(f"pretrain/{m}")["rows"]["decoder.gain_over_counts"]["estimate"]
            cells.append(of(metrics(f"train_sae/{m}-{s}"), gain["value"]))
        return [label, *cells]

    def added(sae: dict[str, Any]) -> float:
        return sae["ce_sae"] - sae["ce_clean"]

    rows = [
        row("cross-entropy added, nats per code", lambda sae, _: number(added(sae))),
        row("the same, share of the model's gain over a count model",
            lambda sae, gain: number(added(sae) / gain)),
        row("cross-entropy recovered, against mean ablation",
            lambda sae, _: estimate(sae, "ce_recovered")),
        row("active latents, share of the layer's dimensions",
            lambda sae, _: number(sae["l0"] / sae["width"])),
        row("stability between seeds, mean cosine", lambda sae, _: number(sae["stability"])),
        row("null of stability", lambda sae, _: number(sae["stability_null"])),
    ]  # fmt: skip
    return table(["", *(f"{m} {s}" for m, s in columns)], rows)


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


def carried() -> str:
    """Share of a concept in the caption that each layer's cross-attention carries, and control."""
    rows = []
    for model in MODELS:
        for concept, entry in metrics(f"ablate/{model}").get("concepts", {}).items():
            if "layers" not in entry:
                continue
            layers = entry["layers"]
            best = str(entry["best"])
            each = ", ".join(
                number(layers[i]["share"]["value"], 2) for i in sorted(layers, key=int)
            )
            rows.append([
                f"{model}: {concept}", each, best, estimate(layers[best], "share", 2),
                estimate(layers[best], "specific", 2), entry["control"].replace("_", " "),
                number(entry["kl"], 4),
            ])  # fmt: skip
    head = ["concept in the caption", "share by layer, from 0", "best layer", "its share"]
    return table([*head, "less the control's", "control", "KL of all layers"], rows)


def effects() -> str:
    """Effects of latents at the logits: how exact, and how they spread."""
    rows = []
    for model, slot in ((m, s) for m in MODELS for s in SLOTS):
        name = f"measure_effects/{model}-{slot}"
        of = metrics(name) if (ROOT / f"metrics/{name}.json").is_file() else {}
        if "kl" not in of:
            continue
        rows.append([
            f"{model}, {slot}", str(of["live"]), number(of["kl"]["median"], 4),
            number(of["kl"]["q95"], 4), number(of["kl"]["top_tenth_share"], 2),
            number(of["kl_rank_correlation"], 3), number(of["kl_ratio"], 2),
            number(of["confidence_rank_correlation"], 3), of["method"],
        ])  # fmt: skip
    head = ["latents at their usual value", "that fire", "KL, median", "95th percentile"]
    head += ["share of the strongest tenth", "rank correlation with true edits: KL", "KL, ratio"]
    return table([*head, "confidence", "method"], rows)


RANKINGS = {
    "share": "input score alone (share)", "output": "output score alone (KL)",
    "toward": "output score alone (pull towards the concept)",
    "share+output": "both: share, then KL", "share+toward": "both: share, then pull",
}  # fmt: skip


def latent_choice() -> str:
    """Input score, output score and both, from experiments/latent_choice.csv."""
    data = pd.read_csv(ROOT / "experiments/latent_choice.csv")
    test = data[data["split"] == "test"]
    rows = []
    for (model, score), part in test.groupby(["model", "score"], sort=False):
        pooled = part[part["concept"] == "all"].iloc[0]
        single = part[part["concept"] != "all"]
        means = [single.loc[single["direction"] == d, "change"].mean() for d in ("off", "on")]
        same = (data["model"] == model) & (data["score"] == score) & (data["concept"] == "all")
        chosen = data[same & (data["split"] == "validation")].iloc[0]

        def interval(key: str, row: pd.Series = pooled) -> str:
            return f"{row[key]:.3f} [{row[f'{key}_low']:.3f}, {row[f'{key}_high']:.3f}]"

        rows.append([
            f"{model}: {RANKINGS[str(score)]}", f"{chosen['change']:.3f}", interval("change"),
            "" if score == "share" else interval("minus_share"),
            *(f"{mean:.3f}" for mean in means), f"{pooled['ce_cost']:+.2f}",
        ])  # fmt: skip
    head = ["latents ranked by", "change, validation", "change, test", "less share's", "off", "on"]
    return table([*head, "cross-entropy"], rows)


def all_layers() -> str:
    """SAEs of every layer, from experiments/all_layers.csv."""
    data = pd.read_csv(ROOT / "experiments/all_layers.csv")

    def beside(row: pd.Series, key: str, *controls: str, digits: int = 2) -> str:
        """Write a number with its interval, if it has one, and its controls in brackets."""
        limits = (row.get(f"{key}_{side}", math.nan) for side in ("low", "high"))
        text = Estimate(row[key], *limits).text(digits)
        return f"{text} ({', '.join(f'{row[c]:.{digits}f}' for c in controls)})"

    rows = []
    for _, row in data.iterrows():
        steered = {"steering", "steering_random"} <= set(row.dropna().index)
        rows.append([
            f"{row['layer']:.0f}", f"{row['ablation_kl']:.2f}",
            beside(row, "explained_variance", "explained_variance_pca",
                   "explained_variance_random", digits=3),
            beside(row, "stability", "stability_null"),
            f"{row['returning']:.2f} ({row['returning_null']:.2f}), {row['seeds']:.0f} seeds",
            beside(row, "ce_recovered", "ce_ablated_rise", digits=3),
            beside(row, "guitar", "guitar_null", "guitar_dense"),
            beside(row, "mean", "mean_null", "mean_dense"),
            beside(row, "steering", "steering_random") if steered else UNMEASURED,
            Estimate(*(row[f"steering_minus{end}"] for end in ("", "_low", "_high"))).text(2)
            if steered else UNMEASURED,
            f"{row['steering_ce_cost']:+.2f} ({row['steering_random_ce_cost']:+.2f})"
            if steered else UNMEASURED,
        ])  # fmt: skip
    return table([
        "layer", "KL, ablated", "explained variance (PCA, random dictionary)", "stability (null)",
        "returns (null)", "cross-entropy recovered (nats at stake)",
        "guitar AUROC (permuted, activations)", "mean AUROC (permuted, activations)",
        "change by steering (random latents)", "less random latents",
        "cross-entropy of the edit (random latents)",
    ], rows)  # fmt: skip


def shared() -> str:
    """The universal SAE: each number beside its nulls."""
    usae = metrics("train_usae")
    first, second = MODELS
    named = {
        f"R2 of {first} from {first}'s code": "r2_0_0",
        f"R2 of {second} from {second}'s code": "r2_1_1",
        f"R2 of {second} from {first}'s code": "r2_0_1",
        f"R2 of {first} from {second}'s code": "r2_1_0",
        **{f"co-fires, mean over latents, {m}": f"cofire_proportion_mean_{i}"
           for i, m in enumerate(MODELS)},
        **{f"co-fires, median over latents, {m}": f"cofire_proportion_median_{i}"
           for i, m in enumerate(MODELS)},
        **{f"co-fires, all firings pooled, {m}": f"cofire_proportion_{i}"
           for i, m in enumerate(MODELS)},
        **{f"share of latents with 90 % of the firings, {m}": f"firing_concentration_{i}"
           for i, m in enumerate(MODELS)},
        "log energy against log co-fires, r": "energy_cofire_correlation",
        "firing entropy, median": "firing_entropy_median",
    }  # fmt: skip
    rows = []
    for label, key in named.items():
        seeds = "{mean:.3f} ± {sd:.3f}".format(**usae["over_seeds"][key])
        nulls = [number(usae["null"][n][key]) for n in ("mispaired", "shuffled", "random")]
        rows.append([label, estimate(usae["headline"], key), seeds, *nulls])
    at = next(n for n, row in enumerate(rows) if row[0].startswith("co-fires"))
    rows[at:at] = [
        [f"R2 of {b} from {a}'s {label}, ridge", estimate(usae["linear"], f"{source}.{key}"),
         "", "", "", ""]
        for source, label in RIDGE.items()
        for key, a, b in (("r2_0_1", first, second), ("r2_1_0", second, first))
    ]  # fmt: skip
    head = ["", "paired", "over seeds", "trained on mispaired clips", "tested on mispaired clips"]
    return table([*head, "random dictionary"], rows)


RIDGE = {
    "input": "embedded codes",
    "before": "layer before",
    "layer": "same layer",
    "redrawn": "same layer, weights permuted",
}


def linear() -> str:
    """By how much cross R2 of the universal SAE exceeds each ridge regression."""
    above, (first, second) = metrics("train_usae")["r2_above_linear"], MODELS
    rows = [
        [label, *(estimate(above[source], key) for key in ("r2_0_1", "r2_1_0"))]
        for source, label in RIDGE.items()
    ]
    head = ["cross R2 of the code, less that of a ridge regression from the other model's"]
    return table([*head, f"{second} from {first}", f"{first} from {second}"], rows)


def dedicated() -> str:
    """The crosscoder with latents dedicated to one model each, beside its nulls."""
    found = metrics("train_crosscoder")["dedicated"]
    named = {"shared latents, shared by norm": "norm_shared"}
    for i, m in enumerate(MODELS):
        named |= {
            f"R2 of {m}": f"r2_{i}",
            f"R2 of {m} without dedicated latents": f"r2_shared_{i}",
            f"dedicated latents of {m} that fire, per frame": f"active_own_{i}",
            f"their share of the energy in {m}": f"energy_own_{i}",
        }
    rows = []
    for label, key in named.items():
        nulls = [number(found["null"][n].get(key)) for n in ("mispaired", "random")]
        rows.append([label, estimate(found["headline"], key), *nulls])
    return table(["", "paired", "trained on mispaired clips", "random dictionary"], rows)


def scaling() -> str:
    """Latent Scaling of latents that seem exclusive to one model, and of shared ones."""
    parts = {
        "universal SAE": metrics("train_usae")["latent_scaling"],
        "dedicated crosscoder": metrics("train_crosscoder")["dedicated"]["latent_scaling"],
    }
    sets = {f"own_{i}": f"{m} alone" for i, m in enumerate(MODELS)} | {"shared": "shared"}
    rows = []
    for part, of in parts.items():
        for name, label in sets.items():
            found = of[name]
            cells = [str(found["latents"]), str(found["scored"])]
            for key in ("nu_error_median", "nu_activation_median", "genuine"):
                value = Estimate.read(found.get(key)).text(2)
                cells.append(f"{value} ({number(found.get(f'null_{key}'), 2)})")
            rows.append([f"{part}: {label}", *cells])
    head = ["latents", "examined", "scored", "nu of errors, median (unrelated music)"]
    return table([*head, "nu of activations, median", "exclusive by both"], rows)


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
    """What the finder finds with the SAE and with its baselines, by model and concept."""
    rows, labels = [], {"sae": "SAE"} | BASELINES
    for model in MODELS:
        of = metrics(f"find_concept/{model}")
        entries = [(c, label, of[n][c]) for c in of["sae"] for n, label in labels.items()]
        for concept, label, entry in entries:
            test, font = entry["test"], entry.get("heldout_font", {})
            rows.append([
                f"{model}: {concept}, {label}", str(entry["discoveries"]),
                str(entry["null"]["discoveries"]), number(test.get("found_above_half"), 2),
                number(font.get("found_above_half"), 2),
                estimate(test, "best_auroc", 2), measured(entry, "heldout_font.best_auroc", 2),
                measured(entry, "heldout_source.best_auroc", 2), number(test["tested_auroc"], 2),
                number(entry["few"]["any_discovery"], 2), number(entry["null"]["any_discovery"], 2),
            ])  # fmt: skip
    head = ["", "features found", "null", "same side in test", "the same, held-out soundfont",
            "best feature, test AUROC", "held-out soundfont", "held-out source"]  # fmt: skip
    few = ["draws of ten that find any", "the same without a concept"]
    return table([*head, "all features, test AUROC", *few], rows)


def confounding() -> str:
    """Simple cues beside the finder's best feature, and sides without a concept that differ."""
    rows = []
    for model in MODELS:
        for concept, entry in metrics(f"find_concept/{model}")["sae"].items():
            if "confounding" not in entry:
                rows.append([f"{model}: {concept}", *[UNMEASURED] * 7])
                continue
            cue, null = entry["confounding"], entry["null"]
            worst = "none" if cue["separation"] is None else (
                f"{cue['worst'].replace('_', ' ')} {number(cue['separation'], 2)}")  # fmt: skip
            shares = [
                f"{number(null['confounded'][name]['any_discovery'], 2)} "
                f"({number(null['confounded'][name]['warned'], 2)})"
                for name in ("rms", "centroid")
            ]
            rows.append([
                f"{model}: {concept}", number(cue["best_feature"], 2), worst,
                "yes" if cue["warns"] else "no", number(entry["few"]["warned"], 2),
                number(null["warned"], 2), *shares,
            ])  # fmt: skip
    head = ["AUROC on train clips", "best feature", "best simple cue beyond chance", "warning",
            "draws of ten that warn", "the same without a concept"]  # fmt: skip
    pairs = [f"{name} sides without a concept: found any (warned)"
             for name in ("loud and quiet", "bright and dull")]  # fmt: skip
    return table([*head, *pairs], rows)


STEERING = {
    "sae": "**SAE latents**",
    "sae_words": "**latents and words**",
    "frozen_decoder": "latents of the frozen decoder",
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


NOT_JUDGED = "not judged"
OVER = "no setting within the budget"


def outcome(entry: dict[str, Any], method: str, key: str, interval: bool = True) -> str:
    """Write a number of a method, or why there is none to claim."""
    of, chosen = entry["methods"][method], entry["chosen"].get(method)
    if of["not_judged"] and key in ("success", "headline"):
        return NOT_JUDGED
    if chosen is not None and not chosen["within_budget"]:
        return OVER
    return estimate(of, key, 2) if interval else number(of[key], 2)


def steering() -> str:
    """Success of every method by model and condition; intervals for the latents."""
    ours = ("sae", "sae_words")
    rows = [
        [name, *(outcome(entry, m, "success", m in ours) for m in STEERING)]
        for name, entry in conditions()
    ]
    return table(["success", *STEERING.values()], rows)


def headlines() -> str:
    """Harmonic mean of success, what is kept and quality, with its parts for the latents."""
    others = ("sae_words", "diff_means", "prompt_edit", "random_feature", "random_direction")
    rows = [
        [name, outcome(entry, "sae", "headline"),
         *(outcome(entry, "sae", key, False) for key in ("success", "kept", "quality")),
         *(outcome(entry, m, "headline", False) for m in others)]
        for name, entry in conditions()
    ]  # fmt: skip
    head = [STEERING["sae"], "its success", "its prompt kept", "its quality"]
    return table(["headline", *head, *(STEERING[m] for m in others)], rows)


def trade_offs() -> str:
    """Gain within the budget of distance, over whole curves with as many settings per method."""
    methods, rows = ("sae", "diff_means", "probe_direction"), []
    for name, entry in conditions():
        of = entry["curves"]
        if entry["methods"]["sae"]["not_judged"]:
            rows.append([name, *[NOT_JUDGED] * 7])
            continue
        rows.append([
            name, *(number(of[m]["area"], 2) for m in methods),
            *(estimate(of["area_minus"], m, 2) for m in methods[1:]),
            number(of["sae"]["smoothness"], 2), number(of["sae"]["monotone_share"], 2),
        ])  # fmt: skip
    names = [STEERING[m] for m in methods]
    head = [*(f"area, {n}" for n in names), *(f"latents minus {n}" for n in names[1:])]
    return table(["", *head, "step of gain (deviation)", "monotone prompts"], rows)


def doses() -> str:
    """Gain per unit of strength on test prompts, against draws of random controls."""
    rows = []
    for name, entry in conditions():
        of = entry["null"]
        if entry["methods"]["sae"]["not_judged"]:
            rows.append([name, *[NOT_JUDGED] * 5])
            continue
        cells = [estimate(of["sae"], "slope", 2)]
        for control in ("random_feature", "random_direction"):
            null = of[control]
            cells.append(f"{number(null['slope'], 2)} ({number(null['spread'], 2)}, "
                         f"{number(null['highest'], 2)}; {null['draws']})")  # fmt: skip
            cells.append(estimate(null, "sae_minus", 2))
        rows.append([name, *cells])
    head = ["latents"]
    for control in ("random latents", "random direction"):
        head += [f"{control}: mean (spread, highest; draws)", f"latents minus {control}"]
    return table(["gain per strength", *head], rows)


def hearing() -> str:
    """What judges hear in plain music: grounding, and verdicts that change on a second hearing."""
    rows = []
    for model in MODELS:
        of = metrics(f"steer_full/{model}")
        for concept, found in of["grounding"].items():
            flipped = ", ".join(
                f"{judge.replace('_', ' ')} {number(kinds['crop']['flipped'], 2)} / "
                f"{number(kinds['codec']['flipped'], 2)}"
                for judge, kinds in of["noise"][concept].items()
            )
            alone = ", ".join(
                f"{judge.replace('_', ' ')} {number(value, 2)}"
                for judge, value in found.get("judges", {}).items()
            )
            rows.append([f"{model}: {concept}", estimate(found, "auroc", 2), alone, flipped])
    head = ["grounding (AUROC)", "by judge", "verdicts changed by a crop / by the codec"]
    return table(["", *head], rows)


def gaps() -> str:
    """Success of the latents minus each rival's, with intervals."""
    rivals = {
        "frozen_decoder": "latents of the frozen decoder",
        "diff_means": "difference of means",
        "prompt_edit": "prompt edit",
        "random_feature": "random latents",
    }
    with_words = {"prompt_edit": "prompt edit", "diff_means_words": "difference of means and words"}
    rows = []
    for name, entry in conditions():
        if entry["methods"]["sae"]["not_judged"]:
            rows.append([name, *[NOT_JUDGED] * (len(rivals) + len(with_words))])
            continue
        rows.append([name, *(estimate(entry["sae_minus"], m, 2) for m in rivals),
                     *(estimate(entry["sae_words_minus"], m, 2) for m in with_words)])  # fmt: skip
    head = [f"latents minus {name}" for name in rivals.values()]
    return table(["", *head, *(f"latents and words minus {n}" for n in with_words.values())], rows)


def costs() -> str:
    """Cost of the same edits."""
    shown = ("sae", "sae_words", "diff_means", "diff_means_words", "prompt_edit", "reseed")
    keys = {"ce_cost": "+.2f", "distance": ".2f", "others_change": ".3f"}
    rows = [
        [name, *(", ".join(format(Estimate.read(e["methods"][m][key]).value, spec)
                           for key, spec in keys.items())
                 for m in shown)]
        for name, e in conditions()
    ]  # fmt: skip
    return table(["cross-entropy, distance, other families", *(STEERING[m] for m in shown)], rows)


def joint() -> str:
    """Two concepts at once: share of pieces with both changes."""
    rows = []
    for model in MODELS:
        for name, entry in metrics(f"steer_full/{model}")["joint"].items():
            cells = [estimate(entry[m], "all_wanted", 2)
                     for m in ("sae", "sae_words", "diff_means", "prompt_edit")]  # fmt: skip
            cells.insert(0, number(entry["sae"]["all_wanted_plain"], 2))
            cells = [NOT_JUDGED if cell == "n/a" else cell for cell in cells]
            rows.append([f"{model}: {name.replace('+', ', ')}", *cells])
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


def dictionaries() -> str:
    """Reconstruction and agreement by cell of experiments/dictionary_search.csv."""
    data = pd.read_csv(ROOT / "experiments/dictionary_search.csv", keep_default_na=False)
    head = ["model, slot", "k", "expansion", "M frames", "batch", "other", "explained variance",
            "stability (null)", "return", "their firings", "c_dec", "dead",
            "guitar AUROC"]  # fmt: skip
    rows = []
    for row in data.to_dict("records"):
        other = [row["activation"]] if row["activation"] != "topk" else []
        other += ["nested"] if row["matryoshka"] else []
        other += ["resampled"] if row["resample_every"] else []
        other += [f"rate {row['learning_rate']:g}"] if row["learning_rate"] != 0.003 else []
        rows.append(
            [f"{row['model']}, {row['slot']}", str(row["k"]), str(row["expansion"]),
             f"{row['samples'] / 1e6:g}", str(row["batch_size"]), ", ".join(other),
             f"{row['explained_variance']:.3f}",
             f"{row['stability']:.2f} ({row['stability_null']:.2f})",
             f"{row['returning']:.2f}", f"{row['share_of_firings']:.2f}",
             f"{row['decoder_cosine']:.3f}", f"{row['dead_fraction']:.3f}",
             f"{row['guitar_auroc']:.2f}"]
        )  # fmt: skip
    return table(head, rows)


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
        for judge in ("family_judge", "musicnn", "other_font_judge", "embedding_judge"):
            known = family in of[judge]["codec"]
            for clips in ("codec_source", "codec"):
                cells.append(
                    estimate(of[judge][clips], f"{family}.auroc", 2) if known else "no tag"
                )
        crossed = [
            number(of["cross_font"][name][family]["auroc"], 2)
            for name in ("mixed_to_fluidr3mono", "fluidr3mono_to_mixed")
        ]
        rows.append([family.replace("_", " "), *cells, *crossed])
    head = ["AUROC, test compositions"]
    for judge in ("classifier (chooses)", "musicnn", "FluidR3Mono classifier",
                  "embedding distance"):  # fmt: skip
        head += [f"{judge}, before the codec", "after it"]
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
        capabilities, features, dictionaries, controls, transfer, transfer_goals, dictionary_cost,
        models, cues, ablation, carried, effects, shared, linear, dedicated, scaling, matched,
        sets, maximised, found, confounding, steering, headlines, trade_offs, doses, hearing,
        gaps, costs, joint, search, latent_choice, all_layers, judges, sae_step, usae_step,
        extraction, generation, full_size, synthetic_features, gpu_goals, gpu_codes, gpu_steps,
        gpu_pieces, gpu_models, gpu_training,
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
