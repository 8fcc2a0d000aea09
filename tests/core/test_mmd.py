"""The distance of paired sets: without bias at every n, and sensitive to a planted shift."""

from __future__ import annotations

import numpy as np
import pytest

from musicscope.core.mmd import GaussianKernel, paired_mmd

WIDTH = 3
KERNEL = GaussianKernel(np.ones(WIDTH), 2.0)


@pytest.mark.parametrize("n", [4, 30])
def test_equal_distributions_are_0_apart_on_average_and_a_shift_has_its_closed_form(n):
    """Pieces and their edited twins share noise, which must not make them look alike."""
    rng, runs = np.random.default_rng(n), 1500 if n == 4 else 200
    shift, found = 1.5, {"same": [], "shifted": []}
    for _ in range(runs):
        shared = rng.standard_normal((n, WIDTH))
        for name, by in (("same", 0.0), ("shifted", shift)):
            a, b = (shared + rng.standard_normal((n, WIDTH)) for _ in range(2))
            distance, similarity = paired_mmd(KERNEL, a, b + by, np.arange(n))(np.ones((1, n)))
            found[name].append((distance[0], similarity[0]))
    means = {name: np.mean(values, 0) for name, values in found.items()}
    errors = {name: np.std(values, 0) / np.sqrt(runs) for name, values in found.items()}
    wide = KERNEL.bandwidth**2 + 4
    alike = (KERNEL.bandwidth**2 / wide) ** (WIDTH / 2)
    true = 2 * alike * (1 - np.exp(-WIDTH * shift**2 / (2 * wide)))
    assert abs(means["same"][0]) < 4 * errors["same"][0]
    assert abs(means["shifted"][0] - true) < 4 * errors["shifted"][0]
    assert means["shifted"][0] > 10 * errors["shifted"][0]
    assert means["same"][1] > means["shifted"][1]


def test_a_group_that_is_drawn_twice_is_not_compared_with_itself():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4, WIDTH))
    of = paired_mmd(KERNEL, a, a + 1, np.array(["p", "p", "q", "r"]))
    twice, once = of(np.array([[2.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]))[0]
    assert twice == pytest.approx(once)
    assert np.isnan(of(np.array([[1.0, 1.0, 0.0, 0.0]]))[0]).all()
