"""Compare the dictionaries of M models: from stores and weights to pairs and the feature table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations

import numpy as np
import pandas as pd

from musicscope.activations.store import ActivationStore
from musicscope.config.analysis import MatchFeatures
from musicscope.core.progress import Bar
from musicscope.core.seeding import seed_for
from musicscope.data.splits import clip_sets, label_matrix
from musicscope.data.taxonomy import FAMILIES
from musicscope.dictionaries.codes import Codes, Encode, encode_clips, pool_clips
from musicscope.dictionaries.core import TopKSAE, UniversalSAE
from musicscope.features import matching, table
from musicscope.features.association import align, usable_concepts
from musicscope.features.matching import Match, name_sets

CHOOSE, REPORT, FONT = "validation", "test", "heldout_font"
LEVEL = 0.05
"""Largest corrected p of a latent that counts as aligned with a concept."""


@dataclass(frozen=True)
class ModelSAEs:
    """One model: its activations and the SAEs trained on them."""

    name: str
    store: ActivationStore
    saes: Sequence[TopKSAE]
    """By seed: 0 is compared, 1 shows which latents are reproduced, all are matched to the USAE"""
    stability: pd.DataFrame
    """Which latents of seed 0 return in the other seeds (`dictionaries.stability`)"""


@dataclass(frozen=True)
class Inputs:
    """Models, universal SAE and clips of a comparison; ValueError if they do not fit together."""

    models: Sequence[ModelSAEs]
    usae: UniversalSAE
    rows: pd.DataFrame
    """Clip table of all stores"""
    slot: str
    concepts: Sequence[str] = FAMILIES
    """Concepts that latents are compared with"""

    def __post_init__(self) -> None:
        names, usae, slot = self.names, self.usae, self.slot
        if len(names) < 2:
            raise ValueError(
                "match_features compares models: name at least two in params.yaml: models"
            )
        if usae.kind != "usae" or tuple(usae.names) != names or usae.slot != slot:
            raise ValueError(
                f"data/usae/seed-0 is a {usae.kind} of {', '.join(usae.names)} at {usae.slot}, "
                f"params ask for a usae of {', '.join(names)} at {slot}: run dvc repro train_usae"
            )
        for m, width in zip(self.models, usae.widths, strict=True):
            if list(m.store.ids) != self.rows["id"].tolist():
                raise ValueError(
                    f"{m.store.folder} holds other clips than data/clips: run dvc repro"
                )
            if len(m.saes) < 2:
                raise ValueError(
                    f"{m.name} has one SAE; a second one shows which latents are reproduced: set "
                    "train_sae.seeds to at least 2"
                )
            if len(widths := {m.store.width, width, *(sae.width for sae in m.saes)}) > 1:
                raise ValueError(
                    f"{m.name}: activations, SAEs and USAE are {sorted(widths)} wide: run dvc repro"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Models, in the order of params.yaml."""
        return tuple(m.name for m in self.models)

    @cached_property
    def clips(self) -> dict[str, np.ndarray]:
        """Positions in the clip table of validation, test and, if it has any, heldout_font."""
        sets = clip_sets(self.rows)
        for name in (CHOOSE, REPORT):
            if not len(sets[name]):
                raise ValueError(
                    f"no clips in {name}: raise prepare_data.clips.{name} (rendered "
                    "clips) or prepare_data.recordings.limits (recordings)"
                )
        return {name: sets[name] for name in (CHOOSE, REPORT, FONT) if len(sets[name])}


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
    returning: dict[str, np.ndarray]
    """[F] SAE latents that may be named: those that return in other seeds, or all"""


def encode_all(
    inputs: Inputs, workers: int, device: str
) -> dict[tuple[str, str], dict[str, Codes]]:
    """Compute `Comparison.codes`; prints their size to stderr first."""
    usae, clips = inputs.usae, inputs.clips
    frames = sum(int(inputs.models[0].store.frames[rows].sum()) for rows in clips.values())
    size = frames * 8 * sum(usae.k + sum(sae.k for sae in m.saes[:2]) for m in inputs.models)
    print(f"{frames} frames, codes in memory: {size / 1e6:.0f} MB", file=sys.stderr)
    jobs: list[tuple[ModelSAEs, str, Encode, int]] = []
    for i, m in enumerate(inputs.models):
        jobs += [(m, "sae", m.saes[0].encode, m.saes[0].n_latents)]
        jobs += [(m, "sae-1", m.saes[1].encode, m.saes[1].n_latents)]
        jobs += [(m, "usae", partial(usae.encode, model=i), usae.n_latents)]
    return {
        (m.name, kind): {
            name: encode_clips(m.store, rows, encode, F, workers, device)
            for name, rows in clips.items()
            if kind != "sae-1" or name != FONT
        }
        for m, kind, encode, F in Bar(jobs, desc="encode", unit="dictionaries")
    }


def compare(
    inputs: Inputs, section: MatchFeatures, seed: int, workers: int = 1, device: str = "cpu"
) -> Comparison:
    """Match all dictionaries, with nulls and ceilings, and name the sets of latents."""
    names = inputs.names
    codes = encode_all(inputs, workers, device)
    groups = {k: inputs.rows["group"].to_numpy(str)[rows] for k, rows in inputs.clips.items()}
    pairs = list(combinations(names, 2))
    runs = len(pairs) + len(names) + sum(len(m.saes) for m in inputs.models)
    matches, highest, seeds, decoders = {}, {}, {}, {}
    with Bar(total=runs, desc="match", unit="pairs") as bar:

        def match(first: tuple[str, str], second: tuple[str, str]) -> Match:
            bar.update()
            return matching.match_activations(
                codes[first], codes[second], groups, section.null_draws, section.bootstrap, seed
            )

        for a, b in pairs:
            matches[a, b] = match((a, "sae"), (b, "sae"))
            r = matching.correlation(*(codes[m, "sae"][REPORT].matrix for m in (a, b)))
            highest[a, b], highest[b, a] = (r.argmax(1), r.max(1)), (r.argmax(0), r.max(0))
        for name in names:
            seeds[name] = match((name, "sae"), (name, "sae-1"))
        for i, m in enumerate(inputs.models):
            shared = matching.raw_decoder(inputs.usae, i)
            decoders[m.name] = []
            for number, sae in enumerate(m.saes):
                rows, nulls = sae.W_dec.cpu().numpy(), 0 if number else section.null_draws
                decoders[m.name].append(
                    matching.match_decoders(rows, shared, nulls, seed_for(seed, m.name))
                )
                bar.update()
    active = {
        name: np.logical_and(*(codes[name, "sae"][k].fired > 0 for k in (CHOOSE, REPORT)))
        for name in names
    }
    returning = {}
    for m in inputs.models:
        back = m.stability["returns"].to_numpy(bool)
        returning[m.name] = back if section.stable_only else np.ones_like(back)
    sets = name_sets(
        matches,
        {pair: correlation for pair, (_, correlation) in highest.items()},
        {name: match.score > section.threshold for name, match in seeds.items()},
        active,
        section.threshold,
        returning,
    )
    return Comparison(codes, matches, highest, seeds, decoders, sets, returning)


def describe_features(
    inputs: Inputs,
    comparison: Comparison,
    section: MatchFeatures,
    fire_threshold: float,
    frame_rate: float,
    seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """Make features.parquet and top_clips.parquet (see `table`), and name the concepts left out.

    These come with the size of their smallest class. `frame_rate`: frames per second.
    """
    rows, clips, codes = inputs.rows, inputs.clips, comparison.codes
    dictionaries = [(kind, i, m) for kind in ("sae", "usae") for i, m in enumerate(inputs.models)]
    concepts, skipped = usable_concepts(
        rows, [clips[CHOOSE], clips[REPORT]], inputs.concepts, section.min_clips
    )
    has, labelled = label_matrix(rows, concepts)
    ids, groups = (rows[column].to_numpy(str)[clips[REPORT]] for column in ("id", "group"))
    pools = {
        (kind, m.name): {k: pool_clips(of) for k, of in codes[m.name, kind].items()}
        for kind, _, m in dictionaries
    }
    aligned = align(
        {
            key: {k: {"mean": p.mean, "max": p.highest} for k, p in of.items()}
            for key, of in pools.items()
        },
        {name: has[at] for name, at in clips.items()},
        groups,
        concepts,
        section.permutations,
        seed,
        {name: labelled[at] for name, at in clips.items()},
    )
    shared = table.shared_firing(
        [codes[name, "usae"][REPORT] for name in inputs.names], fire_threshold
    )
    parts, tops = [], []
    for kind, i, m in dictionaries:
        decoder = (
            m.saes[0].W_dec.cpu().numpy() if kind == "sae" else matching.raw_decoder(inputs.usae, i)
        )
        tested = codes[m.name, kind][REPORT]
        power = table.energy(tested, decoder, float(np.square(m.store.std).sum()))
        top = table.top_clips(pools[kind, m.name][REPORT], ids, frame_rate, section.top_clips)
        columns = table.describe(tested, power, aligned[kind, m.name], top)
        match, latents = comparison.decoders[m.name][0], tested.n_latents
        if kind == "sae":
            columns |= {"set": comparison.sets[m.name]}
            columns |= {k: m.stability[k].to_numpy() for k in ("seed_cosine", "returns")}
            columns = table.only_returning(columns, comparison.returning[m.name], LEVEL)
            columns |= {"seed_correlation": comparison.seeds[m.name].score}
            columns |= table.partners(m.name, latents, comparison.matches, comparison.highest)
            partner, cosine = match.partner, match.score
        else:
            columns |= {k: shared[k] for k in ("firing_entropy", "cofires")}
            columns |= {k: shared[k][i] for k in ("fires", "cofire_proportion")}
            partner, cosine, _ = match.inverse(latents)
        columns |= {"counterpart": partner, "counterpart_cosine": cosine}
        parts.append((kind, m.name, columns))
        tops.append(top.assign(kind=kind, model=m.name))
    return table.table(parts), pd.concat(tops, ignore_index=True), skipped
