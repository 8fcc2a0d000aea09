"""Codec and decoder training, and the measures they are judged by."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from musicscope.embedded.nano.codec_start import finish_weights, mdct_kernels, start_weights
from musicscope.embedded.nano.codec_training import (
    CodebookTrainer,
    CodecConfig,
    build_codec,
    kmeans,
    nearest_code,
    train_codec,
)
from musicscope.embedded.nano.decoder_training import (
    DecoderConfig,
    build_musicgen,
    decoder_loss,
    delayed,
    draw_batch,
    train_decoder,
)
from musicscope.embedded.nano.evaluation import (
    code_use,
    log_mel_distance,
    previous_frame_ce,
    prompts,
    si_sdr,
    unigram_ce,
)

TINY = CodecConfig(
    num_filters=24,
    hidden_size=32,
    codebooks=2,
    codebook_size=16,
    steps=4,
    batch=2,
    crop=3200,
    start_clips=4,
)


def tones(clips: int = 8, samples: int = 48_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    t = np.arange(samples) / 16_000
    return np.stack([0.2 * np.sin(2 * np.pi * f * t) for f in rng.uniform(100, 900, clips)]).astype(
        np.float16
    )


@pytest.mark.parametrize("bands", [4, 5])
def test_mdct_reconstructs(bands):
    kernels = mdct_kernels(bands)[:, None]
    x = torch.randn(1, 1, 40 * bands)
    y = torch.nn.functional.conv1d(x, kernels, stride=bands)
    z = torch.nn.functional.conv_transpose1d(y, kernels, stride=bands)
    inner = slice(bands, -bands)
    torch.testing.assert_close(z[..., inner], x[..., inner], atol=1e-5, rtol=1e-5)


def test_codec_starts_as_a_near_perfect_transform():
    torch.manual_seed(0)
    codec = build_codec(CodecConfig(hidden_size=320, codebooks=1, codebook_size=16))
    audio = torch.from_numpy(tones(4).astype(np.float32))
    start_weights(codec, audio)
    with torch.no_grad():
        before = codec.decoder(codec.encoder(audio[:, None]))[:, 0, 2000:-2000]
        assert si_sdr(audio[:, 2000:-2000].numpy(), before.numpy()).min() > 15
        after = finish_weights(codec).decoder(codec.encoder(audio[:, None]))[:, 0, 2000:-2000]
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-4)


def test_codec_resumes_to_the_same_weights(tmp_path):
    corpus = tones()

    class Killed(Exception):
        pass

    def kill_at(step: int, _losses: dict[str, float]) -> None:
        if step == 3:
            raise Killed

    whole = train_codec(corpus, TINY, 1, tmp_path / "a.pt", lambda *_: None, 2, bfloat16=False)
    with pytest.raises(Killed):
        train_codec(corpus, TINY, 1, tmp_path / "b.pt", kill_at, 2, bfloat16=False)
    again = train_codec(corpus, TINY, 1, tmp_path / "b.pt", lambda *_: None, 2, bfloat16=False)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[name], rtol=0, atol=0, msg=name)


def test_residual_levels_shrink_the_residual():
    torch.manual_seed(0)
    codec = build_codec(TINY)
    books = CodebookTrainer(codec, torch.Generator().manual_seed(0), 40)
    latents = torch.randn(2, 200, 32)
    books.start(latents.flatten(0, 1))
    first = books.books[0].embed[nearest_code(latents.flatten(0, 1), books.books[0].embed)]
    quantised, commitment = books.quantise(latents)
    one = (latents.flatten(0, 1) - first).square().mean()
    both = (latents - quantised).square().mean()
    assert both < one < latents.square().mean()
    assert float(commitment) > 0


def test_kmeans_finds_separate_clusters():
    centres = torch.eye(4) * 10
    points = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 4)
    found = kmeans(points, 4, torch.Generator().manual_seed(1), iterations=25)
    assert torch.cdist(points, found).min(1).values.mean() < 4


@pytest.fixture(scope="module")
def nano():
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    text = T5EncoderModel(
        T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                 decoder_start_token_id=0, tie_word_embeddings=False)
    )  # fmt: skip
    config = DecoderConfig(32, 2, 2, steps=60, batch=2, learning_rate=1e-2)
    codec = build_codec(TINY)
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()
    return config, lambda: build_musicgen(codec, text, config, 0)


def test_batches_are_whole_clips_or_short_crops_and_depend_on_the_step_alone():
    codes = np.arange(12 * 2 * 40).reshape(12, 2, 40)
    config = DecoderConfig(32, 2, 2, batch=4, short_crops=0.5)
    whole, short, rows_seen = 0, 0, []
    for step in range(60):
        rows, crops = draw_batch(codes, config, 3, step)
        again = draw_batch(codes, config, 3, step)[1]
        np.testing.assert_array_equal(crops, again)
        if crops.shape == (4, 2, 40):
            whole += 1
            rows_seen += list(rows)
            np.testing.assert_array_equal(crops, codes[rows])
        else:
            assert crops.shape == (16, 2, 10)
            short += 1
            start = crops[:, 0, 0] - codes[rows, 0, 0]
            assert set(np.diff(crops, axis=-1).ravel()) == {1}
            assert 0 <= start.min() < 10 < 20 < start.max() <= 30
    assert 15 < whole < 45
    assert whole + short == 60
    assert set(rows_seen) == set(range(12))
    every = [draw_batch(codes, DecoderConfig(32, 2, 2, short_crops=0.0), 3, s)[0] for s in range(3)]
    assert sorted(np.concatenate(every)) == list(range(12))  # an epoch: every clip once


def test_codes_that_sound_alike_start_alike(nano):
    _, build = nano
    model = build()
    for k in range(2):
        codes = model.audio_encoder.quantizer.layers[k].codebook.embed
        wanted = torch.cdist(codes, codes).flatten()
        for weight in (
            model.decoder.model.decoder.embed_tokens[k].weight[:16],
            model.decoder.lm_heads[k].weight,
        ):
            found = torch.cdist(weight, weight).flatten()
            assert torch.corrcoef(torch.stack([wanted, found]))[0, 1] > 0.999


def test_loss_equals_transformers_own(nano):
    _, build = nano
    model = build().eval()
    codes, states = torch.randint(0, 16, (2, 2, 9)), torch.randn(2, 3, 16)
    mask = torch.ones(2, 3)
    states = model.enc_to_dec_proj(states)
    with torch.no_grad():
        mine = decoder_loss(model, codes, states, mask, bfloat16=False).mean()
        sequence = delayed(codes, 16)
        theirs = model.decoder(
            input_ids=sequence[..., :-1].reshape(4, -1), encoder_hidden_states=states,
            encoder_attention_mask=mask,
        ).logits.view(2, 2, -1, 16)  # fmt: skip
    wanted = [
        torch.nn.functional.cross_entropy(
            theirs[:, k, k : k + 9].flatten(0, 1), codes[:, k].flatten()
        )
        for k in range(2)
    ]
    torch.testing.assert_close(mine, torch.stack(wanted).mean())


def test_decoder_learns_and_resumes(nano, tmp_path):
    config, build = nano
    rng = np.random.default_rng(0)
    codes = np.tile(rng.integers(0, 16, (4, 2, 1)), (1, 1, 20)).astype(np.uint16)
    states, masks = torch.randn(4, 3, 16), torch.ones(4, 3)
    losses: list[float] = []

    def report(step: int, loss: dict[str, float]) -> None:
        losses.append(loss["ce_0"])

    def train(path, report=report):
        return train_decoder(build(), codes, states, masks, config, 1, path, report, 10, False)

    whole = train(tmp_path / "a.pt")
    assert np.mean(losses[-5:]) < 0.7 * losses[0]

    class Killed(Exception):
        pass

    def kill(step: int, _loss: dict[str, float]) -> None:
        if step == 55:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "b.pt", kill)
    again = train(tmp_path / "b.pt")
    for name, value in whole.decoder.state_dict().items():
        torch.testing.assert_close(
            value, again.decoder.state_dict()[name], rtol=0, atol=0, msg=name
        )


def test_si_sdr_ignores_scale_and_measures_noise():
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 1, 100_000))
    assert si_sdr(x, 0.3 * x)[0] > 100
    assert si_sdr(x, x + 0.1 * noise)[0] == pytest.approx(20, abs=0.2)


def test_log_mel_distance_of_a_gain_is_the_gain():
    x = np.random.default_rng(0).standard_normal((1, 16_000)).astype(np.float32) * 0.1
    assert log_mel_distance(x, x, 16_000)[0] == 0
    assert log_mel_distance(x, 0.5 * x, 16_000)[0] == pytest.approx(6.02, abs=0.01)


def test_baselines_know_what_they_should():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 8, (20, 1, 200))
    uniform = unigram_ce(train, train, 8)[0]
    assert uniform == pytest.approx(np.log(8), abs=0.01)
    counting = (np.arange(400) % 8)[None, None]  # each code follows from the one before
    assert unigram_ce(counting, counting, 8)[0] == pytest.approx(np.log(8), abs=0.01)
    assert previous_frame_ce(counting, counting, counting, 8)[0] < 0.2


def test_code_use():
    use = code_use(np.array([[[0, 0, 1, 1]]]), 8)[0]
    assert use["used"] == 0.25
    assert use["perplexity"] == pytest.approx(2.0)


def test_prompts_differ_only_in_the_instrument():
    pairs = prompts(8)
    for (guitar, yes), (other, no) in zip(pairs[::2], pairs[1::2], strict=True):
        assert yes
        assert not no
        assert "guitar" in guitar
        assert "guitar" not in other
        assert len(guitar.split()) <= len(other.split())
