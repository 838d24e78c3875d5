"""The bf16 matrix product, fp32 accumulation: one block of C, by whichever unit of the CPU multiplies bf16.

    C[m, j] = start + sum over s < segments, t < steps, k < step of
              A[m*a_row + t*a_step + s*a_segment + k] * B[t*step + k, j] of segment s

One call computes at most 32 x 32 elements of C. A lies as it is, rows of bf16: a pixel of an NHWC image with 32
channels is a row of 64 bytes, and a tap of the filter is an address. B is packed by `pack_pairs` (the layout Intel
calls VNNI): for each step and each 16 columns a tile [step/2][16][2], two neighbors in k side by side.

The units (isa.py) read the same operands; they differ in speed and in the order of additions. ``amx`` multiplies tiles
(amx.py), ``dot`` and ``fma`` broadcast pairs of A to vectors of B (pair_products.py). Nothing of A and C beyond the
sizes is read or written; B is read in whole rows of 64 bytes.
Align A, B and C to 64 bytes, rows included: a tile row across two cache lines costs up to a factor of 4.
"""

from dataclasses import dataclass
from typing import Any, Literal

from numba import types
from numba.extending import intrinsic

from convolt.engines.jit import amx, pair_products
from convolt.engines.jit.amx import TILE
from convolt.engines.jit.isa import Unit


@dataclass(frozen=True)
class BlockGemm:
    """Sizes and strides, all constants: those of A and B count bf16 elements, `c_row` fp32 elements.

    unit: what multiplies. rows, columns: 1 to 32. step: the depth of one tile product, even, at most 32. steps: those
    of a segment. b_tile: from one 16 columns to the next, within a step. start: zero, C as it is (load), one of these
    as the call says (either), or bias[columns].
    The rows lie in one tile or two; the second begins `a_tile` and `c_tile` behind the first, by default where its
    `tile` rows end. An image 8 pixels wide: rows=16, tile=8, a_tile=c_tile=one image row.
    apart: on AMX one tile of rows after the other; other units do not look at it. B is read once for each, but fewer
    tiles hold something at a time: faster while the core is slow (amx.py), provided B stays in the L1 cache.
    """

    unit: Unit
    rows: int
    columns: int
    step: int
    steps: int
    a_row: int
    a_step: int
    a_segment: int
    b_step: int
    b_tile: int
    b_segment: int
    c_row: int
    start: Literal["zero", "load", "either", "bias"] = "zero"
    tile: int = TILE
    a_tile: int | None = None
    c_tile: int | None = None
    apart: bool = False

    @property
    def row_tiles(self) -> tuple[int, ...]:
        """Rows of each tile: 20 -> (16, 4)."""
        return _parts(self.rows, self.tile)

    @property
    def column_tiles(self) -> tuple[int, ...]:
        return _parts(self.columns, TILE)

    @property
    def a_tile_stride(self) -> int:
        return self.tile * self.a_row if self.a_tile is None else self.a_tile

    @property
    def c_tile_stride(self) -> int:
        return self.tile * self.c_row if self.c_tile is None else self.c_tile


def _parts(size: int, most: int) -> tuple[int, ...]:
    return (size,) if size <= most else (most, size - most)


def configure(spec: BlockGemm) -> Any:
    """A function for kernels, without arguments: a thread calls it before its first product with `spec`."""

    @intrinsic
    def kernel(typingctx: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if spec.unit == "amx":
                amx.configure(spec, builder)
            return context.get_dummy_value()

        return types.void(), generate

    return kernel


def release(unit: Unit) -> Any:
    """A function for kernels, without arguments: a thread calls it behind its last product."""

    @intrinsic
    def kernel(typingctx: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if unit == "amx":
                amx.release(builder)
            return context.get_dummy_value()

        return types.void(), generate

    return kernel


def block_gemm(spec: BlockGemm) -> Any:
    """A function for kernels: ``kernel(a, b, c, begin, segments)``, addresses and a count as int64.

    begin: where the bias is, or, for ``either``, 0 to begin at zero and anything else to go on with C.
    """
    multiply = amx.multiply if spec.unit == "amx" else pair_products.multiply

    @intrinsic
    def kernel(typingctx: Any, a: Any, b: Any, c: Any, begin: Any, segments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            multiply(spec, builder, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return kernel
