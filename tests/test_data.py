import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convolt.data import Dataset, Split, stratified_order
from convolt.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


def pictures(n=40, shape=(3, 6, 5), dtype=np.uint8):
    """Images whose first pixel tells which one it is."""
    images = RNG.integers(0, 256, (n, *shape)).astype(dtype)
    images[:, 0, 0, 0] = np.arange(n)
    return images


def labels_of(n=40, classes=4):
    return np.arange(n) % classes


def refused(call, *words, error=DataError):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def identities(split):
    return set(split.images[:, 0, 0, 0].tolist())


def test_from_arrays_keeps_values_types_and_shapes():
    images, labels = pictures(), labels_of()
    data = Dataset.from_arrays(images, labels, valid=None)
    assert (data.train.images == images).all()
    assert (data.train.images.dtype, data.train.labels.dtype) == (np.uint8, np.int64)
    assert (data.input_shape, data.num_classes, len(data.train)) == ((3, 6, 5), 4, 40)
    assert (data.valid, data.test, data.classes) == (None, None, ("0", "1", "2", "3"))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_images_without_a_channel_axis_get_one(dtype):
    images = pictures(shape=(1, 6, 5), dtype=dtype)
    data = Dataset.from_arrays(images[:, 0], labels_of(), valid=None)
    assert data.train.images.dtype == dtype
    assert (data.train.images == images).all()


@pytest.mark.parametrize("labels", [labels_of().astype(np.uint8), labels_of()[:, None], labels_of().tolist()])
def test_labels_of_any_integer_form_become_int64(labels):
    data = Dataset.from_arrays(pictures(), labels, valid=None)
    assert data.train.labels.dtype == np.int64
    assert (data.train.labels == labels_of()).all()


def test_fractions_are_held_out_disjoint_and_stratified():
    data = Dataset.from_arrays(pictures(80), labels_of(80), valid=0.25, test=0.2)
    assert [(name, len(split)) for name, split in data.splits()] == [("train", 48), ("valid", 16), ("test", 16)]
    parts = [identities(split) for _, split in data.splits()]
    assert set.union(*parts) == set(range(80))
    for _, split in data.splits():
        assert set(np.bincount(split.labels)) == {len(split) // 4}
        assert (split.labels == split.images[:, 0, 0, 0] % 4).all()  # labels went with their images


def test_splits_depend_on_the_seed_alone():
    first, again, other = (Dataset.from_arrays(pictures(), labels_of(), seed=seed) for seed in (1, 1, 2))
    assert identities(first.valid) == identities(again.valid) != identities(other.valid)


def test_splits_that_are_given_are_kept():
    pair = pictures(8), labels_of(8)
    data = Dataset.from_arrays(pictures(), labels_of(), valid=pair, test=pair)
    assert (len(data.train), len(data.valid), len(data.test)) == (40, 8, 8)


def test_subset_is_stratified_and_nested():
    data = Dataset.from_arrays(pictures(), labels_of(), valid=0.2)
    small, large = data.subset(8, seed=3), data.subset(20, seed=3)
    assert identities(small.train) < identities(large.train) < identities(data.train)
    assert (np.bincount(small.train.labels) == 2).all()
    assert small.valid is data.valid


@pytest.mark.parametrize("n", [0, 1, 41, 2.0, True])
def test_subset_of_an_impossible_size_is_refused(n):
    data = Dataset.from_arrays(pictures(), labels_of(), valid=None)
    refused(lambda: data.subset(n), "subset=", "2 to the 40", error=ConfigError)


@pytest.mark.parametrize("fraction", [1.0, -0.1, 1.5, 0.001, 0.999])
def test_fraction_that_leaves_a_side_empty_is_refused(fraction):
    refused(lambda: Dataset.from_arrays(pictures(), labels_of(), valid=fraction), "valid=", error=ConfigError)


@pytest.mark.parametrize("fraction", [0, 0.0, None])
def test_nothing_is_held_out(fraction):
    assert Dataset.from_arrays(pictures(), labels_of(), valid=fraction).valid is None


@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.integers(0, 2**40))
def test_every_beginning_of_the_order_is_stratified(labels, seed):
    labels = np.array(labels)
    order = stratified_order(labels, seed, "test")
    assert sorted(order) == list(range(len(labels)))
    share = np.bincount(labels) / len(labels)
    for n in range(len(labels)):
        # Class k has r images among the first n when (r - 1/2) / n_k is at most the n-th position.
        held = np.bincount(labels[order[:n]], minlength=len(share))
        assert (np.abs(held - n * share) <= 1 + len(share) / 2).all()


@pytest.mark.parametrize("scale", [1, 255])
def test_mean_and_standard_deviation_per_channel(scale):
    images = pictures(700)
    given_images = images if scale == 255 else images.astype(np.float32)
    mean, std = Dataset.from_arrays(given_images, labels_of(700), valid=None).mean_std()
    np.testing.assert_allclose(mean, images.mean((0, 2, 3)) / scale, rtol=1e-12)
    np.testing.assert_allclose(std, images.std((0, 2, 3)) / scale, rtol=1e-12)


def test_standard_deviation_of_large_values_does_not_cancel():
    images = 1e8 + RNG.standard_normal((50, 1, 8, 8))
    _, (std,) = Dataset.from_arrays(images, labels_of(50), valid=None).mean_std()
    assert std == pytest.approx(images.std(), rel=1e-9)


def with_value(value, dtype=np.float32):
    images = pictures(dtype=dtype)
    images[17, 2, 1, 1] = value
    return images


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (with_value(np.nan), labels_of(), ("image 17", "NaN")),
        (with_value(np.inf, np.float64), labels_of(), ("image 17", "infinity")),
        (pictures(dtype=np.int64), labels_of(), ("int64", "astype")),
        (pictures(dtype=np.float16), labels_of(), ("float16", "astype")),
        (pictures()[0], labels_of(3)[:, None, None], ("labels",)),
        (pictures(shape=(8, 8, 3)), labels_of(), ("N H W C", "transpose(0, 3, 1, 2)")),
        (pictures()[:0], labels_of()[:0], ("at least one image",)),
        (pictures()[..., :0], labels_of(), ("at least one pixel",)),
        (np.zeros(40, np.uint8), labels_of(), ("(N, C, H, W)", "(40,)")),
        ([[1, 2], [3]], labels_of(2), ("my arrays",)),
        (pictures(), labels_of(39), ("39 labels", "40 images")),
        (pictures(), labels_of() - 1, ("label -1", "out of range")),
        (pictures(), np.where(labels_of() == 3, 10**9, labels_of()), ("label 1000000000", "out of range")),
        (pictures(), np.full(40, 2**64 - 1, np.uint64), ("out of range",)),
        (pictures(), labels_of().astype(float), ("integers", "float64")),
        (pictures(), np.eye(4, dtype=int)[labels_of()], ("argmax",)),
        (pictures(), np.full(40, 2), ("two classes", "'2'")),
    ],
)
def test_arrays_that_would_spoil_a_run_are_refused(images, labels, words):
    refused(lambda: Dataset.from_arrays(images, labels, name="my arrays"), "my arrays", *words)


def test_labels_beyond_the_class_names_are_refused():
    refused(lambda: Dataset.from_arrays(pictures(), labels_of(), classes=("a", "b", "c")), "label 3", "3 classes")


def test_one_split_with_labels_out_of_range_is_refused():
    train, test = Split.of(pictures(), labels_of(), "t"), Split.of(pictures(), labels_of() + 1, "t")
    refused(lambda: Dataset("mine", train, None, test, ("a", "b", "c", "d")), "mine", "label 4", "test split")


@pytest.mark.parametrize("other", [pictures(shape=(3, 6, 6)), pictures(dtype=np.float32)])
def test_splits_of_different_shape_or_type_are_refused(other):
    pair = other, labels_of()
    refused(lambda: Dataset.from_arrays(pictures(), labels_of(), test=pair, name="mine"), "mine", "one shape and type")


def test_a_given_split_with_nan_is_named():
    pair = with_value(np.nan), labels_of()
    images = pictures(dtype=np.float32)
    refused(lambda: Dataset.from_arrays(images, labels_of(), test=pair, name="mine"), "mine test", "image 17")


def test_a_split_of_the_wrong_type_is_refused():
    refused(lambda: Split(pictures(), labels_of().astype(np.int32)), "int32")
