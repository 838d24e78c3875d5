"""Several steps of the jit engine in one call: what they give, what ends them, and where they are not one call."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
from jit_cases import DEFERRED, WIDEST
from stretch_cases import (
    PARTLY,
    SEGMENTED,
    SMALL,
    a_step_again_and_again,
    assert_same,
    calls_and_steps_mix,
    counted,
    inputs,
    one_by_one,
    one_call_gives_the_bits_of_many,
    refused_steps_end_a_call,
    results_are_kept,
    state,
)

from convolt.engine import Executor
from convolt.errors import ConfigError, DataError
from convolt.layers import BatchNorm2d, Dense, Dropout, Flatten
from convolt.losses import MSE, CrossEntropy
from convolt.model import Model
from convolt.optimizers import SGD, Adam, AdamW, RMSprop
from convolt.recipe import Recipe
from convolt.rng import SampleRng

precisions = pytest.mark.parametrize("precision", ["fp32", "bf16"])
LOSS = CrossEntropy()


def executor_of(model: Model = SMALL) -> Executor:
    return WIDEST.executor(model, None, Recipe())


def assert_alike(executor: Executor, other: Executor) -> None:
    """Weights, state and predictions, to the bit, at the end."""
    assert state(executor) == state(other)
    for one in (executor, other):
        one.close()


@precisions
@pytest.mark.parametrize(
    "optimizer",
    [
        *(Adam(lr=0.01), SGD(lr=0.1, momentum=0.9, dampening=0.5)),
        *(pytest.param(one, marks=pytest.mark.slow) for one in (AdamW(lr=0.01), RMSprop(lr=0.01, momentum=0.5))),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
@pytest.mark.parametrize("model", [SMALL, DEFERRED], ids=["small", "deferred"])
def test_one_call_gives_the_bits_of_many(model, optimizer, precision):
    one_call_gives_the_bits_of_many(model, optimizer, precision)


@pytest.mark.parametrize("threads", [1, 4])
def test_on_any_number_of_threads(threads):
    one_call_gives_the_bits_of_many(DEFERRED, Adam(lr=0.01), "bf16", replace(WIDEST, threads=threads))


@precisions
def test_where_only_some_matrices_are_rounded_as_they_are_moved(precision):
    """Copies of the others are made again in every step."""
    one_call_gives_the_bits_of_many(PARTLY, Adam(lr=0.01), precision, SEGMENTED)


@precisions
def test_a_step_that_is_refused_ends_the_call(precision):
    refused_steps_end_a_call(precision)


def test_a_step_that_is_the_same_object_again_is_not_the_first():
    a_step_again_and_again()


def test_no_steps_are_no_results():
    executor = executor_of()
    assert executor.train_steps([], LOSS) == []
    executor.close()


def test_a_first_step_that_is_refused_leaves_no_state_where_another_optimizer_follows():
    executor = executor_of()
    first, second = inputs(SMALL, Adam(), {0: np.nan})[:2]
    (result,) = executor.train_steps([first, second._replace(optimizer=SGD(momentum=0.9))], LOSS)
    assert np.isnan(result.loss)
    assert set(executor.optimizer_state()) == {"step"}
    executor.close()


def test_images_are_let_go():
    executor = executor_of()
    for count in (2, 3, 4):
        steps = inputs(SMALL, Adam())[:count]
        images = [weakref.ref(step.x) for step in steps]
        executor.train_steps(steps, LOSS)
        del steps
        assert [each() for each in images] == [None] * count
    executor.close()


def test_what_raises_before_a_program_runs_leaves_old_copies_old():
    """A call that fails on its arguments has made no copy of the weights in bf16, so the next one makes them."""
    executor, other = (WIDEST.executor(DEFERRED, None, Recipe(precision="bf16")) for _ in range(2))
    steps = inputs(DEFERRED, Adam(lr=0.01))
    for one in (executor, other):
        one.train_steps(steps, LOSS)
        one.params.flat[...] *= 0.5
        one.weights_changed()
    with pytest.raises(ValueError, match="could not convert"):
        executor.train_steps([steps[0], steps[1]._replace(scale="much")], LOSS)
    assert_same(executor.train_steps(steps, LOSS), one_by_one(other, steps, LOSS))
    assert_alike(executor, other)


def test_a_step_that_is_refused_as_the_first_of_all_leaves_no_state():
    executor = executor_of()
    (result,) = executor.train_steps(inputs(SMALL, Adam(), {0: np.nan}), LOSS)
    assert np.isnan(result.loss)
    assert {name: int(array.sum()) for name, array in executor.optimizer_state().items()} == {"step": 0}
    executor.close()


def test_what_is_no_label_is_told_and_the_steps_before_it_stand():
    executor, other = executor_of(), executor_of()
    steps = inputs(SMALL, Adam())
    steps[3].y[7] = 10
    with pytest.raises(DataError, match="labels must be"):
        executor.train_steps(steps, LOSS)
    one_by_one(other, steps[:3], LOSS)
    assert_alike(executor, other)


def test_results_are_nobody_elses():
    results_are_kept()


def test_something_else_is_done_meanwhile_once():
    executor, done = executor_of(), []
    executor.train_steps(inputs(SMALL, Adam()), LOSS, lambda: done.append(1))
    executor.train_steps(inputs(SMALL, Adam()), MSE(), lambda: done.append(2))
    assert done in ([1], [1, 2])
    executor.close()


@precisions
def test_single_steps_and_calls_of_any_length_mix(precision):
    calls_and_steps_mix(precision)


def test_state_from_a_checkpoint_is_what_the_next_call_goes_on_from():
    executor, other = executor_of(), executor_of()
    steps = inputs(SMALL, Adam(lr=0.01))
    executor.train_steps(steps, LOSS)
    weights, saved = executor.params.flat.copy(), executor.optimizer_state()
    saved = {name: array.copy() for name, array in saved.items()}
    executor.train_steps(steps, LOSS)
    for one in (executor, other):
        one.params.flat[...] = weights
        one.weights_changed()
        one.load_optimizer_state(saved)
        one.train_steps(steps, LOSS)
    assert_alike(executor, other)


@pytest.mark.parametrize(
    ("what", "programs"), [("loss", 10), ("optimizers", 3), ("targets", 4), ("sizes", 3), ("bytes", 3)]
)
def test_what_fits_into_no_program_of_others_is_done_apart(what, programs, monkeypatch):
    """The two before it are one call, and so are the two behind it."""
    executor, other = executor_of(), executor_of()
    steps, loss = inputs(SMALL, SGD(lr=0.1)), LOSS
    if what == "loss":
        loss = MSE()
    elif what == "optimizers":
        steps[2] = steps[2]._replace(optimizer=SGD(lr=0.1, decoupled_weight_decay=True))
    elif what == "targets":
        steps[2] = steps[2]._replace(y=np.eye(10, dtype=np.float32)[steps[2].y])
    elif what == "sizes":
        steps[2] = steps[2]._replace(x=steps[2].x[:3], y=steps[2].y[:3])
    else:
        steps[2] = steps[2]._replace(x=(steps[2].x / 255).astype(np.float32))
    calls = counted(monkeypatch)
    got = executor.train_steps(steps, loss)
    assert len(calls) >= programs
    assert len(calls) == programs or what in ("loss", "targets")
    assert_same(got, one_by_one(other, steps, loss))
    assert_alike(executor, other)


@pytest.mark.parametrize("layer", [BatchNorm2d(1), Dropout(0.5)], ids=lambda layer: type(layer).__name__)
def test_networks_that_the_host_looks_after_are_done_step_by_step(layer):
    model = Model((1, 6, 6), (layer, Flatten(), Dense(36, 10)))
    executor, other = executor_of(model), executor_of(model)
    assert not executor.fuses_steps
    steps = [
        step._replace(rng=SampleRng(0, 0, np.arange(100 * number, 100 * number + len(step.x))))
        for number, step in enumerate(inputs(model, Adam()))
    ]
    assert_same(executor.train_steps(steps, LOSS), one_by_one(other, steps, LOSS))
    assert_alike(executor, other)


def test_images_of_another_shape_are_refused_before_anything_moves():
    executor = executor_of()
    steps, before = inputs(SMALL, Adam()), executor.params.flat.copy()
    steps[4] = steps[4]._replace(x=np.zeros((3, 1, 5, 6), np.uint8), y=steps[4].y[:3])
    with pytest.raises(ConfigError, match="images must have shape"):
        executor.train_steps(steps, LOSS)
    np.testing.assert_array_equal(executor.params.flat, before)
    executor.close()
