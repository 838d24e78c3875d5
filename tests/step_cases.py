"""What a whole step must do where weights may not move: it is refused, nothing moves, and the next one is as any.

Functions for the reason that ``engine_checks`` gives: the mutants of the jit engine are judged by them too.
"""

from collections.abc import Callable

import numpy as np
from engine_cases import Entry

from convolt.engine import Executor
from convolt.errors import DataError
from convolt.layers import BatchNorm2d, Dense, Flatten, ReLU
from convolt.losses import CrossEntropy, Loss
from convolt.model import Model
from convolt.optimizers import SGD, Optimizer
from convolt.recipe import Recipe

CLASSES, SIZE = 4, 40
NET = Model((2, 3, 3), (Flatten(), Dense(18, 12), ReLU(), Dense(12, CLASSES)))
NORM = Model((2, 3, 3), (BatchNorm2d(2), Flatten(), Dense(18, CLASSES)))
PLAIN, CROSS_ENTROPY = SGD(lr=0.1), CrossEntropy()
#: Of any size and byte order.
WRONG = (np.int64(-1), np.int64(CLASSES), np.int64(1 << 40), np.array(1 << 24, ">i4"), np.uint64(1 << 63))


def step(
    executor: Executor, wrong=None, place=0, scale=1.0, optimizer: Optimizer = PLAIN, loss: Loss = CROSS_ENTROPY
) -> float:
    """One step on labels of which one may be wrong; its loss."""
    generator = np.random.default_rng(1)
    images, labels = generator.normal(size=(SIZE, 2, 3, 3)), generator.integers(0, CLASSES, SIZE)
    if wrong is not None:
        labels = labels.astype(np.asarray(wrong).dtype)
        labels[place] = wrong
    return executor.train_step(images, labels, loss, scale / SIZE, optimizer).loss


def refused(model: Model, entry: Entry, refusal: Callable[[Executor], None]) -> None:
    """Neither weights nor the count of steps move by it; before and behind it they do."""
    executor = entry.make(1).executor(model, None, Recipe(precision=entry.finest))

    def moves() -> None:
        before = executor.params.flat.copy()
        assert np.isfinite(step(executor))
        assert not np.array_equal(executor.params.flat, before)

    moves()
    before, steps = executor.params.flat.copy(), int(executor.optimizer_state()["step"])
    refusal(executor)
    np.testing.assert_array_equal(executor.params.flat, before)
    assert int(executor.optimizer_state()["step"]) == steps
    moves()
    executor.close()


def refuses_what_is_no_label(entry: Entry, wrong) -> None:
    """Wherever it stands: it is found, and nobody reads a logit that is not there."""

    def refusal(executor: Executor) -> None:
        for place in (0, SIZE - 1):
            told = ""
            try:
                step(executor, wrong, place)
            except DataError as error:
                told = str(error)
            assert "labels must be" in told, wrong

    refused(NET, entry, refusal)


def refuses_statistics(entry: Entry, name: str) -> None:
    """A statistic that is not finite may come of images whose normalized values are sound."""

    def refusal(executor: Executor) -> None:
        statistics = executor.statistics()
        broken = np.array([1.0, np.inf], statistics[f"0.{name}"].dtype)
        executor.restore_statistics({**statistics, f"0.{name}": broken})
        assert np.isnan(step(executor))
        executor.restore_statistics(statistics)

    refused(NORM, entry, refusal)


def refuses_gradients(entry: Entry) -> None:
    """The loss is finite and the gradient is not."""

    def refusal(executor: Executor) -> None:
        for scale in (np.inf, np.nan):
            assert np.isnan(step(executor, scale=scale))

    refused(NET, entry, refusal)


def refuses(entry: Entry) -> None:
    """All of it."""
    for wrong in WRONG:
        refuses_what_is_no_label(entry, wrong)
    for name in ("running_mean", "running_var"):
        refuses_statistics(entry, name)
    refuses_gradients(entry)
