"""Gradient and optimizer in one pass: the same bits as one after the other, and the same refusals."""

import numpy as np
import pytest
from engine_cases import UNITS
from jit_cases import OPTIMIZERS

from convolt.engines import JIT, Loops
from convolt.engines.jit.executor import SAFE
from convolt.engines.jit.update import Updater
from convolt.layers import Conv2d, Dense, Flatten, MaxPool2d, ReLU
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import SGD, Adam
from convolt.params import Params
from convolt.recipe import Recipe

# More inputs than one stripe and outputs that fill no block; a second matrix without gradient of its input's border.
NET = Model(
    (3, 20, 18),
    (Conv2d(3, 12, 3, padding=1), ReLU(), MaxPool2d(2), Flatten(), Dense(1080, 70), ReLU(), Dense(70, 256)),
)


def batch(size: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (size, *NET.input_shape), np.uint8), generator.integers(0, 256, size)


def trained(optimizer, scales=(1.0, 1.0, 1.0), sizes=(40, 40, 29)):
    """Losses, weights, state and predictions after steps of which the last has fewer samples."""
    executor = JIT(threads=2, unit=UNITS[0]).executor(NET, None, Recipe(precision="bf16"))
    losses = []
    for step, (scale, size) in enumerate(zip(scales, sizes, strict=True)):
        x, y = batch(size, step)
        losses.append(executor.train_step(x, y, CrossEntropy(), scale / size, optimizer).loss)
    state = [array.tobytes() for _, array in sorted(executor.optimizer_state().items())]
    predicted = executor.predict(batch(5)[0]).tobytes()
    executor.close()
    return losses, executor.params.flat.tobytes(), state, predicted


@pytest.fixture
def apart(monkeypatch):
    """Gradients are written to memory before the optimizer reads them."""

    def separate():
        monkeypatch.setattr(Updater, "fuses", lambda self, optimizer: False)

    return separate


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_one_pass_gives_the_bits_of_two(optimizer, apart):
    together = trained(optimizer)
    apart()
    assert trained(optimizer) == together


def test_matrices_of_which_only_some_are_moved_in_one_pass():
    """Where activations are made twice, only the last part's gradients are left to the optimizer's pass."""
    layers = (Flatten(), Dense(32, 512), ReLU(), Dense(512, 64), ReLU(), Dense(64, 256))
    model = Model((1, 4, 8), layers)
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 256, (32, *model.input_shape), np.uint8), generator.integers(0, 256, 32)
    losses = set()
    for segments in (0, 2):
        executor = JIT(threads=2, checkpoint_segments=segments).executor(model, None, Recipe(precision="bf16"))
        steps = [executor.train_step(x, y, CrossEntropy(), 1 / 32, Adam(lr=0.01)).loss for _ in range(3)]
        losses.add(tuple(steps))
        executor.close()
    assert len(losses) == 1


def test_large_slopes_are_looked_at_first_and_give_the_same_bits(apart):
    """A bound beyond which the gradient might not be finite: it is made by itself, and it is finite."""
    scale = 10 * SAFE
    together = trained(SGD(lr=1e-3 / scale), (1.0, scale, 1.0))
    apart()
    assert trained(SGD(lr=1e-3 / scale), (1.0, scale, 1.0)) == together


@pytest.mark.parametrize("scale", [1e30, np.inf, np.nan])
def test_a_gradient_that_is_not_finite_leaves_the_weights(scale):
    executor = JIT(threads=2, unit=UNITS[0]).executor(NET, None, Recipe(precision="bf16"))
    x, y = batch(33)
    before = executor.params.flat.copy()
    assert np.isnan(executor.train_step(x, y, CrossEntropy(), scale, SGD(lr=1.0)).loss)
    np.testing.assert_array_equal(executor.params.flat, before)


def test_predictions_follow_the_weights():
    """bf16 copies of matrices are made again after a step, another optimizer's step, and a change from outside."""
    executor = JIT(threads=2, unit=UNITS[0]).executor(NET, None, Recipe(precision="bf16"))
    x, y = batch(24)

    def agrees():
        params = Params(NET, np.float64)
        params.load_state_dict(executor.params.state_dict())
        want = Loops().executor(NET, params, Recipe(precision="fp64")).predict(x)
        np.testing.assert_allclose(executor.predict(x), want, atol=0.02 * np.abs(want).max())

    agrees()
    executor.train_step(x, y, CrossEntropy(), 1.0, Adam(lr=0.1))
    agrees()
    executor.zero_grads()
    executor.loss_and_grads(x, y, CrossEntropy(), 1.0)
    executor.update(Adam(lr=0.1))
    agrees()
    executor.params.flat[...] *= -0.5
    executor.weights_changed()
    agrees()
