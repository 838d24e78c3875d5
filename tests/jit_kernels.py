"""What the tests of micro-kernels share: compilers for every instruction set that runs here, calls, operands.

Operands are small integers where sums are compared: products and sums are then exact in float32 and bf16, whatever the
order, so that the comparison is exact too. What a kernel must not read holds NaN, what it must not write a sentinel.
"""

import ctypes

import numpy as np
import torch

from convolt.engines.jit import isa as instruction_sets
from convolt.engines.jit.bf16 import Pairs, pack_pairs, to_bf16
from convolt.engines.jit.blocks import BlockGemm, block_gemm, configure, release
from convolt.errors import EngineError
from convolt.params import aligned_zeros

SENTINEL = 77.0


def available():
    for name in ("avx512", "avx2", "neon", "plain"):
        try:
            yield instruction_sets.detect(name)
        except EngineError:
            continue


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


# --- bf16 ------------------------------------------------------------------------------------------------------------


def bf16(x):
    return torch.from_numpy(np.array(x)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def as_bf16(x):
    """The bf16 form of an array, aligned."""
    y = aligned_zeros(x.size, np.uint16).reshape(x.shape)
    y[...] = bf16(x)
    return y


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


def to_bf16_kernel(spec):
    count, lanes, native = spec
    convert = to_bf16(count, lanes, native)

    def kernel(arguments, chunk, thread):
        convert(arguments[0], arguments[1])

    return kernel


def check_conversion(compiler, native):
    """Rounded as PyTorch rounds, and not a number too many: behind whole vectors there are three, or one."""
    for count in (4099, 4097):
        x = any_numbers(count)
        y = np.full(count + 1, 7, np.uint16)
        run(compiler, to_bf16_kernel, (count, compiler.isa.lanes, native), x, y)
        same_bf16(y[:-1], bf16(x))
        assert y[-1] == 7


def product_kernel(spec):
    shape, multiply, done = configure(spec), block_gemm(spec), release(spec.unit)

    def kernel(arguments, chunk, thread):
        shape()
        multiply(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4])
        done()

    return kernel


def pack_kernel(spec):
    pack = pack_pairs(spec)

    def kernel(arguments, chunk, thread):
        pack(arguments[0], arguments[1])

    return kernel


def check_product(compiler, unit, rows, columns, step, steps, segments, start):
    """A block of C equals NumPy's; what lies beside it is left alone."""
    column_tiles = -(-columns // 16)
    depth, b_step, c_row = step * steps, column_tiles * step * 16, columns + 16
    a, b = integers(rows * segments * depth, 1).reshape(rows, -1), integers(segments * depth * columns, 2)
    b = b.reshape(-1, columns)
    packed = aligned_zeros(segments * steps * b_step, np.uint16).reshape(-1, b_step)
    for t in range(segments * steps):
        pairs = Pairs(step, columns, columns, 32, step * 16, "fp32", instruction_sets.converts(unit))
        run(compiler, pack_kernel, pairs, b[t * step :], packed[t])
    c, bias = np.full((rows, c_row), SENTINEL, np.float32), integers(columns, 3)
    spec = BlockGemm(
        *(unit, rows, columns, step, steps, segments * depth, step, depth),
        *(b_step, step * 16, steps * b_step, c_row, start),
    )
    expected = started(spec, c[:, :columns], bias) + a.astype(np.float64) @ b
    run(compiler, product_kernel, spec, as_bf16(a), packed, c, bias, segments)
    np.testing.assert_array_equal(c[:, :columns], expected)
    assert (c[:, columns:] == SENTINEL).all()
