"""The plan of the jit engine: the order of its tasks, the memory they share, activations that are made twice."""

import tracemalloc

import numpy as np
import pytest
from engine_cases import AMX
from hypothesis import given
from hypothesis import strategies as st
from jit_cases import poisoned

from convolt.engines import JIT
from convolt.engines.jit.buffers import Address, Buffer, lifetimes, share
from convolt.engines.jit.order import arranged, in_turn, restricted
from convolt.engines.jit.tasks import Task
from convolt.errors import ConfigError
from convolt.layers import BatchNorm2d, Conv2d, Dense, Dropout, Flatten, MaxPool2d, ReLU, Residual
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import Adam
from convolt.recipe import Recipe
from convolt.rng import SampleRng

every_precision = pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not AMX, reason="no AMX tiles"))]
)


def block(channels: int) -> Residual:
    body = (Conv2d(channels, channels, 3, padding=1, bias=False), BatchNorm2d(channels), ReLU(), Dropout(0.2))
    return Residual(body)


DEEP = Model(
    (3, 9, 7),
    (
        *(Conv2d(3, 6, 3, padding=1), ReLU(), block(6), block(6), Conv2d(6, 6, 3, padding=1), ReLU(), MaxPool2d(2)),
        *(block(6), Conv2d(6, 6, 1), block(6), Flatten(), Dense(72, 32), ReLU(), Dense(32, 5)),
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
    left = executor.params.flat.tobytes(), executor.params.buffers_flat.tobytes(), executor.grads.flat.tobytes()
    gradients = []
    for on_ready in (None, lambda part: None):
        executor.zero_grads()
        executor.loss_and_grads(x, y, CrossEntropy(), 1 / size, rng, on_ready)
        gradients.append(executor.grads.flat.tobytes())
    return (*losses, *left, *gradients)


# --- activations that are made twice ---------------------------------------------------------------------------------


@every_precision
def test_activations_that_are_made_twice_leave_the_bits_and_need_less_memory(precision):
    results, memory = set(), []
    for segments in (0, 2, 3, 5, 50):
        executor = JIT(threads=2, checkpoint_segments=segments).executor(DEEP, None, Recipe(precision=precision))
        results.add(steps(executor))
        memory.append(sum(executor.memory().values()))
        executor.close()
    assert len(results) == 1
    assert max(memory[1:]) < memory[0]


def test_no_memory_of_another_is_read_where_activations_are_made_twice():
    results = set()
    for segments in (0, 3):
        with poisoned():
            executor = JIT(threads=2, checkpoint_segments=segments).executor(DEEP, None, Recipe())
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
        executor = JIT(threads=2, checkpoint_segments=segments).executor(model, None, Recipe())
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


# --- the order -------------------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> list[Task]:
    """Tasks that name some of a few buffers."""
    buffers = [Buffer(f"slope {number}", draw(st.integers(1, 100)), np.float32) for number in range(6)]
    tasks = []
    for number in range(draw(st.integers(1, 12))):
        named = draw(st.lists(st.sampled_from(buffers), min_size=1, max_size=3, unique=True))
        tasks.append(Task(f"{number}", "", None, (0, *map(Address, named)), chunks=4, by_image=draw(st.booleans())))
    return tasks


@given(tasks=plans())
def test_tasks_that_share_memory_keep_their_order_and_none_is_lost(tasks):
    found = arranged(tasks)
    order = [task for step in found for task in step.tasks]
    assert sorted(order, key=tasks.index) == tasks
    for number, task in enumerate(tasks):
        for later in tasks[number + 1 :]:
            if task.names & later.names:
                assert order.index(task) < order.index(later)
    assert all(len(step.tasks) == 1 or all(task.by_image for task in step.tasks) for step in found)
    assert len(found) <= len(in_turn(tasks))
    some = tasks[::2]
    assert [task for step in restricted(found, some) for task in step.tasks] == [task for task in order if task in some]


@given(tasks=plans())
def test_what_lives_at_the_same_time_lies_apart(tasks):
    orders = [lifetimes(step.buffers for step in each) for each in (arranged(tasks), in_turn(tasks))]
    arena = share(orders)
    for one in orders[0]:
        assert np.shares_memory(one.array, arena)
        assert one.array.ctypes.data % 64 == 0
        for other in orders[0]:
            together = any(a[one][0] <= a[other][1] and a[other][0] <= a[one][1] for a in orders)
            assert one is other or not (together and np.shares_memory(one.array, other.array))


def test_what_never_lives_together_shares_memory():
    first, second = (Buffer(f"slope {number}", 100, np.float32) for number in range(2))
    arena = share([{first: (0, 1), second: (2, 3)}])
    assert arena.nbytes == first.nbytes == second.nbytes


def test_images_pass_through_all_convolutions_in_one_phase():
    model = Model((3, 9, 7), (Conv2d(3, 6, 3), ReLU(), Conv2d(6, 6, 3), ReLU(), Flatten(), Dense(90, 5)))
    stages = []
    executor = JIT(threads=1).executor(model, None, Recipe())
    x = np.zeros((6, *model.input_shape), np.uint8)
    executor.train_step(x, np.zeros(6, np.int64), CrossEntropy(), 1.0, Adam())
    programs = next(iter(executor._plans.values()))
    for program in (programs.forward, programs.backward):
        stages += [phase.name for phase in program.phases if phase.name.count("Conv2d") > 1]
    executor.close()
    assert stages == [
        "input, 0-1 Conv2d+ReLU, 2-3 Conv2d+ReLU, 4 Flatten",
        "4 Flatten backward, 2-3 Conv2d+ReLU backward, 0-1 Conv2d+ReLU backward",
    ]
