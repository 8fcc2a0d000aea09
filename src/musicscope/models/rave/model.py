"""RAVE (Caillon & Esling 2021) from an exported TorchScript file, as an `AudioModel`.

An export is ``encode(x [B, C, n]) -> z [B, D, n / ratio]`` and ``decode(z) -> [B, C', n]``. Inside
encode: PQMF, encoder (posterior mean and scale), a noise draw, less ``latent_mean``, PCA, and only
the leading D dimensions are kept; decode fills the rest with noise before it turns the PCA back,
and its decoder may synthesise noise of its own. Streaming exports keep the end of what they saw in
caches. Hence each clip runs alone, with the caches as in the file and with noise seeded from the
clip's samples: the result depends neither on other clips nor on their order.

Hook points are ``posterior_mean`` (before the draw and the PCA: deterministic, and of the same
width whatever fidelity the export kept), ``latent`` (z), and every convolution of encoder and
decoder by its name in the export, such as ``decoder.net.3``. Python hooks do not fire inside a
ScriptModule, so convolutions are caught where they run (`musicscope.models.rave.hook_points`): the
program that runs is the export's own, to the last bit, noise synthesiser and caches included.
Where weights are no longer parameters (a frozen export), only ``latent`` is left, and
`RaveModel.notes` says so.

RAVE itself (code and published models: CC BY-NC 4.0) is neither needed nor part of this package.
See `musicscope.models.rave.archive_check` for what may be in a file.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from musicscope.core.audio import spectra, spectral_distance
from musicscope.core.precision import tf32
from musicscope.core.seeding import seed_for
from musicscope.models.interface import AudioBatch, Hook, Hooks, check_audio
from musicscope.models.rave.archive_check import load_archive
from musicscope.models.rave.hook_points import (
    LATENT,
    POSTERIOR,
    Convolutions,
    edited,
    seeded,
    survey,
)

NOT_OFFERED = {
    "forward": "an autoencoder has no logits; use reconstruct",
    "forward_from": "layers cannot be run from the middle; use latents and decode",
    "layer_inputs": "use capture with the names of hook points",
    "redrawn": "it has no layers that take one stream",
    "cross_entropy": "it predicts no codes; use loss, a spectral distance",
    "generate": "it makes audio from audio only, not from captions; use encode and reconstruct",
    "with_captions": "it has neither codes nor captions; use encode",
    "num_codebooks": "it has no codes",
    "layer_calls": "each run is one encode and one decode",
}


class RaveModel:
    """`musicscope.models.interface.AudioModel` over a TorchScript export (`.module`).

    All methods run without autograd. `ratio` is samples per latent frame; `notes` names missing
    hook points. Every clip is a pass of its own: hooks get [1, T, d].
    """

    loss_name = "spectral"

    def __init__(
        self, module: torch.jit.ScriptModule, name: str, device: torch.device, seed: int = 0
    ) -> None:
        self.module, self.name, self.device, self.seed = module, name, device, seed
        self.conditional_rows = slice(None)
        self.survey = survey(module, name, device)
        self.sample_rate, self.ratio = self.survey.sample_rate, self.survey.ratio
        self.frame_rate = self.sample_rate / self.ratio
        self.hook_points = self.survey.hook_points
        self.frame_rates = {point.name: point.rate for point in self.hook_points}
        self.notes = self.survey.notes
        # Caches are known by having changed; any other state that a module keeps shows here.
        noise = torch.randn(1, 4 * self.ratio, generator=torch.Generator().manual_seed(0)) * 0.1
        first, second = (self.reconstruct(self.encode(noise)) for _ in range(2))
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-5):
            raise ValueError(
                f"{name} keeps state that cannot be reset: the same clip gives other audio the "
                "second time; export it without streaming"
            )

    @classmethod
    def load(
        cls,
        source: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> RaveModel:
        """Load a .ts file, or a folder that holds exactly one.

        `seed` seeds all noise. ValueError for another dtype than float32 (exports are), for
        several files, and as in `musicscope.models.rave.archive_check`.
        """
        source = Path(source)
        files = sorted(source.glob("*.ts")) if source.is_dir() else [source]
        if len(files) != 1:
            found = [file.name for file in files]
            raise ValueError(f"{source} holds {found or 'no .ts file'}: give one RAVE export")
        if dtype != torch.float32:
            raise ValueError(f"{source}: RAVE exports run in float32, not {dtype}")
        device = torch.device(device)
        name = source.name if source.is_dir() else source.stem
        return cls(load_archive(files[0], device), name, device, seed)

    def __getattr__(self, name: str) -> NoReturn:
        # AttributeError, so that this is no `LanguageModel`.
        why = NOT_OFFERED.get(name)
        raise AttributeError(
            f"RAVE has no {name!r}: {why}" if why else f"RaveModel has no attribute {name!r}"
        )

    # ---- running it

    def encode(
        self, audio: Tensor | np.ndarray, captions: Sequence[str | None] | None = None
    ) -> AudioBatch:
        """Make a batch of audio [B, n] float at `sample_rate`; captions are ignored.

        ValueError for another shape or type, and for NaN or infinity (the rows are named).
        """
        audio = check_audio(audio).cpu()
        digests = (hashlib.sha256(clip.numpy().tobytes()).hexdigest() for clip in audio)
        seeds = tuple(seed_for(self.seed, "noise", digest) for digest in digests)
        return AudioBatch(audio.to(self.device), seeds)

    def capture(
        self, batch: AudioBatch, names: Sequence[str], hooks: Hooks = None
    ) -> dict[str, Tensor]:
        """Read activations [B, T, d] of the named hook points in one pass, after their own edits.

        T = ceil(n * frame_rates[name] / sample_rate): frames of the padding alone are left out.
        The decoder runs only if one of its points is asked for.
        """
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        self._known(seen)
        self._run(batch, hooks or {}, seen, decode=not self.survey.encoding.issuperset(names))
        return {name: torch.cat(values) for name, values in seen.items()}

    def latents(self, batch: AudioBatch, hooks: Hooks = None) -> Tensor:
        """Draw z [B, ceil(n / ratio), D] as the export does, for edits outside hooks."""
        return self._run(batch, hooks or {}, {}, decode=False)[0]

    def decode(self, latents: Tensor, batch: AudioBatch, hooks: Hooks = None) -> Tensor:
        """Turn (edited) latents [B, T, D] of `batch` into audio [B, n], with its noise."""
        return self._run(batch, hooks or {}, {}, latents=latents)[1]

    def reconstruct(
        self, batch: AudioBatch, hooks: Hooks = None, latents: Tensor | None = None
    ) -> Tensor:
        """Encode, edit and decode: audio [B, n]; several channels are averaged.

        The noise is the same with and without hooks, so an edit that changes nothing changes no
        sample. With the batch's own `latents` the encoder runs only where a hook acts in it.
        """
        if self.survey.encoding.intersection(hooks or {}):
            latents = None
        return self._run(batch, hooks or {}, {}, latents=latents)[1]

    def loss(self, batch: AudioBatch, hooks: Hooks = None) -> Tensor:
        """Spectral distance of each clip to its reconstruction, [B] float64 on the CPU."""
        pairs = zip(batch.audio.cpu().numpy(), self.reconstruct(batch, hooks).cpu().numpy(),
                    strict=True)  # fmt: skip
        return torch.tensor(
            [spectral_distance(spectra(clip), spectra(audio)) for clip, audio in pairs],
            dtype=torch.float64,
        )

    def _known(self, names: Iterable[str]) -> None:
        if unknown := [name for name in names if name not in self.frame_rates]:
            known = [point.name for point in self.hook_points]
            notes = "".join(f"; {note}" for note in self.notes)
            raise ValueError(f"{self.name} has no {unknown}; it has {known}{notes}")

    @torch.no_grad()
    @tf32(False, False)  # as on a CPU
    def _run(
        self,
        batch: AudioBatch,
        hooks: Mapping[str, Hook],
        seen: dict[str, list[Tensor]],
        decode: bool = True,
        latents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Give latents and audio (empty without `decode`).

        Fills `seen` [names] with one activation [1, T, d] per clip.
        """
        self._known(hooks)
        samples = batch.audio.shape[1]

        def act(name: str, values: Tensor) -> Tensor:
            if name in hooks:
                values = edited(name, hooks[name], values)
            if name in seen:
                frames = math.ceil(samples * self.frame_rates[name] / self.sample_rate - 1e-6)
                seen[name].append(values[..., :frames].transpose(1, 2).clone())
            if name == self.survey.stats and (POSTERIOR in hooks or POSTERIOR in seen):
                mean, scale = values.chunk(2, 1)
                values = torch.cat([act(POSTERIOR, mean), scale], 1)
            return values

        padded = F.pad(batch.audio, (0, -samples % self.ratio))
        drawn, decoded = [], []
        for i, seed in enumerate(batch.seeds):
            if latents is None:
                x = padded[i].expand(1, self.survey.channels, -1)
                z = self._part(self.module.encode, x, act, seed_for(seed, "encode"))
                z = act(LATENT, z)
            else:
                z = latents[i : i + 1].transpose(1, 2).to(padded).contiguous()
            drawn.append(z.transpose(1, 2))
            if decode:
                y = self._part(self.module.decode, z, act, seed_for(seed, "decode"))
                decoded.append(y.mean(1)[:, :samples])
        return torch.cat(drawn), torch.cat(decoded) if decode else torch.empty(0)

    def _part(
        self,
        method: Callable[[Tensor], Tensor],
        x: Tensor,
        act: Callable[[str, Tensor], Tensor],
        seed: int,
    ) -> Tensor:
        for key, value in self.survey.caches.items():
            *owners, leaf = key.split(".")
            setattr(functools.reduce(getattr, owners, self.module), leaf, value.clone())
        with seeded(seed, self.device), Convolutions(self.survey.names, act) as mode:
            out = method(x)
        if mode.error is not None:
            raise mode.error
        return out
