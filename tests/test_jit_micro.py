"""The micro-kernels against NumPy, on every instruction set that runs here.

Operands are small integers where sums are compared: products and sums are then exact in float32 and bf16, whatever the
order, so that the comparison is exact too. What a kernel must not read holds NaN, what it must not write a sentinel.
"""

import ctypes
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from convolt.engines.jit import isa as instruction_sets
from convolt.engines.jit.amx import AmxGemm, amx, configure, release
from convolt.engines.jit.bf16 import Pairs, bf16_of_float32, float32_of_bf16, pack_pairs, to_bf16
from convolt.engines.jit.blocking import blocking, parts
from convolt.engines.jit.codegen import assembly
from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.dot import Dot, dot
from convolt.engines.jit.gemm import Gemm, gemm
from convolt.engines.jit.memory import address_of, bits_of_float32, float32_of_bits, float64_of_bits, view
from convolt.engines.jit.transpose import Transpose, transpose
from convolt.errors import EngineError
from convolt.params import aligned_zeros

SENTINEL = 77.0
STARTS = ("zero", "load", "bias")


def available():
    for name in ("avx512", "avx2", "neon", "plain"):
        try:
            yield instruction_sets.detect(name)
        except EngineError:
            continue


@pytest.fixture(scope="module", params=list(available()), ids=lambda isa: isa.name)
def compiler(request, tmp_path_factory):
    return Compiler(request.param, tmp_path_factory.mktemp(request.param.name))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """A compiler for a CPU with AMX."""
    isa = instruction_sets.detect()
    if not (isa.amx and instruction_sets.request_amx()):
        pytest.skip("no AMX here")
    return Compiler(isa, tmp_path_factory.mktemp("amx"))


def run(compiler, factory, spec, *arguments, chunk=0):
    """Call ``factory(spec)`` with the addresses of arrays and with integers."""
    values = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    block = np.array(values, np.int64)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    function(compiler.kernel(factory, spec).address)(block.ctypes.data, chunk, 0)


def integers(size, seed=0, low=-4, high=5):
    """Small whole numbers, aligned to 64 bytes."""
    x = aligned_zeros(size, np.float32)
    x[:] = np.random.default_rng(seed).integers(low, high, size)
    return x


def started(spec, c, bias):
    """What the sums of a block of C start from."""
    return {"zero": 0.0, "load": c.astype(np.float64), "bias": bias.astype(np.float64)}[spec.start]


def bf16(x):
    return torch.from_numpy(np.array(x)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def as_bf16(x):
    """The bf16 form of an array, aligned."""
    y = aligned_zeros(x.size, np.uint16).reshape(x.shape)
    y[...] = bf16(x)
    return y


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


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    a, b, c = integers(1, low=1), integers(80), integers(4)
    b[:4] = [np.nan, -1, 2, np.inf]
    run(
        compiler,
        gemm_kernel,
        Gemm(1, 4, 1, 1, 1, 0, 4, 0, 4, compiler.isa.lanes, relu=True),
        np.ones(1, "f4"),
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


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "start", "relu"),
    [(1, 1, 1, "zero", False), (5, 3, 77, "bias", True), (4, 4, 64, "load", False), (2, 1, 15, "load", True)],
)
def test_dot(compiler, rows, columns, depth, start, relu):
    stride = depth + 3
    a, b = integers(rows * stride, 1).reshape(rows, stride), integers(columns * stride, 2).reshape(columns, stride)
    a[:, depth:] = b[:, depth:] = np.nan
    c, bias = np.full((rows, columns + 2), SENTINEL, np.float32), integers(columns, 3)
    spec = Dot(rows, columns, depth, stride, stride, columns + 2, compiler.isa.lanes, start, relu)
    expected = started(spec, c[:, :columns], bias) + a[:, :depth].astype(np.float64) @ b[:, :depth].T
    run(compiler, dot_kernel, spec, a, b, c, bias)
    np.testing.assert_array_equal(c[:, :columns], np.maximum(expected, 0) if relu else expected)
    assert (c[:, columns:] == SENTINEL).all()


# -- AMX --------------------------------------------------------------------------------------------------------------


def amx_kernel(spec):
    shape, multiply = configure(spec), amx(spec)

    def kernel(arguments, chunk, thread):
        shape()
        multiply(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4])
        release()

    return kernel


def pack_kernel(spec):
    pack = pack_pairs(spec)

    def kernel(arguments, chunk, thread):
        pack(arguments[0], arguments[1])

    return kernel


@pytest.mark.parametrize(
    ("rows", "columns", "step", "steps", "segments", "start"),
    [
        (32, 32, 32, 2, 3, "zero"),
        (16, 16, 32, 1, 1, "load"),
        (20, 32, 24, 3, 2, "bias"),
        (7, 21, 16, 1, 2, "bias"),
        (32, 5, 2, 5, 1, "load"),
        (1, 1, 32, 1, 1, "zero"),
    ],
)
def test_amx(tiles, rows, columns, step, steps, segments, start):
    column_tiles = -(-columns // 16)
    depth, b_step, c_row = step * steps, column_tiles * step * 16, columns + 16
    a, b = integers(rows * segments * depth, 1).reshape(rows, -1), integers(segments * depth * columns, 2)
    b = b.reshape(-1, columns)
    packed = aligned_zeros(segments * steps * b_step, np.uint16).reshape(-1, b_step)
    for t in range(segments * steps):
        pairs = Pairs(step, columns, columns, 32, step * 16, "fp32")
        run(tiles, pack_kernel, pairs, b[t * step :], packed[t])
    c, bias = np.full((rows, c_row), SENTINEL, np.float32), integers(columns, 3)
    spec = AmxGemm(
        *(rows, columns, step, steps, segments * depth, step, depth),
        *(b_step, step * 16, steps * b_step, c_row, start),
    )
    expected = started(spec, c[:, :columns], bias) + a.astype(np.float64) @ b
    run(tiles, amx_kernel, spec, as_bf16(a), packed, c, bias, segments)
    np.testing.assert_array_equal(c[:, :columns], expected)
    assert (c[:, columns:] == SENTINEL).all()


def test_amx_tiles_apart(tiles):
    """Two image rows of 8 pixels each are one block; the pixels between them are neither read nor written."""
    C, K, W, gap = 32, 16, 8, 2
    x, w = integers(2 * (W + gap) * C, 1).reshape(2, W + gap, C), integers(C * K, 2).reshape(C, K)
    x[:, W:] = np.nan
    packed = aligned_zeros(C * K, np.uint16)
    run(tiles, pack_kernel, Pairs(C, K, K, 32, C * 16, "fp32"), w, packed)
    y = np.full((2, W + gap, K), SENTINEL, np.float32)
    spec = AmxGemm(2 * W, K, C, 1, C, 0, 0, 0, C * 16, 0, K, tile=W, a_tile=(W + gap) * C, c_tile=(W + gap) * K)
    run(tiles, amx_kernel, spec, as_bf16(x), packed, y, 0, 1)
    np.testing.assert_array_equal(y[:, :W], x[:, :W] @ w)
    assert (y[:, W:] == SENTINEL).all()


# -- bf16 and layouts -------------------------------------------------------------------------------------------------


def to_bf16_kernel(spec):
    count, lanes, native = spec
    convert = to_bf16(count, lanes, native)

    def kernel(arguments, chunk, thread):
        convert(arguments[0], arguments[1])

    return kernel


def plain_loop_kernel(count):
    def kernel(arguments, chunk, thread):
        x = view(arguments[0], (count,), np.float32)
        y = view(arguments[1], (count,), np.uint16)
        back = view(arguments[2], (count,), np.float32)
        for i in range(count):
            y[i] = bf16_of_float32(x[i])
            back[i] = float32_of_bf16(y[i])

    return kernel


def any_numbers(count):
    """Random bits: numbers of every size, NaN, infinities, and exact ties; no denormal ones."""
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 2**32, count, np.uint64).astype(np.uint32)
    bits[: count // 2] = bits[: count // 2] & 0xFFFF0000 | 0x8000
    bits[:4] = [0x7F800000, 0xFF800000, 0x7F800001, 0x80000000]
    x = bits.view(np.float32)
    x[(np.abs(x) < np.finfo(np.float32).tiny)] = 0
    return x


def same_bf16(actual, expected):
    """Equal bits, but any NaN is as good as another."""
    values = [(bits.astype(np.uint32) << 16).view(np.float32) for bits in (actual, expected)]
    np.testing.assert_array_equal(*values)
    finite = ~np.isnan(values[1])
    np.testing.assert_array_equal(actual[finite], expected[finite])


@pytest.mark.parametrize("native", [False, True])
def test_conversion_to_bf16(compiler, native):
    if native and not compiler.isa.bf16_convert:
        pytest.skip("this instruction set has no conversion to bf16")
    x = any_numbers(4099)
    y = np.full(4100, 7, np.uint16)
    run(compiler, to_bf16_kernel, (4099, compiler.isa.lanes, native), x, y)
    same_bf16(y[:-1], bf16(x))
    assert y[-1] == 7


def test_conversion_in_plain_loops(compiler):
    x, y, back = any_numbers(4099), np.zeros(4099, np.uint16), np.zeros(4099, np.float32)
    run(compiler, plain_loop_kernel, 4099, x, y, back)
    same_bf16(y, bf16(x))
    np.testing.assert_array_equal(back, torch.from_numpy(x).to(torch.bfloat16).float().numpy())


@pytest.mark.parametrize("source", ["fp32", "bf16"])
@pytest.mark.parametrize(("depth", "columns"), [(8, 32), (7, 21)])
def test_pack_pairs(tiles, source, depth, columns):
    column_tiles, even_depth = -(-columns // 16), depth + depth % 2
    x = integers(depth * (columns + 1)).reshape(depth, columns + 1)
    y = np.full((column_tiles, even_depth // 2, 16, 2), 7, np.uint16)
    spec = Pairs(depth, columns, columns + 1, 32, even_depth * 16, source)
    run(tiles, pack_kernel, spec, x if source == "fp32" else bf16(x), y)
    full = np.zeros((even_depth, column_tiles * 16), np.float32)
    full[:depth, :columns] = x[:, :columns]
    expected = full.reshape(even_depth // 2, 2, column_tiles, 16).transpose(2, 0, 3, 1)
    np.testing.assert_array_equal(y, bf16(expected))


def transpose_kernel(spec):
    turn = transpose(spec)

    def kernel(arguments, chunk, thread):
        turn(arguments[0], arguments[1])

    return kernel


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 16), (37, 21), (70, 40)])
def test_transpose(compiler, rows, columns):
    x = integers(rows * (columns + 1)).reshape(rows, columns + 1)
    y = np.full((columns, rows + 1), SENTINEL, np.float32)
    run(compiler, transpose_kernel, Transpose(rows, columns, columns + 1, rows + 1, compiler.isa.lanes), x, y)
    np.testing.assert_array_equal(y[:, :rows], x[:, :columns].T)
    assert (y[:, rows:] == SENTINEL).all()


@pytest.mark.parametrize("source", ["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "columns"), [(32, 16), (37, 21), (70, 5)])
def test_transpose_to_bf16(compiler, source, rows, columns):
    even = rows + rows % 2
    x = integers(rows * (columns + 1)).reshape(rows, columns + 1)
    y = np.full((columns, even + 2), 7, np.uint16)
    spec = Transpose(
        rows, columns, columns + 1, even + 2, compiler.isa.lanes, source, "bf16", compiler.isa.bf16_convert
    )
    run(compiler, transpose_kernel, spec, x if source == "fp32" else bf16(x), y)
    np.testing.assert_array_equal(y[:, :rows], bf16(x[:, :columns].T))
    assert (y[:, rows:even] == 0).all()
    assert (y[:, even:] == 7).all()


# -- blocking ---------------------------------------------------------------------------------------------------------


@given(total=st.integers(1, 500), most=st.integers(1, 40))
def test_parts_are_equal_and_few(total, most):
    sizes = parts(total, most)
    assert sum(sizes) == total
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert (len(sizes) - 1) * most < total


@given(rows=st.integers(1, 300), columns=st.integers(1, 600), isa=st.sampled_from(list(available())))
def test_blocks_fit_the_registers_and_the_work(rows, columns, isa):
    m, vectors = blocking(rows, columns, isa)
    assert m * vectors + vectors + 1 <= isa.registers
    assert m <= rows
    assert (vectors - 1) * isa.lanes < columns


def test_blocks_measured_to_be_good():
    isa = instruction_sets.Isa("avx512", 16, 32)
    assert {(rows, columns): blocking(rows, columns, isa) for rows, columns in ((28, 32), (16, 48), (16, 16))} == {
        (28, 32): (10, 2),
        (16, 48): (8, 3),
        (16, 16): (16, 1),
    }
