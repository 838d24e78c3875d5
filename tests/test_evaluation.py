"""Evaluation: means over a whole split, whatever the batches and ranks."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from convolt import evaluation
from convolt.comms import Serial
from convolt.data import Split
from convolt.engines.im2col import Im2col
from convolt.evaluation import Evaluation, evaluate, on_labels, predict
from convolt.layers import Dense, Flatten
from convolt.losses import MSE, CrossEntropy, Distillation
from convolt.model import Model
from convolt.recipe import Recipe

MODEL = Model((1, 3, 3), (Flatten(), Dense(9, 4)))
GENERATOR = np.random.default_rng(0)
SPLIT = Split(GENERATOR.normal(size=(53, 1, 3, 3)), GENERATOR.integers(0, 4, 53))


@pytest.fixture
def executor():
    return Im2col(threads=1).executor(MODEL, None, Recipe(precision="fp64"))


@dataclass
class Rank(Serial):
    """One of several processes; what it gives to a sum is kept."""

    rank: int = 0
    size: int = 1
    given: list = field(default_factory=list)

    def allreduce(self, array):
        self.given.append(array.copy())


def by_hand(executor, loss) -> Evaluation:
    logits = executor.predict(SPLIT.images)
    return Evaluation(loss(logits, SPLIT.labels)[0] / 53, float((logits.argmax(axis=1) == SPLIT.labels).mean()))


@pytest.mark.parametrize("batch", [1, 10, 53, 256])
def test_predictions_are_those_of_the_whole(executor, monkeypatch, batch):
    monkeypatch.setattr(evaluation, "BATCH", batch)
    np.testing.assert_allclose(predict(executor, SPLIT.images), executor.predict(SPLIT.images), rtol=1e-12)


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(label_smoothing=0.2), MSE()])
def test_means_are_over_the_samples(executor, monkeypatch, loss):
    monkeypatch.setattr(evaluation, "BATCH", 10)  # the last one is smaller
    got = evaluate(executor, SPLIT, loss)
    assert got == pytest.approx(by_hand(executor, loss), rel=1e-12)
    assert isinstance(got, Evaluation)


@pytest.mark.parametrize("size", [2, 3, 60])
def test_ranks_add_up_to_the_whole(executor, size):
    ranks = [Rank(rank=rank, size=size) for rank in range(size)]
    for rank in ranks:
        evaluate(executor, SPLIT, CrossEntropy(), rank)
    total = sum(rank.given[0] for rank in ranks) / 53
    assert tuple(total) == pytest.approx(by_hand(executor, CrossEntropy()), rel=1e-12)


def test_a_student_is_judged_by_the_labels(executor):
    assert on_labels(Distillation(teacher="runs/teacher")) == CrossEntropy()
    assert on_labels(MSE()) == MSE()
    assert evaluate(executor, SPLIT, Distillation(teacher="x")) == evaluate(executor, SPLIT, CrossEntropy())


def test_a_signal_is_heard_before_each_batch(executor, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 10)
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(executor, SPLIT, CrossEntropy(), stop=stop)
    assert len(calls) == 3


def test_no_images_give_no_predictions(executor):
    assert len(predict(executor, SPLIT.images[:0])) == 0
