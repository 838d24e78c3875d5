"""The checks of the engine suites, each a function of (engine, precision, case) that raises AssertionError.

They are functions and not tests so that the same ones judge the engines (test_engine_kernels.py) and the mutants that
they must catch (test_mutants.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from engine_cases import TOLERANCE, Case
from numpy.typing import NDArray
from torch_oracle import Oracle

from convolt.engine import Engine, Executor
from convolt.model import Model
from convolt.params import Params
from convolt.recipe import Recipe
from convolt.rng import SampleRng

Array = NDArray[Any]


@dataclass(frozen=True)
class Inner:
    """The loss <outputs, slopes>: its gradient is ``slopes``, so any gradient can be sent back."""

    def __call__(self, logits: Array, targets: Array) -> tuple[float, Array]:
        return float((logits * targets).sum(dtype=np.float64)), targets.astype(logits.dtype)


@dataclass(frozen=True)
class Step:
    """What one training step and one prediction gave."""

    loss: float
    outputs: Array
    gradient: Array
    statistics: dict[str, Array]
    prediction: Array = field(default_factory=lambda: np.zeros(0))


def executor_of(engine: Engine, precision: str, model: Model, params: Params) -> Executor:
    """The model made ready, from copies of ``params``."""
    return engine.executor(model, params, Recipe(precision=precision))


def step_on(executor: Executor, x: Array, slopes: Array, rng: SampleRng, scale: float = 1.0) -> Step:
    """One step with fresh gradients; the prediction is taken before it, by the first statistics."""
    prediction = executor.predict(x)
    executor.zero_grads()
    result = executor.loss_and_grads(x, slopes, Inner(), scale, rng)
    statistics = {name: array.copy() for name, array in executor.params.buffers.items()}
    return Step(result.loss, result.logits, executor.grads.flat.copy(), statistics, prediction)


def relative_error(got: Array, want: Array) -> float:
    """|got - want| / |want|, in the norm of the whole array; infinite for another shape or a number that is none."""
    if np.shape(got) != np.shape(want):
        return np.inf
    error = np.linalg.norm(np.asarray(got, np.float64) - want)
    return float(error / max(np.linalg.norm(want), 1e-6)) if np.isfinite(error) else np.inf


def assert_near(got: Array, want: Array, tolerance: float, what: str) -> None:
    """Fail with the name of what differs and by how much."""
    error = relative_error(got, want)
    assert error <= tolerance, f"{what}: relative error {error:.1e}, at most {tolerance:.0e}"


def assert_same_step(got: Step, want: Step, tolerance: float) -> None:
    """Fail where two steps differ."""
    assert_near(got.prediction, want.prediction, tolerance, "prediction")
    assert_near(got.outputs, want.outputs, tolerance, "outputs")
    # A sum may cancel: its error is one of the terms.
    assert abs(got.loss - want.loss) <= tolerance * max(abs(want.loss), np.linalg.norm(want.outputs)), "loss"
    assert_near(got.gradient, want.gradient, tolerance, "gradient")
    for name, array in want.statistics.items():
        assert_near(got.statistics[name], array, tolerance, name)


@cache
def oracle_step(case: Case) -> Step:
    """The same step by PyTorch's functions and autograd in float64."""
    return oracle_of(case.model, case.params(), case.deltas, case.slopes(), case.rng)


def oracle_of(model: Model, params: Params, x: Array, slopes: Array, rng: SampleRng) -> Step:
    """One step of any model on any images, in float64."""
    with torch.no_grad():
        prediction = Oracle(model, params, training=False)(x)
    oracle = Oracle(model, params, rng)
    outputs = oracle(x)
    loss = (outputs * torch.from_numpy(slopes)).sum()
    loss.backward()
    statistics = {name: oracle.state[name].numpy() for name in params.buffers}
    return Step(loss.item(), outputs.detach().numpy(), oracle.gradient(), statistics, prediction.numpy())


# --- the checks ------------------------------------------------------------------------------------------------------


def equals_pytorch(engine: Engine, precision: str, case: Case) -> None:
    """Prediction, outputs, loss, the gradients of parameters and input, and the statistics equal PyTorch's."""
    want = oracle_step(case)
    executor = executor_of(engine, precision, case.model, case.params())
    assert_same_step(step_on(executor, case.deltas, case.slopes(), case.rng), want, TOLERANCE[precision])
    executor.close()


def equals_finite_differences(engine: Engine, precision: str, case: Case) -> None:
    """``<gradient, v> = (f(w + h v) - f(w - h v)) / 2h`` for a random direction v of each parameter; float64 only."""
    assert precision == "fp64"
    executor = executor_of(engine, precision, case.model, case.params())
    x, slopes, weights = case.deltas, case.slopes(), executor.params
    gradient = step_on(executor, x, slopes, case.rng).gradient
    generator = np.random.default_rng(0)
    h = 1e-6
    for name, part in weights.slices.items():
        direction = generator.normal(size=part.stop - part.start)
        direction /= np.linalg.norm(direction)
        start, losses = weights.flat[part].copy(), []
        for sign in (1, -1):
            weights.flat[part] = start + sign * h * direction
            executor.weights_changed()
            losses.append(executor.loss_and_grads(x, slopes, Inner(), 1.0, case.rng).loss)
        weights.flat[part] = start
        numeric, analytic = (losses[0] - losses[1]) / (2 * h), gradient[part] @ direction
        # The quotient is known to eps |f| / h and h^2 |f'''|, both about 1e-9 here.
        scale = max(abs(numeric), np.linalg.norm(gradient[part]), 1e-2)
        assert abs(numeric - analytic) <= 1e-6 * scale, f"{name}: {analytic} is not the slope {numeric}"
    executor.close()


def adds_gradients(engine: Engine, precision: str, case: Case) -> None:
    """Two backward passes give twice the gradient, a scale multiplies it, and zero_grads forgets it."""
    executor = executor_of(engine, precision, case.model, case.params())
    once = step_on(executor, case.deltas, case.slopes(), case.rng).gradient
    executor.loss_and_grads(case.deltas, case.slopes(), Inner(), 1.0, case.rng)
    assert_near(executor.grads.flat, 2 * once, TOLERANCE[precision], "gradient of two calls")
    executor.loss_and_grads(case.deltas, case.slopes(), Inner(), 0.5, case.rng)
    assert_near(executor.grads.flat, 2.5 * once, TOLERANCE[precision], "gradient of a scaled call")
    executor.zero_grads()
    assert not executor.grads.flat.any()
    executor.close()


def reuses_buffers(engine: Engine, precision: str, case: Case) -> None:
    """A smaller batch and then the larger one again give what executors that never saw another batch give."""
    model, params = case.model, case.params()
    used = executor_of(engine, precision, model, params)
    for count in (case.batch, max(1, case.batch - 1), 1, case.batch):
        part = slice(0, count)
        data = case.deltas[part], case.slopes()[part], case.rng[part]
        if count == 1 and _needs_a_batch(case):
            continue
        fresh = executor_of(engine, precision, model, params)
        used.params.load_state_dict(params.state_dict())
        used.weights_changed()
        assert_same_step(step_on(used, *data), step_on(fresh, *data), TOLERANCE[precision])
        fresh.close()
    used.close()


def needs_no_input_gradient(engine: Engine, precision: str, case: Case) -> None:
    """Parameters have the same gradient when the case is the model's first layer, where dx is skipped."""
    params = case.params()
    inner = Params(case.bare, params.dtype)
    inner.load_state_dict({name: array for name, array in params.state_dict().items() if name != "0.weight"})
    behind = executor_of(engine, precision, case.model, params)
    first = executor_of(engine, precision, case.bare, inner)
    want = step_on(behind, case.deltas, case.slopes(), case.rng)
    got = step_on(first, case.images(), case.slopes(), case.rng)
    assert_near(got.outputs, want.outputs, TOLERANCE[precision], "outputs")
    assert_near(got.gradient, want.gradient[behind.params.slices["0.weight"].stop :], TOLERANCE[precision], "gradient")
    behind.close()
    first.close()


def _needs_a_batch(case: Case) -> bool:
    """Whether BatchNorm sees one value a channel in a batch of one."""
    return any("num_batches_tracked" in name for name in case.model.buffers())


Check = Callable[[Engine, str, Case], None]
CHECKS: tuple[Check, ...] = (
    equals_pytorch,
    adds_gradients,
    reuses_buffers,
    needs_no_input_gradient,
    equals_finite_differences,
)


def applies(check: Check, precision: str, case: Case) -> bool:
    """Finite differences need float64, and a function that has a slope where they are taken."""
    return check is not equals_finite_differences or (precision == "fp64" and not case.ties)
