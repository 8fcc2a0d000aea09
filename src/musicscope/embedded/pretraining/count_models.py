"""Predict codes from counts: the baselines that a decoder must beat.

A chain of contexts is interpolated from the widest to the narrowest: with counts c of a context
and the prediction q of the next narrower context, p(x) = (c(x) + s q(x)) / (sum c + s). This is
hierarchical Dirichlet smoothing (MacKay & Peto 1995). The strength s of each context and the weight
of each chain are chosen on validation clips. Every context is known to a decoder with the delay
pattern: earlier frames, and coarser codebooks of the same frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Context = tuple[tuple[int, int], ...]
"""Codes that are known: (codebooks up from the predicted one, frames back), such as (0, 1)."""

UNIGRAM: tuple[Context, ...] = ((),)
PREVIOUS: tuple[Context, ...] = ((), ((0, 1),))
TRIGRAM: tuple[Context, ...] = ((), ((0, 1),), ((0, 1), (0, 2)))
COARSER: tuple[Context, ...] = ((), ((1, 0),), ((0, 1), (1, 0)), ((0, 1), (1, 0), (2, 0)))
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
MIXTURE_STEPS = 30
PROBABILITY_FLOOR = 1e-12


def _context_keys(codes: np.ndarray, book: int, context: Context, card: int) -> np.ndarray:
    """One integer per frame [clips, T] that names the codes in `context`.

    Frames before the first hold the id `card`, as the start column of the decoder does.
    """
    keys = np.zeros(codes[:, book].shape, np.int64)
    for up, back in context:
        known = np.full(keys.shape, card, np.int64)
        if up <= book:
            source = codes[:, book - up]
            known[:, back:] = source[:, : source.shape[1] - back]
        keys = keys * (card + 1) + known
    return keys


@dataclass(frozen=True)
class _Counts:
    """Sorted keys and counts of contexts, and of contexts followed by a code."""

    contexts: np.ndarray
    totals: np.ndarray
    pairs: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, codes: np.ndarray, card: int) -> _Counts:
        pairs, counts = np.unique(keys.ravel() * card + codes.ravel(), return_counts=True)
        contexts, first = np.unique(pairs // card, return_index=True)
        return cls(contexts, np.add.reduceat(counts, first), pairs, counts)

    def look_up(self, keys: np.ndarray, codes: np.ndarray, card: int) -> tuple:
        """Counts of (context, code) and of the context, each shaped as `keys`."""
        return _find(self.pairs, self.counts, keys * card + codes), _find(
            self.contexts, self.totals, keys
        )


def _find(known: np.ndarray, counts: np.ndarray, keys: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[at] == keys, counts[at], 0)


def _chain_probability(
    counts: list[tuple[np.ndarray, np.ndarray]], strengths: tuple[float, ...], card: int
) -> np.ndarray:
    """Probability of the codes under one chain; `counts` from the narrowest context up."""
    p: np.ndarray | float = 1.0 / card
    for (pair, total), strength in zip(counts, strengths, strict=True):
        p = (pair + strength * p) / (total + strength)
    return np.asarray(p)


def _choose_strengths(counts: list[tuple[np.ndarray, np.ndarray]], card: int) -> tuple[float, ...]:
    """Strengths that suit the validation codes, chosen from the narrowest context up."""
    chosen: tuple[float, ...] = ()
    for level in range(len(counts)):

        def loss(strength: float, level: int = level, before: tuple = chosen) -> float:
            p = _chain_probability(counts[: level + 1], (*before, strength), card)
            return -float(np.log(p).mean())

        chosen = (*chosen, min(STRENGTHS, key=loss))
    return chosen


def _mixture_weights(probabilities: np.ndarray) -> np.ndarray:
    """Weights of chains [chains] that suit `probabilities` [chains, codes], by EM."""
    weights = np.full(len(probabilities), 1 / len(probabilities))
    for _ in range(MIXTURE_STEPS):
        joint = weights[:, None] * probabilities
        weights = (joint / joint.sum(0)).mean(1)
    return weights


def count_cross_entropy(
    train: np.ndarray,
    validation: np.ndarray,
    test: np.ndarray,
    card: int,
    chains: tuple[tuple[Context, ...], ...],
) -> np.ndarray:
    """Cross-entropy of `test` codes under count models of `train` codes: [clips, K] nats per code.

    All codes are [clips, K, T]. `chains` are mixed with weights chosen on `validation`, per
    codebook. Every frame counts, the first one too.

    Raises:
        ValueError: codes outside 0..card - 1, contexts of codes that come later, or clips that
            `train` shares with `validation` (smoothing would vanish) or with `test`.
    """
    for codes in (train, validation, test):
        if codes.ndim != 3 or codes.min() < 0 or codes.max() >= card:
            raise ValueError(f"codes must be [clips, K, T] in 0..{card - 1}, got {codes.shape}")
    known = {clip.astype(np.int64).tobytes() for clip in train}
    for name, codes in (("validation", validation), ("test", test)):
        if any(clip.astype(np.int64).tobytes() in known for clip in codes):
            raise ValueError(f"{name} codes hold a training clip, which the counts know by heart")
    for context in (c for chain in chains for c in chain):
        if any(up < 0 or back < 0 or up + back == 0 for up, back in context):
            raise ValueError(f"{context} holds a code that is not known when it is predicted")
        if (card + 1) ** len(context) * card >= 2**63:
            raise ValueError(f"{context} has too many codes for keys of 63 bits")
    train, validation, test = (c.astype(np.int64) for c in (train, validation, test))
    out = np.empty(test.shape[:2])
    for book in range(test.shape[1]):
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for chain in chains:
            levels = [
                (c, _Counts.of(_context_keys(train, book, c, card), train[:, book], card))
                for c in chain
            ]
            seen = [
                [m.look_up(_context_keys(codes, book, c, card), codes[:, book], card)
                 for c, m in levels]
                for codes in (validation, test)
            ]  # fmt: skip
            strengths = _choose_strengths(seen[0], card)
            found.append(tuple(_chain_probability(s, strengths, card) for s in seen))
        weights = _mixture_weights(np.stack([p.ravel() for p, _ in found]))
        mixed = np.einsum("c,cnt->nt", weights, np.stack([p for _, p in found]))
        out[:, book] = -np.log(np.maximum(mixed, PROBABILITY_FLOOR)).mean(1)
    return out
