"""Fetching published files: what arrives is what was published, or nothing.

    <name>.part     grows, across interruptions and mirrors, by HTTP range requests
    <name>          appears complete, once size and checksum are those in the registry

A file is written beside, verified, fsynced and renamed, so a file under its own name is whole. Mirrors are tried in
order; a connection that breaks is resumed as long as bytes arrive. Wrong bytes are deleted, never kept. The folder is
locked meanwhile: of several ranks that start at once, one downloads and the others wait for it.
"""

import errno
import fcntl
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from convolt.datasets.archive import shown
from convolt.datasets.source import RemoteFile
from convolt.errors import DataError

TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # on one mirror, as long as each brings something
BLOCK = 2**18
MAX_BYTES = 2**30  # of a file whose size is not published

#: Errors of the disk, which no other mirror can help.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

Report = Callable[[int, int | None], None]  # (bytes so far, bytes in all)


def download(files: Sequence[RemoteFile], folder: Path, progress: bool = True) -> None:
    """Fetch each file that is not in the folder with the published checksum. Raises DataError.

    progress: show a bar on standard error when that is a terminal.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        _locked(folder),
        Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bars,
    ):
        for file in files:
            task = bars.add_task(file.name, total=file.size)

            def report(done: int, total: int | None, task: Any = task) -> None:
                bars.update(task, completed=done, total=total)

            fetch_file(file, folder, report)


def fetch_file(file: RemoteFile, folder: Path, report: Report) -> Path:
    """Fetch one file into an existing folder, resuming what is there of it. Raises DataError."""
    target, part = folder / file.name, folder / f"{file.name}.part"
    if target.is_file() and mismatch(target, file) is None:
        return target
    failures: list[str] = []
    for url in file.urls:
        for failure in _attempts(url, file, part, report):
            if failure is None:
                _commit(part, target)
                return target
            last = failure
        failures.append(f"{urlsplit(url).netloc}: {last}")
    kept = f" ({_size(part):,} bytes are kept)" if _size(part) else ""
    raise DataError(
        f"{file.name}: could not be downloaded: {shown('; '.join(failures))}; check the network and run the command "
        f"again to go on{kept}, or put the file in {shown(folder)}"
    )


def mismatch(path: Path, file: RemoteFile) -> str | None:
    """What is wrong with a file that should be the published one; None if nothing is."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"has {size:,} bytes, published are {file.size:,}"
    if size > MAX_BYTES:
        return f"has more than {MAX_BYTES:,} bytes"
    algorithm, published = ("sha256", file.sha256) if file.sha256 else ("md5", file.md5)
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    return None if digest == published else f"wrong checksum: its {algorithm} is {digest}, published is {published}"


def _attempts(url: str, file: RemoteFile, part: Path, report: Report) -> Iterator[str | None]:
    """Try one mirror until it is of no more use. Yields what failed each time, or None when ``part`` is right."""
    for _ in range(ATTEMPTS):
        before = _size(part)
        try:
            _transfer(url, file, part, report)
        except urllib.error.HTTPError as error:
            yield f"HTTP {error.code} {error.reason}"
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not before:
                return
            part.unlink()  # longer than the file there: begin again
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise DataError(
                    f"{shown(part)}: cannot be written ({error.strerror}); free some space or name another folder"
                ) from None
            yield str(getattr(error, "reason", error)) or type(error).__name__
            if _size(part) <= before:
                return
        else:
            wrong = mismatch(part, file)
            if wrong is not None:
                part.unlink()
            yield wrong
            if not before:
                return  # all of it came from here: another try would bring the same


def _transfer(url: str, file: RemoteFile, part: Path, report: Report) -> None:
    """Append to ``part`` what is missing. Raises OSError when the connection ends early."""
    offset = _size(part)
    if file.size is not None and offset == file.size:
        return
    headers = {"User-Agent": "convolt"} | ({"Range": f"bytes={offset}-"} if offset else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        continues = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if continues and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            raise OSError("the server sent another range than asked for")
        done = offset if continues else 0
        length = response.headers.get("Content-Length", "")
        announced = done + int(length) if length.isdecimal() else None
        limit = file.size or MAX_BYTES
        with part.open("ab" if continues else "wb") as stream:
            _copy(response, stream, done, file.size or announced, limit, report)
            done = stream.tell()
    if announced is not None and done < min(announced, limit):
        raise OSError(f"the connection ended after {done:,} of {announced:,} bytes")


def _copy(
    response: http.client.HTTPResponse, stream: IO[bytes], done: int, total: int | None, limit: int, report: Report
) -> None:
    # read1 returns what has arrived: an interruption then loses nothing that was received.
    while block := response.read1(BLOCK):
        done += len(block)
        stream.write(block)
        report(done, total)
        if done > limit:
            return  # `mismatch` will say so


def _commit(part: Path, target: Path) -> None:
    """Make ``part`` the file, so that a crash leaves the one or the other."""
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, made if need be and for this process alone. The lock ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{shown(folder)}: cannot be made ({error.strerror}); name another with --data-dir") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
