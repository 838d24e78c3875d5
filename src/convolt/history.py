"""What a run measured, epoch by epoch: ``metrics.jsonl`` and the records read from it.

One JSON object per line, appended and never rewritten, so that it can be followed (``tail -f``) and survives a kill:
at worst the last line is torn. A line at an epoch's end has ``"event": "epoch"`` and the fields of `Epoch`; other
events (a skipped step, a rollback) may stand between.

A checkpoint records how many bytes of the file it covers. Resuming cuts the file there: epochs that will be computed
again are not there twice, and a torn line goes with them.
"""

import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from convolt import durable
from convolt.errors import RunError


@dataclass(frozen=True)
class Epoch:
    """The measurements of one epoch.

    epoch counts from 1; losses are means over samples; accuracies and lr are plain numbers (0.97, not 97 %), lr the
    last one used; train_seconds is the time of the epoch's training steps alone, without compiling; images_per_second =
    images seen / train_seconds. Without a validation split valid_loss and valid_accuracy are None. skipped_steps counts
    batches whose loss was not finite.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    valid_loss: float | None
    valid_accuracy: float | None
    lr: float
    train_seconds: float
    images_per_second: float
    skipped_steps: int = 0

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Epoch":
        """The record of one line; ``null`` in a number that must be there stands for one that was not finite."""
        optional = ("valid_loss", "valid_accuracy")
        absent = dict.fromkeys(optional)
        values: dict[str, Any] = {field.name: {**absent, **record}[field.name] for field in fields(cls)}
        values |= {name: math.nan for name, value in values.items() if value is None and name not in optional}
        return cls(**values)


class MetricsLog:
    """``metrics.jsonl``, open for appending.

    ``keep`` is how many bytes to keep of a file that is already there, None all; of a torn line nothing is kept.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            data = path.read_bytes()[:keep]
            os.ftruncate(self._descriptor, data.rfind(b"\n") + 1)
        except OSError as error:
            self.close()
            raise RunError(f"cannot open {path}: {durable.explain(error, path)}") from error

    def append(self, event: str, record: Mapping[str, Any]) -> None:
        """Write one line, at once visible to every reader.

        Raises RunError, and takes back a line that was only partly written.
        """
        try:
            durable.append_line(self._descriptor, durable.encode_json({"event": event, **record}))
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {durable.explain(error, self.path)}") from error

    def sync(self) -> int:
        """Make all lines durable; returns how many bytes they are.

        Raises RunError.
        """
        try:
            os.fsync(self._descriptor)
            return os.fstat(self._descriptor).st_size
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {durable.explain(error, self.path)}") from error

    def close(self) -> None:
        """Give the file back; a second time does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a metrics file (none if there is no file); a last line that is torn is passed over.

    Raises RunError for a line in the middle that is not a JSON object.
    """
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RunError(f"{path}, line {number}: not JSON ({error}); remove that line") from error
        if not isinstance(record, dict):
            raise RunError(f"{path}, line {number}: not a JSON object; remove that line")
        yield record


def read_history(path: Path) -> tuple[Epoch, ...]:
    """The epochs in a metrics file, oldest first.

    Raises RunError for an epoch that lacks a field.
    """
    epochs = []
    for number, record in enumerate(read_lines(path), start=1):
        if record.get("event") == "epoch":
            try:
                epochs.append(Epoch.from_json(record))
            except KeyError as error:
                raise RunError(f"{path}, line {number}: an epoch must have {error}; remove that line") from error
    return tuple(epochs)


def bytes_of(path: Path, epochs: int) -> int:
    """How many bytes of a metrics file hold so many epochs, and what is between them. Raises RunError."""
    found = size = 0
    for line in path.read_bytes().splitlines(keepends=True) if epochs else ():
        size += len(line)
        found += json.loads(line).get("event") == "epoch"
        if found == epochs:
            break
    return size


def epoch_record(epoch: Epoch) -> dict[str, Any]:
    """The fields of one epoch as they stand in its line; what was not measured is absent."""
    return {name: value for name, value in asdict(epoch).items() if value is not None}


def save_npz(history: Sequence[Epoch], path: Path) -> None:
    """Write the history as one array per field (absent values are NaN) to an .npz file of exactly this name.

    Raises RunError.
    """
    columns = {
        field.name: np.array([math.nan if (v := getattr(epoch, field.name)) is None else v for epoch in history])
        for field in fields(Epoch)
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **columns)
    try:
        durable.write_bytes(path, buffer.getvalue())
    except OSError as error:
        raise RunError(f"cannot save the metrics as {path}: {durable.explain(error, path)}") from error
