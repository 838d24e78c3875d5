"""Counter-based random numbers: known answers, independence of the batch, and distribution."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convolt.errors import ConfigError
from convolt.rng import SampleRng, permutation, philox4x32, sorted_by

ONES = "ffffffff"
KNOWN_ANSWERS = [  # counter, key, output: philox4x32 10 of Random123's kat_vectors
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (f"{ONES} " * 4, f"{ONES} " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

seeds = st.integers(0, 2**64 - 1)
epochs = st.integers(0, 2**32 - 1)
index_arrays = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40).map(lambda i: np.array(i, np.int64))


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(counter, key, output):
    np.testing.assert_array_equal(philox4x32(words(counter), words(key)), words(output))


def test_philox_takes_counters_of_any_shape():
    counters = np.stack([words(counter) for counter, _, _ in KNOWN_ANSWERS[:1] * 6]).reshape(2, 3, 4)
    assert philox4x32(counters, words(KNOWN_ANSWERS[0][1])).shape == (2, 3, 4)
    np.testing.assert_array_equal(philox4x32(counters, words("0 0"))[1, 2], words(KNOWN_ANSWERS[0][2]))


def test_sample_words_are_philox_of_the_documented_counter():
    drawn = SampleRng(seed=2**40 + 5, epoch=3, indices=np.array([9, 70_000])).words("flip", 6)
    crc = 0xFFFFFFFF  # CRC-32 by its definition, so that the counter's layout cannot change unseen
    for byte in b"flip":
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0xEDB88320 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    key = np.array([5, 2**8], np.uint32)
    counters = np.array([[[block, sample, 3, crc] for block in (0, 1)] for sample in (9, 70_000)], np.uint32)
    np.testing.assert_array_equal(drawn, philox4x32(counters, key).reshape(2, 8)[:, :6])


@settings(max_examples=50, deadline=None)
@given(
    seed=seeds, epoch=epochs, indices=index_arrays, cut=st.integers(0, 40), shape=st.sampled_from([(), (1,), (3, 5)])
)
def test_draws_do_not_depend_on_the_batch(seed, epoch, indices, cut, shape):
    batch = SampleRng(seed, epoch, indices)
    whole = batch.uniform("dropout:3", shape)
    assert whole.shape == (len(indices), *shape)
    parts = [batch[:cut].uniform("dropout:3", shape), batch[cut:].uniform("dropout:3", shape)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    reverse = SampleRng(seed, epoch, indices[::-1]).uniform("dropout:3", shape)
    np.testing.assert_array_equal(whole[::-1], reverse)


def test_draws_do_not_depend_on_how_many_are_taken_at_once():
    long = SampleRng(0, 0, np.arange(3)).words("mask", 40_001)
    for count in (0, 1, 4, 1023):
        np.testing.assert_array_equal(SampleRng(0, 0, np.arange(3)).words("mask", count), long[:, :count])


def test_seed_epoch_sample_and_purpose_each_change_the_draws():
    base = SampleRng(1, 2, np.array([3])).words("flip", 8)
    others = [
        SampleRng(2, 2, np.array([3])).words("flip", 8),
        SampleRng(1 + 2**32, 2, np.array([3])).words("flip", 8),
        SampleRng(1, 3, np.array([3])).words("flip", 8),
        SampleRng(1, 2, np.array([4])).words("flip", 8),
        SampleRng(1, 2, np.array([3])).words("crop", 8),
    ]
    assert not any((base == other).any() for other in others)


def test_uniform_numbers_are_uniform():
    drawn = SampleRng(0, 0, np.arange(100)).uniform("u", (1000,))
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, bins=64, range=(0, 1))[0]
    expected = drawn.size / 64
    assert np.sum((counts - expected) ** 2) / expected < 120  # chi-square, 63 degrees of freedom: p = 2e-5
    pairs = np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]
    samples = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]
    assert max(abs(pairs), abs(samples)) < 0.015  # five standard errors


@given(low=st.integers(-(2**40), 2**40), width=st.integers(1, 2**32))
def test_integers_stay_in_their_range(low, width):
    drawn = SampleRng(0, 0, np.arange(16)).integers("i", low, low + width, (4,))
    assert drawn.dtype == np.int64
    assert drawn.shape == (16, 4)
    assert low <= drawn.min() <= drawn.max() < low + width


def test_integers_are_uniform():
    counts = np.bincount(SampleRng(7, 0, np.arange(9000)).integers("i", 0, 9))
    assert len(counts) == 9
    assert np.sum((counts - 1000) ** 2) / 1000 < 40  # chi-square, 8 degrees of freedom: p = 3e-6


@given(seed=seeds, epoch=epochs, n=st.integers(0, 300))
def test_permutation_holds_every_index_once(seed, epoch, n):
    np.testing.assert_array_equal(np.sort(permutation(seed, epoch, n)), np.arange(n))


def test_permutation_changes_with_seed_and_epoch_and_moves_everything_about():
    orders = [permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for position, order in enumerate(orders):
        assert np.sum(order == np.arange(1000)) < 12  # one fixed point is expected
        for other in orders[position + 1 :]:
            assert np.sum(order == other) < 12


def test_samples_with_equal_keys_keep_their_order():
    keys = np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint64)
    np.testing.assert_array_equal(sorted_by(keys), np.argsort(keys, kind="stable"))
    distinct = np.random.default_rng(0).permutation(2000).astype(np.uint64)
    np.testing.assert_array_equal(sorted_by(distinct), np.argsort(distinct, kind="stable"))


def test_permutation_of_fewer_samples_is_the_same_order_without_the_others():
    order = permutation(0, 5, 500)
    np.testing.assert_array_equal(order[order < 200], permutation(0, 5, 200))


@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "i8", ">i8", "u1", "u4", "u8", "f8", "O"])
def test_indices_of_any_kind(kind):
    """What is negative or has more than 32 bits is refused, whatever holds it."""
    want = SampleRng(1, 2, np.array([3, 100])).words("flip", 2)
    np.testing.assert_array_equal(SampleRng(1, 2, np.array([3, 100], kind)).words("flip", 2), want)
    for wrong in [] if kind.startswith("u") else [[-1], [5, -3]]:
        with pytest.raises(ConfigError, match="indices must be"):
            SampleRng(1, 2, np.array(wrong, kind))
    if kind[-1] == "8":
        with pytest.raises(ConfigError, match="indices must be"):
            SampleRng(1, 2, np.array([7, 2**32], kind))
    assert len(SampleRng(1, 2, np.array([], kind))) == 0


@pytest.mark.parametrize(
    ("seed", "epoch", "index", "word"),
    [
        (-1, 0, 0, "seed"),
        (2**64, 0, 0, "seed"),
        (0, -1, 0, "epoch"),
        (0, 2**32, 0, "epoch"),
        (0, 0, -1, "indices"),
        (0, 0, 2**32, "indices"),
    ],
)
def test_what_does_not_fit_the_counter_is_refused(seed, epoch, index, word):
    with pytest.raises(ConfigError, match=f"SampleRng: {word} must"):
        SampleRng(seed, epoch, np.array([index]))


def test_an_empty_range_is_refused():
    with pytest.raises(ConfigError, match="high must be > low"):
        SampleRng(0, 0, np.arange(2)).integers("i", 3, 3)
