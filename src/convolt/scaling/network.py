"""What it costs to sum a gradient over ranks: the alpha-beta model of a network, and its measurement.

A message of n bytes takes ``alpha + n beta`` seconds; links are full duplex, a rank sends and receives one message at a
time, and adding what arrived takes ``gamma`` seconds a byte. The three classic algorithms, p ranks, n bytes:

    ring                2 (p - 1) alpha + 2 (p - 1)/p n beta + (p - 1)/p n gamma
    recursive doubling  log2(p) (alpha + n beta + n gamma)
    Rabenseifner        2 log2(p) alpha + 2 (p - 1)/p n beta + (p - 1)/p n gamma

Where p is no power of two, the last two fold: of the ``p - 2^floor(log2 p)`` ranks too many each hands its vector to a
neighbor first (alpha + n beta + n gamma) and gets the sum back last (alpha + n beta), as MPICH does.

References: Hockney 1994, The communication challenge for MPP (Parallel Computing 20, 389-398). Rabenseifner 2004,
Optimization of collective reduction operations (ICCS, LNCS 3036). Thakur, Rabenseifner and Gropp 2005, Optimization of
collective communication operations in MPICH (IJHPCA 19(1), 49-66), 4.5. Patarasuk and Yuan 2009, Bandwidth optimal
all-reduce algorithms for clusters of workstations (JPDC 69(2), 117-124).
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from convolt.comms import Communicator
from convolt.errors import ConfigError, nearest


@dataclass(frozen=True)
class Network:
    """A network between ranks.

    alpha: seconds of the shortest message. beta: seconds a byte. gamma: seconds to add a byte to another; it is part of
    beta where a network was measured, because a sum shows only both. work: seconds that a byte takes from a core that
    computes meanwhile, for the kernel's side of it. shared: whether the ranks are on one machine and add through its
    memory. source: where the figures come from. Raises ConfigError.
    """

    name: str
    alpha: float
    beta: float
    gamma: float = 0.0
    work: float = 0.0
    shared: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        for what in ("alpha", "beta", "gamma", "work"):
            value = getattr(self, what)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise ConfigError(f"network {self.name}: {what} must be a number of seconds >= 0; got {value!r}")

    def __str__(self) -> str:
        rate = "infinite" if not self.beta else f"{8e-9 / self.beta:.3g} Gb/s"
        return f"{self.name} (alpha {1e6 * self.alpha:.3g} us, {rate})"


def ethernet(gigabits: float, alpha: float) -> Network:
    """TCP over Ethernet: of the 1538 bytes that a full frame takes on the wire, 1448 are payload."""
    beta = 8 / (gigabits * 1e9) * 1538 / 1448
    source = f"stated: {gigabits:g} Gb/s on the wire, TCP with 1500-byte frames, {1e6 * alpha:g} us a message"
    return Network(f"{gigabits:g}gbe", alpha, beta, source=source)


#: Networks by name. The alphas are stated, not measured: half a round trip of a small message between two processes
#: through the kernel's TCP, as such hardware commonly gives; ``--network ALPHA:RATE`` takes your own.
NETWORKS = {
    network.name: network
    for network in (
        Network("shared-memory", 1e-6, 1 / 6e9, shared=True, source="stated: 1 us a message, 6 GB/s between cores"),
        ethernet(1, 50e-6),
        ethernet(10, 25e-6),
        ethernet(25, 20e-6),
        ethernet(100, 15e-6),
    )
}

_CUSTOM = re.compile(r"(?P<alpha>\d+(\.\d+)?(e-?\d+)?)(?P<unit>us|ms|s):(?P<rate>\d+(\.\d+)?)(?P<scale>[MG])b/s")
_SECONDS, _BITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}, {"M": 1e6, "G": 1e9}


def parse(text: str) -> Network:
    """A network by its name, or ``ALPHA:RATE`` with units, such as ``30us:2.5Gb/s``. Raises ConfigError."""
    if text in NETWORKS:
        return NETWORKS[text]
    found = _CUSTOM.fullmatch(text)
    if found is None or not float(found["rate"]):
        raise ConfigError(f"network: unknown name {text!r}; {nearest(text, NETWORKS)}, or ALPHA:RATE as in 30us:10Gb/s")
    rate = float(found["rate"]) * _BITS[found["scale"]]
    return Network(text, float(found["alpha"]) * _SECONDS[found["unit"]], 8 / rate, source="given")


# ------------------------------------------------------------------------------------------------- cost of allreduce


def ring(size: float, ranks: int, network: Network) -> float:
    """Seconds to sum ``size`` bytes over a ring: reduce-scatter, then allgather, p - 1 steps of n / p bytes each."""
    return reduce_scatter(size, ranks, network) + all_gather(size, ranks, network)


def recursive_doubling(size: float, ranks: int, network: Network) -> float:
    """Seconds to sum ``size`` bytes when partners at distance 1, 2, 4... exchange everything: best for few bytes."""
    step = network.alpha + size * (network.beta + network.gamma)
    return _levels(ranks) * step + _folding(size, ranks, network)


def rabenseifner(size: float, ranks: int, network: Network) -> float:
    """Seconds to sum ``size`` bytes by recursive halving (reduce-scatter) and recursive doubling (allgather)."""
    folded: int = 2 ** _levels(ranks)
    return 2 * _levels(ranks) * network.alpha + _volume(size, folded, network) + _folding(size, ranks, network)


Algorithm = Callable[[float, int, Network], float]
ALGORITHMS: dict[str, Algorithm] = {
    "ring": ring,
    "recursive-doubling": recursive_doubling,
    "rabenseifner": rabenseifner,
}


def allreduce(size: float, ranks: int, network: Network, algorithm: str = "best") -> float:
    """Seconds to sum ``size`` bytes over ``ranks``; the best algorithm for the size, as an MPI chooses, or a named one.

    Raises ConfigError.
    """
    if ranks < 1 or size < 0:
        raise ConfigError(f"allreduce: ranks must be at least 1 and bytes >= 0; got {ranks} and {size}")
    if algorithm == "best":
        return min(cost(size, ranks, network) for cost in ALGORITHMS.values())
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"allreduce: unknown algorithm {algorithm!r}; {nearest(algorithm, ALGORITHMS)}")
    return ALGORITHMS[algorithm](size, ranks, network)


def reduce_scatter(size: float, ranks: int, network: Network) -> float:
    """Seconds until each rank has its own part of the sum, by p - 1 messages of n / p bytes: the first half of a ring.

    ``(p - 1) alpha + (p - 1)/p n (beta + gamma)``
    """
    return (ranks - 1) * network.alpha + (ranks - 1) / ranks * size * (network.beta + network.gamma)


def all_gather(size: float, ranks: int, network: Network) -> float:
    """Seconds until each rank has all parts: ``(p - 1) alpha + (p - 1)/p n beta``, the second half of a ring."""
    return (ranks - 1) * network.alpha + (ranks - 1) / ranks * size * network.beta


def _volume(size: float, ranks: int, network: Network) -> float:
    """What reduce-scatter and allgather move and add: the least that any algorithm can."""
    part = (ranks - 1) / ranks * size
    return part * (2 * network.beta + network.gamma)


def _levels(ranks: int) -> int:
    return ranks.bit_length() - 1


def _folding(size: float, ranks: int, network: Network) -> float:
    """What ranks beyond a power of two cost: their vector out, the sum back."""
    if ranks & (ranks - 1) == 0:
        return 0.0
    return 2 * (network.alpha + size * network.beta) + size * network.gamma


# --------------------------------------------------------------------------------------------------------- measuring

REPEATS = 15


@dataclass(frozen=True)
class Sample:
    """The median seconds of a sum of so many bytes."""

    size: int
    seconds: float


def sizes_around(size: int) -> tuple[int, ...]:
    """Bytes of the vectors to measure: a few short ones for alpha, and some around the gradient's size for beta."""
    return (64, 1024, *sorted({max(4096, size * part // 8) for part in (1, 2, 4, 8, 16)}))


def measure(comm: Communicator, sizes: Sequence[int], repeats: int = REPEATS) -> tuple[Sample, ...]:
    """Time sums of float32 vectors, as a step makes them, all ranks together; the same samples on every rank.

    A sample is the median over repeats of the slowest rank's time. Raises ConfigError on one rank.
    """
    if comm.size < 2:
        raise ConfigError(f"a network is measured between at least 2 ranks; got {comm.size}")
    samples = []
    for size in sizes:
        vector = np.zeros(max(comm.size, size // 4), np.float32)
        home = comm.home(vector, vector)
        gradient, weights = (vector, vector) if home is None else (home.gradient, home.weights)
        summation, everything = comm.summation(gradient, scattered=True, home=home), slice(0, vector.size)
        seconds = np.zeros((1 + repeats, comm.size))
        for repeat in range(1 + repeats):
            comm.barrier()
            start = time.perf_counter()
            summation.add(everything)
            summation.finish()
            summation.share(weights)
            seconds[repeat, comm.rank] = time.perf_counter() - start
        comm.allreduce(seconds)
        samples.append(Sample(vector.nbytes, float(np.median(seconds[1:].max(axis=1)))))
    return tuple(samples)


def measure_work(comm: Communicator, size: int, repeats: int = REPEATS) -> float:
    """Seconds a byte that a reduce-scatter of ``size`` bytes takes from a core that computes meanwhile; on every rank.

    A loop that needs nothing but its core is timed alone and while the sum is under way, about as long as the sum
    takes. What it loses is the core's work for the network: starting messages, the kernel's copies and its packets.
    """
    vector = np.zeros(max(comm.size, size // 4), np.float32)
    summation, numbers = comm.summation(vector), np.ones(4096, np.float32)

    def timed(turns: int, sends: bool) -> float:
        comm.barrier()
        start = time.perf_counter()
        if sends:
            summation.add(slice(0, vector.size))
        for _ in range(turns):
            np.einsum("i,i", numbers, numbers)
        seconds = time.perf_counter() - start
        if sends:
            summation.finish()
        return seconds

    start = time.perf_counter()
    timed(0, sends=True)
    span = time.perf_counter() - start
    turns = np.array([max(1, round(1000 * span / timed(1000, sends=False)))])
    comm.broadcast(turns)
    lost = np.zeros((repeats, comm.size))
    for repeat in range(repeats):
        alone = timed(int(turns[0]), sends=False)
        lost[repeat, comm.rank] = timed(int(turns[0]), sends=True) - alone
    comm.allreduce(lost)
    return max(0.0, float(np.median(lost.mean(axis=1)))) / ((comm.size - 1) / comm.size * vector.nbytes)


def fit(
    samples: Sequence[Sample], ranks: int, name: str = "measured", shared: bool = True, work: float = 0.0
) -> Network:
    """The alpha and beta that explain measured sums best.

    Minimizes the sum of squares of *relative* errors of Rabenseifner's cost, ``a alpha + b n beta`` (so that short
    vectors count as much as long ones). Neither comes out negative. Raises ConfigError for fewer than two sizes.
    """
    if len({sample.size for sample in samples}) < 2:
        raise ConfigError(f"alpha and beta need sums of at least two sizes; got {len(samples)} samples")
    unit = (Network("alpha", 1.0, 0.0), Network("beta", 0.0, 1.0))
    matrix = np.array([[rabenseifner(sample.size, ranks, each) for each in unit] for sample in samples])
    matrix /= np.array([[sample.seconds] for sample in samples])
    scale = np.linalg.norm(matrix, axis=0)
    both = np.linalg.lstsq(matrix / scale, np.ones(len(samples)), rcond=None)[0] / scale
    if both.min() < 0:  # then the best of the allowed ones lies on an edge: one of them is 0
        alone = [float(column.sum() / (column @ column)) for column in matrix.T]
        errors = [float(np.sum((1 - column * value) ** 2)) for column, value in zip(matrix.T, alone, strict=True)]
        both = np.array([alone[0], 0.0]) if errors[0] <= errors[1] else np.array([0.0, alone[1]])
    error = median(abs(1 - predicted) for predicted in matrix @ both)
    source = f"measured: {len(samples)} sizes on {ranks} ranks, median error {error:.0%}"
    return Network(name, float(both[0]), float(both[1]), work=work, shared=shared, source=source)
