"""Max-pools of any window fused behind convolutions: the same as PyTorch's, and nothing of their input is kept."""

from dataclasses import replace

import numpy as np
import pytest
from engine_cases import UNITS, Case
from engine_checks import (
    Inner,
    adds_gradients,
    equals_pytorch,
    executor_of,
    needs_no_input_gradient,
    reuses_buffers,
    step_on,
)
from half_cases import equals_float32, reads_what_was_written
from jit_cases import equals_float64, equals_float64_as_first_layer, poisoned
from pool_cases import POOLS

from convolt.engines import JIT, Loops
from convolt.layers import Conv2d, Dense, Flatten, LeakyReLU, MaxPool2d, ReLU
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.params import Params
from convolt.recipe import Recipe
from convolt.rng import SampleRng

FORCED = [unit for unit in UNITS if unit != "amx"]
FEW, BLOCKS, TILES, WINOGRAD = list(POOLS)[:4]
QUICK = {("fp32", FEW), ("fp32", WINOGRAD), ("dot", WINOGRAD)}


def some(units):
    """Units and cases; slow ones are those that a run can do without."""
    return pytest.mark.parametrize(
        ("unit", "name"),
        [
            pytest.param(unit, name, marks=() if (unit, name) in QUICK else pytest.mark.slow)
            for unit in units
            for name in POOLS
        ],
    )


@some(["fp32"])
def test_fused_pools_equal_pytorch(unit, name):
    with poisoned():
        equals_pytorch(JIT(threads=2), "fp32", POOLS[name])


@some(FORCED)
def test_fused_pools_equal_float64(unit, name):
    with poisoned():
        equals_float64(POOLS[name], unit)


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("check", [adds_gradients, reuses_buffers, needs_no_input_gradient])
def test_the_same_in_other_plans(check, name):
    case = POOLS[name]
    check(JIT(threads=2), "fp32", Case(case.name, case.shape, case.layers, case.batch))


@pytest.mark.slow
@pytest.mark.parametrize("unit", FORCED)
@pytest.mark.parametrize("name", [FEW, BLOCKS])
def test_fused_pools_of_a_first_layer(name, unit):
    with poisoned():
        equals_float64_as_first_layer(POOLS[name], unit)


@pytest.mark.slow
@pytest.mark.skipif("fma" not in UNITS, reason="this CPU has no unit for tiles that can be forced")
def test_what_is_pooled_is_kept_in_bf16():
    """Between convolutions on tiles."""
    layers = (Conv2d(32, 32, 3, padding=1), ReLU(), MaxPool2d(3, 2, 1), Conv2d(32, 20, 3, padding=1))
    case = replace(POOLS[TILES], layers=layers)
    equals_float32(case, "fma", bare=False)
    reads_what_was_written(case, "fma")


@pytest.mark.parametrize("isa", [None, pytest.param("avx2", marks=pytest.mark.slow)])
def test_a_window_of_equal_values_sends_its_gradient_to_the_first(isa):
    """And one that ReLU has closed sends none, though every pixel of it is zero."""
    model = Model((1, 5, 5), (Conv2d(1, 1, 1), ReLU(), MaxPool2d(3, 2, 1), Flatten()))
    executor = executor_of(JIT(threads=1, isa=isa), "fp32", model, Params.init(model, 0, np.float32))
    for bias, wanted in ((2.0, 9.0), (-2.0, 0.0)):
        executor.params["0.weight"][...], executor.params["0.bias"][...] = 0, bias
        executor.weights_changed()
        x, slopes = np.arange(25, dtype=np.float32).reshape(1, 1, 5, 5), np.ones((1, 9), np.float32)
        step = step_on(executor, x, slopes, SampleRng(0, 0, np.arange(1)))
        assert step.outputs.tolist() == [[max(bias, 0.0)] * 9]
        found = {name: step.gradient[part].tolist() for name, part in executor.params.slices.items()}
        # The first pixels of the nine windows: 0, 1, 3, 5, 6, 8, 15, 16, 18.
        assert found == {"0.weight": [72.0 if wanted else 0.0], "0.bias": [wanted]}


def test_the_image_before_a_pool_is_not_kept():
    """Its place is a thread's scratch memory, and what is kept of it are codes; behind LeakyReLU no pool is fused."""
    found = {}
    for activation in (ReLU(), LeakyReLU(0.1)):
        model = Model((3, 32, 32), (Conv2d(3, 64, 3, padding=1), activation, MaxPool2d(3, 2, 1), Flatten()))
        sizes = []
        for batch in (64, 128):
            executor = executor_of(JIT(threads=1), "fp32", model, Params.init(model, 0, np.float32))
            x, slopes = (np.zeros((batch, *shape), np.float32) for shape in (model.input_shape, model.output_shape))
            executor.loss_and_grads(x, slopes, Inner(), 1.0, SampleRng(0, 0, np.arange(batch)))
            sizes.append(sum(executor.memory().values()))
        found[activation] = sizes[1] - sizes[0]
    unpooled = 4 * 64 * 32 * 32  # bytes of an image
    assert found[ReLU()] <= found[LeakyReLU(0.1)] - 64 * unpooled


@pytest.mark.parametrize("pool", [MaxPool2d(2), MaxPool2d(3, 2, 1)])
def test_depthwise_kernels_take_no_pool(pool):
    """They have none, and products with one channel of depth are slower than a pool by itself."""
    model = Model((20, 8, 8), (Conv2d(20, 20, 3, padding=1, groups=20), ReLU(), pool, Flatten()))
    stages = JIT(threads=1).explain(model, "fp32", 4).stages
    assert any("pooling:max_pool" in stage.kernels for stage in stages)
    assert any("depthwise" in stage.reason for stage in stages)


@pytest.mark.parametrize("pool", [MaxPool2d(2), MaxPool2d(3, 2, 1)], ids=["side by side", "overlapping"])
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("unit", [None, *(pytest.param(unit, marks=pytest.mark.slow) for unit in FORCED)])
def test_a_number_that_is_none_stays_one(unit, channels, pool):
    """As in the engine that defines what is right: in whichever tap, through ReLU, and backward."""
    model = Model((channels, 8, 8), (Conv2d(channels, 16, 3, padding=1), ReLU(), pool, Flatten(), Dense(256, 3)))
    x = np.random.default_rng(0).normal(size=(3, *model.input_shape)).astype(np.float32)
    x[0, 0, 1, 2] = np.nan
    x[1] = np.inf
    found = []
    for engine, precision in ((Loops(), "fp64"), (JIT(threads=1, unit=unit), "bf16" if unit else "fp32")):
        executor = engine.executor(model, Params.init(model, 0, np.float32), Recipe(precision=precision))
        with np.errstate(invalid="ignore"):
            logits = executor.predict(x)
            result = executor.loss_and_grads(x, np.array([0, 1, 2]), CrossEntropy(), 1.0, SampleRng(0, 0, np.arange(3)))
        found.append((np.isfinite(logits).all(axis=1).tolist(), bool(np.isfinite(result.loss))))
    assert found[0] == found[1] == ([False, False, True], False)
