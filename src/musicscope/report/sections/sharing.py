"""Universal SAE and crosscoder: what the models share, beside its nulls."""

from __future__ import annotations

from collections.abc import Iterable

from musicscope.report.elements import Cell, Figure, Section, Table
from musicscope.report.metrics import Sources, Tree, cell, get, in_words, missing, plain

NULLS = {
    "mispaired": "trained on mispaired clips",
    "shuffled": "other clips for each model",
    "random": "random dictionaries",
}
LINEAR = {
    "input": "embedded codes",
    "before": "the layer before",
    "layer": "the same layer",
    "redrawn": "the same layer, weights permuted",
}
"""Sources of the ridge regressions, from floor to ceiling and a network without training."""


def section(sources: Sources) -> Section:
    """What the models share."""
    universal, joint = sources.metrics("train_usae"), sources.metrics("train_crosscoder")
    content, absent = {}, []
    if universal is None:
        absent.append(missing("train_usae", "train_usae"))
    else:
        content |= {
            "n_latents": plain(universal.get("n_latents")), "k": plain(universal.get("k")),
            "method": universal.get("method", "unknown"), "slot": universal.get("slot", "unknown"),
            "frames": plain(universal.get("test_frames")),
            "compositions": plain(universal.get("test_compositions")),
            "r2": _r2(universal), "linear": _linear(universal), "measures": _measures(universal),
            "scaling": _scaling(universal, "latent_scaling"),
            "entropy": _histogram(
                sources, "train_usae/firing_entropy", "Firing entropy",
                "firing entropy (0: one model only, 1: all equally often)",
                "Features of the universal SAE by firing entropy (seed 0), beside training on "
                "mispaired clips and random dictionaries of equal statistics.",
            ),
        }  # fmt: skip
    if joint is None:
        absent.append(missing("train_crosscoder", "train_crosscoder"))
    else:
        last = models_of(joint)[-1:]
        content |= {
            "joint": _joint(joint), "dedicated": _dedicated(joint),
            "dedicated_scaling": _scaling(joint, "dedicated.latent_scaling"),
            "norms": [
                _histogram(
                    sources, "train_crosscoder/relative_norm", f"Share of {name}",
                    f"share of {name} in the decoder norm (0: none, 1: all)",
                    f"Features of the crosscoder by the share of {name} in the decoder norm.",
                    f"{name} ",
                )
                for name in last
            ],
        }  # fmt: skip
    return Section("sharing", "What the models share", content, tuple(absent))


def models_of(found: Tree) -> list[str]:
    models = get(found, "models") or {}
    return [models[key] for key in sorted(models, key=int)]


def _over_seeds(found: Tree, key: str) -> Cell:
    mean, spread = (get(found, f"over_seeds.{key}.{name}") for name in ("mean", "sd"))
    return Cell(plain(mean), "" if spread is None else f"sd {plain(spread)}")


def _rows(
    found: Tree, rows: Iterable[tuple[str, str]], nulls: Iterable[str]
) -> tuple[tuple[Cell | str, ...], ...]:
    """Per (label, key): seed 0 with its interval, mean and spread over seeds, and the nulls."""
    return tuple(
        (
            label,
            cell(found, f"headline.{key}"),
            _over_seeds(found, key),
            *(cell(found, f"null.{null}.{key}") for null in nulls),
        )
        for label, key in rows
    )


def _r2(found: Tree) -> Table:
    """R2 of each model's activations from each model's code, beside nulls and its own SAE."""
    names, rows = models_of(found), []
    for i, source in enumerate(names):
        for j, target in enumerate(names):
            key = f"r2_{i}_{j}"
            controls = [*(f"null.{null}.{key}" for null in NULLS), f"independent_r2.{j}"]
            rows.append((
                f"{target} from the code of {source}",
                cell(found, f"headline.{key}", shaded=True),
                _over_seeds(found, key),
                *(cell(found, control, shaded=True) for control in controls),
            ))  # fmt: skip
    columns = ("", "seed 0", "over seeds", *NULLS.values(), "the target's own SAE")
    return Table("R2 of one model's activations from another's code", columns, tuple(rows))


def _measures(found: Tree) -> Table:
    rows = [("firing entropy, median", "firing_entropy_median"),
            ("firing entropy, mean", "firing_entropy_mean"),
            ("firing entropy, weighted by firings", "firing_entropy_weighted")]  # fmt: skip
    for what, key in (
        ("co-fires / fires, mean over features, {}", "cofire_proportion_mean_{}"),
        ("the same, median, {}", "cofire_proportion_median_{}"),
        ("the same, 100 features of highest energy, {}", "cofire_proportion_top_{}"),
        ("the same, all firings pooled, {}", "cofire_proportion_{}"),
        ("share of features with 90 % of the firings, {}", "firing_concentration_{}"),
        ("active per frame, {}", "l0_{}"),
    ):
        rows += [(what.format(name), key.format(i)) for i, name in enumerate(models_of(found))]
    rows += [("correlation of log energy and log co-fires", "energy_cofire_correlation"),
             ("dead features", "dead_fraction")]  # fmt: skip
    columns = ("", "seed 0", "over seeds", *NULLS.values())
    return Table(
        "Universal SAE: for which models a feature fires", columns, _rows(found, rows, NULLS)
    )


def _linear(found: Tree) -> Table | None:
    """R2 by ridge regression, and by how much the universal code exceeds it, between models."""
    if not get(found, "linear"):
        return None
    names, rows = models_of(found), []
    for i, source in enumerate(names):
        for j, target in enumerate(names):
            if i != j:
                for stream, label in LINEAR.items():
                    rows.append((
                        f"{target} from {label} of {source}",
                        cell(found, f"linear.{stream}.r2_{i}_{j}", shaded=True),
                        cell(found, f"r2_above_linear.{stream}.r2_{i}_{j}"),
                    ))  # fmt: skip
    columns = ("", "R2 of a ridge regression", "universal code less that")
    return Table("What a linear map gives without a shared code", columns, tuple(rows))


def _scaling(found: Tree, at: str) -> Table | None:
    """Latent Scaling: nu of the sets of latents, beside unrelated music."""
    if not get(found, at):
        return None
    sets = {f"own_{i}": f"{name} alone" for i, name in enumerate(models_of(found))}
    keys = ("latents", "scored", "nu_error_median", "null_nu_error_median",
            "nu_activation_median", "null_nu_activation_median", "genuine",
            "null_genuine")  # fmt: skip
    rows = tuple(
        (label, *(cell(found, f"{at}.{name}.{key}") for key in keys))
        for name, label in (sets | {"shared": "shared"}).items()
    )
    columns = ("features that seem of", "features", "scored", "nu of errors", "unrelated music",
               "nu of activations", "unrelated music", "exclusive by both",
               "unrelated music")  # fmt: skip
    return Table("Latent Scaling: does the other model have the feature?", columns, rows)


def _dedicated(found: Tree) -> Table | None:
    """The crosscoder with latents of one model each, beside its nulls."""
    if not get(found, "dedicated"):
        return None
    rows = [("features shared by norm, of the shared ones", "norm_shared"),
            ("dead features", "dead_fraction")]  # fmt: skip
    for i, name in enumerate(models_of(found)):
        rows += [(f"R2 of {name}", f"r2_{i}"),
                 (f"R2 of {name} without dedicated features", f"r2_shared_{i}"),
                 (f"dedicated features of {name} that fire, per frame", f"active_own_{i}"),
                 (f"share of their energy in {name}", f"energy_own_{i}")]  # fmt: skip
    columns = ("", "paired", NULLS["mispaired"], NULLS["random"])
    at = [f"dedicated.{part}" for part in ("headline", "null.mispaired", "null.random")]
    body = tuple((label, *(cell(found, f"{part}.{key}") for part in at)) for label, key in rows)
    return Table("Crosscoder with features dedicated to one model each", columns, body)


def _joint(found: Tree) -> Table:
    names, nulls = models_of(found), [null for null in NULLS if null != "shuffled"]
    rows = [(f"R2 of {name}", f"r2_{j}") for j, name in enumerate(names)]
    rows += [("features shared by norm", "norm_shared")]
    rows += [(f"features of {name} alone by norm", f"norm_own_{i}") for i, name in enumerate(names)]
    rows += [("mean distance from equal norms", "norm_spread"), ("dead features", "dead_fraction")]
    return Table(
        "Crosscoder: one code from all models together",
        ("", "seed 0", "over seeds", *(NULLS[null] for null in nulls)),
        _rows(found, rows, nulls),
    )


def _histogram(
    sources: Sources, name: str, title: str, x_label: str, caption: str, prefix: str = ""
) -> Figure | str:
    """The histogram plots/<name>; `prefix` picks columns and is taken off their names."""
    if (table := sources.plot(name)) is None:
        return f"Left out: plots/{name}.csv is not there."
    series = {
        column.removeprefix(prefix).strip(): table[column].astype(int).tolist()
        for column in table.columns
        if column not in ("low", "high") and column.startswith(prefix)
    }
    words = in_words(title, "features that fire", f"{x_label}, from", table["low"].tolist(), series)
    return sources.figure(name, words, caption)
