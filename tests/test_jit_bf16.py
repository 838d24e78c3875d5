"""Products in bf16, conversion to it and its layouts against NumPy and PyTorch, on all that this CPU offers."""

import numpy as np
import pytest
import torch
from jit_kernels import (
    SENTINEL,
    any_numbers,
    as_bf16,
    available,
    bf16,
    check_conversion,
    check_product,
    integers,
    pack_kernel,
    product_kernel,
    run,
    same_bf16,
)

from convolt.engines.jit import isa as instruction_sets
from convolt.engines.jit.bf16 import Pairs, bf16_of_float32, float32_of_bf16
from convolt.engines.jit.blocks import BlockGemm
from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.memory import view
from convolt.engines.jit.transpose import Transpose, transpose
from convolt.params import aligned_zeros


@pytest.fixture(scope="module", params=list(available()), ids=lambda isa: isa.name)
def compiler(request, tmp_path_factory):
    return Compiler(request.param, tmp_path_factory.mktemp(request.param.name))


EVERYWHERE = [(isa, unit) for isa in available() for unit in instruction_sets.units(isa)]


@pytest.fixture(scope="module", params=EVERYWHERE, ids=lambda one: f"{one[0].name} {one[1]}")
def machine(request, tmp_path_factory):
    """A compiler, and a unit that it may use."""
    isa, unit = request.param
    return Compiler(isa, tmp_path_factory.mktemp(unit)), unit


# -- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "step", "steps", "segments", "start"),
    [
        (32, 32, 32, 2, 3, "zero"),
        (16, 16, 32, 1, 1, "load"),
        (20, 32, 24, 3, 2, "bias"),
        (7, 21, 16, 1, 2, "bias"),
        (32, 5, 2, 5, 1, "load"),
        (1, 1, 32, 1, 1, "zero"),
        (32, 32, 32, 3, 7, "bias"),
        (20, 21, 32, 19, 1, "zero"),
        (9, 32, 16, 1, 17, "load"),
    ],
)
def test_product(machine, rows, columns, step, steps, segments, start):
    check_product(*machine, rows, columns, step, steps, segments, start)


def test_rows_in_two_tiles_apart(machine):
    """Two image rows of 8 pixels each are one block; the pixels between them are neither read nor written."""
    compiler, unit = machine
    C, K, W, gap = 32, 16, 8, 2
    x, w = integers(2 * (W + gap) * C, 1).reshape(2, W + gap, C), integers(C * K, 2).reshape(C, K)
    x[:, W:] = np.nan
    packed = aligned_zeros(C * K, np.uint16)
    run(compiler, pack_kernel, Pairs(C, K, K, 32, C * 16, "fp32", instruction_sets.converts(unit)), w, packed)
    y = np.full((2, W + gap, K), SENTINEL, np.float32)
    spec = BlockGemm(unit, 2 * W, K, C, 1, C, 0, 0, 0, C * 16, 0, K, tile=W, a_tile=(W + gap) * C, c_tile=(W + gap) * K)
    run(compiler, product_kernel, spec, as_bf16(x), packed, y, 0, 1)
    np.testing.assert_array_equal(y[:, :W], x[:, :W] @ w)
    assert (y[:, W:] == SENTINEL).all()


# -- bf16 and layouts -------------------------------------------------------------------------------------------------


def plain_loop_kernel(count):
    def kernel(arguments, chunk, thread):
        x = view(arguments[0], (count,), np.float32)
        y = view(arguments[1], (count,), np.uint16)
        back = view(arguments[2], (count,), np.float32)
        for i in range(count):
            y[i] = bf16_of_float32(x[i])
            back[i] = float32_of_bf16(y[i])

    return kernel


@pytest.mark.parametrize("native", [False, True])
def test_conversion_to_bf16(compiler, native):
    if native and not compiler.isa.bf16_convert:
        pytest.skip("this instruction set has no conversion to bf16")
    check_conversion(compiler, native)


def test_conversion_in_plain_loops(compiler):
    x, y, back = any_numbers(4099), np.zeros(4099, np.uint16), np.zeros(4099, np.float32)
    run(compiler, plain_loop_kernel, 4099, x, y, back)
    same_bf16(y, bf16(x))
    np.testing.assert_array_equal(back, torch.from_numpy(x).to(torch.bfloat16).float().numpy())


@pytest.mark.parametrize("source", ["fp32", "bf16"])
@pytest.mark.parametrize(("depth", "columns"), [(8, 32), (7, 21)])
def test_pack_pairs(machine, source, depth, columns):
    compiler, unit = machine
    column_tiles, even_depth = -(-columns // 16), depth + depth % 2
    x = integers(depth * (columns + 1)).reshape(depth, columns + 1)
    y = np.full((column_tiles, even_depth // 2, 16, 2), 7, np.uint16)
    spec = Pairs(depth, columns, columns + 1, 32, even_depth * 16, source, instruction_sets.converts(unit))
    run(compiler, pack_kernel, spec, x if source == "fp32" else bf16(x), y)
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
