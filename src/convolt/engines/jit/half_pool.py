"""ReLU and a max-pool behind products in bf16, 32 channels at a time, as integers.

    y = max(0, largest of round(x))      the first of equals has won

Rounding keeps order, so the largest is the same before and after it, and 16-bit integers compare as the bf16 numbers do
where these are positive; what is not becomes zero anyway. For 32 channels of a 2x2 window: 4 roundings, 4 maxima and 8
operations for the codes, where float32 vectors of 16 take 44. Pixels that differ by less than bf16 tells apart are
equal here, and the first of them gets the gradient.

A NaN with a sign would be less than zero. The largest number without regard to the sign is noted on the way, and
whoever calls takes the float32 form (``epilogue.max_of``) where it is a NaN.

Cost: for each output of R x S taps, R S float32 read from the L1 cache, 3 bytes written.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.bf16 import narrowed_pair
from convolt.engines.jit.pixels import number_of
from convolt.engines.jit.vectors import I8, I16, I64, Floats, carried_loop, declare

LANES = 32
LEAST_NAN = 0xFF81  # the bits of the smallest negative NaN; without regard to the sign they are the largest numbers


@dataclass(frozen=True)
class HalfPool:
    """A row of pooled pixels of 32 channels.

    places: the taps of a pixel, float32 elements; step: from a pixel's to the next one's. pixel: elements of the output
    from a pixel to the next, those of the codes too. dead: the code where ReLU let nothing through; codes: whether
    anybody wants them.
    """

    places: tuple[int, ...]
    step: int
    pixel: int
    dead: int
    codes: bool


def half_pool(spec: HalfPool) -> Any:
    """A function for kernels: ``kernel(values, target, codes, pixels)``, addresses and a count.

    Not 0 where a NaN was among the values, and the result is of no use. The CPU must convert to bf16 by itself.
    """

    @intrinsic
    def kernel(typingctx: Any, values: Any, target: Any, codes: Any, pixels: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats, wide, kind = Floats(builder, LANES // 2), Floats(builder, LANES), ir.VectorType(I16, LANES)
            source = floats.pointer(args[0])
            output, code = builder.inttoptr(args[1], I16.as_pointer()), builder.inttoptr(args[2], I8.as_pointer())
            zero = ir.Constant(kind, None)

            def larger(x: Any, y: Any, sign: str) -> Any:
                return builder.call(declare(builder, f"llvm.{sign}max.v{LANES}i16", kind, [kind, kind]), [x, y])

            def pixel(q: Any, held: list[Any]) -> list[Any]:
                first, top = floats.at(source, builder.mul(q, I64(spec.step))), held[0]
                best, winner = zero, number_of(wide, spec.dead)
                for tap, place in enumerate(spec.places):
                    low, high = (floats.load(floats.at(first, place, half)) for half in (0, LANES // 2))
                    value = narrowed_pair(builder, low, high)
                    winner = builder.select(builder.icmp_signed(">", value, best), number_of(wide, tap), winner)
                    best, top = larger(value, best, "s"), larger(value, top, "u")
                place = builder.mul(q, I64(spec.pixel))
                wide.store(best, builder.gep(output, [place]))
                if spec.codes:
                    wide.store(winner, builder.gep(code, [place]))
                return [top]

            (top,) = carried_loop(builder, args[3], [zero], pixel)
            found = builder.call(declare(builder, f"llvm.vector.reduce.umax.v{LANES}i16", I16, [kind]), [top])
            return builder.zext(builder.icmp_unsigned(">=", found, I16(LEAST_NAN)), I64)

        return types.int64(*[types.int64] * 4), generate

    return kernel
