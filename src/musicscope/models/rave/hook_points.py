"""Hook points of a RAVE export: find them by one run on noise, read and edit them, seed its noise.

Python hooks do not fire inside a ScriptModule. Its operators do go through torch's dispatcher,
where a dispatch mode sees each call; the identity of the weight tells the convolution. So the
module's own program runs, whatever else is in it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from musicscope.models.interface import Hook, HookPoint, apply_hook

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
    return apply_hook(name, hook, rows, positions).transpose(1, 2).contiguous()


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Generator[None]:
    """Seed torch's global generators, from which exports draw, and restore them afterwards."""
    index = device.index or 0
    with torch.random.fork_rng([index] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


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
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
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


# ---- survey

PROBE = 2**14  # samples; RAVE's own export warms up with as many
POSTERIOR, LATENT = "posterior_mean", "latent"


@dataclass(frozen=True)
class Survey:
    """Properties of one export."""

    sample_rate: int
    channels: int
    """Of the input; a mono clip is given to each."""
    ratio: int
    """Samples per latent frame."""
    names: dict[int, str]
    """Address of a convolution's weight to its name."""
    stats: str | None
    """The convolution whose output channels are posterior mean, then scale."""
    hook_points: tuple[HookPoint, ...]
    """In the order in which they are computed."""
    encoding: frozenset[str]
    """Hook points that need no decoder."""
    caches: dict[str, Tensor]
    """Buffers that a pass changes, as they were in the file."""
    notes: tuple[str, ...]
    """Missing hook points, with the reason."""


@torch.no_grad()
def survey(module: torch.jit.ScriptModule, name: str, device: torch.device) -> Survey:
    """Run encode and decode once on seeded noise and record all activations.

    ValueError for a module without encode, decode or a sample rate, and for one that does not
    keep the length of whole frames.
    """
    if absent := [m for m in ("encode", "decode") if not hasattr(module, m)]:
        raise ValueError(f"{name} has no method {' and no '.join(absent)}: not a RAVE export")
    rate = getattr(module, "sr", getattr(module, "sampling_rate", None))
    if rate is None:
        raise ValueError(f"{name} has no attribute sr; export it again with RAVE 2 or later")
    known = getattr(module, "encode_params", None)  # [channels, 1, D, ratio]
    if known is None:
        warnings.warn(f"{name} lacks encode_params: input of one channel is assumed", stacklevel=3)
    channels, step = (1, 1) if known is None else (int(known[0]), int(known[3]))
    names = {
        weight.data_ptr(): key.removesuffix(".weight")
        for key, weight in module.named_parameters()
        if key.startswith(("encoder.", "decoder.")) and key.endswith(".weight")
    }
    before = {key: value.clone() for key, value in module.named_buffers()}
    samples = -(-PROBE // step) * step
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(0)) * 0.1
    encoded: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def recorder(found: dict[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
        def record(key: str, values: Tensor) -> Tensor:
            calls[key] += 1
            found[key] = values.clone()
            return values

        return record

    with seeded(0, device):
        # Without its draw, z is a function of the posterior mean alone, which `_posterior` checks.
        with Convolutions(names, recorder(encoded), silent=True):
            z = module.encode(noise.to(device).expand(1, channels, -1))
        with Convolutions(names, recorder(decoded)):
            y = module.decode(z)
    ratio = samples // max(z.shape[-1], 1)
    if z.shape[-1] * ratio != samples or y.shape[-1] != samples:
        raise ValueError(
            f"{name}: {samples} samples gave {z.shape[-1]} latent frames and {y.shape[-1]} "
            "samples; an export must keep the length of whole frames"
        )
    if known is not None and (z.shape[1], ratio) != (int(known[2]), step):
        raise ValueError(
            f"{name} gives {z.shape[1]} latents per {ratio} samples, its own encode_params say "
            f"{int(known[2])} per {step}; parts of two models: export it again"
        )
    if not (torch.isfinite(z).all() and torch.isfinite(y).all()):
        raise ValueError(f"{name} gives NaN or infinity on noise: its weights are damaged")
    stats = next(reversed(encoded), None)
    mean = None if stats is None else _posterior(module, encoded[stats], z)
    notes = []
    found = dict(encoded)
    if mean is None:
        notes.append("no posterior_mean: z is not the PCA of a mean that the encoder ends in")
    else:
        found[POSTERIOR] = mean
    if _discrete(module):
        notes.append("no latent: those of a discrete export are code numbers")
    else:
        found[LATENT] = z
    found |= decoded
    if not calls:
        notes.append("no convolutions: the export has no named weights (is it frozen?)")
    for key in [k for k, v in found.items() if calls[k] > 1 or samples % v.shape[-1]]:
        why = "runs more than once" if calls[key] > 1 else "has a fraction of a frame too many"
        notes.append(f"no {key}: it {why}")
        del found[key]
    if not found:
        raise ValueError(f"{name} has nothing to read or edit: {'; '.join(notes)}")
    return Survey(
        sample_rate=int(rate),
        channels=channels,
        ratio=ratio,
        names=names,
        stats=None if mean is None else stats,
        hook_points=tuple(
            HookPoint(key, v.shape[1], int(rate) * v.shape[-1] / samples)
            for key, v in found.items()
        ),
        encoding=frozenset({*encoded, POSTERIOR, LATENT}),
        caches={k: before[k] for k, v in module.named_buffers() if not torch.equal(v, before[k])},
        notes=tuple(notes),
    )


def _discrete(module: torch.jit.ScriptModule) -> bool:
    return hasattr(module, "quantizer") or hasattr(getattr(module, "encoder", None), "rvq")


def _posterior(module: torch.jit.ScriptModule, stats: Tensor, z: Tensor) -> Tensor | None:
    """Find the posterior mean if z (drawn without noise) is its PCA; None for another encoder."""
    pca, centre = (getattr(module, key, None) for key in ("latent_pca", "latent_mean"))
    if pca is None or centre is None or stats.shape[1] != 2 * len(centre):
        return None
    mean = stats.chunk(2, 1)[0]
    expected = F.conv1d(mean - centre[:, None], pca[:, :, None])[:, : z.shape[1]]
    same = expected.shape == z.shape and torch.allclose(expected, z, rtol=1e-3, atol=1e-4)
    return mean if same else None
