"""Precision of float32 products and convolutions on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch


@contextlib.contextmanager
def tf32(products: bool, cudnn: bool) -> Generator[None]:
    """Allow TF32, or not, in matrix products and in cuDNN (convolutions, LSTM); also a decorator.

    TF32 keeps 10 bits of a float32's mantissa. torch allows it in cuDNN unless told otherwise.
    A CPU takes no notice.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, cudnn
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
