"""What the jit engine promises beyond what every engine does: bits, bf16 on matrix tiles, its own optimizer kernels.

The products of bf16 numbers are exact in float32, so on operands that are bf16 numbers already a convolution on tiles
must equal float64 as closely as float32 sums allow, eps sqrt(K) for K terms. Only the gradient of its input is rounded
once more before a test sees it (engine_cases: it is read from the gradient of the layer in front).
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from engine_cases import CASES, COMPILED, ON_TILES, TOLERANCE, UNITS
from engine_checks import (
    adds_gradients,
    assert_near,
    assert_same_step,
    equals_pytorch,
    executor_of,
    needs_no_input_gradient,
    oracle_step,
    relative_error,
    reuses_buffers,
    step_on,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jit_cases import (
    EVERY_RUN,
    FIRST,
    OPTIMIZERS,
    TILES,
    TINY,
    Rounded,
    equals_float64,
    equals_float64_as_first_layer,
    on_tiles,
    poisoned,
    update_is_that_of_the_optimizer,
    updated,
)
from numpy.linalg import norm

from convolt.engines import JIT, Im2col, Loops, Torch
from convolt.engines.jit import convolutions
from convolt.errors import EngineError
from convolt.layers import (
    BatchNorm2d,
    Conv2d,
    Dense,
    Dropout,
    Flatten,
    LeakyReLU,
    MaxPool2d,
    ReLU,
    Residual,
)
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import SGD, Adam, Optimizer, RMSprop, init_state, step_flat
from convolt.params import Params
from convolt.recipe import Recipe
from convolt.rng import SampleRng

TILE_UNITS = tuple(unit for unit in UNITS if unit != "dot")
every_unit = pytest.mark.parametrize("unit", TILE_UNITS)
# The widest unit meets every case. The others share all kernels but the product itself: in every run they meet two.
OF_ALL_UNITS = ("some images at a time, stride 2", "dense")


def cases(names, units=TILE_UNITS[:1]):
    """(name, unit) of cases; slow ones are those that a run can do without."""
    return [
        pytest.param(name, unit, marks=() if name in among else (pytest.mark.slow,))
        for unit in units
        for among in [EVERY_RUN if unit == ON_TILES else OF_ALL_UNITS]
        for name in names
    ]


on_tiles_by_unit = pytest.mark.parametrize(("name", "unit"), cases(TILES, TILE_UNITS))
as_first_layer = pytest.mark.parametrize(("name", "unit"), cases(FIRST))
LARGE = Model((1, 1, 1), (Flatten(), Dense(1, 300), Dense(300, 300)))  # more parameters than one chunk updates
# In bf16: planes, stride 1, stride 2, a large dense matrix behind rounded features, a small one in float32.
NET = Model(
    (3, 9, 7),
    (
        *(Conv2d(3, 6, 3, padding=1), ReLU(), MaxPool2d(2)),
        Residual((Conv2d(6, 6, 3, padding=1, bias=False), BatchNorm2d(6), ReLU())),
        *(Conv2d(6, 8, 3, stride=2, padding=1), ReLU(), Flatten(), Dense(32, 512), ReLU(), Dropout(0.3), Dense(512, 5)),
    ),
)


def batch_of(model: Model, size: int, seed: int = 1):
    """Images, labels, and who they are."""
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 256, (size, *model.input_shape), np.uint8)
    return x, generator.integers(0, 5, size), SampleRng(0, 0, np.arange(size))


def train(executor, batch, optimizer: Optimizer):
    x, y, rng = batch
    return executor.train_step(x, y, CrossEntropy(), 1 / len(x), optimizer, rng)


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_threads_and_repetition_leave_the_bits(precision):
    """37 images are 13 chunks, the last of them a single image."""
    results = set()
    for threads in (1, 2, 4, 4):
        executor = JIT(threads=threads, unit=UNITS[0]).executor(NET, None, Recipe(precision=precision))
        losses = [train(executor, batch_of(NET, 37, seed), Adam(lr=0.01)).loss for seed in range(4)]
        state = executor.params.flat.tobytes(), executor.params.buffers_flat.tobytes(), executor.grads.flat.tobytes()
        results.add((*losses, *state, executor.predict(batch_of(NET, 37)[0]).tobytes()))
        executor.close()
    assert len(results) == 1


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_plan_for_more_images_serves_fewer(precision):
    """Images behind the end of a batch are those of another batch: nothing may come of them."""
    recipe = Recipe(precision=precision)
    used = JIT(threads=2, unit=UNITS[0]).executor(NET, None, recipe)
    for size in (37, 20, 37):
        fresh = JIT(threads=2, unit=UNITS[0]).executor(NET, used.params, recipe)
        x, y, rng = batch_of(NET, size, seed=size)
        for executor in (used, fresh):
            executor.zero_grads()
        got, want = (one.loss_and_grads(x, y, CrossEntropy(), 1 / size, rng) for one in (used, fresh))
        assert got.loss == pytest.approx(want.loss, rel=1e-5)
        assert_near(got.logits, want.logits, 1e-5, "logits")
        assert_near(used.grads.flat, fresh.grads.flat, TOLERANCE["fp32"], "gradient")
        for name, array in fresh.params.buffers.items():
            assert_near(used.params.buffers[name], array, 1e-5, name)
        fresh.close()


def test_rows_of_more_pixels_than_registers():
    """Here the optimizer, looking at code that a code generator had changed, once dropped the end of a loop."""
    model = Model((8, 1, 113), (Conv2d(8, 8, 1), Flatten()))
    params, x = Params.init(model, 0), np.random.default_rng(0).normal(size=(1, 8, 1, 113)).astype(np.float32)
    found, expected = (engine.executor(model, params, Recipe()).predict(x) for engine in (JIT(threads=1), Loops()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_prediction_of_more_images_than_a_plan_holds():
    executor = JIT(threads=2).executor(NET, None, Recipe())
    x = batch_of(NET, 300)[0]
    whole = executor.predict(x)
    assert whole.shape == (300, 5)
    for part in (slice(0, 64), slice(220, 290)):
        assert_near(executor.predict(x[part]), whole[part], 1e-5, "logits")
    assert executor.predict(x[:0]).shape == (0, 5)


# --- bf16 on tiles ---------------------------------------------------------------------------------------------------


@on_tiles_by_unit
def test_bf16_equals_float64_of_the_same_operands(name, unit):
    equals_float64(TILES[name], unit)


@as_first_layer
def test_bf16_of_a_first_layer_equals_float64(name, unit):
    equals_float64_as_first_layer(FIRST[name], unit)


@pytest.mark.parametrize(("name", "unit"), cases(TILES))
def test_bf16_adds_gradients(name, unit):
    adds_gradients(JIT(threads=2, unit=unit), "bf16", TILES[name])


@pytest.mark.parametrize(
    "name",
    [
        "an odd width, channels that fill no tile",
        pytest.param("few channels, wide filter, stride 2", marks=pytest.mark.slow),
    ],
)
def test_large_filters_have_few_parts_of_their_gradient(name, monkeypatch):
    """A part is of more images then: as many as the kernel that adds them up believes."""
    monkeypatch.setattr(convolutions, "LARGE_PART", 100)
    case = replace(TILES[name], batch=18)
    equals_float64(case, ON_TILES)
    adds_gradients(JIT(threads=2, unit=ON_TILES), "bf16", case)


def test_large_filters_on_planes_have_few_parts_of_their_gradient(monkeypatch):
    monkeypatch.setattr(convolutions, "LARGE_PART", 100)
    equals_float64_as_first_layer(replace(FIRST["wide filter on planes"], batch=18), ON_TILES)


def test_cases_of_bf16_come_to_every_kernel():
    """A case that some threshold sends to float32 shows nothing."""
    engine = JIT(threads=1, unit=ON_TILES)
    models = [(case.model, case.batch) for case in TILES.values()] + [
        (case.bare, case.batch) for case in FIRST.values()
    ]
    stages = [stage for model, batch in models for stage in engine.explain(model, "bf16", batch).stages]
    kernels = {kernel for stage in stages for kernel in stage.kernels}
    backward = {f"{module}:conv_backward" for module in ("planes", "tiles_shifted", "tiles_backward")}
    dense = {f"dense_tiles:{name}" for name in ("round_weights", "forward", "total", "turn", "backward")}
    assert kernels >= {"planes:unpack", "tiles:pack", "tiles:conv_forward"} | backward | dense


def test_comparison_in_float64_notices_one_tap_in_a_thousand():
    case = TILES["few channels, wide filter, stride 2"]
    want = oracle_step(case).outputs
    params = case.params()
    params["1.weight"][0, 0, 0, 0] = 0
    executor = executor_of(JIT(threads=2, unit=UNITS[0]), "bf16", case.model, params)
    got = step_on(executor, case.deltas, case.slopes(), case.rng).outputs
    executor.close()
    assert relative_error(got, want) > 100 * (2**-22 * math.sqrt(case.terms) + 1e-6)


@st.composite
def tiled(draw: st.DrawFn) -> Rounded:
    """Any convolution that runs on tiles, and sometimes what is fused behind it."""
    channels, filters = draw(st.integers(1, 100)), draw(st.integers(1, 100))
    kernel, dilation = draw(st.tuples(st.integers(1, 7), st.integers(1, 7))), draw(st.integers(1, 2))
    height, width = (dilation * (size - 1) + draw(st.integers(1, 9)) for size in kernel)
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "bias": draw(st.booleans())}
    case = on_tiles((channels, height, width), filters, kernel, batch=draw(st.integers(1, 6)), **options)
    behind = draw(st.sampled_from([(), (ReLU(),), (LeakyReLU(0.25),), (ReLU(), MaxPool2d(2)), (MaxPool2d(2),)]))
    _, P, Q = case.layers[0].output_shape(case.shape)
    if len(behind) and isinstance(behind[-1], MaxPool2d) and min(P, Q) < 2:
        behind = behind[:-1]
    return replace(case, name=f"{case.name} {behind}", layers=(*case.layers, *behind))


@every_unit
@pytest.mark.slow
@settings(max_examples=60)
@given(case=tiled())
def test_bf16_equals_float64_in_any_geometry(case, unit):
    equals_float64(case, unit)


@every_unit
@pytest.mark.slow
@settings(max_examples=15)
@given(case=tiled())
def test_bf16_survives_other_batch_sizes(case, unit):
    reuses_buffers(JIT(threads=2, unit=unit), "bf16", case)
    adds_gradients(JIT(threads=2, unit=unit), "bf16", case)


@every_unit
@pytest.mark.slow
@settings(max_examples=30)
@given(case=tiled())
def test_bf16_backward_is_the_adjoint_of_forward(case, unit):
    """<conv(x), dy> = <x, dx> and = <w, dw>, up to the rounding of dx."""
    linear = replace(case, name=f"linear {case.name}", layers=(replace(case.layers[0], bias=False),))
    executor = executor_of(JIT(threads=2, unit=unit), "bf16", linear.model, linear.params())
    step, params = step_on(executor, linear.deltas, linear.slopes(), linear.rng), linear.params()
    executor.close()
    outputs, slopes = step.outputs, linear.slopes()
    for name, part in params.slices.items():
        operand, gradient = params[name], step.gradient[part]
        error = np.vdot(operand, gradient) - np.vdot(outputs, slopes)
        # Not the norms of y and dy alone: terms that cancel in y have their errors all the same.
        size = norm(outputs) * norm(slopes) + norm(operand) * norm(gradient)
        assert abs(error) <= (2**-8 if name == "0.weight" else 1e-5) * size, name


# Half the distance between bf16 numbers is 2^-9 of them; each of some layers in a row adds its own.
TOLERANCE_BF16 = 0.02


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in ("residual projection", "flatten-dense-relu-dense", "conv-bn-relu-pool")],
    ids=lambda case: case.name,
)
def test_bf16_is_near_float64(case):
    """Not conv-bn-relu: one of its outputs is so near zero that rounding decides whether the ReLU lets it through."""
    executor = executor_of(JIT(threads=2, unit=UNITS[0]), "bf16", case.model, case.params())
    got, want = step_on(executor, case.deltas, case.slopes(), case.rng), oracle_step(case)
    executor.close()
    assert_near(got.prediction, want.prediction, TOLERANCE_BF16, "prediction")
    assert_near(got.outputs, want.outputs, TOLERANCE_BF16, "outputs")
    assert_near(got.gradient, want.gradient, TOLERANCE_BF16, "gradient")
    for name, array in want.statistics.items():
        assert_near(got.statistics[name], array, TOLERANCE_BF16, name)


def test_bf16_first_layer_has_the_same_gradients():
    needs_no_input_gradient(JIT(threads=2, unit=ON_TILES), "bf16", TILES["whole tiles"])


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.name in COMPILED], ids=lambda case: case.name)
def test_nothing_is_read_before_it_is_written(case):
    with poisoned():
        equals_pytorch(JIT(threads=2), "fp32", case)


@on_tiles_by_unit
def test_no_tile_is_read_before_it_is_written(name, unit):
    with poisoned():
        equals_float64(TILES[name], unit)


@as_first_layer
def test_no_plane_is_read_before_it_is_written(name, unit):
    with poisoned():
        equals_float64_as_first_layer(FIRST[name], unit)


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behind", "winner"),
    [((MaxPool2d((17, 16)),), (0, 0)), ((ReLU(), MaxPool2d(16)), (15, 15))],
    ids=["the 257th tap is not the first", "the last tap of a byte is not a dead one"],
)
def test_winner_among_many_taps(behind, winner):
    model = Model((1, 17, 16), (Conv2d(1, 1, 1), *behind, Flatten()))
    params = Params.init(model, 0, np.float32)
    params["0.weight"][...], params["0.bias"][...] = 1, 0
    x = np.random.default_rng(0).uniform(0.1, 0.9, (2, 1, 17, 16))
    x[:, :, winner[0], winner[1]] = 2
    slopes = np.random.default_rng(1).normal(size=(2, *model.output_shape))
    got, want = (
        step_on(executor_of(engine, "fp32", model, params), x, slopes, SampleRng(0, 0, np.arange(2)))
        for engine in (JIT(threads=1), Im2col(threads=1))
    )
    assert_same_step(got, want, 1e-6)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "precision", "message"),
    [
        (JIT(), "fp64", "engine jit: precision must be one of fp32, bf16; got 'fp64'"),
        (JIT(isa="plain", unit="dot"), "bf16", "engine jit: unit='dot' multiplies by .*, which .* isa='plain' .* fma"),
    ],
)
def test_precision_is_refused_in_one_line(engine, precision, message):
    with pytest.raises(EngineError, match=message) as caught:
        engine.executor(TINY, None, Recipe(precision=precision))
    assert "\n" not in str(caught.value)


# --- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_update_is_that_of_the_optimizer(optimizer):
    update_is_that_of_the_optimizer(optimizer)


def test_update_reaches_every_parameter():
    executor = JIT(threads=2).executor(LARGE, None, Recipe())
    got, want, _, _ = updated(executor, OPTIMIZERS[4])
    executor.close()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_momentum_may_be_scheduled_to_nothing():
    executor = JIT(threads=1).executor(TINY, None, Recipe())
    w, state = executor.params.flat.copy(), init_state(SGD(momentum=0.9), executor.params.flat.size, np.float32)
    for step, momentum in enumerate((0.9, 0.5, 0.0, 0.5), start=1):
        executor.grads.flat[...] = np.random.default_rng(step).normal(size=w.size)
        optimizer = SGD(lr=0.1, momentum=momentum)
        step_flat(optimizer, w, executor.grads.flat, state, step, executor.params.decays())
        executor.update(optimizer)
    assert_near(executor.params.flat, w, 1e-6, "weights")


@pytest.mark.parametrize("optimizer", [SGD(lr=0.05, momentum=0.9), RMSprop(lr=1e-3, centered=True)], ids=repr)
@pytest.mark.parametrize("other", [Im2col(threads=1), Torch(threads=1)], ids=lambda engine: engine.NAME)
@pytest.mark.parametrize("jit_first", [True, False], ids=["from jit", "to jit"])
def test_a_run_goes_on_with_another_engine(optimizer, other, jit_first):
    """Two steps here and two there give what four steps of float64 give, as near as float32 comes."""
    recipe = Recipe(precision="fp32")
    batches = [batch_of(NET, 37, seed) for seed in range(4)]
    exact = Im2col(threads=1).executor(NET, None, Recipe(precision="fp64"))
    first, second = (
        engine.executor(NET, None, recipe)
        for engine in ((JIT(threads=2), other) if jit_first else (other, JIT(threads=2)))
    )
    for batch in batches[:2]:
        train(first, batch, optimizer)
    second.params.load_state_dict(first.params.state_dict())
    second.weights_changed()
    second.load_optimizer_state(first.optimizer_state())
    for batch in batches[2:]:
        train(second, batch, optimizer)
    for batch in batches:
        train(exact, batch, optimizer)
    assert_near(second.params.flat, exact.params.flat, 1e-3, "weights")
    assert int(second.optimizer_state()["step"]) == 4
    first.close()
    second.close()
