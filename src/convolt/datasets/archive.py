"""Archives from strangers: nothing is extracted, nothing is inflated beyond what it may be.

A zip member is read into memory under its declared size, which is checked first: against a cap, against the size of
the archive, and against the ratio that real data reaches. Names that leave the folder, symbolic links and encrypted
members are refused although nothing is ever written: an archive that has them is not what it says it is.
"""

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convolt.errors import DataError

# Real images and labels compress up to some 20:1, blank ones 1000:1: harmless while they are small.
MAX_INFLATION = 200
HARMLESS_BYTES = 64 * 2**20

#: What reading a damaged zip, gzip or deflate stream raises.
DAMAGED = (OSError, EOFError, zlib.error, zipfile.BadZipFile, struct.error, NotImplementedError, ValueError)


def shown(name: object) -> str:
    """A name from a file in one printable line: no line breaks, no terminal escapes."""
    text = str(name)
    return text if text.isprintable() else ascii(text)[1:-1]


def check_inflation(where: object, stored: int, inflated: int) -> None:
    """Raise DataError when ``stored`` bytes claim to hold ``inflated`` bytes and no real data set could."""
    if inflated > max(HARMLESS_BYTES, MAX_INFLATION * stored):
        raise DataError(
            f"{shown(where)}: claims {inflated:,} bytes in {stored:,}: a damaged header or a decompression bomb; "
            "replace the file"
        )


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive whose directory has been vetted. Raises DataError."""
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise DataError(f"{shown(path)}: no such file; check the path") from None
    except DAMAGED as error:
        raise DataError(
            f"{shown(path)}: not a readable zip archive ({shown(error)}); replace it by an intact copy"
        ) from None
    with archive:
        members = archive.infolist()
        size = path.stat().st_size
        if sum(member.compress_size for member in members) > size:
            raise DataError(f"{shown(path)}: its members overlap: a decompression bomb; do not use this file")
        for member in members:
            if fault := _fault(member):
                raise DataError(f"{shown(f'{path}/{member.filename}')}: {fault}")
            check_inflation(f"{path}/{member.filename}", member.compress_size, member.file_size)
        yield archive


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    """The whole of a zip member of at most ``limit`` bytes; its CRC is verified. Raises DataError."""
    where = f"{archive.filename}/{member.filename}"
    if member.file_size > limit:
        raise DataError(f"{shown(where)}: {member.file_size:,} bytes, the limit is {limit:,}; remove it")
    try:
        content = archive.read(member)
    except DAMAGED as error:
        raise DataError(f"{shown(where)}: damaged ({shown(error)}); replace the archive by an intact copy") from None
    if len(content) != member.file_size:
        raise DataError(
            f"{shown(where)}: truncated: {len(content):,} of {member.file_size:,} bytes; replace the archive"
        )
    return content


def escapes(name: str) -> bool:
    """True when a member's name is absolute or leaves the folder it would be unpacked in."""
    parts = name.replace("\\", "/").split("/")
    has_drive = len(name) > 1 and name[0].isalpha() and name[1] == ":"
    return not parts[0] or ".." in parts or has_drive


def _fault(member: zipfile.ZipInfo) -> str | None:
    if escapes(member.filename):
        return "a member's name must stay inside the archive; do not use this file"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a symbolic link; pack the file itself"
    if member.flag_bits & 1:
        return "is encrypted; pack it without a password"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "must be stored or deflated; repack the archive"
    return None
