"""Hooks on the convolutions of a TorchScript module, and its noise seeded.

Python hooks do not fire inside a ScriptModule. Its operators do go through torch's dispatcher,
though, where a dispatch mode sees each call, and the identity of the weight tells which
convolution it is. So the module's own program runs, whatever else is in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from musicscope.models.interface import Hook

# Above autograd the last three are taken apart into the first; under inference_mode they are not.
CONVOLUTIONS = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv1d.padding,
    torch.ops.aten.conv_transpose1d.default,
}
NORMAL = {torch.ops.aten.randn, torch.ops.aten.randn_like, torch.ops.aten.normal_}


def edited(name: str, hook: Hook, values: Tensor) -> Tensor:
    """What `hook` makes of activations [1, d, T]; ValueError unless it keeps their shape."""
    rows = values.transpose(1, 2)
    result = hook(rows, torch.arange(1, rows.shape[1] + 1, device=rows.device))
    if not isinstance(result, Tensor) or result.shape != rows.shape:
        got = list(result.shape) if isinstance(result, Tensor) else type(result)
        raise ValueError(
            f"the hook at {name} must return activations {list(rows.shape)}, got {got}"
        )
    return result.to(values.dtype).transpose(1, 2).contiguous()


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded for a while, then as they were: exports draw from them."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class Convolutions(TorchDispatchMode):
    """Passes the output of each convolution with a known weight through `act(name, output)`.

    Works inside TorchScript, whose operators go through the same dispatcher. `silent` makes every
    normal draw zero. An exception in `act` is kept in `error`: the interpreter would lose its type.
    """

    def __init__(
        self, names: dict[int, str], act: Callable[[str, Tensor], Tensor], silent: bool = False
    ) -> None:
        super().__init__()
        self.names, self.act, self.silent = names, act, silent
        self.error: Exception | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.silent and func.overloadpacket in NORMAL:
            return out.zero_()
        name = self.names.get(args[1].data_ptr()) if func in CONVOLUTIONS else None
        if name is not None and self.error is None:
            try:
                return self.act(name, out)
            except Exception as error:
                self.error = error
        return out
