"""A grid of ranks x threads: strong and weak scaling against the best serial program, in rounds.

Every round gives each point one slice, in an order that is drawn anew, and a speedup is a ratio of slices of one round,
where both met the same machine (stats.py turns rounds into medians and intervals). Speed is images per second, so that
one definition serves both kinds of scaling, w = ranks x threads workers:

    strong  the global batch stays; S(w) = speed / speed of the base = T_1 / T_w, and E = S / w
    weak    the batch grows with w: S(w) is Gustafson's scaled speedup, and E = S / w

The base is the fastest of the serial programs that take part: one process, one thread, no MPI, and no slice of the
gradient that somebody waits for. A point with more workers than cores is **oversubscribed**: its time is shown, and no
speedup is ever made of it, because its ranks took turns instead of working at once.

Nothing counts that computes something else: points with one global batch must have the same losses in their first
steps. In the same rounds single processes are traced, and a prediction made for every measured point with several ranks
is held against it: its error is what predictions for other machines are worth.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Literal

from convolt.bench import Progress
from convolt.contenders import TOLERANCES, contender
from convolt.engine import resolve_threads
from convolt.errors import ConfigError, ConvoltError, EngineError
from convolt.launch import check_ranks
from convolt.load import LoadMeter
from convolt.model import Model
from convolt.rng import permutation
from convolt.scaling.jobs import Answer, Job, Samples, Slice
from convolt.scaling.laws import efficiency, fit_amdahl, fit_gustafson, karp_flatt
from convolt.scaling.network import Network, fit
from convolt.scaling.prediction import Timeline, Trace, largest_shard, predict
from convolt.scaling.report import Base, Fit, Parts, PointResult, Predicted, ScalingReport
from convolt.stats import estimate

Mode = Literal["strong", "weak"]
Runner = Callable[[Job], Answer]
MODES: tuple[Mode, ...] = ("strong", "weak")
THIS_MACHINE = "this-machine"  # the network between its ranks, as measured


@dataclass(frozen=True)
class Point:
    """Ranks, threads of each, and the global batch."""

    mode: Mode
    ranks: int
    threads: int
    batch_size: int

    @property
    def workers(self) -> int:
        """Cores that it wants."""
        return self.ranks * self.threads


@dataclass(frozen=True)
class Plan:
    """What is measured, and what is predicted from it.

    program: an engine and a precision, as ``convolt bench`` names its contenders. base: serial programs, the fastest of
    which is the base; without any, ``program`` itself on one thread. batch_size: global for strong scaling, for each
    worker in weak. predict_ranks, networks: predictions to make, for each number of threads of the grid; a network None
    is the measured one. seconds: of a slice. Raises ConfigError, MissingDependency.
    """

    model: Model
    program: str
    base: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (1, 2)
    threads: tuple[int, ...] = (1,)
    modes: tuple[Mode, ...] = ("strong",)
    batch_size: int = 256
    rounds: int = 7
    seconds: float = 1.0
    predict_ranks: tuple[int, ...] = ()
    networks: tuple[Network | None, ...] = (None,)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ranks", "threads", "predict_ranks"):
            values = getattr(self, name)
            if min(values, default=1) < 1 or len(set(values)) < len(values):
                raise ConfigError(f"scale: {name} must be different numbers from 1 on; got {_listed(values)}")
        if not self.ranks or not self.threads or not self.modes:
            raise ConfigError("scale: ranks, threads and modes must each name one at least")
        if self.rounds < 1 or not self.seconds >= 0:
            raise ConfigError(
                f"scale: rounds must be at least 1 and seconds of a slice >= 0; got {self.rounds} and {self.seconds}"
            )
        for program in self.programs:
            contender(program, 1)
        for ranks in self.ranks:
            check_ranks(ranks)
        for threads in self.threads:
            resolve_threads(threads)
        for ranks in (*self.ranks, *self.predict_ranks):
            largest_shard(self.batch_size if "strong" in self.modes else self.batch_size * ranks, ranks)

    def points(self) -> tuple[Point, ...]:
        """The grid, the fewest workers first."""
        found = [
            self._point(mode, ranks, threads) for mode in self.modes for ranks in self.ranks for threads in self.threads
        ]
        return tuple(sorted(found, key=lambda point: (MODES.index(point.mode), point.workers, point.ranks)))

    def predictions(self, cores: int) -> tuple[tuple[Point, Network | None], ...]:
        """The measured points of several ranks, on the measured network; then what was asked for, on every network.

        Points with more workers than cores are no test of a prediction.
        """
        held = [(point, None) for point in self.points() if point.ranks > 1 and point.workers <= cores]
        asked = [
            (self._point(mode, ranks, threads), network)
            for network in self.networks
            for mode in self.modes
            for threads in self.threads
            for ranks in self.predict_ranks
        ]
        return tuple(dict.fromkeys([*held, *asked]))

    def jobs(self, cores: int) -> tuple[Job, ...]:
        """Everything that a round does, each thing once."""
        predictions = self.predictions(cores)
        found = [self.serial(program) for program in self.programs]
        found += [self.step(point) for point in self.points()]
        found += [self.trace(point, network, cores) for point, network in predictions]
        if any(network is None for _, network in predictions):
            found.append(self.network)
        return tuple(dict.fromkeys(found))

    @property
    def programs(self) -> tuple[str, ...]:
        """The serial programs that may be the base."""
        return self.base or (self.program,)

    def serial(self, program: str) -> Job:
        """One process, one thread, the batch that one worker has in both modes."""
        return Job("step", self.model, program, 1, 1, self.batch_size, self.seconds, self.seed)

    def step(self, point: Point) -> Job:
        """The steps of a point."""
        ranks, threads = point.ranks, point.threads
        return Job("step", self.model, self.program, ranks, threads, point.batch_size, self.seconds, self.seed)

    def trace(self, point: Point, network: Network | None, cores: int) -> Job:
        """The largest shard of a point: here by all its ranks side by side, on a machine of its own by one alone.

        More workers than cores cannot be side by side and are traced alone as well.
        """
        shard = largest_shard(point.batch_size, point.ranks)
        here = point.ranks if network is None and point.workers <= cores else 1
        early = network is not None and not network.shared
        return Job(
            "trace",
            self.model,
            self.program,
            here,
            point.threads,
            shard,
            self.seconds,
            self.seed,
            sharers=point.ranks,
            early=early,
        )

    @property
    def network(self) -> Job:
        """The network between two ranks of this machine."""
        return Job("network", self.model, self.program, ranks=2)

    def _point(self, mode: Mode, ranks: int, threads: int) -> Point:
        return Point(mode, ranks, threads, self.batch_size * (ranks * threads if mode == "weak" else 1))


def scale(plan: Plan, run: Runner, cores: int, progress: Progress | None = None) -> ScalingReport:
    """Measure the grid, fit the laws, predict.

    run: does a job, as ``worker.run``. cores: how many workers this machine can have at once.
    Raises ConfigError, and EngineError where no serial program runs.
    """
    tell = progress or (lambda name, done, total: None)
    meter = LoadMeter(children=True)
    measured = Rounds(plan.jobs(cores))
    for number in range(plan.rounds):
        measured.add(plan, number, run, tell)
    measured.compare(plan)
    return _Evaluation(plan, measured, cores).report(meter)


@dataclass
class Rounds:
    """What jobs answered, round by round, and why some did not."""

    jobs: tuple[Job, ...]
    answers: dict[Job, list[Answer]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[Job, str] = field(default_factory=dict)
    wrong: dict[Job, str] = field(default_factory=dict)
    order: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, plan: Plan, number: int, run: Runner, tell: Progress) -> None:
        """One slice for each job that has not failed, in a new order."""
        jobs = [job for job in self.jobs if job not in self.failures]
        order = [jobs[i] for i in permutation(plan.seed, number, len(jobs))]
        for done, job in enumerate(order):
            tell(f"round {number + 1} of {plan.rounds}: {job}", number * len(jobs) + done, plan.rounds * len(jobs))
            try:
                self.answers[job].append(run(job))
            except ConvoltError as error:
                self.failures[job] = str(error)
        self.order.append(tuple(str(job) for job in order))

    def compare(self, plan: Plan) -> None:
        """Find the jobs whose losses are not those of the first one with the same global batch."""
        first: dict[int, tuple[float, ...]] = {}
        for job in self.jobs:
            if job.kind == "step" and self.complete(job, plan):
                losses = self.slices(job)[0].losses
                truth = first.setdefault(job.batch_size, losses)
                allowed = TOLERANCES[contender(job.program, 1).products.partition("-")[0]].loss
                off = max(abs(a - b) / abs(b) for a, b in zip(losses, truth, strict=True))
                if not off <= allowed:
                    self.wrong[job] = f"the losses of its first steps are off by {off:.2g}, allowed {allowed:g}"

    def complete(self, job: Job, plan: Plan) -> bool:
        """Whether there is an answer in every round."""
        return job not in self.failures and len(self.answers[job]) == plan.rounds

    def slices(self, job: Job) -> list[Slice]:
        """The answers of a job of steps."""
        return [answer for answer in self.answers[job] if isinstance(answer, Slice)]

    def traces(self, job: Job) -> list[Trace]:
        """The answers of a trace."""
        return [answer for answer in self.answers[job] if isinstance(answer, Trace)]


class _Evaluation:
    """From rounds to results."""

    def __init__(self, plan: Plan, measured: Rounds, cores: int) -> None:
        self._plan, self._measured, self._cores = plan, measured, cores

    def report(self, meter: LoadMeter) -> ScalingReport:
        """Everything."""
        plan, measured = self._plan, self._measured
        points = tuple(self._point(point) for point in plan.points())
        predictions = self._predictions()
        used = {prediction.network for prediction in predictions}
        known = (self._network, *plan.networks)
        others = {job: reason for job, reason in measured.failures.items() if job.kind != "step"}
        return ScalingReport(
            plan.program,
            plan.model.parameter_count,
            self._cores,
            self._base(),
            points,
            tuple(self._fits()),
            predictions,
            tuple(network for network in dict.fromkeys(known) if network is not None and network.name in used),
            {str(job): reason for job, reason in others.items()},
            tuple(measured.order),
            meter.read(),
        )

    def _base(self) -> Base:
        plan, best = self._plan, self._fastest
        seconds = self._serial_seconds
        others = {}
        for program in plan.programs:
            job = plan.serial(program)
            reason = self._measured.failures.get(job, self._measured.wrong.get(job))
            if reason is None and program != best:
                slower = median(_seconds(self._measured.slices(job))) / median(seconds)
                reason = f"{slower:.2f} times as long"
            if reason is not None:
                others[program] = reason
        speeds = estimate([plan.batch_size / t for t in seconds])
        return Base(best, estimate([1e3 * t for t in seconds]), speeds, others)

    @cached_property
    def _fastest(self) -> str:
        """The fastest serial program that computes what the others do. Raises EngineError."""
        plan, measured = self._plan, self._measured
        found = [p for p in plan.programs if measured.complete(plan.serial(p), plan)]
        right = [p for p in found if plan.serial(p) not in measured.wrong]
        if not right:
            reasons = {**measured.failures, **measured.wrong}
            raise EngineError(f"no serial program to compare with: {reasons[plan.serial(plan.programs[0])]}")
        return min(right, key=lambda program: median(_seconds(measured.slices(plan.serial(program)))))

    @cached_property
    def _serial_seconds(self) -> list[float]:
        """Of the base, by rounds."""
        return _seconds(self._measured.slices(self._plan.serial(self._fastest)))

    def _speedups(self, seconds: Iterable[float], batch_size: int) -> list[float]:
        """Ratios of speeds within rounds."""
        larger = batch_size / self._plan.batch_size
        return [larger * base / t for base, t in zip(self._serial_seconds, seconds, strict=True)]

    def _point(self, point: Point) -> PointResult:
        plan, measured = self._plan, self._measured
        job = plan.step(point)
        about = (point.mode, point.ranks, point.threads, point.batch_size, point.workers > self._cores)
        if job in measured.failures:
            return PointResult(*about, "failed", measured.failures[job])
        if job in measured.wrong:
            return PointResult(*about, "wrong", measured.wrong[job])
        slices = measured.slices(job)
        seconds = _seconds(slices)
        speedups = [] if point.workers > self._cores else self._speedups(seconds, point.batch_size)
        fractions = [karp_flatt(s, point.workers) for s in speedups] if point.workers > 1 else []
        return PointResult(
            *about,
            milliseconds=estimate([1e3 * t for t in seconds]),
            images_per_second=estimate([point.batch_size / t for t in seconds]),
            speedup=estimate(speedups) if speedups else None,
            efficiency=estimate([efficiency(s, point.workers) for s in speedups]) if speedups else None,
            karp_flatt=estimate(fractions) if fractions and point.mode == "strong" else None,
            parts=_parts([each.timeline for each in slices]),
        )

    def _fits(self) -> list[Fit]:
        """A law for each kind of scaling and each thing that was multiplied."""
        found = []
        for mode in self._plan.modes:
            timed = [
                (point, self._speedups(_seconds(self._measured.slices(job)), point.batch_size))
                for point in self._plan.points()
                if point.mode == mode and point.workers <= self._cores
                for job in [self._plan.step(point)]
                if self._measured.complete(job, self._plan) and job not in self._measured.wrong
            ]
            for over, chosen in (
                ("ranks", [(p, s) for p, s in timed if p.threads == 1]),
                ("threads", [(p, s) for p, s in timed if p.ranks == 1]),
                ("ranks x threads", timed if any(p.ranks > 1 < p.threads for p, _ in timed) else []),
            ):
                workers = [point.workers for point, _ in chosen]
                if max(workers, default=1) > 1:
                    law = fit_amdahl if mode == "strong" else fit_gustafson
                    rounds = zip(*(speedups for _, speedups in chosen), strict=True)
                    fractions = estimate([law(workers, speedups) for speedups in rounds])
                    name = "Amdahl" if mode == "strong" else "Gustafson"
                    found.append(Fit(mode, name, over, tuple(workers), fractions))
        return found

    @cached_property
    def _network(self) -> Network | None:
        """The measured network; None where it was not."""
        job = self._plan.network
        answers = [answer for answer in self._measured.answers[job] if isinstance(answer, Samples)]
        if not answers:
            return None
        samples = [sample for answer in answers for sample in answer.samples]
        work = median(answer.work for answer in answers)
        return fit(samples, answers[0].ranks, THIS_MACHINE, answers[0].shared, work)

    def _predictions(self) -> tuple[Predicted, ...]:
        found = []
        for point, given in self._plan.predictions(self._cores):
            network = given or self._network
            trace = self._plan.trace(point, given, self._cores)
            if network is not None and self._measured.complete(trace, self._plan):
                found.append(self._predicted(point, network, self._measured.traces(trace), held=given is None))
        return tuple(found)

    def _predicted(self, point: Point, network: Network, traces: Sequence[Trace], held: bool) -> Predicted:
        """held: against the measured point, if there is one and it may be compared with."""
        lines = [predict(trace, point.ranks, network, seed=self._plan.seed + n) for n, trace in enumerate(traces)]
        seconds = [line.seconds for line in lines]
        speedups, job = self._speedups(seconds, point.batch_size), self._plan.step(point)
        comparable = point in self._plan.points() and self._measured.complete(job, self._plan)
        errors = []
        if held and comparable and job not in self._measured.wrong and point.workers <= self._cores:
            pairs = zip(seconds, _seconds(self._measured.slices(job)), strict=True)
            errors = [predicted / true - 1 for predicted, true in pairs]
        return Predicted(
            point.mode,
            point.ranks,
            point.threads,
            point.batch_size,
            network.name,
            milliseconds=estimate([1e3 * t for t in seconds]),
            images_per_second=estimate([point.batch_size / t for t in seconds]),
            speedup=estimate(speedups),
            efficiency=estimate([efficiency(s, point.workers) for s in speedups]),
            error=estimate(errors) if errors else None,
            parts=_parts(lines),
        )


def _seconds(slices: Sequence[Slice]) -> list[float]:
    return [each.timeline.seconds for each in slices]


def _parts(lines: Sequence[Timeline]) -> Parts:
    """Milliseconds of each part of a step, medians over rounds."""
    return Parts(
        1e3 * median(line.compute for line in lines),
        1e3 * median(line.communication for line in lines),
        1e3 * median(line.waiting for line in lines),
    )


def _listed(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
