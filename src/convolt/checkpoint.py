"""Checkpoints: what a run needs to go on as if nothing had happened, or to be used.

    checkpoints/
        step-000938/  model.safetensors  optimizer.safetensors  state.json  MANIFEST.json
        best.json     {"step": 938, "folder": "step-000938"}

A checkpoint is a folder that appears by one rename, so it is never seen half written. It is written to a ``.tmp-``
folder beside, every file synced, the folder synced, renamed, the parent synced; older ones go only after that.

The manifest holds the size and sha256 of each file, because safetensors loads a flipped bit without a word. It must
also be, byte for byte, what this module would write about the folder as it is found: so a flipped bit in the manifest
is noticed too. `load_latest` takes the newest checkpoint that verifies and says what it passed over.

The best checkpoint is named by a file, not by a symbolic link (copied runs break those), and names it twice, so that
a flipped bit cannot make it name another. No pickle; arrays are read by the safetensors library, whose size checks
precede its allocations, after names and shapes in the file's header were compared with what the model expects.

Only the process that holds the run's lock writes here; anyone may read.
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from convolt import durable
from convolt.errors import CheckpointError

Arrays = Mapping[str, NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"
_FILES = (MODEL, OPTIMIZER, STATE)
_FORMAT = 1
_NAME = re.compile(r"(?P<old>\.old-)?step-(?P<step>\d{6,})")
_OLD = ".old-"  # a step that is being replaced by a new one of the same number
_MAX_JSON = 64 << 20  # bytes; far above any state or manifest, far below what hurts


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One verified checkpoint in memory; ``warnings`` says which ones were passed over, and why."""

    step: int
    folder: Path
    model: dict[str, NDArray[Any]]
    optimizer: dict[str, NDArray[Any]]
    state: dict[str, Any]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpointer:
    """The checkpoints of one run: the last ``keep_last`` of them and the best.

    Making one touches nothing; call `sweep` once when the run is yours.
    """

    folder: Path
    keep_last: int = 2

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise CheckpointError(
                f"keep_last must be at least 1, not {self.keep_last}: a run needs its last checkpoint"
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that have a checkpoint, valid or not, oldest first."""
        return tuple(sorted(self._folders()))

    @property
    def best_step(self) -> int | None:
        """The step marked as best; None if there is none.

        Raises CheckpointError if the mark cannot be read.
        """
        path = self.folder / "best.json"
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        mark = _parse(raw, path)
        step = mark.get("step")
        if not isinstance(step, int) or raw != _encode(_best_mark(step)):
            raise CheckpointError(
                f"{path} is damaged: its step and its folder must agree; delete it to use the last one"
            )
        return step

    def sweep(self) -> None:
        """Remove what a killed save left behind; put back a step whose replacement never came.

        Raises CheckpointError.
        """
        if not self.folder.is_dir():
            return
        try:
            for step, path in self._folders().items():
                if path.name.startswith(_OLD):
                    os.rename(path, self._path(step))
        except OSError as error:
            raise CheckpointError(f"cannot clean up {self.folder}: {error.strerror or error}") from error
        for entry in list(self.folder.iterdir()):
            if entry.name.startswith((durable.TEMPORARY, _OLD)):
                durable.remove(entry)

    def save(self, step: int, model: Arrays, optimizer: Arrays, state: Mapping[str, Any], best: bool = False) -> Path:
        """Write the checkpoint of ``step``, mark it as best if it is, then delete those no longer wanted.

        Raises CheckpointError if it cannot be written; every older checkpoint is then still there.
        """
        files = {MODEL: _pack(model), OPTIMIZER: _pack(optimizer), STATE: _encode_state(state)}
        files[MANIFEST] = _encode(_manifest(step, files))
        needed = sum(len(data) for data in files.values())
        target, temporary = self._path(step), self.folder / durable.temporary_name()
        try:
            self._create_folder()
            if durable.free_bytes(self.folder) < needed:  # before a byte is written
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.mkdir(temporary)
            for name, data in files.items():
                durable.create(temporary / name, data)
            durable.sync_folder(temporary)
            self._install(temporary, target)
            if best:
                durable.write_bytes(self.folder / "best.json", _encode(_best_mark(step)))
        except OSError as error:
            durable.remove(temporary)
            raise CheckpointError(
                f"cannot save {target}: {durable.explain(error, self.folder, needed)} (older checkpoints are intact)"
            ) from error
        self._rotate(step)
        return target

    def mark_best(self, step: int) -> None:
        """Name ``step`` as the best; rotation never deletes it.

        Raises CheckpointError if it has no checkpoint or the mark cannot be written.
        """
        if step not in self.steps:
            raise CheckpointError(
                f"{self.folder}: step {step} cannot be the best, it has no checkpoint; there are {self.steps}"
            )
        try:
            durable.write_bytes(self.folder / "best.json", _encode(_best_mark(step)))
        except OSError as error:
            raise CheckpointError(f"cannot mark step {step} as best: {durable.explain(error, self.folder)}") from error

    def load_latest(self, expect: Shapes | None = None) -> Checkpoint | None:
        """The newest checkpoint that verifies; None if the run has none at all.

        ``expect`` gives the shape of every model tensor, compared before any array is read.
        Raises CheckpointError if all are damaged (a run never starts afresh in silence) or the tensors are of another
        model.
        """
        return self._first_valid(sorted(self._folders(), reverse=True), [], expect)

    def load(self, which: int | Literal["best", "last"], expect: Shapes | None = None) -> Checkpoint:
        """The checkpoint of one step (no other will do), or the best or last (another valid one will, with a warning).

        Raises CheckpointError.
        """
        if which not in ("best", "last"):
            path = self._folders().get(int(which))
            if path is None:
                raise CheckpointError(f"{self.folder}: step {which} has no checkpoint; there are {self.steps}")
            return read(path, expect)
        warnings: list[str] = []
        order = sorted(self._folders(), reverse=True)
        if which == "best":
            try:
                best = self.best_step
            except CheckpointError as error:
                warnings.append(str(error))
                best = None
            if best is not None:
                order = [best, *(step for step in order if step != best)]
        found = self._first_valid(order, warnings, expect)
        if found is None:
            raise CheckpointError(f"{self.folder}: there is no checkpoint; train first, or give the run's folder")
        return found

    def _first_valid(self, order: Iterable[int], warnings: list[str], expect: Shapes | None) -> Checkpoint | None:
        folders = self._folders()
        damaged: list[str] = []
        for step in order:
            path = folders.get(step, self._path(step))
            try:
                extra = verify(path)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            found = _load(path, extra, expect)
            fallback = (f"fell back to {path.name}: {'; '.join(damaged)}",) if damaged else ()
            return replace(found, warnings=(*warnings, *fallback, *found.warnings))
        if damaged:
            raise CheckpointError(f"no checkpoint can be trusted, start a new run: {'; '.join(damaged)}")
        return None

    def _folders(self) -> dict[int, Path]:
        """Where each step lies: in its own folder, or in the one set aside while it was being replaced."""
        folders: dict[int, Path] = {}
        for entry in sorted(self.folder.iterdir(), reverse=True) if self.folder.is_dir() else ():
            match = _NAME.fullmatch(entry.name)
            if match and entry.is_dir() and not entry.is_symlink():
                folders.setdefault(int(match["step"]), entry)  # "step-..." sorts after ".old-step-..."
        return folders

    def _path(self, step: int) -> Path:
        return self.folder / _folder_name(step)

    def _create_folder(self) -> None:
        if not self.folder.is_dir():
            os.mkdir(self.folder)
            durable.sync_folder(self.folder.parent)

    def _install(self, temporary: Path, target: Path) -> None:
        """Give the finished folder its name; a step saved before (a resumed run repeats it) is set aside until then.

        If this ends in between, the one set aside is still found.
        """
        aside = target.with_name(_OLD + target.name)
        if target.exists():
            durable.remove(aside)
            os.rename(target, aside)
        os.rename(temporary, target)
        durable.sync_folder(self.folder)
        durable.remove(aside)

    def _rotate(self, saved: int) -> None:
        """Delete all but the last ``keep_last`` up to ``saved`` and the best.

        Steps after ``saved`` were passed over by the load this run resumed from: kept, they would push out good ones.
        """
        try:
            best = self.best_step
        except CheckpointError:
            return  # deleting the best one would be worse than keeping too many
        folders = self._folders()
        wanted = sorted(step for step in folders if step <= saved)[-self.keep_last :]
        for step in folders.keys() - {*wanted, best}:
            hidden = self.folder / durable.temporary_name()
            try:
                os.rename(folders[step], hidden)  # half a deleted checkpoint must not look like one
            except OSError:
                continue  # the new checkpoint is safe; this one is tried again at the next save
            durable.remove(hidden)


def verify(folder: Path) -> tuple[str, ...]:
    """Check that a checkpoint is what was written: manifest, names, sizes, hashes. Reads the files, keeps none.

    Returns the names of extra files, which are ignored.
    Raises CheckpointError with the folder, the file and what is wrong with it.
    """
    try:
        entries = {entry.name for entry in os.scandir(folder)}
        missing = [name for name in (MANIFEST, *_FILES) if name not in entries]
        if missing:
            raise CheckpointError(f"{folder} is damaged: {', '.join(missing)} is missing")
        raw = _read_small(folder / MANIFEST)
        manifest = _parse(raw, folder / MANIFEST)
        actual = {name: _fingerprint(folder / name) for name in _FILES}
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
    expected = {"format": _FORMAT, "step": _step(folder), "files": actual}
    if raw != _encode(expected):
        raise CheckpointError(f"{folder} is damaged: {_first_difference(manifest, expected)}")
    return tuple(sorted(entries - {MANIFEST, *_FILES}))


def read(folder: Path, expect: Shapes | None = None) -> Checkpoint:
    """Verify and load one checkpoint folder.

    Raises CheckpointError.
    """
    return _load(folder, verify(folder), expect)


def _load(folder: Path, extra: tuple[str, ...], expect: Shapes | None) -> Checkpoint:
    warnings = (f"{folder}: ignored what is no part of a checkpoint: {', '.join(extra)}",) if extra else ()
    try:
        if expect is not None:
            _compare(shapes(folder / MODEL), expect, folder / MODEL)
        model = safetensors.numpy.load_file(folder / MODEL)
        optimizer = safetensors.numpy.load_file(folder / OPTIMIZER)
        state = _parse(_read_small(folder / STATE), folder / STATE)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return Checkpoint(_step(folder), folder, model, optimizer, state, warnings)


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, from its header alone."""
    with safetensors.safe_open(path, framework="np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping


def _compare(found: Shapes, expect: Shapes, path: Path) -> None:
    for name in sorted(found.keys() | expect.keys()):
        if found.get(name) != expect.get(name):
            have, want = (str(tensors.get(name, "absent")) for tensors in (found, expect))
            raise CheckpointError(f"{path} is of another model: tensor {name!r} is {have}, the model needs {want}")


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is no checkpoint: it must have its name back, such as step-000938")
    return int(match["step"])


def _folder_name(step: int) -> str:
    return f"step-{step:06d}"


def _best_mark(step: int) -> dict[str, Any]:
    return {"step": step, "folder": _folder_name(step)}


def _manifest(step: int, files: Mapping[str, bytes]) -> dict[str, Any]:
    described = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return {"format": _FORMAT, "step": step, "files": described}


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is damaged: it is not a file")
        return {"size": status.st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _first_difference(manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    listed = manifest.get("files")
    if isinstance(listed, dict) and listed.keys() == set(_FILES):
        for name, actual in expected["files"].items():
            if listed[name] != actual:
                size = listed[name].get("size") if isinstance(listed[name], dict) else None
                if size != actual["size"]:
                    return f"{name} has {actual['size']} bytes, {MANIFEST} says {size}"
                return f"{name} has another sha256 than {MANIFEST} says"
    return f"{MANIFEST} is not one that fits this folder (format {_FORMAT}, its step, its three files)"


def _pack(arrays: Arrays) -> bytes:
    # safetensors reads raw memory from the first element: a strided view would be saved as its neighbours
    return safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def _encode(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _encode_state(state: Mapping[str, Any]) -> bytes:
    # unlike durable.encode_json this keeps NaN and inf: an early stopping that saw no epoch yet has best = inf
    data = (json.dumps(state, indent=1) + "\n").encode()
    if len(data) > _MAX_JSON:
        raise CheckpointError(f"the state to save has {durable.megabytes(len(data))}; arrays belong to the optimizer's")
    return data


def _read_small(path: Path) -> bytes:
    size = path.stat().st_size
    if size > _MAX_JSON:
        raise CheckpointError(f"{path} is damaged: {durable.megabytes(size)} is no size for it")
    return path.read_bytes()


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object")
    return value
