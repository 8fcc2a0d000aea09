"""Hook the convolutions of a TorchScript module, and seed its noise.

Python hooks do not fire inside a ScriptModule. Its operators do go through torch's dispatcher,
where a dispatch mode sees each call; the identity of the weight tells the convolution. So the
module's own program runs, whatever else is in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from musicscope.models.hooks import apply
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
    """Apply a hook to activations [1, d, T]. ValueError unless it keeps their shape."""
    rows = values.transpose(1, 2)
    positions = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    return apply(name, hook, rows, positions).transpose(1, 2).contiguous()


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Generator[None]:
    """Seed torch's global generators, from which exports draw, and restore them afterwards."""
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
    """Pass the output of each convolution with a known weight through `act(name, output)`.

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
