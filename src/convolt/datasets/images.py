"""One image file, decoded within limits.

Pillow reads the header first; the size is compared with a cap of our own before a pixel is decoded, so that a 50 kB
file cannot take gigabytes. Only formats that are plain pictures are tried. A truncated image is an error, never half
an image with gray below. Orientation tags are ignored, as in torchvision: pixels are taken as they are stored.

Modes are decided, not guessed: 1, L and LA are grayscale, RGB, RGBA, P, PA, CMYK and YCbCr are color (transparency is
dropped). 16-bit and float images are refused: what they should mean in 8 bits is not ours to say.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convolt.datasets.archive import shown
from convolt.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")
GRAYSCALE = ("1", "L", "LA")
COLOR = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")

MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 2**25  # 33 megapixels: a photograph, not a map

#: What Pillow's decoders raise on damaged files, besides its own two.
UNREADABLE = (
    *(OSError, EOFError, SyntaxError, ValueError, IndexError, KeyError, TypeError, OverflowError, RuntimeError),
    *(MemoryError, struct.error, zlib.error),
)


@dataclass(frozen=True)
class ImageFile:
    """An image in a folder or an archive. ``where`` names it in messages, ``read`` gives its bytes."""

    where: str
    read: Callable[[], bytes]

    @classmethod
    def at(cls, path: Path) -> "ImageFile":
        """The image in a file on disk."""
        return cls(str(path), partial(_read_file, path))


@contextmanager
def strict_decoding() -> Iterator[None]:
    """Within it, Pillow's warning about huge images is an error, in all threads."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e.g. damaged EXIF: of no consequence, pixels are checked
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode(
    file: ImageFile, image_size: tuple[int, int] | None = None, channels: int | None = None
) -> NDArray[np.uint8]:
    """The pixels of an image: (C, H, W) uint8.

    image_size: (H, W) to resize to, bilinear with antialiasing; None keeps the size.
    channels: 1 converts to grayscale, 3 to RGB; None keeps what the file is. Raises DataError.
    """
    from PIL import Image, UnidentifiedImageError

    content = file.read()
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{shown(file.where)}: {width} x {height} pixels, the limit is {MAX_PIXELS:,}: a decompression "
                    "bomb or a picture to be scaled down first; replace it"
                )
            if image.mode not in GRAYSCALE + COLOR:
                raise DataError(f"{shown(file.where)}: mode {image.mode} is not 8-bit gray or color; convert it")
            gray = image.mode in GRAYSCALE if channels is None else channels == 1
            mode = "L" if gray else "RGB"
            converted = image if image.mode == mode else image.convert(mode)
            if image_size is not None and converted.size != image_size[::-1]:
                converted = converted.resize(image_size[::-1], Image.Resampling.BILINEAR)
            pixels: NDArray[Any] = np.asarray(converted)
    except (*UNREADABLE, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow tells what it expected, e.g. "image file is truncated (3 bytes not processed)", but not of which file.
        reason = "not an image in a known format" if isinstance(error, UnidentifiedImageError) else shown(error)
        raise DataError(f"{shown(file.where)}: unreadable ({reason}); delete or replace it") from None
    return pixels[None] if gray else pixels.transpose(2, 0, 1)


def _read_file(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise DataError(f"{shown(path)}: is missing or not a regular file; delete or replace it")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{shown(path)}: is larger than {MAX_FILE_BYTES:,} bytes; remove it")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read ({shown(error.strerror)}); check its permissions") from None
