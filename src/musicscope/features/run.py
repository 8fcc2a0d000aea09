"""The whole comparison of M models' dictionaries, from stores and weights to pairs and a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from musicscope.core.seeding import seed_for
from musicscope.data.splits import clip_sets, label_matrix
from musicscope.data.taxonomy import FAMILIES
from musicscope.dictionaries.codes import Codes, encode_clips, pool_clips
from musicscope.dictionaries.core import TopKSAE
from musicscope.features import association as feature_concepts
from musicscope.features import matching
from musicscope.features import sharing as feature_sets
from musicscope.features import table as feature_table
from musicscope.features.matching import Match

CHOOSE, REPORT, FONT = "validation", "test", "heldout_font"


@dataclass(frozen=True)
class Subject:
    """One model: where its activations are, and the SAEs on them."""

    name: str
    store: Any
    """An ActivationStore whose clips are the rows of the clip table"""
    saes: list[TopKSAE]
    """By seed: 0 is the one compared, 1 says what is reproduced, all are held against the USAE"""


@dataclass(frozen=True)
class Settings:
    """Section match_features of params.yaml, train_usae.fire_threshold, and how to run."""

    slot: str
    threshold: float
    fire_threshold: float
    null_draws: int
    permutations: int
    bootstrap: int
    min_clips: int
    top_clips: int
    seed: int
    workers: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Comparison:
    """All pairs of all dictionaries. Keys are models, or two models in the order of params.yaml."""

    codes: dict[tuple[str, str], dict[str, Codes]]
    """{(model, "sae", "sae-1" or "usae"): {set of clips: codes}}"""
    matches: dict[tuple[str, str], Match]
    """SAE against SAE of the next model"""
    highest: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]
    """{(model, other)}, both orders: the most similar latent on test [F], and its correlation"""
    seeds: dict[str, Match]
    """SAE of seed 0 against seed 1 of the same model"""
    decoders: dict[str, list[Match]]
    """SAE of each seed against the USAE; only seed 0 has a null"""
    sets: dict[str, np.ndarray]
    """Name of the set of each SAE latent"""


def check(subjects: Sequence[Subject], usae: Any, rows: pd.DataFrame, slot: str) -> None:
    """ValueError for whatever would make this a comparison of unrelated things."""
    names = tuple(s.name for s in subjects)
    if len(names) < 2:
        raise ValueError("match_features compares models: name at least two in params.yaml: models")
    if usae.kind != "usae" or tuple(usae.names) != names or usae.slot != slot:
        raise ValueError(
            f"data/usae/seed-0 is a {usae.kind} of {', '.join(usae.names)} at {usae.slot}, params "
            f"ask for a usae of {', '.join(names)} at {slot}: run dvc repro train_usae"
        )
    for s, width in zip(subjects, usae.widths, strict=True):
        if list(s.store.ids) != rows["id"].tolist():
            raise ValueError(f"{s.store.folder} holds other clips than data/clips: run dvc repro")
        if len(s.saes) < 2:
            raise ValueError(
                f"{s.name} has one SAE, but a second one tells what is reproduced: set "
                "train_sae.seeds to at least 2"
            )
        if len(widths := {s.store.width, width, *(sae.width for sae in s.saes)}) > 1:
            raise ValueError(
                f"{s.name}: activations, SAEs and USAE are {sorted(widths)} wide: run dvc repro"
            )


def clip_positions(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """Positions in the clip table of validation, test and, where it has any, heldout_font."""
    sets = {name: at for name, at in clip_sets(rows).items() if name in (CHOOSE, REPORT, FONT)}
    for name in (CHOOSE, REPORT):
        if not len(sets[name]):
            raise ValueError(
                f"no clips in {name}: raise prepare_data.timgm6mb_clips.{name} (rendered clips) or "
                "prepare_data.recordings.limits (recordings)"
            )
    return {name: at for name, at in sets.items() if len(at)}


def encode_all(
    subjects: Sequence[Subject], usae: Any, at: dict[str, np.ndarray], settings: Settings
) -> dict[tuple[str, str], dict[str, Codes]]:
    """Codes of every dictionary on every set of clips; their size is printed before."""
    frames = sum(int(subjects[0].store.frames[rows].sum()) for rows in at.values())
    size = frames * 8 * sum(usae.k + sum(sae.k for sae in s.saes[:2]) for s in subjects)
    print(f"{frames} frames, codes in memory: {size / 1e6:.0f} MB", file=sys.stderr)
    jobs: list[tuple[Subject, str, Any, int]] = []
    for i, s in enumerate(subjects):
        jobs += [(s, "sae", s.saes[0].encode, s.saes[0].n_latents)]
        jobs += [(s, "sae-1", s.saes[1].encode, s.saes[1].n_latents)]
        jobs += [(s, "usae", partial(usae.encode, model=i), usae.n_latents)]
    return {
        (s.name, kind): {
            name: encode_clips(s.store, rows, encode, F, settings.workers, settings.device)
            for name, rows in at.items()
            if kind != "sae-1" or name != FONT
        }
        for s, kind, encode, F in tqdm(jobs, desc="encode", unit="dictionary", file=sys.stderr)
    }


def compare(
    subjects: Sequence[Subject],
    usae: Any,
    rows: pd.DataFrame,
    at: dict[str, np.ndarray],
    settings: Settings,
) -> Comparison:
    """Every match with its null and ceiling, and the sets. `at` as from `clip_positions`."""
    names = [s.name for s in subjects]
    codes = encode_all(subjects, usae, at, settings)
    groups = {name: rows["group"].to_numpy(str)[where] for name, where in at.items()}
    pairs = list(combinations(names, 2))
    runs = len(pairs) + len(names) + sum(len(s.saes) for s in subjects)
    draws = (settings.null_draws, settings.bootstrap)
    matches, highest, seeds, decoders = {}, {}, {}, {}
    with tqdm(total=runs, desc="match", unit="pair", file=sys.stderr) as bar:
        for a, b in pairs:
            first, second = codes[a, "sae"], codes[b, "sae"]
            matches[a, b] = matching.match_activations(first, second, groups, *draws, settings.seed)
            r = matching.correlation(first[REPORT].matrix, second[REPORT].matrix)
            highest[a, b], highest[b, a] = (r.argmax(1), r.max(1)), (r.argmax(0), r.max(0))
            bar.update()
        for name in names:
            seeds[name] = matching.match_activations(
                codes[name, "sae"], codes[name, "sae-1"], groups, *draws, settings.seed
            )
            bar.update()
        for i, s in enumerate(subjects):
            other = matching.raw_decoder(usae, i)
            decoders[s.name] = []
            for seed, sae in enumerate(s.saes):
                own, stream = sae.W_dec.cpu().numpy(), seed_for(settings.seed, s.name)
                nulls = 0 if seed else settings.null_draws
                decoders[s.name].append(matching.match_decoders(own, other, nulls, stream))
                bar.update()
    active = {
        name: np.logical_and(*(codes[name, "sae"][k].fired > 0 for k in (CHOOSE, REPORT)))
        for name in names
    }
    sets = feature_sets.name_sets(
        matches,
        {pair: correlation for pair, (_, correlation) in highest.items()},
        {name: match.score > settings.threshold for name, match in seeds.items()},
        active,
        settings.threshold,
    )
    return Comparison(codes, matches, highest, seeds, decoders, sets)


def describe_features(
    found: Comparison,
    subjects: Sequence[Subject],
    usae: Any,
    rows: pd.DataFrame,
    at: dict[str, np.ndarray],
    frame_rate: float,
    settings: Settings,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """features.parquet and top_clips.parquet (feature_table.py), and the concepts left out, each
    with the size of its smallest class. `frame_rate`: frames a second."""
    names = [s.name for s in subjects]
    kinds = [(kind, s) for kind in ("sae", "usae") for s in subjects]
    concepts, skipped = feature_concepts.usable_concepts(
        rows, [at[CHOOSE], at[REPORT]], FAMILIES, settings.min_clips
    )
    has, known = label_matrix(rows, concepts)
    ids, groups = (rows[column].to_numpy(str)[at[REPORT]] for column in ("id", "group"))
    pools = {
        (kind, s.name): {k: pool_clips(codes) for k, codes in found.codes[s.name, kind].items()}
        for kind, s in kinds
    }
    aligned = feature_concepts.align(
        {
            key: {k: {"mean": p.mean, "max": p.highest} for k, p in of.items()}
            for key, of in pools.items()
        },
        {name: has[where] for name, where in at.items()},
        groups,
        concepts,
        settings.permutations,
        settings.seed,
        {name: known[where] for name, where in at.items()},
    )
    shared = feature_table.shared_firing(
        [found.codes[name, "usae"][REPORT] for name in names], settings.fire_threshold
    )
    parts, tops = [], []
    for kind, s in kinds:
        i, key, codes = names.index(s.name), (kind, s.name), found.codes[s.name, kind][REPORT]
        rows_d = s.saes[0].W_dec.cpu().numpy() if kind == "sae" else matching.raw_decoder(usae, i)
        power = feature_table.energy(codes, rows_d, float(np.square(s.store.std).sum()))
        top = feature_table.top_clips(pools[key][REPORT], ids, frame_rate, settings.top_clips)
        columns = feature_table.describe(codes, power, aligned[key], top)
        match = found.decoders[s.name][0]
        if kind == "sae":
            columns |= {"set": found.sets[s.name], "seed_correlation": found.seeds[s.name].score}
            columns |= feature_table.partners(s.name, codes.n_latents, found.matches, found.highest)
            partner, cosine = match.partner, match.score
        else:
            columns |= {"firing_entropy": shared["firing_entropy"], "cofires": shared["cofires"]}
            columns |= {k: shared[k][i] for k in ("fires", "cofire_proportion")}
            partner, cosine, _ = match.inverse(codes.n_latents)
        columns |= {"counterpart": partner, "counterpart_cosine": cosine}
        parts.append((kind, s.name, columns))
        tops.append(top.assign(kind=kind, model=s.name))
    return feature_table.table(parts), pd.concat(tops, ignore_index=True), skipped
