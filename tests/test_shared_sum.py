"""Sums through shared memory, with threads for ranks: right, the same everywhere, and nobody is overtaken.

And executors that move into it.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from engine_cases import ENGINES

from convolt.comms import Home, Serial
from convolt.comms.shared import SharedSum, row_bytes
from convolt.layers import Conv2d, Dense, Flatten, MaxPool2d, ReLU
from convolt.loader import Batch
from convolt.losses import MSE, CrossEntropy
from convolt.model import Model
from convolt.optimizers import SGD, Adam
from convolt.parallel import Parallel
from convolt.recipe import Recipe
from convolt.rng import SampleRng
from convolt.signals import StopRequest
from convolt.step import Stepper

STEPS, LIMIT = 60, 60
NET = Model((2, 6, 6), (Conv2d(2, 3, 3, padding=1), ReLU(), MaxPool2d(2), Flatten(), Dense(27, 4)))


def run(ranks: int, size: int, scattered: bool, at_home: bool, steps: int = STEPS) -> list[list[np.ndarray]]:
    """Weights of every rank after every step ``w += 1 + sum of gradients``, where each moves its own part.

    A rank that is ahead writes over its gradient at once, as its next backward pass would.
    """
    alike = np.zeros(size, np.float32)
    rows = [np.zeros(row_bytes(alike), np.uint8) for _ in range(ranks)]
    memory = tuple(tuple(np.zeros(size, np.float32) for _ in range(ranks)) for _ in range(2))
    barrier, numbers = threading.Barrier(ranks, timeout=LIMIT), threading.Barrier(ranks, timeout=LIMIT)

    def rank(me: int) -> list[np.ndarray]:
        home = Home(*memory, me) if at_home else None
        weights, gradient = (home.weights, home.gradient) if home else (np.zeros(size, np.float32) for _ in range(2))
        total = SharedSum(gradient, rows, me, scattered, lambda: barrier.wait() and None, home)
        state, seen = np.zeros(size, np.float64), []
        for step in range(steps):
            gradient[...] = (me + 1) * (step + 1)
            total.add(slice(0, size // 3))
            total.add(slice(size // 3, size))
            total.finish()
            numbers.wait()  # the norm, which all ranks add up
            weights[total.own] += 1 + gradient[total.own]
            state[total.own] += 1
            if scattered:
                total.share(weights)
            seen.append(weights.copy())
        total.share(state)
        if scattered:
            assert (state == steps).all()
        return seen

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(rank, range(ranks)))


@pytest.mark.parametrize("at_home", [True, False])
@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize(("ranks", "size"), [(1, 5), (2, 200_001), (3, 1000), (4, 3)])
def test_every_rank_has_the_sum_of_every_step(ranks, size, scattered, at_home):
    found = run(ranks, size, scattered, at_home)
    want = 0.0
    for step in range(STEPS):
        want += 1 + ranks * (ranks + 1) // 2 * (step + 1)
        for rank in range(ranks):
            np.testing.assert_array_equal(found[rank][step], np.float32(want), err_msg=f"rank {rank}, step {step}")


def test_a_gradient_at_home_is_copied_nowhere():
    home = Home((np.ones(6, np.float32), np.ones(6, np.float32)), (np.zeros(6, np.float32), np.zeros(6, np.float32)), 0)
    rows = [np.zeros(row_bytes(home.gradient), np.uint8) for _ in range(2)]
    total = SharedSum(home.gradient, rows, 0, True, lambda: None, home)
    total.add(slice(0, 6))
    total.finish()
    np.testing.assert_array_equal(home.gradient, [2, 2, 2, 1, 1, 1])
    home.all_weights[1][...] = 7
    total.share(home.weights)
    np.testing.assert_array_equal(home.weights, [0, 0, 0, 7, 7, 7])
    assert not any(row.any() for row in rows)


def test_weights_at_home_are_not_written_before_all_have_read_them():
    """A rank that moves its weights at once after sharing them: the others must have the values from before."""
    order: list[str] = []
    home = Home((np.ones(4), np.ones(4)), (np.zeros(4), np.zeros(4)), 0)
    rows = [np.zeros(row_bytes(home.gradient), np.uint8) for _ in range(2)]

    class Watched(np.ndarray):
        def __setitem__(self, key, value):
            order.append("read")
            super().__setitem__(key, value)

    watched = home.weights.view(Watched)
    watched_home = Home(home.gradients, (watched, home.all_weights[1]), 0)
    total = SharedSum(home.gradient, rows, 0, True, lambda: order.append("meet"), watched_home)
    total.share(watched)
    assert order == ["meet", "read", "meet"]


@pytest.mark.parametrize("entry", ENGINES, ids=lambda entry: entry.name)
def test_weights_and_gradient_move_in_the_middle_of_a_training(entry):
    """To the bit; an engine that keeps them elsewhere says so and is as it was."""
    recipe, generator = Recipe(precision=entry.finest), np.random.default_rng(0)
    stays, moves = (entry.make(1).executor(NET, None, recipe) for _ in range(2))
    x, y = generator.normal(size=(5, *NET.input_shape)), np.arange(5) % 4
    weights, gradient = (np.full_like(array, np.nan) for array in (moves.params.flat, moves.grads.flat))
    moved = False
    for step in range(4):
        for executor in (stays, moves):
            executor.train_step(x, y, CrossEntropy(), 1 / 5, Adam())
        np.testing.assert_array_equal(moves.predict(x), stays.predict(x))
        if step == 1:
            moved = moves.move(weights, gradient)
    assert moved != entry.name.startswith("torch")
    for executor in (stays, moves):
        executor.loss_and_grads(x, y, CrossEntropy(), 1.0, fresh=True)
    np.testing.assert_array_equal(weights if moved else moves.params.flat, stays.params.flat)
    np.testing.assert_array_equal(gradient if moved else moves.grads.flat, stays.grads.flat)


class Rank(Serial):
    """One of two threads that add through shared memory, at home."""

    size = node_size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, brought: dict) -> None:
        self.rank = self.node_rank = rank
        self._barrier, self._brought = barrier, brought

    def _gather(self, own):
        self._brought[self.rank] = own
        self._barrier.wait()
        found = tuple(self._brought[rank] for rank in range(2))
        self._barrier.wait()
        return found

    def allreduce(self, array) -> None:
        array[...] = sum(self._gather(array.copy()))

    def home(self, gradient, weights) -> Home:
        gradients, all_weights = (self._gather(np.zeros_like(array)) for array in (gradient, weights))
        return Home(gradients, all_weights, self.rank)

    def summation(self, array, scattered=False, wire="fp32", home=None) -> SharedSum:
        rows = list(self._gather(np.zeros(row_bytes(array), np.uint8)))
        return SharedSum(array, rows, self.rank, scattered, lambda: self._barrier.wait() and None, home)


@pytest.mark.parametrize(
    "model", [NET, Model((1, 1, 1), (Flatten(), Dense(1, 1, bias=False)))], ids=["net", "a number"]
)
def test_two_ranks_at_home_step_as_one_process(model):
    """Also where there is less to share out than ranks: a rank may own nothing, and another one everything."""
    generator, classes = np.random.default_rng(0), model.output_shape[0]
    x, y = generator.normal(size=(5, *model.input_shape)), np.arange(5) % classes
    samples, barrier, brought = SampleRng(0, 0, np.arange(5)), threading.Barrier(2, timeout=LIMIT), {}

    def steps(comm, part: slice) -> np.ndarray:
        recipe = Recipe(precision="fp64", loss=MSE())
        executor = ENGINES[1].make(1).executor(model, None, recipe)
        stepper = Stepper(executor, recipe, comm, Parallel(shard_optimizer=True), StopRequest())
        for _ in range(3):
            stepper.step(Batch(x[part], y[part], y[part], samples[part], 5), SGD(lr=0.1, momentum=0.9))
        return executor.params.flat.copy()

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(steps, [Rank(rank, barrier, brought) for rank in range(2)], [slice(0, 2), slice(2, 5)]))
    want = steps(Serial(), slice(0, 5))
    for weights in found:
        np.testing.assert_allclose(weights, want, rtol=1e-12)
