"""The feature pages: data of every live feature in scripts, shared sound, and one static viewer.

A folder that opens from file://, where a page may load scripts but no JSON:

index.html                 the viewer
manifest.js                dictionaries, clips, names of concepts
index/<dictionary>.js      columns to search and sort by, one entry per feature
shards/<dictionary>-<n>.js records of `SHARD` features each
clips/<n>.mp3, <n>.png     each clip once, for all features: sound, and mel spectrogram

Curves are text: one of `ALPHABET` per frame, 0 to 63 in units of 1/63 of the highest value.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from musicscope.core.io import atomic_dir, read_json
from musicscope.core.progress import Bar
from musicscope.data.clips import ClipStore
from musicscope.features.selection import LEVEL
from musicscope.report.build import HERE, environment, hash_of
from musicscope.report.cards import concept_text, number_of
from musicscope.report.metrics import plain, short
from musicscope.report.snippets import KBITS, constant_mp3, png, spectrogram_levels

ALPHABET = np.frombuffer(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8
)
SHARD = 128
"""Features per shard: some 250 kB."""
STUDIO = "http://127.0.0.1:7860/"
ALIGNMENT = ("concept", "concept_auroc", "concept_heldout_auroc", "concept_p")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Tables:
    """What the pages are made of, read once."""

    dictionaries: list[dict[str, Any]]
    clips: list[str]
    bands: int
    features: pd.DataFrame
    samples: pd.DataFrame
    known: dict[tuple[str, str, int], Row]
    """(kind, model, feature) -> row of data/features/features.parquet"""
    stability: dict[str, pd.DataFrame]
    """By dictionary; SAEs alone"""
    effects: dict[str, pd.DataFrame]
    """By dictionary; SAEs of models with logits"""
    found: dict[tuple[str, str, int], list[Row]]
    """(kind, model, feature) -> rows of the concept finder at q <= .05"""
    slot: str
    """Slot of `known`."""
    steered: str
    """Slot that the studio steers."""


def read(root: Path, slot: str, finder_slot: str, steered: str) -> Tables:
    """Read all tables below `root`; only data/feature_activity and data/features must be there."""
    folder = root / "data/feature_activity"
    if not (folder / "dictionaries.json").is_file():
        raise FileNotFoundError(f"{folder} is missing: run dvc repro feature_activity")
    listed = read_json(folder / "dictionaries.json")
    table = pd.read_parquet(root / "data/features/features.parquet")
    known: dict[tuple[str, str, int], Row] = {
        (r["kind"], r["model"], r["feature"]): r for r in table.to_dict("records")
    }
    stability, effects, found = {}, {}, defaultdict(list)
    for one in listed["dictionaries"]:
        if one["kind"] != "sae":
            continue
        path = root / "data/sae" / one["model"] / one["slot"] / "stability.parquet"
        if path.is_file():
            stability[one["name"]] = pd.read_parquet(path).set_index("feature")
        path = root / "data/effects" / one["model"] / f"{one['slot']}.parquet"
        if path.is_file() and len(effect := pd.read_parquet(path)):
            effects[one["name"]] = effect.set_index("feature")
    for model in dict.fromkeys(one["model"] for one in listed["dictionaries"] if one["model"]):
        path = root / "data/find_concept" / model / "features.parquet"
        if path.is_file():
            rows = pd.read_parquet(path)
            for row in rows[rows["q"] <= LEVEL].to_dict("records"):
                if row["dictionary"] == "usae" or finder_slot == slot:
                    found[row["dictionary"], model, row["feature"]].append(row)
    return Tables(
        listed["dictionaries"], listed["clips"], listed["bands"],
        pd.read_parquet(folder / "features.parquet"), pd.read_parquet(folder / "samples.parquet"),
        known, stability, effects, dict(found), slot, steered,
    )  # fmt: skip


def title(one: Row) -> str:
    """Name of a dictionary for readers."""
    kind = {"sae": "SAE", "usae": "universal SAE", "crosscoder": "crosscoder"}[one["kind"]]
    owner = f"{one['model']} " if one["model"] else ""
    return f"{owner}{kind}, {one['slot']} ({one['layer'].replace('layers.', 'layer ')})"


def _name(kind: str, model: str, slot: str) -> str:
    return "-".join(filter(None, (kind, model, slot)))


def _curve(values: np.ndarray) -> str:
    return ALPHABET[np.asarray(values, np.uint8) >> 2].tobytes().decode("ascii")


def _rounded(value: float) -> float | None:
    """Three significant digits, which halves the files; None for no number."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _excerpts(samples: pd.DataFrame, clip_of: Mapping[str, int]) -> dict[int, list[list]]:
    """Feature -> [band, clip, first frame, [value, per model], [curve, per model]]."""
    made: dict[tuple[int, int, int], list] = {}
    columns = ["feature", "band", "rank", "clip", "first", "value", "curve"]
    for feature, band, rank, clip, first, value, curve in samples[columns].itertuples(index=False):
        key = (feature, band, rank)
        entry = made.setdefault(key, [int(band), clip_of[clip], int(first), [], []])
        entry[3].append(_rounded(float(value)))
        entry[4].append(_curve(curve))
    found: dict[int, list[list]] = defaultdict(list)
    for (feature, _, _), entry in sorted(made.items()):
        found[feature].append(entry)
    return found


def _facts(tables: Tables, one: Row, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Numbers of a feature in words, as (name, value)."""
    facts: list[tuple[str, str]] = []
    number = rows[0]["feature"]
    for row in rows:
        through = f", {row['model']}" if len(rows) > 1 else ""
        facts.append((
            f"fires{through}",
            f"{100 * row['firing_rate']:.2g} % of frames, {100 * row['clips']:.0f} % of clips",
        ))  # fmt: skip
    if (table := tables.stability.get(one["name"])) is not None:
        row = table.loc[number]
        facts.append((
            "in other seeds",
            f"decoder cosine {plain(number_of(row['seed_cosine']), 2)}, random rows "
            f"{plain(number_of(row['null_cosine']), 2)}: "
            + ("returns" if row["returns"] else "does not return"),
        ))  # fmt: skip
    known = _known(tables, one, rows)
    if known and one["kind"] == "sae":
        facts.append(("set", known[0]["set"] or "none"))
        correlation = number_of(known[0]["seed_correlation"])
        facts.append(("found by seed 1", f"correlation {plain(correlation, 2)}"))
        facts.append(("energy", short(number_of(known[0]["energy"]))))
    elif known:
        first = known[0]
        facts.append(("firing entropy", plain(number_of(first["firing_entropy"]))))
        shares = (plain(number_of(row["cofire_proportion"]), 2) for row in known)
        facts.append(("co-fires / fires", ", ".join(shares)))
    return facts


def _known(tables: Tables, one: Row, rows: Sequence[Row]) -> list[Row]:
    """Rows of data/features/features.parquet on a feature; none for other dictionaries."""
    if not one["described"]:
        return []
    keys = [(one["kind"], row["model"], row["feature"]) for row in rows]
    return [tables.known[key] for key in keys if key in tables.known]


def _concept(tables: Tables, one: Row, rows: Sequence[Row]) -> tuple[Row, str]:
    """The row of the strongest concept, and that concept in words."""
    tested: Sequence[Row] = _known(tables, one, rows) or rows
    best = max(tested, key=lambda row: number_of(row["concept_auroc"]) or -1.0)
    text = concept_text(best)
    return best, f"{text} (through {best['model']})" if len(rows) > 1 else text


def _matches(tables: Tables, one: Row, rows: Sequence[Row]) -> list[tuple[str, str, int]]:
    """(text, dictionary, feature) of the same feature elsewhere."""
    found = []
    for row in _known(tables, one, rows):
        if one["kind"] == "usae":
            if row["counterpart"] >= 0:
                value = plain(number_of(row["counterpart_cosine"]), 2)
                name = _name("sae", row["model"], tables.slot)
                found.append((f"{row['model']} SAE: decoder cosine {value}", name,
                              row["counterpart"]))  # fmt: skip
            continue
        for what, text in (("partner", "paired"), ("best", "most similar")):
            if row[what] >= 0:
                value = plain(number_of(row[f"{what}_correlation"]), 2)
                name = _name("sae", row[f"{what}_model"], tables.slot)
                found.append((f"{row[f'{what}_model']} SAE, {text}: correlation {value}", name,
                              row[what]))  # fmt: skip
        if row["counterpart"] >= 0:
            value = plain(number_of(row["counterpart_cosine"]), 2)
            found.append((f"universal SAE: decoder cosine {value}",
                          _name("usae", "", tables.slot), row["counterpart"]))  # fmt: skip
    return found


def _effect(tables: Tables, one: Row, number: int) -> dict[str, Any] | None:
    """What a latent does at the logits, and the share of latents with a smaller effect."""
    table = tables.effects.get(one["name"])
    if table is None or number not in table.index:
        return None
    row, live = table.loc[number], table[table["value"] > 0]
    toward = [float(row[c] * row["value"]) for c in table.columns if c.startswith("toward_")]
    return {
        "text": [
            ("KL at its usual value", f"{short(float(row['kl']))} nats per code, more than "
             f"{100 * float((live['kl'] < row['kl']).mean()):.0f} % of features"),
            ("probability of the most likely code", short(float(row["confidence"]))),
        ],
        "toward": [_rounded(value) for value in toward],
    }  # fmt: skip


def _finder(tables: Tables, one: Row, rows: Sequence[Row]) -> list[list[str]]:
    """Concepts that the finder reports the feature for: concept, q, AUROC, held-out values."""
    if one["kind"] == "crosscoder" or one["slot"] != tables.slot:
        return []
    keys = ("auroc", "test_auroc", "heldout_font_auroc", "heldout_source_auroc")
    return [
        [f"{entry['concept']}" + (f" (through {row['model']})" if len(rows) > 1 else ""),
         short(float(entry["q"])),
         *(plain(number_of(entry.get(key))) for key in keys)]
        for row in rows
        for entry in tables.found.get((one["kind"], row["model"], row["feature"]), ())
    ]  # fmt: skip


def _steer(tables: Tables, one: Row, number: int) -> str:
    """The studio's address on this feature; "" if it does not steer this dictionary."""
    if one["kind"] != "sae" or one["slot"] != tables.steered:
        return ""
    return f"{STUDIO}?model={one['model']}&feature={number}"


def records(tables: Tables, one: Row) -> Iterator[tuple[dict, dict]]:
    """(record, entry of the index) of every live feature of a dictionary, by number."""
    clip_of = {clip: i for i, clip in enumerate(tables.clips)}
    own = tables.features[tables.features["dictionary"] == one["name"]]
    samples = _excerpts(tables.samples[tables.samples["dictionary"] == one["name"]], clip_of)
    by_feature: dict[int, list[Row]] = defaultdict(list)
    for row in own.to_dict("records"):
        by_feature[row["feature"]].append(row)
    for number, rows in sorted(by_feature.items()):
        best, text = _concept(tables, one, rows)
        effect = _effect(tables, one, number)
        record = {
            "n": number,
            "facts": _facts(tables, one, rows),
            "concept": text,
            "streams": [
                [row["model"], _rounded(row["highest"]), np.asarray(row["histogram"]).tolist()]
                for row in rows
            ],
            "samples": samples.get(number, []),
            "near": [
                [int(n), _rounded(float(cosine))]
                for n, cosine in zip(rows[0]["nearest"], rows[0]["nearest_cosine"], strict=True)
            ],
            "matches": _matches(tables, one, rows),
            "effect": effect,
            "finder": _finder(tables, one, rows),
            "steer": _steer(tables, one, number),
        }
        p, auroc = number_of(best["concept_p"]), number_of(best["concept_auroc"])
        kl = None if effect is None else float(tables.effects[one["name"]].loc[number, "kl"])
        entry = {
            "n": number,
            "rate": _rounded(max(row["firing_rate"] for row in rows)),
            "concept": best["concept"] if p is not None and p <= LEVEL else "",
            "auroc": None if auroc is None or p is None or p > LEVEL else _rounded(auroc),
            "kl": None if kl is None else _rounded(kl),
            "match": _match(tables, one, rows),
        }
        yield record, entry


def _match(tables: Tables, one: Row, rows: Sequence[Row]) -> float | None:
    """The best correlation or cosine with a feature elsewhere, to sort by."""
    key = "best_correlation" if one["kind"] == "sae" else "counterpart_cosine"
    values = [v for r in _known(tables, one, rows) if (v := number_of(r[key])) is not None]
    return _rounded(max(values)) if values else None


def _call(name: str, *values: object) -> str:
    """A script that hands `values` to the viewer."""
    text = ",".join(json.dumps(value, separators=(",", ":"), allow_nan=False) for value in values)
    return f"musicscope.{name}({text});\n"


def viewer(heading: str) -> str:
    """index.html: one style sheet and script by hash, scripts and media from its own folder."""
    assets = HERE / "assets"
    style = "".join((assets / name).read_text("utf-8") for name in ("report.css", "viewer.css"))
    script = (assets / "viewer.js").read_text("utf-8")
    # A file:// page has no origin of its own, so 'self' alone would allow nothing there.
    policy = (
        "default-src 'none'; img-src 'self' file: data:; media-src 'self' file:; "
        f"style-src {hash_of(style)}; script-src 'self' file: {hash_of(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    return environment().get_template("viewer.jinja").render(
        title=heading, policy=policy, style=style, script=script
    )  # fmt: skip


def _write_clips(folder: Path, clips: ClipStore, ids: Sequence[str]) -> list[list]:
    """Write sound and spectrogram of each clip; its id, caption and seconds."""
    folder.mkdir()
    rows = clips.rows.reset_index(drop=True)
    place = {clip: i for i, clip in enumerate(rows["id"])}
    listed = []
    for i, clip in enumerate(Bar(ids, desc="sound", unit="clips")):
        if clip not in place:
            raise ValueError(f"data/clips has no clip {clip}: run dvc repro feature_activity")
        audio = clips.audio([place[clip]])[0]
        (folder / f"{i}.mp3").write_bytes(constant_mp3(audio, clips.sample_rate))
        picture = spectrogram_levels(audio, clips.sample_rate)
        (folder / f"{i}.png").write_bytes(png(picture))
        seconds = round(len(audio) / clips.sample_rate, 3)
        listed.append([clip, str(rows["caption"].iloc[place[clip]] or ""), seconds])
    return listed


def write(folder: str | Path, tables: Tables, clips: ClipStore) -> None:
    """Write all pages, atomically; says beforehand how large they will be."""
    count = sum(tables.features.groupby("dictionary")["feature"].nunique())
    sound = len(tables.clips) * clips.samples / clips.sample_rate * KBITS / 8e3
    text = (
        tables.samples["curve"].str.len().sum() / 1e6 + 70e-6 * len(tables.samples) + 8e-4 * count
    )
    print(
        f"{count} features: about {text:.0f} MB, sound of {len(tables.clips)} clips: "
        f"{1.25 * sound:.0f} MB",
        file=sys.stderr,
    )
    with atomic_dir(folder) as out:
        listed = []
        for part in ("index", "shards"):
            (out / part).mkdir()
        for one in Bar(tables.dictionaries, desc="features", unit="dictionaries"):
            name, made = one["name"], list(records(tables, one))
            for i in range(0, len(made), SHARD):
                part = [record for record, _ in made[i : i + SHARD]]
                script = _call("shard", name, i // SHARD, part)
                (out / "shards" / f"{name}-{i // SHARD}.js").write_text(script, "ascii")
            columns = {
                key: [entry[key] for _, entry in made] for key in (made[0][1] if made else ())
            }
            (out / "index" / f"{name}.js").write_text(_call("index", name, columns), "ascii")
            effects = tables.effects.get(name)
            toward = [] if effects is None else [
                column.removeprefix("toward_") for column in effects if column.startswith("toward_")
            ]  # fmt: skip
            listed.append({
                "name": name, "title": title(one), "kind": one["kind"], "model": one["model"],
                "slot": one["slot"], "models": one["models"], "rate": one["frame_rate"],
                "latents": one["latents"], "live": len(made), "toward": toward,
            })  # fmt: skip
        described = _write_clips(out / "clips", clips, tables.clips)
        manifest = {
            "dictionaries": listed, "clips": described, "shard": SHARD, "bands": tables.bands
        }  # fmt: skip
        (out / "manifest.js").write_text(_call("manifest", manifest), "ascii")
        models = dict.fromkeys(one["model"] for one in tables.dictionaries if one["model"])
        (out / "index.html").write_text(viewer(f"Features of {' and '.join(models)}"), "utf-8")
