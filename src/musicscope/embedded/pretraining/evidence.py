"""Test whether an embedded MusicGen plays music: a table of numbers with controls and targets.

Every function takes arrays and a loaded model. Audio is mono float32 [clips, samples] at 16 kHz,
codes are [clips, K, T]. Intervals are 95 % and resample compositions. A verdict is true only if
the whole interval meets the target.

Cost for 64 held-out, 64 training and 32 validation clips of 10 s and 140 generated clips with
nano-small (8 codebooks, 6 layers): 12 minutes of one core shared with others, half of it for the
curve over codebooks. `seconds` in the table says where.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from musicscope.ablation import language
from musicscope.ablation.scores import ablation_table, join
from musicscope.core.progress import Bar
from musicscope.core.seeding import seed_for
from musicscope.core.stats import percentile_interval, resample_weights
from musicscope.embedded.pretraining import generated_evidence as generated
from musicscope.embedded.pretraining import music_statistics as music
from musicscope.embedded.pretraining.codec_quality import log_mel_distance, si_sdr
from musicscope.embedded.pretraining.count_models import (
    COARSER,
    PREVIOUS,
    TRIGRAM,
    UNIGRAM,
    count_cross_entropy,
)
from musicscope.embedded.pretraining.evidence_rows import (
    TARGETS,
    Bootstrap,
    Direction,
    Row,
    Table,
    perplexity_row,
)
from musicscope.judges.musicnn import Musicnn
from musicscope.models.musicgen.model import MusicgenModel

GENERATION_BATCH = 16
ABLATION_BATCH = 4
CROSS_ENTROPY_BATCH = 16


# --- clips ---


@dataclass(frozen=True)
class Clips:
    """Clips with what is known of them."""

    audio: np.ndarray
    """[n, samples] float32."""
    groups: np.ndarray
    """[n] composition of each clip."""
    captions: list[str]
    targets: np.ndarray
    """[n] the prominent family of each clip."""
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    """Further families, such as "vocals": whether each clip holds them, bool [n]."""

    def __post_init__(self) -> None:
        parts = (self.audio, self.groups, self.captions, self.targets, *self.labels.values())
        if len(sizes := {len(part) for part in parts}) != 1:
            raise ValueError(
                f"audio, groups, captions, targets and labels differ in length: {sizes}"
            )

    @property
    def truth(self) -> dict[str, np.ndarray]:
        """Family -> bool [n]: `labels`, and for every other family whether it is the target."""
        families = np.unique(self.targets).tolist()
        return {family: self.targets == family for family in families} | self.labels


def generate_clips(
    model: MusicgenModel, captions: Sequence[str], seconds: float, seed: int, guidance: float = 3.0
) -> np.ndarray:
    """Generated audio float32 [n, samples], one clip per caption."""
    parts = [
        model.generate(
            list(captions[i : i + GENERATION_BATCH]), seconds, seed_for(seed, "evidence", i),
            guidance_scale=guidance,
        )[0].cpu().numpy()
        for i in range(0, len(captions), GENERATION_BATCH)
    ]  # fmt: skip
    return np.concatenate(parts)


# --- codec ------------------------------------------------------------------------------------


@torch.inference_mode()
def reconstruct(
    model: MusicgenModel, codes: np.ndarray, samples: int, books: int | None = None
) -> np.ndarray:
    """Audio [clips, samples] from the first `books` codebooks of codes [clips, K, T]."""
    used = torch.from_numpy(codes[:, :books].astype(np.int64))
    return model.decode(used).cpu().numpy()[:, :samples]


def codec_rows(
    model: MusicgenModel, clips: Clips, codes: np.ndarray, decoded: np.ndarray, boot: Bootstrap
) -> list[Row]:
    """Reconstruction error, use of every codebook, and both errors with fewer codebooks.

    `codes` [n, K, T] and `decoded` [n, samples] are of `clips`. Control: clips against the
    reconstruction of another clip.
    """
    audio, groups, rate = clips.audio, clips.groups, model.sample_rate
    other = np.roll(decoded, 1, axis=0)
    measures: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Direction]] = {
        "log_mel_distance": (lambda y: log_mel_distance(audio, y, rate), "at_most"),
        "si_sdr": (lambda y: si_sdr(audio, y), "at_least"),
    }
    books = codes.shape[1]
    rows = [
        boot.row(
            f"codec.{name}", measure(decoded), groups, "dB", target=TARGETS[name],
            direction=direction, control={"another_clip": float(measure(other).mean())},
        )
        for name, (measure, direction) in measures.items()
    ]  # fmt: skip
    rows += [
        perplexity_row(
            f"codec.codebook_{k}.perplexity", codes[:, k], groups, model.card,
            target=TARGETS["perplexity_share"], direction="at_least", control={"uniform": 1.0},
        )
        for k in range(books)
    ]  # fmt: skip
    for used in range(1, books + 1):
        partial = decoded if used == books else reconstruct(model, codes, audio.shape[1], used)
        rows += [
            boot.row(f"codec.first_{used}_codebooks.{name}", measure(partial), groups, "dB")
            for name, (measure, _) in measures.items()
        ]
    return rows


# --- decoder ----------------------------------------------------------------------------------


@torch.inference_mode()
def caption_ce(
    model: MusicgenModel, codes: np.ndarray, captions: list[str | None], name: str
) -> np.ndarray:
    """Mean cross-entropy of each clip and codebook, [clips, K] nats."""
    out = []
    for i in Bar(range(0, len(codes), CROSS_ENTROPY_BATCH), desc=name, unit="batches"):
        part = torch.from_numpy(codes[i : i + CROSS_ENTROPY_BATCH].astype(np.int64))
        batch = model.with_captions(part, captions[i : i + CROSS_ENTROPY_BATCH])
        out.append(model.cross_entropy(batch).mean(-1).cpu().numpy())
    return np.concatenate(out)


def wrong_captions(
    captions: Sequence[str], targets: np.ndarray, groups: np.ndarray, rng: np.random.Generator
) -> list[str]:
    """For each clip the caption of a random clip of another family and another composition."""
    chosen = []
    for target, group in zip(targets, groups, strict=True):
        others = np.flatnonzero((targets != target) & (groups != group))
        if not len(others):
            raise ValueError(f"no clip of another family than {target} and of another composition")
        chosen.append(captions[int(rng.choice(others))])
    return chosen


@dataclass(frozen=True)
class Coded:
    """Codes of clips and what is known of them."""

    codes: np.ndarray
    """[n, K, T]."""
    captions: list[str]
    groups: np.ndarray
    targets: np.ndarray


def decoder_rows(
    model: MusicgenModel, held_out: Coded, train: Coded, validation_codes: np.ndarray,
    count_codes: np.ndarray, boot: Bootstrap,
) -> list[Row]:  # fmt: skip
    """Cross-entropy in nats per code, against count models, captions and training clips.

    Count models learn from `count_codes` (training clips, the more the better) and take their
    strengths from `validation_codes`. `train` gives the generalisation gap.
    """
    groups, rng = held_out.groups, np.random.default_rng(seed_for(boot.seed, "wrong captions"))

    def entropy(coded: Coded, captions: list[str | None], name: str) -> np.ndarray:
        return caption_ce(model, coded.codes, captions, name)

    right = entropy(held_out, held_out.captions, "right caption")
    none = entropy(held_out, [None] * len(groups), "no caption")
    wrong = [
        entropy(
            held_out,
            wrong_captions(held_out.captions, held_out.targets, groups, rng),
            f"wrong caption {i}",
        )
        for i in range(2)
    ]
    counts = {
        name: count_cross_entropy(count_codes, validation_codes, held_out.codes, model.card, chains)
        for name, chains in {
            "unigram": (UNIGRAM,), "previous_frame": (PREVIOUS,),
            "trigram_and_coarser": (TRIGRAM, COARSER),
        }.items()
    }  # fmt: skip
    best = counts["trigram_and_coarser"]
    rows = [
        boot.row(
            "decoder.cross_entropy", right.mean(1), groups, "nats per code",
            control={name: float(v.mean()) for name, v in counts.items()}
            | {"uniform": float(np.log(model.card))},
        )
    ]  # fmt: skip
    for k in range(right.shape[1]):
        rows.append(
            boot.row(
                f"decoder.codebook_{k}.cross_entropy", right[:, k], groups, "nats per code",
                control={name: float(v[:, k].mean()) for name, v in counts.items()},
            )
        )  # fmt: skip
        rows.append(
            boot.row(
                f"decoder.codebook_{k}.gain_over_counts", best[:, k] - right[:, k], groups,
                "nats per code", target=0.0, direction="at_least",
            )
        )  # fmt: skip
    gain, null = wrong[0] - right, wrong[0] - wrong[1]
    rows += [
        boot.row(
            "decoder.gain_over_counts", (best - right).mean(1), groups, "nats per code",
            target=0.0, direction="at_least",
        ),
        boot.row(
            "decoder.caption_gain", gain.mean(1), groups, "nats per code",
            target=TARGETS["caption_gain"], direction="at_least",
            control={"wrong_against_wrong": float(null.mean())},
            note="wrong caption less right caption",
        ),
        boot.row(
            "decoder.caption_gain_over_none", (none - right).mean(1), groups, "nats per code",
            control={"wrong_against_none": float((none - wrong[0]).mean())},
        ),
    ]  # fmt: skip
    seen = entropy(train, train.captions, "training clips").mean(1)
    unseen = right.mean(1)
    draws = [
        (w @ values) / w.sum(1)
        for values, w in (
            (unseen, resample_weights(groups, boot.n, seed_for(boot.seed, "held out"))),
            (seen, resample_weights(train.groups, boot.n, seed_for(boot.seed, "train"))),
        )
    ]
    rows.append(
        Row(
            "decoder.generalisation_gap", float(unseen.mean() - seen.mean()),
            *percentile_interval(draws[0] - draws[1]), len(groups), "nats per code",
            control={"train": float(seen.mean()), "held_out": float(unseen.mean())},
        )
    )  # fmt: skip
    return rows


def layer_rows(model: MusicgenModel, train: Coded, held_out: Coded, boot: Bootstrap) -> list[Row]:
    """KL of the model from itself with one layer's update replaced by its mean over `train`.

    The target holds for inner layers, all but the first and the last. Control: the update dropped
    rather than replaced.
    """

    def batches(coded: Coded) -> Iterator:
        for i in range(0, len(coded.codes), ABLATION_BATCH):
            part = slice(i, i + ABLATION_BATCH)
            codes = torch.from_numpy(coded.codes[part].astype(np.int64))
            yield model.with_captions(codes, coded.captions[part])

    sums = [language.sums(model, batch) for batch in batches(train)]
    means = sum(sums[1:], sums[0]).means
    kinds = ("mean", "skip")
    scores = join([language.ablate(model, batch, kinds, means) for batch in batches(held_out)])
    table = ablation_table(scores, held_out.groups, boot.n, boot.seed).set_index(["kind", "layer"])
    rows = []
    for layer in range(model.num_layers):
        found = table.loc[("mean", layer)]
        inner = 0 < layer < model.num_layers - 1
        rows.append(
            Row(
                f"layers.{layer}.mean_ablation_kl", float(found["kl"]), float(found["kl_low"]),
                float(found["kl_high"]), len(held_out.codes), "nats per code",
                target=TARGETS["layer_kl"] if inner else None,
                direction="at_least" if inner else None,
                control={"skip": float(table.loc[("skip", layer), "kl"])},
            )
        )  # fmt: skip
    return rows


# --- the table --------------------------------------------------------------------------------


def evidence_table(
    model: MusicgenModel, held_out: Clips, train: Clips, validation: Clips, musicnn: Musicnn,
    judges: Mapping[str, generated.FamilyScorer], prompts: Mapping[str, int], boot: Bootstrap,
    count_codes: np.ndarray | None = None, seconds: float = 10.0, guidance: float = 3.0,
) -> Table:  # fmt: skip
    """Measure everything. `prompts` is the number of prompts per family.

    `count_codes` [n, K, T] of training clips, for the count models; those of `train` by default.
    Generated clips take the captions of held-out clips, and the prompts in a second set.

    Raises:
        ValueError: a model of another rate than 16 kHz, or held-out compositions among `train` or
            `validation`.
    """
    if model.sample_rate != music.SAMPLE_RATE:
        raise ValueError(f"{model.name} plays at {model.sample_rate} Hz; the judges need 16,000")
    for name, other in {"train": train, "validation": validation}.items():
        if shared := set(held_out.groups) & set(other.groups):
            raise ValueError(f"held-out compositions are in {name}: {sorted(shared)[:3]}")
    spent: dict[str, float] = {}

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

    def encode(clips: Clips) -> Coded:
        codes = model.encode(clips.audio, [None] * len(clips.audio)).codes.cpu().numpy()
        return Coded(codes, clips.captions, clips.groups, clips.targets)

    groups, samples, seed = held_out.groups, held_out.audio.shape[1], boot.seed
    rows: list[Row] = []
    with clock("encode"):
        coded, trained, validated = (encode(c) for c in (held_out, train, validation))
    with clock("codec"):
        decoded = reconstruct(model, coded.codes, samples)
        rows += codec_rows(model, held_out, coded.codes, decoded, boot)
    with clock("decoder"):
        counted = trained.codes if count_codes is None else count_codes
        rows += decoder_rows(model, coded, trained, validated.codes, counted, boot)
    with clock("layers"):
        rows += layer_rows(model, trained, coded, boot)
    with clock("generate"):
        made = generate_clips(model, held_out.captions, seconds, seed, guidance)
        texts, families = generated.family_prompts(prompts)
        prompted = generate_clips(model, texts, seconds, seed_for(seed, "prompts"), guidance)
    rng = np.random.default_rng(seed_for(seed, "controls"))
    real = held_out.audio
    sets = {
        "codec": decoded,
        "generated": made,
        "noise": music.white_noise(real, rng),
        "shuffled": music.shuffle_frames(real, rng),
    }
    with clock("judges"):
        judged = {k: generated.judge(x, musicnn, judges) for k, x in sets.items()}
        original, embedding = generated.judge(real, musicnn, judges)
        scores, _ = generated.judge(prompted, musicnn, judges)
        truth = held_out.truth
        rows += generated.judge_loss_rows(truth, groups, original, judged["codec"][0], boot)
        rows += generated.prompt_rows(scores, families, original, truth, boot)
    with clock("distances"):
        others = {k: found for k, (_, found) in judged.items()}
        rows += generated.distance_rows("musicnn", embedding, groups, others, boot)
        others = {k: music.scattering_embedding(x) for k, x in sets.items()}
        embedding = music.scattering_embedding(real)
        rows += generated.distance_rows("scattering", embedding, groups, others, boot)
    with clock("classifier"):
        features = [music.modulation_statistics(x) for x in (real, decoded, made)]
        rows += generated.classifier_rows(*features, groups, boot)
    with clock("music"):
        found = {k: music.music_measures(x) for k, x in sets.items()}
        of_made = found.pop("generated")
        rows += generated.music_rows(music.music_measures(real), of_made, found, groups, boot)
    return Table(rows, spent)
