"""dw of a convolution behind which 2x2 outputs are pooled, from the pixels that won: a quarter of the products.

    dw[tap, k] += sum over p, q of  x[2p + i + r, 2q + j + s] dy[p, q, k]       (i, j) the winner of channel k

The winner differs from channel to channel, so that x differs from lane to lane. The four numbers it is one of lie
together in memory, are loaded into every quarter of a vector, and one permutation takes each lane its own.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.vectors import F32, I8, I32, I64, Floats, carried_loop, declare

PERMUTE = {16: "llvm.x86.avx512.vpermilvar.ps.512", 8: "llvm.x86.avx.vpermilvar.ps.256"}  # by lanes


@dataclass(frozen=True)
class Winners:
    """Sums of ``taps`` of some channels over ``high`` x ``wide`` pooled pixels.

    taps: (elements from the first pixel's fours, elements from dw) of each. row, pixel: elements of fours from a row
    or pixel to the next. channels: elements from a pixel of dy and codes to the next; used: of the vector.
    """

    taps: tuple[tuple[int, int], ...]
    high: int
    wide: int
    row: int
    pixel: int
    channels: int
    used: int
    dead: int
    lanes: int
    bias: bool


def winners(spec: Winners) -> Any:
    """A function for kernels: ``kernel(fours, dy, codes, dw, db)``, addresses of float32, codes of bytes; adds."""

    @intrinsic
    def kernel(typingctx: Any, fours: Any, dy: Any, codes: Any, dw: Any, db: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, spec.lanes)
            source, slopes, target, total = (floats.pointer(args[i]) for i in (0, 1, 3, 4))
            code = builder.inttoptr(args[2], I8.as_pointer())
            bytes_kind, words_kind = (ir.VectorType(kind, spec.lanes) for kind in (I8, I32))
            dead = ir.Constant(bytes_kind, [I8(spec.dead)] * spec.lanes)

            def pixel(first: Any, number: Any, sums: list[Any]) -> list[Any]:
                place = builder.mul(number, I64(spec.channels))
                winner = floats.load_as(I8, builder.gep(code, [place]), spec.used)
                slope = floats.load(floats.at(slopes, place), spec.used)
                slope = builder.select(builder.icmp_unsigned("!=", winner, dead), slope, floats.zero)
                lanes = builder.zext(winner, words_kind)
                following = []
                for (offset, _), held in zip(spec.taps, sums, strict=False):
                    value = _permuted(floats, floats.at(first, offset), lanes)
                    following.append(floats.multiply_add(value, slope, held))
                return [*following, *(builder.fadd(held, slope) for held in sums[len(spec.taps) :])]

            def line(p: Any, sums: list[Any]) -> list[Any]:
                start = floats.at(source, builder.mul(p, I64(spec.row)))
                before = builder.mul(p, I64(spec.wide))

                def along(q: Any, held: list[Any]) -> list[Any]:
                    return pixel(floats.at(start, builder.mul(q, I64(spec.pixel))), builder.add(before, q), held)

                return carried_loop(builder, I64(spec.wide), sums, along)

            places = [floats.at(target, offset) for _, offset in spec.taps] + [total] * spec.bias
            held = carried_loop(builder, I64(spec.high), [floats.load(place, spec.used) for place in places], line)
            for value, place in zip(held, places, strict=True):
                floats.store(value, place, spec.used)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return kernel


def _permuted(floats: Floats, place: Any, lanes: Any) -> Any:
    """Of four numbers in memory, each lane's own: the lower two bits of its word say which."""
    builder, kind = floats.builder, ir.VectorType(F32, 4)
    four = builder.load(builder.bitcast(place, kind.as_pointer()))
    four.align = 4
    order = ir.Constant(ir.VectorType(I32, floats.lanes), [I32(i % 4) for i in range(floats.lanes)])
    everywhere = builder.shuffle_vector(four, ir.Constant(kind, ir.Undefined), order)
    function = declare(builder, PERMUTE[floats.lanes], floats.type, [floats.type, lanes.type])
    return builder.call(function, [everywhere, lanes])
