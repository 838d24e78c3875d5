"""What the tests of micro-kernels share: compilers for every instruction set that runs here, calls, operands.

Operands are small integers where sums are compared: products and sums are then exact in float32 and bf16, whatever the
order, so that the comparison is exact too. What a kernel must not read holds NaN, what it must not write a sentinel.
"""

import ctypes

import numpy as np

from convolt.engines.jit import isa as instruction_sets
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
