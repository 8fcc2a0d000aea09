"""Solve many L2-regularised logistic regressions on the same inputs together.

A probe table needs thousands of fits (concepts x C x pooling x shuffles) that share X. One solver
for all of them turns every iteration into two matrix products; scikit-learn's lbfgs, one fit at a
time, is several times slower (the tests check that the solutions are equal).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Standardiser:
    """Per-column shift and scale learnt on training rows; constant columns are dropped."""

    columns: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray) -> Standardiser:
        """Estimate from training rows x [n, p]; ValueError if no column varies."""
        mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
        columns = np.flatnonzero(std > 1e-6 * (np.abs(mean) + 1e-6))
        if not len(columns):
            raise ValueError(f"none of {x.shape[1]} columns varies over {len(x)} training clips")
        return cls(columns, mean[columns], std[columns])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Standardise the columns that vary, float64 [n, columns]."""
        return (x[:, self.columns] - self.mean) / self.std


def _rotate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate x to Z [n, r]: Z, its squared singular values [r], and back [p, r]; Z = x @ back.

    Columns of Z are orthogonal, and `back` has orthonormal columns that span the rows of x, in
    which every L2-regularised solution lies: the fit of Z is the fit of x, with at most n inputs.
    """
    if x.shape[1] <= x.shape[0]:
        square, back = torch.linalg.eigh(x.T @ x)
        keep = square > 1e-12 * square[-1]
        back = back[:, keep]
        return x @ back, square[keep], back
    square, left = torch.linalg.eigh(x @ x.T)
    keep = square > 1e-12 * square[-1]
    square, left = square[keep], left[:, keep]
    return left * square.sqrt(), square, (x.T @ left) / square.sqrt()


def fit_logistic(
    x: np.ndarray,
    labels: np.ndarray,
    c: np.ndarray,
    tolerance: float = 1e-4,
    iterations: int = 5000,
    kept: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise sum(log loss) + |w|^2 / (2 C) for every column of labels; intercept not penalised.

    The objective is scikit-learn's. Each step divides the gradient by Bohning's bound on the
    Hessian (X'X/4 + I/C; Bohning & Lindsay 1988), which is diagonal after a rotation of X, with
    Nesterov's momentum and a restart per problem (O'Donoghue & Candes 2015). A problem stops when
    the gradient's norm in the metric of that bound is below `tolerance`.

    Args:
        x: inputs [n, p]; columns should be standardised.
        labels: bool [n, m], one column a problem.
        c: inverse regularisation strength [m].
        kept: bool [n, m], rows that a problem is fitted on; all by default.
    Returns:
        weights float64 [p, m] and intercepts float64 [m].
    """
    inputs = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))
    target = torch.from_numpy(np.asarray(labels).astype(np.float64))
    centre = inputs.mean(0)
    z, square, back = _rotate(inputs - centre)
    ridge = 1.0 / torch.from_numpy(np.asarray(c, dtype=np.float64))
    n, m = target.shape
    # The intercept is one more input, of ones: orthogonal to the others since z is centred.
    z = torch.cat([z, torch.ones(n, 1, dtype=torch.float64)], 1)
    bound = torch.cat([square[:, None] / 4 + ridge, torch.full((1, m), n / 4.0)])
    penalty = torch.cat([ridge.expand(len(square), m), torch.zeros(1, m, dtype=torch.float64)])

    solution = torch.zeros(len(bound), m, dtype=torch.float64)
    share = target.mean(0)
    rows = None if kept is None else torch.from_numpy(np.asarray(kept).astype(np.float64))
    if rows is not None:
        share = (target * rows).sum(0) / rows.sum(0)
    solution[-1] = torch.logit(share, eps=1e-6)
    active = torch.arange(m)
    current, ahead = solution.clone(), solution.clone()
    momentum = torch.ones(m, dtype=torch.float64)
    for _ in range(iterations):
        residual = torch.sigmoid(z @ ahead) - target[:, active]
        if rows is not None:  # fewer rows have a smaller Hessian: the bound still holds
            residual *= rows[:, active]
        gradient = z.T @ residual + penalty * ahead
        step = gradient / bound
        done = (gradient * step).sum(0) < tolerance**2
        following = ahead - step
        if done.any():
            solution[:, active[done]] = following[:, done]
            active, keep = active[~done], ~done
            if not len(active):
                break
            following, current, gradient = following[:, keep], current[:, keep], gradient[:, keep]
            bound, penalty, momentum = bound[:, keep], penalty[:, keep], momentum[keep]
        uphill = (gradient * (following - current)).sum(0) > 0
        momentum = torch.where(uphill, 1.0, momentum)
        grown = (1 + torch.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + ((momentum - 1) / grown) * (following - current)
        current, momentum = following, grown
    else:
        raise RuntimeError(
            f"logistic regression: {len(active)} of {m} problems did not converge in {iterations} "
            f"iterations (largest C {float(np.max(c)):g}); lower the largest probe.c_grid"
        )
    weights = back @ solution[:-1]
    return weights.numpy(), (solution[-1] - centre @ weights).numpy()
