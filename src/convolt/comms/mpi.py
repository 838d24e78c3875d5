"""Ranks by MPI, through mpi4py: buffers only, no pickled objects.

Nothing blocks inside MPI: every operation is a non-blocking one that is asked again and again whether it is done, with
the core given away after a short while. An MPI library waits by spinning, which is the fastest where every rank has a
core of its own and the slowest where two share one: the one that waits then takes the time of the one waited for.

Every error of MPI itself ends all ranks, as MPI has it by default. An exception in one rank does so where the program
runs under ``python -m mpi4py``, which `launch` sees to, and in the command line, which ends with `Mpi.abort`.

Where MPI has ULFM (user-level failure mitigation: Bland et al., IJHPCA 2013), the death of a rank need not be the end.
The first to notice revokes the communicator, so that no survivor waits for ever, and `shrink` makes a new one of all
survivors. Two things are the same on all of them, whatever dies when: what `shrink` gives, and whether a `barrier` is
passed, which is an agreement. Of any other operation some may have the result and others RanksLost.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from convolt.comms import Array, Home, Serial, Summation
from convolt.comms.memory import lives, shared_rows
from convolt.comms.messages import BucketSum
from convolt.comms.shared import SharedSum, places, row_bytes
from convolt.errors import EngineError, MissingDependency, RanksLost
from convolt.launch import ULFM, placement

SPINS = 2000  # questions asked before the core is given away for the first time, about half a millisecond
YIELDS = 2000  # times it is given away before sleeping
NAP = 5e-5  # seconds
LOOKS = 20_000  # naps after which a rank looks whether those of its machine live: a second or two

# Set by `mpiexec --with-ft ulfm` for its ranks; and what makes MPI_Finalize not wait for ranks that died long ago.
FAULT_TOLERANT, UNSYNCHRONIZED_END = "OMPI_MCA_mpi_ft_enable", "OMPI_MCA_async_mpi_finalize"


class Mpi:
    """The ranks of an MPI communicator; without one, all that were started.

    comm: an mpi4py communicator; a duplicate of it is used, so that no message of others is taken for ours.
    through_memory: whether ranks that are all on one machine add through shared memory; messages otherwise.
    Raises MissingDependency, EngineError.
    """

    def __init__(self, comm: Any = None, through_memory: bool = True) -> None:
        self._mpi = _library()
        self._losses = (self._mpi.ERR_PROC_FAILED, self._mpi.ERR_PROC_FAILED_PENDING, self._mpi.ERR_REVOKED)
        self._through_memory, self._survives, self._disagreed = through_memory, False, False
        self._abandoned: list[Any] = []
        self._take((self._mpi.COMM_WORLD if comm is None else comm).Dup())

    def allreduce(self, array: Array) -> None:
        """The library's sum."""
        with self._noticing():
            self._wait(self._comm.Iallreduce(self._mpi.IN_PLACE, array))

    def home(self, gradient: Array, weights: Array) -> Home | None:
        """In shared memory, if all ranks are on one machine."""
        if not self._on_one_machine:
            return None
        gradients, all_weights = (self._new_memory(array.nbytes) for array in (gradient, weights))
        if gradients is None or all_weights is None:
            return None
        return Home(places(gradients, gradient), places(all_weights, weights), self.rank)

    def summation(
        self, array: Array, scattered: bool = False, wire: str = "fp32", home: Home | None = None
    ) -> Summation:
        """Through shared memory on one machine, by messages otherwise and for bf16."""
        rows = self._memory(row_bytes(array)) if self._on_one_machine and wire == "fp32" else None
        if rows is not None:
            return SharedSum(array, rows, self.rank, scattered, self._meet, home)
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

    def broadcast(self, array: Array, root: int = 0) -> None:
        """The library's broadcast."""
        with self._noticing():
            self._wait(self._comm.Ibcast(array, root=root))

    def barrier(self) -> None:
        """The library's barrier, or agreement."""
        with self._noticing():
            if self._survives:
                self._agree(True)
            else:
                self._wait(self._comm.Ibarrier())

    def survive(self) -> None:
        """By ULFM, which must be there and asked for."""
        name, version = self._mpi.get_vendor()
        if name != "Open MPI" or version < (5,):
            raise EngineError(f"{ULFM}; this is {name} {'.'.join(map(str, version))}")
        if os.environ.get(FAULT_TOLERANT, "0").lower() not in ("1", "true"):
            raise EngineError(f"{ULFM}; mpiexec was started without --with-ft ulfm")
        self._survives = True

    def shrink(self) -> None:
        """By ULFM: nobody waits on the old communicator any more, everybody gets a new one."""
        with self._noticing():
            before = self._comm
            for each in (before, self._node):
                each.Revoke()
            if not self._disagreed:  # others may be in a barrier, which only an agreement ends
                with suppress(RanksLost):
                    self._agree(False)
            self._disagreed = False
            self._abandoned += self._under_way  # MPI may still write where these point to
            self._take(before.Shrink())

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

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """RanksLost in place of what MPI says when a process failed, or when another rank noticed it."""
        try:
            yield
        except self._mpi.Exception as error:
            if error.Get_error_class() not in self._losses and not self._is_damaged():
                raise
            raise RanksLost("a rank that this one works with has died") from error

    def _is_damaged(self) -> bool:
        """Whether a rank is known to have failed: Open MPI 5 may then say of a sum only that it went wrong."""
        return self._survives and any(
            each.Is_revoked() or each.Get_failed().Get_size() > 0 for each in (self._comm, self._node)
        )

    def _take(self, comm: Any) -> None:
        """These are the ranks from now on."""
        self._comm = comm
        self.rank, self.size = int(comm.Get_rank()), int(comm.Get_size())
        self._node = comm.Split_type(self._mpi.COMM_TYPE_SHARED, key=self.rank)
        self.node_rank, self.node_size = int(self._node.Get_rank()), int(self._node.Get_size())
        if self._survives:
            self._agree(True)  # or one waits on its machine's communicator for another that has got none
        self._under_way: list[Any] = []
        self._processes: list[int] = []
        self._rows: dict[int, list[Array] | None] = {}
        word = self._memory(8)
        self._failed = np.zeros(1, np.int64) if word is None else word[0][:8].view(np.int64)
        processes = np.zeros(self.node_size, np.int64)
        processes[self.node_rank] = os.getpid()
        self._add_on_node(processes)
        # Where ranks cannot see one another's memory, their numbers of processes may be those of other machines.
        self._processes = [] if word is None else processes.tolist()

    @property
    def _on_one_machine(self) -> bool:
        return self._through_memory and self.node_size == self.size

    def _memory(self, size: int) -> list[Array] | None:
        """Memory that the ranks of this machine share: a row for each; the same one if asked again."""
        if size not in self._rows:
            self._rows[size] = self._new_memory(size)
        return self._rows[size]

    def _new_memory(self, size: int) -> list[Array] | None:
        return shared_rows(size, self.node_rank, self.node_size, self._add_on_node)

    def _add_on_node(self, array: Array) -> None:
        with self._noticing():
            self._wait(self._node.Iallreduce(self._mpi.IN_PLACE, array))

    def _meet(self) -> None:
        with self._noticing():
            self._wait(self._node.Ibarrier())

    def _agree(self, well: bool) -> None:
        """Raise RanksLost on all ranks as soon as one is not well or not there."""
        with self._noticing():
            flag = np.array([well], np.int32)
            self._disagreed = True
            self._wait(self._comm.Iagree(flag))
            if not flag[0]:
                raise RanksLost("another rank has noticed that one of them died")
            self._disagreed = False

    def _wait(self, request: Any) -> None:
        with self._noticing():
            asked = 0
            while not request.Test():
                asked += 1
                if asked > SPINS + YIELDS:
                    time.sleep(NAP)
                    if asked % LOOKS == 0:
                        self._look()
                elif asked > SPINS:
                    os.sched_yield()

    def _look(self) -> None:
        """Raise EngineError if a rank of this machine is gone: most launchers end the others then, Slurm does not."""
        if self._survives:
            return
        for process in self._processes:
            if not lives(process):
                raise EngineError(
                    f"process {process}, another rank on this machine, is gone (killed, or out of memory); a run can be"
                    " resumed from its last checkpoint, on any number of ranks"
                )

    def _progress(self) -> None:
        with self._noticing():
            self._under_way = [request for request in self._under_way if not request.Test()]

    def _start_all_to_all(self, sent: Array, counts: list[int], received: Array, received_counts: list[int]) -> Any:
        with self._noticing():
            request = self._comm.Ialltoallv([sent, counts], [received, received_counts])
            self._under_way.append(request)
            return request

    def _start_all_gather(self, array: Array, counts: list[int]) -> Any:
        with self._noticing():
            request = self._comm.Iallgatherv(self._mpi.IN_PLACE, [array, counts])
            self._under_way.append(request)
            return request


def world() -> Mpi | Serial:
    """All ranks that were started with this one; serial if a launcher started none.

    Raises MissingDependency; EngineError where the MPI library knows of other ranks than the launcher.
    """
    where = placement()
    if where is None or where.size == 1:
        return Serial()
    comm = Mpi()
    if comm.size != where.size:
        raise EngineError(
            f"ranks: the launcher started {where.size}, and the MPI library knows of {comm.size}: they do not speak the"
            " same language. Take the mpiexec of that library, convolt train --ranks N, or with Slurm"
            " srun --mpi=pmi2 (MPICH) or --mpi=pmix (Open MPI); srun --mpi=list shows what it has"
        )
    return comm


def _library() -> Any:
    if FAULT_TOLERANT in os.environ:
        os.environ.setdefault(UNSYNCHRONIZED_END, "1")
    try:
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        raise MissingDependency("mpi4py", "more than one rank", "mpi") from error
    except (ImportError, RuntimeError) as error:
        line = " ".join(str(error).split())
        raise EngineError(f"mpi4py found no MPI library ({line}); run: pip install 'convolt[mpi]'") from error
    return MPI
