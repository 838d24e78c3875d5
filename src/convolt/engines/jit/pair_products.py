"""Blocks of bf16 products without tiles: a pair of A, broadcast, times a vector of pairs of B.

    acc[m, j] += A[m, 2k] B[2k, j] + A[m, 2k+1] B[2k+1, j]

The operands are those of the tiles (blocks.py): two neighbors in k are 32 bits of a row of A, and lie side by side in
B. ``dot`` is one instruction, VDPBF16PS of AVX512-BF16. ``fma`` works everywhere: a bf16 number is the upper half of a
float32, so a shift and a mask make the two halves of a pair float32 numbers, which multiply exactly, for two fused
multiply-adds. 8 rows of two vectors are summed in registers. B is read again for each 8 rows, so the sum goes over 256
numbers of depth for all rows before it goes on: 16 KB of B stay in the L1 cache, and C is kept in memory in between.

Vectors have 16 lanes, whatever the CPU: LLVM cuts them into what its registers hold.

Cost: 2 rows columns depth FLOPs; for each pair of k and 8 rows, 2 loads of B, 8 broadcasts and 16 dot products.
"""

from collections.abc import Callable
from math import gcd
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from convolt.engines.jit.bf16 import BFLOAT
from convolt.engines.jit.vectors import I32, I64, Floats, carried_loop, declare

if TYPE_CHECKING:  # blocks.py chooses among the units, and these are two
    from convolt.engines.jit.blocks import BlockGemm

LANES = 16
ROWS = {"dot": 8, "fma": 4}  # of sums in registers; fma needs some for halves
UNROLLED = 4  # pairs
STEPS = 8  # whose pairs of B stay in the L1 cache
PAIRS = ir.VectorType(I32, LANES)


def multiply(spec: "BlockGemm", builder: Any, a: Any, b: Any, c: Any, bias: Any, segments: Any) -> None:
    """C of one block; addresses and a count as int64."""
    floats = Floats(builder, LANES)
    a, b, c, bias = (floats.pointer(address) for address in (a, b, c, bias))
    most = ROWS[spec.unit]
    whole = [rows // most for rows in spec.row_tiles]
    total = builder.mul(segments, I64(spec.steps))

    def some_steps(chunk: Any, nothing: list[Any]) -> list[Any]:
        begin = builder.mul(chunk, I64(STEPS))
        left_over = builder.sub(total, begin)
        count = builder.select(builder.icmp_signed("<", left_over, I64(STEPS)), left_over, I64(STEPS))

        def strip(tile: Any, first: Any, rows: int) -> None:
            """Rows of a tile from the `first` on."""
            left = floats.at(a, _offset(builder, tile, spec.a_tile_stride // 2, first, spec.a_row // 2))
            target = floats.at(c, _offset(builder, tile, spec.c_tile_stride, first, spec.c_row))
            _strip(spec, floats, left, b, target, bias, begin, count, rows)

        def whole_strip(i: Any, nothing: list[Any]) -> list[Any]:
            second = builder.zext(builder.icmp_signed(">=", i, I64(whole[0])), I64)  # of the two tiles there may be
            before = builder.mul(second, I64(whole[0]))
            strip(second, builder.mul(builder.sub(i, before), I64(most)), most)
            return []

        carried_loop(builder, I64(sum(whole)), [], whole_strip)
        for tile, rows in enumerate(spec.row_tiles):
            if rows % most:
                strip(I64(tile), I64(rows // most * most), rows % most)
        return []

    chunks = builder.sdiv(builder.add(total, I64(STEPS - 1)), I64(STEPS))
    carried_loop(builder, chunks, [], some_steps)


def _offset(builder: Any, x: Any, x_stride: int, y: Any, y_stride: int) -> Any:
    return builder.add(builder.mul(x, I64(x_stride)), builder.mul(y, I64(y_stride)))


def _strip(
    spec: "BlockGemm", floats: Floats, a: Any, b: Any, c: Any, bias: Any, begin: Any, count: Any, rows: int
) -> None:
    """Some rows of C, summed in registers over some steps; pointers to float32, which a pair is as wide as."""
    builder = floats.builder
    used = spec.column_tiles
    block = [(m, j) for m in range(rows) for j in range(len(used))]
    places = {(m, j): floats.at(c, m * spec.c_row + j * LANES) for m, j in block}
    unrolled = gcd(spec.step // 2, UNROLLED)

    def begun() -> list[Any]:
        """What the sums are before the first step."""
        row = [floats.zero] * len(used)
        if spec.start == "bias":
            row = [floats.load(floats.at(bias, j * LANES), used[j]) for j in range(len(used))]
        return [row[j] for m, j in block]

    def loaded() -> list[Any]:
        return [floats.load(places[m, j], used[j]) for m, j in block]

    def step(i: Any, sums: list[Any]) -> list[Any]:
        number = builder.add(begin, i)
        s, t = builder.udiv(number, I64(spec.steps)), builder.urem(number, I64(spec.steps))
        a_t = floats.at(a, _offset(builder, s, spec.a_segment // 2, t, spec.a_step // 2))
        b_t = floats.at(b, _offset(builder, s, spec.b_segment // 2, t, spec.b_step // 2))

        def some_pairs(i: Any, sums: list[Any]) -> list[Any]:
            left, right = (floats.at(x, builder.mul(i, I64(n * unrolled))) for x, n in ((a_t, 1), (b_t, LANES)))
            for k in range(unrolled):
                sums = _pair(spec, floats, floats.at(left, k), floats.at(right, k * LANES), sums)
            return sums

        return carried_loop(builder, I64(spec.step // 2 // unrolled), sums, some_pairs)

    begins = builder.icmp_signed("==", begin, I64(0))
    if spec.start == "either":  # the bias is none, but tells which
        begins = builder.and_(begins, builder.icmp_unsigned("==", bias, ir.Constant(bias.type, None)))
    start = loaded() if spec.start == "load" else _either(builder, begins, begun, loaded)
    for (m, j), value in zip(block, carried_loop(builder, count, start, step), strict=True):
        floats.store(value, places[m, j], used[j])


def _either(builder: Any, condition: Any, first: Callable[[], list[Any]], second: Callable[[], list[Any]]) -> list[Any]:
    """The values of `first` where the condition holds, else those of `second`, of which one alone is computed."""
    found = []
    with builder.if_else(condition) as branches:
        for branch, values in zip(branches, (first, second), strict=True):
            with branch:
                found.append((values(), builder.block))
    joined = []
    for pair in zip(*(values for values, _ in found), strict=True):
        phi = builder.phi(pair[0].type)
        for value, (_, block) in zip(pair, found, strict=True):
            phi.add_incoming(value, block)
        joined.append(phi)
    return joined


def _pair(spec: "BlockGemm", floats: Floats, a: Any, b: Any, sums: list[Any]) -> list[Any]:
    """Add the products of one pair of k."""
    columns = len(spec.column_tiles)
    right = [_halves(spec, floats, floats.load(floats.at(b, j * spec.b_tile // 2))) for j in range(columns)]
    floats.order_loads()
    following = []
    for m in range(len(sums) // columns):
        left = _halves(spec, floats, floats.broadcast(floats.at(a, m * spec.a_row // 2)))
        row = sums[m * columns : (m + 1) * columns]
        following += [_multiply_add(floats, left, pair, total) for pair, total in zip(right, row, strict=True)]
    return following


def _halves(spec: "BlockGemm", floats: Floats, pairs: Any) -> list[Any]:
    """A vector of pairs as what the unit multiplies: itself, or its even and its odd numbers as float32."""
    builder = floats.builder
    if spec.unit == "dot":
        return [pairs]
    bits = builder.bitcast(pairs, PAIRS)
    even = builder.shl(bits, ir.Constant(PAIRS, [I32(16)] * LANES))
    odd = builder.and_(bits, ir.Constant(PAIRS, [I32(0xFFFF0000)] * LANES))
    return [builder.bitcast(half, floats.type) for half in (even, odd)]


def _multiply_add(floats: Floats, left: list[Any], right: list[Any], total: Any) -> Any:
    if len(left) == 1:
        return dot_product(floats, left[0], right[0], total)
    for x, y in zip(left, right, strict=True):
        total = floats.multiply_add(x, y, total)
    return total


def dot_product(floats: Floats, left: Any, right: Any, total: Any) -> Any:
    """``total`` and, lane by lane, the products of pairs of bf16 numbers, which are given as vectors of float32."""
    builder, kind = floats.builder, ir.VectorType(BFLOAT, 2 * floats.lanes)
    name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * floats.lanes}"
    function = declare(builder, name, floats.type, [floats.type, kind, kind])
    return builder.call(function, [total, builder.bitcast(left, kind), builder.bitcast(right, kind)])
