"""Styles, chords and arrangements."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musicscope.embedded.rendering.accompaniment import arrange
from musicscope.embedded.rendering.harmony import Chords, close_voicing, harmonise
from musicscope.embedded.rendering.leads import lead_of, styles_for
from musicscope.embedded.rendering.notes import make_part, swung
from musicscope.embedded.rendering.styles import HELD_OUT_STYLES, STYLES, TRAIN_STYLES, Pattern
from musicscope.embedded.rendering.tunes import MODES, Tune

METERS = ((4, 4), (2, 2), (2, 4), (3, 4), (3, 8), (6, 4), (6, 8), (9, 8), (12, 8))


def tune(meter: tuple[int, int], seed: int = 0, bars: int = 16, pickup: bool = True) -> Tune:
    """A random walk in D major in eighths, with a pickup of one eighth."""
    rng = np.random.default_rng(seed)
    per_bar = 8 * meter[0] // meter[1]
    notes = bars * per_bar
    degrees = np.abs((rng.choice((-1, 0, 1, 2, -2), notes).cumsum() + 5) % 20 - 10)
    pitch = 62 + 12 * (degrees // 7) + np.array(MODES["major"])[degrees % 7]
    start = 0.5 * (np.arange(notes) - pickup)
    return Tune(
        f"book/{seed}", "oneill", "", meter, 2, "major", start, np.full(notes, 0.5), pitch,
        np.zeros(notes, np.int64),
    )  # fmt: skip


def chorale(seed: int = 0) -> Tune:
    top = tune((4, 4), seed, bars=8)
    start, duration, pitch = (np.repeat(x, 4) for x in (top.start, top.duration, top.pitch))
    voice = np.tile(np.arange(4), len(top.start))
    return Tune(
        "bach/x", "bach", "", (4, 4), 2, "major", start, duration, pitch - 5 * voice, voice
    )  # fmt: skip


def test_styles_are_many_and_every_meter_has_both_kinds():
    assert len(TRAIN_STYLES) >= 24
    assert len(HELD_OUT_STYLES) >= 5
    assert not set(TRAIN_STYLES) & set(HELD_OUT_STYLES)
    for meter in METERS:
        assert len(styles_for(tune(meter))) >= 2, meter
        assert styles_for(tune(meter), HELD_OUT_STYLES), meter


@pytest.mark.parametrize("style", STYLES.values(), ids=lambda s: s.name)
def test_patterns_use_only_symbols_that_mean_something(style):
    lines = [(p, ".XxogO?") for groove in style.drums for _, p in groove]
    lines += [(p, "._134578wap") for p in style.bass]
    lines += [(p, "._0123" if kind == "arp" else "._Xxog") for kind, p in style.comping]
    for pattern, symbols in lines:
        assert set(pattern.text) <= set(symbols + " "), pattern.text
        assert len(pattern.over(1)[0]) > 0 or "?" in pattern.text
    assert {k for k, _ in style.comping} <= {
        "block", "strum", "stab", "arp", "pad", "tremolo", "drone",
    }  # fmt: skip
    assert 60 <= style.tempo[0] < style.tempo[1] <= 180


def test_pattern_repeats_and_holds():
    time, length, symbol, weight = Pattern("X__. x... .o__ ____ | ".replace("| ", ""), 2, 4).over(3)
    assert time.tolist() == [0.0, 1.0, 2.25, 4.0, 5.0]
    assert length.tolist() == [0.75, 0.25, 1.75, 0.75, 0.25]
    assert "".join(symbol) == "XxoXx"
    assert weight[0] > weight[1] > weight[2]
    with pytest.raises(ValueError, match="whole number of bars"):
        Pattern("x.. x..", 2, 4).over(1)


@pytest.mark.parametrize(
    ("meter", "beats", "triplets", "bars"),
    [((4, 4), 4, False, 16), ((2, 2), 4, False, 16), ((2, 4), 4, False, 8), ((3, 4), 3, False, 16),
     ((3, 8), 3, False, 16), ((6, 8), 4, True, 8), ((6, 4), 4, True, 8), ((9, 8), 3, True, 16),
     ((12, 8), 4, True, 16)],
)  # fmt: skip
def test_lead_puts_meters_on_three_or_four_beats(meter, beats, triplets, bars):
    lead = lead_of(tune(meter))
    assert (lead.beats, lead.triplets, lead.bars) == (beats, triplets, bars)
    assert lead.start[0] < 0
    assert lead.start[1] == 0


def test_harmony_follows_the_chords_of_the_melody_and_ends_on_the_tonic():
    roots = np.array([0, 5, 7, 0, 9, 2, 7, 0])
    thirds = np.array([4, 4, 4, 4, 3, 3, 4, 4])
    tones = np.stack([0 * thirds, thirds, 0 * thirds + 7, 0 * thirds], axis=1)
    pitch = (60 + roots[:, None] + tones).ravel()
    start = np.arange(32.0)
    found = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        chords = harmonise(start, np.ones(32), pitch, 0, "major", 4, 1, 8, rng)
        found.append((chords.root == roots) & (chords.tones[:, 1] == thirds))
        assert chords.root[[0, 3, 7]].tolist() == [0, 0, 0]
    # Plain harmony sometimes replaces the sixth degree by the fourth.
    assert np.mean(found) > 0.9
    silent = harmonise(np.zeros(0), np.zeros(0), np.zeros(0, int), 9, "minor", 3, 1, 8,
                       np.random.default_rng(0))  # fmt: skip
    assert silent.root[-1] == 9


def test_close_voicings_move_little():
    chords = Chords(np.arange(12), np.tile([0, 4, 7, 10], (12, 1)))
    voiced = close_voicing(chords, 60.0, 4)
    assert voiced.min() >= 54
    assert voiced.max() < 66
    classes = np.sort(voiced % 12, axis=1)
    np.testing.assert_array_equal(
        classes, np.sort((chords.root[:, None] + chords.tones) % 12, axis=1)
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(METERS), st.booleans())
def test_arrangements_are_playable(seed, meter, held_out):
    rng = np.random.default_rng(seed)
    song = tune(meter, seed % 7, bars=8 + seed % 30, pickup=seed % 2 == 0)
    names = styles_for(song, HELD_OUT_STYLES if held_out else TRAIN_STYLES)
    piece = arrange(song, rng, names[seed % len(names)])
    assert piece.group == song.group
    assert piece.style in names
    assert 20.0 < piece.seconds < 75.0
    assert 60.0 <= piece.tempo_bpm[0] <= 180.0
    assert len(piece.parts) >= 2
    assert sum(p.is_drum for p in piece.parts) <= 1
    assert sum(p.is_bass for p in piece.parts) <= 1
    for part in piece.parts:
        assert part.program == 0 or part.is_bass
        assert np.all(np.diff(part.start) >= 0)
        assert part.start[0] >= 0
        assert part.end.max() <= piece.seconds + 1e-9
        assert np.all(part.end - part.start >= 0.005)
        assert part.velocity.min() >= 30
        assert part.velocity.max() <= 120
        assert part.pitch.min() >= 24
        assert part.pitch.max() <= 105
        for pitch in np.unique(part.pitch):
            mine = part.pitch == pitch
            assert np.all(part.start[mine][1:] >= part.end[mine][:-1] - 1e-9)


def test_same_seed_gives_the_same_piece_and_others_differ():
    def notes(seed: int) -> bytes:
        piece = arrange(tune((6, 8)), np.random.default_rng(seed))
        return b"".join(x.tobytes() for p in piece.parts for x in (p.start, p.pitch, p.velocity))

    assert notes(1) == notes(1)
    assert len({notes(seed) for seed in range(10)}) == 10


@pytest.mark.parametrize("meter", [(4, 4), (6, 8), (3, 4), (9, 8)])
def test_drums_bass_and_melody_keep_to_the_beat(meter):
    late = []
    for seed in range(12):
        piece = arrange(tune(meter, pickup=False), np.random.default_rng(seed))
        style = STYLES[piece.style]
        if style.swing != 0.5:
            continue
        beat = 60.0 / piece.tempo_bpm[0]
        for part in piece.parts:
            if part.is_drum or part.is_bass:
                steps = part.start / beat * style.division
                late.append(np.abs(steps - np.round(steps)) * beat / style.division)
    late = np.concatenate(late)
    assert np.quantile(late, 0.9) < 0.015
    assert late.max() < 0.045


def test_the_melody_is_the_tune_in_another_key():
    song = tune((4, 4), bars=16, pickup=False)
    intervals = np.diff(song.pitch)
    found = 0
    for seed in range(30):
        piece = arrange(song, np.random.default_rng(seed), "house")
        text = np.diff(piece.parts[0].pitch)
        runs = np.lib.stride_tricks.sliding_window_view(text, 12)
        source = np.lib.stride_tricks.sliding_window_view(np.tile(intervals, 1), 12)
        found += bool((runs[:, None] == source[None]).all(-1).any())
    assert found >= 12  # the others are ornamented or in another mode


def test_keys_and_tempos_spread_and_parts_pause():
    pieces = [arrange(tune((4, 4)), np.random.default_rng(seed)) for seed in range(60)]
    lowest = {int(p.parts[-1].pitch[0] % 12) for p in pieces if not p.parts[-1].is_drum}
    assert len(lowest) >= 4
    tempos = np.array([p.tempo_bpm[0] for p in pieces])
    assert np.ptp(tempos) > 50
    assert len({len(p.parts) for p in pieces}) >= 3
    pauses = [np.diff(part.start).max() > 5.0 for p in pieces for part in p.parts]
    assert 0.1 < np.mean(pauses) < 0.9


def test_a_style_of_another_meter_is_refused():
    with pytest.raises(ValueError, match="3/4 tune in style 'rock'"):
        arrange(tune((3, 4)), np.random.default_rng(0), "rock")


def test_chorales_keep_their_four_voices():
    song = chorale()
    for seed in range(6):
        piece = arrange(song, np.random.default_rng(seed))
        assert piece.style == "chorale"
        assert len(piece.parts) in (4, 5)
        assert not any(p.is_drum for p in piece.parts)
        for voice, part in enumerate(piece.parts[:4]):
            mine = song.pitch[song.voice == voice]
            shift = part.pitch[0] - mine[0]
            assert -5 <= shift <= 6
            np.testing.assert_array_equal(part.pitch[: len(mine)] - shift, mine)
            assert part.program == 0 or (part.is_bass and voice == 3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 40.0), min_size=2, max_size=30), st.floats(0.5, 0.75))
def test_swing_keeps_order_and_beats(beats, ratio):
    times = np.sort(np.array(beats))
    bent = swung(times, 1.0, ratio)
    assert np.all(np.diff(bent) >= -1e-9)
    np.testing.assert_allclose(swung(np.arange(5.0), 1.0, ratio), np.arange(5.0))
    np.testing.assert_allclose(swung(np.array([2.5]), 1.0, ratio), 2.0 + ratio)


def test_part_ends_a_note_before_its_pitch_repeats():
    part = make_part(
        0, False, np.array([1.0, 0.0, -0.2]), np.array([2.0, 1.5, 0.1]), np.array([60, 60, 64]),
        np.array([200.0, 10.0, 80.4]),
    )  # fmt: skip
    assert part.start.tolist() == [0.0, 0.0, 1.0]
    assert part.pitch.tolist() == [60, 64, 60]
    assert part.end[0] == pytest.approx(0.995)
    assert part.velocity.tolist() == [30, 80, 120]
