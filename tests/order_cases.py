"""Whole steps keep matrices in the order of pixels: they are the same steps, and nobody sees it.

Functions for the reason that ``engine_checks`` gives: the mutants of the jit engine are judged by them too.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_cases import ON_TILES
from jit_cases import DEFERRED, FULL, batch_for
from stretch_cases import state

from convolt.engine import Executor, StepInput
from convolt.engines import JIT
from convolt.engines.jit.kernels.loss_specs import SAFE
from convolt.engines.jit.runtime import Program, Team
from convolt.layers import AvgPool2d, BatchNorm2d, Conv2d, Dense, Flatten, LeakyReLU, ReLU, Residual
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import SGD, Adam, Optimizer
from convolt.params import aligned_zeros
from convolt.recipe import Recipe

LOSS = CrossEntropy(0.1)
ENGINE = JIT(threads=2, unit=ON_TILES)
PIXELS = "reads pixels as they lie"  # as ``explain`` has it

#: Pooled or not, odd sizes, a sum of branches or another pool before Flatten, nothing behind the matrix.
MODELS = {
    "pooled": DEFERRED,
    "not pooled": Model((2, 10, 14), (Conv2d(2, 6, 3, padding=1), LeakyReLU(0.2), Flatten(), Dense(840, 80))),
    "odd": Model((1, 11, 9), (Conv2d(1, 7, 3, padding=1), ReLU(), Flatten(), Dense(693, 101), ReLU(), Dense(101, 5))),
    "a sum": Model(
        (3, 9, 10),
        (
            *(Conv2d(3, 8, 3, padding=1), BatchNorm2d(8), ReLU()),
            *(Residual((Conv2d(8, 8, 3, padding=1), BatchNorm2d(8))), ReLU(), Flatten(), Dense(720, 96)),
        ),
    ),
    "averages": Model((1, 20, 18), (Conv2d(1, 8, 3, padding=1), ReLU(), AvgPool2d(2), Flatten(), Dense(720, 92))),
    "one channel": Model((2, 30, 24), (Conv2d(2, 1, 3, padding=1), ReLU(), Flatten(), Dense(720, 92))),
    "one pixel": Model((2, 4, 4), (Conv2d(2, 256, 4), ReLU(), Flatten(), Dense(256, 256))),
}
#: In bf16, images of odd sizes, of sums and of averages stay float32, so that they are turned and rounded at once; all
#: do where convolutions take no tiles.
IN_BF16 = ("pooled", "not pooled")


def works(model: Model, optimizer: Optimizer, scale: float = 1.0) -> list[StepInput]:
    """A few steps, the last one of fewer samples; scale: of the loss."""
    found = []
    for number, size in enumerate((FULL, FULL, FULL, FULL - 11)):
        x, y = batch_for(model, size, number)
        found.append(StepInput(x, y % model.output_shape[0], scale / size, optimizer))
    return found


def in_parts(executor: Executor, work: StepInput) -> float:
    """A step whose gradient is made before the weights move: no matrix is in another order."""
    result = executor.loss_and_grads(work.x, work.y, LOSS, work.scale, fresh=True)
    executor.update(work.optimizer)
    return result.loss


def at_once(executor: Executor, work: StepInput) -> float:
    """A whole step."""
    return executor.train_step(work.x, work.y, LOSS, work.scale, work.optimizer).loss


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative, in Euclidean norm."""
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))


def explained(model: Model, precision: str, engine: JIT = ENGINE) -> bool:
    """Whether it says that pixels are read as they lie."""
    return any(PIXELS in stage.reason for stage in engine.explain(model, precision, FULL).stages)


def whole_steps_are_steps(
    model: Model, precision: str, engine: JIT = ENGINE, optimizer: Optimizer | None = None, scale: float = 1.0
) -> None:
    """Weights, state and losses are those of steps in parts, but for the order of sums; some are in parts in between.

    Plain SGD and small steps: Adam divides by a gradient's size and makes much of rounding, as do large steps in bf16.
    """
    chosen = SGD(lr=0.005, momentum=0.9) if optimizer is None else optimizer
    wanted, found = (engine.executor(model, None, Recipe(precision=precision)) for _ in range(2))
    first = wanted.params.flat.copy()
    steps = works(model, chosen, scale)
    for number, work in enumerate([*steps, *steps]):
        loss = in_parts(wanted, work)
        got = in_parts(found, work) if number == 5 else at_once(found, work)
        assert abs(got - loss) <= 2e-3 * abs(loss), f"step {number}"
    near = 2e-4 if precision == "fp32" else 2e-2
    assert distance(found.params.flat - first, wanted.params.flat - first) < near
    for name, array in wanted.optimizer_state().items():
        assert distance(found.optimizer_state()[name], array) < near, name
    for executor in (wanted, found):
        executor.close()


def gradients_that_are_looked_at_first(precision: str) -> None:
    """They are made by themselves, in the order of pixels, and then moved with."""
    whole_steps_are_steps(DEFERRED, precision, optimizer=SGD(lr=1e-2 / SAFE, momentum=0.9), scale=10 * SAFE)


def look_at_weights(executor: Executor) -> None:
    """As an average of weights does in every step."""
    executor.params.flat.copy()


def look_at_state(executor: Executor) -> None:
    """As a checkpoint does."""
    executor.optimizer_state()


def predict(executor: Executor) -> None:
    """A few images, before somebody else has asked for the weights and behind it."""
    x, _ = batch_for(executor.model, 3)
    logits = executor.predict(x)
    executor.params.flat[...] = executor.params.flat.copy()
    executor.weights_changed()
    np.testing.assert_array_equal(executor.predict(x), logits)


def look_at_a_gradient(executor: Executor) -> None:
    """Of another batch; nothing moves."""
    x, y = batch_for(executor.model, FULL, 9)
    executor.loss_and_grads(x, y % executor.model.output_shape[0], LOSS, 1 / FULL, fresh=True)


def load_what_there_is(executor: Executor) -> None:
    """A checkpoint of now."""
    kept = {name: array.copy() for name, array in executor.optimizer_state().items()}
    executor.params.flat[...] = executor.params.flat.copy()
    executor.weights_changed()
    executor.load_optimizer_state(kept)


def load_the_state_alone(executor: Executor) -> None:
    """While matrices are in the order of pixels."""
    kept = {name: array.copy() for name, array in executor.optimizer_state().items()}
    x, y = batch_for(executor.model, FULL, 9)
    before = executor.params.flat.copy()
    executor.train_step(x, y % executor.model.output_shape[0], LOSS, 1 / FULL, SGD(lr=0.0, momentum=0.9))
    executor.load_optimizer_state(kept)
    np.testing.assert_array_equal(executor.params.flat, before)


def move(executor: Executor) -> None:
    """Weights and gradient to other memory, where all is in order; plans are made anew, of the same size as before."""
    weights, gradient = (aligned_zeros(executor.grads.flat.size, np.float32) for _ in range(2))
    assert executor.move(weights, gradient)
    before = weights.copy()
    np.testing.assert_array_equal(executor.params.flat, before)
    executor.prepare(batch_for(executor.model, FULL)[0])


LOOKS = (
    look_at_weights,
    look_at_state,
    predict,
    look_at_a_gradient,
    load_what_there_is,
    load_the_state_alone,
    move,
)


def looking_changes_nothing(
    look: Callable[[Executor], None], precision: str, model: Model = DEFERRED, engine: JIT = ENGINE
) -> None:
    """The same bits, whatever is done between steps that leaves the weights as they are."""
    undisturbed, disturbed = (engine.executor(model, None, Recipe(precision=precision)) for _ in range(2))
    for work in works(model, SGD(lr=0.05, momentum=0.9)):
        loss = at_once(undisturbed, work)
        look(disturbed)
        assert at_once(disturbed, work) == loss
        look(disturbed)
    assert state(disturbed) == state(undisturbed)
    for executor in (undisturbed, disturbed):
        executor.close()


def weights_are_in_order_behind_the_end(precision: str) -> None:
    """An executor that is closed gives them still, and the optimizer's arrays."""
    closed, other = (ENGINE.executor(DEFERRED, None, Recipe(precision=precision)) for _ in range(2))
    for work in works(DEFERRED, Adam(lr=0.01)):
        at_once(closed, work)
        at_once(other, work)
    closed.close()
    np.testing.assert_array_equal(closed.params.flat, other.params.flat)
    kept = other.optimizer_state()
    for name, array in closed.optimizer_state().items():
        np.testing.assert_array_equal(array, kept[name])
    other.close()


def whoever_interrupts_finds_them_in_order(precision: str) -> None:
    """A signal's handler that raises before a program runs, or behind it, wherever weights are asked for or stepped."""
    optimizer = SGD(lr=0.05, momentum=0.9)
    run = Team.run
    for behind in (False, True):
        executor, other = (ENGINE.executor(DEFERRED, None, Recipe(precision=precision)) for _ in range(2))

        def interrupted(team: Team, program: Program, meanwhile: Any = None, behind: bool = behind) -> None:
            if behind:
                run(team, program, meanwhile)
            raise KeyboardInterrupt

        for work in works(DEFERRED, optimizer):
            for look in (look_at_weights, look_at_state):
                with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                    patch.setattr(Team, "run", interrupted)
                    look(executor)
                look_at_weights(executor)
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                patch.setattr(Team, "run", interrupted)
                at_once(executor, work)  # comes no further than to bring the matrices
            assert at_once(executor, work) == at_once(other, work)
        assert state(executor) == state(other)
        for each in (executor, other):
            each.close()


def matrices_are_brought_in_order(precision: str) -> None:
    """All of it, on two threads."""
    for model in MODELS.values():
        whole_steps_are_steps(model, precision)
    gradients_that_are_looked_at_first(precision)
    for look in LOOKS:
        looking_changes_nothing(look, precision)
    whoever_interrupts_finds_them_in_order(precision)
    weights_are_in_order_behind_the_end(precision)


def threads_leave_the_bits(precision: str) -> None:
    """Whatever their number."""
    states = []
    for threads in (1, 2, 4):
        executor = replace(ENGINE, threads=threads).executor(DEFERRED, None, Recipe(precision=precision))
        for work in works(DEFERRED, Adam(lr=0.01)):
            at_once(executor, work)
        states.append(state(executor))
        executor.close()
    assert states[0] == states[1] == states[2]
