"""Costs of allreduce: by hand, against a simulation of every message, and alpha and beta found again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convolt.comms import Serial
from convolt.errors import ConfigError
from convolt.scaling.network import (
    ALGORITHMS,
    NETWORKS,
    Network,
    Sample,
    allreduce,
    fit,
    measure,
    measure_work,
    parse,
    rabenseifner,
    recursive_doubling,
    ring,
    sizes_around,
)

ROUND = Network("round", alpha=1.0, beta=0.01, gamma=0.001)
NETWORK = st.builds(Network, st.just("any"), st.floats(0, 1e-3), st.floats(0, 1e-8), st.floats(0, 1e-9))
SIZE, RANKS = st.integers(0, 10**8), st.integers(1, 130)


@pytest.mark.parametrize(
    ("ranks", "around", "doubling", "halving"),
    [  # 1200 bytes: 12 s of beta and 1.2 s of gamma for all of them
        (1, 0, 0, 0),
        (2, 2 + 12 + 0.6, 1 + 13.2, 2 + 12 + 0.6),
        (4, 6 + 18 + 0.9, 2 * 14.2, 4 + 18 + 0.9),
        (3, 4 + 16 + 0.8, 14.2 + 26 + 1.2, 2 + 12 + 0.6 + 26 + 1.2),
    ],
)
def test_costs_by_hand(ranks, around, doubling, halving):
    assert ring(1200, ranks, ROUND) == pytest.approx(around)
    assert recursive_doubling(1200, ranks, ROUND) == pytest.approx(doubling)
    assert rabenseifner(1200, ranks, ROUND) == pytest.approx(halving)


class Cluster:
    """Ranks with clocks and vectors: every message is sent, every sum computed."""

    def __init__(self, ranks, elements, network):
        self.network, self.clocks = network, [0.0] * ranks
        self.vectors = [dict.fromkeys(range(elements), 1 << rank) for rank in range(ranks)]
        self.whole = (1 << ranks) - 1

    def step(self, messages):
        """Messages (sender, receiver, elements, add) that leave at once: a rank sends one and receives one."""
        sent = [
            (receiver, {e: self.vectors[sender][e] for e in elements}, self.clocks[sender], add)
            for sender, receiver, elements, add in messages
        ]
        busy = {}
        for receiver, values, began, add in sent:
            size = len(values)
            end = max(began, self.clocks[receiver]) + self.network.alpha + size * self.network.beta
            for element, value in values.items():
                if add:
                    assert not self.vectors[receiver][element] & value  # nothing is added twice
                self.vectors[receiver][element] = self.vectors[receiver][element] + value if add else value
            busy[receiver] = end + (size * self.network.gamma if add else 0)
        for sender, *_ in messages:
            busy.setdefault(sender, self.clocks[sender] + self.network.alpha)
        for rank, end in busy.items():
            self.clocks[rank] = max(self.clocks[rank], end)

    def seconds(self):
        assert all(value == self.whole for vector in self.vectors for value in vector.values())
        return max(self.clocks)


def chunk(number, ranks, elements):
    return range(number * elements // ranks, (number + 1) * elements // ranks)


def run_ring(cluster, ranks, elements):
    for adding in (True, False):
        for step in range(ranks - 1):
            shift = 0 if adding else 1
            cluster.step(
                [(r, (r + 1) % ranks, chunk((r - step + shift) % ranks, ranks, elements), adding) for r in range(ranks)]
            )


def folded(cluster, ranks, elements, inner):
    """Ranks beyond a power of two hand over first and are told last; `inner` runs on the others."""
    power = 2 ** (ranks.bit_length() - 1)
    extra, everything = ranks - power, range(elements)
    if extra:
        cluster.step([(2 * i, 2 * i + 1, everything, True) for i in range(extra)])
    inner([2 * i + 1 for i in range(extra)] + list(range(2 * extra, ranks)))
    if extra:
        cluster.step([(2 * i + 1, 2 * i, everything, False) for i in range(extra)])


def run_recursive_doubling(cluster, ranks, elements):
    def inner(members):
        distance = 1
        while distance < len(members):
            cluster.step([(m, members[i ^ distance], range(elements), True) for i, m in enumerate(members)])
            distance *= 2

    folded(cluster, ranks, elements, inner)


def run_rabenseifner(cluster, ranks, elements):
    def inner(members):
        parts, distance = {m: range(elements) for m in members}, len(members) // 2
        while distance:  # halve: the lower partner keeps the first half
            halves = {}
            messages = []
            for i, m in enumerate(members):
                half = len(parts[m]) // 2
                first, second = parts[m][:half], parts[m][half:]
                keeps_first = not i & distance
                halves[m] = first if keeps_first else second
                messages.append((m, members[i ^ distance], second if keeps_first else first, True))
            cluster.step(messages)
            parts, distance = halves, distance // 2
        distance = 1
        while distance < len(members):  # double: each tells its partner what it knows
            cluster.step([(m, members[i ^ distance], parts[m], False) for i, m in enumerate(members)])
            parts = {
                m: range(
                    min(parts[m].start, parts[members[i ^ distance]].start),
                    max(parts[m].stop, parts[members[i ^ distance]].stop),
                )
                for i, m in enumerate(members)
            }
            distance *= 2

    folded(cluster, ranks, elements, inner)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
@pytest.mark.parametrize(
    ("name", "run"),
    [("ring", run_ring), ("recursive-doubling", run_recursive_doubling), ("rabenseifner", run_rabenseifner)],
)
def test_costs_are_those_of_every_message(name, run, ranks):
    elements = 16 * ranks  # which every algorithm can cut into equal parts
    cluster = Cluster(ranks, elements, ROUND)
    run(cluster, ranks, elements)
    assert ALGORITHMS[name](elements, ranks, ROUND) == pytest.approx(cluster.seconds())


@given(SIZE, RANKS, NETWORK)
def test_best_is_the_least_and_no_less_than_the_bounds(size, ranks, network):
    best = allreduce(size, ranks, network)
    assert best == min(allreduce(size, ranks, network, name) for name in ALGORITHMS)
    volume = 2 * (ranks - 1) / ranks * size * network.beta  # every rank must send and receive that much
    latency = (ranks - 1).bit_length() * network.alpha
    if ranks & (ranks - 1) == 0:
        assert best >= max(0.5 * volume, latency) * (1 - 1e-9)
    assert ring(size, ranks, network) >= volume * (1 - 1e-9)


@given(SIZE, SIZE, st.integers(2, 130), NETWORK)
def test_more_bytes_never_take_less(one, other, ranks, network):
    small, large = sorted((one, other))
    assert allreduce(small, ranks, network) <= allreduce(large, ranks, network) * (1 + 1e-9)


@given(st.integers(2, 16), st.floats(1e-7, 1e-3), st.floats(1e-12, 1e-7))
def test_fit_finds_alpha_and_beta_again(ranks, alpha, beta):
    truth = Network("truth", alpha, beta)
    samples = [Sample(4**k, rabenseifner(4**k, ranks, truth)) for k in range(2, 13)]
    found = fit(samples, ranks)
    assert found.alpha == pytest.approx(alpha, rel=1e-6)
    assert found.beta == pytest.approx(beta, rel=1e-6)


@pytest.mark.parametrize(
    ("samples", "zero"),
    [
        ([Sample(100, 1.0), Sample(200, 3.0)], "alpha"),  # steeper than a line through the origin
        ([Sample(100, 3.0), Sample(200, 1.0)], "beta"),  # falling
    ],
)
def test_fit_is_never_negative(samples, zero):
    found = fit(samples, 2)
    assert getattr(found, zero) == 0
    assert found.alpha + found.beta > 0


def test_fit_needs_two_sizes():
    with pytest.raises(ConfigError, match="at least two sizes"):
        fit([Sample(8, 1.0), Sample(8, 1.1)], 2)


def test_presets_say_where_they_come_from():
    assert NETWORKS["1gbe"].beta == pytest.approx(8e-9 * 1538 / 1448)
    assert NETWORKS["10gbe"].beta == pytest.approx(NETWORKS["100gbe"].beta * 10)
    assert all(network.name == name and "stated" in network.source for name, network in NETWORKS.items())
    assert "25 us" in str(NETWORKS["10gbe"])


@pytest.mark.parametrize(
    ("text", "alpha", "beta"), [("30us:2.5Gb/s", 30e-6, 3.2e-9), ("1ms:100Mb/s", 1e-3, 8e-8), ("0s:1Gb/s", 0, 8e-9)]
)
def test_network_of_ones_own(text, alpha, beta):
    network = parse(text)
    assert (network.name, network.alpha) == (text, pytest.approx(alpha))
    assert network.beta == pytest.approx(beta)


@pytest.mark.parametrize("text", ["10gbi", "", "10us", "10us:0Gb/s", "10:10", "-1us:1Gb/s"])
def test_unknown_network_is_one_line(text):
    with pytest.raises(ConfigError, match="network: unknown name") as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["alpha", "beta", "gamma"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "x"])
def test_network_is_checked(field, value):
    with pytest.raises(ConfigError, match=f"{field} must be a number of seconds"):
        Network(**{"name": "n", "alpha": 0.0, "beta": 0.0, field: value})


def test_allreduce_is_checked():
    with pytest.raises(ConfigError, match="ranks must be at least 1"):
        allreduce(8, 0, ROUND)
    with pytest.raises(ConfigError, match="did you mean 'ring'"):
        allreduce(8, 2, ROUND, "rings")


class Busy:
    """Two ranks whose sums take five ticks of a clock from whoever computes meanwhile."""

    rank, size = 0, 2

    def __init__(self):
        self.now = 0.0

    def clock(self):
        self.now += 1e-3
        return self.now

    def summation(self, vector):
        return self

    def add(self, part):
        self.now += 5e-3

    def finish(self):
        pass

    def barrier(self):
        pass

    def broadcast(self, array):
        pass

    def allreduce(self, array):
        array[:, 1] = array[:, 0]  # the other rank is as busy


def test_what_a_sum_takes_from_a_core_that_computes(monkeypatch):
    comm = Busy()
    monkeypatch.setattr("convolt.scaling.network.time.perf_counter", comm.clock)
    assert measure_work(comm, 4000, repeats=5) == pytest.approx(5e-3 / 2000)


def test_one_rank_has_no_network():
    with pytest.raises(ConfigError, match="at least 2 ranks; got 1"):
        measure(Serial(), [64, 128])


@pytest.mark.parametrize("size", [0, 4, 100, 4_283_176])
def test_sizes_measured_hold_the_gradients(size):
    sizes = sizes_around(size)
    assert list(sizes) == sorted(set(sizes))
    assert len(sizes) >= 3
    assert sizes[-1] >= 2 * size
    assert size < 4096 or size in sizes
