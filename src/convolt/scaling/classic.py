"""The five configurations of the classic comparison, as real trainings: serial, 2 ranks, 4 ranks, 2x2, 2x4.

Students of parallel training compare these five, commonly with a different algorithm, batch or even precision in each.
Here every one is the same ``convolt train`` with another ``--ranks`` and ``--threads``: same engine, same recipe, same
samples in every step, so the losses must be those of the serial run, and that is checked before a speedup is stated.
What is timed is the training steps (``train_seconds`` of the run): no loading, no validation, no start of MPI.

With more than one round the five take turns in an order drawn anew, and speedups are ratios within rounds. A
configuration with more workers than cores is marked, its time shown, and no speedup made of it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convolt import launch
from convolt.bench import Progress
from convolt.errors import ConfigError, EngineError
from convolt.load import Load, LoadMeter
from convolt.rng import permutation
from convolt.run import Run
from convolt.stats import Estimate, estimate, paired_ratio

#: Name, ranks, threads of each rank.
CONFIGURATIONS = (("serial", 1, 1), ("mpi-2", 2, 1), ("mpi-4", 4, 1), ("hybrid-2x2", 2, 2), ("hybrid-2x4", 2, 4))

#: How far the training loss of any epoch may be from the serial run's, relative; rounding grows from step to step.
TOLERANCES = {"fp64": 1e-6, "fp32": 2e-2, "fp32-master64": 2e-2, "bf16": 1e-1, "fp16": 5e-2}

Train = Callable[[int, int, Path], Run]


@dataclass(frozen=True)
class Configuration:
    """One of the five. losses: of training, by epochs. difference: the largest, relative to the serial run's.

    speedup: None where there are more workers than cores, or the losses are not those of the serial run.
    """

    name: str
    ranks: int
    threads: int
    oversubscribed: bool
    seconds: Estimate
    images_per_second: Estimate
    test_accuracy: float | None
    losses: tuple[float, ...]
    difference: float
    same_curve: bool
    speedup: Estimate | None
    efficiency: Estimate | None
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """All five, the order of each round, and who else used the cores."""

    cores: int
    epochs: int
    precision: str
    configurations: tuple[Configuration, ...]
    rounds: tuple[tuple[str, ...], ...]
    load: Load

    def warnings(self) -> tuple[str, ...]:
        """What a reader must know before believing a figure."""
        found = [
            f"{each.name}: {each.ranks * each.threads} workers on {self.cores} cores took turns: no speedup is stated"
            for each in self.configurations
            if each.oversubscribed
        ]
        found += [
            f"{each.name}: its losses are off by {each.difference:.2g} from the serial run's: not the same training"
            for each in self.configurations
            if not each.same_curve
        ]
        if self.load.disturbed(self.cores):
            found.append(f"other processes used {self.load.others:.1f} of {self.load.cores} cores: repeat when quiet")
        return tuple(found)

    def to_plain(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        return asdict(self) | {"warnings": self.warnings()}


@dataclass
class _Runs:
    """What one configuration did, round by round."""

    runs: list[Run] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [float((run.result or {})["train_seconds"]) for run in self.runs]


def compare(
    train: Train, folder: Path, rounds: int, cores: int, seed: int = 0, progress: Progress | None = None
) -> Comparison:
    """Train all five, ``rounds`` times each, and compare. train: see `trainer`. Raises ConfigError, EngineError."""
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1; got {rounds}")
    tell = progress or (lambda name, done, total: None)
    meter, done = LoadMeter(children=True), {name: _Runs() for name, _, _ in CONFIGURATIONS}
    orders = []
    for number in range(rounds):
        order = [CONFIGURATIONS[i] for i in permutation(seed, number, len(CONFIGURATIONS))]
        for place, (name, ranks, threads) in enumerate(order):
            tell(f"round {number + 1} of {rounds}: {name}", number * len(order) + place, rounds * len(order))
            done[name].runs.append(train(ranks, threads, folder / f"round-{number + 1}" / name))
        orders.append(tuple(name for name, _, _ in order))
    serial = done[CONFIGURATIONS[0][0]]
    results = tuple(_result(name, ranks, threads, done[name], serial, cores) for name, ranks, threads in CONFIGURATIONS)
    facts = serial.runs[0].result or {}
    return Comparison(cores, facts["epochs"], facts["precision"], results, tuple(orders), meter.read())


def trainer(arguments: Sequence[str], timeout: float | None = None) -> Train:
    """What trains one configuration: ``convolt train`` with these arguments, in a folder of its own.

    BatchNorm is synchronized over ranks unless the arguments say otherwise: without it the losses cannot be the same.
    """
    always = ("train", "--set", "parallel.sync_batch_norm=true")

    def train(ranks: int, threads: int, folder: Path) -> Run:
        given = [*always, *arguments, "--threads", str(threads), "--out", str(folder), "--quiet"]
        ended = launch.run(ranks, given, catch_output=True, timeout=timeout)
        if ended.signal is not None:
            raise KeyboardInterrupt
        if ended.code:
            raise EngineError(f"training on {ranks} ranks x {threads} threads ended with code {ended.code}")
        return Run.load(folder)

    return train


def _result(name: str, ranks: int, threads: int, own: _Runs, serial: _Runs, cores: int) -> Configuration:
    last = own.runs[-1]
    losses, truth = (tuple(epoch.train_loss for epoch in each.runs[0].history) for each in (own, serial))
    difference = max((abs(a - b) / abs(b) for a, b in zip(losses, truth, strict=True)), default=math.inf)
    same = difference <= TOLERANCES[(last.result or {})["precision"]]
    crowded = ranks * threads > cores
    speedup = None if crowded or not same else paired_ratio(serial.seconds, own.seconds)
    return Configuration(
        name,
        ranks,
        threads,
        crowded,
        estimate(own.seconds),
        estimate([float((run.result or {})["images_per_second"]) for run in own.runs]),
        last.test_accuracy,
        losses,
        difference,
        same,
        speedup,
        None if speedup is None else _divided(speedup, ranks * threads),
        tuple(str(run.folder) for run in own.runs),
    )


def _divided(value: Estimate, by: int) -> Estimate:
    return Estimate(value.median / by, value.low / by, value.high / by, value.coverage, value.n)
