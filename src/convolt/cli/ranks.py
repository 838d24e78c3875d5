"""A verb on several ranks: starting them, and how they end together.

The first rank that fails says why, in one line, and ends all others; rank 0 alone speaks otherwise. Whoever started
``mpiexec`` by hand gets the same: MPI is entered before anything can go wrong, so nobody waits for a rank that never
came.
"""

import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import click

from convolt import launch
from convolt.callbacks import Callback, StepEvent
from convolt.comms import Communicator
from convolt.comms.mpi import Mpi, world
from convolt.errors import ConfigError, ConvoltError
from convolt.history import Epoch
from convolt.run import Run
from convolt.signals import ExitCode

CARRIED = 0.25  # seconds that a launcher gets to carry the last words, which it may drop once it ends the ranks
PATIENCE = 1.0  # seconds that the rank which speaks gets, before the others end it


class Ranks:
    """The ranks of this program, as a context: an exception in one of them ends all.

    tell: what puts an error into a line and a code.
    """

    def __init__(self, debug: bool, tell: Callable[[BaseException, str], int]) -> None:
        self.comm: Communicator = world()
        self._debug, self._tell = debug, tell
        if self.comm.size > 1:
            warnings.showwarning = self._of_first(warnings.showwarning)

    def __enter__(self) -> Communicator:
        return self.comm

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(self.comm, Mpi):
            return
        if error is None or isinstance(error, click.exceptions.Exit):
            self.comm.finalize()
            return
        expected = isinstance(error, ConvoltError | OSError | MemoryError | click.ClickException | KeyboardInterrupt)
        code = int(ExitCode.ERROR)
        if self.comm.speaks_first():
            if self._debug or not expected:
                traceback.print_exception(error)
            code = self._tell(error, f"rank {self.comm.rank}: ")
            sys.stderr.flush()
            self.comm.linger(CARRIED)
        else:
            self.comm.linger(PATIENCE)
        self.comm.abort(code)

    def _of_first(self, show: Callable[..., None]) -> Callable[..., None]:
        """Warnings as they are shown, but by rank 0 alone, whoever that is."""

        def show_once(*about: Any) -> None:
            if self.comm.rank == 0:
                show(*about)

        return show_once


class OfFirst(Callback):
    """What another callback tells people, told by rank 0 alone, whoever that is at the time."""

    def __init__(self, comm: Communicator, callback: Callback) -> None:
        self._comm, self._callback = comm, callback

    def on_start(self, run: Run) -> None:
        if self._comm.rank == 0:
            self._callback.on_start(run)

    def on_step(self, step: StepEvent) -> None:
        self._callback.on_step(step)

    def on_epoch(self, epoch: Epoch) -> None:
        if self._comm.rank == 0:
            self._callback.on_epoch(epoch)

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        self._callback.on_end(result)


def start(ranks: int, arguments: Sequence[str], resume: str | None, elastic: bool = False) -> int:
    """Start ``convolt ARGUMENTS`` on so many ranks and wait; returns the exit code. Raises what `launch.run` does."""
    ended = launch.run(ranks, arguments, elastic=elastic)
    if ended.code > launch.KILLED and ended.code not in (launch.KILLED + 2, launch.KILLED + 15):
        way_on = f"convolt train --resume {resume}" if resume else "convolt train --resume RUN"
        who = "every rank" if elastic else "a rank"
        click.echo(
            f"convolt: error: {who} was killed (signal {ended.code - launch.KILLED}), so all have ended; go on from"
            f" the last checkpoint with: {way_on} --ranks {ranks}",
            err=True,
        )
    return ended.code


def wanted(ranks: int | None) -> int:
    """How many ranks to start: 1 where this process is one already. Raises ConfigError."""
    where = launch.placement()
    if where is None or where.size == 1:
        launch.check_ranks(1 if ranks is None else ranks)
        return ranks or 1
    if ranks not in (None, where.size):
        raise ConfigError(f"--ranks {ranks}: this is one of {where.size} ranks already; leave out --ranks")
    return 1


def describe(ranks: Sequence[dict[str, Any]]) -> str:
    """Where ranks run, in a line: ``2 ranks x 1 threads on one machine; cores 0-1 for each``."""
    hosts = {each["host"] for each in ranks}
    cores = [_runs(each["cores"]) for each in ranks]
    where = "one machine" if len(hosts) == 1 else f"{len(hosts)} machines"
    which = f"{cores[0]} for each" if len(set(cores)) == 1 else ", ".join(cores)
    return f"{len(ranks)} ranks x {ranks[0]['threads']} threads on {where}; cores {which}"


def oversubscribed(ranks: Sequence[dict[str, Any]]) -> str | None:
    """A warning where a machine has fewer cores than the threads of its ranks."""
    for host in sorted({each["host"] for each in ranks}):
        here = [each for each in ranks if each["host"] == host]
        threads, cores = sum(each["threads"] for each in here), {core for each in here for core in each["cores"]}
        if cores and threads > len(cores):
            return f"{threads} threads of {len(here)} ranks share {len(cores)} cores of {host}: no speed to be had"
    return None


def _runs(cores: Sequence[int]) -> str:
    """``0-3,8`` of core numbers."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][-1] + 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in parts)
