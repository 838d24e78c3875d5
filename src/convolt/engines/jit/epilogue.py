"""What stands behind a convolution's products, pixel by pixel: bias, activation and max-pool, and their gradients.

Backward, a gradient is let through by the activation, or sent to the tap that won the pool, and added to db on the way.
In LLVM IR because each touches four or five arrays: LLVM, which cannot know that they do not overlap, gives up
vectorizing the loops (45 us for an image that takes 5 us here).
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.bf16 import Bf16Lanes, source_of
from convolt.engines.jit.pixels import (
    Block,
    activated,
    for_blocks,
    largest,
    let_largest_through,
    let_through,
    number_of,
    number_pointer,
    on_pixels,
)
from convolt.engines.jit.vectors import I8, I32, I64, Floats, carried_loop, for_vectors

LANES = 16  # of pairs of pixels, the right operands of blocks
PAIR = 64  # bytes of 16 channels of two pixels


@dataclass(frozen=True)
class Unpool:
    """A pixel of a pooled output with `channels` goes to the pixels ``places`` (elements), one for each tap.

    Where the code is `dead` nothing goes anywhere, nor to db. half, half_dy: whether target and dy are bf16; native:
    the CPU rounds.
    """

    channels: int
    places: tuple[int, ...]
    dead: int
    lanes: int
    native: bool
    bias: bool
    half: bool = True
    half_dy: bool = False


def unpool(spec: Unpool) -> Any:
    """A function for kernels: ``kernel(dy, codes, target, db)``, addresses; codes are bytes, db is float32."""

    @intrinsic
    def kernel(typingctx: Any, dy: Any, codes: Any, target: Any, db: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, spec.lanes)
            numbers = Bf16Lanes(floats, spec.native)
            source, total = number_pointer(builder, args[0], spec.half_dy), floats.pointer(args[3])
            code = builder.inttoptr(args[1], I8.as_pointer())
            pixels = number_pointer(builder, args[2], spec.half)
            bytes_kind = ir.VectorType(I8, spec.lanes)

            def channels(offset: Any, used: int) -> None:
                slope, value = numbers.load_both(floats.at(source, offset), spec.half_dy, spec.half, used)
                winner = floats.load_as(I8, builder.gep(code, [offset]), used)
                for tap, place in enumerate(spec.places):
                    won = builder.icmp_unsigned("==", winner, ir.Constant(bytes_kind, [I8(tap)] * spec.lanes))
                    kept = builder.select(won, value, ir.Constant(value.type, None))
                    floats.store(kept, builder.gep(pixels, [builder.add(offset, I64(place))]), used)
                if spec.bias:
                    alive = builder.icmp_unsigned("!=", winner, ir.Constant(bytes_kind, [I8(spec.dead)] * spec.lanes))
                    sums = floats.at(total, offset)
                    added = builder.fadd(floats.load(sums, used), builder.select(alive, slope, floats.zero))
                    floats.store(added, sums, used)

            for_vectors(builder, spec.channels, spec.lanes, channels)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return kernel


@dataclass(frozen=True)
class Through:
    """A pixel with `channels` whose activation had this `slope` on its negative side: 1 for none, 0 for ReLU.

    half: whether the target is bf16; half_y, half_dy: whether the output and its gradient are.
    """

    channels: int
    slope: float
    lanes: int
    native: bool
    bias: bool
    half: bool = True
    half_y: bool = False
    half_dy: bool = False


def through(spec: Through) -> Any:
    """A function for kernels: ``kernel(dy, y, target, db)``, addresses; db is float32."""

    @intrinsic
    def kernel(typingctx: Any, dy: Any, y: Any, target: Any, db: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, spec.lanes)
            numbers = Bf16Lanes(floats, spec.native)
            source, output = (
                number_pointer(builder, args[0], spec.half_dy),
                number_pointer(builder, args[1], spec.half_y),
            )
            total = floats.pointer(args[3])
            pixel = number_pointer(builder, args[2], spec.half)

            def channels(offset: Any, used: int) -> None:
                value = numbers.load_float(floats.at(source, offset), source_of(spec.half_dy), used)
                if spec.slope != 1:
                    y = numbers.load_float(floats.at(output, offset), source_of(spec.half_y), used)
                    value = let_through(floats, value, y, spec.slope)
                floats.store(numbers.stored(value, spec.half), builder.gep(pixel, [offset]), used)
                if spec.bias:
                    sums = floats.at(total, offset)
                    floats.store(builder.fadd(floats.load(sums, used), value), sums, used)

            for_vectors(builder, spec.channels, spec.lanes, channels)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return kernel


@dataclass(frozen=True)
class PairUnpool:
    """As ``Unpool``, but into pairs of pixels: 16 channels of two neighbors in a row are 64 bytes, the right operand.

    ``row`` bytes from a row of pixels to the next, ``plane`` bytes from 16 channels to the next. Channels that are no
    multiple of 16 leave the rest of their 64 bytes alone.
    """

    channels: int
    pool_h: int
    pool_w: int
    row: int
    plane: int
    dead: int
    bias: bool
    native: bool
    half_dy: bool


def pair_unpool(spec: PairUnpool) -> Any:
    """A function for kernels: ``kernel(dy, codes, target, pixel, db)``; ``pixel`` is the column of the first tap.

    With an even window its taps are whole pairs and are written; with an odd one they are written half by half.
    """

    @intrinsic
    def kernel(typingctx: Any, dy: Any, codes: Any, target: Any, pixel: Any, db: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, LANES)
            numbers = Bf16Lanes(floats, spec.native)
            source, total = number_pointer(builder, args[0], spec.half_dy), floats.pointer(args[4])
            code = builder.inttoptr(args[1], I8.as_pointer())
            kind = ir.VectorType(I8, LANES)

            def channels(offset: Any, used: int) -> None:
                slope, halves = numbers.load_both(floats.at(source, offset), spec.half_dy, True, used)
                winner = floats.load_as(I8, builder.gep(code, [offset]), used)
                words = ir.VectorType(I32, LANES)
                value, zero = builder.zext(halves, words), ir.Constant(words, None)
                upper = builder.shl(value, ir.Constant(words, [I32(16)] * LANES))
                plane = builder.mul(builder.udiv(offset, I64(LANES)), I64(spec.plane))
                place = builder.add(args[2], plane)

                def won(tap: int) -> Any:
                    return builder.icmp_unsigned("==", winner, ir.Constant(kind, [I8(tap)] * LANES))

                for i in range(spec.pool_h):
                    first = builder.add(place, I64(i * spec.row))
                    if spec.pool_w % 2 == 0:
                        for j in range(0, spec.pool_w, 2):
                            tap = i * spec.pool_w + j
                            column = builder.add(args[3], I64(j))
                            pair = builder.add(first, builder.mul(builder.lshr(column, I64(1)), I64(PAIR)))
                            word = builder.select(won(tap), value, builder.select(won(tap + 1), upper, zero))
                            floats.store(word, floats.pointer(pair), used)
                    else:
                        for j in range(spec.pool_w):
                            kept = builder.select(won(i * spec.pool_w + j), value, zero)
                            _store_half(floats, kept, first, builder.add(args[3], I64(j)), used)
                if spec.bias:
                    alive = builder.icmp_unsigned("!=", winner, ir.Constant(kind, [I8(spec.dead)] * LANES))
                    sums = floats.at(total, offset)
                    added = builder.fadd(floats.load(sums, used), builder.select(alive, slope, floats.zero))
                    floats.store(added, sums, used)

            for_vectors(builder, spec.channels, LANES, channels)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return kernel


def _store_half(floats: Floats, value: Any, row: Any, column: Any, used: int) -> None:
    """One pixel's bf16 numbers (in the lower halves of lanes) into its half of a pair; the other half stays."""
    builder = floats.builder
    odd = builder.and_(column, I64(1))
    place = floats.pointer(builder.add(row, builder.mul(builder.lshr(column, I64(1)), I64(PAIR))))
    kind = value.type
    before = builder.bitcast(floats.load(place, used), kind)
    shift = builder.trunc(builder.mul(odd, I64(16)), I32)
    lane = builder.insert_element(ir.Constant(kind, ir.Undefined), shift, I32(0))
    shifts = builder.shuffle_vector(lane, lane, ir.Constant(kind, None))
    mask = builder.shl(ir.Constant(kind, [I32(0xFFFF)] * LANES), shifts)
    other = builder.and_(before, builder.not_(mask))
    floats.store(builder.or_(other, builder.shl(value, shifts)), place, used)


@dataclass(frozen=True)
class PairThrough:
    """As ``Through``, for two pixels that are neighbors, or (not both) for one whose neighbor gets nothing."""

    channels: int
    slope: float
    plane: int
    bias: bool
    native: bool
    both: bool
    half_y: bool
    half_dy: bool


def pair_through(spec: PairThrough) -> Any:
    """A function for kernels: ``kernel(dy, y, target, db)``; the target is the pair's place among 16 channels."""

    @intrinsic
    def kernel(typingctx: Any, dy: Any, y: Any, target: Any, db: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, LANES)
            numbers = Bf16Lanes(floats, spec.native)
            source, output = (
                number_pointer(builder, args[0], spec.half_dy),
                number_pointer(builder, args[1], spec.half_y),
            )
            total = floats.pointer(args[3])

            def channels(offset: Any, used: int) -> None:
                values = []
                for pixel in range(2 if spec.both else 1):
                    place = builder.add(offset, I64(pixel * spec.channels))
                    value = numbers.load_float(floats.at(source, place), source_of(spec.half_dy), used)
                    if spec.slope != 1:
                        y = numbers.load_float(floats.at(output, place), source_of(spec.half_y), used)
                        value = let_through(floats, value, y, spec.slope)
                    values.append(value)
                halves = [numbers.rounded(value) for value in values]
                halves += [ir.Constant(halves[0].type, None)] * (2 - len(halves))
                plane = builder.mul(builder.udiv(offset, I64(LANES)), I64(spec.plane))
                floats.store(numbers.pair(*halves), floats.pointer(builder.add(args[2], plane)), used)
                if spec.bias:
                    sums = floats.at(total, offset)
                    added = floats.load(sums, used)
                    for value in values:
                        added = builder.fadd(added, value)
                    floats.store(added, sums, used)

            for_vectors(builder, spec.channels, LANES, channels)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return kernel


@dataclass(frozen=True)
class MaxOf:
    """The largest of the pixels at ``places`` (float32 elements), the first of equals, with bias and ReLU.

    The code is the tap that won, or `dead` where ReLU let nothing through; codes: whether anybody wants it. half:
    whether the target is bf16; native: the CPU rounds.
    """

    channels: int
    places: tuple[int, ...]
    dead: int
    lanes: int
    bias: bool
    relu: bool
    codes: bool = True
    half: bool = False
    native: bool = False


def max_of(spec: MaxOf) -> Any:
    """A function for kernels: ``kernel(values, bias, target, codes)``, addresses; codes are bytes."""

    @intrinsic
    def kernel(typingctx: Any, values: Any, bias: Any, target: Any, codes: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, spec.lanes)
            numbers = Bf16Lanes(floats, spec.native)
            source, offsets = floats.pointer(args[0]), floats.pointer(args[1])
            output = number_pointer(builder, args[2], spec.half)
            code = builder.inttoptr(args[3], I8.as_pointer())

            def channels(offset: Any, used: int) -> None:
                taps = [floats.load(floats.at(source, offset, place), used) for place in spec.places]
                best, winner = largest(floats, taps)
                if spec.bias:
                    best = builder.fadd(best, floats.load(floats.at(offsets, offset), used))
                if spec.relu:
                    best, winner = let_largest_through(floats, best, winner, number_of(floats, spec.dead))
                floats.store(numbers.stored(best, spec.half), floats.at(output, offset), used)
                if spec.codes:
                    floats.store(winner, builder.gep(code, [offset]), used)

            for_vectors(builder, spec.channels, spec.lanes, channels)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return kernel


@dataclass(frozen=True)
class Finish:
    """Pixels of ``columns`` channels of an output, ``pixel`` elements apart, from the rows of ``row`` products.

    slope: of the activation, 1 for none. adds: to what is there, the gradient of an input. half: whether the output is
    bf16, to which nothing is added; native: the CPU rounds.
    """

    columns: int
    pixel: int
    row: int
    bias: bool
    slope: float
    adds: bool
    half: bool
    native: bool


def finish(spec: Finish) -> Any:
    """A function for kernels: ``kernel((products, bias, target), pixels)``."""

    def generate(builder: Any, addresses: list[Any], pixels: Any) -> None:
        floats = Floats(builder, LANES)
        products, bias = (floats.pointer(address) for address in addresses[:2])
        target, numbers = number_pointer(builder, addresses[2], spec.half), Bf16Lanes(floats, spec.native)

        def block(b: Block) -> None:
            offsets = b.load(bias) if spec.bias else []

            def finished(i: Any, nothing: list[Any]) -> list[Any]:
                values = b.load(floats.at(products, builder.mul(i, I64(spec.row))))
                if offsets:
                    values = [builder.fadd(value, offset) for value, offset in zip(values, offsets, strict=True)]
                values = [activated(floats, value, spec.slope) for value in values]
                pixel = floats.at(target, builder.mul(i, I64(spec.pixel)))
                b.put(values, pixel, spec.adds, numbers if spec.half else None)
                return []

            carried_loop(builder, pixels, [], finished)

        for_blocks(floats, spec.columns, 2, block)

    return on_pixels(generate)
