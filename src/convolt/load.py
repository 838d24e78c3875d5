"""Who else used the cores while something was timed.

A time on a shared machine means little without this. The kernel counts the busy time of each CPU, in /proc/stat; what
is busy and not this process is others. Time that a hypervisor took away (steal) counts as theirs.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

_USER, _NICE, _SYSTEM, _IRQ, _SOFTIRQ, _STEAL = 0, 1, 2, 5, 6, 7  # columns of a "cpu0 ..." line; guests are in user
SLACK = 0.1  # of a core: what the system itself and the kernel's rounding take


@dataclass(frozen=True)
class Load:
    """The machine during a measurement; None where the system does not tell.

    cores: that this process may use. others: cores that other processes kept busy, on average. load_average: the
    system's, over one minute, before and after.
    """

    seconds: float
    cores: int
    others: float | None
    load_average: tuple[float, float] | None

    def disturbed(self, threads: int) -> bool:
        """Whether others needed a core that one of ``threads`` threads would have run on."""
        return self.others is not None and self.others > max(self.cores - threads, 0) + SLACK


class LoadMeter:
    """Counts from when it is made until ``read``.

    root: where /proc is looked for. children: whether processes that this one started, and that have ended, are not
    others.
    """

    def __init__(self, root: Path = Path("/"), children: bool = False) -> None:
        self._root, self._children = root, children
        self._cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        self._start = self._now()

    def read(self) -> Load:
        """What happened so far."""
        (began, own_before, busy_before, average_before), now = self._start, self._now()
        seconds, own = now[0] - began, now[1] - own_before
        others = None
        if busy_before and now[2] and seconds > 0:
            others = max(0.0, now[2] - busy_before - own) / seconds
        averages = None if average_before is None or now[3] is None else (average_before, now[3])
        return Load(seconds, len(self._cpus), others, averages)

    def _now(self) -> tuple[float, float, float, float | None]:
        """The clock, this process's CPU seconds, the busy seconds of the CPUs it may use, the load average."""
        try:
            average: float | None = float((self._root / "proc/loadavg").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            average = None
        own, times = time.process_time(), os.times()
        if self._children:
            own += times.children_user + times.children_system
        return time.perf_counter(), own, self._busy(), average

    def _busy(self) -> float:
        names = {f"cpu{number}" for number in self._cpus}
        try:
            lines = [line.split() for line in (self._root / "proc/stat").read_text().splitlines()]
        except OSError:
            return 0.0
        kept = (_USER, _NICE, _SYSTEM, _IRQ, _SOFTIRQ, _STEAL)
        ticks = [int(line[1 + column]) for line in lines if line and line[0] in names for column in kept]
        return sum(ticks) / os.sysconf("SC_CLK_TCK")
