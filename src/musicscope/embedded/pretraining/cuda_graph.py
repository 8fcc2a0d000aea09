"""Record a training step as a CUDA graph, and replay it on new inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Graph(Generic[T]):
    """A function of tensors and what it leaves in gradients, recorded once.

    Launching thousands of small kernels one by one takes longer than running them.
    """

    WARM_UP = 3

    def __init__(
        self, run: Callable[..., T], inputs: Sequence[Tensor],
        parameters: Sequence[nn.Parameter] = (),
    ):  # fmt: skip
        """Record `run` for inputs of these shapes; it is called WARM_UP times before.

        Args:
            run: must not wait for the device.
            inputs: its arguments.
            parameters: whose gradients `run` sets anew and the caller reads.

        Raises:
            RuntimeError: the device refuses to record it.
        """
        self.inputs = tuple(x.clone() for x in inputs)
        self.parameters = parameters
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                run(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = run(*self.inputs)
        self.gradients = [p.grad for p in parameters]

    def __call__(self, *inputs: Tensor) -> T:
        """What `run` would return; its tensors hold until the next call."""
        for ours, given in zip(self.inputs, inputs, strict=True):
            ours.copy_(given)
        self.graph.replay()
        # Graphs of other shapes leave gradients in memory of their own.
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.result
