"""Pieces of one split, made when they are drawn: arranged tunes, chorales and Freedoom pieces.

| split | tunes | chorales | Freedoom | styles |
|---|---|---|---|---|
| train | O'Neill | none | train | TRAIN_STYLES |
| validation | Ryan | none | validation | TRAIN_STYLES |
| test | Aird | all | test | HELD_OUT_STYLES |
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from musicscope.core.seeding import seed_for
from musicscope.embedded.rendering.accompaniment import arrange
from musicscope.embedded.rendering.compositions import SPLITS, Composition, split_compositions
from musicscope.embedded.rendering.leads import styles_for
from musicscope.embedded.rendering.scores import Scores
from musicscope.embedded.rendering.styles import HELD_OUT_STYLES, TRAIN_STYLES
from musicscope.embedded.rendering.tunes import BOOK_SPLITS, Tune

SPLIT_WINDOW = 10.0
"""Seconds; fixed, so that Freedoom's split is the same for every clip length."""
SHARES: Mapping[str, Mapping[str, float]] = {
    "train": {"tunes": 0.85, "freedoom": 0.15},
    "validation": {"tunes": 0.85, "freedoom": 0.15},
    "test": {"tunes": 0.7, "freedoom": 0.15, "chorales": 0.15},
}
"""Share of each kind of piece in what a split draws."""


class Pieces:
    """Draws pieces of one split; only the scores are held in memory.

    A tune is drawn by melody first and setting second, so that a melody in many settings is not
    drawn more often.
    """

    def __init__(
        self, scores: Scores, split: str, seed: int, styles: tuple[str, ...] | None = None,
        shares: Mapping[str, float] | None = None,
    ):  # fmt: skip
        """Choose what may be drawn.

        Args:
            scores: from `load_scores` or `read_scores`.
            split: train, validation or test.
            seed: of Freedoom's split, and of `piece`.
            styles: names that tunes are arranged in; by default those of the split.
            shares: see SHARES; a kind without a share is not drawn.

        Raises:
            ValueError: an unknown split or kind, or a kind without pieces.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
        self.split, self.seed = split, seed
        self.styles = styles or (HELD_OUT_STYLES if split == "test" else TRAIN_STYLES)
        freedoom = split_compositions(list(scores.freedoom), seed, SPLIT_WINDOW)
        melodies: dict[str, dict[str, list[Tune]]] = {"tunes": {}, "chorales": {}}
        for tune in scores.tunes:
            if BOOK_SPLITS[tune.book] == split and (
                tune.harmonised or styles_for(tune, self.styles)
            ):
                kind = "chorales" if tune.harmonised else "tunes"
                melodies[kind].setdefault(tune.group, []).append(tune)
        self._kinds: dict[str, list[list[Tune]] | list[Composition]] = {
            "freedoom": freedoom[split],
            **{kind: list(groups.values()) for kind, groups in melodies.items()},
        }
        shares = SHARES[split] if shares is None else shares
        for kind in shares:
            if not self._kinds.get(kind):
                raise ValueError(f"{split} has no pieces of kind {kind!r}")
        self._names = list(shares)
        self._odds = np.array([shares[kind] for kind in self._names]) / sum(shares.values())

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Kind -> groups that can be drawn."""
        return {
            kind: tuple(p.group if kind == "freedoom" else p[0].group for p in self._kinds[kind])
            for kind in self._names
        }

    def draw(self, rng: np.random.Generator) -> Composition:
        """Draw a kind, a piece, and for a tune its style and arrangement."""
        kind = self._names[rng.choice(len(self._names), p=self._odds)]
        choices = self._kinds[kind]
        chosen = choices[rng.integers(len(choices))]
        if kind == "freedoom":
            return chosen
        tune = chosen[rng.integers(len(chosen))]
        if kind == "chorales":
            return arrange(tune, rng)
        names = styles_for(tune, self.styles)
        return arrange(tune, rng, names[rng.integers(len(names))])

    def piece(self, index: int) -> Composition:
        """Piece number `index` of the split's endless list; the same for the same seed."""
        return self.draw(np.random.default_rng(seed_for(self.seed, "pieces", self.split, index)))
