"""The IDX format of MNIST: a header with the dimensions, then the bytes; plain or gzipped.

    00 00 08 rank | rank dimensions, big-endian uint32 | prod(dimensions) bytes

The header is believed only as far as it can be checked: its size is compared with the file's before memory is taken,
and at most one byte more than announced is read, which finds trailing bytes and stops a gzip bomb.

Reference: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits", file formats.
"""

import gzip
import math
import struct
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from convolt.datasets.archive import DAMAGED, check_inflation, shown
from convolt.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
UINT8 = 0x08


def read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """The uint8 array of the given rank in an IDX file, gzipped or not, whatever its name. Raises DataError."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == GZIP_MAGIC
            file.seek(0)
            if not packed:
                return _read(file, path, rank)
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _read(unpacked, path, rank)
    except DAMAGED as error:
        raise DataError(f"{shown(path)}: cannot be read ({shown(error)}); replace it by an intact copy") from None


def _read(stream: IO[bytes] | gzip.GzipFile, path: Path, rank: int) -> NDArray[np.uint8]:
    header = stream.read(4 + 4 * rank)
    if len(header) < 4 + 4 * rank or header[:4] != bytes((0, 0, UINT8, rank)):
        raise DataError(
            f"{shown(path)}: not an IDX file of {rank} dimensions: it must begin with 00 00 08 {rank:02x}, it begins "
            f"with {header[:4].hex(' ') or 'nothing'}; replace it"
        )
    shape = struct.unpack(f">{rank}I", header[4:])
    expected = math.prod(shape)
    if not expected:
        raise DataError(f"{shown(path)}: holds no data: its dimensions are {shape}; replace it")
    check_inflation(path, path.stat().st_size, expected)
    content = stream.read(expected + 1)
    if len(content) != expected:
        found = f"{len(content):,}" if len(content) < expected else "more"
        raise DataError(
            f"{shown(path)}: its header announces {shape}, {expected:,} bytes, but {found} follow; replace it by an "
            "intact copy"
        )
    return np.frombuffer(bytearray(content), np.uint8).reshape(shape)  # a bytearray: the array is writable
