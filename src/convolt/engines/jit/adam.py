"""Adam's step in AVX-512: its square root and quotient by estimates, which would otherwise be two thirds of its time.

    v_r = rsqrt(v)                      relative error 2^-14, one Newton step: 2^-27
    root = v v_r + v_r (v - (v v_r)^2) / 2
    w <- shrink w - rate m / (root + eps)

A zmm square root and a division take the divider 34 cycles for 16 weights; these take about 10, and the result is
within two units in the last place. Every weight gets the same arithmetic wherever a run begins or ends, so that the
bits do not depend on how the parameters are cut.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.vectors import F32, I1, I16, I32, I64, Floats, carried_loop, declare

LANES = 16
TINY = 2.0**-126  # the smallest normal number: of zero, the estimate would be infinite


@intrinsic
def adam_step(typingctx: Any, weights: Any, numbers: Any, count: Any) -> Any:
    """``adam_step((w, g, m, v), (shrink, pull, beta1, 1 - beta1, beta2, 1 - beta2, eps, rate), count)``.

    Addresses of float32, float32 numbers, and how many weights.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        floats = Floats(builder, LANES)
        places = [floats.pointer(builder.extract_value(args[0], i)) for i in range(4)]
        scalars = [_everywhere(floats, builder.extract_value(args[1], i)) for i in range(8)]
        whole, rest = builder.sdiv(args[2], I64(LANES)), builder.srem(args[2], I64(LANES))
        everything = ir.Constant(ir.VectorType(I1, LANES), [I1(1)] * LANES)

        def step(i: Any, nothing: list[Any]) -> list[Any]:
            offset = builder.mul(i, I64(LANES))
            _step(floats, [floats.at(place, offset) for place in places], scalars, everything)
            return []

        carried_loop(builder, whole, [], step)
        with builder.if_then(builder.icmp_signed(">", rest, I64(0))):
            offset = builder.mul(whole, I64(LANES))
            first = [floats.at(place, offset) for place in places]
            _step(floats, first, scalars, _up_to(builder, rest))
        return context.get_dummy_value()

    return types.void(types.UniTuple(types.int64, 4), types.UniTuple(types.float32, 8), types.int64), generate


def _step(floats: Floats, places: list[Any], scalars: list[Any], mask: Any) -> None:
    builder, fma = floats.builder, floats.multiply_add
    shrink, pull, beta1, fresh1, beta2, fresh2, eps, rate = scalars
    w, g, m, v = (_load(floats, place, mask) for place in places)
    half, two = (ir.Constant(floats.type, [F32(value)] * LANES) for value in (0.5, 2.0))
    slope = fma(pull, w, g)
    m = fma(beta1, m, builder.fmul(fresh1, slope))
    v = fma(beta2, v, builder.fmul(builder.fmul(fresh2, slope), slope))
    tiny = ir.Constant(floats.type, [F32(TINY)] * LANES)
    safe = builder.select(builder.fcmp_ordered("<", v, tiny), tiny, v)
    estimate = _estimate(floats, "rsqrt14", safe)
    correction = builder.fsub(half, builder.fmul(builder.fmul(builder.fmul(half, safe), estimate), estimate))
    estimate = fma(estimate, correction, estimate)
    root = builder.fmul(v, estimate)
    rest = builder.fsub(v, builder.fmul(root, root))
    root = fma(builder.fmul(half, estimate), rest, root)
    below = builder.fadd(root, eps)
    quotient = _estimate(floats, "rcp14", below)
    quotient = builder.fmul(quotient, builder.fsub(two, builder.fmul(below, quotient)))
    move = builder.fmul(builder.fmul(rate, m), quotient)
    w = builder.fsub(builder.fmul(shrink, w), move)
    for value, place in ((w, places[0]), (m, places[2]), (v, places[3])):
        _store(floats, value, place, mask)


def _estimate(floats: Floats, name: str, x: Any) -> Any:
    function = declare(floats.builder, f"llvm.x86.avx512.{name}.ps.512", floats.type, [floats.type, floats.type, I16])
    return floats.builder.call(function, [x, floats.zero, I16(-1)])


def _everywhere(floats: Floats, number: Any) -> Any:
    undefined = ir.Constant(floats.type, ir.Undefined)
    lane = floats.builder.insert_element(undefined, number, I32(0))
    return floats.builder.shuffle_vector(lane, undefined, ir.Constant(ir.VectorType(I32, LANES), None))


def _up_to(builder: Any, count: Any) -> Any:
    """A mask of the first so many lanes."""
    kind = ir.VectorType(I32, LANES)
    lane = builder.insert_element(ir.Constant(kind, ir.Undefined), builder.trunc(count, I32), I32(0))
    limits = builder.shuffle_vector(lane, lane, ir.Constant(kind, None))
    return builder.icmp_signed("<", ir.Constant(kind, [I32(i) for i in range(LANES)]), limits)


def _load(floats: Floats, place: Any, mask: Any) -> Any:
    pointer = floats.builder.bitcast(place, floats.type.as_pointer())
    kinds = [pointer.type, I32, mask.type, floats.type]
    function = declare(floats.builder, f"llvm.masked.load.v{LANES}f32.p0", floats.type, kinds)
    return floats.builder.call(function, [pointer, I32(4), mask, floats.zero])


def _store(floats: Floats, value: Any, place: Any, mask: Any) -> None:
    pointer = floats.builder.bitcast(place, floats.type.as_pointer())
    kinds = [floats.type, pointer.type, I32, mask.type]
    function = declare(floats.builder, f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), kinds)
    floats.builder.call(function, [value, pointer, I32(4), mask])
