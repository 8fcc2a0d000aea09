"""What the models share: the universal SAE and the crosscoder, each number beside its nulls."""

from __future__ import annotations

from typing import Any

from musicscope.report.charts import histogram
from musicscope.report.metrics import Sources, get
from musicscope.report.parts import (
    Cell,
    Details,
    Figure,
    Group,
    Note,
    Section,
    Table,
    number,
    plain,
)

NULLS = (("mispaired", "trained on mispaired clips"), ("shuffled", "other clips to each model"),
         ("random", "random dictionaries"))  # fmt: skip


def usae_section(sources: Sources) -> Section:
    """R2 matrix, firing entropy, co-fires and energy, and the crosscoder's decoder norms."""
    parts: list[Any] = [
        Note(
            "One sparse code for all models. A universal SAE computes it from any one model and "
            "decodes every model from it; a crosscoder computes it from all models together. R2 "
            "alone misleads, and so does firing entropy: a feature that both models use for "
            "unrelated things fires equally often for both. Read them beside the co-fires, and "
            "those beside what chance gives."
        )
    ]
    found = sources.metrics("train_usae")
    if found is None:
        parts.append(sources.missing("train_usae", "train_usae"))
    else:
        parts += _universal(sources, found)
    joint = sources.metrics("train_crosscoder")
    if joint is None:
        parts.append(sources.missing("train_crosscoder", "train_crosscoder"))
    else:
        parts += _crosscoder(sources, joint)
    return Section("shared", "What the models share", tuple(parts))


def _names(found: dict[str, Any]) -> list[str]:
    models = get(found, "models") or {}
    return [models[key] for key in sorted(models, key=int)]


def _entry(found: dict[str, Any], key: str, digits: int = 3) -> Cell:
    """A headline number of seed 0 with its interval."""
    entry = get(found, "headline") or {}
    entry = entry.get(key)
    return number(get(entry, "value"), get(entry, "low"), get(entry, "high"), digits)


def _over_seeds(found: dict[str, Any], key: str) -> Cell:
    entry = (get(found, "headline") or {}).get(key)
    spread = get(entry, "sd")
    return Cell(plain(get(entry, "mean")), "" if spread is None else f"sd {plain(spread)}")


def _null(found: dict[str, Any], null: str, key: str) -> Cell:
    return Cell(plain((get(found, f"null.{null}") or {}).get(key)))


def _shaded(cell: Cell, value: float | None) -> Cell:
    """With the shade of an R2 between 0 and 1."""
    if value is None:
        return cell
    return Cell(cell.text, cell.detail, round(9 * min(max(value, 0.0), 1.0)))


def _matrix(found: dict[str, Any], names: list[str]) -> Table:
    """R2 of each model's activations from each model's code, beside its nulls and own SAE."""
    head, own = get(found, "headline") or {}, get(found, "independent_r2") or {}
    rows = []
    for i, source in enumerate(names):
        for j, target in enumerate(names):
            key = f"r2_{i}_{j}"
            nulls = [(get(found, f"null.{null}") or {}).get(key) for null, _ in NULLS]
            rows.append((
                f"{target} from the code of {source}",
                _shaded(_entry(found, key), get(head.get(key), "value")),
                _over_seeds(found, key),
                *(_shaded(Cell(plain(value)), value) for value in nulls),
                _shaded(Cell(plain(own.get(str(j)))), own.get(str(j))),
            ))  # fmt: skip
    columns = ("seed 0", "over seeds", *(label for _, label in NULLS), "the target's own SAE")
    return Table(
        "R2 of one model's activations from another's code",
        ("", *columns),
        tuple(rows),
        "About the per-dimension mean: 0 is predicting the mean. Mispaired: the same training with "
        "each model hearing other clips, frame t staying frame t, so what it reaches from one "
        "model to the other is what position in the clip alone predicts. Other clips to each "
        "model: the paired dictionary, tested so; a model's R2 from its own code stays. "
        "Random: rows of equal mean and covariance. A model's own SAE is the upper anchor.",
    )


def _measures(found: dict[str, Any], names: list[str]) -> Table:
    rows = [("firing entropy, median", "firing_entropy_median"),
            ("firing entropy, mean", "firing_entropy_mean"),
            ("firing entropy, weighted by firings", "firing_entropy_weighted")]  # fmt: skip
    for what, key in (
        ("co-fires / fires, {}", "cofire_proportion_{}"),
        ("the same, mean over features, {}", "cofire_proportion_mean_{}"),
        ("the same, 100 features of highest energy, {}", "cofire_proportion_top_{}"),
        ("active a frame, {}", "l0_{}"),
    ):
        rows += [(what.format(name), key.format(i)) for i, name in enumerate(names)]
    rows += [("correlation of log energy and log co-fires", "energy_cofire_correlation"),
             ("dead features", "dead_fraction")]  # fmt: skip
    return Table(
        "Universal SAE: who fires its features, and when",
        ("", "seed 0", "over seeds", *(label for _, label in NULLS)),
        tuple(
            (label, _entry(found, key), _over_seeds(found, key),
             *(_null(found, null, key) for null, _ in NULLS))
            for label, key in rows
        ),
        "Firing entropy: 0 fires for one model only, 1 equally often for all. Co-fires: frames on "
        "which a feature fires for every model. Other clips to each model leave the firings as "
        "they are, so entropies there equal those of seed 0. Intervals resample test compositions "
        "for seed 0; only the spread over seeds tells how far another training would differ. "
        "Not shown: that a shared feature does the same in both models.",
    )  # fmt: skip


def _histogram(
    sources: Sources, name: str, title: str, x_label: str, caption: str, suffix: str = ""
) -> Figure | None:
    """plots/<name>.csv as a chart; `suffix` picks columns and is taken off their names."""
    table = sources.plot(name)
    if table is None or not len(table):
        return None
    columns = [c for c in table.columns if c not in ("low", "high") and c.startswith(suffix)]
    edges = [*table["low"].tolist(), float(table["high"].iloc[-1])]
    series = [(c.removeprefix(suffix).strip(), table[c].tolist()) for c in columns]
    if not series:
        return None
    return Figure(histogram(title, x_label, "features that fire", edges, series), caption)


def _universal(sources: Sources, found: dict[str, Any]) -> list[Any]:
    names = _names(found)
    figure = _histogram(
        sources, "train_usae/firing_entropy", "Firing entropy", "0: one model only, 1: all alike",
        "Features of the universal SAE by firing entropy (seed 0), beside the same for training "
        "on mispaired clips and for random dictionaries of equal statistics.",
    )  # fmt: skip
    frames = f"{plain(found.get('test_frames'))} test frames"
    parts: list[Any] = [
        Note(
            f"{plain(found.get('n_latents'))} features, {plain(found.get('k'))} active a frame, "
            f"update rule {found.get('method', 'unknown')}, slot {found.get('slot', 'unknown')}, "
            f"{frames} of {plain(found.get('test_compositions'))} compositions."
        ),
        _matrix(found, names),
    ]
    if figure is not None:
        parts.append(Group((figure,)))
    return [*parts, _measures(found, names)]


def _crosscoder(sources: Sources, found: dict[str, Any]) -> list[Any]:
    names = _names(found)
    rows = [(f"R2 of {name}", f"r2_{j}") for j, name in enumerate(names)]
    rows += [("features shared by norm", "norm_shared")]
    rows += [(f"features of {name} alone by norm", f"norm_own_{i}") for i, name in enumerate(names)]
    rows += [("mean distance from equal norms", "norm_spread"), ("dead features", "dead_fraction")]
    nulls = [pair for pair in NULLS if pair[0] != "shuffled"]
    table = Table(
        "Crosscoder: one code from all models together",
        ("", "seed 0", "over seeds", *(label for _, label in nulls)),
        tuple(
            (label, _entry(found, key), _over_seeds(found, key),
             *(_null(found, null, key) for null, _ in nulls))
            for label, key in rows
        ),
        "Shared by norm: every model's share of a feature's decoder norm is at least .6 of an "
        "equal share; alone: one model has over .9. Equal norms do not show equal meaning: the "
        "mispaired training tells how many look shared with nothing to share.",
    )  # fmt: skip
    charts = [
        _histogram(
            sources, "train_crosscoder/relative_norm", f"{name}'s share of the decoder norm",
            "0: none of it, 1: all of it", f"Features of the crosscoder by {name}'s share.",
            f"{name} ",
        )
        for name in names[-1:]
    ]  # fmt: skip
    shown = tuple(chart for chart in charts if chart is not None)
    return [Details("Crosscoder", (table, *((Group(shown),) if shown else ())))]
