"""The shared text encoder: a small T5 that learns what captions say, then stays frozen.

It is trained to tell from a caption which instruments, tempo, density and key it names; no audio is
involved. Both nano models condition on its states, as MusicGen conditions on a frozen T5.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from musicscope.core.seeding import seed_for


@dataclass(frozen=True)
class TextConfig:
    """Architecture and schedule of the text encoder."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    vocabulary: int = 512
    captions: int = 20000
    steps: int = 900
    batch: int = 96
    learning_rate: float = 1e-3


def train_tokenizer(captions: Sequence[str], size: int) -> T5Tokenizer:
    """A T5 tokenizer (unigram) fitted to captions; unknown text still splits."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    letters = [chr(c) for c in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
        initial_alphabet=letters, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([*captions, *letters], trainer)
    vocabulary = [(piece, float(score)) for piece, score in
                  json.loads(tokenizer.to_str())["model"]["vocab"]]  # fmt: skip
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the caption's own tokens: [B, L, d], [B, L] -> [B, d]."""
    weight = mask.unsqueeze(-1).to(states)
    return (states * weight).sum(1) / weight.sum(1).clamp_min(1)


def train_text_encoder(
    captions: list[str], facts: np.ndarray, config: TextConfig, seed: int
) -> tuple[T5EncoderModel, T5Tokenizer, float]:
    """Returns the encoder, its tokenizer, and the final loss (binary cross-entropy, nats)."""
    tokenizer = train_tokenizer(captions, config.vocabulary)
    torch.manual_seed(seed_for(seed, "text-init"))
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=config.width, d_kv=config.width // config.heads,
            d_ff=2 * config.width, num_layers=config.layers, num_heads=config.heads,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    head = nn.Linear(config.width, facts.shape[1])
    parameters = [*encoder.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    targets = torch.from_numpy(facts).float()
    rng = np.random.default_rng(seed_for(seed, "text-batches"))
    recent: list[float] = []
    encoder.train()
    for _ in range(config.steps):
        rows = rng.integers(len(captions), size=config.batch)
        batch = tokenizer([captions[r] for r in rows], return_tensors="pt", padding=True)
        states = encoder(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state
        logits = head(mean_state(states, batch.attention_mask))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, targets[rows])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        recent = [*recent[-99:], float(loss.detach())]
    return encoder.eval(), tokenizer, float(np.mean(recent))
