"""Ranks by MPI, through mpi4py: buffers only, no pickled objects.

Nothing blocks inside MPI: every operation is a non-blocking one that is asked again and again whether it is done, with
the core given away after a short while. An MPI library waits by spinning, which is the fastest where every rank has a
core of its own and the slowest where two share one: the one that waits then takes the time of the one waited for.

Every error of MPI itself ends all ranks, as MPI has it by default. An exception in one rank does so where the program
runs under ``python -m mpi4py``, which `launch` sees to, and in the command line, which ends with `Mpi.abort`.
"""

import os
import time
from typing import Any

import numpy as np

from convolt.comms import Array, Serial, Summation
from convolt.comms.messages import BucketSum
from convolt.comms.shared import SharedSum, row_bytes
from convolt.errors import EngineError, MissingDependency
from convolt.launch import placement

SPINS = 2000  # questions asked before the core is given away for the first time, about half a millisecond
YIELDS = 2000  # times it is given away before sleeping
NAP = 5e-5  # seconds


class Mpi:
    """The ranks of an MPI communicator; without one, all that were started.

    comm: an mpi4py communicator; a duplicate of it is used, so that no message of others is taken for ours.
    through_memory: whether ranks that are all on one machine add through shared memory; messages otherwise.
    Raises MissingDependency, EngineError.
    """

    def __init__(self, comm: Any = None, through_memory: bool = True) -> None:
        self._mpi = _library()
        self._comm = (self._mpi.COMM_WORLD if comm is None else comm).Dup()
        self.rank, self.size = int(self._comm.Get_rank()), int(self._comm.Get_size())
        self._node = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED, key=self.rank)
        self.node_rank, self.node_size = int(self._node.Get_rank()), int(self._node.Get_size())
        self._through_memory = through_memory and self.node_size == self.size
        self._under_way: list[Any] = []
        self._windows: dict[int, list[Array]] = {}
        self._failed = self._memory(8)[0].view(np.int64)

    def allreduce(self, array: Array) -> None:
        """The library's sum."""
        self._wait(self._comm.Iallreduce(self._mpi.IN_PLACE, array))

    def summation(self, array: Array, scattered: bool = False, wire: str = "fp32") -> Summation:
        """Through shared memory on one machine, by messages otherwise and for bf16."""
        if self._through_memory and wire == "fp32":
            rows = self._memory(row_bytes(array))
            return SharedSum(array, rows, self.rank, scattered, self._meet)
        return BucketSum(
            array,
            self.rank,
            self.size,
            scattered,
            wire == "bf16",
            self._start_all_to_all,
            self._start_all_gather,
            self._wait,
            self._progress,
        )

    def broadcast(self, array: Array) -> None:
        """The library's broadcast."""
        self._wait(self._comm.Ibcast(array, root=0))

    def barrier(self) -> None:
        """The library's barrier."""
        self._wait(self._comm.Ibarrier())

    def speaks_first(self) -> bool:
        """Whether this rank is the first of its machine that has something to say about a failure.

        By shared memory alone: the other ranks may be anywhere, and take part in nothing any more.
        """
        if self._failed[0] == 0:
            self._failed[0] = 1 + self.rank
            time.sleep(20 * NAP)  # of ranks that come at the same moment, the last one to write
        return bool(self._failed[0] == 1 + self.rank)

    def linger(self, seconds: float) -> None:
        """Let others do what they have to, before this rank ends them or is ended."""
        time.sleep(seconds)

    def abort(self, code: int) -> None:
        """End every rank at once with this code."""
        try:
            self._mpi.COMM_WORLD.Abort(code)
        finally:
            os._exit(code)  # MPICH asks its launcher to end all ranks, this one as well, and goes on until it does

    def finalize(self) -> None:
        """Leave MPI in good order; the code of this process is its own affair afterwards."""
        self._mpi.Finalize()

    # ------------------------------------------------------------------------------------------------------- inside

    def _memory(self, size: int) -> list[Array]:
        """Memory that the ranks of this machine share: a row of so many bytes for each; the same one if asked again."""
        if size not in self._windows:
            window = self._mpi.Win.Allocate_shared(size, 1, comm=self._node)
            rows = [np.frombuffer(window.Shared_query(rank)[0], np.uint8, size) for rank in range(self.node_size)]
            rows[self.node_rank][:8] = 0
            self._windows[size] = rows
            self.barrier()
        return self._windows[size]

    def _meet(self) -> None:
        self._wait(self._node.Ibarrier())

    def _wait(self, request: Any) -> None:
        asked = 0
        while not request.Test():
            asked += 1
            if asked > SPINS + YIELDS:
                time.sleep(NAP)
            elif asked > SPINS:
                os.sched_yield()

    def _progress(self) -> None:
        self._under_way = [request for request in self._under_way if not request.Test()]

    def _start_all_to_all(self, sent: Array, counts: list[int], received: Array, received_counts: list[int]) -> Any:
        request = self._comm.Ialltoallv([sent, counts], [received, received_counts])
        self._under_way.append(request)
        return request

    def _start_all_gather(self, array: Array, counts: list[int]) -> Any:
        return self._comm.Iallgatherv(self._mpi.IN_PLACE, [array, counts])


def world() -> Mpi | Serial:
    """All ranks that were started with this one; serial if a launcher started none. Raises MissingDependency."""
    where = placement()
    return Serial() if where is None or where.size == 1 else Mpi()


def _library() -> Any:
    try:
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        raise MissingDependency("mpi4py", "more than one rank", "mpi") from error
    except (ImportError, RuntimeError) as error:
        line = " ".join(str(error).split())
        raise EngineError(f"mpi4py found no MPI library ({line}); run: pip install 'convolt[mpi]'") from error
    return MPI
