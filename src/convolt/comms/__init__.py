"""How many processes share a batch: the communicator, and the serial one. A file here is one way to communicate.

Sums of gradients and of metrics, equal starts, waiting: that is all data parallelism needs. Which samples of a global
batch a rank computes is decided here as well, in one place: the loss curve is then the same at any number of ranks.

The gradient is one array that is summed again and again, so its sum is an object, `Summation`: parts of it may leave
while the rest is still being computed, and the sum need not reach every rank whole.
"""

import json
import os
import platform
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Home:
    """Memory of every rank, by rank, for its gradient and its weights, where the others read them without a copy.

    gradient, weights: those of this rank.
    """

    gradients: tuple[Array, ...]
    all_weights: tuple[Array, ...]
    rank: int

    @property
    def gradient(self) -> Array:
        """Where this rank's gradient lies."""
        return self.gradients[self.rank]

    @property
    def weights(self) -> Array:
        """Where this rank's weights lie."""
        return self.all_weights[self.rank]


class Summation(Protocol):
    """The sum over ranks of one array that is filled anew in each step.

    scattered: whether each rank gets the sum of its own part only. own: what this rank holds the sum of after `finish`;
    the whole array, unless it is scattered.
    early: whether parts really leave when they are added; if not, a computation need not be cut to add them early.
    """

    scattered: bool
    own: slice
    early: bool

    def add(self, part: slice) -> None:
        """Tell that this part of the array is final and may leave; every element is told once a step."""

    def finish(self) -> None:
        """Wait for the sum, in place."""

    def share(self, array: Array) -> None:
        """Give every rank all parts of an array of the same length, each from the rank whose own it is."""


class Communicator(Protocol):
    """Processes that train one model together. ``rank`` counts from 0 to ``size`` - 1; rank 0 writes the run.

    Every method but the properties is called by all ranks, in the same order.
    """

    @property
    def rank(self) -> int:
        """This process."""

    @property
    def size(self) -> int:
        """All processes."""

    @property
    def node_rank(self) -> int:
        """This process among those of its machine, from 0."""

    @property
    def node_size(self) -> int:
        """The processes that share this one's machine, itself included."""

    def allreduce(self, array: Array) -> None:
        """Replace the array on every rank by the sum over all ranks, in place; the same bits everywhere."""

    def home(self, gradient: Array, weights: Array) -> Home | None:
        """New memory for arrays like these two; None where ranks have none in common."""

    def summation(
        self, array: Array, scattered: bool = False, wire: str = "fp32", home: Home | None = None
    ) -> Summation:
        """What sums this array in every step; scattered: each rank gets its own part only.

        wire: "bf16" sends two bytes a number where the array has four, and adds in float32. home: in which the array
        is the gradient, and which may have the weights that are shared.
        """

    def broadcast(self, array: Array, root: int = 0) -> None:
        """Replace the array on every rank by that of rank ``root``, in place."""

    def barrier(self) -> None:
        """Wait until every rank is here; after `survive` it fails on all ranks or on none."""

    def survive(self) -> None:
        """From now on the death of a rank raises RanksLost in the others. Raises EngineError where nothing can."""

    def shrink(self) -> None:
        """After RanksLost, on all that are left: go on without the lost ones. Ranks keep their order, not their number.

        What `summation` gave before is worth nothing afterwards. Raises RanksLost when more of them die meanwhile.
        """


class BlockingSum:
    """A summation that is one allreduce at the end: for one process, and for communicators that know nothing else."""

    early = scattered = False

    def __init__(self, comm: Communicator, array: Array) -> None:
        self.own = slice(0, array.size)
        self._comm, self._array = comm, array

    def add(self, part: slice) -> None:
        """Nothing leaves early."""

    def finish(self) -> None:
        """One allreduce."""
        self._comm.allreduce(self._array)

    def share(self, array: Array) -> None:
        """Every rank has all of it."""


class Serial:
    """One process: sums and copies are what is there already."""

    rank = 0
    size = 1
    node_rank = 0
    node_size = 1

    def allreduce(self, array: Array) -> None:
        """The sum over one rank is the array."""

    def home(self, gradient: Array, weights: Array) -> Home | None:
        """Nobody else reads them."""
        return None

    def summation(
        self, array: Array, scattered: bool = False, wire: str = "fp32", home: Home | None = None
    ) -> Summation:
        """The sum over one rank is the array."""
        return BlockingSum(self, array)

    def broadcast(self, array: Array, root: int = 0) -> None:
        """The root's array is the array."""

    def barrier(self) -> None:
        """Nobody to wait for."""

    def survive(self) -> None:
        """Nobody to lose."""

    def shrink(self) -> None:
        """Nobody was lost."""


def shard(count: int, comm: Communicator) -> slice:
    """The part of ``count`` samples that this rank computes; parts differ by at most one sample.

    >>> shard(10, Serial())
    slice(0, 10, None)
    """
    return part_of(count, comm.rank, comm.size)


def part_of(count: int, rank: int, size: int) -> slice:
    """The part of ``count`` things that falls to a rank; parts differ by at most one.

    >>> [part_of(10, rank, 3) for rank in range(3)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 10, None)]
    """
    return slice(count * rank // size, count * (rank + 1) // size)


def whereabouts(comm: Communicator, threads: int) -> list[dict[str, Any]]:
    """Machine, process, cores allowed and threads of every rank, by rank, on every rank."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    own = {"host": platform.node(), "pid": os.getpid(), "cores": cores, "threads": threads}
    return [{"rank": rank, **json.loads(said)} for rank, said in enumerate(texts(comm, json.dumps(own)))]


def texts(comm: Communicator, text: str) -> tuple[str, ...]:
    """What each rank says, by rank, on every rank."""
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = np.zeros(comm.size, np.int64)
    lengths[comm.rank] = len(data)
    comm.allreduce(lengths)
    rows = np.zeros((comm.size, int(lengths.max())), np.uint8)
    rows[comm.rank, : len(data)] = data
    comm.allreduce(rows)
    return tuple(bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True))
