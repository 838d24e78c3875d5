"""Programs and the teams of threads that run them.

A training step is a `Program`: phases, one after another; in each, the same kernels for every chunk. A `Team` runs it
in one call that holds no lock of Python's: `driver` says how chunks are claimed and how threads wait. Which thread runs
a chunk is left to chance, so kernels must not let it matter: a chunk owns what it writes, or writes to scratch memory
of its thread that nobody reads after the chunk. Chunks of a phase must not wait for one another: one thread may run
them all.

The threads are Python's (so that tools see them), each in the driver from start to `close`.
"""

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convolt.engines.jit.compiler import Compiler
from convolt.errors import EngineError

# The memory of a team, byte offsets. What threads write often has a line of its own (two cache lines: the hardware
# fetches in pairs).
TICKET, DONE = 0, 128
PROGRAM, TIMINGS, STOP, THREADS, ACTIVE, REST_UNTIL, ENDED = 256, 264, 272, 280, 288, 296, 304
THREAD_LINES, THREAD_LINE = 384, 128
ASLEEP, SEMAPHORE, CLOCK = 0, 8, 40  # in a thread's line; a sem_t takes 32 bytes

FINISHED = -(1 << 32)
"""The ticket when no program runs: no phase, no chunk."""

ABSENT = -1
"""In the place of a thread's number: a caller that begins a program and has something else to do at first."""

_MAX_CHUNKS = 1 << 31


@dataclass(frozen=True)
class Phase:
    """Kernels, each a pair of addresses (function, arguments), run in this order for each of `chunks` chunks."""

    name: str
    kernels: tuple[tuple[int, int], ...]
    chunks: int

    def __post_init__(self) -> None:
        if not 1 <= self.chunks < _MAX_CHUNKS:
            raise EngineError(f"phase {self.name}: chunks must be from 1 to {_MAX_CHUNKS - 1}, got {self.chunks}")


@dataclass(frozen=True)
class Waiting:
    """When a thread gives up its core, in nanoseconds.

    With nothing to do it spins, lends the core out after `yield_after` and sleeps after `sleep_after`. One that was
    `preempted` for so long and a quarter of the time in the middle of a chunk makes the team smaller for the time of a
    `rest`.
    """

    yield_after: int = 5_000
    sleep_after: int = 1_000_000
    preempted: int = 1_000_000
    rest: int = 20_000_000


class Program:
    """Phases in the form the driver reads: counts, three words a phase, two words a kernel.

    keep: whatever owns the memory that the addresses point to; it lives as long as the program.
    """

    def __init__(self, phases: Sequence[Phase], keep: Any = None):
        if not phases:
            raise EngineError("a program needs at least one phase")
        self.phases = tuple(phases)
        self.keep = keep
        kernels = [kernel for phase in phases for kernel in phase.kernels]
        ends = np.cumsum([len(phase.kernels) for phase in phases])
        rows = [(phase.chunks, end - len(phase.kernels), end) for phase, end in zip(phases, ends, strict=True)]
        self.words = np.array([len(phases), len(kernels), *sum(rows, ()), *sum(kernels, ())], np.int64)
        self.address = int(self.words.ctypes.data)


@dataclass(frozen=True)
class PhaseProfile:
    """Seconds of one phase: from start to end, and in each kernel, summed over threads."""

    name: str
    wall: float
    kernels: tuple[float, ...]


@dataclass
class _State:
    """What the threads share, and how they are ended; it must not refer to the team, whose end ends them."""

    memory: NDArray[np.int64]
    driver: Any
    threads: list[threading.Thread] = field(default_factory=list)

    def semaphore(self, thread: int) -> int:
        return int(self.memory.ctypes.data) + THREAD_LINES + thread * THREAD_LINE + SEMAPHORE

    def stop(self) -> None:
        libc = ctypes.CDLL(None)
        self.memory[STOP // 8] = 1
        for number, _ in enumerate(self.threads, 1):
            libc.sem_post(ctypes.c_void_p(self.semaphore(number)))
        for thread in self.threads:
            thread.join()


class Team:
    """`threads` threads that run programs together; the caller is one of them.

    They end with `close`, with the team, or with the process, whichever comes first.
    """

    def __init__(self, threads: int, compiler: Compiler, waiting: Waiting = Waiting()):
        if threads < 1:
            raise EngineError(f"threads must be at least 1, got {threads}")
        self.threads = threads
        self._kernel = compiler.kernel("convolt.engines.jit.driver:driver", waiting)
        driver = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(self._kernel.address)
        self._state = _State(_aligned_words((THREAD_LINES + threads * THREAD_LINE) // 8), driver)
        self._driver, self._memory = driver, self._state.memory
        self._address = int(self._memory.ctypes.data)
        self._memory[TICKET // 8], self._memory[THREADS // 8] = FINISHED, threads
        self._memory[ACTIVE // 8] = threads
        self.ended = self._address + ENDED
        """Where a kernel writes a number that is not 0 to end the program behind its phase."""
        self._lock = threading.Lock()
        libc = ctypes.CDLL(None, use_errno=True)
        for number in range(threads):
            if libc.sem_init(ctypes.c_void_p(self._state.semaphore(number)), 0, 0) != 0:
                raise EngineError(f"the system gives no semaphore (errno {ctypes.get_errno()})")
        self.close = weakref.finalize(self, self._state.stop)
        for number in range(1, threads):
            arguments = (self._address, 0, number)
            thread = threading.Thread(target=driver, args=arguments, name=f"convolt-{number}", daemon=True)
            thread.start()
            self._state.threads.append(thread)

    def run(self, program: Program, meanwhile: Callable[[], None] | None = None) -> None:
        """Run every phase; when this returns, all is written. Raises EngineError after `close`.

        meanwhile: what the caller does first, once the others have begun; not on this team. What it raises is raised
        at the end.
        """
        with self._lock:
            self._must_be_open()
            if meanwhile is None:
                self._driver(self._address, program.address, 0)
                return
            try:  # a signal's handler may raise as soon as the program has begun
                self._driver(self._address, program.address, ABSENT)
                meanwhile()
            finally:
                self._driver(self._address, 0, 0)

    def profile(self, program: Program) -> tuple[PhaseProfile, ...]:
        """Run once, to the last phase whatever a kernel says, and measure each phase and kernel.

        Two looks at the clock a kernel (some 50 ns) come on top.
        """
        count, phases = int(program.words[1]), len(program.phases)
        timings = np.zeros(self.threads * count + phases + 1, np.int64)
        with self._lock:
            self._must_be_open()
            self._memory[TIMINGS // 8] = timings.ctypes.data
            self._driver(self._address, program.address, 0)
            self._memory[TIMINGS // 8] = 0
        kernels = timings[: self.threads * count].reshape(self.threads, count).sum(0) / 1e9
        walls = np.diff(timings[self.threads * count :]) / 1e9
        ends = program.words[4 : 4 + 3 * phases : 3]
        return tuple(
            PhaseProfile(phase.name, float(wall), tuple(kernels[end - len(phase.kernels) : end].tolist()))
            for phase, wall, end in zip(program.phases, walls, ends, strict=True)
        )

    def _must_be_open(self) -> None:
        if not self.close.alive:
            raise EngineError("the team of threads is closed; make a new one")


def _aligned_words(count: int) -> NDArray[np.int64]:
    """Zeros that begin on a line of 128 bytes."""
    raw = np.zeros(count + 16, np.int64)
    start = -(raw.ctypes.data // 8) % 16
    return raw[start : start + count]
