"""What a model hears: clips at its own sample rate, whatever rate they were stored at."""

from __future__ import annotations

import functools
from typing import Any

from musicscope.data.clips import ClipStore, at_rate


@functools.cache
def open_sources(model: str, clips: str, device: str = "cpu") -> tuple[Any, Any]:
    """A model and the clips at its rate, once a process; use with functools.partial."""
    from musicscope.models.registry import load_model

    loaded = load_model(model, device=device)
    return loaded, at_rate(ClipStore.open(clips), loaded.sample_rate)
