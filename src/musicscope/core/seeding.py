"""Seeds of named generators."""

from __future__ import annotations

import hashlib


def seed_for(seed: int, *names: object) -> int:
    """Derive the 63-bit seed of the generator called `names` from the one seed in params.yaml.

    Named streams do not shift one another: adding a generator changes no other's numbers.
    """
    text = "/".join(str(n) for n in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
