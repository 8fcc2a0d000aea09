"""Matched pairs: one clip twice, with and without guitar, alike in every trivial cue on average.

Window, notes, backing, levels, reverb and final loudness are the same; only the target's program
changes. Among a few seeded candidates for the other instrument, the one is taken with which the
cues of all guitar clips so far are the least distinguishable from those of all other clips (AUROC
nearest to a half), so that over all pairs neither brightness nor noisiness gives the answer. That
is a choice on those cues by design; no model, judge or probe is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from musicscope.core.audio import trivial_cues
from musicscope.core.seeding import seed_for
from musicscope.data.taxonomy import PITCHED_FAMILIES, PROGRAM_NAMES
from musicscope.embedded.midi_set.compositions import Composition
from musicscope.embedded.midi_set.corpus import ATTEMPTS, Clip, describe
from musicscope.embedded.midi_set.orchestration import draw_plan, with_target
from musicscope.embedded.midi_set.render import SAMPLE_RATE, Synth, mix

CANDIDATES = 10
DRIFT_WEIGHT = 0.01
# Spread of each cue over rendered clips, to bring the seven on one scale (log scale but flatness).
CUE_SCALE = np.array([0.15, 0.35, 0.3, 0.45, 0.8, 0.45, 0.25])


def comparable_cues(audio: np.ndarray) -> np.ndarray:
    """Log trivial cues in units of their spread over clips, [7]."""
    return np.log(trivial_cues(audio[None], SAMPLE_RATE)[0] + 1e-9) / CUE_SCALE


def imbalance(guitar: np.ndarray, other: np.ndarray) -> float:
    """How far the cues of two sets of clips [n, 7] tell the sets apart; 0 is not at all.

    The worst and the mean squared distance of a cue's AUROC from a half; the mean difference in
    the cues' own units settles it while there are few clips and the AUROC is coarse.
    """
    above = (guitar[:, None] > other[None]).mean((0, 1)) - 0.5
    ties = (guitar[:, None] == other[None]).mean((0, 1)) / 2
    distance = (above + ties) ** 2
    drift = (guitar - other).mean(0)
    return float(distance.max() + distance.mean() + DRIFT_WEIGHT * drift @ drift)


def make_pairs(
    pieces: list[Composition], synth: Synth, font: str, numbers: Iterable[int], seed: int,
    seconds: float = 10.0,
) -> Iterator[tuple[Clip, Clip]]:  # fmt: skip
    """Yield a (guitar, other) pair of clips for each number, in order."""
    guitars, others = np.zeros((0, len(CUE_SCALE))), np.zeros((0, len(CUE_SCALE)))
    for index in numbers:
        rng = np.random.default_rng(seed_for(seed, "pair", font, index))
        for attempt in range(ATTEMPTS):
            piece = pieces[rng.integers(len(pieces))]
            try:
                plan = draw_plan(piece, font, rng, seconds, "guitar")
                stems = [synth.stem(piece, plan, voice, seconds) for voice in plan.voices]
                audio, energy = mix(stems, plan)
            except ValueError:
                if attempt == ATTEMPTS - 1:
                    raise
                continue
            break
        guitars = np.vstack([guitars, comparable_cues(audio)])
        best = None
        free = [f for f in PITCHED_FAMILIES if f not in plan.families]
        for _ in range(CANDIDATES):
            family = free[rng.integers(len(free))]
            program = int(rng.choice(list(PROGRAM_NAMES[family])))
            other = with_target(plan, family, program)
            stem = synth.stem(piece, other, other.target, seconds)
            try:
                other_audio, other_energy = mix([stem, *stems[1:]], other)
            except ValueError:
                continue
            candidates = np.vstack([others, comparable_cues(other_audio)])
            score = imbalance(guitars, candidates)
            if best is None or score < best[0]:
                best = (score, candidates, other, other_audio, other_energy)
        if best is None:
            raise ValueError(
                f"{plan.group} at {plan.start:.1f} s: every other instrument is silent"
            )
        _, others, other, other_audio, other_energy = best
        words = int(rng.integers(2**31))  # both clips of a pair are described in the same words
        yield (
            describe(piece, plan, audio, energy, seconds, np.random.default_rng(words)),
            describe(
                piece, other, other_audio, other_energy, seconds, np.random.default_rng(words)
            ),
        )
