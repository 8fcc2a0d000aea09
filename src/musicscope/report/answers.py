"""The first screens of the report: what was asked, the answer beside its null, a picture or sound.

templates/answers.jinja holds the questions. An answer whose files are missing is left out; the
section of its name says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from musicscope.core.io import read_json
from musicscope.core.stats import Estimate
from musicscope.report.elements import Cell, Figure, Moment, Players, Table
from musicscope.report.metrics import DASH, Sources, plain, read
from musicscope.report.sections import gallery, layers, matching, probes, sharing, steering
from musicscope.report.snippets import file_moment

CONCEPT = "guitar"
GALLERY_SECONDS = 8.0
Numbers = Iterable[tuple[str, Estimate, Estimate]]
"""(label, result, null or control)"""


@dataclass(frozen=True)
class Answer:
    """One question; `key` is the section with the details."""

    key: str
    table: Table | None = None
    """A row per number: result, null, and whether the interval lies above it."""
    above: int = 0
    """Numbers above their null."""
    shown: Figure | Players | None = None

    @property
    def total(self) -> int:
        """Numbers of the answer."""
        return len(self.table.rows) if self.table else 0


def answers(sources: Sources) -> list[Answer]:
    """All answers that there are numbers, a picture or sound for, in the order of the page."""
    made = (
        _steering(sources), _gallery(sources), _layers(sources), _dictionaries(sources),
        _probes(sources), _sharing(sources), _matching(sources), _maximisation(sources),
        _finder(sources), _judges(sources),
    )  # fmt: skip
    return [one for one in made if one.table or one.shown]


def _cell(number: Estimate, digits: int) -> Cell:
    detail = ""
    if number.has_interval:
        detail = f"[{plain(number.low, digits)}, {plain(number.high, digits)}]"
    return Cell(plain(number.value, digits), detail)


def _answer(
    key: str, caption: str, columns: tuple[str, str], numbers: Numbers,
    shown: Figure | Players | str | None = None, digits: int = 2,
) -> Answer:  # fmt: skip
    """Rows of all finite numbers; above: the low end exceeds the null's high end, where known."""
    rows, above = [], 0
    for label, result, null in numbers:
        if not math.isfinite(result.value):
            continue
        low = result.low if result.has_interval else result.value
        high = null.high if null.has_interval else null.value
        clear = low > high
        above += clear
        verdict = DASH if not math.isfinite(high) else "yes" if clear else "no"
        rows.append((label, _cell(result, digits), _cell(null, digits), verdict))
    table = Table(caption, ("", *columns, "above it"), tuple(rows)) if rows else None
    return Answer(key, table, above, None if isinstance(shown, str) else shown)


def _pairs(
    sources: Sources, name: str, rows: Sequence[tuple[str, str, str]], models: Sequence[str] = ()
) -> Numbers:
    """Numbers at (label, key, key of the null) in metrics/<name>, for every model in {}."""
    for model in models or sources.models:
        found = sources.metrics(name.format(model=model, slot=sources.slots[0]))
        for label, key, null in rows:
            yield label.format(model=model), read(found, key), read(found, null)


def _picture(content: object) -> Figure | None:
    """The first picture among a section's figures."""
    figures = content if isinstance(content, list | tuple) else [content]
    return next((one for one in figures if isinstance(one, Figure)), None)


def _steering(sources: Sources) -> Answer:
    rows = [
        (f"{{model}}: {CONCEPT} {direction}", f"concepts.{CONCEPT}.{direction}.methods.sae.success",
         f"concepts.{CONCEPT}.{direction}.methods.random_feature.success")
        for direction in ("off", "on")
    ]  # fmt: skip
    numbers, shown = [], None
    for model in sources.models:
        stage, found = steering.run_of(sources, model)
        if found is None:
            continue
        numbers += list(_pairs(sources, f"{stage}/{model}", rows, (model,)))
        shown = shown or _pair(sources, stage, model)
    heads = ("features", "random features")
    return _answer(
        "steering", "Success: share of pieces, less another seed's", heads, numbers, shown
    )


def _pair(sources: Sources, stage: str, model: str) -> Players | None:
    """The first example of the test of which both sounds were judged."""
    players, _ = steering.players(sources, stage, model, judged=True)
    if players is None:
        return None
    title, pair = players.rows[0]
    return Players(((f"{model}, {title}", pair),))


def _gallery(sources: Sources) -> Answer:
    rows: list[tuple[str, tuple[Moment, ...]]] = []
    for model in sources.models:
        folder = sources.root / gallery.FOLDER / model
        if (folder / "index.json").is_file():
            for piece in read_json(folder / "index.json")["pieces"][:1]:
                pair = [
                    file_moment(folder, piece[key], kind, "", f"{kind}: {piece['caption']}",
                                GALLERY_SECONDS)
                    for key, kind in (("file", model), ("real", "clip"))
                ]  # fmt: skip
                rows.append((piece["caption"], tuple(one for one in pair if one)))
    return Answer("gallery", shown=Players(tuple(rows)) if rows else None)


def _layers(sources: Sources) -> Answer:
    """The chosen layer's KL beside the median layer's."""
    section, numbers = layers.section(sources), []
    for model in sources.models:
        found = sources.metrics(f"ablate/{model}")
        if found is None or not (sources.root / "metrics/layers" / f"{model}.yaml").is_file():
            continue
        unit = layers.scores_of(found)[0]
        by_layer = {k: read(found, f"layers.{k}.mean.{unit}") for k in found["layers"]}
        values = sorted(one.value for one in by_layer.values() if math.isfinite(one.value))
        middle = Estimate(values[len(values) // 2]) if values else Estimate.read(None)
        for layer in sources.chosen_layers(model)[:1]:
            numbers.append((f"{model}: layer {layer}", by_layer[str(layer)], middle))
    shown = _picture(section.content["figures"])
    caption = "Effect of mean ablation at the output"
    return _answer("layers", caption, ("first choice", "median layer"), numbers, shown, 3)


def _dictionaries(sources: Sources) -> Answer:
    rows = [
        ("{model}: explained variance", "explained_variance", "explained_variance_pca"),
        ("{model}: agreement of seeds (cosine)", "stability", "stability_null"),
    ]
    name = "train_sae/{model}-{slot}"
    shown = sources.figure(
        f"train_sae/{sources.models[0]}-{sources.slots[0]}-density",
        f"{sources.models[0]}: features by how often they fire", "Features by how often they fire.",
    )  # fmt: skip
    heads = ("SAE", "PCA; random rows")
    return _answer(
        "dictionaries", f"SAEs, {sources.slots[0]}", heads, _pairs(sources, name, rows), shown
    )


def _probes(sources: Sources) -> Answer:
    at = f"concepts.{CONCEPT}"
    rows = [
        (f"{{model}}: {CONCEPT}", f"{at}.sae.test.auroc", f"{at}.shuffled.test.auroc"),
        (
            f"{{model}}: {CONCEPT}, against log-mel",
            f"{at}.sae.test.auroc",
            f"{at}.logmel.test.auroc",
        ),
    ]
    shown = _picture(probes.section(sources).content["figures"])
    numbers = _pairs(sources, "probe/{model}-{slot}", rows)
    return _answer(
        "probes", "AUROC on test", ("SAE codes", "shuffled labels; log-mel"), numbers, shown
    )


def _sharing(sources: Sources) -> Answer:
    found, rows = sources.metrics("train_usae"), []
    names = sharing.models_of(found) if found else []
    for i, source in enumerate(names):
        for j, target in enumerate(names):
            if i != j:
                rows.append((f"R2 of {target} from {source}", f"headline.r2_{i}_{j}",
                             f"null.mispaired.r2_{i}_{j}"))  # fmt: skip
    rows += [(f"co-fires / fires, {name}", f"headline.cofire_proportion_mean_{i}",
              f"null.mispaired.cofire_proportion_mean_{i}")
             for i, name in enumerate(names)]  # fmt: skip
    shown = _picture(sharing.section(sources).content.get("entropy"))
    numbers = _pairs(sources, "train_usae", rows, ("",))
    return _answer("sharing", "Universal SAE", ("paired", "mispaired clips"), numbers, shown)


def _matching(sources: Sources) -> Answer:
    rows = [("features common to all models", "sets.common", "sets.null_common")]
    shown = _picture(matching.section(sources).content.get("correlations"))
    numbers = _pairs(sources, "match_features", rows, ("",))
    return _answer(
        "matching", "One-to-one matches", ("found", "re-paired clips"), numbers, shown, 0
    )


def _maximisation(sources: Sources) -> Answer:
    rows = [("{model}", "headline.heard_reached", "headline.heard_null_reached")]
    name = f"maximize_activation/{sources.models[0]}"
    folder, shown = sources.root / "data" / name, None
    if (folder / "index.json").is_file():
        pieces = []
        for entry in read_json(folder / "index.json")["features"]:
            if entry["maximised"] and len(pieces) < 2:
                best = max(entry["maximised"], key=lambda one: min(one["sound"].values()))
                label = f"{entry['kind']} feature {next(iter(entry['numbers'].values()))}"
                reached = plain(min(best["sound"].values()), 2)
                pieces.append(
                    file_moment(folder, best["file"], label, f"{reached} of its best real clip")
                )
        kept = tuple(one for one in pieces if one is not None)
        shown = Players(((f"{sources.models[0]}: searched sounds", kept),)) if kept else None
    numbers = _pairs(sources, "maximize_activation/{model}", rows)
    return _answer("maximisation", "Activation of searched sound, in best real clips",
                   ("features", "random directions"), numbers, shown)  # fmt: skip


def _finder(sources: Sources) -> Answer:
    rows = [
        (f"{{model}}: features found for {CONCEPT}", f"sae.{CONCEPT}.discoveries",
         f"sae.{CONCEPT}.null.discoveries"),
        ("{model}: AUROC of the best on test", f"sae.{CONCEPT}.test.best_auroc",
         f"sae.{CONCEPT}.test.tested_auroc"),
    ]  # fmt: skip
    shown = sources.figure(
        f"find_concept/{sources.models[0]}", f"{sources.models[0]}: features found per concept",
        f"{sources.models[0]}: concepts found from recordings.",
    )  # fmt: skip
    numbers = _pairs(sources, "find_concept/{model}", rows)
    heads = ("result", "no guitar on either side; all features")
    return _answer("finder", "Concept finder", heads, numbers, shown)


def _judges(sources: Sources) -> Answer:
    rows = [
        ("family judge, after the codec", f"family_judge.codec.{CONCEPT}.auroc",
         f"family_judge.shuffled.{CONCEPT}.auroc"),
        ("musicnn, after the codec", f"musicnn.codec.{CONCEPT}.auroc",
         f"musicnn.shuffled.{CONCEPT}.auroc"),
    ]  # fmt: skip
    found = sources.metrics("train_judge")
    numbers = [(label, read(found, key), read(found, null)) for label, key, null in rows]
    shown = sources.figure(
        "train_judge/auroc", "AUROC of the judges by family", "Judges by family."
    )
    return _answer("judges", f"AUROC for {CONCEPT}", ("judge", "shuffled labels"), numbers, shown)
