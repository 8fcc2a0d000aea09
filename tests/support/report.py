"""Small inputs of the report, and ways to look at its sections and its page."""

from __future__ import annotations

import base64
import html.parser
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch

from musicscope.config.analysis import FeatureActivity, MatchFeatures
from musicscope.data.clips import write_clips
from musicscope.data.taxonomy import FAMILIES
from musicscope.dictionaries.codes import Codes, pool_clips, to_csr
from musicscope.dictionaries.core import ModelWeights, TopKSAE, UniversalSAE
from musicscope.features import activity, moments
from musicscope.features import table as feature_table
from musicscope.report.build import page
from musicscope.report.elements import Section, Table
from musicscope.report.metrics import Sources

HOSTILE = "</script><img src=x onerror='boom()'>\"&"
MODELS = ("tiny", "wide")
WIDTHS = {"tiny": 6, "wide": 8}
RATE, SECONDS, FRAMES, CLIPS, LATENTS = 16_000, 2, 100, 8, 24
RATE_OF_FRAMES = FRAMES / SECONDS
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
"""A PNG of one pixel."""


def estimate(value: float, low: float | None = None, high: float | None = None) -> dict:
    """A number with its interval as in a metrics file; None where unknown."""
    return {"value": value, "low": low, "high": high, "n": 9, "unit": "share"}


def tone(pitch: float, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * pitch * time)).astype(np.float32)


def decoded(uri: str) -> np.ndarray:
    kind, content = uri.split(",", 1)
    assert kind == "data:audio/mpeg;base64"
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(content)), dtype="float32")
    assert rate == RATE
    return audio


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    n = min(len(a), len(b))
    return float(a[:n] @ b[:n] / (np.linalg.norm(a[:n]) * np.linalg.norm(b[:n])))


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def write_metrics(root: Path, name: str, value: dict) -> None:
    path = root / "metrics" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def inside(content: object, kind: type = object) -> Iterator:
    """All parts of a section's content that are of a kind, in order."""
    if isinstance(content, kind):
        yield content
    if isinstance(content, Mapping):
        content = content.values()
    elif isinstance(content, str) or not isinstance(content, Iterable):
        return
    for part in content:
        yield from inside(part, kind)


def tables(section: Section) -> dict[str, Table]:
    return {table.caption: table for table in inside(section.content, Table)}


def cells(table: Table) -> dict[str, list[str]]:
    return {
        row[0].text: [f"{cell.text} {cell.detail}".strip() for cell in row[1:]]
        for row in table.body
    }


def html_of(*sections: Section) -> Tags:
    return Tags(page("t", sections))


def text_of(*sections: Section) -> str:
    """The text of a page, in one line."""
    return " ".join(html_of(*sections).text.split())


def sources(root: Path, models=("tiny",)) -> Sources:
    return Sources(root, tuple(models), ("top1",))


def make_inputs(root: Path) -> dict[tuple[str, str], Codes]:
    """Eight clips of 2 s, and the tables of random SAEs and a random USAE over two models.

    Returns {(model, kind): codes of the clips}.
    """
    rng = np.random.default_rng(0)
    (root / "data/clips").mkdir(parents=True)
    table = [
        {"id": f"clip-{i}", "group": f"g{i}", "split": "test", "kind": "clip", "font": "mixed",
         "caption": HOSTILE if i == 0 else f"caption {i}"}
        for i in range(CLIPS)
    ]  # fmt: skip
    audio = (tone(220 * (i + 1), SECONDS) * (1 + np.arange(SECONDS * RATE) / 32_000) / 2
             for i in range(CLIPS))  # fmt: skip
    write_clips(root / "data/clips", zip(audio, table, strict=True), RATE, SECONDS * RATE)
    ids = [row["id"] for row in table]
    generator = torch.Generator().manual_seed(0)

    def unit(F: int, d: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn((F, d), generator=generator), dim=1)

    saes, activations = {}, {}
    for model, d in WIDTHS.items():
        x = rng.standard_normal((CLIPS * FRAMES, d)).astype(np.float32)
        W, activations[model] = unit(LATENTS, d), torch.from_numpy(x)
        saes[model] = TopKSAE(W, torch.zeros(LATENTS), W, torch.zeros(d), 3)
    sides = []
    for d in WIDTHS.values():
        W, bias, one = unit(LATENTS, d), torch.zeros(LATENTS), torch.tensor(1.0)
        # Each tensor its own memory, as safetensors wants it.
        sides.append(ModelWeights(W, bias, W.clone(), torch.zeros(d), torch.zeros(d), one))
    usae = UniversalSAE(MODELS, "top1", "usae", 3, tuple(sides))

    parts, tops, coded = [], [], {}
    for kind in ("sae", "usae"):
        for i, model in enumerate(MODELS):
            x = activations[model]
            code = saes[model].encode(x) if kind == "sae" else usae.encode(x, i)
            codes = Codes(to_csr(*code, LATENTS), np.full(CLIPS, FRAMES))
            coded[model, kind] = codes
            top = feature_table.top_clips(pool_clips(codes), ids, RATE_OF_FRAMES, 5)
            n = np.arange(LATENTS)
            columns = {
                "feature": n, "energy": codes.mean, "firing_rate": codes.fired / (CLIPS * FRAMES),
                "concept": np.where(n < 3, "guitar", "electric_piano"),
                "concept_auroc": 0.5 + n / 60, "concept_p": np.where(n % 5 == 4, 0.01, 0.6),
                "concept_heldout_auroc": 0.55 + 0 * n,
            }  # fmt: skip
            if kind == "sae":
                columns |= {
                    "set": np.array(["common", "own", "unmatched"], object)[n % 3],
                    "partner_model": MODELS[1 - i], "partner": n[::-1],
                    "partner_correlation": n / LATENTS, "best_model": MODELS[1 - i], "best": n,
                    "best_correlation": 0.9 + 0 * n, "counterpart": n,
                    "counterpart_cosine": 0.3 + 0 * n, "seed_correlation": 0.6 + 0 * n,
                }  # fmt: skip
            else:
                columns |= {
                    "firing_entropy": n / LATENTS, "cofires": n, "cofire_proportion": n / 100,
                    "counterpart": n, "counterpart_cosine": 0.4 + 0 * n,
                }  # fmt: skip
            parts.append((kind, model, columns))
            tops.append(top.assign(kind=kind, model=model))
    features, top = feature_table.table(parts), pd.concat(tops, ignore_index=True)
    feature_table.write(root / "data/features", features, top)
    curves = moments.cut(coded, ids, moments.wanted(features, top, MODELS, 5))
    moments.write(root / "data/features/moments.parquet", curves, RATE_OF_FRAMES)
    return coded


ACTIVITY = FeatureActivity(
    clips=8, moments=2, bands=4, per_band=1, seconds=0.5, bars=10, nearest=3
)  # fmt: skip


def make_activity(root: Path, coded: dict[tuple[str, str], Codes]) -> None:
    """data/feature_activity, data/effects, stability and finder tables beside `make_inputs`."""
    decoder = np.random.default_rng(1).standard_normal((LATENTS, 6))

    def dictionary(kind: str, model: str, models: tuple[str, ...]) -> activity.Dictionary:
        codes = [coded[name, kind] for name in models]
        return activity.Dictionary(
            kind, model, "top1", "layers.3", models, RATE_OF_FRAMES, decoder,
            lambda clips: codes, described=True,
        )  # fmt: skip

    dictionaries = [dictionary("sae", model, (model,)) for model in MODELS]
    dictionaries.append(dictionary("usae", "", MODELS))
    rows = pd.read_parquet(root / "data/clips/clips.parquet")
    matching = MatchFeatures("top1", 0.5, 1, 19, 10, 1, 3, True)
    activity.write(
        root / "data/feature_activity", dictionaries, rows, ACTIVITY, matching, 0, FAMILIES
    )
    n = np.arange(LATENTS)
    for model in MODELS:
        (root / "data/effects" / model).mkdir(parents=True)
        (root / "data/sae" / model / "top1").mkdir(parents=True)
        (root / "data/find_concept" / model).mkdir(parents=True)
        pd.DataFrame(
            {"feature": n, "value": 2.0, "kl": n / 100, "confidence": -0.01,
             "toward_guitar": n / 10, "toward_drums": -0.25}
        ).to_parquet(root / "data/effects" / model / "top1.parquet")  # fmt: skip
        pd.DataFrame(
            {"feature": n, "seed_cosine": 0.75, "null_cosine": 0.25, "returns": n % 2 == 0}
        ).to_parquet(root / "data/sae" / model / "top1/stability.parquet")
        pd.DataFrame(
            {"feature": n, "dictionary": "sae", "concept": HOSTILE, "q": np.where(n == 7, 0.01, 1),
             "auroc": 0.8, "test_auroc": 0.7, "heldout_font_auroc": 0.6}
        ).to_parquet(root / "data/find_concept" / model / "features.parquet")  # fmt: skip
