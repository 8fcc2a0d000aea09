"""Evidence that a nano model learned music: its codec, its decoder, and what it generates.

Everything is measured on test compositions, which neither the models nor the judge have heard.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from musicscope.core.audio import mel_filterbank, power_spectrogram
from musicscope.core.seeding import seed_for
from musicscope.core.stats import auroc, auroc_of, estimate, mean_of
from musicscope.data.clips import ClipStore
from musicscope.data.taxonomy import FAMILIES, PITCHED_FAMILIES
from musicscope.judges.instrument_classifier import FamilyJudge
from musicscope.judges.musicnn import Musicnn
from musicscope.models.musicgen.model import MusicgenModel

BATCH = 16
SMOOTHING = (1.0, 10.0, 100.0, 1000.0)
PROMPT_FORMS = (
    "{}",
    "a {} melody",
    "{} music",
    "{} and drums",
    "{} leads a mid-tempo tune.",
    "steady mid-tempo music featuring {}",
    "slow, sparse {} music",
    "{} leads a fast tune with bass and drums.",
)


# --- codec ------------------------------------------------------------------------------------


def log_mel_distance(x: np.ndarray, y: np.ndarray, rate: int, floor_db: float = 60.0) -> np.ndarray:
    """RMS difference of 80-band log-mel power in dB, per clip [n].

    Both are floored `floor_db` below the loudest band of the reference `x`, so that silence far
    below what is heard does not count.
    """
    basis = mel_filterbank(rate, 1024, 80)
    out = []
    for reference, other in zip(x, y, strict=True):
        a = (power_spectrogram(reference)[0].T @ basis).astype(np.float64)
        b = (power_spectrogram(other)[0].T @ basis).astype(np.float64)
        floor = a.max() * 10 ** (-floor_db / 10) + 1e-12
        difference = 10 * np.log10(np.maximum(a, floor) / np.maximum(b, floor))
        out.append(np.sqrt(np.mean(difference**2)))
    return np.array(out)


def si_sdr(reference: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Scale-invariant signal-to-distortion ratio, dB per clip (Le Roux et al., 1811.02508)."""
    x, y = reference.astype(np.float64), estimate.astype(np.float64)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    scale = (x * y).sum(-1, keepdims=True) / ((x * x).sum(-1, keepdims=True) + 1e-12)
    signal, noise = (scale * x) ** 2, (y - scale * x) ** 2
    return 10 * np.log10((signal.sum(-1) + 1e-12) / (noise.sum(-1) + 1e-12))


def code_use(codes: np.ndarray, card: int) -> list[dict[str, float]]:
    """Share of codes used and perplexity of each codebook; codes are [clips, K, T]."""
    out = []
    for k in range(codes.shape[1]):
        share = np.bincount(codes[:, k].ravel(), minlength=card) / codes[:, k].size
        seen = share[share > 0]
        out.append(
            {"used": len(seen) / card, "perplexity": float(np.exp(-(seen * np.log(seen)).sum()))}
        )
    return out


def encode_rows(model: MusicgenModel, store: ClipStore, rows: np.ndarray) -> np.ndarray:
    """Codes [rows, K, T] of clips of the store."""
    return np.concatenate(
        [
            model.encode(store.audio([row]), [None]).codes.cpu().numpy()
            for row in tqdm(rows, desc="encoding", unit="clip")
        ]
    )


def evaluate_codec(
    model: MusicgenModel,
    store: ClipStore,
    rows: np.ndarray,
    codes: np.ndarray,
    musicnn: Musicnn,
    bootstrap: int,
    seed: int,
) -> dict[str, object]:
    """Reconstruction metrics over `rows`, whose codes are `codes`."""
    distance, sdr, before, after = [], [], [], []
    guitar_tag = musicnn.tags.index("guitar")
    for row, code in tqdm(zip(rows, codes, strict=True), desc="codec", total=len(rows)):
        audio = store.audio([row])
        decoded = model.decode(torch.from_numpy(code)[None]).cpu().numpy()[:, : audio.shape[1]]
        distance.append(log_mel_distance(audio, decoded, store.sample_rate))
        sdr.append(si_sdr(audio, decoded))
        before.append(musicnn.predict(audio)[0][:, guitar_tag])
        after.append(musicnn.predict(decoded)[0][:, guitar_tag])
    table = store.rows.iloc[rows]
    guitar, groups = (table["target_family"] == "guitar").to_numpy(), table["group"].to_numpy()
    before, after = np.concatenate(before), np.concatenate(after)
    first, second = auroc_of(before, guitar), auroc_of(after, guitar)
    loss = estimate(lambda w: first(w) - second(w), groups, bootstrap, seed, "AUROC")
    metrics: dict[str, object] = {
        "clips": len(rows),
        "log_mel_distance_db": float(np.concatenate(distance).mean()),
        "si_sdr_db": float(np.concatenate(sdr).mean()),
        "musicnn_guitar_auroc_before": auroc(before, guitar),
        "musicnn_guitar_auroc_after": auroc(after, guitar),
        "musicnn_guitar_auroc_loss": loss.as_dict(),
    }
    for k, use in enumerate(code_use(codes, model.card)):
        metrics |= {f"codebook_{k}_{name}": value for name, value in use.items()}
    return metrics


# --- decoder ----------------------------------------------------------------------------------


def unigram_ce(train: np.ndarray, test: np.ndarray, card: int) -> np.ndarray:
    """Cross-entropy (nats) of `test` codes [clips, K, T] under train frequencies, per codebook."""
    out = []
    for k in range(train.shape[1]):
        counts = np.bincount(train[:, k].ravel(), minlength=card) + 1.0
        out.append(-np.log(counts / counts.sum())[test[:, k]].mean())
    return np.array(out)


def previous_frame_ce(
    train: np.ndarray, validation: np.ndarray, test: np.ndarray, card: int
) -> np.ndarray:
    """Cross-entropy per codebook of p(code | the same codebook's code one frame before).

    Counts are smoothed towards the unigram with the strength that suits `validation` best. The
    first frame of each clip is left out.
    """
    out = []
    for k in range(train.shape[1]):
        unigram = np.bincount(train[:, k].ravel(), minlength=card) + 1.0
        unigram /= unigram.sum()
        pairs = train[:, k, :-1].astype(np.int64) * card + train[:, k, 1:]
        counts = np.bincount(pairs.ravel(), minlength=card * card).reshape(card, card)
        totals = counts.sum(1)

        def loss(codes: np.ndarray, strength: float, k=k, c=counts, t=totals, u=unigram) -> float:
            last, now = codes[:, k, :-1].ravel(), codes[:, k, 1:].ravel()
            return float(-np.log((c[last, now] + strength * u[now]) / (t[last] + strength)).mean())

        best = min(SMOOTHING, key=lambda strength: loss(validation, strength))
        out.append(loss(test, best))
    return np.array(out)


@torch.inference_mode()
def caption_ce(
    model: MusicgenModel, codes: np.ndarray, captions: list[str | None], name: str
) -> np.ndarray:
    """Mean cross-entropy of each clip and codebook, [clips, K] nats."""
    out = []
    for i in tqdm(range(0, len(codes), BATCH), desc=name, unit="batch"):
        part = torch.from_numpy(codes[i : i + BATCH].astype(np.int64))
        batch = model.with_captions(part, captions[i : i + BATCH])
        out.append(model.cross_entropy(batch).mean(-1).cpu().numpy())
    return np.concatenate(out)


def evaluate_decoder(
    model: MusicgenModel, store: ClipStore, rows: np.ndarray, codes: np.ndarray,
    train_codes: np.ndarray, validation_codes: np.ndarray, bootstrap: int, seed: int,
) -> tuple[dict[str, object], np.ndarray]:  # fmt: skip
    """Cross-entropy against baselines and wrong captions; also the CE per clip [clips]."""
    table = store.rows.iloc[rows]
    captions, groups = table["caption"].tolist(), table["group"].to_numpy()
    right = caption_ce(model, codes, captions, "right caption")
    none = caption_ce(model, codes, [None] * len(rows), "no caption")
    # A shift by half the clips, ordered by target, gives every clip the caption of another family.
    order = np.argsort(table["target_family"].to_numpy(), kind="stable")
    wrong = [""] * len(rows)
    for a, b in zip(order, np.roll(order, len(order) // 2), strict=True):
        wrong[a] = captions[b]
    shuffled = caption_ce(model, codes, wrong, "wrong caption")
    unigram = unigram_ce(train_codes, codes, model.card)
    previous = previous_frame_ce(train_codes, validation_codes, codes, model.card)
    gain = mean_of((shuffled - right).mean(1))
    metrics: dict[str, object] = {
        "clips": len(rows), "ce": float(right.mean()), "ce_no_caption": float(none.mean()),
        "ce_unigram": float(unigram.mean()), "ce_previous_frame": float(previous.mean()),
        "caption_gain": estimate(gain, groups, bootstrap, seed, "nats per code").as_dict(),
    }  # fmt: skip
    for k in range(codes.shape[1]):
        metrics |= {
            f"ce_{k}": float(right[:, k].mean()), f"ce_{k}_unigram": float(unigram[k]),
            f"ce_{k}_previous_frame": float(previous[k]),
        }  # fmt: skip
    return metrics, right.mean(1)


# --- generation -------------------------------------------------------------------------------


def prompts(per_side: int) -> list[tuple[str, bool]]:
    """(prompt, is guitar): the same phrasings for guitar and, in turn, for every other family."""
    others = [f.replace("_", " ") for f in PITCHED_FAMILIES if f != "guitar"]
    pairs = []
    for i in range(per_side):
        form = PROMPT_FORMS[i % len(PROMPT_FORMS)]
        pairs.append((form.format("guitar"), True))
        pairs.append((form.format(others[i % len(others)]), False))
    return pairs


def generate_all(
    model: MusicgenModel, texts: list[str], seconds: float, seed: int
) -> Iterator[np.ndarray]:
    """Audio [n, samples] of batches of prompts, in order."""
    for i in tqdm(range(0, len(texts), 2 * BATCH), desc="generating", unit="batch"):
        audio, _ = model.generate(
            texts[i : i + 2 * BATCH], seconds, seed_for(seed, "evaluation", model.name, i)
        )
        yield audio.cpu().numpy()


def evaluate_generation(
    model: MusicgenModel,
    judge: FamilyJudge,
    musicnn: Musicnn,
    per_side: int,
    bootstrap: int,
    seed: int,
) -> tuple[dict[str, object], np.ndarray]:
    """Can two judges that never heard generated audio tell guitar prompts from others?"""
    pairs = prompts(per_side)
    audio = np.concatenate(list(generate_all(model, [p for p, _ in pairs], 10.0, seed)))
    wanted = np.array([g for _, g in pairs])
    items = np.arange(len(pairs)) // 2  # a phrasing's guitar and other prompt go together
    scores = {
        "family_judge": judge.predict(audio)[:, FAMILIES.index("guitar")],
        "musicnn": musicnn.predict(audio)[0][:, musicnn.tags.index("guitar")],
    }
    metrics: dict[str, object] = {"per_side": per_side}
    for name, score in scores.items():
        heard = np.isfinite(score)
        found = auroc_of(score[heard], wanted[heard])
        found = estimate(found, items[heard], bootstrap, seed, "AUROC")
        metrics |= {
            f"{name}_guitar_auroc": found.as_dict(), f"{name}_silent": int((~heard).sum()),
        }  # fmt: skip
    return metrics, audio
