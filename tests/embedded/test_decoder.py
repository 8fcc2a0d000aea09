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
def tokens(parts):
    """The caption's first id says which code fills the clip."""
    code = torch.arange(12) % 6
    ids = torch.stack([3 + code, torch.ones(12, dtype=torch.long)], 1)
    codes = (code[:, None, None] + torch.tensor([0, 6])[:, None]).expand(12, 2, 40)
    mask = torch.ones(12, 2, dtype=torch.int8)
    states = decoders.encode_captions(parts[1].eval(), ids.short(), mask, batch=5)
    return decoders.TokenSet(codes.short(), states, mask)


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
    wrong = replace(tokens, states=tokens.states.roll(1, 0))
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
    with torch.no_grad():
        states = model.enc_to_dec_proj(tokens.states.float())
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
        found, states, mask = trainer.draw(tokens)
        assert torch.equal(found, trainer.draw(tokens)[0])
        assert found.shape[0] * found.shape[2] == CONFIG.batch * 40
        assert states.shape[:2] == mask.shape == (len(found), 2)
        assert (found.diff(dim=-1) == 1).all()
        assert torch.equal(found[:, 1] - found[:, 0], torch.full_like(found[:, 0], 40))
        starts |= set((found[:, 0, 0] % 40).tolist())
    assert min(starts) == 0
    assert max(starts) == 38


def test_codes_that_are_alike_start_alike(parts):
    model = decoders.build_musicgen(*parts, CONFIG, 0)
    for k in range(2):
        codes = model.audio_encoder.quantizer.layers[k].codebook.embed
        wanted = torch.cdist(codes, codes).flatten()
        for weight in (
            model.decoder.model.decoder.embed_tokens[k].weight[:16],
            model.decoder.lm_heads[k].weight,
        ):
            found = torch.cdist(weight, weight).flatten()
            assert torch.corrcoef(torch.stack([wanted, found]))[0, 1] > 0.999


def test_loss_equals_that_of_the_logits(parts):
    model = decoders.build_musicgen(*parts, CONFIG, 0).eval()
    codes, mask = torch.randint(0, 16, (2, 2, 9)), torch.ones(2, 3)
    states = model.enc_to_dec_proj(torch.randn(2, 3, 8))
    with torch.no_grad():
        mine = decoders.decoder_loss(model, codes, states, mask)
        logits = model.decoder(
            input_ids=decoders.delayed(codes, 16)[..., :-1].reshape(4, -1),
            encoder_hidden_states=states, encoder_attention_mask=mask,
        ).logits.view(2, 2, -1, 16)  # fmt: skip
    wanted = [
        torch.nn.functional.cross_entropy(
            logits[:, k, k : k + 9].flatten(0, 1), codes[:, k].flatten()
        )
        for k in range(2)
    ]
    torch.testing.assert_close(mine, torch.stack(wanted), rtol=2e-2, atol=2e-2)  # bfloat16


def test_layers_one_by_one_give_the_states_of_the_whole_decoder(parts, tokens):
    model = decoders.build_musicgen(*parts, CONFIG, 0)
    inputs = torch.randint(16, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    states = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    wanted = model.decoder.model.decoder(
        input_ids=inputs.reshape(6, 9), encoder_hidden_states=states, encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state  # fmt: skip
    torch.testing.assert_close(decoders.decoder_states(model, inputs, states, mask.bool()), wanted)


def test_matrices_together_are_updated_as_by_torch_one_by_one():
    shapes = [(8, 8), (8, 8), (32, 8), (8, 32), (8, 8), (32, 8)]
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimisers = [
        decoders.StackedMuon(ours, lr=0.0),
        torch.optim.Muon(theirs, lr=0.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ]
    for rate in (0.02, 0.01, 0.005):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_embedded_sizes_differ_in_depth_and_width():
    small, medium = decoders.SIZES["nano-small"], decoders.SIZES["nano-medium"]
    assert small.layers < medium.layers
    assert small.width < medium.width
    assert all(c.width % c.heads == 0 for c in (small, medium))
