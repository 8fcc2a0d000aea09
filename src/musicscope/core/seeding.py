"""Seeds of named generators, derived from the one seed in params.yaml."""

from __future__ import annotations

import hashlib


def seed_for(seed: int, *names: object) -> int:
    """A 63-bit seed for the generator called `names`, derived from the one seed in params.yaml.

    Named streams do not shift one another: adding a generator changes no other's numbers.
    """
    text = "/".join(str(n) for n in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
