"""Sections on clips and on the embedded models."""

from __future__ import annotations

import re
from dataclasses import dataclass

from musicscope.config.schema import ParamsError, choice, may_be_empty, number, pattern

ANY = re.compile(r".+")


@dataclass(frozen=True)
class ClipCounts:
    """Clips to render per split; compositions never cross splits."""

    train: int = number(1)
    """Clips that SAEs and probes learn from."""
    validation: int = number(1)
    """Clips for choosing layers, probe methods and C."""
    test: int = number(1)
    """Clips that only reported numbers are computed on."""


@dataclass(frozen=True)
class RecordingLimits:
    """Most recordings to take per split, drawn by seed; 0 takes all."""

    train: int = number(0)
    """Recordings that SAEs and probes learn from."""
    validation: int = number(0)
    """Recordings for choosing layers, probe methods and C."""
    test: int = number(0)
    """Recordings that only reported numbers are computed on."""


@dataclass(frozen=True)
class Recordings:
    """Data sets of recordings: read by every source but `embedded`."""

    folder: str
    """The data set as downloaded: its metadata, and its audio unless `audio` says otherwise."""
    audio: str
    """Folder, tar or zip with the audio; empty looks in `folder`."""
    audio_suffix: str
    """Ending of the audio files, in place of the metadata's: `.low.mp3` for MTG-Jamendo's small
    files; empty takes the data set's own."""
    sample_rate: int = number(4000, 192000)
    """Hz of the clips; must be that of the models (MusicGen 32000, YuE 16000)."""
    windows: int = number(1, 1000)
    """Clips per recording: the middles of so many equal parts, fewer where they would overlap."""
    min_share: float = number(0.1, 1.0)
    """Shortest recording to take, as a share of `seconds`; zeros fill it up."""
    validation_share: float = number(0.0, 0.5, above=True, below=True)
    """Share of the train groups that become validation, where the data set has none."""
    test_share: float = number(0.0, 0.5, above=True, below=True)
    """Share of all groups that become test, where the data set has none."""
    limits: RecordingLimits
    min_tags: int = number(1)
    """Instrument tags a track needs before a missing tag counts as absence; else it is unknown."""
    tags: str
    """MTG-Jamendo's tag table to label Song Describer with as well; empty takes the one beside the
    captions, if there."""
    jamendo_split: int = number(0, 4)
    """Which of MTG-Jamendo's five splits."""
    song_describer: str
    """Folder of Song Describer's metadata, to keep its tracks and artists out of what learns from
    MTG-Jamendo; needed for jamendo_split 1 to 4 (in split 0 they are all in test)."""
    overlap: str = choice("refuse", "remove")
    """What to do with such tracks."""
    stems: str = choice("none", "folder", "demucs")
    """Use the music without its voice: stems made before, or Demucs (to be installed apart)."""
    stems_folder: str
    """Folder of stems: <recording>.wav, or Demucs' own <stem of the file>/no_vocals.wav."""


@dataclass(frozen=True)
class PrepareData:
    """Clips and their labels."""

    source: str = choice("embedded", "musicbench", "song_describer", "mtg_jamendo", "folder")
    """Where clips come from; `embedded` renders the compositions that a wheel ships."""
    seconds: float = number(0.5, 60.0)
    """Length of each clip in seconds."""
    timgm6mb_clips: ClipCounts
    """Clips with the soundfont TimGM6mb, the family that features are found on."""
    fluidr3mono_test_clips: int = number(0)
    """Test clips with the held-out soundfont FluidR3Mono."""
    pairs: int = number(0)
    """Matched pairs with TimGM6mb: the same clip, only the target's program changes."""
    fluidr3mono_pairs: int = number(0)
    """Matched pairs with FluidR3Mono."""
    recordings: Recordings


@dataclass(frozen=True)
class Part:
    """Files from elsewhere that belong into a model's folder, such as YuE's codec."""

    into: str
    """Folder below the model's, such as xcodec; empty is the model's own."""
    source: str = pattern(ANY, "a hub id or a local folder")
    """Hub id (owner/model) or local folder."""
    revision: str
    """Commit or tag of a hub id; empty says that the source is a local folder."""
    files: tuple[str, ...] = pattern(ANY, "a file pattern")
    """Patterns of the files to take; "*" takes all."""


@dataclass(frozen=True)
class DownloadModel:
    """A model to bring to data/models/<its name here>."""

    source: str = pattern(ANY, "a hub id or a local folder")
    """Hub id (owner/model) or local folder; a folder's contents are not watched."""
    revision: str
    """Commit or tag of a hub id; empty says that the source is a local folder."""
    system: str = choice("auto", "musicgen", "audiocraft", "rave", "yue")
    """Family, where a hub page or folder holds files of two; auto asks what is there."""
    files: tuple[str, ...] = pattern(ANY, "a file pattern")
    """Patterns of the files to take; "*" takes what the family needs of a hub page, else all."""
    parts: tuple[Part, ...] = may_be_empty()
    """What comes from elsewhere."""


@dataclass(frozen=True)
class DecoderSize:
    """Size of one nano decoder."""

    width: int = number(8)
    """Dimensions of the residual stream."""
    layers: int = number(1)
    """Decoder layers."""
    heads: int = number(1)
    """Attention heads; must divide the width."""


@dataclass(frozen=True)
class Pretrain:
    """Training of the embedded models. Frozen: their weights are in Git."""

    clips: int = number(1)
    """Training clips to render, half with each soundfont."""
    codec_clips: int = number(1)
    """How many of them the codec learns from."""
    codec_steps: int = number(1)
    """Optimiser steps of the codec."""
    codebooks: int = number(1, 16)
    """Residual codebooks of the codec."""
    text_steps: int = number(1)
    """Optimiser steps of the text encoder."""
    decoder_steps: int = number(1)
    """Optimiser steps of each decoder; both see the same clips in the same order."""
    guidance_scale: float = number(1.0, 20.0)
    """Classifier-free guidance that the models are saved with and generate with by default."""
    nano_small: DecoderSize
    nano_medium: DecoderSize
    judge_clips: int = number(64)
    """Clips that the judge of generated audio learns from, each with its codec reconstruction."""
    generations: int = number(2)
    """Generated clips per side (guitar, other families) in the evaluation."""
    bootstrap: int = number(1)
    """Bootstrap draws for each interval."""

    @property
    def sizes(self) -> dict[str, DecoderSize]:
        """Of the models that it makes."""
        return {"nano-small": self.nano_small, "nano-medium": self.nano_medium}

    def size(self, model: str) -> DecoderSize:
        """Decoder size of `nano-small` or `nano-medium`."""
        if model not in self.sizes:
            raise ParamsError(f"pretrain makes {', '.join(self.sizes)}, not {model}")
        return self.sizes[model]
