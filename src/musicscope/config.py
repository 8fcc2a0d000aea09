"""params.yaml as typed, frozen dataclasses: every key, what it means and what it may hold.

An unknown key, a wrong type or a value out of range is a ``ParamsError`` that names the key, the
value and what is allowed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from musicscope.typed_yaml import ParamsError, choice, load_typed, name, number, pattern

__all__ = ["Params", "ParamsError", "load_params"]

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
PAIR = re.compile(r"\w+-(on|off)(\+\w+-(on|off))+")


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

    def size(self, model: str) -> DecoderSize:
        """Decoder size of `nano-small` or `nano-medium`."""
        sizes = {"nano-small": self.nano_small, "nano-medium": self.nano_medium}
        if model not in sizes:
            raise ParamsError(f"pretrain makes {', '.join(sizes)}, not {model}")
        return sizes[model]


@dataclass(frozen=True)
class Ablate:
    """Which layers matter to the next-token distribution."""

    split: str = choice("train", "validation", "test")
    """Split that the clips are drawn from; validation, so that test data choose no layer."""
    clips: int = number(1)
    """Clips that every ablation is scored on."""
    kinds: tuple[str, ...] = choice("skip", "zero", "mean")
    """Ablations to run: skip drops the layer's update, mean puts the mean update in its place, zero
    cuts the whole stream behind the layer."""
    bootstrap: int = number(1)
    """Bootstrap draws over compositions for each interval."""


@dataclass(frozen=True)
class SelectLayers:
    """The rule that fills the slots."""

    kind: str = choice("skip", "zero", "mean")
    """Ablation whose scores rank the layers; one of `ablate.kinds`."""
    score: str = choice("dce", "kl")
    """Score that ranks: rise in cross-entropy (dce) or KL divergence at the logits."""
    skip_first: bool
    """Leave the first layer out: it mostly embeds, so ablating it always hurts."""
    skip_last: bool
    """Leave the last layer out: its output goes straight to the heads, no layer acts on an edit."""


@dataclass(frozen=True)
class ExtractActivations:
    """The activation store."""

    captions: bool
    """Give the model each clip's caption. False runs it unconditionally: captions name instruments,
    and a probe on captioned activations could read the label from the text instead of the music."""
    dtype: str = choice("float16", "bfloat16")
    """Number format on disk."""
    shard_mb: int = number(1, 1024)
    """Largest shard in MB; tens of MB suit DVC best."""
    batch_clips: int = number(1)
    """Clips per forward pass."""


@dataclass(frozen=True)
class TrainSae:
    """The sparse autoencoders."""

    k: int = number(1, 65536)
    """Active latents per frame (on average for batchtopk)."""
    expansion: int = number(1, 1024)
    """Latents per dimension of the activation."""
    activation: str = choice("topk", "batchtopk")
    """Sparsity rule: k per frame, or k per frame on average over the batch."""
    batch_size: int = number(1)
    """Frames per step."""
    samples: int = number(1)
    """Frames seen in training, over as many passes as that takes."""
    learning_rate: float = number(0.0, 1.0, above=True)
    """Adam's step size at its peak."""
    warmup_fraction: float = number(0.0, 1.0, below=True)
    """Share of the steps in which the learning rate rises from 0."""
    decay_fraction: float = number(0.0, 1.0)
    """Share of the steps, at the end, in which it falls to 0."""
    aux_k_fraction: float = number(0.0, 1.0, above=True)
    """Dead latents used by AuxK, as a share of the activation's width."""
    aux_weight: float = number(0.0)
    """Weight of the AuxK loss (1/32 in Gao et al. 2024)."""
    dead_after_samples: int = number(1)
    """Frames without firing after which a latent counts as dead."""
    seeds: int = number(1, 64)
    """SAEs per model and slot; seed 0 is used downstream, the others measure stability."""
    ce_clips: int = number(1)
    """Held-out clips for the recovered cross-entropy."""

    def latents(self, width: int) -> int:
        """Number of latents over activations of `width` dimensions; ParamsError if below k."""
        total = self.expansion * width
        if self.k > total:
            raise ParamsError(
                f"train_sae.k = {self.k} is out of range: allowed is at most {total}, the latents "
                f"that train_sae.expansion = {self.expansion} gives over width {width}"
            )
        return total


@dataclass(frozen=True)
class Probe:
    """Concept classifiers in SAE space and against every baseline."""

    k_sparse: tuple[int, ...] = number(1)
    """Sizes of the k-sparse probes, rising."""
    c_grid: tuple[float, ...] = number(0.0, above=True)
    """Inverse regularisation strengths to choose from on validation."""
    min_positive: int = number(1)
    """Fewest positive and negative clips per split for a concept to be probed."""
    null_seeds: int = number(1)
    """Shuffles of the training labels that the null is averaged over."""
    bootstrap: int = number(1)
    """Bootstrap draws over compositions for each interval."""


@dataclass(frozen=True)
class MaximizeActivation:
    """Activation maximisation of chosen features; of maximize_shared as well."""

    seconds: float = number(0.1, 30.0)
    """Length of searched pieces and of excerpts of real clips."""
    window_seconds: float = number(0.0, 30.0)
    """The activation is averaged over so long (at least one frame), at its best place."""
    universal: int = number(1)
    """USAE features that fire for all models alike."""
    specific: int = number(0)
    """USAE features that fire for this model alone."""
    concepts: int = number(0)
    """Concepts, each with its best SAE feature."""
    directions: int = number(0)
    """Random directions, the null."""
    shared: int = number(1)
    """The same as `universal` in maximize_shared, which searches all models at once."""
    examples: int = number(1)
    """Best real moments of each split."""
    naturalness: float = number(0.0)
    """Weight of the model's own log-probability per code, in best-clip activations per nat."""
    steps: int = number(1)
    """Steps of each search."""
    proposals: int = number(1)
    """Candidates a step, whose activation is computed."""
    kept: int = number(1)
    """Candidates a step, of these, that are also scored by the prior, or heard and encoded."""
    samples: int = number(1)
    """Unoptimised samples of each model: a control, and where searches start."""
    random_clips: int = number(1)
    """Random real excerpts, a control."""
    bootstrap: int = number(1)
    """Bootstrap draws over features for each interval."""


@dataclass(frozen=True)
class MatchFeatures:
    """Which features the models share, and the table of features."""

    slot: str = name()
    """The slot whose SAEs are compared; that of train_usae."""
    threshold: float = number(0.0, 1.0, above=True, below=True)
    """A pair above it is a match: correlation between models, cosine to the universal SAE. Fixed
    beforehand at the .5 of the USAE paper, not chosen on data."""
    null_draws: int = number(1)
    """Re-pairings of clips, and random dictionaries, that each null is averaged over."""
    permutations: int = number(1)
    """Permutations of the concept labels; the smallest p is 1 / (permutations + 1)."""
    bootstrap: int = number(1)
    """Bootstrap draws over compositions for each interval."""
    min_clips: int = number(1)
    """Fewest clips with and without a concept, in validation and in test, to test for it."""
    top_clips: int = number(1)
    """Best clips listed for each feature."""


@dataclass(frozen=True)
class Report:
    """The report page."""

    cards: int = number(1, 100)
    """Most feature cards of each set: shared, of one model, best for a concept, common, own."""
    moments: int = number(1, 20)
    """Top moments on each card."""
    seconds: float = number(0.5, 10.0)
    """Length of each excerpt; with cards and moments it decides the page's size, at most 15 MB."""


@dataclass(frozen=True)
class TrainCrosscoder:
    """The crosscoders: one code computed from all models together."""

    slot: str = name()
    """Layer taken from every model; one of `slots`."""
    k: int = number(1, 65536)
    """Active latents per frame."""
    expansion: int = number(1, 1024)
    """Latents per dimension of the widest model's activation."""
    batch_size: int = number(1)
    """Frames per step, each in every model."""
    samples: int = number(1)
    """Frames seen in training, over as many passes as that takes."""
    learning_rate: float = number(0.0, 1.0, above=True)
    """Adam's step size at its peak; the schedule counts global steps."""
    warmup_fraction: float = number(0.0, 1.0, below=True)
    """Share of the steps in which the learning rate rises from 0."""
    decay_fraction: float = number(0.0, 1.0)
    """Share of the steps, at the end, in which it falls to 0."""
    aux_k_fraction: float = number(0.0, 1.0, above=True)
    """Dead latents used by AuxK, as a share of the models' mean width."""
    aux_weight: float = number(0.0)
    """Weight of the AuxK loss."""
    dead_after_samples: int = number(1)
    """Frames without firing after which a latent counts as dead."""
    seeds: int = number(1, 64)
    """Dictionaries; seed 0 is used downstream, the others give the spread."""
    null_seeds: int = number(1, 64)
    """Dictionaries trained on mispaired clips, the null."""
    fire_threshold: float = number(0.0)
    """A latent fires where its value exceeds this, in normalised units (0.1 in the USAE's code)."""
    bootstrap: int = number(1)
    """Bootstrap draws over compositions for each interval."""


@dataclass(frozen=True)
class TrainUsae(TrainCrosscoder):
    """The universal SAEs: one code for all models, computed from any one of them."""

    rule: str = choice("paper", "all_decoders")
    """Who learns from a step: encoder and decoder of the model drawn, or all decoders."""


@dataclass(frozen=True)
class Steer:
    """Concepts switched off and on in generated music. Lists are searched over, on validation
    prompts. The committed numbers take n_prompts 128 and validation_prompts 32 (hours); what
    stands in params.yaml is what `dvc repro` can do in minutes."""

    slot: str = name()
    """The slot whose layer and SAE are edited; one of `slots`."""
    concepts: tuple[str, ...] = name()
    """Instrument families, each to be switched off and on."""
    pairs: tuple[str, ...] = pattern(PAIR, "<concept>-off+<concept>-on and the like")
    """Edits of several concepts at once, such as guitar-off+organ-on."""
    scores: tuple[str, ...] = choice("share", "effect", "partial", "auroc")
    """How train clips rank latents; see musicscope.steering.steering_learning."""
    target: str = choice("active", "mean")
    """What latents are raised to: their mean where they fire, or over all frames."""
    both_sides: bool
    """Also edit as many latents that speak against the concept, the other way round."""
    strengths: tuple[float, ...] = number(0.0, 1000.0, above=True)
    """Strengths of latents' edits: 1 reaches the target, above 1 goes past it."""
    n_features: tuple[int, ...] = number(1, 65536)
    """Numbers of latents."""
    branches: tuple[str, ...] = choice("conditional", "both", "guidance")
    """Rows of guided generation that are edited; see musicscope.steering.editing.Steering."""
    loops: tuple[str, ...] = choice("open", "closed")
    """closed: edit only while a probe on the latents hears something to change."""
    direction_strengths: tuple[float, ...] = number(0.0, 1000.0, above=True)
    """Strengths of the difference of means and of the probe direction, in lengths of the former."""
    gate_features: int = number(1, 4096)
    """Latents that the closed loop's probe listens to."""
    gate_seconds: float = number(0.0, 60.0, above=True)
    """Time constant of what it hears."""
    seconds: float = number(0.1, 30.0)
    """Length of each piece; musicnn hears 3 s at a time."""
    validation_prompts: int = number(2)
    """Prompts of each concept and direction to choose settings on."""
    n_prompts: int = number(2)
    """Prompts of each concept and direction, and of each pair, that numbers are reported on."""
    batch: int = number(1)
    """Prompts generated together."""
    guidance: float = number(1.0, 20.0, above=True)
    """Scale of classifier-free guidance."""
    quality_budget: float = number(0.0)
    """Most that the unsteered model's cross-entropy may change by, nats a code, in the choice."""
    examples: int = number(0)
    """Pieces of each concept, direction and pair whose audio is kept."""
    bootstrap: int = number(1)
    """Bootstrap draws over prompts for each interval."""


@dataclass(frozen=True)
class TrainJudge:
    """The judges of generated audio."""

    codec: str = name()
    """Model in data/models through whose codec the judge learns to hear."""
    clips: int = number(1)
    """Rendered train clips with each of the two soundfonts."""
    codec_clips: int = number(1)
    """How many of each also come as codec reconstructions."""
    epochs: int = number(1)
    """Passes over all of them."""
    cross_font_epochs: int = number(1)
    """Passes of the two controls that hear one soundfont, and are tested on the other."""
    test_clips: int = number(1)
    """Test clips with each soundfont."""
    codec_test_clips: int = number(1)
    """How many of each are also judged behind the codec."""
    pairs: int = number(0)
    """Matched pairs, guitar against another instrument."""
    bootstrap: int = number(1)
    """Bootstrap draws over compositions for each interval."""


@dataclass(frozen=True)
class Concept:
    """A concept to find: recordings that have it and recordings that lack it."""

    name: str = name()
    """What to call it."""
    positive: str
    """A folder of recordings, or clips of data/clips: `clips:has_guitar`; several terms are joined
    with `and`, such as `clips:has_guitar and not has_drums and kind=pair`. Terms on split, kind and
    font are train, clip and not the held-out font unless given."""
    negative: str
    """The same, without the concept."""


@dataclass(frozen=True)
class FindConcept:
    """Features that tell recordings with a concept from recordings without it."""

    slot: str = name()
    """The slot whose SAE is searched; one of `slots`."""
    universal: bool
    """Search the universal SAE too; its slot must be the same."""
    concepts: tuple[Concept, ...]
    """What to find. DVC watches data/clips only: name other folders under the stage's deps."""
    q: float = number(0.0, 0.5, above=True)
    """A feature counts as found where its p, corrected for all features, is at most this."""
    permutations: int = number(19)
    """Dealings of the labels; the smallest p is 1 / (permutations + 1)."""
    stability_draws: int = number(1)
    """Bootstrap draws of recordings that the stability of the ranking is measured on."""
    seconds: float = number(1.0, 120.0)
    """Length of the windows of a recording that the model hears, shorter if recordings are."""
    windows: int = number(1, 1000)
    """Most windows a recording."""
    few: int = number(4)
    """Recordings a side in the draws that show what so few suffice for."""
    few_draws: int = number(1)
    """Number of these draws, and of those without any concept."""
    features: int = number(0)
    """Best features of each concept whose top moments are kept as audio."""
    moments: int = number(1)
    """Top moments of each."""
    bootstrap: int = number(1)
    """Bootstrap draws over compositions for the intervals on test clips."""


@dataclass(frozen=True)
class Compute:
    """How to run, never what: no stage lists this section, so changing it reruns nothing."""

    device: str = pattern(DEVICE, "auto, cpu, cuda or cuda:<index>")
    """Where models run; auto takes CUDA where there is one."""
    threads: int = number(1, 1024)
    """Torch threads per stage."""
    processes: int = number(1, 1024)
    """Processes for work that splits by clip or by seed; with torchrun, ranks on this machine."""
    engine: str = choice("processes", "torchrun", "ray")
    """What spreads the work: processes of this machine, torchrun (one stage as several ranks, a GPU
    each), or a Ray cluster (needs the extra `ray`)."""


@dataclass(frozen=True)
class Params:
    """The whole of params.yaml; each stage has the section of its name."""

    seed: int = number(0, 2**62)
    """The one seed; every generator derives its own from it by name."""
    models: tuple[str, ...] = name()
    """Folders in data/models to study."""
    slots: tuple[str, ...] = name()
    """Layers to study in each model, by rank in the ablation."""
    prepare_data: PrepareData
    pretrain: Pretrain
    ablate: Ablate
    select_layers: SelectLayers
    extract_activations: ExtractActivations
    train_sae: TrainSae
    probe: Probe
    maximize_activation: MaximizeActivation
    match_features: MatchFeatures
    report: Report
    train_usae: TrainUsae
    train_crosscoder: TrainCrosscoder
    steer: Steer
    train_judge: TrainJudge
    find_concept: FindConcept
    compute: Compute


def _check_together(params: Params, path: str) -> None:
    """What no single field shows."""
    sae, probe = params.train_sae, params.probe
    if params.select_layers.kind not in params.ablate.kinds:
        raise ParamsError(
            f"{path}: select_layers.kind = {params.select_layers.kind!r} is not among "
            f"ablate.kinds = {list(params.ablate.kinds)}; add it there or rank by another"
        )
    if sae.samples < sae.batch_size:
        raise ParamsError(
            f"{path}: train_sae.samples = {sae.samples} gives no step: allowed is at least "
            f"train_sae.batch_size = {sae.batch_size}"
        )
    if sae.warmup_fraction + sae.decay_fraction > 1:
        raise ParamsError(
            f"{path}: train_sae.decay_fraction = {sae.decay_fraction} is out of range: allowed is "
            f"at most 1 - train_sae.warmup_fraction = {1 - sae.warmup_fraction:g}"
        )
    if params.match_features.slot not in params.slots:
        raise ParamsError(
            f"{path}: match_features.slot = {params.match_features.slot!r} is not among slots = "
            f"{list(params.slots)}"
        )
    for section in ("train_usae", "train_crosscoder"):
        ours = getattr(params, section)
        if ours.slot not in params.slots:
            raise ParamsError(
                f"{path}: {section}.slot = {ours.slot!r} is not among slots = {list(params.slots)}"
            )
        if ours.samples < ours.batch_size:
            raise ParamsError(
                f"{path}: {section}.samples = {ours.samples} gives no step: allowed is at least "
                f"{section}.batch_size = {ours.batch_size}"
            )
        if ours.warmup_fraction + ours.decay_fraction > 1:
            raise ParamsError(
                f"{path}: {section}.decay_fraction = {ours.decay_fraction} is out of range: "
                f"allowed is at most 1 - {section}.warmup_fraction = {1 - ours.warmup_fraction:g}"
            )
    if params.steer.slot not in params.slots:
        raise ParamsError(
            f"{path}: steer.slot = {params.steer.slot!r} is not among slots = {list(params.slots)}"
        )
    find = params.find_concept
    if find.slot not in params.slots or (find.universal and find.slot != params.train_usae.slot):
        raise ParamsError(
            f"{path}: find_concept.slot = {find.slot!r}: allowed is one of slots = "
            f"{list(params.slots)}, with find_concept.universal that of train_usae.slot = "
            f"{params.train_usae.slot!r}"
        )
    if len({concept.name for concept in find.concepts}) < len(find.concepts):
        raise ParamsError(f"{path}: find_concept.concepts has a name twice")
    for pair in params.steer.pairs:
        named = [part.rsplit("-", 1)[0] for part in pair.split("+")]
        if len(set(named)) < len(named) or not set(named) <= set(params.steer.concepts):
            raise ParamsError(
                f"{path}: steer.pairs has {pair!r}: allowed are different concepts out of "
                f"steer.concepts = {list(params.steer.concepts)}"
            )
    if (seconds := params.maximize_activation.seconds) > params.prepare_data.seconds:
        raise ParamsError(
            f"{path}: maximize_activation.seconds = {seconds} is out of range: allowed is at most "
            f"prepare_data.seconds = {params.prepare_data.seconds}, the length of a clip"
        )
    if list(probe.k_sparse) != sorted(probe.k_sparse):
        raise ParamsError(f"{path}: probe.k_sparse = {list(probe.k_sparse)} must rise")


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check params.yaml; ParamsError names the key (``train_sae.k``) that is wrong."""
    params = load_typed(path, Params)
    _check_together(params, str(path))
    return params
