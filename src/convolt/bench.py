"""Engines side by side: which one is faster, by how much, and how sure that is.

Speeds measured one after the other on a shared machine compare the neighbors, not the engines. So all contenders live
in one process and take turns: a *round* gives each of them one short slice, in an order that is drawn anew each time,
and ratios are taken within rounds, where both met the same machine. ``stats`` turns rounds into medians and intervals.

Nothing is timed before it is checked. The loss, the logits and the gradient of the first batch must agree with those of
an engine in float64, and so must the loss of the first whole step; a contender that computes something else is reported
and not timed. Building an engine and its first step, where kernels are compiled, are timed apart. A slice begins with
the first weights (a batch that is learned by heart computes other numbers than training does) and with one call that
does not count: it brings this contender's threads and data back. A call is a step, or as many steps as training would
take in one (``course``), where an engine gains by that.

Speed is also given in FLOPs of the model (see ``flops``) and as a part of the measured peak. A figure above the peak,
even if every convolution took the fewest products that can do, means that the measurement is wrong, and is flagged.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from statistics import median
from typing import Any

import numpy as np

from convolt import engines
from convolt.contenders import TOLERANCES, Contender, Tolerance
from convolt.course import steps_of_a_call
from convolt.engine import Array, Executor, StepInput, StepResult
from convolt.errors import ConfigError, ConvoltError, EngineError, MissingDependency
from convolt.flops import needed_part, training_flops
from convolt.load import Load, LoadMeter
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import Adam
from convolt.params import Params
from convolt.peaks import Peaks
from convolt.profile import StageRate, profile
from convolt.recipe import Recipe
from convolt.rng import SampleRng, permutation
from convolt.stats import Estimate, estimate, paired_ratio

PEERS = ("torch", "onnxruntime")  # the fastest contender of these is what the others are held against
BATCHES = 8
LOSS, OPTIMIZER = CrossEntropy(), Adam()
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Workload:
    """What every contender computes: training steps, or predictions, on batches of random images and labels."""

    model: Model
    batch_size: int = 128
    inference: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch size must be at least 1; got {self.batch_size}")

    @property
    def flops(self) -> int:
        """FLOPs of a step."""
        return self.batch_size * (self.model.flops if self.inference else training_flops(self.model))

    @property
    def needed_part(self) -> float:
        """Of these FLOPs, what no algorithm in use spares."""
        return needed_part(self.model, not self.inference)

    @cached_property
    def batches(self) -> tuple[tuple[Array, Array], ...]:
        """uint8 images and labels."""
        rng = np.random.default_rng(self.seed)
        images, labels = (self.batch_size, *self.model.input_shape), self.model.output_shape[0]
        return tuple(
            (rng.integers(0, 256, images, np.uint8), rng.integers(0, labels, self.batch_size)) for _ in range(BATCHES)
        )

    @cached_property
    def weights(self) -> Params:
        """The first weights, for all contenders."""
        return Params.init(self.model, self.seed, np.float64)

    @cached_property
    def samples(self) -> SampleRng:
        """The identity of a batch's samples, for dropout."""
        return SampleRng(self.seed, 0, np.arange(self.batch_size))


@dataclass(frozen=True)
class Errors:
    """How far the first batch was from float64; gradient and step are None for inference."""

    loss: float
    logits: float
    gradient: float | None
    step: float | None

    def beyond(self, tolerance: Tolerance) -> tuple[str, ...]:
        """What is not within the tolerance, in words."""
        held = (
            ("loss", self.loss, tolerance.loss),
            ("logits", self.logits, tolerance.logits),
            ("gradient", self.gradient, tolerance.gradient),
            ("loss of the first step", self.step, tolerance.loss),
        )
        return tuple(
            f"{name} is off by {error:.2g}, allowed {most:g}"
            for name, error, most in held
            if error is not None and not error <= most
        )


@dataclass(frozen=True)
class Result:
    """What became of a contender.

    status: ``timed``; ``unavailable`` here; ``failed`` in its first step; ``wrong``, and therefore not timed. ratio:
    how many times faster than the fastest peer (PyTorch, ONNX Runtime), in pairs of slices; ratio_alike: than the
    fastest one that multiplies in the same format, whose name is peer_alike. first_step: seconds from nothing to the
    end of the first step. peak_part: of the measured peak. impossible: above it, Winograd's algorithm granted.
    at_once: training steps in a call. memory: bytes held, by kind, where the engine tells.
    """

    name: str
    status: str
    reason: str = ""
    precision: str = ""
    first_step: float | None = None
    errors: Errors | None = None
    seconds: tuple[float, ...] = ()
    milliseconds: Estimate | None = None
    images_per_second: Estimate | None = None
    ratio: Estimate | None = None
    ratio_alike: Estimate | None = None
    peer_alike: str | None = None
    gflops: float | None = None
    peak_part: float | None = None
    impossible: bool = False
    stages: tuple[StageRate, ...] = ()
    at_once: int = 1
    memory: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All results of one workload.

    needed_part: of the FLOPs, what no algorithm in use spares. peer: the contender that the ratios are to. rounds: the
    order of each.
    """

    batch_size: int
    inference: bool
    threads: int
    parameters: int
    flops: int
    needed_part: float
    peer: str | None
    results: tuple[Result, ...]
    rounds: tuple[tuple[str, ...], ...]
    load: Load
    peaks: Peaks | None

    @property
    def stands(self) -> bool:
        """Whether anybody was timed and nobody computes something else."""
        states = {result.status for result in self.results}
        return "timed" in states and "wrong" not in states

    def remarks(self) -> tuple[str, ...]:
        """What was timed as several steps, and why a part of the peak may be above 100 %, where one is and can be."""
        calls = [
            f"{result.name}: {result.at_once} steps are one call, as in training"
            for result in self.results
            if result.at_once > 1
        ]
        above = any((result.peak_part or 0.0) > 1 and not result.impossible for result in self.results)
        text = (
            "of peak: FLOPs are those of products tap by tap; by Winograd's algorithm this model needs "
            f"{self.needed_part:.0%} of them, so up to {1 / self.needed_part:.0%} of the peak is possible"
        )
        return (*calls, text) if above else tuple(calls)

    def warnings(self) -> tuple[str, ...]:
        """What a reader must know before believing a figure."""
        found = []
        if self.load.disturbed(self.threads):
            found.append(
                f"the cores were not free: other processes used {self.load.others:.1f} of {self.load.cores} cores; "
                "threads that wait for one another suffer most from this, so ratios change too: repeat when it is quiet"
            )
        above = [result.name for result in self.results if result.impossible]
        found += [f"{name} is above the measured peak: the figure is impossible" for name in above]
        if self.peer is None:
            found.append(f"none of {', '.join(PEERS)} was timed: there are no ratios")
        return tuple(found)


def bench(
    workload: Workload,
    contenders: Sequence[Contender],
    rounds: int = 15,
    slice_seconds: float = 0.3,
    peaks: Peaks | None = None,
    profiled: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Check every contender, then time those that are right. Raises ConfigError."""
    if rounds < 1 or slice_seconds < 0:
        raise ConfigError(f"rounds must be at least 1 and seconds per slice >= 0; got {rounds} and {slice_seconds}")
    tell = progress or (lambda name, done, total: None)
    with_reference = partial(_check, workload, _reference(workload))
    ready, results = [], {}
    try:
        for number, each in enumerate(contenders):
            tell(f"{each.name}: first step", number, len(contenders))
            entrant = _enter(workload, each)
            result = entrant if isinstance(entrant, Result) else with_reference(entrant)
            results[each.name] = result
            if isinstance(entrant, Entrant):
                ready.append(entrant)
        racing = [entrant for entrant in ready if results[entrant.contender.name].status == "timed"]
        for entrant in racing:
            entrant.at_once = _steps_at_once(entrant.executor, workload)
        meter = LoadMeter()
        order = _race(racing, workload, rounds, slice_seconds, tell)
        load = meter.read()
        peer = _fastest_peer(racing)
        for entrant in racing:
            stages = _profiled(entrant, workload) if profiled else ()
            alike = _fastest_peer(racing, entrant.contender.products)
            results[entrant.contender.name] = _result(entrant, workload, (peer, alike), peaks, stages)
    finally:
        for entrant in ready:
            entrant.executor.close()
    return Report(
        workload.batch_size,
        workload.inference,
        max((each.engine.threads for each in contenders), default=1),
        workload.model.parameter_count,
        workload.flops,
        workload.needed_part,
        None if peer is None else peer.contender.name,
        tuple(results.values()),
        order,
        load,
        peaks,
    )


@dataclass
class Entrant:
    """A contender made ready, how many steps it takes in a call, and the seconds of a step in each of its slices."""

    contender: Contender
    executor: Executor
    first: StepResult
    first_step: float
    at_once: int = 1
    errors: Errors | None = None
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What a contender made of the first batch."""

    loss: float
    logits: Array
    gradient: Array | None


def _enter(workload: Workload, each: Contender) -> Entrant | Result:
    """The executor and its first step; RuntimeError is what compilers and PyTorch raise."""
    start = time.perf_counter()
    recipe = Recipe(precision=each.precision, seed=workload.seed, batch_size=workload.batch_size)
    try:
        executor = each.engine.executor(workload.model, workload.weights, recipe)
        (first,) = _call(executor, workload, 0)
    except ConvoltError as error:
        return Result(each.name, "unavailable", str(error), each.precision)
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        return Result(each.name, "failed", f"{type(error).__name__}: {reason}", each.precision)
    return Entrant(each, executor, first, time.perf_counter() - start)


def _call(executor: Executor, workload: Workload, first: int, count: int = 1) -> list[StepResult]:
    """What is timed: training steps with their updates, up to one that is not finite, or a prediction."""
    batches = [workload.batches[number % BATCHES] for number in range(first, first + count)]
    if workload.inference:
        return [StepResult(math.nan, executor.predict(batches[0][0]))]
    return executor.train_steps([StepInput(x, y, 1 / len(x), OPTIMIZER, workload.samples) for x, y in batches], LOSS)


def _steps_at_once(executor: Executor, workload: Workload) -> int:
    """How many steps training would take in a call, by the median of a few."""
    if workload.inference or not executor.fuses_steps:
        return 1
    paces = []
    for number in range(BATCHES):
        start = time.perf_counter()
        _call(executor, workload, number)
        paces.append(time.perf_counter() - start)
    return steps_of_a_call(median(paces))


def _begin_again(executor: Executor, workload: Workload) -> None:
    executor.params.flat[...] = workload.weights.flat
    executor.weights_changed()


def _outcome(executor: Executor, workload: Workload) -> Outcome:
    """Loss, logits and gradient of the first batch at the first weights."""
    x, y = workload.batches[0]
    if workload.inference:
        logits = executor.predict(x)
        return Outcome(LOSS(logits, y)[0], logits, None)
    executor.zero_grads()
    result = executor.loss_and_grads(x, y, LOSS, 1 / len(x), workload.samples)
    return Outcome(result.loss, result.logits.copy(), executor.grads.flat.copy())


def _reference(workload: Workload) -> Outcome:
    """The truth, from an engine that offers float64; the last of the registry is the fastest at that."""
    for name in reversed(engines.names()):
        try:
            engine = engines.engine_class(name)()
        except MissingDependency:
            continue
        if "fp64" in engine.PRECISIONS:
            executor = engine.executor(workload.model, workload.weights, Recipe(precision="fp64", seed=workload.seed))
            outcome = _outcome(executor, workload)
            executor.close()
            return outcome
    raise EngineError("no engine offers float64: there is nothing to check the contenders against")


def _check(workload: Workload, truth: Outcome, entrant: Entrant) -> Result:
    """Compare a contender's first batch and first step with float64."""
    each = entrant.contender
    _begin_again(entrant.executor, workload)
    found = _outcome(entrant.executor, workload)
    gradient = step = None
    if truth.gradient is not None and found.gradient is not None:
        gradient = _distance(found.gradient, truth.gradient)
        step = _distance(np.array(entrant.first.loss), np.array(truth.loss))
    loss = _distance(np.array(found.loss), np.array(truth.loss))
    entrant.errors = errors = Errors(loss, _distance(found.logits, truth.logits), gradient, step)
    if wrong := errors.beyond(TOLERANCES[each.products.partition("-")[0]]):
        return Result(each.name, "wrong", "; ".join(wrong), each.precision, entrant.first_step, errors)
    return Result(each.name, "timed", "", each.precision, entrant.first_step, errors)


def _distance(x: Array, truth: Array) -> float:
    """``|x - truth| / |truth|``, infinite for what is not finite or has another shape."""
    if x.shape != truth.shape or not np.isfinite(x).all():
        return math.inf
    size = float(np.linalg.norm(truth))
    return float(np.linalg.norm(x - truth)) / (size or 1.0)


def _race(
    racing: Sequence[Entrant], workload: Workload, rounds: int, slice_seconds: float, tell: Progress
) -> tuple[tuple[str, ...], ...]:
    """Give each contender a slice in every round; the order of each round, by name."""
    orders = []
    for number in range(rounds):
        tell(f"round {number + 1}", number, rounds)
        order = [racing[i] for i in permutation(workload.seed, number, len(racing))]
        for entrant in order:
            entrant.seconds.append(_slice(entrant, workload, slice_seconds))
        orders.append(tuple(entrant.contender.name for entrant in order))
    return tuple(orders)


def _slice(entrant: Entrant, workload: Workload, seconds: float) -> float:
    """Mean seconds of a step over about so many seconds, of one call at least."""
    executor, count = entrant.executor, entrant.at_once
    _begin_again(executor, workload)
    _call(executor, workload, 0, count)
    steps, start = 0, time.perf_counter()
    while True:
        steps += len(_call(executor, workload, count + steps, count))
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return elapsed / steps


def _fastest_peer(racing: Sequence[Entrant], products: str | None = None) -> Entrant | None:
    """The fastest of other makers, or the fastest of those that multiply in one format."""
    contenders = ((entrant, entrant.contender) for entrant in racing)
    peers = [entrant for entrant, each in contenders if each.engine.NAME in PEERS and products in (None, each.products)]
    return min(peers, key=lambda entrant: median(entrant.seconds), default=None)


def _profiled(entrant: Entrant, workload: Workload) -> tuple[StageRate, ...]:
    x, _ = workload.batches[0]
    _begin_again(entrant.executor, workload)
    _call(entrant.executor, workload, 0)
    return profile(entrant.executor, workload.model, x, OPTIMIZER, not workload.inference)


def _result(
    entrant: Entrant,
    workload: Workload,
    peers: tuple[Entrant | None, Entrant | None],
    peaks: Peaks | None,
    stages: tuple[StageRate, ...],
) -> Result:
    """The figures of one contender; peers: the fastest of all, and the fastest alike."""
    ratio, ratio_alike = (None if peer is None else paired_ratio(peer.seconds, entrant.seconds) for peer in peers)
    each, seconds = entrant.contender, entrant.seconds
    gflops = workload.flops / median(seconds) / 1e9
    peak = None if peaks is None else peaks.gflops(each.products)
    return Result(
        each.name,
        "timed",
        precision=each.precision,
        first_step=entrant.first_step,
        errors=entrant.errors,
        seconds=tuple(seconds),
        milliseconds=estimate([1e3 * t for t in seconds]),
        images_per_second=estimate([workload.batch_size / t for t in seconds]),
        ratio=ratio,
        ratio_alike=ratio_alike,
        peer_alike=None if peers[1] is None else peers[1].contender.name,
        gflops=gflops,
        peak_part=None if peak is None else gflops / peak,
        impossible=peak is not None and gflops * workload.needed_part > peak,
        stages=stages,
        at_once=entrant.at_once,
        memory=entrant.executor.memory(),
    )


def to_plain(report: Report) -> dict[str, Any]:
    """The report as dicts, tuples, numbers and strings, ready for JSON, warnings included."""
    return asdict(report) | {"warnings": report.warnings()}
