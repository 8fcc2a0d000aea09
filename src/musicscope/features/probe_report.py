"""Tables and charts of the probes: plots/probe/<model>-<slot>.{csv,png} and -features.csv."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from musicscope.core import plots, stats
from musicscope.core.io import write_text
from musicscope.core.seeding import seed_for
from musicscope.data.splits import (
    CLASS_SETS,
    HELDOUT_FONT,
    MAIN,
    PAIR_SETS,
    TRAIN_FONT,
    clip_sets,
    known_sets,
    label_matrix,
)
from musicscope.dictionaries.codes import Pools
from musicscope.features.probes import rank_features

LABELS = {
    "sae": "SAE",
    "dense": "activations",
    "logmel": "log-mel",
    "codec": "codec",
    "trivial": "trivial",
    "shuffled": "shuffled",
}
SET_LABELS = {
    "test": f"unheard compositions, {TRAIN_FONT}",
    "heldout_font": f"unheard compositions, {HELDOUT_FONT} (held out)",
}


def probe_table(result: dict[str, Any]) -> pd.DataFrame:
    """One row a (concept, representation, set), from `probes.run_probes`.

    Representations are those of the probes, ``sae_k016`` for k-sparse, and ``sae_minus_dense`` for
    paired differences of AUROC; pair sets carry `accuracy` instead of AUROC.
    """
    records = []
    for concept, entry in result["concepts"].items():
        probes = {name: numbers for name, numbers in entry.items() if name != "k_sparse"}
        probes |= {f"sae_k{size}": numbers for size, numbers in entry["k_sparse"].items()}
        positives = probes.pop("positives")
        for name, numbers in probes.items():
            chosen = {key: numbers.get(key) for key in ("pooling", "c", "validation_auroc")}
            for clip_set in (*CLASS_SETS, *PAIR_SETS):
                if clip_set in numbers:
                    key = {"concept": concept, "representation": name, "set": clip_set}
                    sizes = {"positives": positives[clip_set]}
                    records.append(key | numbers[clip_set] | chosen | sizes)
    columns = ["concept", "representation", "set", "auroc", "ci_low", "ci_high"]
    columns += ["average_precision", "average_precision_ci_low", "average_precision_ci_high"]
    columns += ["accuracy", "difference", "pooling", "c", "validation_auroc", "positives"]
    return pd.DataFrame(records).reindex(columns=columns)


def feature_table(
    rows: pd.DataFrame,
    pools: Pools,
    result: dict[str, Any],
    n_bootstrap: int,
    seed: int,
    concept: str = MAIN,
    top: int = 20,
) -> pd.DataFrame:
    """The latents that tell a concept best on train, and what each is worth alone on test.

    Ranked as for the k-sparse probes, in the pooling that the SAE probe of `result` (from
    `probes.run_probes`) chose; `difference` is in standard deviations of the pooled code
    (negative: fires less with the concept); AUROC is of the raw pooled code times that sign.
    """
    has = label_matrix(rows, [concept])[0][:, 0]
    pooling = result["concepts"][concept]["sae"]["pooling"]
    sets, seed = known_sets(rows, clip_sets(rows), concept), seed_for(seed, "probe", "bootstrap")
    groups, codes, train = rows["group"].to_numpy(str), pools[pooling], sets["train"]
    order, difference = rank_features(codes[train], has[train])
    records = []
    for rank, latent in enumerate(order[:top], start=1):
        record: dict[str, Any] = {"rank": rank, "latent": int(latent), "pooling": pooling}
        record["difference"] = difference[latent]
        record["clips_active"] = (codes[train, latent] > 0).mean()
        scores = codes[:, latent].astype(np.float64) * np.sign(difference[latent])
        for name in ("train", "validation", *CLASS_SETS):
            if len(at := sets[name]):
                record[f"{name}_auroc"] = stats.auroc(scores[at], has[at])
        at = sets["test"]
        statistic = stats.auroc_of(scores[at], has[at])
        low, high = stats.bootstrap_groups(statistic, groups[at], n_bootstrap, seed)
        records.append(record | {"test_ci_low": low, "test_ci_high": high})
    return pd.DataFrame(records)


def plot_probes(table: pd.DataFrame, title: str, concept: str = MAIN) -> Figure:
    """AUROC of one concept: bars by representation and test set; k-sparse curves beside them."""
    table = table[table["concept"] == concept].set_index(["set", "representation"])
    sparse = [name for name in table.loc["test"].index if name.startswith("sae_k")]
    middle = "sae_k016" if "sae_k016" in sparse else sparse[-1]
    names = ["sae", middle, *list(LABELS)[1:]]
    labels = [
        LABELS.get(name, f"SAE k={int(name[5:])}" if name == middle else name) for name in names
    ]
    figure, (axes,) = plots.new_figure(1, 2, size=(12.0, 4.4), width_ratios=[1.7, 1], sharey=True)
    sets = [name for name in CLASS_SETS if name in table.index.get_level_values(0)]
    for series, clip_set in enumerate(sets):
        part = table.loc[clip_set]
        bars, curve = part.loc[names], part.loc[sparse]
        label = SET_LABELS[clip_set] if len(sets) > 1 else "unheard compositions"
        plots.interval_bars(
            axes[0], labels, bars["auroc"], bars["ci_low"], bars["ci_high"],
            colour=plots.COLOURS[series], offset=0.42 * (series - (len(sets) - 1) / 2), width=0.4,
            name=label,
        )  # fmt: skip
        k = [int(name[5:]) for name in sparse]
        limits = (curve["auroc"], curve["ci_low"], curve["ci_high"])
        plots.interval_curve(axes[1], k, *limits, name=label, series=series)
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(k, [str(size) for size in k])
    axes[1].minorticks_off()
    axes[0].set(title=f"{title}: {concept}", ylabel="AUROC (95 % over compositions)")
    drawn = table[table.index.get_level_values(1).isin([*names, *sparse])]
    axes[0].set_ylim(min(0.3, drawn["ci_low"].min() - 0.02), 1.05)
    axes[1].set(title="k-sparse probes on SAE codes", xlabel="latents used (k)")
    for axis in axes:
        axis.axhline(0.5, color="#555555", lw=1, ls="--")
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=2)
    return figure


def write(stem: str, title: str, table: pd.DataFrame, features: pd.DataFrame) -> None:
    """`stem`.csv (all concepts), `stem`-features.csv and `stem`.png (the main concept)."""
    for name, frame in ((f"{stem}.csv", table), (f"{stem}-features.csv", features)):
        write_text(name, frame.to_csv(index=False, float_format="%.6g"))
    plots.save_figure(plot_probes(table, title), f"{stem}.png")
