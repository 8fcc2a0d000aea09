"""Predict a model's layer from streams of another one by ridge regression, without a dictionary.

The cross R2 of a universal SAE has a floor and a ceiling. What the other model's *input* (its
embedded codes) or the layer before predicts by a linear map is not computation that the layers
share. The other model's same layer gives the ceiling of a linear map. The same layer behind
permuted weights says how much any network of that architecture would give.

Weights are fitted on train clips, the penalty is chosen on validation clips, errors are of test
clips. Explained variance is as in `evaluation`: about the per-dimension mean of the test frames.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from musicscope.activations import token_cache
from musicscope.activations.alignment import align, frame_rate
from musicscope.activations.store import ActivationStore
from musicscope.core.stats import Estimate, estimate, ratio_of
from musicscope.data.clips import Clips
from musicscope.dictionaries.data import Paired
from musicscope.models.interface import AudioModel, Batch, LanguageModel, Model, language_model
from musicscope.models.registry import open_sources

INPUT, BEFORE, LAYER, REDRAWN = SOURCES = ("input", "before", "layer", "redrawn")
"""Streams to predict from: embedded codes, the layer before, the same layer, and that layer where
the weights of all layers up to it are permuted."""
PENALTIES = 10.0 ** np.arange(-7.0, 1.0)
"""Ridge penalties, as shares of the largest eigenvalue of the source's covariance."""
BATCH_CLIPS = 8

Errors = dict[str, np.ndarray | None]
"""Source -> [G, M, M] squared errors of model j from model i's stream; None: not available."""


@dataclass
class Ridge:
    """Ridge regression with an intercept, from sums over frames, in float64."""

    frames: dict[str, float] = field(default_factory=dict)
    sums: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    """Part -> sums of x, y, x x', x y' and of the squares of y, each about 0."""

    def add(self, part: str, x: np.ndarray, y: np.ndarray) -> None:
        """Add frames x [T, d] and targets y [T, e] to the sums of a part."""
        x, y = x.astype(np.float64), y.astype(np.float64)
        new = (x.sum(0), y.sum(0), x.T @ x, x.T @ y, np.square(y).sum(0))
        old = self.sums.get(part)
        self.sums[part] = new if old is None else tuple(map(np.add, old, new))
        self.frames[part] = self.frames.get(part, 0) + len(x)

    def fit(
        self, train: str, validation: str, spans: Sequence[slice]
    ) -> Callable[[np.ndarray], np.ndarray]:
        """Fit on one part, choose the penalty per span of targets on another: x -> predicted y."""
        n, (sx, sy, xx, xy, _) = self.frames[train], self.sums[train]
        mx, my = sx / n, sy / n
        values, vectors = np.linalg.eigh(xx - n * np.outer(mx, mx))
        rotated = vectors.T @ (xy - n * np.outer(mx, my))
        m, (vx, vy, vxx, vxy, vyy) = self.frames[validation], self.sums[validation]
        # Sums of the validation part about the means of the train part.
        vxx = vxx - np.outer(mx, vx) - np.outer(vx, mx) + m * np.outer(mx, mx)
        vxy = vxy - np.outer(mx, vy) - np.outer(vx, my) + m * np.outer(mx, my)
        vyy = vyy - 2 * my * vy + m * np.square(my)
        weights = np.zeros_like(xy)
        best = np.full(len(spans), np.inf)
        for penalty in PENALTIES * max(values[-1], np.finfo(float).tiny):
            W = vectors @ (rotated / (np.maximum(values, 0) + penalty)[:, None])
            errors = vyy - 2 * (W * vxy).sum(0) + (W * (vxx @ W)).sum(0)
            for s, span in enumerate(spans):
                if (error := errors[span].sum()) < best[s]:
                    best[s], weights[:, span] = error, W[:, span]
        return lambda x: (x - mx) @ weights + my


@dataclass(frozen=True)
class Sets:
    """Clips that the stores of all models share."""

    train: Paired
    validation: Paired
    test: Paired

    @property
    def groups(self) -> np.ndarray:
        """Names [G] of the test compositions."""
        return np.unique(self.test.groups)


Streams = Callable[[Paired, int], Iterator[dict[str, np.ndarray]]]
"""(clips, model) -> per clip the model's streams [T, d] by source."""


def layers_of(paired: Paired, model: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the stored activations, the source LAYER, of every clip."""
    return ({LAYER: clip[model]} for clip in paired.clips())


def thinned(paired: Paired, clips: int, seed: int) -> Paired:
    """Draw at most `clips` clips without replacement, in their order."""
    chosen = np.random.default_rng(seed).permutation(len(paired))[:clips]
    return paired.take(np.sort(chosen))


@dataclass(frozen=True)
class ModelStreams:
    """Streams of language models, computed again from their tokens; `redraw` permutes weights."""

    folders: tuple[str, ...]
    """Folder of each model"""
    clips: str
    """Folder of the clips"""
    device: str
    seed: int
    redraw: bool = False

    def sources(self, model: int) -> tuple[Model, Clips]:
        """Open a model and the clips at its sample rate, once per process."""
        return open_sources(self.folders[model], self.clips, self.device)

    def available(self, model: int) -> bool:
        """Tell whether the model has embedded codes: an audio model has none."""
        return not isinstance(self.sources(model)[0], AudioModel)

    def layer(self, lm: LanguageModel, store: ActivationStore) -> int:
        """Number of the layer that a store holds."""
        return [point.name for point in lm.hook_points].index(store.config["layer"])

    @torch.no_grad()
    def __call__(self, paired: Paired, model: int) -> Iterator[dict[str, np.ndarray]]:
        opened, clips = self.sources(model)
        lm, store = language_model(opened), paired.stores[model]
        layer = self.layer(lm, store)
        place = {name: row for row, name in enumerate(clips.rows["id"].tolist())}
        rows = [place[store.ids[i]] for i in paired.members[:, model]]
        captions = clips.rows["caption"].tolist() if store.config["captions"] else None
        sources = functools.partial(open_sources, self.folders[model], self.clips, self.device)
        folder = token_cache.codes_dir(lm, store.config["clips_sha256"])
        assert folder is not None, "a language model has a codec"
        for chunk in set(token_cache.missing(folder, len(clips.rows))) & {
            row // token_cache.CHUNK for row in rows
        }:
            token_cache.write_chunk(sources, folder, chunk)
        rate, to_rate = lm.frame_rate, frame_rate(store)
        for start in range(0, len(rows), BATCH_CLIPS):
            part = rows[start : start + BATCH_CLIPS]
            codes = token_cache.read_codes(folder, part)
            given = [None if captions is None else captions[row] for row in part]
            batch = lm.with_captions(codes, given)
            for n, streams in enumerate(self._streams(lm, batch, layer), start):
                frames = int(paired.frames[n])
                yield {
                    name: x[:frames] if rate == to_rate else align(x, rate, to_rate, frames)
                    for name, x in streams.items()
                }

    def _streams(
        self, lm: LanguageModel, batch: Batch, layer: int
    ) -> Iterator[dict[str, np.ndarray]]:
        inputs = lm.layer_inputs(batch, layer if self.redraw else layer - 1)
        wanted = {REDRAWN: layer + 1} if self.redraw else {INPUT: 0, BEFORE: layer}
        found = {
            name: lm.at_frames(inputs[i], batch.frames).float().cpu().numpy()
            for name, i in wanted.items()
        }
        return ({name: x[n] for name, x in found.items()} for n in range(len(batch)))


def _errors_from(sets: Sets, streams: Streams, model: int) -> dict[str, np.ndarray]:
    """Squared errors [G, M] of every model's layer from each stream of one model."""
    ends = np.cumsum((0, *sets.test.widths))
    spans = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    ridges: dict[str, Ridge] = {}
    for part, paired in (("train", sets.train), ("validation", sets.validation)):
        for clip, found in zip(paired.clips(), streams(paired, model), strict=True):
            for name, x in found.items():
                ridges.setdefault(name, Ridge()).add(part, x, np.concatenate(clip, 1))
    fitted = {name: ridge.fit("train", "validation", spans) for name, ridge in ridges.items()}
    groups, member = np.unique(sets.test.groups, return_inverse=True)
    errors = {name: np.zeros((len(groups), len(spans))) for name in fitted}
    tested = zip(member, sets.test.clips(), streams(sets.test, model), strict=True)
    for g, clip, found in tested:
        for name, x in found.items():
            squares = np.square(np.concatenate(clip, 1) - fitted[name](x)).sum(0)
            errors[name][g] += [squares[span].sum() for span in spans]
    return errors


def control_errors(sets: Sets, streams: ModelStreams) -> Errors:
    """Compute squared errors [G, M, M] of model j's layer from each source of model i.

    NaN in the rows of a model without the source, None where no model has it.
    """
    stores = sets.test.stores
    unknown = np.full((len(sets.groups), len(stores)), np.nan)
    by_model = []
    for i, store in enumerate(stores):
        of = dict.fromkeys(SOURCES, unknown) | _errors_from(sets, layers_of, i)
        if streams.available(i):
            lm = language_model(streams.sources(i)[0])
            of |= _errors_from(sets, streams, i)
            with lm.redrawn(streams.seed + i, streams.layer(lm, store)):
                of |= _errors_from(sets, replace(streams, redraw=True), i)
        by_model.append(of)
    found = {name: np.stack([of[name] for of in by_model], axis=1) for name in SOURCES}
    return {name: None if np.isnan(e).all() else e for name, e in found.items()}


def r2_estimates(
    errors: np.ndarray, squares: np.ndarray, groups: np.ndarray, n: int, seed: int
) -> dict[str, Estimate]:
    """Compute r2_<i>_<j> with intervals from errors [G, M, M] and squares [G, M]."""
    return margins(
        errors, np.broadcast_to(squares[:, None], errors.shape), squares, groups, n, seed
    )


def margins(
    errors: np.ndarray, control: np.ndarray, squares: np.ndarray, groups: np.ndarray,
    n: int, seed: int,
) -> dict[str, Estimate]:  # fmt: skip
    """Compute by how much R2 with `errors` [G, M, M] exceeds R2 with those of a control, paired."""
    found = {}
    for i, j in np.ndindex(errors.shape[1:]):
        less, one = control[:, i, j] - errors[:, i, j], Estimate(float("nan"), unit="R2")
        if not np.isnan(less).any():
            one = estimate(ratio_of(less, squares[:, j]), groups, n, seed, "R2")
        found[f"r2_{i}_{j}"] = one
    return found
