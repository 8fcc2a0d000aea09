"""Measure what models share and what each has alone: controls and diagnoses beside a shared code.

A dedicated-feature crosscoder (arXiv 2602.11729) reserves latents for one model each. That latents
are reserved does not make their features exclusive: the mispaired training fills them too, and
Latent Scaling tells whether the other model has the direction after all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from musicscope.core.io import Metrics
from musicscope.core.stats import Estimate, resample_weights
from musicscope.dictionaries import evaluation, latent_scaling, linear_maps
from musicscope.dictionaries.core import UniversalSAE
from musicscope.dictionaries.data import Paired, mispair

SCALED_CLIPS = 128
"""Test clips of Latent Scaling, at most."""
WITHOUT_OWN = "without own"
"""The control whose dedicated latents write nothing."""


def without_own(usae: UniversalSAE) -> UniversalSAE:
    """Set the decoder rows of dedicated latents to 0: what the shared latents reconstruct."""
    shared = torch.from_numpy(usae.owners < 0).to(usae.weights[0].W_dec)[:, None]
    sides = tuple(replace(side, W_dec=side.W_dec * shared) for side in usae.weights)
    return replace(usae, weights=sides)


def linear_metrics(
    controls: linear_maps.Errors, found: evaluation.SharedEvaluation, n: int, seed: int
) -> Metrics:
    """Return ``linear``: R2 of ridge regressions; ``r2_above_linear``: the code's R2 less that.

    Keys are source and r2_<i>_<j>; None where a model offers no such stream.
    """
    linear: Metrics = {}
    above: Metrics = {}
    for source, errors in controls.items():
        linear[source] = above[source] = None
        if errors is not None:
            r2 = linear_maps.r2_estimates(errors, found.squares, found.groups, n, seed)
            more = linear_maps.margins(
                found.squared_error, errors, found.squares, found.groups, n, seed
            )
            linear[source] = {key: one.as_dict() for key, one in r2.items()}
            above[source] = {key: one.as_dict() for key, one in more.items()}
    return {"linear": linear, "r2_above_linear": above}


@dataclass(frozen=True)
class Dedicated:
    """Evaluation of a crosscoder with dedicated latents."""

    owners: np.ndarray
    """[F] the model of each latent, or -1"""
    test: evaluation.SharedEvaluation
    without_own: evaluation.SharedEvaluation | None
    """The same without the dedicated latents' contributions"""
    norms: np.ndarray | None = None
    """[M, F] row norms; None: those of `test`"""

    def activity(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the activity of dedicated latents, [resamples], under weights [resamples, G].

        active_own_<i>: latents of owner i that fire, per frame; energy_own_<i>: their share of the
        energy that all latents add to model i (energy: squared norm of a mean contribution).
        """
        found = self.test
        frames = weights @ found.frames
        mean = weights @ found.values[:, 0] / frames[:, None]
        out = {}
        for i, norms in enumerate(found.norms):
            own = self.owners == i
            out[f"active_own_{i}"] = (weights @ found.fires[:, 0][:, own].sum(1)) / frames
            power = np.square(mean * norms)
            out[f"energy_own_{i}"] = power[:, own].sum(1) / power.sum(1)
        return out

    def numbers(self) -> dict[str, float]:
        """Return the numbers of `dedicated_metrics` without intervals."""
        found = self.test
        alive = (found.fires.sum((0, 1)) > 0) & (self.owners < 0)
        norms = evaluation.norm_numbers(found.norms if self.norms is None else self.norms, alive)
        out = evaluation.numbers(found)
        out |= {key: norms[key] for key in ("norm_shared", "norm_spread")}
        if self.without_own is not None:
            shared = evaluation.numbers(self.without_own)
            out |= {_shared(k): v for k, v in shared.items() if k.startswith("r2_")}
        activity = self.activity(np.ones((1, len(found.groups))))
        return out | {key: float(value[0]) for key, value in activity.items()}


def _shared(key: str) -> str:
    return key.replace("r2_", "r2_shared_")


def dedicated_metrics(found: Dedicated, n: int, seed: int) -> Metrics:
    """Return the sizes of the partitions, ``latents``, and the ``headline`` with intervals.

    r2_<j>, dead_fraction and l0 as for a crosscoder; r2_shared_<j>: without the dedicated latents;
    active_own_<i> and energy_own_<i>: see `Dedicated.activity`; norm_shared and norm_spread: of
    the shared latents that fire.
    """
    groups = found.test.groups
    head: Metrics = dict(found.numbers())
    estimates = evaluation.estimates(found.test, n, seed)
    if found.without_own is not None:
        shared = evaluation.estimates(found.without_own, n, seed)
        estimates |= {_shared(key): one for key, one in shared.items()}
    units = {"active": "latents per frame", "energy": "share"}
    for key, drawn in found.activity(resample_weights(groups, n, seed)).items():
        unit = units[key.split("_")[0]]
        estimates[key] = Estimate.from_resamples(head[key], drawn, len(groups), unit)
    head |= {key: one.as_dict() for key, one in estimates.items()}
    latents = {"shared": int((found.owners < 0).sum())}
    models = range(len(found.test.norms))
    latents |= {f"own_{i}": int((found.owners == i).sum()) for i in models}
    return {"latents": latents, "headline": head}


def scale_sets(
    usae: UniversalSAE, test: Paired, found: evaluation.SharedEvaluation, n: int, seed: int
) -> Metrics:
    """Apply Latent Scaling to latents that seem one model's own, and to shared ones (control).

    By the share of decoder norms in a crosscoder, of firings in a universal SAE; sets own_<i> and
    shared, see `latent_scaling.exclusive_sets`. Null: the other models' activations are of another
    composition.
    """
    fires = found.fires.sum(0)
    with np.errstate(invalid="ignore"):
        shares = fires / fires.sum(0)
    if usae.joint:
        shares = np.where(fires.sum(0) > 0, evaluation.relative_norms(found.norms), np.nan)
    sets = latent_scaling.exclusive_sets(shares, evaluation.OWN_NORM, evaluation.SHARED_NORM, seed)
    test = linear_maps.thinned(test, SCALED_CLIPS, seed)
    others = test.take(other_compositions(test, seed))
    out: Metrics = {}
    for owner in range(len(usae.names)):
        names = [f"own_{owner}"] + ["shared"] * (owner == 0)
        latents = np.concatenate([sets[name] for name in names])
        real, null = (
            one.nu(owner)
            for one in latent_scaling.scale_latents(
                usae, test.clips(), others.clips(), test.groups, latents, owner
            )
        )
        start = 0
        for name in names:
            span = slice(start, start := start + len(sets[name]))
            parts = ((nu[0][span], nu[1][span]) for nu in (real, null))
            out[name] = latent_scaling.summarise(*parts, n, seed)
    return out


def other_compositions(paired: Paired, seed: int) -> np.ndarray:
    """Order the clips so that each place holds a clip of another composition, all models alike."""
    crossed = mispair(paired, seed)
    place = {int(member): n for n, member in enumerate(paired.members[:, 1])}
    return np.array([place[int(member)] for member in crossed.members[:, 1]])
