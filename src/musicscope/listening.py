"""What a model hears: clips at its own sample rate, whatever rate they were stored at."""

from __future__ import annotations

import functools
from typing import Any

from musicscope.clips import ClipStore
from musicscope.resampling import at_rate


@functools.cache
def open_sources(model: str, clips: str, device: str = "cpu") -> tuple[Any, Any]:
    """A model and the clips at its rate, once a process; use with functools.partial."""
    from musicscope.models import load_model  # transformers are slow to import

    loaded = load_model(model, device=device)
    return loaded, at_rate(ClipStore.open(clips), loaded.sample_rate)
