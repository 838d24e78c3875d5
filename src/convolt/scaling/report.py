"""What became of a grid of ranks x threads: measured points, fitted laws, predictions, as plain records.

Times are milliseconds, speeds images per second of all ranks together; `Estimate` is a median over rounds with its
interval. A measured point and a prediction are different classes, and a prediction says so in every form it takes.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from convolt.load import Load
from convolt.scaling.network import Network
from convolt.stats import Estimate

PREDICTED = "predicted"


@dataclass(frozen=True)
class Base:
    """The serial program that speedups are against. others: serial programs that were slower, or why they are out."""

    program: str
    milliseconds: Estimate
    images_per_second: Estimate
    others: dict[str, str]


class Parts(NamedTuple):
    """Milliseconds of a step of the mean rank: medians of each part, which therefore add up to it about."""

    compute: float
    communication: float
    waiting: float


@dataclass(frozen=True)
class PointResult:
    """A measured point.

    status: ``timed``; ``failed``; ``wrong``: its losses are not those of the others. oversubscribed: more workers than
    cores; such a point has no speedup. karp_flatt: the serial fraction it stands for (strong scaling, 2 workers on).
    """

    mode: str
    ranks: int
    threads: int
    batch_size: int
    oversubscribed: bool
    status: str = "timed"
    reason: str = ""
    milliseconds: Estimate | None = None
    images_per_second: Estimate | None = None
    speedup: Estimate | None = None
    efficiency: Estimate | None = None
    karp_flatt: Estimate | None = None
    parts: Parts | None = None

    @property
    def workers(self) -> int:
        """Ranks times threads."""
        return self.ranks * self.threads


@dataclass(frozen=True)
class Predicted:
    """A point that was computed from traces of one process and a model of a network; never a measurement.

    error: of the prediction in parts of the measured time, in rounds where both were there (0.05 is 5 % too slow).
    """

    mode: str
    ranks: int
    threads: int
    batch_size: int
    network: str
    milliseconds: Estimate
    images_per_second: Estimate
    speedup: Estimate
    efficiency: Estimate
    parts: Parts
    error: Estimate | None = None
    label: str = PREDICTED

    @property
    def workers(self) -> int:
        """Ranks times threads."""
        return self.ranks * self.threads


@dataclass(frozen=True)
class Fit:
    """The serial fraction that a law needs to come nearest to the measured speedups.

    law: ``Amdahl`` for strong scaling, ``Gustafson`` for weak. over: what was multiplied: ranks, threads, or both.
    """

    mode: str
    law: str
    over: str
    workers: tuple[int, ...]
    serial_fraction: Estimate


@dataclass(frozen=True)
class ScalingReport:
    """All of one grid. rounds: the order of the slices in each. cores: workers that this machine can have at once."""

    program: str
    parameters: int
    cores: int
    base: Base
    points: tuple[PointResult, ...]
    fits: tuple[Fit, ...]
    predictions: tuple[Predicted, ...]
    networks: tuple[Network, ...]
    failures: dict[str, str]
    rounds: tuple[tuple[str, ...], ...]
    load: Load

    def warnings(self) -> tuple[str, ...]:
        """What a reader must know before believing a figure."""
        found = []
        crowded = [point for point in self.points if point.oversubscribed]
        if crowded:
            names = ", ".join(dict.fromkeys(f"{point.ranks}x{point.threads}" for point in crowded))
            found.append(
                f"{names}: more workers than the {self.cores} cores, so they took turns: times are shown, no speedup"
            )
        workers = max((point.workers for point in self.points if not point.oversubscribed), default=1)
        if self.load.disturbed(workers):
            found.append(
                f"the cores were not free: other processes used {self.load.others:.1f} of {self.load.cores} cores; "
                "ranks that wait for one another suffer most from this: repeat when it is quiet"
            )
        found += [f"{what}: {reason}" for what, reason in self.failures.items()]
        return tuple(found)

    def to_plain(self) -> dict[str, Any]:
        """The report as dicts, tuples, numbers and strings, ready for JSON, warnings included."""
        plain = asdict(self) | {"warnings": self.warnings()}
        for point in (*plain["points"], *plain["predictions"]):
            if point["parts"] is not None:
                point["parts"] = point["parts"]._asdict()
        return plain
