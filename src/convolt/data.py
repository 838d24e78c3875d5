"""What a data set is once it is in memory: images, labels, class names, in up to three splits.

A batch is a slice of one array, so there is no loader process, no queue and nothing to tune: 60,000 MNIST images are
47 MB as uint8, CIFAR-10 is 184 MB. Images therefore stay uint8, N C H W, until an engine scales them by 1/255 in its
first kernel; float arrays are taken as they are.

Everything that could spoil a run in silence is refused here, before training: NaN, labels that are not class indices,
one class only, N H W C arrays, splits of different shapes. Where the arrays come from is the business of
``convolt.datasets``, which imports this module and never the other way round.

Which images are held out is a pure function of the seed (see ``stratified_order``). The test set is for one look at
the end; validation decides everything before it.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from convolt.errors import ConfigError, DataError
from convolt.rng import SampleRng

#: The part held out for testing when a data set has no test images of its own.
TEST_FRACTION = 0.2

SAMPLED_IMAGES = 1024  # how many images of a split, at least, its fingerprint looks at
IMAGE_DTYPES = (np.uint8, np.float32, np.float64)
MAX_CLASSES = 100_000  # a larger label is no class index, and a list of names for it would fill the memory


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    images: (N, C, H, W), uint8 in [0, 255], or float32 or float64 as the network shall see them.
    labels: (N,) int64, class indices.
    Raises DataError when they are not.
    """

    images: NDArray[Any]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        _check_images(self.images)
        _check_labels(self.labels, len(self.images))

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, images: ArrayLike, labels: ArrayLike, where: str) -> "Split":
        """A split from arrays of other forms: (N, H, W) images get one channel, integer labels become int64.

        where: the file or argument that an error names. Raises DataError.
        """
        try:
            return cls(_to_nchw(np.asarray(images)), _to_int64(np.asarray(labels)))
        except (DataError, ValueError) as error:  # ValueError: nested lists of unequal lengths
            raise DataError(f"{where}: {error}") from None

    def take(self, indices: NDArray[np.int64]) -> "Split":
        """The samples at these positions, copied."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training images, and validation and test images where there are any.

    classes: the name of each class; label k is classes[k]. origin: the arguments of ``load_dataset`` that gave it, so
    that a run can load it again; None for arrays.
    Raises DataError when the splits do not fit together or there is nothing to learn.
    """

    name: str
    train: Split
    valid: Split | None
    test: Split | None
    classes: tuple[str, ...]
    origin: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for split_name, split in self.splits():
            top = int(split.labels.max())
            if top >= len(self.classes):
                raise DataError(
                    f"{self.name}: label {top} in the {split_name} split is out of range: there are "
                    f"{len(self.classes)} classes, 0 to {len(self.classes) - 1}; correct the labels"
                )
            if split.images.shape[1:] != self.input_shape or split.images.dtype != self.train.images.dtype:
                raise DataError(
                    f"{self.name}: all splits must have one shape and type; train has {self.input_shape} "
                    f"{self.train.images.dtype}, {split_name} has {split.images.shape[1:]} {split.images.dtype}"
                )
        if (self.train.labels == self.train.labels[0]).all():
            only = self.classes[self.train.labels[0]]
            raise DataError(
                f"{self.name}: training needs at least two classes; all {len(self.train)} training images are of "
                f"class {only!r}: add images of another class"
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    def splits(self) -> Iterator[tuple[str, Split]]:
        """The splits that exist, with their names."""
        for name, split in (("train", self.train), ("valid", self.valid), ("test", self.test)):
            if split is not None:
                yield name, split

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over the training images, in the units a network sees.

        mean_c = sum x / M,   std_c = sqrt(sum (x - mean_c)^2 / M),   M = N H W; uint8 counts as x / 255.
        """
        images = self.train.images
        scale = 255.0 if images.dtype == np.uint8 else 1.0
        count = len(images) * images.shape[2] * images.shape[3]
        # Blocks keep the float64 copies small; the second pass avoids the cancellation of E[x^2] - E[x]^2.
        blocks = [images[start : start + 512] for start in range(0, len(images), 512)]
        mean = sum(block.sum(axis=(0, 2, 3), dtype=np.float64) for block in blocks) / count
        shift = np.reshape(mean, (-1, 1, 1))
        variance = sum(np.square(block - shift).sum(axis=(0, 2, 3)) for block in blocks) / count
        return tuple((mean / scale).tolist()), tuple((np.sqrt(variance) / scale).tolist())

    def fingerprint(self) -> dict[str, Any]:
        """What tells that a resumed run sees the same data, in the same order; plain values."""
        splits = dict(self.splits())
        return {
            "name": self.name,
            "classes": list(self.classes),
            "splits": {name: len(split) for name, split in splits.items()},
            "digests": {name: _digest(split) for name, split in splits.items()},
        }

    def subset(self, n: int, seed: int = 0) -> "Dataset":
        """The same data set with n training images: a seeded, stratified choice. Larger subsets hold smaller ones."""
        if isinstance(n, bool) or not isinstance(n, int) or not 1 < n <= len(self.train):
            raise ConfigError(f"subset={n!r} must be an integer from 2 to the {len(self.train)} images of {self.name}")
        chosen = stratified_order(self.train.labels, seed, "subset")[:n]
        return replace(self, train=self.train.take(np.sort(chosen)), origin=None)

    def hold_out(self, split: str, fraction: float | None, seed: int = 0) -> "Dataset":
        """The same data set with a stratified part of the training images moved to ``split``, "valid" or "test".

        fraction: in [0, 1); 0 or None moves nothing. Raises ConfigError.
        """
        if fraction is None or fraction == 0:
            return self
        count = round(fraction * len(self.train)) if 0 < fraction < 1 else 0
        if not 0 < count < len(self.train):
            raise ConfigError(
                f"{split}={fraction} must be a fraction in [0, 1) that leaves images on both sides; {self.name} has "
                f"{len(self.train)} training images"
            )
        order = stratified_order(self.train.labels, seed, split)
        held, kept = self.train.take(np.sort(order[:count])), self.train.take(np.sort(order[count:]))
        rest = replace(self, train=kept, origin=None)
        return replace(rest, valid=held) if split == "valid" else replace(rest, test=held)

    @classmethod
    def from_arrays(
        cls,
        images: ArrayLike,
        labels: ArrayLike,
        valid: float | tuple[ArrayLike, ArrayLike] | None = 0.1,
        test: float | tuple[ArrayLike, ArrayLike] | None = None,
        seed: int = 0,
        classes: Sequence[str] | None = None,
        name: str = "arrays",
    ) -> "Dataset":
        """A data set from arrays in memory.

        images: (N, C, H, W) or (N, H, W), uint8 (scaled to [0, 1] by the engine), float32 or float64 (as they are).
        labels: (N,) integers from 0. valid, test: a fraction to hold out of the images, a pair of arrays, or None.
        classes: names; "0", "1", ... when not given. Raises DataError, ConfigError.
        """
        train = Split.of(images, labels, name)
        valid_split = Split.of(*valid, f"{name} valid") if isinstance(valid, tuple) else None
        test_split = Split.of(*test, f"{name} test") if isinstance(test, tuple) else None
        given = [split for split in (train, valid_split, test_split) if split is not None]
        top = max(int(split.labels.max()) for split in given)
        names = tuple(str(label) for label in range(top + 1)) if classes is None else tuple(classes)
        for part, split in (("valid", valid_split), ("test", test_split)):
            unseen = np.setdiff1d([] if split is None or classes is not None else split.labels, train.labels)
            if unseen.size:
                raise DataError(
                    f"{name}: label {unseen[0]:g} of the {part} split never occurs in training; "
                    "correct the labels, or name the classes with classes="
                )
        data = cls(name, train, valid_split, test_split, names)
        if not isinstance(test, tuple):
            data = data.hold_out("test", test, seed)
        return data if isinstance(valid, tuple) else data.hold_out("valid", valid, seed)


def stratified_order(labels: NDArray[np.int64], seed: int, purpose: str) -> NDArray[np.int64]:
    """An order of the samples in which every beginning has the classes in (nearly) their proportions.

    Sample i draws a key; the r-th smallest of the n_k keys of class k stands at (r + 1/2) / n_k. A pure function of
    (seed, purpose, labels); a class of one image stands in the middle, so that small parts leave it in training.
    """
    keys = SampleRng(seed, 0, np.arange(len(labels))).words(purpose, 2)
    by_class = np.lexsort((keys[:, 1], keys[:, 0], labels))
    counts = np.bincount(labels)
    size = np.repeat(counts, counts)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    order: NDArray[np.int64] = by_class[np.argsort((rank + 0.5) / size, kind="stable")]
    return order


def _digest(split: Split) -> str:
    """A hash of all labels, and of images spread over the split: milliseconds, however large it is."""
    step = max(1, len(split) // SAMPLED_IMAGES)
    digest = hashlib.sha256(split.labels.tobytes())
    digest.update(split.images[::step].tobytes())
    return digest.hexdigest()[:16]


def _check_images(images: NDArray[Any]) -> None:
    shape, dtype = images.shape, images.dtype
    if images.ndim != 4:
        raise DataError(f"images must be (N, C, H, W) or (N, H, W); got shape {shape}")
    if dtype not in IMAGE_DTYPES:
        raise DataError(f"images must be uint8, float32 or float64; got {dtype}: convert them, e.g. astype('float32')")
    if not images.size:
        raise DataError(f"there must be at least one image, of at least one pixel; got shape {shape}")
    if shape[1] == shape[2] and shape[3] in (1, 3) and shape[1] > 4:
        raise DataError(f"images of shape {shape} look like N H W C; give N C H W: images.transpose(0, 3, 1, 2)")
    # The minimum and the maximum of an array with a NaN are NaN: no array of flags is needed.
    if dtype != np.uint8 and not np.isfinite([images.min(), images.max()]).all():
        bad = next(i for i in range(len(images)) if not np.isfinite(images[i]).all())
        raise DataError(f"image {bad} holds NaN or infinity; remove or repair it")


def _check_labels(labels: NDArray[Any], count: int) -> None:
    if labels.ndim == 2:
        raise DataError(f"labels must be (N,) class indices; got shape {labels.shape}: use labels.argmax(axis=1)")
    if labels.dtype != np.int64 or labels.ndim != 1:
        raise DataError(f"labels must be (N,) integers; got shape {labels.shape}, {labels.dtype}")
    if len(labels) != count:
        raise DataError(f"there must be one label for each image; got {len(labels)} labels for {count} images")
    low, top = int(labels.min()), int(labels.max())
    if low < 0 or top >= MAX_CLASSES:
        bad = low if low < 0 else top
        raise DataError(f"labels must be class indices from 0 to {MAX_CLASSES - 1}; label {bad} is out of range")


def _to_nchw(images: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(images[:, None] if images.ndim == 3 else images)


def _to_int64(labels: NDArray[Any]) -> NDArray[Any]:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    # uint64 above 2^63 turns negative, which the range check then refuses.
    return labels.astype(np.int64) if labels.dtype.kind in "iu" else labels
