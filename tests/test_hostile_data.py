"""Data from strangers: each kind of bad file gets one line that names the file, and takes neither time nor memory."""

import gzip
import io
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from data_files import MIB, RNG, idx, member, noise, packed_tar, packed_zip, refused, tree, write_mnist, write_tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convolt.data import Dataset
from convolt.datasets import load_dataset
from convolt.errors import DataError

# -- IDX --------------------------------------------------------------------------------------------------------------


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
IMAGES, LABELS = RNG.integers(0, 256, (20, 28, 28), np.uint8), np.arange(20) % 10
PACKED = gzip.compress(idx(IMAGES))


@pytest.fixture
def mnist(tmp_path):
    """A folder with a small MNIST in which a test replaces a file."""
    write_mnist(tmp_path, {"train": (IMAGES, LABELS), "t10k": (IMAGES, LABELS)}, packed=False)
    assert len(load_dataset("mnist", tmp_path, valid=None).train) == 20
    return tmp_path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("not an IDX file", "nothing")),
        (b"<!DOCTYPE html>", ("not an IDX file", "3c 21 44 4f")),
        (idx(IMAGES, magic=b"\0\0\x0d\3"), ("not an IDX file", "00 00 0d 03")),
        (idx(LABELS), ("not an IDX file of 3 dimensions", "00 00 08 01")),
        (idx(IMAGES)[:10], ("not an IDX file",)),
        (idx(IMAGES)[:-1], ("(20, 28, 28)", "15,679 follow")),
        (idx(IMAGES) + b"x", ("more follow",)),
        (idx(IMAGES, shape=(0, 28, 28)), ("no data",)),
        (idx(IMAGES, shape=(2**32 - 1,) * 3), ("claims", "bomb")),
        (idx(IMAGES, shape=(2**20, 28, 28)), ("claims", "bomb")),
        (idx(IMAGES, shape=(40, 28, 28)), ("15,680 follow",)),
        (gzip.compress(idx(IMAGES, shape=(2**20, 28, 28))), ("claims", "bomb")),
        (gzip.compress(idx(IMAGES) + bytes(64 * MIB)), ("more follow",)),
        (PACKED[:-20], ("cannot be read",)),
        (PACKED[:-8] + bytes(8), ("cannot be read", "CRC")),
        (PACKED[:40] + b"\xff" * 40 + PACKED[80:], ("cannot be read",)),
        (b"\x1f\x8b", ("cannot be read",)),
        (idx(IMAGES[:19]), ("19 images", "20 labels")),
    ],
)
def test_idx_images(mnist, content, words):
    (mnist / TRAIN_IMAGES).write_bytes(content)
    with refused(str(mnist / TRAIN_IMAGES), *words):
        load_dataset("mnist", mnist)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.full(20, 10), (TRAIN_LABELS, "label 10", "out of range")),
        (np.full(20, 7), ("two classes", "'7'")),
        (LABELS[:18], ("20 images", "18 labels")),
    ],
)
def test_idx_labels(mnist, labels, words):
    (mnist / TRAIN_LABELS).write_bytes(idx(labels))
    with refused(*words):
        load_dataset("mnist", mnist)


def test_idx_file_missing_or_not_a_file(mnist):
    (mnist / TRAIN_LABELS).unlink()
    with refused(str(mnist), TRAIN_LABELS, "convolt data fetch mnist"):
        load_dataset("mnist", mnist)
    (mnist / TRAIN_LABELS).mkdir()
    with refused(TRAIN_LABELS, "missing"):
        load_dataset("mnist", mnist)


# -- CIFAR archives ---------------------------------------------------------------------------------------------------

CIFAR = "cifar-10-binary.tar.gz"
RECORDS = np.zeros((20, 3073), np.uint8)
RECORDS[:, 0] = np.arange(20) % 10
CIFAR_FILES = {f"data_batch_{batch}.bin": RECORDS.tobytes() for batch in range(1, 6)} | {
    "test_batch.bin": RECORDS.tobytes()
}


def cifar_archive(*extra, files=CIFAR_FILES):
    genuine = ((member(f"cifar-10-batches-bin/{name}", len(content)), content) for name, content in files.items())
    return packed_tar((*extra, *genuine))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ((member("../data_batch_1.bin", 1), b"x"), ("../data_batch_1.bin", "inside the archive")),
        ((member("/etc/passwd", 1), b"x"), ("/etc/passwd", "inside the archive")),
        ((member("a/data_batch_1.bin", kind=tarfile.SYMTYPE, target="/etc/passwd"), b""), ("plain files",)),
        ((member("a/data_batch_1.bin", kind=tarfile.LNKTYPE, target="../x"), b""), ("plain files",)),
        ((member("a/pipe", kind=tarfile.FIFOTYPE), b""), ("plain files",)),
        ((member("a/line\nbreak\x1b[31m", kind=tarfile.FIFOTYPE), b""), (r"line\nbreak\x1b",)),
    ],
)
def test_tar_members(tmp_path, extra, words):
    (tmp_path / CIFAR).write_bytes(cifar_archive(extra))
    with refused(CIFAR, *words):
        load_dataset("cifar10", tmp_path)


def bomb(*sizes):
    """A .tar.gz with members of zeros, in kilobytes."""
    compressor = zlib.compressobj(1, wbits=31)
    parts = []
    for size in sizes:
        parts.append(compressor.compress(member("a/zeros", size).tobuf()))
        parts += [compressor.compress(bytes(MIB)) for _ in range(size // MIB)]
    return b"".join(parts) + compressor.flush()


@pytest.mark.parametrize(("sizes", "word"), [((300 * MIB,), "claims"), ((200 * MIB, 100 * MIB), "decompression bomb")])
def test_tar_that_is_a_bomb(tmp_path, sizes, word):
    (tmp_path / CIFAR).write_bytes(bomb(*sizes))
    with refused(CIFAR, word):
        load_dataset("cifar10", tmp_path)


def test_tar_that_is_cut_incomplete_or_something_else(tmp_path):
    whole = cifar_archive()
    for content in (whole[: len(whole) // 2], whole[:-8] + bytes(8), b"text", gzip.compress(b"text" * 999), b""):
        (tmp_path / CIFAR).write_bytes(content)
        with refused(CIFAR, "fetch it again"):
            load_dataset("cifar10", tmp_path)
    rest = {name: content for name, content in CIFAR_FILES.items() if "3" not in name}
    (tmp_path / CIFAR).write_bytes(cifar_archive(files=rest))
    with refused(CIFAR, "no data_batch_3.bin"):
        load_dataset("cifar10", tmp_path)


def test_cifar_records(tmp_path):
    write_tree(tmp_path, CIFAR_FILES)
    load_dataset("cifar10", tmp_path)
    batch = tmp_path / "data_batch_2.bin"
    for content, words in (
        (RECORDS.tobytes()[:-1], ("truncated",)),
        (b"", ("truncated",)),
        (b"\x0b" + RECORDS.tobytes()[1:], ("label 11",)),
    ):
        batch.write_bytes(content)
        with refused(str(batch), *words):
            load_dataset("cifar10", tmp_path)
    batch.unlink()
    with refused(str(batch), "missing"):
        load_dataset("cifar10", tmp_path)


# -- arrays -----------------------------------------------------------------------------------------------------------

PIXELS, TARGETS = RNG.integers(0, 256, (20, 1, 4, 4), np.uint8), np.arange(20) % 2


def npy(header, content=b""):
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": PIXELS}, ("x_train",)),
        ({"x_train": PIXELS}, ("rename",)),
        ({"images": PIXELS, "labels": TARGETS[:9]}, ("9 labels",)),
        ({"images": PIXELS, "labels": TARGETS - 1}, ("label -1",)),
        ({"images": PIXELS, "labels": np.eye(2, dtype=int)[TARGETS]}, ("argmax",)),
        ({"images": PIXELS, "labels": TARGETS * 0.5}, ("integers",)),
        ({"images": PIXELS, "labels": TARGETS * 0}, ("two classes",)),
        ({"images": PIXELS, "labels": TARGETS.astype(str)}, ("numbers",)),
        ({"images": np.where(PIXELS[7, 0, 0, 0] == PIXELS, np.nan, PIXELS), "labels": TARGETS}, ("NaN",)),
        ({"images": np.array([{}] * 20), "labels": TARGETS}, ("Python objects",)),
        ({"x_train": PIXELS, "y_train": TARGETS, "x_test": PIXELS}, ("x_test and y_test belong together",)),
        ({"x_train": PIXELS, "y_train": TARGETS, "x_test": PIXELS[..., 1:], "y_test": TARGETS}, ("one shape",)),
    ],
)
def test_npz_arrays(tmp_path, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    with refused("bad", *words):
        load_dataset(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,), }"), ("1099511627776", "0 bytes")),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 4), }"), ("announces",)),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4), }", b"123"), ("3 bytes follow",)),
        (npy("__import__('os').system('true')"), ("cannot be read",)),
        (npy("{'descr': 'what', 'fortran_order': False, 'shape': (2, 4), }"), ("cannot be read",)),
        (b"\x93NUMPY\x09\x00", ("cannot be read",)),
        (b"text", ("cannot be read",)),
        (b"", ("cannot be read",)),
    ],
)
def test_npz_headers(tmp_path, content, words):
    (tmp_path / "bad.npz").write_bytes(packed_zip([("images.npy", content), ("labels.npy", content)]))
    with refused("bad.npz/images.npy", *words):
        load_dataset(tmp_path / "bad.npz")


def test_npz_that_inflates(tmp_path):
    np.savez_compressed(
        tmp_path / "bomb.npz", images=np.zeros((70, MIB // 64, 8, 8), np.uint8), labels=np.arange(70) % 2
    )
    with refused("bomb.npz/images.npy", "bomb"):
        load_dataset(tmp_path / "bomb.npz")


def test_text_renamed_npz(tmp_path):
    (tmp_path / "a.npz").write_text("a,b\n1,2\n")
    with refused("a.npz", "not a readable zip archive"):
        load_dataset(tmp_path / "a.npz")


# -- names and paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mnits", ("'mnits'", "did you mean 'mnist'")),
        ("no/such/folder", ("no/such/folder", "no such file or folder")),
        ("missing.npz", ("missing.npz", "no such file")),
        ("two\nlines", (r"two\nlines",)),
    ],
)
def test_names_that_stand_for_nothing(name, words):
    with refused(*words):
        load_dataset(name)


def test_file_that_is_no_data_set(tmp_path):
    (tmp_path / "data.csv").write_text("a,b\n")
    with refused("data.csv", "a folder, a .zip or a .npz"):
        load_dataset(tmp_path / "data.csv")


def test_root_that_does_not_exist(tmp_path):
    with refused(str(tmp_path / "nowhere"), "no such folder", "--data-dir"):
        load_dataset("mnist", tmp_path / "nowhere")


# -- anything else ----------------------------------------------------------------------------------------------------


def packed_npz():
    stream = io.BytesIO()
    np.savez_compressed(stream, images=PIXELS, labels=TARGETS)
    return stream.getvalue()


# A valid file of each kind, by its path in a folder: what to load (None: that path), content.
SOUND = {
    f"{TRAIN_IMAGES}.gz": ("mnist", PACKED),
    TRAIN_IMAGES: ("mnist", idx(IMAGES)),
    CIFAR: ("cifar10", cifar_archive()),
    "pets.zip": (None, packed_zip((tree() | {"cat/j.jpg": noise("JPEG")}).items(), zipfile.ZIP_DEFLATED)),
    "a.npz": (None, packed_npz()),
    "pets/cat/x.jpg": ("pets", noise("JPEG")),
    "pets/cat/x.png": ("pets", noise("PNG")),
    "pets/cat/x.bmp": ("pets", noise("BMP")),
    "pets/cat/x.ppm": ("pets", noise("PPM")),
    "pets/cat/x.webp": ("pets", noise("WEBP")),
}


@pytest.fixture
def load_with(tmp_path):
    """Put a content in the place of one of the sound files and load its data set."""
    write_tree(tmp_path / "pets", tree())
    write_mnist(tmp_path, {"train": (IMAGES, LABELS), "t10k": (IMAGES, LABELS)}, packed=False)
    (tmp_path / TRAIN_IMAGES).unlink()

    def load(name, content):
        write_tree(tmp_path, {name: content})
        return load_dataset(SOUND[name][0] or name, root=tmp_path, valid=None)

    return load


@pytest.mark.parametrize("name", SOUND)
def test_sound_file_loads(load_with, name):
    assert isinstance(load_with(name, SOUND[name][1]), Dataset)


@pytest.mark.parametrize("name", SOUND)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    keep=st.floats(0, 1),
)
def test_damage_is_noticed_or_harmless(load_with, name, damage, keep):
    content = SOUND[name][1]
    damaged = bytearray(content[: round(len(content) * keep)])
    for place, value in damage if damaged else ():
        damaged[int(place * len(damaged))] = value
    outcome = outcome_of(lambda: load_with(name, damaged))
    assert isinstance(outcome, Dataset) or str(outcome).isprintable()


def outcome_of(load):
    try:
        return load()
    except DataError as error:
        return error
