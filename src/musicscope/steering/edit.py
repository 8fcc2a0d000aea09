"""Edits of sparse codes while a model generates: concepts off, on, several at once.

At one layer x' = x + decode(edited code) - decode(code). The decoder is linear, so this needs only
the rows of W_dec of edited latents, and the SAE's reconstruction error stays in x. The main cost is
to find which latents fire: for TopK one product with the encoder and the k-th largest value per
row, for BatchTopK the rows of the edited latents alone. benchmarks/steering.py measures it.

An edit of strength 0 returns the activations themselves, so the tokens are the same bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from musicscope.dictionaries.core import TopKSAE
from musicscope.models.interface import Hook, MusicModel

TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ablate": lambda old, value: torch.zeros_like(old),
    "scale": lambda old, value: old * value,
    "set": lambda old, value: value.expand_as(old),
    "clamp_min": torch.maximum,
}
"""Operation -> target of values [..., n], given one number per latent [n]."""
BRANCHES = ("conditional", "both", "guidance")
Schedule = tuple[float, float]
"""Seconds (start, end): an edit acts on frames from start up to, not including, end."""
ALWAYS: Schedule = (0.0, math.inf)


@dataclass(frozen=True)
class Edit:
    """One operation on some latents: value -> value + strength * (target - value)."""

    features: tuple[int, ...]
    op: str
    """ablate: target 0; scale: old * value; set: value; clamp_min: value where old is below it."""
    values: tuple[float, ...] = ()
    """One per latent, in activation units (scale: a factor). Not needed to ablate."""

    def __post_init__(self) -> None:
        if self.op not in TARGETS:
            raise ValueError(f"operation {self.op!r}: known {', '.join(TARGETS)}")
        if self.op == "ablate" and not self.values:
            object.__setattr__(self, "values", (0.0,) * len(self.features))
        if not self.features or len(set(self.features)) != len(self.features):
            raise ValueError(f"an edit needs latents, each once, got {list(self.features)[:8]}")
        if len(self.values) != len(self.features) or not all(map(math.isfinite, self.values)):
            raise ValueError(f"need a finite value for each of {len(self.features)} latents")


@dataclass(frozen=True)
class Gate:
    """A linear probe on the running mean of some latents: closed-loop steering.

    It reads activations before the edit, which depend on the tokens drawn so far. So it detects
    whether the concept is in the music generated so far, as the monitor of SMITIN does
    (arXiv 2404.02252).
    """

    features: tuple[int, ...]
    weights: tuple[float, ...]
    bias: float
    """The concept is present if weights . mean + bias > 0."""
    seconds: float
    """Time constant of the running mean."""
    opens: str = "present"
    """Edit while the concept is "present" (to switch it off) or "absent" (to switch it on)."""

    def __post_init__(self) -> None:
        if self.opens not in ("present", "absent") or self.seconds <= 0:
            raise ValueError(f"gate: opens {self.opens!r}, seconds {self.seconds}")
        if not self.features or len(self.features) != len(self.weights):
            raise ValueError(f"{len(self.weights)} weights for {len(self.features)} latents")


@dataclass(frozen=True)
class ConceptEdit:
    """All edits of one concept, with strength and gate."""

    name: str
    edits: tuple[Edit, ...]
    strength: float = 1.0
    """0 changes nothing, 1 reaches the edits' targets, more goes past them."""
    gate: Gate | None = None


@dataclass(frozen=True)
class Steering:
    """Concepts to edit at one layer. Later concepts see a latent as earlier ones left it."""

    sae: TopKSAE
    concepts: tuple[ConceptEdit, ...]
    branch: str = "conditional"
    """Rows of guided generation to edit.

    conditional: rows with the caption, so guidance multiplies the edit by its scale. both: all
    rows, so the edit counts once. guidance: rows without the caption get the opposite of the edit
    (a negative prompt made of latents). It then counts scale - 1 times, and the conditional
    prediction is unchanged. Without guidance the first two edit all rows; the third is an error.
    """
    schedule: Schedule = ALWAYS

    def __post_init__(self) -> None:
        if self.branch not in BRANCHES:
            raise ValueError(f"branch {self.branch!r}: known {', '.join(BRANCHES)}")
        for concept in self.concepts:
            if not math.isfinite(concept.strength):
                raise ValueError(f"{concept.name}: strength must be finite")
            used = [f for edit in concept.edits for f in edit.features]
            used += concept.gate.features if concept.gate else ()
            if used and not 0 <= min(used) <= max(used) < self.sae.n_latents:
                raise ValueError(f"{concept.name}: latents must lie in 0..{self.sae.n_latents - 1}")


Change = Callable[[Tensor, Tensor, int], Tensor | None]
"""(activations [rows, S, d], positions [S], conditional) -> sum to add [rows, S, d]; None: nothing.

The first `conditional` rows have the caption; the others are their unconditional halves."""


def change_hook(
    model: MusicModel, change: Change, branch: str = "conditional", schedule: Schedule = ALWAYS,
    frame_rate: float | None = None,
) -> Hook:  # fmt: skip
    """Make a hook that adds `change` to the rows of `branch`, on frames of the schedule.

    The start column is no frame and is not edited. `frame_rate` is needed where the hook point's
    rate differs from the model's (RAVE).
    """
    rate = model.frame_rate if frame_rate is None else frame_rate
    start, end = schedule
    if branch not in BRANCHES or not 0 <= start <= end:
        raise ValueError(f"branch {branch!r} of {', '.join(BRANCHES)}, schedule {schedule}")
    first = math.ceil(start * rate - 1e-9)
    last = math.inf if end == math.inf else math.ceil(end * rate - 1e-9)

    def within(positions: Tensor) -> slice | Tensor | None:
        """Positions within the schedule; None if there are none."""
        if len(positions) == 1:  # a step of generation: a mask would cost as much as the edit
            return slice(None) if first < int(positions) <= last else None
        chosen = (positions > first) & (positions <= last)
        return chosen if chosen.any() else None

    def hook(activations: Tensor, positions: Tensor) -> Tensor:
        if (frames := within(positions)) is None:
            return activations
        rows = len(activations)
        conditional = len(range(*model.conditional_rows.indices(rows)))
        if branch == "guidance" and 2 * conditional != rows:
            raise ValueError("branch guidance needs guided generation (guidance_scale above 1)")
        x = activations if branch == "both" else activations[:conditional]
        difference = change(x[:, frames], positions[frames], conditional)
        if difference is None:
            return activations
        changed = activations.clone()
        part = changed[conditional:] if branch == "guidance" else changed[: len(x)]
        sign = -1 if branch == "guidance" else 1
        part[:, frames] += sign * difference.to(changed.dtype)
        return changed

    return hook


def running_means(decay: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Make a function (values [rows, S, n], positions [S]) -> running means, same shape.

    m <- decay * m + (1 - decay) * value, divided by 1 - decay^count as in Adam, so that the first
    frames count in full. It keeps the last mean between calls. It starts anew when positions do not
    continue, or the number of rows changes (the next generation).
    """
    position, count, mean = -1, 0, torch.empty(0)

    def follow(values: Tensor, positions: Tensor) -> Tensor:
        nonlocal position, count, mean
        if int(positions[0]) <= position or len(mean) != len(values):
            count, mean = 0, torch.zeros_like(values[:, 0])
        means = []
        for s in range(values.shape[1]):
            mean = decay * mean + (1 - decay) * values[:, s]
            count += 1
            means.append(mean / (1 - decay**count))
        position = int(positions[-1])
        return torch.stack(means, 1)

    return follow


def _opened_by(
    gate: Gate, columns: slice | Tensor, rate: float
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Make a function of values [rows, S, n] of all latents in use: 1 where open, [rows, S, 1].

    The rows with the caption also decide for their unconditional halves, which get the same tokens.
    """
    follow = running_means(math.exp(-1 / (gate.seconds * rate)))
    weights = torch.tensor(gate.weights)

    def opened(values: Tensor, positions: Tensor, conditional: int) -> Tensor:
        logits = (
            follow(values[:conditional][..., columns], positions) @ weights.to(values) + gate.bias
        )
        is_open = (logits > 0) == (gate.opens == "present")
        return is_open.repeat(len(values) // conditional, 1).unsqueeze(-1).to(values.dtype)

    return opened


# --- codes ------------------------------------------------------------------------------------

GROUP = 8
"""Columns per group in the search for the k-th largest pre-activation."""


def kth_largest(z: Tensor, k: int) -> Tensor:
    """Find the k-th largest value per row of z [N, F], exactly: [N, 1].

    As in `dictionaries.core.largest_k`, candidates are the groups of columns with the largest
    maxima. Five numpy calls are faster for the few rows of a generation step.
    """
    N, F = z.shape
    if z.is_cuda or z.dtype != torch.float32 or F % GROUP or k >= F // GROUP:
        return z.topk(k).values[:, -1:]
    groups = z.numpy().reshape(N, GROUP, F // GROUP)
    best = np.argpartition(groups.max(1), -k, axis=1)[:, None, -k:]
    candidates = np.take_along_axis(groups, best, 2).reshape(N, GROUP * k)
    return torch.from_numpy(np.partition(candidates, -k, axis=1)[:, -k, None])


def firing(sae: TopKSAE, x: Tensor, features: Tensor) -> Tensor:
    """Encode x [N, d] for some latents only: values [N, n] as in `encode`, 0 if not active."""
    if sae.activation != "topk":
        centred = x.to(sae.W_enc.dtype) - sae.b_dec
        own = torch.addmm(sae.b_enc[features], centred, sae.W_enc[features].T)
        return own.masked_fill(own <= sae.limits(features), 0.0).relu_()
    z = sae.pre_activations(x)
    own = z[:, features]
    return own.masked_fill_(own < kth_largest(z, sae.k), 0.0).relu_()


Step = tuple[float | Tensor, tuple[Edit, ...], Gate | None]
"""Strength (a number, or one per latent), edits, gate."""


def _steps(concepts: Sequence[ConceptEdit]) -> list[Step]:
    """Merge the concepts' edits into few operations: one latent costs as much as fifty.

    If no latent is edited twice and there is no gate, their order does not matter, so all edits of
    one operation are merged.
    """
    plain: list[Step] = [(c.strength, c.edits, c.gate) for c in concepts]
    edits = [(c.strength, edit) for c in concepts for edit in c.edits]
    latents = [f for _, edit in edits for f in edit.features]
    if any(c.gate for c in concepts) or len(set(latents)) < len(latents):
        return plain
    found: list[Step] = []
    for op in dict.fromkeys(edit.op for _, edit in edits):
        same = [(strength, edit) for strength, edit in edits if edit.op == op]
        together = Edit(
            tuple(f for _, edit in same for f in edit.features), op,
            tuple(v for _, edit in same for v in edit.values),
        )  # fmt: skip
        strengths = [strength for strength, edit in same for _ in edit.features]
        one = len(set(strengths)) == 1
        found.append((strengths[0] if one else torch.tensor(strengths), (together,), None))
    return found


def code_change(sae: TopKSAE, concepts: Sequence[ConceptEdit], frame_rate: float) -> Change | None:
    """Make the change of activations by the concepts' edits; None if all strengths are 0."""
    plan = _steps([c for c in concepts if c.strength != 0 and c.edits])
    if not plan:
        return None
    edited = dict.fromkeys(f for _, edits, _ in plan for edit in edits for f in edit.features)
    gated = dict.fromkeys(f for _, _, gate in plan if gate for f in gate.features)
    order = [*edited, *(f for f in gated if f not in edited)]
    place = {feature: i for i, feature in enumerate(order)}
    device = sae.W_enc.device
    features = torch.tensor(order, device=device)
    W_dec = sae.W_dec[features[: len(edited)]]

    def columns(chosen: Sequence[int]) -> slice | Tensor:
        at = [place[f] for f in chosen]
        # Latents that no earlier edit has stand next to each other: a view, no copy.
        if at == list(range(at[0], at[0] + len(at))):
            return slice(at[0], at[0] + len(at))
        return torch.tensor(at, device=device)

    def prepared(edit: Edit) -> tuple[Callable, slice | Tensor, Tensor]:
        return TARGETS[edit.op], columns(edit.features), torch.tensor(edit.values, device=device)

    steps = [
        (strength.to(device) if isinstance(strength, Tensor) else strength,
         [prepared(edit) for edit in edits],
         None if gate is None else _opened_by(gate, columns(gate.features), frame_rate))
        for strength, edits, gate in plan
    ]  # fmt: skip

    def change(x: Tensor, positions: Tensor, conditional: int) -> Tensor | None:
        values = firing(sae, x.flatten(0, 1), features).unflatten(0, x.shape[:2])
        before = values[..., : len(edited)]
        after = before.clone()
        for strength, edits, opened in steps:
            share = (
                strength if opened is None else strength * opened(values, positions, conditional)
            )
            for target, at, value in edits:
                old = after[..., at]
                after[..., at] = torch.lerp(old, target(old, value), share)
        difference = after - before
        return difference @ W_dec if difference.any() else None

    return change


def steering_hook(model: MusicModel, steering: Steering, frame_rate: float | None = None) -> Hook:
    """Make the hook that steers `model` at the SAE's layer; for one generation after another.

    A gate keeps its running mean, so generations that alternate need a hook each.
    """
    rate = model.frame_rate if frame_rate is None else frame_rate
    change = code_change(steering.sae, steering.concepts, rate)
    if change is None:
        return lambda activations, positions: activations
    return change_hook(model, change, steering.branch, steering.schedule, rate)
