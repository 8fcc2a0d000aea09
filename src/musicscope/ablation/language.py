"""Ablate the layers of a language model and score the change at the logits.

For each layer i with input x and output y = x + u, three ablations replace y:

* ``skip``  y := x. The layer's update u is dropped (zero ablation of the update; the field's usual
  "skip-layer").
* ``mean``  y := x + E[u]. The mean of u over training clips, per dimension and group of positions
  (`LanguageModel.position_groups`), replaces it. The part that the layer computes from its input is
  lost, its constant part stays, so later layers get a stream of the usual size. Of the three the
  least off the distribution; layers are ranked by it.
* ``zero``  y := 0. The whole stream is cut; later layers rebuild from the caption alone. The lower
  anchor for anything that replaces y, such as an SAE.

All act at every sequence position. Scores in nats per code: KL(original || ablated), and dCE, the
rise in cross-entropy of the true codes. Ablating layer i runs only layers i + 1 .. L - 1 anew, from
the cached input of layer i: (L - 1) / 2 forward passes per kind rather than L.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from musicscope.ablation.scores import Scores, Sums
from musicscope.models.interface import Batch, LanguageModel

KINDS = ("skip", "zero", "mean")


def sums(model: LanguageModel, batch: Batch) -> Sums:
    """Sum the updates y - x of every layer over one batch, per group of positions."""
    stream = torch.stack(model.layer_inputs(batch)).double().cpu()
    updates, groups = stream.diff(dim=0), model.position_groups(batch).cpu()
    one_hot = torch.stack([groups == g for g in range(model.num_position_groups)]).double()
    names = [point.name for point in model.hook_points]
    total, count = torch.einsum("lbsd,gbs->lgd", updates, one_hot), one_hot.sum((1, 2))
    return Sums(dict(zip(names, total, strict=True)), dict.fromkeys(names, count))


def ablated(
    kind: str, before: Tensor, after: Tensor, mean: Tensor | None, groups: Tensor
) -> Tensor:
    """Replace a layer's output `after` [B, S, d], given its input `before`.

    `mean` [G, d] is the layer's entry of `Sums.means`; only ``mean`` needs it. `groups` [B, S] is
    the model's `position_groups`; positions in no mean (-1) are treated as frames (1).
    """
    if kind == "skip":
        return before
    if kind == "zero":
        return torch.zeros_like(after)
    if mean is None:
        raise ValueError('the kind "mean" needs the means of training clips')
    return before + mean.to(before)[groups.where(groups >= 0, 1)]


@torch.no_grad()
def ablate(
    model: LanguageModel,
    batch: Batch,
    kinds: Sequence[str] = KINDS,
    means: Mapping[str, Tensor] | None = None,
) -> Scores:
    """Score every layer under every kind on one batch, restarting from its cached layer inputs.

    `means` is `Sums.means` of training clips. ValueError for an unknown kind, or "mean" without
    `means`.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"unknown ablations {unknown}; known: {list(KINDS)}")
    if "mean" in kinds and means is None:
        raise ValueError('the kind "mean" needs `means`, see language.sums')
    points, calls = [point.name for point in model.hook_points], model.layer_calls
    stream, groups = model.layer_inputs(batch), model.position_groups(batch)
    original = model.forward_from(batch, len(points), stream[-1]).float().log_softmax(-1)
    probability = original.exp()
    entropy = _cross_entropy(original, batch.codes)
    kl = np.empty((len(kinds), len(points), *entropy.shape))
    dce = np.empty_like(kl)
    for j, kind in enumerate(kinds):
        for i, point in enumerate(points):
            mean = None if means is None else means[point]
            hidden = ablated(kind, stream[i], stream[i + 1], mean, groups)
            changed = model.forward_from(batch, i + 1, hidden).float().log_softmax(-1)
            dce[j, i] = _cross_entropy(changed, batch.codes) - entropy
            # In place: these are the largest arrays by far, and new ones cost page faults.
            divergence = changed.neg_().add_(original).mul_(probability).sum(-1)
            kl[j, i] = divergence.double().mean(-1).cpu().numpy()
    cost = (model.layer_calls - calls) * len(batch)
    return Scores(tuple(kinds), tuple(points), entropy, {"kl": kl, "dce": dce}, layer_forwards=cost)


def _cross_entropy(log_probability: Tensor, codes: Tensor) -> np.ndarray:
    """Mean over frames of -log p(code): log-probabilities [B, K, T, card] to [B, K] float64."""
    picked = log_probability.gather(-1, codes[..., None])[..., 0]
    return -picked.double().mean(-1).cpu().numpy()


def summary(scores: Scores) -> dict[str, object]:
    """Numbers beside the layers': cross-entropy, and the cost in whole passes over the clips."""
    books = scores.loss.mean(0)
    forwards = scores.layer_forwards / (len(scores.points) * len(scores.loss))
    return {
        "cross_entropy": books.mean(),
        "cross_entropy_codebook": {str(k): value for k, value in enumerate(books)},
        "layer_forwards": scores.layer_forwards,
        "full_forward_equivalents": forwards,
        "full_forward_equivalents_per_kind": (forwards - 1) / len(scores.kinds),
    }
