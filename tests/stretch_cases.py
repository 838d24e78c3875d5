"""Several steps in one call are the same steps one by one: to the bit, also where one of them may not move the weights.

Functions for the reason that ``engine_checks`` gives: the mutants of the jit engine are judged by them too.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from jit_cases import DEFERRED, FULL, WIDEST, batch_for

from convolt.engine import Executor, StepInput, StepResult
from convolt.engines import JIT
from convolt.engines.jit.kernels.loss_specs import SAFE
from convolt.engines.jit.runtime import Team
from convolt.layers import Conv2d, Dense, Flatten, ReLU
from convolt.losses import CrossEntropy, Loss
from convolt.model import Model
from convolt.optimizers import SGD, Adam, Optimizer
from convolt.recipe import Recipe

#: Its images are few enough to be copied, and no gradient is left to the optimizer's pass.
SMALL = Model((1, 6, 6), (Conv2d(1, 4, 3, padding=1), ReLU(), Flatten(), Dense(144, 10)))
#: Cut into segments of which only the last one's matrices are rounded to bf16 where they are moved.
PARTLY = Model((1, 4, 8), (Flatten(), Dense(32, 512), ReLU(), Dense(512, 64), ReLU(), Dense(64, 256)))
SEGMENTED = replace(WIDEST, checkpoint_segments=2)
SIZES = (FULL, FULL, 29, FULL, FULL)  # of batches
SMOOTH = CrossEntropy(0.1)


def inputs(model: Model, optimizer: Optimizer, scales: dict[int, float] | None = None) -> list[StepInput]:
    """Five steps, each with a learning rate of its own, one of them of fewer samples; scales: of some of the losses."""
    found = []
    for number, size in enumerate(SIZES):
        x, y = batch_for(model, size, number)
        scale = (scales or {}).get(number, 1.0) / size
        found.append(StepInput(x, y % model.output_shape[0], scale, replace(optimizer, lr=optimizer.lr / (1 + number))))
    return found


def state(executor: Executor) -> dict[str, bytes]:
    """All that steps change, and what follows from it."""
    found = {name: np.asarray(array).tobytes() for name, array in executor.optimizer_state().items()}
    found["weights"] = executor.params.flat.tobytes()
    found["logits"] = executor.predict(batch_for(executor.model, 5)[0]).tobytes()
    return found


def one_by_one(executor: Executor, steps: Sequence[StepInput], loss: Loss) -> list[StepResult]:
    """Up to the first that is not finite."""
    return Executor.train_steps(executor, steps, loss)


def assert_same(got: Sequence[StepResult], want: Sequence[StepResult]) -> None:
    """Losses, right answers and logits, to the bit."""
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one.loss, other.loss)
        assert one.right == other.right
        np.testing.assert_array_equal(one.logits, other.logits)


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """The phases of every program that is run from now on, but those that bring matrices into another order."""
    calls: list[int] = []
    run = Team.run

    def told(team: Team, program: Any, meanwhile: Any = None) -> None:
        if not all(phase.name.endswith(" order") for phase in program.phases):
            calls.append(len(program.phases))
        run(team, program, meanwhile)

    patch.setattr(Team, "run", told)
    return calls


def one_call_gives_the_bits_of_many(
    model: Model,
    optimizer: Optimizer,
    precision: str,
    engine: JIT = WIDEST,
    scales: dict[int, float] | None = None,
) -> None:
    """Three times five steps, predictions behind them; scales: of losses in the second five, which may be refused."""
    recipe = Recipe(precision=precision)
    together, apart = (engine.executor(model, None, recipe) for _ in range(2))
    assert together.fuses_steps
    sound, doubtful = inputs(model, optimizer), inputs(model, optimizer, scales)
    for steps in (sound, doubtful, sound):
        with pytest.MonkeyPatch.context() as patch:
            calls = counted(patch)
            got = together.train_steps(steps, SMOOTH)
        want = one_by_one(apart, steps, SMOOTH)
        if scales is None or steps is sound:
            assert len(calls) == 1, "it was not one call"
            assert len(got) == len(SIZES)
        assert_same(got, want)
        assert state(together) == state(apart)
    together.close()
    apart.close()


def results_are_kept(model: Model = SMALL) -> None:
    """The next call does not write to what this one gave."""
    executor = WIDEST.executor(model, None, Recipe())
    first = executor.train_steps(inputs(model, Adam()), SMOOTH)
    before = [result.logits.copy() for result in first]
    executor.train_steps(inputs(model, Adam())[::-1], SMOOTH)
    for result, logits in zip(first, before, strict=True):
        np.testing.assert_array_equal(result.logits, logits)
    executor.close()


def calls_and_steps_mix(precision: str) -> None:
    """Calls of any length and single steps; between them steps of few samples, which have a plan of their own."""
    together, apart = (WIDEST.executor(DEFERRED, None, Recipe(precision=precision)) for _ in range(2))
    steps = inputs(DEFERRED, Adam(lr=0.01))
    few = [steps[0]._replace(x=steps[0].x[:3], y=steps[0].y[:3])]
    for part in (few, steps[:2], few, steps[2:3], steps[3:], few, steps):
        assert_same(together.train_steps(part, SMOOTH), one_by_one(apart, part, SMOOTH))
    assert state(together) == state(apart)
    together.close()
    apart.close()


def refused_steps_end_a_call(precision: str) -> None:
    """Of a gradient that is not finite; or might not be, behind which it goes on: first, in the middle and last."""
    for number in (0, 2, 4):
        for scale in (np.nan, 10 * SAFE):
            optimizer = SGD(lr=1e-3 / SAFE, momentum=0.9)
            one_call_gives_the_bits_of_many(DEFERRED, optimizer, precision, scales={number: scale})


def a_step_again_and_again() -> None:
    """The same object, which is refused when it comes the third or fourth time: the state stays."""
    (step, *_), optimizer = inputs(SMALL, SGD()), SGD(lr=1e20, momentum=0.9)
    together, apart = (WIDEST.executor(SMALL, None, Recipe()) for _ in range(2))
    steps = [step._replace(optimizer=optimizer)] * 8
    got, want = together.train_steps(steps, SMOOTH), one_by_one(apart, steps, SMOOTH)
    assert 1 < len(got) < len(steps)
    assert_same(got, want)
    assert state(together) == state(apart)
    together.close()
    apart.close()


def stretches_are_steps(precision: str) -> None:
    """All of it, on two threads."""
    one_call_gives_the_bits_of_many(DEFERRED, Adam(lr=0.01), precision)
    one_call_gives_the_bits_of_many(PARTLY, Adam(lr=0.01), precision, SEGMENTED)
    one_call_gives_the_bits_of_many(SMALL, SGD(lr=0.1, momentum=0.9, dampening=0.5), precision)
    refused_steps_end_a_call(precision)
    a_step_again_and_again()
    results_are_kept()
    calls_and_steps_mix(precision)
