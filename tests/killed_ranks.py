"""A program for ranks that are killed, and keeps the books: ``killed_ranks.py FOLDER ATTEMPT FAULT [KEY=VALUE ...]``.

    mpiexec -n 2 python -m mpi4py tests/killed_ranks.py FOLDER 0 1:20000

Starts the run in FOLDER/run, or goes on with it. FAULT is ``RANK:CALLS``: that rank dies, as by kill -9, after so many
calls of functions; ``RANK:CALLS:steps`` counts from the first step; several are separated by commas, ``-`` is none.
KEY=VALUE are fields of `Parallel`; ``through_memory=false`` is for ranks that add by messages.

Every rank appends to FOLDER/books what it did: the samples that it took for each step, by a number in their first
pixel, before anything is computed of them, and the loss of each step that was done, and when; and when it died.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from parallel_runs import recipe
from small_runs import BATCH, MODEL, SIZE, STEPS_PER_EPOCH

from convolt.callbacks import Callback, StepEvent
from convolt.comms.mpi import Mpi, world
from convolt.data import Dataset
from convolt.early_stopping import EarlyStopping
from convolt.engines import Im2col
from convolt.loader import Batch, Loader
from convolt.optimizers import EMA
from convolt.parallel import Parallel
from convolt.run import Run
from convolt.train import fit

EPOCHS = 4
STEPS = EPOCHS * STEPS_PER_EPOCH
SAMPLES = STEPS_PER_EPOCH * BATCH - 4  # the last batch of an epoch is short
# Not Adam: the gradient of a bias in front of BatchNorm is zero but for rounding, which Adam would blow up.
RECIPE = recipe("nesterov", epochs=EPOCHS, ema=EMA(0.9), early_stopping=EarlyStopping(patience=9))


def numbered() -> Dataset:
    """Bands as in small_runs.py; the first pixel of a training image is its number."""
    generator = np.random.default_rng(0)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 3
        images = generator.integers(0, 160, (count, 1, SIZE, SIZE), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 2 * label : 2 * label + 2] += 60
        return images, labels

    train, valid, test = split(SAMPLES), split(40), split(40)
    train[0][:, 0, 0, 0] = np.arange(SAMPLES)
    return Dataset.from_arrays(*train, valid=valid, test=test, name="numbered")


class Books(Callback):
    """What this rank did, a line each, on disk as soon as it is said."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **record: Any) -> None:
        os.write(self._file, json.dumps(record).encode() + b"\n")

    def on_step(self, step: StepEvent) -> None:
        self.write(done=step.step - 1, loss=step.loss, at=time.monotonic())


@dataclass
class Death:
    """Comes after so many calls."""

    calls: int
    books: Books

    def begin(self) -> None:
        sys.setprofile(self._count)

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        self.calls -= 1
        if self.calls == 0:
            self.books.write(died=time.monotonic())
            os.kill(os.getpid(), signal.SIGKILL)


class AtStart(Callback):
    """Calls something before the first step."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_start(self, run: Run) -> None:
        self._function()


def _parted(setting: str) -> tuple[str, str, str]:
    return setting.partition("=")


def main(folder: Path, attempt: str, faults: str, *settings: str) -> None:
    options = {"sync_batch_norm": True, **{name: json.loads(value) for name, _, value in map(_parted, settings)}}
    comm = world() if options.pop("through_memory", True) else Mpi(through_memory=False)
    books = Books(folder / "books" / f"{attempt}-{comm.rank}.jsonl")
    callbacks: list[Callback] = [books]
    for fault in faults.split(",") if faults != "-" else ():
        rank, calls, *since = fault.split(":")
        if int(rank) == comm.rank:
            death = Death(int(calls), books)
            if since:
                callbacks.append(AtStart(death.begin))
            else:
                death.begin()
    load = Loader.batches

    def told(self: Loader, first: int, count: int) -> list[Batch]:
        batches = load(self, first, count)
        for step, batch in enumerate(batches, first):
            books.write(takes=step, samples=batch.images[:, 0, 0, 0].tolist(), rank=comm.rank, size=comm.size)
        return batches

    Loader.batches = told
    fit(
        MODEL,
        numbered(),
        RECIPE,
        engine=Im2col(threads=1),
        comm=comm,
        parallel=Parallel(**options),
        out=folder / "run",
        resume=(folder / "run" / "run.json").exists(),
        checkpoint_every="4ba",
        callbacks=callbacks,
    )
    if comm.rank == 0:
        (folder / "finished").write_text(str(comm.size))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
