"""What a step says of its answers: how many are right, whatever integers the labels are."""

import numpy as np
import pytest
from engine_cases import ENGINES

from convolt import engines
from convolt.errors import DataError
from convolt.layers import BatchNorm2d, Dense, Flatten, ReLU
from convolt.loader import Batch
from convolt.losses import CrossEntropy
from convolt.metrics import correct
from convolt.model import Model
from convolt.optimizers import SGD
from convolt.recipe import Recipe
from convolt.rng import SampleRng
from convolt.step import right_of

CLASSES, SIZE = 4, 40
NET = Model((2, 3, 3), (Flatten(), Dense(18, 12), ReLU(), Dense(12, CLASSES)))
every_engine = pytest.mark.parametrize("entry", ENGINES, ids=lambda entry: entry.name)


def executor_of(entry):
    return entry.make(1).executor(NET, None, Recipe(precision=entry.finest))


def batch_of(size=SIZE, targets=None) -> Batch:
    generator = np.random.default_rng(1)
    images, labels = generator.normal(size=(size, *NET.input_shape)), generator.integers(0, CLASSES, size)
    return Batch(images, labels if targets is None else targets(labels), labels, SampleRng(0, 0, np.arange(size)), size)


def step(executor, batch, lr=0.1):
    return executor.train_step(batch.images, batch.targets, CrossEntropy(), 1 / batch.size, SGD(lr=lr), batch.rng)


@every_engine
def test_right_answers_are_those_of_the_logits(entry):
    """Where an engine has counted them: ties go to the first class, and a smaller batch has fewer."""
    executor = executor_of(entry)
    for size in (SIZE, 7):
        batch = batch_of(size)
        result = step(executor, batch)
        assert result.right in (None, int(correct(result.logits, batch.labels).sum()))
    executor.params.flat[...] = 0
    executor.weights_changed()
    result = step(executor, batch, lr=0.0)
    assert result.right in (None, np.count_nonzero(batch.labels == 0)), "all logits are equal"


def test_right_answers_name_labels_where_targets_are_others():
    """What an engine has counted holds for targets, which an augment may have made of labels."""
    executor = engines.JIT(threads=1).executor(NET, None, Recipe(precision="fp32"))
    batch = batch_of(targets=lambda labels: (labels + 1) % CLASSES)
    result = step(executor, batch)
    named, right = (int(correct(result.logits, y).sum()) for y in (batch.targets, batch.labels))
    assert result.right == named != right
    assert right_of([result], [batch]) == right


@every_engine
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int32])
def test_labels_are_integers_of_any_kind(entry, kind):
    want = step(executor_of(entry), batch_of())
    got = step(executor_of(entry), batch_of(targets=lambda labels: np.repeat(labels.astype(kind), 2)[::2]))
    assert got.loss == pytest.approx(want.loss)


@every_engine
@pytest.mark.parametrize("wrong", [-1, CLASSES, 1 << 40, np.array(1 << 24, ">i4"), np.uint64(1 << 63)], ids=repr)
def test_numbers_that_are_no_labels_are_refused_and_nothing_moves(entry, wrong):
    """Of any size and byte order, wherever they stand: they are found, and nobody reads a logit that is not there."""
    executor = executor_of(entry)
    step(executor, batch_of())
    before, steps = executor.params.flat.copy(), int(executor.optimizer_state()["step"])
    for place in (0, SIZE - 1):
        labels = batch_of().labels.astype(np.asarray(wrong).dtype)
        labels[place] = wrong
        with pytest.raises(DataError, match="labels must be"):
            step(executor, batch_of(targets=lambda _, labels=labels: labels))
        np.testing.assert_array_equal(executor.params.flat, before)
    assert int(executor.optimizer_state()["step"]) == steps
    assert np.isfinite(step(executor, batch_of()).loss)


@every_engine
def test_labels_of_another_byte_order_are_labels(entry):
    want = step(executor_of(entry), batch_of())
    got = step(executor_of(entry), batch_of(targets=lambda labels: labels.astype(">i4")))
    assert got.loss == pytest.approx(want.loss)


@every_engine
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_a_statistic_that_is_not_finite_stops_a_step(entry, name):
    """It comes of images whose normalized values are sound; the weights stay as they were."""
    model = Model((2, 3, 3), (BatchNorm2d(2), Flatten(), Dense(18, CLASSES)))
    executor = entry.make(1).executor(model, None, Recipe(precision=entry.finest))
    assert np.isfinite(step(executor, batch_of()).loss)
    before = executor.params.flat.copy()
    statistics = executor.statistics()
    executor.restore_statistics({**statistics, f"0.{name}": np.array([1.0, np.inf], statistics[f"0.{name}"].dtype)})
    assert np.isnan(step(executor, batch_of()).loss)
    np.testing.assert_array_equal(executor.params.flat, before)
    executor.restore_statistics(statistics)
    assert np.isfinite(step(executor, batch_of()).loss)
    assert not np.array_equal(executor.params.flat, before)
