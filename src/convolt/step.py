"""Optimizer steps on global batches, by one process or by many.

With ranks a step has four parts, which `Seconds` keeps apart: each rank computes the gradient of its samples, whose
parts may leave on the way; a handful of numbers is added up (loss, correct answers, BatchNorm's statistics, whether a
signal came), which is also where ranks wait for the slowest; then for what is left of the gradient's sum; and the
weights move. The numbers are the same bits on every rank, so all of them decide alike what to do about a loss that is
not finite and when to stop.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np

from convolt.comms import Array, Communicator
from convolt.engine import Executor, StepInput, StepResult
from convolt.errors import RanksLost
from convolt.loader import Batch
from convolt.metrics import correct
from convolt.optimizers import Optimizer, clip_by_norm, clip_by_value
from convolt.parallel import Parallel
from convolt.recipe import Recipe
from convolt.signals import SIGNALS, StopRequest

BLOCK = 1 << 13  # elements whose squares are added in their own format; of more, BLAS would make a task for threads


class Outcome(NamedTuple):
    """What a step on the global batch gave: the summed loss (NaN: nothing was changed) and how many were right."""

    loss: float
    right: int


@dataclass
class Seconds:
    """Where a rank's time in steps went.

    waiting: for the slowest rank; communication: for numbers on their way, what backward did not cover.
    """

    compute: float = 0.0
    communication: float = 0.0
    waiting: float = 0.0


class Stepper:
    """Steps of one run on one rank."""

    def __init__(
        self, executor: Executor, recipe: Recipe, comm: Communicator, parallel: Parallel, stop: StopRequest
    ) -> None:
        self.executor, self.recipe, self.comm, self.parallel, self.stop = executor, recipe, comm, parallel, stop
        self.seconds = Seconds()
        self.join()
        if self._synced:
            executor.synchronize_statistics(comm.allreduce)

    def join(self) -> None:
        """Take part in steps with the ranks that there are; again after ranks were lost."""
        comm, parallel, executor = self.comm, self.parallel, self.executor
        self._asked: int | None = None
        self._drifted = False
        self._serial = comm.size == 1
        self._local = parallel.local_steps > 1 and not self._serial
        moves = not self._local and parallel.wire == "fp32"
        home = comm.home(executor.grads.flat, executor.params.flat) if moves else None
        if home is not None and not executor.move(home.weights, home.gradient):
            home = None
        self._sum = comm.summation(executor.grads.flat, parallel.shards, parallel.wire, home)
        self._own = self._sum.own if self._sum.scattered else None
        self._synced = parallel.sync_batch_norm and not self._serial and bool(self.executor.params.buffers)

    def prepare(self, batch: Batch) -> None:
        """Before the first step: one rank of each machine compiles, and the others find it on disk."""
        pieces = list(batch.pieces(self.recipe.micro_batch_size))
        if self._serial:
            return
        for turn in (True, False):
            if (self.comm.node_rank == 0) == turn and pieces:
                self.executor.prepare(pieces[0].images)
            self.comm.barrier()

    # ------------------------------------------------------------------------------------------------------- steps

    def steps(
        self, batches: Sequence[Batch], optimizers: Sequence[Optimizer], meanwhile: Callable[[], None] | None = None
    ) -> list[Outcome]:
        """One step, or as many as there are batches if it ``fuses``; up to the first that is not finite.

        Weights and statistics stay as they are in a step whose loss, gradient or statistic is not finite, and when this
        raises RanksLost. meanwhile: see ``Executor.train_step``.
        """
        executor = self.executor
        statistics = executor.statistics()
        if self._direct(batches[0].size):
            outcomes = self._taken(batches, optimizers, meanwhile)
        else:
            try:
                outcomes = [self._accumulated(batches[0], optimizers[0], statistics)]
            except RanksLost:
                executor.restore_statistics(statistics)
                raise
        if not math.isfinite(outcomes[-1].loss):
            executor.restore_statistics(statistics)
        return outcomes

    def step(self, batch: Batch, optimizer: Optimizer) -> Outcome:
        """One step."""
        return self.steps([batch], [optimizer])[0]

    @property
    def fuses(self) -> bool:
        """Whether ``steps`` takes more than one, which the engine gains by.

        Not where there are statistics: they are put back as they were before the first.
        """
        executor = self.executor
        return executor.fuses_steps and not executor.statistics() and self._direct(self.recipe.batch_size)

    def _direct(self, size: int) -> bool:
        """Whether nothing stands between the gradient of a batch and the update."""
        recipe = self.recipe
        clipped = recipe.clip_norm is not None or recipe.clip_value is not None
        whole = recipe.micro_batch_size is None or recipe.micro_batch_size >= size
        return self._serial and whole and not clipped

    def _taken(
        self, batches: Sequence[Batch], optimizers: Sequence[Optimizer], meanwhile: Callable[[], None] | None
    ) -> list[Outcome]:
        works = [
            StepInput(batch.images, batch.targets, 1 / batch.size, optimizer, batch.rng)
            for batch, optimizer in zip(batches, optimizers, strict=True)
        ]
        results = self.executor.train_steps(works, self.recipe.loss, meanwhile)
        pairs = zip(results, batches, strict=False)  # fewer results where one is not finite
        return [Outcome(result.loss, right_of(result, batch)) for result, batch in pairs]

    def _accumulated(self, batch: Batch, optimizer: Optimizer, statistics: dict[str, Array]) -> Outcome:
        executor = self.executor
        began, compiled = time.perf_counter(), executor.compile_seconds
        equally_often = self._most_pieces(batch) if self._synced else 0
        pieces = list(batch.pieces(self.recipe.micro_batch_size, equally_often))
        results = self._gradient(pieces, batch)
        loss = sum(result.loss for result in results) if executor.statistics_are_finite() else math.nan
        computed = time.perf_counter()
        right = sum(right_of(*pair) for pair in zip(results, pieces, strict=True))
        loss, right = self._agree(loss, right, batch)
        agreed = time.perf_counter()
        if not self._local:
            self._sum.finish()
        summed = time.perf_counter()
        norm = self._norm()
        normed = time.perf_counter()
        shared = normed
        if math.isfinite(loss + norm):
            self._update(optimizer)
            shared = time.perf_counter()
            self._share_weights()
            self._count_batches(statistics, batch)
            self._drifted = self._local
        done = time.perf_counter()
        waits = (agreed - computed, summed - agreed, done - shared)
        self.seconds.waiting += waits[0]
        self.seconds.communication += waits[1] + waits[2]
        self.seconds.compute += done - began - sum(waits) - (executor.compile_seconds - compiled)
        return Outcome(loss if math.isfinite(norm) else math.nan, right)

    def _gradient(self, pieces: list[Batch], batch: Batch) -> list[StepResult]:
        """Forward and backward of every micro-batch; in the last one the gradient leaves slice by slice."""
        executor, recipe = self.executor, self.recipe
        if not pieces:
            executor.zero_grads()
        count = len(batch.labels) if self._local else batch.size
        early = self.parallel.overlap and self._sum.early and not self._local
        told: list[slice] = []

        def on_ready(part: slice) -> None:
            executor.grads  # noqa: B018 - where it lies on a device, asking brings it here
            self._sum.add(part)
            told.append(part)

        results = []
        for number, piece in enumerate(pieces, 1):
            leaves = on_ready if early and number == len(pieces) else None
            images, targets, scale, first = piece.images, piece.targets, 1 / max(1, count), number == 1
            results.append(executor.loss_and_grads(images, targets, recipe.loss, scale, piece.rng, leaves, fresh=first))
        if not self._local:
            for part in gaps(told, executor.grads.flat.size):
                self._sum.add(part)
        return results

    def _agree(self, loss: float, right: int, batch: Batch) -> tuple[float, int]:
        """Add up what all ranks must know; BatchNorm's statistics become their mean, weighted by samples."""
        if self._serial:
            return loss, right
        buffers = self.executor.params.buffers_flat
        averaged = buffers.size if not self._synced else 0
        numbers = np.zeros(2 + len(SIGNALS) + averaged)
        numbers[:2] = loss, right
        numbers[2 : 2 + len(SIGNALS)] = [self.stop.signal == number for number in SIGNALS]
        if averaged:
            numbers[-averaged:] = buffers * (len(batch.labels) / batch.size)
        self.comm.allreduce(numbers)
        self._asked = int(asked_of(numbers[2 : 2 + len(SIGNALS)]))
        if averaged:
            buffers[...] = numbers[-averaged:]
            self.executor.weights_changed()
        return float(numbers[0]), int(numbers[1])

    def _norm(self) -> float:
        """The gradient's norm: of the sum, wherever its parts are; of this rank's own in a local step."""
        if self._own is None and not self._local:
            return self.executor.grad_norm()
        part = self.executor.grads.flat[self._own or slice(None)]
        squares = np.array([square_sum(part)])
        own = float(squares[0])
        self.comm.allreduce(squares)  # in a local step it tells whether anybody's is not finite
        return math.sqrt(own) if self._local and math.isfinite(squares[0]) else math.sqrt(squares[0])

    def _update(self, optimizer: Optimizer) -> None:
        part = self.executor.grads.flat[self._own or slice(None)]
        if self.recipe.clip_value is not None:
            clip_by_value(part, self.recipe.clip_value)
        if self.recipe.clip_norm is not None:
            clip_by_norm(part, self.recipe.clip_norm, None if self._own is None else self._norm())
        self.executor.update(optimizer, self._own)

    def _share_weights(self) -> None:
        if self._own is not None:
            self._sum.share(self.executor.params.flat)
            self.executor.weights_changed()

    def _count_batches(self, before: dict[str, Array], batch: Batch) -> None:
        """BatchNorm's counters, on a rank without samples as on the others."""
        if self._serial:
            return
        for name, array in self.executor.params.buffers.items():
            if array.dtype.kind == "i":
                array[...] = before[name] + self._most_pieces(batch)

    def _most_pieces(self, batch: Batch) -> int:
        """Micro-batches of the rank that has most."""
        most = -(-batch.size // self.comm.size)
        return -(-most // (self.recipe.micro_batch_size or most))

    # --------------------------------------------------------------------------------------------- between two steps

    def asked_to_stop(self) -> int:
        """The signal that came to any rank, 0 if none did; all ranks get the same answer.

        A step has asked already: what came since is seen after the next one.
        """
        if self._serial:
            return int(self.stop.signal or 0)
        if self._asked is None:
            flags = np.array([float(self.stop.signal == number) for number in SIGNALS])
            self.comm.allreduce(flags)
            self._asked = int(asked_of(flags))
        asked, self._asked = self._asked, None
        return asked

    def meet(self, arrays: Iterable[Array]) -> None:
        """After local steps: every rank takes the mean of these arrays. Nothing to do after any other step."""
        if not self._drifted:
            return
        for array in arrays:
            self.comm.allreduce(array)
            np.divide(array, self.comm.size, out=array)
        self._drifted = False

    @property
    def drifted(self) -> bool:
        """Whether the ranks' weights differ, as after local steps."""
        return self._drifted

    def whole(self, arrays: Iterable[Array]) -> None:
        """Give every rank all parts of the optimizer's arrays, of which each keeps its own alone."""
        if self._own is not None:
            for array in arrays:
                self._sum.share(array)

    def all_seconds(self) -> dict[str, list[float]]:
        """Where each rank's time went, by rank."""
        table = np.zeros((self.comm.size, 3))
        table[self.comm.rank] = astuple(self.seconds)
        self.comm.allreduce(table)
        return {name: table[:, column].tolist() for column, name in enumerate(vars(self.seconds))}


def square_sum(values: Array) -> float:
    """The sum of squares, of blocks in the array's own format: no copy in a wider one is made."""
    blocks = (values[start : start + BLOCK] for start in range(0, values.size, BLOCK))
    return math.fsum(float(np.dot(block, block)) for block in blocks)


def right_of(result: StepResult, piece: Batch) -> int:
    """How many logits name their label; what an engine has counted holds for targets, which an augment may change."""
    if result.right is not None and piece.targets is piece.labels:
        return result.right
    return int(correct(result.logits, piece.labels).sum())


def asked_of(flags: Array) -> int:
    """The signal of the first flag that is up; 0 for none."""
    return next((int(number) for number, flag in zip(SIGNALS, flags, strict=True) if flag), 0)


def gaps(parts: list[slice], size: int) -> list[slice]:
    """What is left of ``size`` elements beside these parts.

    >>> gaps([slice(4, 6), slice(0, 2)], 8)
    [slice(2, 4, None), slice(6, 8, None)]
    """
    found, at = [], 0
    for part in sorted(parts, key=lambda part: part.start):
        if part.start > at:
            found.append(slice(at, part.start))
        at = max(at, part.stop)
    return [*found, slice(at, size)] if at < size else found
