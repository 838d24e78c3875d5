"""The fp32 micro-kernels against NumPy and PyTorch, on every instruction set that runs here."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jit_kernels import SENTINEL, available, bf16, integers, run, started
from numpy.lib.stride_tricks import as_strided

from convolt.engines.jit.codegen import assembly
from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.dot import Dot, dot
from convolt.engines.jit.gemm import Gemm, gemm
from convolt.engines.jit.memory import address_of, bits_of_float32, float32_of_bits, float64_of_bits, view
from convolt.params import aligned_zeros

STARTS = ("zero", "load", "bias")


@pytest.fixture(scope="module", params=list(available()), ids=lambda isa: isa.name)
def compiler(request, tmp_path_factory):
    return Compiler(request.param, tmp_path_factory.mktemp(request.param.name))


# -- memory -----------------------------------------------------------------------------------------------------------


def affine(shape):
    H, W, C = shape

    def kernel(arguments, chunk, thread):
        x = view(arguments[0], (3, H, W, C), np.float32)[chunk]
        y = view(address_of(view(arguments[1], (3, H, W, C), np.float64), (chunk, 0, 0, 0)), (H, W, C), np.float64)
        factor = float64_of_bits(arguments[2])
        for h in range(H):
            for w in range(W):
                for c in range(C):
                    y[h, w, c] = factor * x[h, w, c] + 1

    return kernel


def flip_sign(count):
    def kernel(arguments, chunk, thread):
        x = view(arguments[0], (count,), np.float32)
        for i in range(count):
            x[i] = float32_of_bits(bits_of_float32(x[i]) ^ np.uint32(0x80000000))

    return kernel


def test_views_address_the_memory_that_is_given(compiler):
    x, y = integers(3 * 4 * 5 * 7).reshape(3, 4, 5, 7), np.full((3, 4, 5, 7), SENTINEL)
    run(compiler, affine, (4, 5, 7), x, y, int(np.float64(2.5).view(np.int64)), chunk=1)
    np.testing.assert_array_equal(y[1], 2.5 * x[1] + 1)
    assert (y[[0, 2]] == SENTINEL).all()


def test_bits_and_numbers_are_the_same_memory(compiler):
    x = integers(19)
    expected = -x
    run(compiler, flip_sign, 19, x)
    np.testing.assert_array_equal(x, expected)


def test_views_leave_nothing_of_the_runtime_in_the_code(compiler):
    text = assembly(affine((4, 5, 64)), compiler.isa)
    assert "NRT_" not in text
    assert "Py" not in text


# -- gemm -------------------------------------------------------------------------------------------------------------


def gemm_kernel(spec):
    multiply = gemm(spec)

    def kernel(arguments, chunk, thread):
        multiply(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4])

    return kernel


def check_gemm(compiler, spec, segments):
    """All of C's memory, the gaps between its rows included."""
    a = integers(segments * spec.a_segment + spec.rows * spec.a_row + spec.depth * spec.a_depth + 1, seed=1)
    b = integers(max(segments, 1) * spec.b_segment + spec.depth * spec.b_depth + 64, seed=2)
    c, bias = integers(spec.rows * spec.c_row + 64, seed=3), integers(spec.columns, seed=4)
    if spec.start != "load":
        c[:] = SENTINEL
    strided_a = as_strided(
        a, (segments, spec.rows, spec.depth), [4 * s for s in (spec.a_segment, spec.a_row, spec.a_depth)]
    )
    strided_b = as_strided(b, (segments, spec.depth, spec.b_depth), [4 * spec.b_segment, 4 * spec.b_depth, 4])
    if spec.columns < spec.b_depth:
        strided_b[:, :, spec.columns :] = np.nan
    expected = c.astype(np.float64)
    block = as_strided(expected, (spec.rows, spec.columns), [8 * spec.c_row, 8])
    sums = (strided_a.astype(np.float64) @ strided_b[:, :, : spec.columns].astype(np.float64)).sum(0)
    block[...] = started(spec, as_strided(c, block.shape, [4 * spec.c_row, 4]), bias) + sums
    if spec.relu:
        block[...] = np.maximum(block, 0)
    run(compiler, gemm_kernel, spec, a, b, c, bias, segments)
    np.testing.assert_array_equal(c, expected)


def contiguous(rows, columns, depth, lanes, segments=1, b_gap=0, **options):
    """A [rows, segments*depth] and B [segments*depth, columns + gap], both row by row."""
    width = columns + b_gap
    return Gemm(rows, columns, depth, segments * depth, 1, depth, width, depth * width, columns + 3, lanes, **options)


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "segments", "start", "relu"),
    [
        (1, 1, 1, 1, "zero", False),
        (6, 64, 37, 3, "bias", True),
        (5, 33, 9, 3, "load", False),
        (3, 17, 130, 1, "zero", True),
        (13, 5, 64, 2, "bias", False),
        (2, 48, 203, 0, "bias", True),
    ],
)
def test_gemm(compiler, rows, columns, depth, segments, start, relu):
    lanes = compiler.isa.lanes
    spec = contiguous(rows, columns, depth, lanes, max(segments, 1), b_gap=5, start=start, relu=relu)
    check_gemm(compiler, spec, segments)


def test_gemm_as_the_gradient_of_weights(compiler):
    """Rows are channels, depth is pixels: A is read along its columns."""
    C, W, K, H = 6, 9, 20, 4
    check_gemm(compiler, Gemm(C, K, W, 1, C, (W + 2) * C, K, W * K, K, compiler.isa.lanes, start="load"), H)


def test_gemm_as_a_convolution(compiler):
    H, W, C, R, S, K = 4, 9, 3, 5, 5, 20
    x, w = integers((H + R - 1) * (W + S - 1) * C, 1), integers(R * S * C * K + 64, 2)
    bias, y = integers(K, 3), aligned_zeros(W * K, np.float32)
    spec = Gemm(W, K, S * C, C, 1, (W + S - 1) * C, K, S * C * K, K, compiler.isa.lanes, start="bias", relu=True)
    run(compiler, gemm_kernel, spec, x, w, y, bias, R)
    images = torch.from_numpy(x.reshape(1, H + R - 1, W + S - 1, C)).permute(0, 3, 1, 2)
    filters = torch.from_numpy(w[: R * S * C * K].reshape(R, S, C, K)).permute(3, 2, 0, 1)
    expected = torch.relu(torch.conv2d(images, filters, torch.from_numpy(bias)))[0, :, 0].T
    np.testing.assert_array_equal(y.reshape(W, K), expected.numpy())


@settings(max_examples=12)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 50), st.integers(1, 70)),
    gaps=st.tuples(*[st.integers(0, 3)] * 5),
    segments=st.integers(1, 4),
    by_column=st.booleans(),
    start=st.sampled_from(STARTS),
    relu=st.booleans(),
    unroll=st.integers(1, 5),
)
def test_gemm_with_any_strides(compiler, size, gaps, segments, by_column, start, relu, unroll):
    rows, columns, depth = size
    a_row, a_depth = (1, rows + gaps[0]) if by_column else (depth + gaps[0], 1)
    a_segment, b_depth = rows * depth + gaps[1], columns + gaps[2]
    spec = Gemm(
        *(rows, columns, depth, a_row, a_depth, a_segment, b_depth, depth * b_depth + gaps[3], columns + gaps[4]),
        *(compiler.isa.lanes, start, relu, unroll),
    )
    check_gemm(compiler, spec, segments)


def test_every_blocking_gives_the_same_bits(compiler):
    """One accumulator for an element, always in the same order."""
    lanes, depth = compiler.isa.lanes, 150
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(size).astype(np.float32) for size in (6 * depth, depth * 3 * lanes + 64))
    whole, parted = (np.zeros((6, 3 * lanes), np.float32) for _ in range(2))
    run(
        compiler, gemm_kernel, Gemm(6, 3 * lanes, depth, depth, 1, 0, 3 * lanes, 0, 3 * lanes, lanes), a, b, whole, 0, 1
    )
    narrow = Gemm(2, lanes, depth, depth, 1, 0, 3 * lanes, 0, 3 * lanes, lanes, unroll=7)
    for m, j in product(range(0, 6, 2), range(0, 3 * lanes, lanes)):
        run(compiler, gemm_kernel, narrow, a[m * depth :], b[j:], parted.reshape(-1)[m * 3 * lanes + j :], 0, 1)
    np.testing.assert_array_equal(whole, parted)


def test_relu_keeps_nan(compiler):
    a, b, c = np.ones(1, np.float32), integers(80), integers(4)
    b[:4] = [np.nan, -1, 2, np.inf]
    run(
        compiler,
        gemm_kernel,
        Gemm(1, 4, 1, 1, 1, 0, 4, 0, 4, compiler.isa.lanes, relu=True),
        a,
        b,
        c,
        0,
        1,
    )
    np.testing.assert_array_equal(c, [np.nan, 0, 2, np.inf])


# -- dot --------------------------------------------------------------------------------------------------------------


def dot_kernel(spec):
    multiply = dot(spec)

    def kernel(arguments, chunk, thread):
        multiply(arguments[0], arguments[1], arguments[2], arguments[3])

    return kernel


@pytest.mark.parametrize("source", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("rows", "columns", "depth", "start", "relu"),
    [(1, 1, 1, "zero", False), (5, 3, 77, "bias", True), (4, 4, 64, "load", False), (2, 1, 15, "load", True)],
)
def test_dot(compiler, rows, columns, depth, start, relu, source):
    stride = depth + 3
    a, b = integers(rows * stride, 1).reshape(rows, stride), integers(columns * stride, 2).reshape(columns, stride)
    a[:, depth:] = b[:, depth:] = np.nan
    c, bias = np.full((rows, columns + 2), SENTINEL, np.float32), integers(columns, 3)
    spec = Dot(rows, columns, depth, stride, stride, columns + 2, compiler.isa.lanes, start, relu, source)
    expected = started(spec, c[:, :columns], bias) + a[:, :depth].astype(np.float64) @ b[:, :depth].T
    run(compiler, dot_kernel, spec, a, bf16(b) if source == "bf16" else b, c, bias)
    np.testing.assert_array_equal(c[:, :columns], np.maximum(expected, 0) if relu else expected)
    assert (c[:, columns:] == SENTINEL).all()
