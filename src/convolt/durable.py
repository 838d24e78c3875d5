"""Files that are there whole or not at all, whatever ends the process.

A file is written beside its place, synced, renamed over the old one, and the folder that names it is synced too: the
first sync makes the bytes durable, the rename makes the change atomic, the second sync makes the rename durable. A
crash at any point leaves the old file or the new one, and at worst an orphan whose name begins with ``.tmp-``.

Temporary names lie in the same folder, because a rename over a mount point is a copy. Files are created with mode 0666
less the umask (``tempfile`` would make them 0600, and a shared run unreadable to its owner's colleagues).

These functions raise plain ``OSError``; `explain` turns one into the line a user needs. The callers know which
``ConvoltError`` it should be.
"""

import errno
import json
import math
import os
import resource
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np

TEMPORARY = ".tmp-"
"""How the name of every unfinished file or folder begins."""

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # some network file systems cannot sync a folder


def temporary_name(purpose: str = "") -> str:
    """A name that no other process has: ``.tmp-<pid>-<8 hex>[-<purpose>]``."""
    return f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}" + (f"-{purpose}" if purpose else "")


def create(path: Path, data: bytes) -> None:
    """Create the file ``path``, which must not exist, and sync its contents (not yet its name)."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte: a full disk shows first as a short write, and only the next one fails."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file ``path`` by ``data``, whole or not at all."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        create(temporary, data)
        os.replace(temporary, path)
    except OSError:
        remove(temporary)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the file ``path`` by UTF-8 ``text``, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace the file ``path`` by readable JSON, whole or not at all."""
    write_text(path, encode_json(value, indent=2))


def append_line(descriptor: int, line: str) -> None:
    """Append one line to an open file; a line that does not fit is taken back, so the next one starts clean."""
    before = os.fstat(descriptor).st_size
    try:
        write_all(descriptor, line.encode() + b"\n")
    except OSError:
        os.ftruncate(descriptor, before)
        raise


def encode_json(value: Any, indent: int | None = None) -> str:
    """JSON text of plain values, NumPy scalars and paths; a number that is not finite becomes ``null``.

    The standard has no NaN: a reader in another language would refuse the whole file.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False) + ("\n" if indent else "")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that is possible: what is left over is tried again next time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write on the disk of ``path`` (or of its nearest existing parent)."""
    return shutil.disk_usage(_existing(path)).free


def mount_point(path: Path) -> Path:
    """Where the disk of ``path`` is mounted."""
    place = _existing(path).resolve()
    while not place.is_mount():
        place = place.parent
    return place


def _existing(path: Path) -> Path:
    place = path.absolute()
    while not os.path.exists(place):  # unlike Path.exists, False where it may not look
        place = place.parent
    return place


def explain(error: OSError, path: Path, needed: int | None = None) -> str:
    """Why ``path`` could not be written, in one line: a full disk with its name, what is needed and what is free."""
    need = "" if needed is None else f"{megabytes(needed)} needed, "
    disk = f"the disk mounted at {mount_point(path)}"
    if error.errno == errno.ENOSPC:
        return f"{disk} is full ({need}{megabytes(free_bytes(path))} free); free some space or choose another disk"
    if error.errno == errno.EDQUOT:
        return f"your quota on {disk} is used up ({need}see `quota`); free some space or choose another disk"
    if error.errno == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        allowed = "its file system's limit" if limit == resource.RLIM_INFINITY else f"the limit of {megabytes(limit)}"
        free = megabytes(free_bytes(path))
        return (
            f"a file on {disk} would be larger than {allowed} ({need}{free} free); raise it with `ulimit -f unlimited`"
        )
    return f"{error.strerror or error} ({disk})"


def megabytes(size: int) -> str:
    """A size for a person: ``21.3 MB``."""
    return f"{size / 1e6:,.1f} MB"
