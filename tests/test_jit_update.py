"""Gradient and optimizer in one pass: the same bits as one after the other, and the same refusals."""

import numpy as np
import pytest
from engine_cases import UNITS
from jit_cases import DEFERRED, OPTIMIZERS, batch_for, one_pass_gives_the_bits_of_two, overflow_leaves_the_weights
from jit_kernels import available

from convolt.engines import JIT, Loops
from convolt.engines.jit.kernels.loss_specs import SAFE
from convolt.layers import Dense, Flatten, ReLU
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import SGD, Adam
from convolt.params import Params
from convolt.recipe import Recipe

precisions = pytest.mark.parametrize("precision", ["fp32", "bf16"])


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        # Every run meets one optimizer in each precision.
        pytest.param(optimizer, precision, marks=() if number == 11 * turn else pytest.mark.slow)
        for turn, precision in enumerate(("fp32", "bf16"))
        for number, optimizer in enumerate(OPTIMIZERS)
    ],
    ids=repr,
)
def test_one_pass_gives_the_bits_of_two(optimizer, precision):
    """An eighth of them in each precision, the others in the slow suite: each is kernels of its own to compile."""
    one_pass_gives_the_bits_of_two(optimizer, precision)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("isa", ["plain", pytest.param("avx2", marks=pytest.mark.slow)])
def test_one_pass_on_narrow_vectors(isa, precision):
    if isa not in [one.name for one in available()]:
        pytest.skip(f"this CPU has no {isa}")
    model = Model((1, 8, 64), (Flatten(), Dense(512, 258)))  # in blocks of 12 columns where a vector has four lanes
    one_pass_gives_the_bits_of_two(Adam(lr=0.01), precision, model=model, engine=JIT(threads=2, isa=isa, unit="fma"))


@pytest.mark.parametrize("optimizer", [Adam(lr=0.01), pytest.param(SGD(lr=0.1), marks=pytest.mark.slow)], ids=repr)
def test_rows_that_end_one_number_behind_a_vector(optimizer):
    """In bf16, and rounded without an instruction for it: the next row must not lose its first number."""
    model = Model((1, 25, 41), (Flatten(), Dense(1025, 256)))
    one_pass_gives_the_bits_of_two(optimizer, "bf16", model=model, engine=JIT(threads=2, unit="fma"))


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_matrices_of_which_only_some_are_moved_in_one_pass(precision):
    """Where activations are made twice, only the last part's gradients are left to the optimizer's pass."""
    layers = (Flatten(), Dense(32, 512), ReLU(), Dense(512, 64), ReLU(), Dense(64, 256))
    model = Model((1, 4, 8), layers)
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 256, (32, *model.input_shape), np.uint8), generator.integers(0, 256, 32)
    losses = set()
    for segments in (0, 2):
        executor = JIT(threads=2, unit=UNITS[0], checkpoint_segments=segments).executor(
            model, None, Recipe(precision=precision)
        )
        steps = [executor.train_step(x, y, CrossEntropy(), 1 / 32, Adam(lr=0.01)).loss for _ in range(3)]
        losses.add(tuple(steps))
        executor.close()
    assert len(losses) == 1


@precisions
def test_large_slopes_are_looked_at_first_and_give_the_same_bits(precision):
    """A bound beyond which the gradient might not be finite: it is made by itself, and it is finite."""
    scale = 10 * SAFE
    one_pass_gives_the_bits_of_two(SGD(lr=1e-3 / scale), precision, (1.0, scale, 1.0))


@precisions
def test_a_gradient_that_overflows_in_the_last_pass_leaves_the_weights(precision):
    overflow_leaves_the_weights(precision)


@precisions
@pytest.mark.parametrize("scale", [1e30, np.inf, np.nan])
def test_a_gradient_that_is_not_finite_leaves_the_weights(scale, precision):
    executor = JIT(threads=2, unit=UNITS[0]).executor(DEFERRED, None, Recipe(precision=precision))
    x, y = batch_for(DEFERRED)
    before = executor.params.flat.copy()
    assert np.isnan(executor.train_step(x, y, CrossEntropy(), scale, SGD(lr=1.0)).loss)
    np.testing.assert_array_equal(executor.params.flat, before)


def test_predictions_follow_the_weights():
    """bf16 copies of matrices are made again after a step, another optimizer's step, and a change from outside."""
    executor = JIT(threads=2, unit=UNITS[0]).executor(DEFERRED, None, Recipe(precision="bf16"))
    x, y = batch_for(DEFERRED)

    def agrees():
        params = Params(DEFERRED, np.float64)
        params.load_state_dict(executor.params.state_dict())
        want = Loops().executor(DEFERRED, params, Recipe(precision="fp64")).predict(x)
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


def test_a_profile_is_of_all_phases_whatever_became_of_the_step():
    """Of a step that was refused, behind another state of the optimizer, and behind none."""
    executor = JIT(threads=2).executor(DEFERRED, None, Recipe(precision="fp32"))
    x, y = batch_for(DEFERRED)
    executor.train_step(x, y, CrossEntropy(), 1 / len(x), Adam())
    rows = [(time.stage, time.kernel) for time in executor.profile(x, training=True)]
    assert ("4-5 Dense+ReLU", "dw+update") in rows
    assert np.isnan(executor.train_step(x, y, CrossEntropy(), np.nan, Adam()).loss)
    assert [(time.stage, time.kernel) for time in executor.profile(x, training=True)] == rows
    executor.load_optimizer_state({"step": np.array(0)})
    assert "dw+update" not in [time.kernel for time in executor.profile(x, training=True)]
    executor.close()


def test_a_loss_of_ones_own_is_asked():
    """It is a CrossEntropy, and no label is wrong to it."""

    class Ignoring(CrossEntropy):
        def __call__(self, logits, targets):
            used = targets >= 0
            total, slopes = super().__call__(logits, np.where(used, targets, 0))
            return total, slopes * used[:, None]

    executor = JIT(threads=2).executor(DEFERRED, None, Recipe(precision="fp32"))
    x, y = batch_for(DEFERRED)
    before = executor.params.flat.copy()
    assert np.isfinite(executor.train_step(x, np.where(y % 2, y, -100), Ignoring(), 1 / len(x), Adam()).loss)
    assert int(executor.optimizer_state()["step"]) == 1
    assert not np.array_equal(executor.params.flat, before)
    executor.close()
