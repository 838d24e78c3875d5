"""Files of every kind that a data set may consist of, sound and hostile ones, and how a refusal is told."""

import gzip
import io
import struct
import tarfile
import tracemalloc
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from convolt.errors import DataError

RNG = np.random.default_rng(0)
MIB = 2**20


@contextmanager
def refused(*words, peak=16 * MIB):
    """One printable line with these words in it, and never more memory than ``peak``."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            yield
        assert tracemalloc.get_traced_memory()[1] < peak
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.isprintable()
    for word in words:
        assert word in message, message


def idx(array, shape=None, magic=None):
    """An IDX file; shape and magic are what its header says."""
    shape = array.shape if shape is None else shape
    header = magic or bytes((0, 0, 8, len(shape)))
    return header + struct.pack(f">{len(shape)}I", *shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder, arrays, packed=True, hyphen="-"):
    """Four IDX files. arrays: {"train": (images, labels), "t10k": ...}."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in arrays.items():
        for kind, rank, array in (("images", 3, images), ("labels", 1, labels)):
            name = f"{part}-{kind}{hyphen}idx{rank}-ubyte"
            content = idx(array)
            (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)


def member(name, size=0, kind=tarfile.REGTYPE, target=""):
    """The header of a member of a tar archive."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, target
    return info


def packed_tar(members):
    """A .tar.gz of (header, content) pairs."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def packed_zip(members, compression=zipfile.ZIP_STORED):
    """A .zip of (name or header, content) pairs."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for info, content in members:
            archive.writestr(info, content)
    return stream.getvalue()


def encoded(image, kind="PNG"):
    """The file of an image."""
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def picture(value=0, size=(6, 5), mode="RGB", kind="PNG"):
    """An image file of (H, W) with ``value`` in its first channel."""
    return encoded(Image.new(mode, size[::-1], (value, 2, 3) if mode == "RGB" else value), kind)


def noise(kind="PNG", size=(6, 5)):
    """An image file of random pixels."""
    return encoded(Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8)), kind)


def tree(prefix="", classes=("cat", "dog"), n=5, start=0):
    """Images in class folders, {path: content}; the first channel of image i of class c is start + 10 c + i."""
    return {f"{prefix}{name}/{i}.png": picture(start + 10 * c + i) for c, name in enumerate(classes) for i in range(n)}


def write_tree(path, files):
    """Files as a folder, or as a zip when the path ends in .zip."""
    if path.suffix == ".zip":
        path.write_bytes(packed_zip(files.items()))
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path
