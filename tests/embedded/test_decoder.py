"""Decoder training: resuming is exact, captions are dropped, the average is what is saved."""

from dataclasses import replace

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from musicscope.embedded.pretraining import decoder as decoders
from musicscope.embedded.pretraining.codec import CodecConfig, build_codec

CONFIG = decoders.DecoderConfig(
    width=16, layers=2, heads=2, batch=4, average_from=0.5, learning_rate=1e-2, warmup_steps=2
)


@pytest.fixture(scope="module")
def parts():
    codec = build_codec(CodecConfig(num_filters=20, hidden_size=8, codebooks=2, codebook_size=16))
    generator = torch.Generator().manual_seed(0)
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_(generator=generator)
    torch.manual_seed(0)
    text = T5EncoderModel(
        T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    return codec, text


@pytest.fixture(scope="module")
def tokens():
    """The caption's first id says which code fills the clip."""
    code = torch.arange(12) % 6
    ids = torch.stack([3 + code, torch.ones(12, dtype=torch.long)], 1)
    codes = (code[:, None, None] + torch.tensor([0, 6])[:, None]).expand(12, 2, 40)
    return decoders.TokenSet(codes.short(), ids.short(), torch.ones(12, 2, dtype=torch.int8))


def test_resumed_training_equals_unbroken_training(parts, tokens, tmp_path):
    one = decoders.DecoderTrainer(CONFIG, *parts, 1, "cpu")
    for progress in (0.1, 0.6):
        one.step(tokens, progress)
    torch.save(one.state(), tmp_path / "decoder.pt")
    two = decoders.DecoderTrainer(CONFIG, *parts, 1, "cpu")
    two.load(torch.load(tmp_path / "decoder.pt", weights_only=True))
    for _ in range(2):
        assert torch.equal(one.step(tokens, 0.7), two.step(tokens, 0.7))
    for name, value in one.average.items():
        assert torch.equal(value, two.average[name]), name


def test_decoder_learns_the_codes_and_reads_the_caption(parts, tokens):
    trainer = decoders.DecoderTrainer(CONFIG, *parts, 1, "cpu")
    before = trainer.evaluate(tokens).mean()
    for i in range(150):
        trainer.step(tokens, i / 150)
    after = trainer.evaluate(tokens)
    wrong = decoders.TokenSet(tokens.codes, tokens.ids.roll(1, 0), tokens.mask)
    assert after.mean() < 0.3 * before
    assert trainer.evaluate(wrong).mean() > after.mean() + 0.02


def test_evaluation_uses_the_average_and_leaves_training_alone(parts, tokens):
    trainer = decoders.DecoderTrainer(CONFIG, *parts, 1, "cpu")
    for _ in range(5):
        trainer.step(tokens, 0.9)
    live = {n: p.detach().clone() for n, p in trainer.model.decoder.named_parameters()}
    found = trainer.evaluate(tokens)
    for name, value in trainer.model.decoder.named_parameters():
        assert torch.equal(value, live[name]), name
    model = trainer.finished()
    states = model.text_encoder(tokens.ids.long(), attention_mask=tokens.mask.long())
    states = model.enc_to_dec_proj(states.last_hidden_state)
    with torch.no_grad():
        again = decoders.decoder_loss(model, tokens.codes.long(), states, tokens.mask.long())
    torch.testing.assert_close(found, again, rtol=2e-3, atol=2e-3)


def test_a_share_of_the_captions_is_dropped(parts, tokens):
    trainer = decoders.DecoderTrainer(CONFIG, *parts, 1, "cpu")
    dropped, lengths = [], set()
    for trainer.step_count in range(100):
        codes, _, mask = trainer.draw(tokens)
        dropped += (mask.sum(1) == 0).tolist()
        lengths.add(codes.shape[-1])
    assert 0.08 < sum(dropped) / len(dropped) < 0.25
    assert lengths == {40, 10, 2}


def test_a_batch_depends_on_the_step_alone_and_its_crops_are_of_the_clips(parts, tokens):
    codes = torch.arange(12 * 2 * 40).reshape(12, 2, 40).short()
    tokens = replace(tokens, codes=codes)
    trainer = decoders.DecoderTrainer(CONFIG, *parts, 1, "cpu")
    starts = set()
    for trainer.step_count in range(30):
        found, ids, mask = trainer.draw(tokens)
        assert torch.equal(found, trainer.draw(tokens)[0])
        assert found.shape[0] * found.shape[2] == CONFIG.batch * 40
        assert ids.shape == mask.shape == (len(found), 2)
        assert (found.diff(dim=-1) == 1).all()
        assert torch.equal(found[:, 1] - found[:, 0], torch.full_like(found[:, 0], 40))
        starts |= set((found[:, 0, 0] % 40).tolist())
    assert min(starts) == 0
    assert max(starts) == 38


def test_embedded_sizes_differ_in_depth_and_width():
    small, medium = decoders.SIZES["nano-small"], decoders.SIZES["nano-medium"]
    assert small.layers < medium.layers
    assert small.width < medium.width
    assert all(c.width % c.heads == 0 for c in (small, medium))
