"""The torch engine's losses against the equations of ``convolt.losses``."""

from dataclasses import dataclass

import numpy as np
import pytest

from convolt.engines.loops import Loops
from convolt.engines.torch import Torch
from convolt.errors import DataError, ShapeError
from convolt.layers import Dense, Flatten
from convolt.losses import MSE, CrossEntropy, Distillation, DistillationTargets
from convolt.model import Model

N, CLASSES = 4, 3
MODEL = Model((2, 3, 3), (Flatten(), Dense(18, CLASSES)))


class Fp64:
    precision = "fp64"
    seed = 0


def images():
    return np.random.default_rng(0).normal(size=(N, *MODEL.input_shape))


def soft(seed=1):
    return np.random.default_rng(seed).dirichlet(np.ones(CLASSES), N)


LOSSES = {
    "labels": (CrossEntropy(), np.array([0, 2, 1, 1])),
    "labels in int32": (CrossEntropy(), np.array([0, 2, 1, 1], np.int32)),
    "label smoothing": (CrossEntropy(0.2), np.array([0, 2, 1, 1])),
    "probabilities": (CrossEntropy(0.2), soft()),
    "mse of labels": (MSE(), np.array([0, 2, 1, 1])),
    "mse of numbers": (MSE(), soft()),
    "distillation": (Distillation(3.0, 0.7), DistillationTargets(np.array([0, 2, 1, 1]), 3 * soft(2))),
}


@dataclass(frozen=True)
class Mine:
    """A loss PyTorch does not have: the sum of squared logits, half of it."""

    def __call__(self, logits, targets):
        return 0.5 * float((logits**2).sum()), logits


@pytest.mark.parametrize(("loss", "targets"), [*LOSSES.values(), (Mine(), None)], ids=[*LOSSES.keys(), "mine"])
def test_loss_equals_its_definition(loss, targets):
    ours, reference = (engine(threads=1).executor(MODEL, None, Fp64) for engine in (Torch, Loops))
    x = images()
    got = ours.loss_and_grads(x, targets, loss, 0.3)
    expected = reference.loss_and_grads(x, targets, loss, 0.3)
    assert got.loss == pytest.approx(expected.loss, abs=1e-12)
    np.testing.assert_allclose(ours.grads.flat, reference.grads.flat, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("error", "message", "targets"),
    [
        (DataError, r"labels must be >= 0 and < 3; got 0 to 3", np.array([0, 3, 1, 1])),
        (DataError, r"got -1 to 1", np.array([0, -1, 1, 1])),
        (ShapeError, "one label for each of 4 samples; got 3", np.array([0, 1, 1])),
        (ShapeError, r"or an array \(4, 3\) like the logits; got \(4, 2\)", np.zeros((4, 2))),
    ],
)
def test_wrong_targets_are_named(error, message, targets):
    ours = Torch(threads=1).executor(MODEL, None, Fp64)
    with pytest.raises(error, match=message):
        ours.loss_and_grads(images(), targets, CrossEntropy(), 1.0)
