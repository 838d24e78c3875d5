"""Adam's step in AVX-512, with its quotient by an estimate: the divider is busy with the square root.

    v    <- beta2 v + (1 - beta2) g^2
    q     = 1 / (sqrt(v) + eps)          relative error 2^-14, one Newton step behind the product: 2^-27
    move  = rate m q,    w <- shrink w - move

The result is within two units in the last place. Every weight gets the same arithmetic wherever a run begins or ends,
so that the bits do not depend on how the parameters are cut.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.bf16 import Bf16Lanes
from convolt.engines.jit.vectors import F32, I1, I16, I32, I64, Floats, carried_loop, declare

LANES = 16


def adam_step(copies: bool) -> Any:
    """``step((w, g, m, v), (shrink, pull, beta1, 1 - beta1, beta2, 1 - beta2, eps, rate), count, copy)`` for kernels.

    Addresses of float32, float32 numbers, how many weights, and where their copy in bf16 goes, if there is one, as the
    CPU rounds.
    """

    @intrinsic
    def step(typingctx: Any, weights: Any, numbers: Any, count: Any, copy: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, LANES)
            places = [floats.pointer(builder.extract_value(args[0], i)) for i in range(4)]
            scalars = [_everywhere(floats, builder.extract_value(args[1], i)) for i in range(8)]
            whole, rest = builder.sdiv(args[2], I64(LANES)), builder.srem(args[2], I64(LANES))
            everything = ir.Constant(ir.VectorType(I1, LANES), [I1(1)] * LANES)
            rounded = builder.inttoptr(args[3], I16.as_pointer())

            def stepped(offset: Any, mask: Any) -> None:
                w = _step(floats, [floats.at(place, offset) for place in places], scalars, mask)
                if copies:
                    _store(floats, Bf16Lanes(floats, native=True).narrowed(w), floats.at(rounded, offset), mask)

            def vector(i: Any, nothing: list[Any]) -> list[Any]:
                stepped(builder.mul(i, I64(LANES)), everything)
                return []

            carried_loop(builder, whole, [], vector)
            with builder.if_then(builder.icmp_signed(">", rest, I64(0))):
                stepped(builder.mul(whole, I64(LANES)), _up_to(builder, rest))
            return context.get_dummy_value()

        kinds = types.UniTuple(types.int64, 4), types.UniTuple(types.float32, 8)
        return types.void(*kinds, types.int64, types.int64), generate

    return step


def _step(floats: Floats, places: list[Any], scalars: list[Any], mask: Any) -> Any:
    """Moves weights and state; the new weights."""
    builder, fma = floats.builder, floats.multiply_add
    shrink, pull, beta1, fresh1, beta2, fresh2, eps, rate = scalars
    w, g, m, v = (_load(floats, place, mask) for place in places)
    slope = fma(pull, w, g)
    m = fma(beta1, m, builder.fmul(fresh1, slope))
    v = fma(beta2, v, builder.fmul(fresh2, builder.fmul(slope, slope)))
    below = builder.fadd(builder.call(declare(builder, f"llvm.sqrt.v{LANES}f32", floats.type, [floats.type]), [v]), eps)
    quotient = _reciprocal(floats, below)
    move = builder.fmul(builder.fmul(rate, m), quotient)
    rest = fma(builder.fneg(below), quotient, ir.Constant(floats.type, [F32(1.0)] * LANES))
    w = fma(shrink, w, builder.fneg(fma(move, rest, move)))
    for value, place in ((w, places[0]), (m, places[2]), (v, places[3])):
        _store(floats, value, place, mask)
    return w


def _reciprocal(floats: Floats, x: Any) -> Any:
    """An estimate, to 14 bits."""
    function = declare(floats.builder, "llvm.x86.avx512.rcp14.ps.512", floats.type, [floats.type, floats.type, I16])
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
    pointer, element = floats.builder.bitcast(place, value.type.as_pointer()), value.type.element
    name, size = ("f32", 4) if element == F32 else ("i16", 2)
    kinds = [value.type, pointer.type, I32, mask.type]
    function = declare(floats.builder, f"llvm.masked.store.v{LANES}{name}.p0", ir.VoidType(), kinds)
    floats.builder.call(function, [value, pointer, I32(size), mask])
