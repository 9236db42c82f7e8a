"""Randomness: every number is a function of (seed, stream, step, position) and of nothing else."""

from __future__ import annotations

import itertools
import zlib
from fractions import Fraction

import numpy as np
import pytest

from sdxl_host import randomness
from sdxl_host.randomness import Stream, generator, named, normals, uniforms

COUNT = 4000
# Five standard deviations of the mean of COUNT independent draws with variance 1.
FIVE_SIGMA = 5 / np.sqrt(COUNT)
EVERY = range(COUNT)


def raw(seed, stream, step, position):
    return generator(seed, stream, step, position).bit_generator.random_raw()


# ---- uniforms


@pytest.mark.parametrize("step", [1, 2, 100_000])
def test_uniforms_are_k_and_a_half_over_two_to_the_53(step):
    """u is the float64 nearest to (k + 0.5) / 2^53, k the upper 53 bits of Philox's word."""
    positions = range(500)
    u = uniforms(7, Stream.NOISE_LEVEL, step, positions)
    assert u.dtype == np.float64
    assert u.shape == (500,)
    for value, position in zip(u, positions, strict=True):
        k = raw(7, Stream.NOISE_LEVEL, step, position) >> 11
        assert value == float(Fraction(2 * k + 1, 2**54))
    assert ((u > 0) & (u < 1)).all()


@pytest.mark.parametrize("word", [0, 1, 2**63, 2**64 - 2**12, 2**64 - 2**11, 2**64 - 1])
def test_no_word_of_the_generator_gives_0_or_1(monkeypatch, word):
    """Inverse CDFs are infinite at 0 and 1, so not even the extreme words may lead there."""

    class Fixed:
        def random_raw(self):
            return word

    monkeypatch.setattr(randomness, "_philox", lambda *key: Fixed())
    (u,) = uniforms(1, Stream.NOISE_LEVEL, 1, [0])
    assert 0 < u < 1


def test_uniforms_are_uniform():
    u = uniforms(42, Stream.NOISE_LEVEL, 1, EVERY)
    assert abs(u.mean() - 0.5) < FIVE_SIGMA * np.sqrt(1 / 12)
    assert abs(u.var() - 1 / 12) < FIVE_SIGMA * np.sqrt(1 / 180)
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    assert np.sum((counts - COUNT / 20) ** 2 / (COUNT / 20)) < 60  # chi-square with 19 degrees


def test_normals_are_standard():
    n = normals(42, Stream.NOISE, 1, range(COUNT // 8), (2, 2, 2))
    assert n.dtype == np.float32
    assert n.shape == (COUNT // 8, 2, 2, 2)
    assert abs(n.mean()) < FIVE_SIGMA
    assert abs(n.var() - 1) < FIVE_SIGMA * np.sqrt(2)
    assert abs((n**3).mean()) < FIVE_SIGMA * np.sqrt(15)
    assert abs((n**4).mean() - 3) < FIVE_SIGMA * np.sqrt(96)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((42, Stream.NOISE, 1, 0), (42, Stream.NOISE, 2, 0)),
        ((42, Stream.NOISE, 1, 0), (42, Stream.NOISE, 1, COUNT)),
        ((42, Stream.NOISE, 1, 0), (42, Stream.NOISE, 1, 1)),
        ((42, Stream.NOISE, 1, 0), (42, Stream.NOISE_LEVEL, 1, 0)),
        ((42, Stream.NOISE, 1, 0), (43, Stream.NOISE, 1, 0)),
        ((1, Stream.OFFSET, 1, 0), (3, Stream.NOISE_LEVEL, 1, 0)),
    ],
    ids=["step", "position", "neighbours", "stream", "seed", "seed and stream exchanged"],
)
def test_draws_do_not_correlate(one, other):
    def row(seed, stream, step, first):
        return uniforms(seed, stream, step, range(first, first + COUNT))

    assert abs(np.corrcoef(row(*one), row(*other))[0, 1]) < FIVE_SIGMA


def test_step_and_position_are_not_interchangeable():
    table = {raw(1, Stream.NOISE, step, place) for step in range(40) for place in range(40)}
    assert len(table) == 1600


# ---- a function of its arguments


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[3], [0, 1, 2]]])
def test_splitting_a_batch_changes_no_bit(parts):
    together = normals(42, Stream.NOISE, 5, range(4), (3, 4, 4))
    levels = uniforms(42, Stream.NOISE_LEVEL, 5, range(4))
    for part in parts:
        assert np.array_equal(normals(42, Stream.NOISE, 5, part, (3, 4, 4)), together[part])
        assert np.array_equal(uniforms(42, Stream.NOISE_LEVEL, 5, part), levels[part])


def test_nothing_is_carried_from_draw_to_draw():
    first = normals(42, Stream.NOISE, 3, [1], (8,))
    generator(42, Stream.NOISE, 3, 1).standard_normal(1000)
    uniforms(42, Stream.NOISE, 3, range(10))
    np.random.default_rng(0).random()
    assert np.array_equal(normals(42, Stream.NOISE, 3, [1], (8,)), first)


def test_no_positions_no_draws():
    assert uniforms(1, Stream.DROPOUT, 1, []).shape == (0,)
    assert normals(1, Stream.NOISE, 1, [], (3, 2)).shape == (0, 3, 2)


# ---- streams


def test_no_two_streams_share_a_number():
    """Nor do two seeds, steps or positions, over a few thousand words each."""
    seen: dict[int, tuple[int, ...]] = {}
    for seed, stream, step, position in itertools.product((0, 1, 42), Stream, (1, 2), (0, 1)):
        words = generator(seed, stream, step, position).bit_generator.random_raw(200)
        for word in words.tolist():
            assert word not in seen, f"{(seed, stream, step, position)} repeats {seen[word]}"
            seen[word] = (seed, stream, step, position)


def test_a_long_draw_does_not_run_into_the_next_position():
    """A position's numbers are not a later stretch of another's."""
    long = generator(1, Stream.NOISE, 1, 0).bit_generator.random_raw(100_000)
    for step, position in ((1, 1), (2, 0), (1, 2)):
        following = generator(1, Stream.NOISE, step, position).bit_generator.random_raw(4)
        assert not np.isin(following, long).any()


def test_streams_keep_their_numbers():
    """They are part of what makes a run repeatable: new streams get new numbers."""
    assert {stream.name: int(stream) for stream in Stream} == {
        "NOISE_LEVEL": 1,
        "NOISE": 2,
        "OFFSET": 3,
        "POSTERIOR": 4,
        "DROPOUT": 5,
        "CROP": 6,
        "ORDER": 7,
        "INITIAL_WEIGHTS": 8,
        "SAMPLING": 9,
        "CAPTION": 10,
        "VARIANT": 11,
        "VARIANT_CROP": 12,
        "BATCHES": 13,
    }


# ---- named


def test_named_is_a_function_of_seed_and_name():
    one = named(42, "weight").standard_normal(50)
    assert np.array_equal(named(42, "weight").standard_normal(50), one)
    for other in (named(42, "bias"), named(43, "weight"), named(42, "Weight")):
        assert not np.isin(other.standard_normal(50), one).any()


def test_named_is_the_stream_of_initial_weights_at_the_names_checksum():
    place = zlib.crc32(b"weight")
    expected = generator(42, Stream.INITIAL_WEIGHTS, 0, place).random(4)
    assert np.array_equal(named(42, "weight").random(4), expected)


# ---- frozen: a change of NumPy or of the scheme is seen here

GOLDEN_RAW = {
    (42, Stream.NOISE_LEVEL, 1, 0): 14735341688256842546,
    (42, Stream.NOISE, 1, 0): 15823350586467578330,
    (42, Stream.NOISE, 100_000, 15): 11775253740859290563,
    (0, Stream.SAMPLING, 0, 0): 14777704617784931010,
    (2**64 - 1, Stream.CROP, 3, 2): 3288119669671732000,
}


GOLDEN_NORMALS = [[-1.8673863, -1.3462001, 1.9302555], [1.2743263, -0.89717036, -1.5246276]]


@pytest.mark.parametrize("key", GOLDEN_RAW, ids=str)
def test_golden_words(key):
    assert raw(*key) == GOLDEN_RAW[key]


def test_golden_uniforms():
    assert uniforms(42, Stream.NOISE_LEVEL, 1, range(3)).tolist() == [
        0.7988044735362145,
        0.3035831924666756,
        0.15849833434833455,
    ]


def test_golden_normals():
    drawn = normals(42, Stream.NOISE, 1, [0, 1], (3,))
    np.testing.assert_allclose(drawn, GOLDEN_NORMALS, rtol=1e-6)


def test_golden_named_and_permutation():
    assert named(42, "model.diffusion_model.out.2.weight").uniform(-1, 1, 2).tolist() == [
        -0.902122907221206,
        -0.2567135970649923,
    ]
    assert generator(42, Stream.ORDER, 0).permutation(8).tolist() == [1, 4, 0, 6, 2, 5, 7, 3]
