"""Sections on clips, downloads and the embedded models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from musicscope.config.schema import Distinct, DistinctOrNone, Section, Text

Share = Annotated[float, Field(gt=0, lt=0.5)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class ClipCounts(Section):
    """Clips to render per split; compositions never cross splits."""

    train: PositiveInt
    """Clips that SAEs and probes learn from."""
    validation: PositiveInt
    """Clips for choosing layers, probe methods and C."""
    test: PositiveInt
    """Clips that only reported numbers are computed on."""


@dataclass(frozen=True)
class RecordingLimits(Section):
    """Most recordings to take per split, drawn by seed; 0 takes all."""

    train: NonNegativeInt
    """Recordings that SAEs and probes learn from."""
    validation: NonNegativeInt
    """Recordings for choosing layers, probe methods and C."""
    test: NonNegativeInt
    """Recordings that only reported numbers are computed on."""


@dataclass(frozen=True)
class Recordings(Section):
    """Data sets of recordings: read by every source except `embedded`."""

    folder: str
    """The data set as downloaded: its metadata, and its audio unless `audio` says otherwise."""
    audio: str
    """Folder, tar or zip with the audio; empty looks in `folder`."""
    audio_suffix: str
    """Ending of the audio files, in place of the metadata's: `.low.mp3` for MTG-Jamendo's small
    files; empty takes the data set's own."""
    sample_rate: Annotated[int, Field(ge=4000, le=192000)]
    """Hz of the clips; must be the rate of the models (MusicGen 32000, YuE 16000)."""
    windows: Annotated[int, Field(ge=1, le=1000)]
    """Clips per recording: the middles of as many equal parts, fewer where they would overlap."""
    min_share: Annotated[float, Field(ge=0.1, le=1)]
    """Shortest recording to take, as a share of `seconds`; the rest is filled with zeros."""
    validation_share: Share
    """Share of the train groups that become validation, where the data set has none."""
    test_share: Share
    """Share of all groups that become test, where the data set has none."""
    limits: RecordingLimits
    min_tags: PositiveInt
    """Instrument tags a track needs before a missing tag counts as absence; else it is unknown."""
    tags: str
    """MTG-Jamendo's tag table to label Song Describer with as well; empty takes the one beside the
    captions, if there."""
    jamendo_split: Annotated[int, Field(ge=0, le=4)]
    """Which of MTG-Jamendo's five splits."""
    song_describer: str
    """Folder of Song Describer's metadata, to keep its tracks and artists out of training on
    MTG-Jamendo. Needed for jamendo_split 1 to 4 (in split 0 they are all in test)."""
    overlap: Literal["refuse", "remove"]
    """What to do with such tracks."""
    stems: Literal["none", "folder", "demucs"]
    """Use the music without vocals: existing stems, or Demucs (installed separately)."""
    stems_folder: str
    """Folder of stems: <recording>.wav, or Demucs' own <stem of the file>/no_vocals.wav."""


@dataclass(frozen=True)
class PrepareData(Section):
    """Clips and their labels."""

    source: Literal["embedded", "musicbench", "song_describer", "mtg_jamendo", "folder"]
    """Where clips come from; `embedded` renders compositions from Python wheels."""
    seconds: Annotated[float, Field(ge=0.5, le=60)]
    """Length of each clip in seconds."""
    clips: ClipCounts
    heldout_font_clips: NonNegativeInt
    """Test clips with the held-out soundfont FluidR3Mono."""
    pairs: NonNegativeInt
    """Matched pairs with TimGM6mb and synthesis: only the instrument of one stem changes."""
    heldout_font_pairs: NonNegativeInt
    """Matched pairs with FluidR3Mono."""
    recordings: Recordings


@dataclass(frozen=True)
class Part(Section):
    """Further files of a model, such as YuE's codec."""

    into: str
    """Folder below the model's, such as xcodec; empty is the model's own."""
    source: Text
    """Hub id (owner/model) or local folder."""
    revision: str
    """Commit or tag of a hub id; empty says that the source is a local folder."""
    files: Distinct[Text]
    """Patterns of the files to take; "*" takes all."""


@dataclass(frozen=True)
class DownloadModel(Section):
    """A model to copy to data/models/<its name here>."""

    source: Text
    """Hub id (owner/model) or local folder; a folder's contents are not watched."""
    revision: str
    """Commit or tag of a hub id; empty says that the source is a local folder."""
    system: Literal["auto", "musicgen", "audiocraft", "rave", "yue"]
    """Model family, where a source holds files of two families; auto detects it."""
    files: Distinct[Text]
    """Patterns of the files to take; "*" takes the files that the family needs from a hub id, and
    all files of a folder."""
    parts: DistinctOrNone[Part]
    """Files from other sources."""


@dataclass(frozen=True)
class PretrainShares(Section):
    """Share of the minutes per phase."""

    codec: Fraction
    """Training of the codec."""
    tokens: Fraction
    """Mixing and encoding of clips, at most; the decoders do not get what is left."""
    nano_small: Fraction
    """Training of nano-small's decoder."""
    nano_medium: Fraction
    """Training of nano-medium's decoder."""


@dataclass(frozen=True)
class PretrainCodec(Section):
    """Settings of the codec's training."""

    adversarial_from: NonNegativeFloat
    """Progress, 0 to 1, from which a discriminator trains along; above 1: never."""
    learning_rate: PositiveFloat
    """Highest learning rate."""
    average_from: Fraction
    """Progress from which weights are averaged."""
    average_decay: Fraction
    """Decay of that average per step."""


@dataclass(frozen=True)
class Pretrain(Section):
    """Training of the embedded models. Frozen: their weights are in Git."""

    minutes: PositiveFloat
    """Wall-clock time of all training, on one core or one GPU."""
    shares: PretrainShares
    codec: PretrainCodec
    scenes: PositiveInt
    """Scenes to render; many clips are mixed from each."""
    clips: PositiveInt
    """Clips to encode for the decoders."""
    codec_batch: PositiveInt
    """Crops of one second per step of the codec."""
    decoder_batch: PositiveInt
    """Clips per step of a decoder."""
    evidence_clips: Annotated[int, Field(ge=32)]
    """Held-out clips that the models are measured on."""
    bootstrap: PositiveInt
    """Bootstrap draws per interval."""
