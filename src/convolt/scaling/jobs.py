"""What one process, or one rank, is asked to measure, and what it answers.

Every slice of a measurement is a job of its own: a fresh process on one rank, ``mpiexec`` on more, exactly as a user
would start a training. The serial program therefore carries no MPI, ranks that are not needed do not wait beside, and
a point that fails takes nothing with it. A job is sent as JSON and answered as JSON; ``perform`` is what happens
between. There are three kinds:

    step     training steps, timed; the losses of the first ones tell whether all points compute the same
    trace    steps on one shard: when each slice of the gradient is ready (prediction.py); on several ranks all of them
             do so at the same time, without a word between them, and the steps of all are the answer
    network  sums of vectors of many sizes (network.py)

Random images stand for real ones, which no engine can tell apart; loading and augmentation are not part of a step here
(a run records its own time). The steps are those of a training, made by the same `Stepper`, which also tells what of
them was compute, waiting and communication. BatchNorm is synchronized over ranks, so that every point has one answer.
"""

import math
import time
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Literal

import numpy as np

from convolt.bench import BATCHES, LOSS, OPTIMIZER, Workload
from convolt.comms import Communicator, part_of, shard
from convolt.config import Plain, build
from convolt.contenders import contender
from convolt.engine import Executor
from convolt.errors import ConfigError
from convolt.loader import Batch
from convolt.model import FLOAT_BYTES, Model
from convolt.parallel import Parallel
from convolt.recipe import Recipe, model_from_plain, plain
from convolt.scaling.network import Sample, measure, measure_work, sizes_around
from convolt.scaling.prediction import StepTrace, Timeline, Trace, Tracer
from convolt.signals import StopRequest
from convolt.step import Seconds, Stepper

WARM_UP = 3  # steps that do not count; their losses are compared
MOST_STEPS = 2000
Kind = Literal["step", "trace", "network"]


@dataclass(frozen=True)
class Job:
    """One slice of a measurement.

    program: an engine and a precision, as ``convolt bench`` names its contenders. batch_size: of all ranks together; in
    a trace, the shard of each. seconds: how long to measure, one step at least. sharers, early: of a trace; the ranks
    that the optimizer's work is shared among, and whether slices of the gradient are to leave during backward.
    """

    kind: Kind
    model: Model
    program: str
    ranks: int = 1
    threads: int = 1
    batch_size: int = 1
    seconds: float = 1.0
    seed: int = 0
    sharers: int = 1
    early: bool = True

    def __str__(self) -> str:
        return f"{self.kind} {self.program} {self.ranks}x{self.threads}, {self.batch_size} images"

    def to_plain(self) -> Plain:
        """What is sent."""
        own = {name: value for name, value in vars(self).items() if name != "model"}
        return {**own, "model": plain(self.model)}

    @classmethod
    def from_plain(cls, given: Plain) -> "Job":
        """What was sent."""
        return cls(**{**given, "model": model_from_plain(given["model"])})


@dataclass(frozen=True)
class Slice:
    """Timed steps of one point, in one round: the mean step, its parts, and the mean losses of the warm-up steps."""

    timeline: Timeline
    steps: int
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Samples:
    """Sums that were timed, how many ranks made them, and whether those are on one machine; work: see Network."""

    ranks: int
    shared: bool
    samples: tuple[Sample, ...]
    work: float = 0.0


Answer = Slice | Trace | Samples
ANSWERS: dict[str, type[Answer]] = {"step": Slice, "trace": Trace, "network": Samples}


def answer_from_plain(kind: str, given: Plain) -> Answer:
    """What a job of this kind answered."""
    return build(ANSWERS[kind], given, f"answer to {kind}", {})


def perform(job: Job, comm: Communicator) -> Answer:
    """Do the job; every rank of it calls this. Raises ConfigError, EngineError, MissingDependency."""
    if comm.size != job.ranks:
        raise ConfigError(f"a job for {job.ranks} ranks was started on {comm.size}")
    if job.kind == "network":
        shared, size = comm.node_size == comm.size, FLOAT_BYTES * job.model.parameter_count
        work = 0.0 if shared else measure_work(comm, size)
        return Samples(comm.size, shared, measure(comm, sizes_around(size)), work)
    workload = Workload(job.model, job.batch_size, seed=job.seed)
    program = contender(job.program, job.threads)
    recipe = Recipe(precision=program.precision, seed=job.seed, batch_size=job.batch_size)
    executor = program.engine.executor(workload.model, workload.weights, recipe)
    try:
        if job.kind == "trace":
            return _trace(job, executor, workload, comm)
        return _steps(job, executor, workload, comm, recipe)
    finally:
        executor.close()


def _trace(job: Job, executor: Executor, workload: Workload, comm: Communicator) -> Trace:
    """As many steps as fit into the job's seconds, on the first batch; those of all ranks, on every rank."""
    x, y = workload.batches[0]
    part = part_of(executor.grads.flat.size, 0, job.sharers) if job.sharers > 1 else None
    tracer = Tracer(executor, LOSS, OPTIMIZER, job.threads, part, job.early)
    comm.barrier()
    once = tracer.trace(x, y, workload.samples, 1).steps[0].seconds
    count = np.array([_count(job.seconds, once)])
    comm.broadcast(count)
    traced = tracer.trace(x, y, workload.samples, int(count[0]))
    times = np.zeros((comm.size, len(traced.steps), len(traced.slices) + 2))
    times[comm.rank] = [(*step.ready, step.computed, step.update) for step in traced.steps]
    comm.allreduce(times)
    rows = times.reshape(-1, times.shape[2]).tolist()
    steps = tuple(StepTrace(tuple(ready), computed, update) for *ready, computed, update in rows)
    return replace(traced, steps=steps)


def _steps(job: Job, executor: Executor, workload: Workload, comm: Communicator, recipe: Recipe) -> Slice:
    """Warm up, agree on a number of steps, and time them: the steps of a training, whole."""
    mine, size = shard(job.batch_size, comm), job.batch_size
    batches = [Batch(x[mine], y[mine], y[mine], workload.samples[mine], size) for x, y in workload.batches]
    stepper = Stepper(executor, recipe, comm, Parallel(sync_batch_norm=True), StopRequest())
    losses = [stepper.step(batches[number], OPTIMIZER).loss / size for number in range(WARM_UP)]
    began = time.perf_counter()
    stepper.step(batches[WARM_UP], OPTIMIZER)
    count = np.array([_count(job.seconds, time.perf_counter() - began)])
    comm.broadcast(count)
    stepper.seconds = Seconds()
    comm.barrier()
    began = time.perf_counter()
    for number in range(int(count[0])):
        stepper.step(batches[number % BATCHES], OPTIMIZER)
    seconds = (time.perf_counter() - began) / int(count[0])
    spent = {what: fmean(ranks) / int(count[0]) for what, ranks in stepper.all_seconds().items()}
    if comm.size == 1:
        return Slice(Timeline(seconds, 0.0, 0.0), int(count[0]), tuple(losses))
    beside = seconds - spent["compute"] - spent["waiting"]
    return Slice(Timeline(spent["compute"], max(0.0, beside), spent["waiting"]), int(count[0]), tuple(losses))


def _count(seconds: float, step: float) -> int:
    """Steps that fill so many seconds."""
    return min(MOST_STEPS, max(1, math.ceil(seconds / max(step, 1e-6))))


def to_plain(answer: Answer) -> Plain:
    """What is sent back."""
    return asdict(answer)
