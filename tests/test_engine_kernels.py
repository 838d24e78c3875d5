"""Every engine computes every layer right, forward and backward, in every geometry and every precision it offers.

Against PyTorch's functions, finite differences, itself, and the laws that linear layers obey.
"""

import numpy as np
import pytest
from engine_cases import CASES, COMPILED, ENGINES, Case, Entry
from engine_checks import (
    CHECKS,
    Inner,
    Step,
    applies,
    assert_near,
    assert_same_step,
    equals_pytorch,
    executor_of,
    oracle_step,
    step_on,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jit_kernels import available

from convolt import engines
from convolt.engines.im2col import Im2col, windows
from convolt.errors import ShapeError
from convolt.layers import AvgPool2d, Conv2d, Dense, Layer, MaxPool2d

# PyTorch remarks that an even kernel with padding="same" costs it a copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

slow_if = {True: (pytest.mark.slow,), False: ()}
every_engine = pytest.mark.parametrize(
    "entry", [pytest.param(entry, marks=slow_if[entry.compiles], id=entry.name) for entry in ENGINES]
)


def forced(isa: str) -> Entry:
    """The jit engine on narrower vectors than this CPU has."""
    return Entry(f"jit-{isa}", lambda threads: engines.JIT(threads=threads, isa=isa, unit="fma"), compiles=True)


FORCED = [forced(isa.name) for isa in list(available())[1:]]


def name(value):
    return value if isinstance(value, str) else getattr(value, "name", None) or value.__name__


@pytest.mark.parametrize(
    ("entry", "case", "check"),
    [
        pytest.param(
            *(entry, case, check),
            marks=slow_if[entry in FORCED or (entry.compiles and case.name not in COMPILED)],
        )
        for entry in (*ENGINES, *FORCED)
        for case in CASES
        for check in CHECKS
        if applies(check, entry.finest, case) and entry.can_judge(case, entry.finest)
    ],
    ids=name,
)
def test_kernels(entry, case, check):
    check(entry.make(2 if entry.owner_computes else 1), entry.finest, case)


@pytest.mark.parametrize(
    ("entry", "precision"),
    [
        pytest.param(entry, precision, marks=slow_if[entry.compiles])
        for entry in ENGINES
        for precision in entry.precisions
        if precision != entry.finest
    ],
    ids=name,
)
def test_kernels_in_other_precisions(entry, precision):
    wrong = {}
    for case in filter(lambda case: entry.can_judge(case, precision), CASES):
        try:
            equals_pytorch(entry.make(1), precision, case)
        except AssertionError as error:
            wrong[case.name] = str(error)
    assert wrong == {}


@pytest.mark.parametrize("case", CASES, ids=name)
def test_size_of_tiles_does_not_change_the_result(case, monkeypatch):
    engine, data = Im2col(threads=3), (case.deltas, case.slopes(), case.rng)
    whole = step_on(executor_of(engine, "fp64", case.model, case.params()), *data)
    monkeypatch.setattr(windows, "TILE_BYTES", 1)  # a row or a channel each
    tiled = step_on(executor_of(engine, "fp64", case.model, case.params()), *data)
    assert_same_step(tiled, whole, 1e-13)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_case_has_gradients_to_check(case):
    gradient = oracle_step(case).gradient
    for parameter, part in case.params().slices.items():
        # A constant that BatchNorm takes away again is all there is in some places; nowhere may all be zero.
        assert np.abs(gradient[part]).max() > 0, parameter


def test_tolerance_notices_one_wrong_element():
    want = np.ones(1000)
    got = want.copy()
    got[7] += 1e-6
    with pytest.raises(AssertionError, match="gradient"):
        assert_near(got, want, 1e-11, "gradient")
    with pytest.raises(AssertionError, match="inf"):
        assert_near(np.full(1000, np.nan), want, 1e-11, "gradient")


# --- laws of linear layers, on geometries that hypothesis chooses ----------------------------------------------------

small, pairs = st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3))
few = settings(max_examples=10)


@st.composite
def images_of(draw: st.DrawFn, layer: Layer, channels: int) -> Case:
    """A case of one layer without bias, on images that it fits."""
    shape = (channels, draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    batch = draw(st.integers(1, 3))
    try:
        layer.output_shape(shape)
    except ShapeError:
        shape = (channels, shape[1] + 6, shape[2] + 6)
    return Case(f"drawn {layer} {shape} {batch}", shape, (layer,), batch)


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    """Any convolution without bias."""
    groups, inputs, outputs = draw(small), draw(small), draw(small)
    padding = draw(st.sampled_from(["same", "valid"]) | st.tuples(st.integers(0, 4), st.integers(0, 4)))
    layer = Conv2d(
        groups * inputs,
        groups * outputs,
        draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        1 if padding == "same" else draw(pairs),
        padding,
        draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        groups,
        bias=False,
    )
    return draw(images_of(layer, groups * inputs))


@st.composite
def poolings(draw: st.DrawFn, kind: type[MaxPool2d | AvgPool2d]) -> Case:
    """Any pooling of one type."""
    kernel = draw(pairs)
    padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
    stride = draw(st.none() | pairs)
    counted = () if kind is MaxPool2d else (draw(st.booleans()),)
    return draw(images_of(kind(kernel, stride, padding, *counted), draw(small)))


@st.composite
def dense_layers(draw: st.DrawFn) -> Case:
    """Any dense layer without bias."""
    sizes = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    return Case(f"drawn dense {sizes}", (sizes[0],), (Dense(*sizes, bias=False),), draw(small))


linear = convolutions() | poolings(AvgPool2d) | dense_layers()


@every_engine
@few
@given(case=convolutions() | poolings(MaxPool2d) | poolings(AvgPool2d) | dense_layers())
def test_equals_pytorch_in_any_geometry(entry, case):
    equals_pytorch(entry.make(1), entry.finest, case)


@every_engine
@few
@given(case=linear, a=st.floats(-2, 2), b=st.floats(-2, 2))
def test_layers_without_bias_are_linear(entry, case, a, b):
    x, z = case.images(), case.images()[::-1]
    y_x, y_z, y = (outputs_on(entry, case, images) for images in (x, z, a * x + b * z))
    assert np.abs(y - (a * y_x + b * y_z)).max() <= tolerance(entry) * (np.abs(y_x).max() + np.abs(y_z).max())


@every_engine
@few
@given(case=linear)
def test_backward_is_the_adjoint_of_forward(entry, case):
    """<y, dy> = <x, dx>, and the same by the weights, of which y is linear too."""
    step = one_step(entry, case)
    params, want = case.params(), np.vdot(step.outputs, case.slopes())
    for parameter, part in params.slices.items():
        got = np.vdot(params[parameter], step.gradient[part])
        assert abs(got - want) <= tolerance(entry) * np.linalg.norm(step.outputs) * np.linalg.norm(case.slopes())


@every_engine
@few
@given(case=poolings(MaxPool2d))
def test_max_pooling_is_homogeneous(entry, case):
    """Of degree one: <y, dy> = <x, dx> (Euler), and twice the image gives twice the maximum."""
    step = one_step(entry, case)
    error = np.vdot(step.outputs, case.slopes()) - np.vdot(case.params().flat, step.gradient)
    assert abs(error) <= tolerance(entry) * np.linalg.norm(step.outputs) * np.linalg.norm(case.slopes())
    assert_near(outputs_on(entry, case, 2 * case.images()), 2 * step.outputs, tolerance(entry), "outputs")


def one_step(entry: Entry, case: Case) -> Step:
    executor = executor_of(entry.make(1), entry.finest, case.model, case.params())
    return step_on(executor, case.deltas, case.slopes(), case.rng)


def outputs_on(entry: Entry, case: Case, images: np.ndarray) -> np.ndarray:
    params = case.params()
    params["0.weight"][...] = case.weights_of(images)
    executor = executor_of(entry.make(1), entry.finest, case.model, params)
    return executor.loss_and_grads(case.deltas, case.slopes(), Inner(), 1.0, case.rng).logits


def tolerance(entry: Entry) -> float:
    return 1e-11 if entry.finest == "fp64" else 1e-4
