"""Predicted steps: against every instant of a brute-force simulation, by hand, and within what must bound them."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convolt import zoo
from convolt.comms.messages import BUCKET, BucketSum
from convolt.engines import Im2col
from convolt.errors import ConfigError
from convolt.losses import CrossEntropy
from convolt.optimizers import Adam
from convolt.recipe import Recipe
from convolt.rng import SampleRng
from convolt.scaling.network import NETWORKS, Network, allreduce, rabenseifner, ring
from convolt.scaling.prediction import (
    SMALL_BYTES,
    SMALL_SUMS,
    Exchange,
    Message,
    StepTrace,
    Trace,
    Tracer,
    exchange,
    largest_shard,
    predict,
    simulate,
)

FREE = Network("free", 0.0, 0.0)
ROUND = Network("round", alpha=1.0, beta=0.01)
WHOLE = st.integers(0, 40)


@st.composite
def steps(draw, slices=3):
    """A step in whole ticks: slices become ready one after the other, the last at the end of backward at the latest."""
    ready = np.cumsum([draw(WHOLE) for _ in range(slices)]).tolist()
    return StepTrace(tuple(map(float, ready)), float(ready[-1] + draw(WHOLE)), float(draw(WHOLE)))


RANKS = st.lists(steps(), min_size=1, max_size=5)
COSTS = st.lists(st.integers(0, 60), min_size=3, max_size=3)


def plan(costs, tail=0.0):
    """A message for every slice."""
    return Exchange(tuple(Message((number,), cost) for number, cost in enumerate(costs)), tail)


def tick_by_tick(ranks, costs):
    """The end of the last message, one unit of time after the other: no formula."""
    now, left, current = 0, list(costs), 0
    while current < len(costs):
        if left[current] == 0 and all(rank.ready[current] <= now for rank in ranks):
            current += 1
            continue
        if all(rank.ready[current] <= now for rank in ranks):
            left[current] -= 1
        now += 1
    return now


@given(RANKS, COSTS, st.integers(0, 9))
def test_simulation_is_that_of_every_tick(ranks, costs, tail):
    found = simulate(ranks, plan(costs, tail))
    slowest, update = max(rank.computed for rank in ranks), max(rank.update for rank in ranks)
    assert found.seconds == pytest.approx(max(slowest, tick_by_tick(ranks, costs)) + tail + update)


@given(RANKS, COSTS, st.floats(0, 10))
def test_simulation_is_within_its_bounds(ranks, costs, tail):
    found, blocking = simulate(ranks, plan(costs, tail)), simulate(ranks, Exchange((), sum(costs) + tail))
    alone = max(rank.computed for rank in ranks) + max(rank.update for rank in ranks)
    assert alone + tail <= found.seconds + 1e-9
    assert found.seconds <= blocking.seconds + 1e-9
    assert blocking.seconds == pytest.approx(alone + sum(costs) + tail)
    assert min(found.compute, found.communication, found.waiting) >= 0
    assert found.compute == pytest.approx(sum(rank.seconds for rank in ranks) / len(ranks))


def test_overlap_by_hand():
    one = StepTrace(ready=(2.0, 3.0, 8.0), computed=10.0, update=1.0)
    late = StepTrace(ready=(4.0, 6.0, 9.0), computed=14.0, update=1.0)
    alone = simulate([one], plan([5.0, 1.0, 4.0]))  # 2-7, 7-8, 8-12: two seconds stick out
    assert (alone.compute, alone.communication, alone.waiting) == (11.0, 2.0, 0.0)
    both = simulate([one, late], plan([5.0, 1.0, 4.0]))  # 4-9, 9-10, 10-14: hidden; the fast rank waits 4, the mean 2
    assert (both.compute, both.communication, both.waiting) == (13.0, 0.0, 2.0)
    blocking = simulate([one, late], Exchange((), 10.5))
    assert (blocking.compute, blocking.communication, blocking.waiting) == (13.0, 10.5, 2.0)
    bucket = simulate([one], Exchange((Message((0, 1), 6.0), Message((2,), 4.0)), 1.0))  # 3-9, 9-13, and 1
    assert (bucket.compute, bucket.communication, bucket.waiting) == (11.0, 4.0, 0.0)


SLICES = ((100, 1100), (10, 100), (0, 10))


def trace(*given_steps, slices=SLICES):
    return Trace(16, 1, slices, given_steps)


STEP = StepTrace((0.01, 0.02, 0.03), 0.031, 0.004)


def test_exchange_by_slices():
    found = exchange(trace(STEP), 4, NETWORKS["10gbe"], "ring")
    assert found.tail == 0
    assert [message.slices for message in found.messages] == [(0,), (1,), (2,)]
    assert found.messages[0].seconds == ring(4000, 4, NETWORKS["10gbe"])


def test_exchange_through_memory_hides_nothing():
    found = exchange(trace(STEP), 2, NETWORKS["shared-memory"])
    assert found == Exchange((), rabenseifner(4400, 2, NETWORKS["shared-memory"]))


def test_exchange_between_machines_sends_the_buckets_of_the_gradients_sum():
    """The same buckets, in the same order, as those that leave while a real gradient becomes final."""
    length = 2 * BUCKET + 1000
    slices = ((BUCKET + 5, length), (400, BUCKET + 5), (0, 400))
    found = exchange(trace(STEP, slices=slices), 2, ROUND)
    left, told = [], []

    def record(sent, counts, received, received_counts):
        left.append((len(sent), len(told)))

    summation = BucketSum(np.zeros(length, np.float32), 0, 2, False, False, record, None, None, lambda: None)
    for part in slices:
        told.append(part)
        summation.add(slice(*part))
    assert [1 + max(message.slices) for message in found.messages] == [number for _, number in left]
    for message, (count, _) in zip(found.messages, left, strict=True):
        assert message.seconds == pytest.approx(ROUND.alpha + 2 * count * ROUND.beta)
    assert found.tail == pytest.approx(ROUND.alpha + 2 * length * ROUND.beta)


@given(
    st.lists(steps(), min_size=1, max_size=6),
    st.integers(1, 64),
    st.sampled_from(sorted(NETWORKS)),
    st.sampled_from(["ours", "best", "ring"]),
)
def test_prediction_is_never_below_compute(given_steps, ranks, name, algorithm):
    network = NETWORKS[name]
    found = predict(trace(*given_steps), ranks, network, algorithm)
    assert found.seconds >= min(step.seconds for step in given_steps) - 1e-9
    small = SMALL_SUMS * allreduce(SMALL_BYTES, ranks, network)
    most = sum(ring(4 * (stop - start), ranks, network) for start, stop in SLICES)
    slowest = max(step.computed for step in given_steps) + max(step.update for step in given_steps)
    assert found.seconds <= slowest + most + small + 1e-9


def test_one_rank_is_the_trace():
    found = predict(trace(STEP), 1, NETWORKS["1gbe"])
    assert (found.compute, found.communication, found.waiting) == (pytest.approx(0.035), 0.0, 0.0)


def test_slower_network_is_never_faster_and_ranks_that_differ_wait():
    times = [predict(trace(STEP), 8, NETWORKS[name]).seconds for name in ("100gbe", "25gbe", "10gbe", "1gbe")]
    assert times == sorted(times)
    slow = StepTrace(STEP.ready, 2 * STEP.computed, STEP.update)
    alike, unlike = (predict(trace(*which), 8, FREE) for which in ((STEP, STEP), (STEP, slow)))
    assert alike.waiting == 0
    assert unlike.waiting > 0
    assert unlike.seconds <= slow.seconds + 1e-12


def test_same_seed_same_prediction():
    slow = StepTrace(STEP.ready, 0.05, STEP.update)
    assert predict(trace(STEP, slow), 4, FREE, seed=1) == predict(trace(STEP, slow), 4, FREE, seed=1)


@pytest.mark.parametrize(("batch", "ranks", "shard"), [(256, 1, 256), (256, 3, 86), (256, 256, 1), (7, 2, 4)])
def test_largest_shard(batch, ranks, shard):
    assert largest_shard(batch, ranks) == shard


@pytest.mark.parametrize("ranks", [0, 8])
def test_every_rank_needs_an_image(ranks):
    with pytest.raises(ConfigError, match="7 images cannot be shared"):
        largest_shard(7, ranks)


def test_impossible_predictions_are_refused():
    with pytest.raises(ConfigError, match="at least 1 rank"):
        predict(trace(STEP), 0, FREE)
    with pytest.raises(ConfigError, match="at least one step"):
        trace()
    with pytest.raises(ConfigError, match="every slice"):
        trace(STEP, slices=((0, 1), (1, 2)))


def test_tracer_tells_every_slice_in_the_order_of_backward():
    model, batch = zoo.build("lenet5", (1, 28, 28), 10), 4
    executor = Im2col(threads=1).executor(model, None, Recipe())
    images = np.random.default_rng(0).integers(0, 256, (batch, 1, 28, 28), np.uint8)
    labels, samples = np.arange(batch), SampleRng(0, 0, np.arange(batch))
    before = executor.params.flat.copy()
    found = Tracer(executor, CrossEntropy(), Adam(), threads=1).trace(images, labels, samples, 3)
    executor.close()
    assert (found.batch, found.threads, len(found.steps)) == (batch, 1, 3)
    parts = sorted(found.slices)
    assert (parts[0][0], parts[-1][1]) == (0, model.parameter_count)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(parts))
    assert found.slices[0][1] == model.parameter_count  # the last layer's gradient is the first
    assert found.size == model.parameter_count * executor.grads.flat.itemsize
    for step in found.steps:
        assert list(step.ready) == sorted(step.ready)
        assert 0 < step.ready[0] <= step.ready[-1] <= step.computed < step.seconds
    assert not np.array_equal(before, executor.params.flat)


def test_a_rank_is_traced_as_it_works():
    """It moves its own part of the weights alone, and tells nothing early where nothing leaves early."""
    model, batch = zoo.build("lenet5", (1, 28, 28), 10), 4
    executor = Im2col(threads=1).executor(model, None, Recipe())
    images = np.random.default_rng(0).integers(0, 256, (batch, 1, 28, 28), np.uint8)
    before, own = executor.params.flat.copy(), slice(100, 5000)
    tracer = Tracer(executor, CrossEntropy(), Adam(), threads=1, part=own, early=False)
    found = tracer.trace(images, np.arange(batch), SampleRng(0, 0, np.arange(batch)), 2)
    moved = np.flatnonzero(before != executor.params.flat)
    executor.close()
    assert (moved.min() >= own.start, moved.max() < own.stop) == (True, True)
    assert found.slices == ((0, model.parameter_count),)


def test_what_a_network_takes_from_the_cores_is_time_of_backward():
    one = StepTrace(ready=(2.0, 8.0), computed=10.0, update=1.0)
    hidden = simulate([one], Exchange((Message((0,), 4.0, work=1.0),), 0.0))  # 2-6, and backward ends at 11
    assert (hidden.compute, hidden.communication, hidden.waiting) == (12.0, 0.0, 0.0)
    half = simulate([one], Exchange((Message((1,), 4.0, work=1.0),), 0.0))  # 8-12: half of it before the end at 10
    assert (half.compute, half.communication, half.waiting) == (11.5, 1.5, 0.0)
    both = simulate([one], Exchange((Message((0,), 4.0, 1.0), Message((1,), 4.0, 1.0)), 2.0))  # 2-6, 9-13; ends at 11
    assert (both.compute, both.communication, both.waiting) == (12.5, 1.5 + 2.0, 0.0)
