"""What a step would take on more ranks or another network: measured compute, modeled communication, simulated overlap.

Compute is measured, not modeled: a process computes the shard that a rank of p would have (the global batch over p),
moves the part of the weights that such a rank moves, and notes when backward finishes each slice of the gradient, as
the ranks themselves are told (``on_ready``). So nothing is assumed about how a smaller batch scales, and any engine can
be traced. Communication is the alpha-beta
cost of network.py. Between them stands the exchange: which messages leave during backward, and what is left for its
end. The rest is a simulation of events:

    a message can leave a rank when the slices in it are final there; it begins when it can leave every rank and the one
    before it has ended; what cannot be hidden follows when all of them and the slowest rank's backward have ended; then
    the weights are updated.

Ranks differ because steps do: each simulated rank draws one of the traced steps, so that waiting for the slowest of p
is in the result. What ranks on one machine take from one another (memory bandwidth, cache, clock) is in a trace of
processes that compute side by side without a word between them. What is *not* in it: a network's work costs CPU time.
How much that matters is told by the error at the points that were measured too.

Reference: Zhang et al. 2017, Poseidon (USENIX ATC), 3.1: communication that hides behind backward.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from convolt.comms.messages import BUCKET
from convolt.engine import Array, Executor
from convolt.errors import ConfigError
from convolt.losses import Loss
from convolt.optimizers import Optimizer
from convolt.rng import SampleRng
from convolt.scaling.network import Network, all_gather, allreduce, reduce_scatter
from convolt.step import square_sum

STEPS = 400  # simulated; their mean moves by less than a percent from seed to seed
SMALL_SUMS, SMALL_BYTES = 2, 32  # besides the gradient: loss, what was right, signals; and the gradient's norm


@dataclass(frozen=True)
class StepTrace:
    """One step of one process, in seconds from its beginning.

    ready: when each slice of the gradient was final. computed: when forward and backward had ended. update: seconds
    from there to the new weights.
    """

    ready: tuple[float, ...]
    computed: float
    update: float

    @property
    def seconds(self) -> float:
        """The step without any communication."""
        return self.computed + self.update


@dataclass(frozen=True)
class Trace:
    """Steps of one process alone on a shard of ``batch`` images.

    slices: where in the gradient, in elements, in the order in which backward gives them. itemsize: bytes of one.
    """

    batch: int
    threads: int
    slices: tuple[tuple[int, int], ...]
    steps: tuple[StepTrace, ...]
    itemsize: int = 4

    def __post_init__(self) -> None:
        if not self.steps or any(len(step.ready) != len(self.slices) for step in self.steps):
            raise ConfigError("a trace needs at least one step, and in each the moment when every slice was ready")

    @property
    def size(self) -> int:
        """Bytes of the gradient."""
        return self.itemsize * sum(stop - start for start, stop in self.slices)


@dataclass(frozen=True)
class Message:
    """A part of the gradient that leaves during backward: which slices must be final, and how long it takes.

    work: seconds that it takes from a core that computes all the while.
    """

    slices: tuple[int, ...]
    seconds: float
    work: float = 0.0


@dataclass(frozen=True)
class Exchange:
    """How the gradient is summed: messages in the order in which they leave, and seconds that nothing can hide."""

    messages: tuple[Message, ...]
    tail: float


@dataclass(frozen=True)
class Timeline:
    """Where the seconds of a step on p ranks go, for the mean rank; the three add up to ``seconds``.

    compute: its own forward, backward and update. waiting: until the slowest rank is as far. communication: what the
    sums take beyond the end of the slowest rank's backward; what is hidden behind backward costs nothing.
    """

    compute: float
    communication: float
    waiting: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.communication + self.waiting


class Tracer:
    """Traces steps of an executor on a batch; the weights move as in training.

    part: of the gradient, which a rank moves; all of it where the optimizer is not sharded. early: whether slices of
    the gradient are told during backward; otherwise all of it is one slice, as where nothing leaves before the end.
    """

    def __init__(
        self,
        executor: Executor,
        loss: Loss,
        optimizer: Optimizer,
        threads: int,
        part: slice | None = None,
        early: bool = True,
    ) -> None:
        self._executor, self._loss, self._optimizer, self._threads = executor, loss, optimizer, threads
        self._part, self._early = part, early

    def trace(self, x: Array, y: Array, rng: SampleRng, steps: int) -> Trace:
        """``steps`` steps on one batch, after one that does not count."""
        runs = [self._step(x, y, rng) for _ in range(1 + steps)][1:]
        itemsize = self._executor.grads.flat.itemsize
        return Trace(len(x), self._threads, runs[0][0], tuple(step for _, step in runs), itemsize)

    def _step(self, x: Array, y: Array, rng: SampleRng) -> tuple[tuple[tuple[int, int], ...], StepTrace]:
        executor = self._executor
        slices: list[tuple[int, int]] = []
        ready: list[float] = []
        start = time.perf_counter()

        def on_ready(part: slice) -> None:
            slices.append((part.start, part.stop))
            ready.append(time.perf_counter() - start)

        executor.loss_and_grads(x, y, self._loss, 1 / len(x), rng, on_ready if self._early else None, fresh=True)
        if not self._early:
            on_ready(slice(0, executor.grads.flat.size))
        computed = time.perf_counter() - start
        if self._part is None:
            executor.grad_norm()
        else:
            square_sum(executor.grads.flat[self._part])
        executor.statistics_are_finite()
        executor.update(self._optimizer, self._part)
        return tuple(slices), StepTrace(tuple(ready), computed, time.perf_counter() - start - computed)


def exchange(trace: Trace, ranks: int, network: Network, algorithm: str = "ours") -> Exchange:
    """The messages of one gradient's sum.

    ``ours`` is what the ranks do. On one machine: nothing leaves early, one sum through shared memory follows backward.
    Between machines: buckets from the gradient's end are reduce-scattered as they become final, in order, and one
    all-gather follows. Any algorithm of network.py, or ``best``: an allreduce of every slice as backward gives it, with
    nothing left for the end.
    """
    if algorithm != "ours":
        sizes = [trace.itemsize * (stop - start) for start, stop in trace.slices]
        costs = [allreduce(size, ranks, network, algorithm) for size in sizes]
        return Exchange(tuple(Message((number,), cost) for number, cost in enumerate(costs)), 0.0)
    if network.shared:
        return Exchange((), allreduce(trace.size, ranks, network, "rabenseifner"))
    length = trace.size // trace.itemsize
    messages = []
    for stop in range(length, 0, -BUCKET):
        start = max(0, stop - BUCKET)
        within = tuple(n for n, (begin, end) in enumerate(trace.slices) if begin < stop and end > start)
        size = trace.itemsize * (stop - start)
        work = (ranks - 1) / ranks * size * network.work
        messages.append(Message(within, reduce_scatter(size, ranks, network), work))
    return Exchange(tuple(messages), all_gather(trace.size, ranks, network))


def simulate(ranks: Sequence[StepTrace], plan: Exchange) -> Timeline:
    """One step of so many ranks, each with a trace of its own.

    A message that is under way while ranks compute slows them down: by all of its work, or by as much of it as the
    part of its time that lies before the end of the slowest rank's backward.
    """
    end = stolen = 0.0
    slowest, update = max(rank.computed for rank in ranks), max(rank.update for rank in ranks)
    for message in plan.messages:
        leaves = stolen + max(rank.ready[number] for rank in ranks for number in message.slices)
        begins = max(end, leaves)
        end = begins + message.seconds
        hidden = min(message.seconds, max(0.0, slowest + stolen - begins))
        stolen += message.work * hidden / message.seconds if hidden else 0.0
    compute = fmean(rank.seconds for rank in ranks) + stolen
    slowest += stolen
    return Timeline(compute, max(0.0, end - slowest) + plan.tail, max(0.0, slowest + update - compute))


def predict(trace: Trace, ranks: int, network: Network, algorithm: str = "ours", seed: int = 0) -> Timeline:
    """The mean step of ``ranks`` ranks, each with a shard like the traced one. Raises ConfigError."""
    if ranks < 1:
        raise ConfigError(f"a prediction needs at least 1 rank; got {ranks}")
    plan = exchange(trace, ranks, network, algorithm)
    plan = replace(plan, tail=plan.tail + SMALL_SUMS * allreduce(SMALL_BYTES, ranks, network))
    drawn = np.random.default_rng(seed).integers(0, len(trace.steps), (STEPS, ranks))
    lines = [simulate([trace.steps[i] for i in row], plan) for row in drawn]
    return Timeline(
        fmean(line.compute for line in lines),
        fmean(line.communication for line in lines),
        fmean(line.waiting for line in lines),
    )


def largest_shard(batch_size: int, ranks: int) -> int:
    """Images of the rank that has most of them; nobody is done before it is. Raises ConfigError for too many ranks."""
    if not 1 <= ranks <= batch_size:
        raise ConfigError(f"{batch_size} images cannot be shared by {ranks} ranks; give a larger batch or fewer ranks")
    return -(-batch_size // ranks)
