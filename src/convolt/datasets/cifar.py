"""CIFAR-10 and CIFAR-100 from the *binary* archives: fixed records, no pickle to execute.

    CIFAR-10    label | 3072 pixels (3, 32, 32)
    CIFAR-100   coarse label | fine label | 3072 pixels; the fine label is used

The archive, or its .bin files unpacked, flat or in the folder they unpack to. An archive is streamed: the members
named here are read into memory and nothing else is looked at. Folders or zips of the same images in class folders
(train.zip and test.zip) are read as well, by ``convolt.datasets.folder``.

Reference: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

import gzip
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convolt.data import Dataset, Split
from convolt.datasets import folder as image_folder
from convolt.datasets.archive import DAMAGED, escapes, shown
from convolt.datasets.source import RemoteFile, Source
from convolt.errors import DataError

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
MAX_UNPACKED = 256 * 2**20  # the genuine archives hold 185 MB
MIRRORS = ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/")
IMAGE_FOLDERS = ("train.zip", "train")


@dataclass(frozen=True)
class Archive:
    """One of the two data sets as its archive holds it."""

    name: str
    archive: str
    unpacked: str  # the folder in the archive
    train_files: tuple[str, ...]
    test_file: str
    label_bytes: int
    classes: tuple[str, ...]

    def load(self, folder: Path) -> Dataset:
        """The training and test images in this folder. Raises DataError."""
        files = (*self.train_files, self.test_file)
        for place in (folder, folder / self.unpacked):
            if any((place / file).is_file() for file in files):
                return self._dataset(place, {file: _read_file(place / file) for file in files})
        if (folder / self.archive).is_file():
            return self._dataset(folder / self.archive, _read_archive(folder / self.archive, files))
        if any((folder / name).exists() for name in IMAGE_FOLDERS):
            return self._named(image_folder.load(folder))
        raise DataError(
            f"{shown(folder)}: {self.archive} is missing; put it there, or run: convolt data fetch {self.name}"
        )

    def _dataset(self, where: Path, records: dict[str, bytes]) -> Dataset:
        train = [self._decode(records[file], where / file) for file in self.train_files]
        images, labels = (np.concatenate(part) for part in zip(*train, strict=True))
        test_images, test_labels = self._decode(records[self.test_file], where / self.test_file)
        test = Split.of(test_images, test_labels, str(where))
        return Dataset(self.name, Split.of(images, labels, str(where)), None, test, self.classes)

    def _decode(self, content: bytes, where: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        record = self.label_bytes + PIXELS
        if not content or len(content) % record:
            raise DataError(
                f"{shown(where)}: must be records of {record} bytes; has {len(content):,}: truncated or of another "
                "data set; replace it"
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, record)
        labels = records[:, self.label_bytes - 1].astype(np.int64)
        if labels.max() >= len(self.classes):
            raise DataError(
                f"{shown(where)}: label {labels.max()} is not one of {len(self.classes)} classes; replace it"
            )
        return records[:, self.label_bytes :].reshape(-1, *SHAPE), labels

    def _named(self, data: Dataset) -> Dataset:
        if data.classes != tuple(sorted(self.classes)) or data.input_shape != SHAPE:
            raise DataError(
                f"{data.name}: must hold the {len(self.classes)} classes of {self.name} as 32x32 RGB images; has "
                f"{data.num_classes} classes of {data.input_shape}: pass the folder itself as the data set"
            )
        return Dataset(self.name, data.train, data.valid, data.test, data.classes)


def _read_file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_UNPACKED:
            raise DataError(f"{shown(path)}: {size:,} bytes are more than the whole data set has; replace it")
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{shown(path)}: is missing; put all .bin files of the archive there") from None
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read ({shown(error)}); replace it") from None


class _Bounded(io.RawIOBase):
    """A stream that ends in a DataError when more is read from it than the genuine archive holds."""

    def __init__(self, stream: gzip.GzipFile, path: Path) -> None:
        self._stream, self._path, self._left = stream, path, MAX_UNPACKED

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left -= (count := self._stream.readinto(buffer))
        if self._left < 0:
            raise DataError(
                f"{shown(self._path)}: unpacks to more than {MAX_UNPACKED:,} bytes: a decompression bomb or another "
                "archive; replace it"
            )
        return count


def _read_archive(path: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path) as unpacked:
            bounded = _Bounded(unpacked, path)
            with tarfile.open(fileobj=bounded, mode="r|") as archive:
                for member in _vetted(archive, path):
                    base = PurePosixPath(member.name).name
                    content = archive.extractfile(member) if base in wanted else None
                    if content is not None:
                        found[base] = content.read()
            while bounded.read(2**16):  # the CRC stands at the end
                pass
    except (*DAMAGED, tarfile.TarError) as error:
        raise DataError(f"{shown(path)}: damaged ({shown(error)}); delete it and fetch it again") from None
    for name in wanted:
        if len(found.get(name, b"")) == 0:
            raise DataError(f"{shown(path)}: has no {name}; delete it and fetch it again")
    return found


def _vetted(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        if escapes(member.name) or not (member.isreg() or member.isdir()):
            raise DataError(
                f"{shown(f'{path}/{member.name}')}: members must be plain files inside the archive; replace it"
            )
        if member.size > MAX_UNPACKED:
            raise DataError(f"{shown(f'{path}/{member.name}')}: claims {member.size:,} bytes; do not use this file")
        yield member


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_CLASSES = (  # noqa: SIM905 (a list would take a line for each)
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
).split()

_CIFAR10 = Archive(
    name="cifar10",
    archive="cifar-10-binary.tar.gz",
    unpacked="cifar-10-batches-bin",
    train_files=tuple(f"data_batch_{batch}.bin" for batch in range(1, 6)),
    test_file="test_batch.bin",
    label_bytes=1,
    classes=CIFAR10_CLASSES,
)
_CIFAR100 = Archive(
    name="cifar100",
    archive="cifar-100-binary.tar.gz",
    unpacked="cifar-100-binary",
    train_files=("train.bin",),
    test_file="test.bin",
    label_bytes=2,
    classes=tuple(CIFAR100_CLASSES),
)


def _source(layout: Archive, description: str, md5: str, size: int, sha256: str | None = None) -> Source:
    urls = tuple(f"{mirror}{layout.archive}" for mirror in MIRRORS)
    return Source(
        name=layout.name,
        description=description,
        license="none stated; cite the report",
        citation="A. Krizhevsky, Learning multiple layers of features from tiny images, University of Toronto, 2009",
        load=layout.load,
        files=(RemoteFile(layout.archive, urls, md5, size, sha256),),
        markers=(layout.archive, layout.train_files[0], layout.test_file, layout.unpacked, *IMAGE_FOLDERS),
    )


CIFAR10 = _source(
    _CIFAR10,
    "60,000 photographs of 10 classes, 32x32, RGB",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    size=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
CIFAR100 = _source(
    _CIFAR100,
    "60,000 photographs of 100 classes, 32x32, RGB",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    size=168_513_733,
)
