"""MNIST and the two data sets made to replace it, which share its files' names and format.

Found flat in a folder or in torchvision's layout, gzipped or unpacked. A local .gz need not be the published one bit by
bit (recompressing it changes nothing that matters); ``convolt data check`` tells whether its content is.
"""

from functools import partial
from pathlib import Path

import numpy as np

from convolt.data import Dataset, Split
from convolt.datasets.archive import shown
from convolt.datasets.idx import read_idx
from convolt.datasets.source import RemoteFile, Source
from convolt.errors import DataError

STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
HIRAGANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


def find(folder: Path, stem: str) -> Path | None:
    """The IDX file of this name in a folder, unpacked or .gz; unpacking it on some systems turns -idx into .idx."""
    dotted = stem.replace("-idx", ".idx")
    for name in (stem, f"{stem}.gz", dotted, f"{dotted}.gz"):
        if (folder / name).is_file():
            return folder / name
    return None


def load(folder: Path, name: str, classes: tuple[str, ...]) -> Dataset:
    """The training and test images of four IDX files. Raises DataError."""
    files = []
    for stem in STEMS:
        file = find(folder, stem)
        if file is None:
            raise DataError(f"{shown(folder)}: {stem}.gz is missing; put it there, or run: convolt data fetch {name}")
        files.append(file)
    train_images, train_labels, test_images, test_labels = files
    train = _load_split(train_images, train_labels, len(classes))
    return Dataset(name, train, None, _load_split(test_images, test_labels, len(classes)), classes)


def _load_split(image_file: Path, label_file: Path, num_classes: int) -> Split:
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(images) != len(labels):
        raise DataError(
            f"{shown(image_file)}: has {len(images):,} images, but {label_file.name} has {len(labels):,} labels; "
            "replace the file that is not of this data set"
        )
    if labels.max() >= num_classes:
        position = int(np.argmax(labels >= num_classes))
        raise DataError(
            f"{shown(label_file)}: label {labels[position]} at position {position} is out of range: there are "
            f"{num_classes} classes; replace the file"
        )
    return Split.of(images, labels, str(image_file))


def _source(
    name: str,
    description: str,
    license: str,
    citation: str,
    classes: tuple[str, ...],
    files: tuple[RemoteFile, ...],
    layout: str,
) -> Source:
    markers = (STEMS[0], f"{STEMS[0]}.gz", "train-images.idx3-ubyte", "train-images.idx3-ubyte.gz")
    return Source(
        name,
        description,
        license,
        citation,
        partial(load, name=name, classes=classes),
        files,
        markers,
        (f"{layout}/raw",),
    )


def _files(
    mirrors: tuple[str, ...],
    md5s: tuple[str, ...],
    sizes: tuple[int | None, ...],
    contents: tuple[str | None, ...] = (None,) * 4,
) -> tuple[RemoteFile, ...]:
    return tuple(
        RemoteFile(f"{stem}.gz", tuple(f"{mirror}{stem}.gz" for mirror in mirrors), md5, size, content_md5=content)
        for stem, md5, size, content in zip(STEMS, md5s, sizes, contents, strict=True)
    )


MNIST = _source(
    name="mnist",
    description="70,000 digits, 28x28 gray, 10 classes",
    license="CC BY-SA 3.0",
    citation="Y. LeCun et al., Gradient-based learning applied to document recognition, Proc. IEEE 86(11), 1998",
    classes=DIGITS,
    files=_files(
        mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
        md5s=(
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
        sizes=(9_912_422, 28_881, 1_648_877, 4_542),
        contents=(
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        ),
    ),
    layout="MNIST",
)

FASHION_MNIST = _source(
    name="fashion-mnist",
    description="70,000 clothes, 28x28 gray, 10 classes",
    license="MIT",
    citation="H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST: a novel image dataset, arXiv:1708.07747, 2017",
    classes=FASHION,
    files=_files(
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        md5s=(
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        sizes=(26_421_880, 29_515, 4_422_102, 5_148),
        contents=(
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "9018921c3c673c538a1fc5bad174d6f9",
            "8181f5470baa50b63fa0f6fddb340f0a",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
    ),
    layout="FashionMNIST",
)

KMNIST = _source(
    name="kmnist",
    description="70,000 hiragana, 28x28 gray, 10 classes",
    license="CC BY-SA 4.0",
    citation="T. Clanuwat et al., Deep learning for classical Japanese literature, arXiv:1812.01718, 2018",
    classes=HIRAGANA,
    files=_files(
        mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        md5s=(
            "bdb82020997e1d708af4cf47b453dcf7",
            "e144d726b3acfaa3e44228e80efcd344",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            "7320c461ea6c1c855c0b718fb2a4b134",
        ),
        sizes=(18_165_135, 29_497, None, None),  # the test files' sizes are not published
    ),
    layout="KMNIST",
)
