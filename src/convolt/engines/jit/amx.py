"""The bf16 matrix product on AMX tiles, fp32 accumulation.

    C[m, j] = start + sum over s < segments, t < steps, k < step of
              A[m*a_row + t*a_step + s*a_segment + k] * B[t*step + k, j] of segment s

One call computes at most 32 x 32 elements of C in four tiles (16 x 16 fp32 each). A lies as it is, rows of bf16: a
pixel of an NHWC image with 32 channels is one tile row, and a tap of the filter is an address. B is packed by
`pack_pairs` (the layout Intel calls VNNI): for each step and each 16 columns a tile [step/2][16][2], two neighbors in k
side by side.

Rows, columns and steps that are not full are cut off by the tile configuration (nothing is read or written beyond
them), so each specification has a `configure`, which a thread calls before its first product with that
specification and after another one's; it costs about 50 ns. `release` gives the tile registers back.
Align A, B and C to 64 bytes, rows included: a tile row across two cache lines costs up to a factor of 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from convolt.engines.jit.vectors import BYTES, I8, I64, carried_loop, declare

TILE = 16  # rows of a tile; a row has 64 bytes: 16 fp32 or 32 bf16
BF16, FLOAT = 2, 4  # bytes


@dataclass(frozen=True)
class AmxGemm:
    """Sizes and strides, all constants: those of A and B count bf16 elements, `c_row` fp32 elements.

    rows, columns: 1 to 32. step: the depth of one tile product, even, at most 32. steps: products in a segment.
    b_tile: from one 16 columns to the next, within a step. start: zero, C as it is (load), or bias[columns].
    The rows lie in one tile or two; the second begins `a_tile` and `c_tile` behind the first, by default where its
    `tile` rows end. An image 8 pixels wide: rows=16, tile=8, a_tile=c_tile=one image row.
    """

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
    start: Literal["zero", "load", "bias"] = "zero"
    tile: int = TILE
    a_tile: int | None = None
    c_tile: int | None = None

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


def configuration(spec: AmxGemm) -> bytes:
    """The 64 bytes of LDTILECFG: tiles 0-3 are C, 4 and 5 A, 6 and 7 B (Intel SDM, volume 1, 18.2)."""
    rows, bytes_per_row = [0] * TILE, [0] * TILE
    for m, tile_rows in enumerate(spec.row_tiles):
        rows[4 + m], bytes_per_row[4 + m] = tile_rows, BF16 * spec.step
        for j, columns in enumerate(spec.column_tiles):
            rows[2 * m + j], bytes_per_row[2 * m + j] = tile_rows, FLOAT * columns
            rows[6 + j], bytes_per_row[6 + j] = spec.step // 2, FLOAT * columns
    widths = b"".join(width.to_bytes(2, "little") for width in bytes_per_row)
    return bytes([1]) + bytes(15) + widths + bytes(rows)


def configure(spec: AmxGemm) -> Any:
    """A function for kernels, without arguments: shapes this thread's tiles for `spec`."""

    @intrinsic
    def kernel(typingctx: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            content = cgutils.make_bytearray(configuration(spec))
            data = cgutils.global_constant(builder, "tile_configuration", content)
            function = declare(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [BYTES])
            builder.call(function, [builder.bitcast(data, BYTES)])
            return context.get_dummy_value()

        return types.void(), generate

    return kernel


@intrinsic
def release(typingctx: Any) -> Any:
    """Give this thread's tile registers back: the kernel need not save 8 KB of them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(declare(builder, "llvm.x86.tilerelease", ir.VoidType(), []), [])
        return context.get_dummy_value()

    return types.void(), generate


def amx(spec: AmxGemm) -> Any:
    """A function for kernels: ``kernel(a, b, c, bias, segments)``, addresses and a count as int64."""

    @intrinsic
    def kernel(typingctx: Any, a: Any, b: Any, c: Any, bias: Any, segments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit(spec, Tiles(builder), *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return kernel


@dataclass(frozen=True)
class Tiles:
    """The AMX instructions; tiles are named by number, strides count bytes."""

    builder: Any

    def load(self, tile: int, address: Any, stride: int) -> None:
        self._call("tileloadd64", [I8, BYTES, I64], [I8(tile), self._pointer(address), I64(stride)])

    def store(self, tile: int, address: Any, stride: int) -> None:
        self._call("tilestored64", [I8, BYTES, I64], [I8(tile), self._pointer(address), I64(stride)])

    def zero(self, tile: int) -> None:
        self._call("tilezero", [I8], [I8(tile)])

    def multiply_add(self, c: int, a: int, b: int) -> None:
        self._call("tdpbf16ps", [I8, I8, I8], [I8(c), I8(a), I8(b)])

    def _pointer(self, address: Any) -> Any:
        return self.builder.inttoptr(address, BYTES)

    def _call(self, name: str, kinds: Sequence[Any], arguments: Sequence[Any]) -> None:
        self.builder.call(declare(self.builder, f"llvm.x86.{name}", ir.VoidType(), kinds), arguments)


def _emit(spec: AmxGemm, tiles: Tiles, a: Any, b: Any, c: Any, bias: Any, segments: Any) -> None:
    builder = tiles.builder
    rows, columns = range(len(spec.row_tiles)), range(len(spec.column_tiles))
    places = {
        2 * m + j: builder.add(c, I64(FLOAT * (m * spec.c_tile_stride + TILE * j))) for m in rows for j in columns
    }
    for tile, place in places.items():
        if spec.start == "load":
            tiles.load(tile, place, FLOAT * spec.c_row)
        elif spec.start == "bias":  # a stride of zero: every row of the tile is the same one
            tiles.load(tile, builder.add(bias, I64(FLOAT * TILE * (tile % 2))), 0)
        else:
            tiles.zero(tile)

    def product(a: Any, b: Any) -> None:
        for m in rows:
            tiles.load(4 + m, builder.add(a, I64(BF16 * m * spec.a_tile_stride)), BF16 * spec.a_row)
        for j in columns:
            tiles.load(6 + j, builder.add(b, I64(BF16 * j * spec.b_tile)), FLOAT * TILE)
            for m in rows:
                tiles.multiply_add(2 * m + j, 4 + m, 6 + j)

    def segment(s: Any, nothing: list[Any]) -> list[Any]:
        a_s, b_s = (
            builder.add(x, builder.mul(s, I64(BF16 * stride)))
            for x, stride in ((a, spec.a_segment), (b, spec.b_segment))
        )

        def step(t: Any, nothing: list[Any]) -> list[Any]:
            product(
                *(
                    builder.add(x, builder.mul(t, I64(BF16 * stride)))
                    for x, stride in ((a_s, spec.a_step), (b_s, spec.b_step))
                )
            )
            return []

        return carried_loop(builder, I64(spec.steps), [], step)

    carried_loop(builder, segments, [], segment)
    for tile, place in places.items():
        tiles.store(tile, place, FLOAT * spec.c_row)
