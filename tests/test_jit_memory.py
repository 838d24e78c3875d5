"""The memory of the jit engine's plans: what is shared, what is told, activations that are made twice."""

import tracemalloc

import numpy as np
import pytest
from engine_cases import UNITS
from hypothesis import given
from hypothesis import strategies as st
from jit_cases import poisoned

from convolt.engines import JIT
from convolt.engines.jit import plan
from convolt.engines.jit.buffers import Buffer, lifetimes, share
from convolt.errors import ConfigError
from convolt.layers import BatchNorm2d, Conv2d, Dense, Dropout, Flatten, MaxPool2d, ReLU, Residual
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import Adam
from convolt.recipe import Recipe
from convolt.rng import SampleRng

every_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def block(channels: int) -> Residual:
    body = (Conv2d(channels, channels, 3, padding=1, bias=False), BatchNorm2d(channels), ReLU(), Dropout(0.2))
    return Residual(body)


DEEP = Model(
    (3, 9, 7),
    (
        *(Conv2d(3, 6, 3, padding=1), ReLU(), block(6), block(6), Conv2d(6, 6, 3, padding=1), ReLU(), MaxPool2d(2)),
        *(block(6), Conv2d(6, 6, 1), block(6), Flatten(), Dense(72, 256), ReLU(), Dense(256, 5)),
    ),
)


def batch_of(size: int):
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (size, *DEEP.input_shape), np.uint8)
    return x, generator.integers(0, 5, size), SampleRng(0, 0, np.arange(size))


def steps(executor, size: int = 37) -> tuple:
    """Everything that a step leaves, for three batches, the second of them smaller; and a gradient in slices."""
    x, y, rng = batch_of(size)
    losses = [
        executor.train_step(x[:n], y[:n], CrossEntropy(), 1 / n, Adam(lr=0.01), rng[:n]).loss
        for n in (size, size // 2 + 1, size)
    ]
    left = executor.params.flat.tobytes(), executor.params.buffers_flat.tobytes()
    gradients = []
    for on_ready in (None, lambda part: None):
        executor.zero_grads()
        executor.loss_and_grads(x, y, CrossEntropy(), 1 / size, rng, on_ready)
        gradients.append(executor.grads.flat.tobytes())
    return (*losses, *left, *gradients)


# --- activations that are made twice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_activations_that_are_made_twice_leave_the_bits_and_need_less_memory(precision):
    results, memory = set(), []
    for segments in (0, 2, 3, 5, 50):
        executor = JIT(threads=2, unit=UNITS[0], checkpoint_segments=segments).executor(
            DEEP, None, Recipe(precision=precision)
        )
        results.add(steps(executor))
        memory.append(sum(executor.memory().values()))
        executor.close()
    assert len(results) == 1
    assert max(memory[1:]) < memory[0]


@every_precision
def test_no_memory_of_another_is_read_where_activations_are_made_twice(precision):
    results = set()
    for segments in (0, 3):
        # Kernels on tiles multiply what is left in their scratch memory by zero: it has to be finite.
        with poisoned() if precision == "fp32" else poisoned(names=()):
            executor = JIT(threads=2, unit=UNITS[0], checkpoint_segments=segments).executor(
                DEEP, None, Recipe(precision=precision)
            )
            results.add(steps(executor))
            executor.close()
    assert len(results) == 1
    assert np.isfinite(next(iter(results))[:3]).all()


def test_segments_are_a_count():
    with pytest.raises(ConfigError, match="checkpoint_segments"):
        JIT(checkpoint_segments=-1)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [0, 2])
def test_memory_is_what_the_allocator_gave(segments):
    model = Model((1, 9, 7), (Conv2d(1, 6, 3, padding=1), ReLU(), Conv2d(6, 6, 3, padding=1), Flatten(), Dense(378, 5)))
    x, y = np.zeros((400, 1, 9, 7), np.uint8), np.zeros(400, np.int64)

    def trained():
        executor = JIT(threads=2, unit=UNITS[0], checkpoint_segments=segments).executor(model, None, Recipe())
        executor.train_step(x, y, CrossEntropy(), 1 / 400, Adam())
        executor.close()
        return executor

    trained()  # compiles what is not in the cache
    tracemalloc.start()
    executor = trained()
    arrays = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
    taken = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([arrays]).traces)
    tracemalloc.stop()
    told = executor.memory()
    assert 0 <= taken - sum(told.values()) < 0.02 * taken
    assert {"weights", "gradients", "optimizer state", "activations", "packed weights"} < told.keys()
    assert told["weights"] >= executor.params.flat.nbytes


# --- what is shared --------------------------------------------------------------------------------------------------


@st.composite
def orders(draw: st.DrawFn) -> list[dict[Buffer, tuple[int, int]]]:
    """When some buffers live, in the orders in which a few phases may run."""
    buffers = [Buffer(f"slope {number}", draw(st.integers(1, 100)), np.float32) for number in range(6)]
    phases = st.lists(st.sets(st.sampled_from(buffers), min_size=1, max_size=3), min_size=1, max_size=8)
    return [lifetimes(draw(phases)) for _ in range(2)]


@every_precision
@pytest.mark.parametrize("segments", [0, 3])
def test_memory_that_is_shared_leaves_the_bits(precision, segments, monkeypatch):
    def apart(orders):
        for buffer in {one for order in orders for one in order}:
            buffer.allocate()
        return np.zeros(0, np.uint8)

    results = set()
    for share_of in (plan.share, apart):
        monkeypatch.setattr(plan, "share", share_of)
        executor = JIT(threads=2, unit=UNITS[0], checkpoint_segments=segments).executor(
            DEEP, None, Recipe(precision=precision)
        )
        results.add(steps(executor))
        executor.close()
    assert len(results) == 1


@given(orders=orders())
def test_what_lives_at_the_same_time_lies_apart(orders):
    arena = share(orders)
    buffers = {buffer for order in orders for buffer in order}
    for one in buffers:
        assert np.shares_memory(one.array, arena)
        assert one.array.ctypes.data % 64 == 0
        for other in buffers - {one}:
            both = [order for order in orders if one in order and other in order]
            together = any(a[one][0] <= a[other][1] and a[other][0] <= a[one][1] for a in both)
            assert not (together and np.shares_memory(one.array, other.array))


def test_what_never_lives_together_shares_memory():
    first, second = (Buffer(f"slope {number}", 100, np.float32) for number in range(2))
    arena = share([lifetimes([{first}, {first}, {second}])])
    assert arena.nbytes == first.nbytes == second.nbytes
