"""How many processes share a batch: the communicator, and the serial one.

Three verbs are enough for data parallelism: sums of gradients and of metrics (allreduce), equal starts (broadcast),
and waiting (barrier). Which samples of a global batch a rank computes is decided here as well, in one place: the
loss curve is then the same at any number of ranks.
"""

from typing import Any, Protocol

from numpy.typing import NDArray


class Communicator(Protocol):
    """Processes that train one model together. ``rank`` counts from 0 to ``size`` - 1; rank 0 writes the run."""

    @property
    def rank(self) -> int:
        """This process."""

    @property
    def size(self) -> int:
        """All processes."""

    def allreduce(self, array: NDArray[Any]) -> None:
        """Replace the array on every rank by the sum over all ranks, in place; the same bits everywhere."""

    def broadcast(self, array: NDArray[Any]) -> None:
        """Replace the array on every rank by rank 0's, in place."""

    def barrier(self) -> None:
        """Wait until every rank is here."""


class Serial:
    """One process: sums and copies are what is there already."""

    rank = 0
    size = 1

    def allreduce(self, array: NDArray[Any]) -> None:
        """The sum over one rank is the array."""

    def broadcast(self, array: NDArray[Any]) -> None:
        """Rank 0's array is the array."""

    def barrier(self) -> None:
        """Nobody to wait for."""


def shard(count: int, comm: Communicator) -> slice:
    """The part of ``count`` samples that this rank computes; parts differ by at most one sample.

    >>> shard(10, Serial())
    slice(0, 10, None)
    """
    return slice(count * comm.rank // comm.size, count * (comm.rank + 1) // comm.size)
