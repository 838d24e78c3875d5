"""What a step says of its answers: how many are right, whatever integers the labels are."""

import numpy as np
import pytest
from engine_cases import ENGINES

from convolt import engines
from convolt.layers import Dense, Flatten, ReLU
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
    assert right_of(result, batch) == right


@every_engine
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int32])
def test_labels_are_integers_of_any_kind(entry, kind):
    want = step(executor_of(entry), batch_of())
    got = step(executor_of(entry), batch_of(targets=lambda labels: np.repeat(labels.astype(kind), 2)[::2]))
    assert got.loss == pytest.approx(want.loss)


@every_engine
def test_labels_of_another_byte_order_are_labels(entry):
    want = step(executor_of(entry), batch_of())
    got = step(executor_of(entry), batch_of(targets=lambda labels: labels.astype(">i4")))
    assert got.loss == pytest.approx(want.loss)
