"""Codec training: resuming is exact, gradients are balanced, codebooks follow, audio improves."""

import math
from dataclasses import replace

import pytest
import torch

from musicscope.embedded.pretraining import codec as codecs
from musicscope.embedded.pretraining import codec_losses
from musicscope.embedded.pretraining.codec_quality import si_sdr
from musicscope.embedded.pretraining.mdct_start import finish_weights, mdct_kernels, start_weights

TINY = codecs.CodecConfig(
    num_filters=20, upsampling_ratios=(4, 4, 4, 5), hidden_size=16, codebooks=2, codebook_size=32,
    batch=2, crop=3200, discriminator_channels=4, adversarial_from=0.5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tones(count: int, samples: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    hertz = 100 + 900 * torch.rand(count, 1, generator=generator)
    return 0.2 * torch.sin(2 * torch.pi * hertz * torch.arange(samples) / codecs.SAMPLE_RATE)


def trainer_of(config: codecs.CodecConfig, start: torch.Tensor) -> codecs.CodecTrainer:
    return codecs.CodecTrainer(config, codecs.start_codec(config, 1, start), 1, "cpu")


def test_resumed_training_equals_unbroken_training(tmp_path):
    start, batches = tones(16, 6400, 0), [tones(2, 3200, i) for i in range(1, 6)]
    one = trainer_of(TINY, start)
    for audio, progress in zip(batches[:3], (0.1, 0.6, 0.7), strict=True):
        one.step(audio, progress)
    torch.save(one.state(), tmp_path / "codec.pt")
    two = trainer_of(TINY, start)
    two.load(torch.load(tmp_path / "codec.pt", weights_only=True))
    for audio in batches[3:]:
        first, second = one.step(audio, 0.8), two.step(audio, 0.8)
        assert {k: float(v) for k, v in first.items()} == {k: float(v) for k, v in second.items()}
    for name, value in one.average.items():
        assert torch.equal(value, two.average[name]), name


def test_training_reduces_the_loss_and_the_result_reloads(tmp_path):
    config = replace(TINY, adversarial_from=2.0, average_from=0.3, average_decay=0.9)
    trainer = trainer_of(config, tones(32, 6400, 0))
    held_out = tones(8, 3200, 1000)

    def loss() -> float:
        codec = trainer.finished()
        with torch.inference_mode():
            found = codec.encode(held_out[:, None])
            decoded = codec.decode(found.audio_codes, found.audio_scales).audio_values[:, 0, :3200]
        return float(codec_losses.mel_loss(decoded, held_out))

    before = loss()
    for i in range(60):
        trainer.step(tones(2, 3200, i), i / 60)
    assert loss() < 0.95 * before
    codec = trainer.finished()
    codec.save_pretrained(tmp_path)
    again = type(codec).from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        codes = codec.encode(held_out[:1, None]).audio_codes
        assert torch.equal(codes, again.encode(held_out[:1, None]).audio_codes)
    assert codes.shape == (1, 1, 2, 10)


def test_only_scales_above_one_cost_anything():
    codec = codecs.start_codec(TINY, 1, tones(16, 6400, 0))
    watch = codecs.ScaleWatch(codec)
    small = torch.full((1, 4, 16), 0.5)
    assert watch.loss(small) == 0
    assert float(watch.loss(10 * small)) == pytest.approx(math.log(5) ** 2)
    with torch.no_grad():
        codec.encoder(1e4 * tones(1, 3200, 1)[:, None])  # its LSTM gets far more than 1
    assert watch.loss(small) > 0.5
    assert watch.loss(small) == 0  # scales count for one step


def test_training_holds_the_scale_of_latents_that_start_too_large():
    config = replace(TINY, adversarial_from=2.0, scale_weight=10.0)
    codec = codecs.start_codec(config, 1, tones(32, 6400, 0))
    last, first = codec.encoder.layers[-1].conv, codec.decoder.layers[0].conv
    with torch.no_grad():
        for tensor, factor in ((last.weight, 1e3), (last.bias, 1e3), (first.weight, 1e-3)):
            tensor.mul_(factor)
    trainer = codecs.CodecTrainer(config, codec, 1, "cpu")
    losses = [float(trainer.step(tones(2, 3200, i), 0.1)["scale"]) for i in range(20)]
    assert losses[-1] < losses[1]


def test_codebooks_restart_from_their_saved_vectors():
    codec = trainer_of(TINY, tones(16, 6400, 0)).finished()
    book = codec.quantizer.layers[0].codebook
    saved = book.embed.clone()
    book.embed_avg.fill_(torch.inf)  # as float16 makes of large sums
    codecs.restart_codebooks(codec)
    torch.testing.assert_close(book.embed_avg / book.cluster_size[:, None], saved)


def test_training_the_decoder_alone_changes_no_code():
    config = replace(TINY, adversarial_from=0.0)
    first = trainer_of(config, tones(16, 6400, 0)).finished()
    again = trainer_of(config, tones(16, 6400, 0)).finished()
    trainer = codecs.CodecTrainer(config, codecs.plain_weights(again), 2, "cpu", decoder_only=True)
    for i in range(3):
        losses = trainer.step(tones(2, 3200, i), 0.5)
    assert float(losses["discriminator"]) > 0
    after, audio = trainer.finished(), tones(4, 6400, 9)[:, None]
    with torch.inference_mode():
        one, two = first.encode(audio), after.encode(audio)
        assert torch.equal(one.audio_codes, two.audio_codes)
        decoded = [c.decode(one.audio_codes, one.audio_scales).audio_values for c in (first, after)]
    assert not torch.allclose(*decoded)


def test_discriminator_learns_to_tell_noise_from_tones():
    trainer = trainer_of(replace(TINY, learning_rate=2e-3), tones(16, 6400, 0))
    losses = [
        float(trainer._train_discriminator(tones(2, 3200, i), 0.1 * torch.randn(2, 3200)))
        for i in range(40)
        for _ in [trainer.optimisers[1].param_groups[0].update(lr=2e-3)]
    ]
    assert losses[-1] < 0.7 * losses[0]


def test_a_batch_of_nan_is_skipped_and_a_snapshot_restores():
    trainer = trainer_of(TINY, tones(16, 6400, 0))
    trainer.step(tones(2, 3200, 1), 0.6)
    saved = trainer.snapshot()
    trainer.step(torch.full((2, 3200), torch.nan), 0.6)
    assert all(torch.isfinite(t).all() for t in trainer.snapshot())
    trainer.restore(saved)
    assert all(torch.equal(a, b) for a, b in zip(saved, trainer.snapshot(), strict=True))
    assert all(torch.isfinite(v) for v in trainer.step(tones(2, 3200, 2), 0.6).values())


def test_balanced_gradient_gives_each_loss_its_share():
    at = torch.randn(3, 5, requires_grad=True)
    losses = {"a": 1000 * (at * torch.ones(5)).sum(), "b": 0.01 * at.square().sum()}
    norms = {"a": torch.zeros(()), "b": torch.zeros(())}
    weights = {"a": torch.tensor(3.0), "b": torch.tensor(1.0)}
    found = codec_losses.balanced_gradient(losses, weights, norms, at)
    a = torch.ones(3, 5) / torch.ones(3, 5).norm()
    b = at.detach() / at.detach().norm()
    torch.testing.assert_close(found, 0.75 * a + 0.25 * b)


def test_codebooks_follow_the_latents_and_unused_codes_return():
    codec = codecs.build_codec(TINY)
    generator = torch.Generator().manual_seed(0)
    books = codecs.CodebookTrainer(codec, generator, frames_per_step=64)
    points = torch.randn(512, 16, generator=generator)
    books.start(points)
    before = (points - books.quantise(points[None])[0].detach()[0]).square().mean()
    moved = points + 5.0
    for _ in range(300):
        books.quantise(moved[torch.randint(512, (64,), generator=generator)][None])
    after = (moved - books.quantise(moved[None])[0].detach()[0]).square().mean()
    assert after < 1.3 * before
    used = codecs.nearest_code(moved, codec.quantizer.layers[0].codebook.embed).unique()
    assert len(used) > 24


def test_mel_loss_is_zero_for_equal_audio_and_counts_decibels():
    audio = tones(2, 16_000, 3) + 0.05 * torch.randn(2, 16_000)
    assert codec_losses.mel_loss(audio, audio) == 0
    louder = codec_losses.mel_loss(audio * 10 ** (10 / 20), audio)
    assert float(louder) == pytest.approx(1.0, abs=0.05)


def test_padding_buffers_stay_on_the_cpu():
    codec = codecs.keep_shapes_on_cpu(codecs.build_codec(TINY))
    names = [n for n, _ in codec.named_buffers() if n.endswith(("stride", "padding_total"))]
    assert names
    assert all(b.device.type == "cpu" for _, b in codec.named_buffers())


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
    codec = codecs.build_codec(codecs.CodecConfig(hidden_size=320, codebooks=1, codebook_size=16))
    audio = tones(4, 48_000, 0)
    start_weights(codec, audio)
    with torch.no_grad():
        before = codec.decoder(codec.encoder(audio[:, None]))[:, 0, 2000:-2000]
        assert si_sdr(audio[:, 2000:-2000].numpy(), before.numpy()).min() > 15
        after = finish_weights(codec).decoder(codec.encoder(audio[:, None]))[:, 0, 2000:-2000]
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-4)
