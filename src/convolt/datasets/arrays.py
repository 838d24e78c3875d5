"""A .npz file of arrays: what ``numpy.savez`` writes, under the names that are in use.

    images, labels                      (split by seed)
    x_train, y_train, x_test, y_test    (Keras), optionally x_valid, y_valid

Images are (N, C, H, W), (N, H, W) or, as Keras and many others store color, (N, H, W, C) with 1 or 3 channels, which is
transposed. No pickle is read, ever. Each member's own header is compared with the archive's and with its size
before memory is taken: a header of a hundred bytes may claim terabytes.
"""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from convolt.data import TEST_FRACTION, Dataset, Split
from convolt.datasets.archive import DAMAGED, check_inflation, open_zip, shown
from convolt.errors import DataError

NAMINGS = (
    {"train": ("x_train", "y_train"), "valid": ("x_valid", "y_valid"), "test": ("x_test", "y_test")},
    {"train": ("images", "labels"), "valid": ("valid_images", "valid_labels"), "test": ("test_images", "test_labels")},
)


def load(path: Path, seed: int) -> Dataset:
    """The data set in a .npz file; without test images a part is held out by seed. Raises DataError."""
    with open_zip(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        names = next((naming for naming in NAMINGS if set(naming["train"]) <= members.keys()), None)
        if names is None:
            raise DataError(
                f"{shown(path)}: must have the arrays images and labels, or x_train, y_train, x_test and y_test; has "
                f"{shown(', '.join(sorted(members))) or 'none'}: rename them"
            )
        splits: dict[str, Split] = {}
        for split, (images, labels) in names.items():
            present = [name in members for name in (images, labels)]
            if any(present) and not all(present):
                raise DataError(f"{shown(path)}: {images} and {labels} belong together; one of them is missing: add it")
            if all(present):
                arrays = (_read_array(archive, members[name]) for name in (images, labels))
                splits[split] = Split.of(_channels_first(next(arrays)), next(arrays), f"{shown(path)}, {split}")
    train, valid, test = (splits.get(split) for split in ("train", "valid", "test"))
    assert train is not None  # the naming was chosen by it
    top = max(int(split.labels.max()) for split in splits.values())
    data = Dataset(path.stem, train, valid, test, tuple(str(label) for label in range(top + 1)))
    return data.hold_out("test", TEST_FRACTION, seed) if test is None else data


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    where = shown(f"{archive.filename}/{member.filename}")
    try:
        with archive.open(member) as stream:
            version = npy.read_magic(stream)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read_header(stream)
            expected = math.prod(shape) * dtype.itemsize
            stored = member.file_size - stream.tell()
        if dtype.hasobject:
            raise DataError(f"{where}: holds Python objects, which are never loaded; save plain numbers")
        if dtype.kind not in "uif":
            raise DataError(f"{where}: must hold numbers; holds {dtype}")
        if expected != stored or min(shape, default=0) < 0:
            raise DataError(
                f"{where}: its header announces {shape} {dtype}, but {stored:,} bytes follow; save it again"
            )
        check_inflation(where, member.compress_size, expected)
        with archive.open(member) as stream:
            array: NDArray[Any] = npy.read_array(stream, allow_pickle=False)
    except (*DAMAGED, MemoryError) as error:
        raise DataError(
            f"{where}: cannot be read as an array ({shown(error)}); save it again with numpy.savez"
        ) from None
    return array.astype(dtype.newbyteorder("="), copy=False)


def _channels_first(images: NDArray[Any]) -> NDArray[Any]:
    if images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return images
