"""Convolutions by dot products of bf16 pairs, tap by tap and by Winograd's algorithm, against float64."""

from dataclasses import replace

import numpy as np
import pytest
from engine_cases import UNITS
from engine_checks import adds_gradients, executor_of, needs_no_input_gradient, reuses_buffers, step_on
from hypothesis import given, settings
from hypothesis import strategies as st
from jit_cases import (
    EVERY_RUN,
    FIRST,
    PAIRS,
    Rounded,
    empty_batch_has_no_gradient,
    equals_float64,
    equals_float64_as_first_layer,
    on_tiles,
    poisoned,
)

from convolt.engines import JIT
from convolt.engines.jit import convolutions
from convolt.engines.jit.kernels.pairs import BehindFrame
from convolt.engines.jit.kernels.specs import ConvSpec, Frame, Windowing
from convolt.layers import Conv2d, Flatten, LeakyReLU, MaxPool2d, ReLU
from convolt.model import Model
from convolt.params import Params

pytestmark = pytest.mark.skipif("dot" not in UNITS, reason="this CPU has no dot products of bf16 pairs (AVX512-BF16)")
TAPS, TILES = "an odd width, channels that fill no tile", "tiles in pairs"


def some(cases, quick=EVERY_RUN):
    """Names of cases; slow ones are those that a run can do without."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in cases]
    )


def engine(threads: int = 2) -> JIT:
    return JIT(threads=threads, unit="dot")


@some(PAIRS, quick=(TAPS, TILES, "whole tiles"))
def test_pairs_equal_float64_of_the_same_operands(name):
    equals_float64(PAIRS[name], "dot")


@some(FIRST)
def test_pairs_of_a_first_layer_equal_float64(name):
    equals_float64_as_first_layer(FIRST[name], "dot")


@some(PAIRS, (TAPS, TILES))
def test_pairs_add_gradients(name):
    adds_gradients(engine(), "bf16", PAIRS[name])


@some(PAIRS, (TAPS, TILES))
def test_no_pair_is_read_before_it_is_written(name):
    with poisoned():
        equals_float64(PAIRS[name], "dot")


@some(PAIRS, ())
def test_images_need_no_gradient(name):
    needs_no_input_gradient(engine(), "bf16", PAIRS[name])


@pytest.mark.parametrize("name", [TAPS, TILES])
def test_threads_leave_the_bits(name):
    case, results = replace(PAIRS[name], batch=19), set()
    for threads in (1, 2, 3):
        executor = executor_of(engine(threads), "bf16", case.model, case.params())
        step = step_on(executor, case.deltas, case.slopes(), case.rng)
        results.add((step.outputs.tobytes(), step.gradient.tobytes()))
        executor.close()
    assert len(results) == 1


def test_large_transformed_filters_have_few_parts_of_their_gradient(monkeypatch):
    monkeypatch.setattr(convolutions, "LARGE_PART", 1000)
    equals_float64(replace(PAIRS[TILES], batch=18), "dot")


def test_cases_come_to_every_kernel():
    """A case that goes by float32 shows nothing."""
    kernels = {
        kernel
        for case in PAIRS.values()
        for stage in engine().explain(case.model, "bf16", case.batch).stages
        if "AVX512-BF16" in stage.reason
        for kernel in stage.kernels
    }
    assert kernels >= {"conv:conv_forward", "conv:conv_backward", "winograd:forward", "winograd:backward"}


@pytest.mark.parametrize("name", [TAPS, TILES])
def test_an_empty_batch_has_no_gradient(name):
    empty_batch_has_no_gradient("bf16", PAIRS[name], "dot")


def test_scratch_memory_has_room_for_what_lies_behind_the_frame():
    """Whatever the geometry, with the vector that a product may read behind the last word."""
    generator = np.random.default_rng(0)
    for _ in range(2000):
        C, K, R, stride, dilation, padding = (int(n) for n in generator.integers(1, [70, 70, 8, 5, 3, 6]))
        size = dilation * (R - 1) + 1 + int(generator.integers(0, 30))
        P = (size + 2 * padding - dilation * (R - 1) - 1) // stride + 1
        high = size + 2 * padding
        x, y = Frame(C, size, size, high, high, padding * (high + 1) * C), Frame(K, P, P, P, P, 0)
        window = Windowing(R, R, stride, stride, padding, padding, dilation, dilation)
        spec = ConvSpec(x, y, window, 1, K, P, P, True, 0.0, (1, 1), 4, 16, 32, pairs=True)
        behind = BehindFrame.of(spec).slopes + P * -(-P // 2) * K + spec.lanes
        assert spec.pool_buffer + max(behind, C * high * high // 2 + 1) <= spec.scratch


def test_few_images_are_predicted_in_float32():
    """They are cut into parts, which pairs are not: the same bits as in a run that asks for float32."""
    model = Model((4, 7, 7), (Conv2d(4, 6, 3), ReLU(), Flatten()))
    x, params = np.random.default_rng(0).random((2, 4, 7, 7)), Params.init(model, 0, np.float32)
    got, want = (executor_of(engine(), precision, model, params).predict(x) for precision in ("bf16", "fp32"))
    np.testing.assert_array_equal(got, want)


@st.composite
def paired(draw: st.DrawFn) -> Rounded:
    """Any convolution, and sometimes what is fused behind it; one in three is fit for Winograd's algorithm."""
    batch = draw(st.integers(1, 6))
    if draw(st.integers(0, 2)) == 0:
        kernel, dilation = draw(st.tuples(st.integers(2, 7), st.integers(2, 7))), draw(st.integers(1, 2))
        sizes = (2 * draw(st.integers(8, 40)), *(dilation * (k - 1 + draw(st.integers(1, 9))) for k in kernel))
        options = {"padding": dilation * draw(st.integers(0, 2)), "dilation": dilation, "bias": draw(st.booleans())}
        return on_tiles(sizes, 2 * draw(st.integers(8, 40)), kernel, batch=batch, **options)
    groups = draw(st.integers(1, 3))
    channels, filters = groups * draw(st.integers(1, 35)), groups * draw(st.integers(1, 35))
    kernel, dilation = draw(st.tuples(st.integers(1, 7), st.integers(1, 7))), draw(st.integers(1, 2))
    height, width = (dilation * (size - 1) + draw(st.integers(1, 9)) for size in kernel)
    stride, padding = (
        draw(st.tuples(st.integers(low, high), st.integers(low, high))) for low, high in ((1, 3), (0, 4))
    )
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    behind = draw(st.sampled_from([(), (ReLU(),), (LeakyReLU(0.25),), (ReLU(), MaxPool2d(2)), (MaxPool2d(2),)]))
    case = on_tiles((channels, height, width), filters, kernel, batch=batch, bias=draw(st.booleans()), **options)
    _, P, Q = case.layers[0].output_shape(case.shape)
    if behind and isinstance(behind[-1], MaxPool2d) and min(P, Q) < 2:
        behind = behind[:-1]
    return replace(case, name=f"{case.name} {behind}", layers=(*case.layers, *behind))


@pytest.mark.slow
@settings(max_examples=60)
@given(case=paired())
def test_pairs_equal_float64_in_any_geometry(case):
    equals_float64(case, "dot")


@pytest.mark.slow
@settings(max_examples=15)
@given(case=paired())
def test_pairs_survive_other_batch_sizes(case):
    reuses_buffers(engine(), "bf16", case)
    adds_gradients(engine(), "bf16", case)
