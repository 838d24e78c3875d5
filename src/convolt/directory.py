"""The directory of a run: where it lies, and that one process writes in it.

Directories are made by an exclusive mkdir: of runs that start in the same second, each has its own. The lock is the
kernel's (``flock`` on ``run.lock``), not the existence of a file: it ends with the process that holds it, however that
ends, so there is no stale lock to delete. The file only tells others who holds it, and is never removed: a process that
waits on a removed file would hold a lock that nobody else sees.
"""

import fcntl
import json
import os
import re
import secrets
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from convolt import durable
from convolt.errors import RunError

RECORD, METRICS, RESULT, CHECKPOINTS, PLOTS = "run.json", "metrics.jsonl", "result.json", "checkpoints", "plots"
LOCK = "run.lock"


class RunLock:
    """The exclusive right to write in ``folder``, held until `release` or the end of the process.

    Raises RunError that names the holder's process if the folder is taken.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            durable.write_all(self._descriptor, _holder().encode())
        except BlockingIOError as error:
            holder = _describe(os.pread(self._descriptor, 4096, 0))
            self.release()
            raise RunError(f"{folder} is in use by {holder}; wait until it ends, or choose another folder") from error
        except OSError as error:
            self.release()
            raise RunError(f"cannot lock {path}: {durable.explain(error, folder)}") from error

    def release(self) -> None:
        """Let others write here; a second time does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def new_folder(root: Path, label: str) -> Path:
    """Make ``root``/<label>-<UTC time>-<6 hex>, the label without what does not belong in a file name.

    Raises RunError.
    """
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "run"
    while True:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        folder = root / f"{words[:80]}-{stamp}-{secrets.token_hex(3)}"
        if _mkdir(folder):
            return folder


def given_folder(folder: Path) -> Path:
    """Make ``folder``, or take it if it is empty or was left by a run that never began. Raises RunError."""
    if not _mkdir(folder):
        if not folder.is_dir():
            raise RunError(f"{folder} is not a folder; choose another name for the run")
        if LOCK not in _names(folder):
            require_vacant(folder)  # before a lock file is put into somebody's folder
    return folder


def require_vacant(folder: Path) -> None:
    """Raise RunError if a folder holds a run, or files that are none of ours."""
    names = [name for name in _names(folder) if name != LOCK and not name.startswith(durable.TEMPORARY)]
    if RECORD in names:
        state = "a finished run" if RESULT in names else "an unfinished run"
        raise RunError(f"{folder} holds {state}; go on with it by --resume {folder}, or choose another folder")
    if names:
        raise RunError(f"{folder} is not empty and not a run (it holds {names[0]}); choose another folder")


def sweep(folder: Path) -> None:
    """Remove files that a killed writer left unfinished."""
    for entry in list(folder.iterdir()):
        if entry.name.startswith(durable.TEMPORARY):
            durable.remove(entry)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises RunError."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} is damaged: it is not a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file, whole or not at all. Raises RunError."""
    try:
        durable.write_json(path, dict(value))
    except OSError as error:
        raise RunError(f"cannot write {path}: {durable.explain(error, path)}") from error


def remove(path: Path) -> None:
    """Delete a file if it is there. Raises RunError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot remove {path}: {error.strerror}") from error


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error.strerror}") from error


def _mkdir(folder: Path) -> bool:
    """Make a folder and those above it; False if it was there."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise RunError(f"{folder.parent} is not a folder; choose another for the runs") from None
    except OSError as error:
        raise RunError(f"cannot make {folder.parent}: {durable.explain(error, folder)}") from error
    try:
        os.mkdir(folder)
    except FileExistsError:
        return False
    except OSError as error:
        raise RunError(f"cannot make {folder}: {durable.explain(error, folder)}") from error
    return True


def _holder() -> str:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}) + "\n"


def _describe(raw: bytes) -> str:
    try:
        holder = json.loads(raw)
        return f"process {holder['pid']} on {holder['host']} (since {holder['started']})"
    except (ValueError, KeyError, TypeError):
        return "another process"  # it took the lock and has not yet signed
