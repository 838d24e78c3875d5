"""Blocks of bf16 products on AMX tiles.

Eight tiles: 0 to 3 are C (16 x 16 fp32 each), 4 and 5 rows of A, 6 and 7 packed pairs of B. Rows, columns and steps
that are not full are cut off by the tile configuration (nothing is read or written beyond them), so each specification
has one of its own, which a thread loads before its first product with that specification and after another one's; it
costs about 50 ns. Releasing the tiles saves the kernel from keeping 8 KB of them for each thread it interrupts.

Tiles of A and B are zeroed as soon as they are used up: the fewer tiles hold something else than zero, the faster are
products while the core is in its slow state, presumably that in which its other hardware thread holds tiles too
(docs/kernels.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba.core import cgutils

from convolt.engines.jit.vectors import BYTES, I8, I64, carried_loop, declare

if TYPE_CHECKING:  # blocks.py chooses among the units, and this is one
    from convolt.engines.jit.blocks import BlockGemm

TILE = 16  # rows of a tile; a row has 64 bytes: 16 fp32 or 32 bf16
BF16, FLOAT = 2, 4  # bytes


def configuration(spec: "BlockGemm") -> bytes:
    """The 64 bytes of LDTILECFG: tiles 0-3 are C, 4 and 5 A, 6 and 7 B (Intel SDM, volume 1, 18.2)."""
    rows, bytes_per_row = [0] * TILE, [0] * TILE
    for m, tile_rows in enumerate(spec.row_tiles):
        rows[4 + m], bytes_per_row[4 + m] = tile_rows, BF16 * spec.step
        for j, columns in enumerate(spec.column_tiles):
            rows[2 * m + j], bytes_per_row[2 * m + j] = tile_rows, FLOAT * columns
            rows[6 + j], bytes_per_row[6 + j] = spec.step // 2, FLOAT * columns
    widths = b"".join(width.to_bytes(2, "little") for width in bytes_per_row)
    return bytes([1]) + bytes(15) + widths + bytes(rows)


def configure(spec: "BlockGemm", builder: Any) -> None:
    """Shape this thread's tiles for `spec`."""
    content = cgutils.make_bytearray(configuration(spec))
    data = cgutils.global_constant(builder, "tile_configuration", content)
    function = declare(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [BYTES])
    builder.call(function, [builder.bitcast(data, BYTES)])


def release(builder: Any) -> None:
    """Give this thread's tile registers back."""
    builder.call(declare(builder, "llvm.x86.tilerelease", ir.VoidType(), []), [])


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


def multiply(spec: "BlockGemm", builder: Any, a: Any, b: Any, c: Any, begin: Any, segments: Any) -> None:
    """C of one block, as ``block_gemm`` tells."""
    rows = range(len(spec.row_tiles))
    for together in ([m] for m in rows) if spec.apart else (rows,):
        _multiply(spec, together, builder, a, b, c, begin, segments)


def _multiply(
    spec: "BlockGemm", rows: Sequence[int], builder: Any, a: Any, b: Any, c: Any, begin: Any, segments: Any
) -> None:
    """These rows of tiles of C."""
    tiles, columns = Tiles(builder), range(len(spec.column_tiles))
    places = {
        2 * m + j: builder.add(c, I64(FLOAT * (m * spec.c_tile_stride + TILE * j))) for m in rows for j in columns
    }

    def loaded() -> None:
        for tile, place in places.items():
            tiles.load(tile, place, FLOAT * spec.c_row)

    def zero() -> None:
        for tile in places:
            tiles.zero(tile)

    match spec.start:
        case "zero":
            zero()
        case "load":
            loaded()
        case "either":
            with builder.if_else(builder.icmp_signed("!=", begin, I64(0))) as (goes_on, begins):
                with goes_on:
                    loaded()
                with begins:
                    zero()
        case "bias":
            for tile in places:  # a stride of zero: every row of the tile is the same one
                tiles.load(tile, builder.add(begin, I64(FLOAT * TILE * (tile % 2))), 0)

    def product(a: Any, b: Any) -> None:
        for j in columns:
            order = rows[::-1] if j else rows  # back from the row used last: that one is done with first
            for m in order:
                if j == 0:
                    tiles.load(4 + m, builder.add(a, I64(BF16 * m * spec.a_tile_stride)), BF16 * spec.a_row)
                if m == order[0]:
                    tiles.load(6 + j, builder.add(b, I64(BF16 * j * spec.b_tile)), FLOAT * TILE)
                tiles.multiply_add(2 * m + j, 4 + m, 6 + j)
                if j == columns[-1]:
                    tiles.zero(4 + m)
            tiles.zero(6 + j)

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
