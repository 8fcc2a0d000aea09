"""Ablation scores of any model: means for ablations, table, metrics, choice of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from torch import Tensor

from musicscope.core.io import Metrics
from musicscope.core.stats import Estimate, bootstrap_groups


@dataclass(frozen=True)
class Sums:
    """Running sums for the mean at every hook point; `+` joins two sets of clips.

    G: groups of positions that have a mean of their own.
    """

    sums: Mapping[str, Tensor]
    """Hook point to [G, d] float64."""
    counts: Mapping[str, Tensor]
    """Hook point to positions [G]."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            {name: value + other.sums[name] for name, value in self.sums.items()},
            {name: count + other.counts[name] for name, count in self.counts.items()},
        )

    @property
    def means(self) -> dict[str, Tensor]:
        """Hook point to means [G, d], float32."""
        return {
            name: (value / self.counts[name][:, None].clamp(min=1)).float()
            for name, value in self.sums.items()
        }


@dataclass(frozen=True)
class Scores:
    """Scores per clip, averaged over its frames. Parts are codebooks, or one for audio models."""

    kinds: tuple[str, ...]
    points: tuple[str, ...]
    """Names of the hook points."""
    loss: np.ndarray
    """[clips, parts] of the model as it is."""
    values: Mapping[str, np.ndarray]
    """Score to [kinds, points, clips, parts]."""
    numbered: bool = True
    """Whether hook points are known by number alone (layers of a decoder)."""
    unit: str = "nats per code"
    """Of the values."""
    layer_forwards: int = 0
    """Layer evaluations that were made, each on one clip."""

    def __getitem__(self, score: str) -> np.ndarray:
        return self.values[score]


def join(parts: Sequence[Scores]) -> Scores:
    """Join scores of several batches, in order."""
    return replace(
        parts[0],
        loss=np.concatenate([part.loss for part in parts]),
        values={name: np.concatenate([p[name] for p in parts], 2) for name in parts[0].values},
        layer_forwards=sum(part.layer_forwards for part in parts),
    )


def ablation_table(
    scores: Scores, groups: Sequence[str], bootstrap: int, seed: int
) -> pd.DataFrame:
    """Tabulate estimate and 95 % interval of each score, one row per hook point and kind.

    Columns: layer (number of the hook point), hook_point unless numbered, kind, and per score
    ``kl, kl_low, kl_high`` over all parts and, for several parts, ``kl_codebook_0, ...`` over one
    each. Intervals resample `groups` [clips] (compositions), in one common draw. ValueError for
    another number of groups than clips.
    """
    if len(groups) != len(scores.loss):
        raise ValueError(f"{len(groups)} groups for {len(scores.loss)} clips")
    rows: dict[tuple[int, str], dict[str, object]] = {
        (i, kind): {"layer": i, **({} if scores.numbered else {"hook_point": point})}
        | {"kind": kind}
        for kind in scores.kinds
        for i, point in enumerate(scores.points)
    }
    for name, values in scores.values.items():
        # The mean over parts joins the single parts as one more column: [clips, ...].
        columns = [values.mean(-1, keepdims=True), *([values] if values.shape[-1] > 1 else [])]
        joined = np.moveaxis(np.concatenate(columns, -1), 2, 0)
        lows, highs = bootstrap_groups(joined, groups, n=bootstrap, seed=seed)
        estimates = joined.mean(0)
        for j, i, column in np.ndindex(estimates.shape):
            key = name if column == 0 else f"{name}_codebook_{column - 1}"
            at = (j, i, column)
            rows[i, scores.kinds[j]] |= {
                key: estimates[at],
                f"{key}_low": lows[at],
                f"{key}_high": highs[at],
            }
    return pd.DataFrame(rows.values())


def ablation_metrics(
    scores: Scores, table: pd.DataFrame, groups: Sequence[str]
) -> dict[str, object]:
    """Nest numbers for `dvc metrics`: clips, groups, layers.<i>.<kind>.<score>, as estimates."""
    n, layers = len(set(groups)), {}
    for row in table.to_dict("records"):
        layers.setdefault(str(row["layer"]), {})[row["kind"]] = {
            name: Estimate(
                row[name], row[f"{name}_low"], row[f"{name}_high"], n, scores.unit
            ).as_dict()
            for name in scores.values
        }
    return {"clips": len(groups), "groups": n, "layers": layers}


SLOT = re.compile(r"(top|layer|cross)(\d+)$")
"""How a slot names its layer: rank in the ablation, number, or number of a cross-attention."""
CROSS_ATTENTION = "layers.{}.cross_attention"


def check_slots(
    slots: Sequence[str], name: str, layers: int, skip_first: bool = True, skip_last: bool = True
) -> None:
    """Check that the model `name`, with `layers` layers, has every slot.

    ValueError names the slots that it lacks, and the remedy.
    """
    ranked = max(0, layers - skip_first - skip_last)
    numbers = {slot: (m[1], int(m[2])) for slot in slots if (m := SLOT.match(slot))}
    lacking = [slot for slot in slots if slot not in numbers]
    lacking += [s for s, (of, i) in numbers.items() if of != "top" and i >= layers]
    low = [s for s, (of, rank) in numbers.items() if of == "top" and not 0 < rank <= ranked]
    if low:
        raise ValueError(
            f"slots has {', '.join(low)}, but {ranked} of {name}'s {layers} layers are ranked: "
            "shorten slots, or set select_layers.skip_first or select_layers.skip_last to false"
        )
    if lacking:
        raise ValueError(
            f"slots has {', '.join(lacking)}, but {name} has layer0 to layer{layers - 1}: remove "
            "what it lacks (`just slots all` writes the layers that all models have), or study "
            "the deeper model alone (`just slots all --models MODEL`)"
        )


def select_layers(
    metrics: Metrics,
    slots: Sequence[str],
    kind: str,
    score: str,
    skip_first: bool = True,
    skip_last: bool = True,
    name: str = "this model",
) -> dict[str, int | str]:
    """Fill slots with layers. top<n> is the n-th highest `score` under `kind`; ties: earlier layer.

    layer<i> and cross<i> are not ranked: they are the output of layer i, and what its
    cross-attention adds to the stream. For the latter the value is the name of the hook point.

    In an audio model layers are numbers of hook points, and `score` stands for its counterpart
    (``counterparts`` in the metrics).

    `skip_first`: layer 0 turns the sum of code embeddings into a stream. Its loss hurts every model
    (it tops music-sae's sweeps too), since all later layers then get input they were not made for.
    That says little about its output, which holds hardly more than the codes. `skip_last`: the last
    output goes straight to the heads, so its features are next codes and no layer is left to act on
    an edit. ValueError for a kind that was not run, and for slots that the model lacks.
    """
    score = metrics.get("counterparts", {}).get(score, score)
    if absent := [layer for layer, entry in metrics["layers"].items() if kind not in entry]:
        known = sorted(metrics["layers"][absent[0]])
        raise ValueError(f"select_layers.kind = {kind!r}: this model's ablations are {known}")
    values = {int(layer): entry[kind][score]["value"] for layer, entry in metrics["layers"].items()}
    check_slots(slots, name, len(values), skip_first, skip_last)
    allowed = sorted(values)[1 if skip_first else 0 : len(values) - (1 if skip_last else 0)]
    ranked = sorted(allowed, key=lambda layer: (-values[layer], layer))
    named = {"top": lambda rank: ranked[rank - 1], "layer": int, "cross": CROSS_ATTENTION.format}
    found = ((slot, *SLOT.findall(slot)[0]) for slot in slots)
    return {slot: named[of](int(number)) for slot, of, number in found}
