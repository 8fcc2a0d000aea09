"""Which layers carry a concept of the caption: patch what cross-attention adds, layer by layer.

A clip's codes are teacher-forced under two captions that differ in the concept alone. Into the run
without it, one layer's cross-attention output of the run with it is patched. The part of the change
at the logits that the patch brings is the layer's share,

    1 - KL(with || patched) / KL(with || without),

0 where the layer carries nothing of the concept, 1 where it carries everything (patching all layers
at once gives 1 exactly). Text enters through cross-attention alone, so nothing else needs a patch.
The control patches a matched pair of captions that differ in another concept: `specific` is the
share less that of the control, so that a layer which carries any word stands out less.

Ablation ranks layers by what the model loses without them, whatever the concept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from musicscope.core.stats import Estimate, Statistic, estimate, ratio_of
from musicscope.models.interface import Batch, Hook, LanguageModel


@dataclass(frozen=True)
class Patches:
    """What patching brings, per clip: rows are clips, columns layers."""

    whole: np.ndarray
    """[clips] KL(with || without) in nats per code"""
    left: np.ndarray
    """[clips, L] KL(with || patched)"""

    def __add__(self, other: Patches) -> Patches:
        return Patches(
            np.concatenate([self.whole, other.whole]), np.concatenate([self.left, other.left])
        )


def replaced_by(activations: Tensor) -> Hook:
    """Make a hook that replaces a hook point's activations by these [rows, S, d]."""
    return lambda x, positions: activations


def _divergence(log_p: Tensor, log_q: Tensor) -> np.ndarray:
    """KL(p || q) per clip, mean over codes: [B] float64 from [B, K, T, card] each."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).double().mean((1, 2)).cpu().numpy()


@torch.no_grad()
def patch(
    model: LanguageModel, without: Batch, with_: Batch, layers: Sequence[Sequence[int]] = ()
) -> Patches:
    """Patch the cross-attention outputs of `with_` into `without`: batches of the same codes.

    `layers`: sets of layers to patch together; by default each alone. ValueError for a model
    without cross-attention, and for batches of different codes.
    """
    if not model.cross_points:
        raise ValueError(f"{model.name} has no cross-attention to patch")
    if not torch.equal(without.codes, with_.codes):
        raise ValueError("patching needs the same codes under both captions")
    points = [point.name for point in model.cross_points]
    added: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        def hook(x: Tensor, positions: Tensor) -> Tensor:
            added[name] = x
            return x

        return hook

    def log_probabilities(batch: Batch, hooks: Mapping[str, Hook]) -> Tensor:
        return model.differentiable(batch, hooks).float().log_softmax(-1)

    target = log_probabilities(with_, {name: keep(name) for name in points})
    whole = _divergence(target, log_probabilities(without, {}))
    left = []
    for chosen in layers or [[i] for i in range(len(points))]:
        hooks = {points[i]: replaced_by(added[points[i]]) for i in chosen}
        left.append(_divergence(target, log_probabilities(without, hooks)))
    return Patches(whole, np.stack(left, 1))


def caption_pairs(
    rows: pd.DataFrame, concept: str, control: str
) -> tuple[list[str], list[str], list[str]]:
    """Captions of clips without either concept: as they are, with the concept, with the control."""
    bare = [str(caption).rstrip(". ") for caption in rows["caption"]]
    named = [
        [f"{caption} with {name.replace('_', ' ')}" for caption in bare]
        for name in (concept, control)
    ]
    return bare, named[0], named[1]


def control_of(concept: str, concepts: Sequence[str]) -> str:
    """The next concept of the list, around its end. ValueError for a list of one."""
    if len(concepts) < 2:
        raise ValueError("ablate.concepts needs two: each is the control of another")
    return concepts[(list(concepts).index(concept) + 1) % len(concepts)]


def localisation(
    own: Patches, control: Patches, groups: Sequence[str], n: int, seed: int
) -> dict[str, object]:
    """Numbers per layer: share, control and specific, with intervals over groups; and the best.

    kl: KL of the whole change in nats per code, of the concept and of the control.
    """

    def number(statistic: Statistic) -> Estimate:
        return estimate(statistic, groups, n, seed, "share")

    found = [
        [ratio_of(p.whole - p.left[:, i], p.whole) for p in (own, control)]
        for i in range(own.left.shape[1])
    ]
    shares = [number(mine) for mine, _ in found]
    layers = {
        str(i): {
            "share": shares[i].as_dict(), "control": number(other).as_dict(),
            "specific": number(lambda w, a=mine, b=other: a(w) - b(w)).as_dict(),
        }
        for i, (mine, other) in enumerate(found)
    }  # fmt: skip
    return {
        "clips": len(groups), "kl": float(own.whole.mean()),
        "kl_control": float(control.whole.mean()),
        "best": max(range(len(shares)), key=lambda i: shares[i].value), "layers": layers,
    }  # fmt: skip
