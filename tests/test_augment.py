"""Augmentation: what each does to an image, and that a sample's fate does not depend on its batch."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convolt.augment import AUGMENTS, AlternatingFlip, Crop, Cutout, Flip, Mixup, symmetric_beta
from convolt.errors import ConfigError, DataError
from convolt.rng import SampleRng

N, C, H, W, CLASSES = 24, 3, 8, 10, 5
generator = np.random.default_rng(0)
IMAGES = generator.integers(1, 256, (N, C, H, W), dtype=np.uint8)
LABELS = generator.integers(0, CLASSES, N)
EACH = [Flip(), Flip(p=0.2), AlternatingFlip(), Crop(padding=2), Crop(padding=4, mode="zeros"), Cutout(size=3)]
ALL = [*EACH, Mixup()]


def rng(seed=0, epoch=0, n=N):
    return SampleRng(seed, epoch, np.arange(1000, 1000 + n))


def name(augment):
    return repr(augment)


@settings(max_examples=25, deadline=None)
@given(augment=st.sampled_from(EACH), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 100), data=st.data())
def test_a_sample_does_not_depend_on_its_batch(augment, seed, epoch, data):
    assert augment.per_sample
    draws = rng(seed, epoch)
    whole, labels = augment(IMAGES, LABELS, draws, CLASSES)
    np.testing.assert_array_equal(labels, LABELS)
    cut = data.draw(st.integers(0, N))
    parts = [augment(IMAGES[part], LABELS[part], draws[part], CLASSES)[0] for part in (slice(0, cut), slice(cut, N))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    order = np.array(data.draw(st.permutations(range(N))))
    shuffled = SampleRng(seed, epoch, draws.indices[order])
    np.testing.assert_array_equal(whole[order], augment(IMAGES[order], LABELS[order], shuffled, CLASSES)[0])


@pytest.mark.parametrize("augment", ALL, ids=name)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_inputs_are_left_alone_and_types_kept(augment, dtype):
    images, labels = IMAGES.astype(dtype), LABELS.copy()
    before = images.copy()
    images.flags.writeable = labels.flags.writeable = False
    changed, _ = augment(images, labels, rng(), CLASSES)
    np.testing.assert_array_equal(images, before)
    assert changed.shape == images.shape
    assert changed.flags.c_contiguous
    assert changed.dtype == (np.float32 if isinstance(augment, Mixup) and dtype == np.uint8 else dtype)
    changed[...] = 0  # the result is the caller's own
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("augment", [*EACH[:2], *EACH[3:], Mixup()], ids=name)
def test_seed_and_epoch_change_the_result(augment):
    first, _ = augment(IMAGES, LABELS, rng(), CLASSES)
    for other in (rng(seed=1), rng(epoch=1)):
        assert (augment(IMAGES, LABELS, other, CLASSES)[0] != first).any()


@pytest.mark.parametrize("augment", ALL, ids=name)
def test_an_empty_batch_stays_empty(augment):
    images, _ = augment(IMAGES[:0], LABELS[:0], rng(n=0), CLASSES)
    assert images.shape == (0, C, H, W)


def flipped(augment, seed=0, epoch=0, n=1):
    """Which images were mirrored; each must be mirrored or unchanged as a whole."""
    images = np.broadcast_to(IMAGES[0], (n, C, H, W))
    changed, _ = augment(images, np.zeros(n, np.int64), rng(seed, epoch, n), CLASSES)
    mirrored = (changed == IMAGES[0][:, :, ::-1]).all(axis=(1, 2, 3))
    assert (mirrored | (changed == IMAGES[0]).all(axis=(1, 2, 3))).all()
    return mirrored


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_flip_mirrors_the_part_p(p):
    n = 4000
    assert abs(flipped(Flip(p), n=n).mean() - p) <= 5 * math.sqrt(p * (1 - p) / n)


@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 200))
def test_alternating_flip_shows_each_image_both_ways_in_turn(seed, epoch):
    this, following, after = (flipped(AlternatingFlip(), seed, epoch + k, n=64) for k in range(3))
    np.testing.assert_array_equal(following, ~this)
    np.testing.assert_array_equal(after, this)


def test_alternating_flip_begins_with_half_of_the_images():
    assert abs(flipped(AlternatingFlip(), n=4000).mean() - 0.5) < 0.04


@pytest.mark.parametrize(("mode", "pad"), [("reflect", "reflect"), ("zeros", "constant")])
@pytest.mark.parametrize("padding", [1, 4, 6])
def test_crop_is_a_window_of_the_padded_image(mode, pad, padding):
    n = 3000
    images = np.broadcast_to(IMAGES[0], (n, C, H, W))
    changed, _ = Crop(padding, mode)(images, np.zeros(n, np.int64), rng(n=n), CLASSES)
    padded = np.pad(IMAGES[0], ((0, 0), (padding, padding), (padding, padding)), pad)
    shifts = 2 * padding + 1
    counts = [
        np.sum((changed == padded[:, y : y + H, x : x + W]).all(axis=(1, 2, 3)))
        for y in range(shifts)
        for x in range(shifts)
    ]
    assert sum(counts) == n
    expected = n / shifts**2
    chi_square = np.sum((np.array(counts) - expected) ** 2) / expected
    assert chi_square < shifts**2 + 5 * math.sqrt(2 * shifts**2)


@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_cutout_paints_a_square_cut_off_at_the_edges(size):
    n = 2000
    images = np.broadcast_to(IMAGES[0], (n, C, H, W))
    changed, _ = Cutout(size)(images, np.zeros(n, np.int64), rng(n=n), CLASSES)
    painted = (changed == 0).all(axis=1)  # no pixel of IMAGES is 0
    np.testing.assert_array_equal(changed, np.where(painted[:, None], 0, images))
    first_corners = set()
    for mask in painted:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        np.testing.assert_array_equal(mask, np.logical_and.outer(mask.any(axis=1), mask.any(axis=0)))
        for covered, extent in ((rows, H), (columns, W)):
            assert covered[-1] - covered[0] + 1 == len(covered)
            assert len(covered) == min(size, extent) or covered[0] == 0 or covered[-1] == extent - 1
        first_corners.add((rows[0], columns[0], rows[-1], columns[-1]))
    if size == 1:
        assert len(first_corners) == H * W  # each pixel can be the center


def test_cutout_fills_with_a_brightness():
    images = np.zeros((N, C, H, W), np.float32)
    assert set(np.unique(Cutout(size=3, fill=0.5)(images, LABELS, rng(), CLASSES)[0])) == {0.0, 0.5}
    dark = np.zeros((N, C, H, W), np.uint8)
    assert set(np.unique(Cutout(size=3, fill=0.5)(dark, LABELS, rng(), CLASSES)[0])) == {0, 128}


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup_blends_with_the_next_sample(alpha):
    mixed, targets = Mixup(alpha)(IMAGES, LABELS, rng(), CLASSES)
    weight = symmetric_beta(rng().uniform("mixup", (2,)), alpha)
    x, q = IMAGES / 255, np.eye(CLASSES)[LABELS]
    for n in range(N):
        partner = (n + 1) % N
        np.testing.assert_allclose(mixed[n], weight[n] * x[n] + (1 - weight[n]) * x[partner], atol=1e-6)
        np.testing.assert_allclose(targets[n], weight[n] * q[n] + (1 - weight[n]) * q[partner], atol=1e-6)
    np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)
    assert targets.dtype == np.float32
    assert not Mixup(alpha).per_sample


def test_mixup_takes_floats_as_they_are_and_probabilities_as_targets():
    images = IMAGES.astype(np.float64)
    once, targets = Mixup()(images, LABELS, rng(), CLASSES)
    assert once.max() > 100
    twice, again = Mixup()(once, targets, rng(epoch=1), CLASSES)
    np.testing.assert_allclose(again.sum(axis=1), 1, atol=1e-6)
    alone, own = Mixup()(images[:1], LABELS[:1], rng(n=1), CLASSES)
    np.testing.assert_allclose(alone, images[:1])
    np.testing.assert_allclose(own, np.eye(CLASSES)[LABELS[:1]], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 4.0])
def test_symmetric_beta_has_the_distribution_of_numpys(alpha):
    n = 20_000
    ours = np.sort(symmetric_beta(rng(n=n).uniform("mixup", (2,)), alpha))
    theirs = np.sort(np.random.default_rng(1).beta(alpha, alpha, n))
    assert 0 <= ours[0] <= ours[-1] <= 1
    assert ours.mean() == pytest.approx(0.5, abs=5 * theirs.std() / math.sqrt(n))
    assert ours.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
    grid = np.linspace(0.001, 0.999, 500)
    distance = np.abs(np.searchsorted(ours, grid) - np.searchsorted(theirs, grid)).max() / n
    assert distance < 2 * math.sqrt(2 / n)  # Kolmogorov-Smirnov: p = 7e-4


def test_symmetric_beta_survives_the_extremes():
    corners = np.array([[u, v] for u in (0.0, 1 - 2**-24) for v in (0.0, 0.25, 0.5, 1 - 2**-24)], np.float32)
    for alpha in (1e-4, 0.2, 1.0, 1e4):
        weight = symmetric_beta(corners, alpha)
        assert ((weight >= 0) & (weight <= 1)).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Flip(p=1.1), "Flip: p must be >= 0 and <= 1; got 1.1"),
        (lambda: Crop(padding=0), "Crop: padding must be an integer >= 1; got 0"),
        (lambda: Crop(padding=1.5), "Crop: padding must be an integer >= 1; got 1.5"),
        (lambda: Crop(mode="zero"), "Crop: mode got 'zero'; did you mean 'zeros'? valid: reflect, zeros"),
        (lambda: Cutout(size=-8), "Cutout: size must be an integer >= 1; got -8"),
        (lambda: Cutout(fill=128), "Cutout: fill must be >= 0 and <= 1; got 128"),
        (lambda: Mixup(alpha=0), "Mixup: alpha must be > 0; got 0"),
        (
            lambda: Crop(padding=8)(IMAGES, LABELS, rng(), CLASSES),
            "Crop: padding must be < 8 to mirror images of 8x10; got 8; give less padding or mode='zeros'",
        ),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(ConfigError) as caught:
        build()
    assert str(caught.value) == message


def test_mixup_refuses_a_label_out_of_range():
    with pytest.raises(DataError, match="labels must be >= 0 and < 2"):
        Mixup()(IMAGES, LABELS, rng(), 2)


def test_every_augmentation_has_defaults_that_work():
    for augment in AUGMENTS:
        images, targets = augment()(IMAGES, LABELS, rng(), CLASSES)
        assert len(images) == len(targets) == N
