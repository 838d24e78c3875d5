"""A run is a directory: everything that was decided, measured and learned, readable without Convolt.

    runs/mnist-im2col-20261120T160512Z-3fa09c/
        run.json       resolved config, command, versions, machine: what replays it
        metrics.jsonl  one line per epoch (history.py)
        result.json    written last: its presence says that the run is finished
        run.lock       who is writing (directory.py)
        checkpoints/   what resumes it (checkpoint.py)
        plots/         learning curves (plots.py)

There are three ways in: `Run.create` makes a new directory, by an exclusive mkdir, so runs started in the same second
do not meet; `Run.resume` goes on with one; `Run.load` only looks. The first two hold the directory's lock.
"""

import json
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from convolt import directory, durable
from convolt.checkpoint import Arrays, Checkpoint, Checkpointer, Shapes
from convolt.config import build
from convolt.data import IMAGE_DTYPES
from convolt.directory import CHECKPOINTS, METRICS, RECORD, RESULT, RunLock
from convolt.engine import Engine, Executor
from convolt.engines import engine_class
from convolt.environment import REPRODUCIBILITY, changes, environment, flatten
from convolt.errors import CheckpointError, ConfigError, DataError, RunError, ShapeError
from convolt.evaluation import predict
from convolt.history import Epoch, MetricsLog, bytes_of, epoch_record, read_history, save_npz
from convolt.model import Model
from convolt.params import Params
from convolt.precision import precision
from convolt.recipe import Recipe, model_from_plain, recipe_from_plain

_FORMAT = 1


class Run:
    """One run directory; made by `create`, `resume` and `load`. As a context manager it gives the lock back.

    folder: where it lies. record: the contents of ``run.json``. checkpoints: its `Checkpointer`.
    """

    def __init__(
        self, folder: Path, record: dict[str, Any], keep_last: int = 2, writer: "_Writer | None" = None
    ) -> None:
        self.folder = folder
        self.record = record
        self.checkpoints = Checkpointer(folder / CHECKPOINTS, keep_last)
        self._writer = writer
        self._history = list(read_history(folder / METRICS))
        self._result = directory.read_json(folder / RESULT) if (folder / RESULT).exists() else None
        self._params: Params | None = None

    @classmethod
    def create(
        cls,
        config: Mapping[str, Any],
        label: str = "run",
        *,
        out: str | Path | None = None,
        root: str | Path = "runs",
        threads: int | None = None,
        keep_last: int = 2,
    ) -> Self:
        """Make a new run directory: ``out``, or ``root``/<label>-<UTC time>-<6 hex>; label is "<data>-<engine>".

        config: the resolved configuration as plain values.
        Raises RunError if the folder is in use, holds a run or other files, or cannot be written.
        """
        folder = directory.new_folder(Path(root), label) if out is None else directory.given_folder(Path(out))
        with ExitStack() as undo:
            lock = RunLock(folder)
            undo.callback(lock.release)
            directory.require_vacant(folder)
            record = {
                "format": _FORMAT,
                "created": _now(),
                "command": sys.argv,
                "config": _as_json(config),
                "environment": environment(threads),
                "reproducibility": REPRODUCIBILITY,
            }
            directory.write_json(folder / RECORD, record)
            run = cls(folder, record, keep_last, _Writer(lock, MetricsLog(folder / METRICS)))
            undo.pop_all()
        return run

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        config: Mapping[str, Any] | None = None,
        *,
        may_change: Collection[str] = (),
        expect: Shapes | None = None,
        keep_last: int = 2,
    ) -> tuple[Self, Checkpoint | None]:
        """Go on with a run: the run, and the checkpoint to start from (None: it was stopped before its first one).

        config: must equal the run's own, but for the dotted keys in ``may_change`` and what lies below them; None
        takes the run's. expect: shapes of the model's tensors, compared before they are read. Metrics that the
        checkpoint does not cover are cut off. The checkpoint's ``warnings`` say what was passed over and what differs
        from the machine that it was written on.
        Raises RunError, ConfigError, CheckpointError.
        """
        folder = Path(folder)
        _read_record(folder)  # a folder that is no run gets no lock file
        with ExitStack() as undo:
            lock = RunLock(folder)
            undo.callback(lock.release)
            record = _read_record(folder)
            if config is not None:
                _require_same(record["config"], _as_json(config), may_change, folder)
                record["config"] = _as_json(config)
            directory.sweep(folder)
            checkpoint, covered = _restart(Checkpointer(folder / CHECKPOINTS, keep_last), folder / METRICS, expect)
            if checkpoint is not None:
                differences = changes(record["environment"], environment())
                checkpoint = replace(checkpoint, warnings=checkpoint.warnings + differences)
            record.setdefault("resumed", []).append({"at": _now(), "command": sys.argv})
            directory.write_json(folder / RECORD, record)
            run = cls(folder, record, keep_last, _Writer(lock, MetricsLog(folder / METRICS, keep=covered)))
            undo.pop_all()
        return run, checkpoint

    @classmethod
    def take_over(cls, folder: Path, record: dict[str, Any], epochs: Sequence[Epoch], keep_last: int = 2) -> Self:
        """Write a run from now on whose writer died: from where it stands, which is after these epochs.

        Raises RunError, also where the writer lives.
        """
        with ExitStack() as undo:
            lock = RunLock(folder)
            undo.callback(lock.release)
            directory.sweep(folder)
            Checkpointer(folder / CHECKPOINTS, keep_last).sweep()
            run = cls(folder, record, keep_last, _Writer(lock, MetricsLog(folder / METRICS)))
            run.amend(epochs)
            undo.pop_all()
        return run

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Open a finished, interrupted or still running run to look at it; nothing in it is touched.

        Raises RunError if the folder is not a run or is damaged.
        """
        return cls(Path(folder), _read_record(Path(folder)))

    def __repr__(self) -> str:
        state = "finished" if self.finished else "unfinished"
        return f"<Run {self.folder} ({state}, {len(self._history)} epochs)>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End writing and give the lock back; what was measured can still be read."""
        if self._writer is not None:
            self._writer.metrics.close()
            self._writer.lock.release()
            self._writer = None

    # ------------------------------------------------------------------------------------------------ what it knows

    @property
    def writes(self) -> bool:
        """Whether this process writes the run."""
        return self._writer is not None

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        config: dict[str, Any] = self.record["config"]
        return config

    @property
    def history(self) -> tuple[Epoch, ...]:
        """One record per finished epoch, oldest first."""
        return tuple(self._history)

    @property
    def result(self) -> dict[str, Any] | None:
        """The contents of ``result.json``; None until the run is finished."""
        return self._result

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self._result is not None

    @property
    def test_accuracy(self) -> float | None:
        """Accuracy on the test split; None without one, or before the end."""
        return (self._result or {}).get("test_accuracy")

    @property
    def test_loss(self) -> float | None:
        """Mean loss on the test split; None without one, or before the end."""
        return (self._result or {}).get("test_loss")

    @cached_property
    def model(self) -> Model:
        """The model, as ``run.json`` describes it. Raises ConfigError."""
        return model_from_plain(self.config["model"], f"{self.folder / RECORD}: model")

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, as ``run.json`` describes it. Raises ConfigError."""
        return recipe_from_plain(self.config["recipe"], f"{self.folder / RECORD}: recipe")

    @property
    def params(self) -> Params:
        """The weights that the result is of; of an unfinished run, its best checkpoint, or else its last one.

        Warns if that checkpoint is damaged and another one is taken. Raises CheckpointError if none can be trusted.
        """
        if self._params is None:
            checkpoint = self.checkpoints.load((self._result or {}).get("weights", "best"))
            for message in checkpoint.warnings:
                warnings.warn(message, stacklevel=2)
            params = Params(self.model, precision(self.recipe.precision).master)
            params.load_state_dict(checkpoint.model)
            self._params = params
        return self._params

    def executor(self, engine: Engine | None = None) -> Executor:
        """The trained model made ready on an engine; without one, on the engine that trained it.

        Raises ConfigError, EngineError, CheckpointError, MissingDependency.
        """
        if engine is None:
            plain = self.config["engine"]
            engine = build(engine_class(plain["type"]), plain, f"{self.folder / RECORD}: engine", {})
        return engine.executor(self.model, self.params, self.recipe)

    def predict(self, images: NDArray[Any], engine: Engine | None = None) -> NDArray[np.float32]:
        """Probabilities (N, classes) of images (N, C, H, W): uint8 is scaled to [0, 1], floats are taken as they are.

        softmax(z)_k = exp(z_k - max z) / sum_j exp(z_j - max z)

        Raises DataError for other types, ShapeError for images that are not of the model's input shape, and what
        `executor` raises.
        """
        expected = self.model.input_shape
        if images.dtype not in IMAGE_DTYPES:
            raise DataError(f"predict: images must be uint8, float32 or float64; got {images.dtype}")
        if images.shape[1:] != expected:
            hint = "; give one image as images[None]" if images.shape == expected else ""
            raise ShapeError(f"predict: images must be (N, {', '.join(map(str, expected))}); got {images.shape}{hint}")
        executor = self.executor(engine)
        z = predict(executor, images).reshape(len(images), *self.model.output_shape)  # no images: no classes either
        executor.close()
        exps = np.exp(z - z.max(axis=1, keepdims=True), dtype=np.float64)
        probabilities: NDArray[np.float32] = (exps / exps.sum(axis=1, keepdims=True)).astype(np.float32)
        return probabilities

    def save_metrics(self, path: str | Path) -> None:
        """Write the history as an .npz file: one array per field, NaN for what is absent. Raises RunError."""
        save_npz(self.history, Path(path))

    # --------------------------------------------------------------------------------------------- what it is told

    def log(self, event: str, record: Mapping[str, Any]) -> None:
        """Append an event (a skipped step, a rollback) to ``metrics.jsonl``. Raises RunError."""
        self._writing().metrics.append(event, record)

    def log_epoch(self, epoch: Epoch) -> None:
        """Append an epoch to the history and to ``metrics.jsonl``. Raises RunError."""
        if self._result is not None:  # a finished run that was resumed is not finished any more
            directory.remove(self.folder / RESULT)
            self._result = None
        self._params = None
        self._writing().metrics.append("epoch", epoch_record(epoch))
        self._history.append(epoch)

    def save_checkpoint(
        self, step: int, model: Arrays, optimizer: Arrays, state: Mapping[str, Any], best: bool = False
    ) -> Path:
        """Write the checkpoint of ``step``, which covers the metrics logged so far; ``state`` gets a key ``run``.

        Raises CheckpointError (older checkpoints are then intact), RunError.
        """
        own = {"metrics_bytes": self._writing().metrics.sync(), "best": best}
        return self.checkpoints.save(step, model, optimizer, {**state, "run": own}, best)

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint: forget the metrics that it does not cover. Raises RunError."""
        self._cut(checkpoint.state["run"]["metrics_bytes"])

    def amend(self, epochs: Sequence[Epoch]) -> None:
        """Make these the epochs of the run: those that other ranks have closed, where this one was interrupted.

        Raises RunError.
        """
        if len(epochs) < len(self._history):
            self._cut(bytes_of(self.folder / METRICS, len(epochs)))
        for epoch in epochs[len(self._history) :]:
            self.log_epoch(epoch)

    def finish(self, result: Mapping[str, Any], params: Params | None = None) -> None:
        """Write ``result.json``, which makes the run a finished one; params: the weights that the result is of.

        Raises RunError.
        """
        self._writing().metrics.sync()
        record = _as_json({**result, "run": str(self.folder)})
        directory.write_json(self.folder / RESULT, record)
        self._result = record
        self._params = params

    def _cut(self, size: int) -> None:
        """Keep so many bytes of the metrics, and the epochs in them."""
        writer = self._writing()
        writer.metrics.close()
        path = self.folder / METRICS
        self._writer = writer._replace(metrics=MetricsLog(path, keep=size))
        self._history = list(read_history(path))

    def _writing(self) -> "_Writer":
        if self._writer is None:
            raise RunError(f"{self.folder} is open for reading only; resume the run to write to it")
        return self._writer


class _Writer(NamedTuple):
    """What only the one process that writes a run holds."""

    lock: RunLock
    metrics: MetricsLog


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _restart(checkpoints: Checkpointer, metrics: Path, expect: Shapes | None) -> tuple[Checkpoint | None, int]:
    """The checkpoint to go on from, and how many bytes of the metrics it covers."""
    checkpoints.sweep()
    checkpoint = checkpoints.load_latest(expect)
    if checkpoint is None:
        return None, 0
    own = checkpoint.state["run"]
    covered: int = own["metrics_bytes"]
    marked = None
    with suppress(CheckpointError):
        marked = checkpoints.best_step
    if own["best"] and marked != checkpoint.step:
        checkpoints.mark_best(checkpoint.step)  # killed between the checkpoint and its mark
    size = metrics.stat().st_size if metrics.exists() else 0
    if size < covered:
        lost = f"{metrics} is shorter than it was at step {checkpoint.step}: some epochs are missing from the history"
        checkpoint = replace(checkpoint, warnings=(*checkpoint.warnings, lost))
    return checkpoint, covered


def _require_same(before: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str], folder: Path) -> None:
    old, new = flatten(before), flatten(now)
    for key in sorted(old.keys() | new.keys()):
        allowed = any(key == name or key.startswith(f"{name}.") for name in may_change)
        if not allowed and old.get(key) != new.get(key):
            raise ConfigError(
                f"{key}: the run in {folder} has {old.get(key)!r}, given was {new.get(key)!r}; "
                "resume with the run's own value, or start a new run"
            )


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(durable.encode_json(dict(value)))
    return plain


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.exists():
        raise RunError(f"{folder} is not a run: it has no {RECORD}; give the folder that training wrote")
    record = directory.read_json(path)
    if record.get("format") != _FORMAT:
        raise RunError(f"{path} has format {record.get('format')}, this version of Convolt reads {_FORMAT}; update it")
    if not isinstance(record.get("config"), dict) or not isinstance(record.get("environment"), dict):
        raise RunError(f"{path} is damaged: it must hold a config and an environment")
    return record
