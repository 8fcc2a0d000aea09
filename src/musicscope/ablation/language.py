"""Which layers matter: what the model loses when one layer is put out of action.

For each layer i with input x and output y = x + u, three ablations replace y:

* ``skip``  y := x, the layer's update u is dropped (zero ablation of the update; the field's usual
  "skip-layer").
* ``mean``  y := x + E[u], the update is replaced by its per-dimension mean over training clips (the
  start column, which is the same in all clips, has a mean of its own, as has every other kind of
  position: `MusicModel.position_groups`). What the layer *computes
  from its input* is lost, its constant part stays, so later layers see a stream of the usual size:
  of the three the one least off the distribution, and the one layers are ranked by.
* ``zero``  y := 0, the whole stream is cut: what later layers cannot rebuild from the caption. The
  lower anchor for anything that replaces y, such as an SAE.

All act at every sequence position. Scores are at the logits, in nats per code: KL(original ||
ablated), and dCE, the rise in cross-entropy of the true codes.

Ablating layer i needs only layers i + 1 .. L - 1 anew, from the cached input of layer i: (L - 1)/2
forwards for a kind rather than L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from musicscope.core import plots
from musicscope.core.stats import bootstrap_groups
from musicscope.data.clips import main_clips
from musicscope.models.interface import Batch, MusicModel

KINDS = ("skip", "zero", "mean")


@dataclass(frozen=True)
class AblationScores:
    """Scores of each clip, averaged over its frames, in nats per code."""

    kinds: tuple[str, ...]
    cross_entropy: np.ndarray
    """[clips, K] of the model as it is."""
    kl: np.ndarray
    """[kinds, L, clips, K] KL(original || ablated)."""
    dce: np.ndarray
    """[kinds, L, clips, K] cross-entropy of the ablated model less that of the original."""
    layer_forwards: int
    """Layer evaluations that were made, each on one clip."""

    @property
    def full_forward_equivalents(self) -> float:
        """Cost in whole forward passes over the clips, the unablated one included."""
        return self.layer_forwards / (self.kl.shape[1] * self.kl.shape[2])


@dataclass(frozen=True)
class UpdateSums:
    """Running sums for the mean update of every layer; `+` joins those of two sets of clips."""

    sums: Tensor
    """[L, G, d] float64 sum of updates over each group of positions (`position_groups`)."""
    counts: Tensor
    """[G] positions in all."""

    def __add__(self, other: UpdateSums) -> UpdateSums:
        return UpdateSums(self.sums + other.sums, self.counts + other.counts)

    @property
    def means(self) -> Tensor:
        """[L, G, d] float32: mean update of every layer over each group of positions."""
        return (self.sums / self.counts[:, None].clamp(min=1)).float()


def update_sums(model: MusicModel, batch: Batch) -> UpdateSums:
    """Sums of the updates y - x of every layer over one batch."""
    stream = torch.stack(model.layer_inputs(batch)).double().cpu()
    updates, groups = stream.diff(dim=0), model.position_groups(batch).cpu()
    one_hot = torch.stack([groups == g for g in range(model.num_position_groups)]).double()
    sums = torch.einsum("lbsd,gbs->lgd", updates, one_hot)
    return UpdateSums(sums, one_hot.sum((1, 2)))


def ablated(
    kind: str, before: Tensor, after: Tensor, mean: Tensor | None, groups: Tensor
) -> Tensor:
    """What takes the place of a layer's output `after` [B, S, d], given its input `before`.

    `mean` [G, d] is the layer's entry of `UpdateSums.means`; only ``mean`` needs it. `groups`
    [B, S] is the model's `position_groups`; positions in no mean (-1) are treated as frames (1).
    """
    if kind == "skip":
        return before
    if kind == "zero":
        return torch.zeros_like(after)
    if kind == "mean":
        return before + mean.to(before)[groups.where(groups >= 0, 1)]
    raise ValueError(f"unknown ablation {kind!r}; known: {list(KINDS)}")


@torch.no_grad()
def ablate(
    model: MusicModel, batch: Batch, kinds: Sequence[str] = KINDS, means: Tensor | None = None
) -> AblationScores:
    """Score every layer under every kind on one batch, restarting from its cached layer inputs.

    `means` is `UpdateSums.means` of training clips, needed for the kind "mean".
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"unknown ablations {unknown}; known: {list(KINDS)}")
    if "mean" in kinds and means is None:
        raise ValueError('the kind "mean" needs `means`, see update_sums')
    layers, calls = len(model.hook_points), model.layer_calls
    stream, groups = model.layer_inputs(batch), model.position_groups(batch)
    original = model.forward_from(batch, layers, stream[-1]).float().log_softmax(-1)
    probability = original.exp()
    entropy = _cross_entropy(original, batch.codes)
    kl = np.empty((len(kinds), layers, *entropy.shape))
    dce = np.empty_like(kl)
    for j, kind in enumerate(kinds):
        for i in range(layers):
            mean = None if means is None else means[i]
            hidden = ablated(kind, stream[i], stream[i + 1], mean, groups)
            changed = model.forward_from(batch, i + 1, hidden).float().log_softmax(-1)
            dce[j, i] = _cross_entropy(changed, batch.codes) - entropy
            # In place: these are the largest arrays by far, and new ones cost page faults.
            divergence = changed.neg_().add_(original).mul_(probability).sum(-1)
            kl[j, i] = divergence.double().mean(-1).cpu().numpy()
    cost = (model.layer_calls - calls) * len(batch)
    return AblationScores(tuple(kinds), entropy, kl, dce, cost)


def join(parts: Sequence[AblationScores]) -> AblationScores:
    """Scores of several batches as those of all their clips, in order."""
    return AblationScores(
        parts[0].kinds,
        np.concatenate([part.cross_entropy for part in parts]),
        np.concatenate([part.kl for part in parts], 2),
        np.concatenate([part.dce for part in parts], 2),
        sum(part.layer_forwards for part in parts),
    )


def _cross_entropy(log_probability: Tensor, codes: Tensor) -> np.ndarray:
    """Mean over frames of -log p(code): log-probabilities [B, K, T, card] to [B, K] float64."""
    picked = log_probability.gather(-1, codes[..., None])[..., 0]
    return -picked.double().mean(-1).cpu().numpy()


def ablation_table(
    scores: AblationScores, groups: Sequence[str], bootstrap: int, seed: int
) -> pd.DataFrame:
    """One row for each layer and kind: estimate and 95% interval of kl and dce.

    Columns ``kl, kl_low, kl_high`` are over all codebooks, ``kl_codebook_0, ...`` over one each;
    the same for ``dce``. Intervals resample `groups` [clips] (compositions), in one common draw.
    """
    if len(groups) != scores.kl.shape[2]:
        raise ValueError(f"{len(groups)} groups for {scores.kl.shape[2]} clips")
    rows: dict[tuple[int, str], dict] = {
        (layer, kind): {"layer": layer, "kind": kind}
        for kind in scores.kinds
        for layer in range(scores.kl.shape[1])
    }
    for name, values in (("kl", scores.kl), ("dce", scores.dce)):
        # The mean over codebooks joins the single codebooks as one more column: [clips, ...].
        joined = np.moveaxis(np.concatenate([values.mean(-1, keepdims=True), values], -1), 2, 0)
        lows, highs = bootstrap_groups(joined, groups, n=bootstrap, seed=seed)
        estimates = joined.mean(0)
        for j, kind in enumerate(scores.kinds):
            for layer in range(joined.shape[2]):
                for column in range(joined.shape[3]):
                    key = name if column == 0 else f"{name}_codebook_{column - 1}"
                    at = (j, layer, column)
                    rows[layer, kind] |= {
                        key: estimates[at],
                        f"{key}_low": lows[at],
                        f"{key}_high": highs[at],
                    }
    return pd.DataFrame(rows.values())


def ablation_figure(table: pd.DataFrame, name: str) -> Figure:
    """Score against layer, one line a kind, with intervals."""
    titles = {"kl": "KL(original || ablated)", "dce": "rise in cross-entropy"}
    figure, axes = plots.new_figure(1, 2, size=(9.0, 3.8), sharex=True)
    for axis, (score, title) in zip(axes[0], titles.items(), strict=True):
        for series, (kind, rows) in enumerate(table.groupby("kind", sort=False)):
            low, high = rows[f"{score}_low"], rows[f"{score}_high"]
            plots.interval_curve(axis, rows["layer"], rows[score], low, high, kind, series)
        axis.set(title=f"{name}: {title}", xlabel="layer", ylabel="nats per code")
        axis.set_xticks(sorted(table["layer"].unique()))
    axes[0, 0].legend()
    return figure


def ablation_metrics(scores: AblationScores, table: pd.DataFrame, groups: Sequence[str]) -> dict:
    """Nested numbers for `dvc metrics`: layers.<i>.<kind>.{kl,kl_low,kl_high,dce,...} and cost."""
    shown = [f"{name}{end}" for name in ("kl", "dce") for end in ("", "_low", "_high")]
    layers: dict[str, dict] = {}
    for row in table.to_dict("records"):
        layers.setdefault(str(row["layer"]), {})[row["kind"]] = {key: row[key] for key in shown}
    books = scores.cross_entropy.mean(0)
    forwards = scores.full_forward_equivalents
    return {
        "clips": len(groups),
        "groups": len(set(groups)),
        "cross_entropy": books.mean(),
        "cross_entropy_codebook": {str(k): value for k, value in enumerate(books)},
        "layers": layers,
        "layer_forwards": scores.layer_forwards,
        "full_forward_equivalents": forwards,
        "full_forward_equivalents_per_kind": (forwards - 1) / len(scores.kinds),
    }


def select_layers(
    metrics: dict,
    slots: Sequence[str],
    kind: str,
    score: str,
    skip_first: bool = True,
    skip_last: bool = True,
) -> dict[str, int]:
    """Slots to layers, the highest `score` under `kind` first; equal scores: the earlier layer.

    For an audio model `score` names what stands in its place (`counterparts` in its metrics), and
    layers are numbers of hook points.

    `skip_first`: layer 0 turns the sum of code embeddings into a stream; losing it hurts in every
    model (it tops music-sae's sweeps too), since all later layers then see input they were not
    made for. That says little about what its output holds, which is hardly more than the codes.
    `skip_last`: the last output goes straight to the heads, so its features are next codes and no
    layer is left to act on an edit.
    """
    score = metrics.get("counterparts", {}).get(score, score)
    if absent := [layer for layer, entry in metrics["layers"].items() if kind not in entry]:
        known = sorted(metrics["layers"][absent[0]])
        raise ValueError(f"select_layers.kind = {kind!r}: this model's ablations are {known}")
    values = {int(layer): entry[kind][score] for layer, entry in metrics["layers"].items()}
    allowed = sorted(values)[1 if skip_first else 0 : len(values) - (1 if skip_last else 0)]
    if len(allowed) < len(slots):
        raise ValueError(
            f"{len(slots)} slots but only layers {allowed} to choose from: shorten slots, or set "
            "select_layers.skip_first or select_layers.skip_last to false"
        )
    ranked = sorted(allowed, key=lambda layer: (-values[layer], layer))
    return dict(zip(slots, ranked, strict=False))


def spread_clips(rows: pd.DataFrame, split: str, count: int, seed: int) -> np.ndarray:
    """Positions in `rows` of `count` single clips of a split, as even over groups as can be.

    Of each composition a random clip in turn, so that intervals over compositions are as narrow
    as the budget allows. Only clips that features are found on (`clips.main_clips`).
    """
    positions = main_clips(rows, split)
    if len(positions) < count:
        raise ValueError(
            f"{count} clips wanted but split {split} has {len(positions)}: lower ablate.clips or "
            f"raise prepare_data.timgm6mb_clips.{split} (rendered clips) or "
            "prepare_data.recordings.limits (recordings)"
        )
    shuffled = np.random.default_rng(seed).permutation(positions)
    turn = rows["group"].iloc[shuffled].groupby(rows["group"].iloc[shuffled]).cumcount()
    return np.sort(shuffled[np.argsort(turn.to_numpy(), kind="stable")[:count]])
