"""What stands behind a convolution's products, pixel by pixel: bias, activation and max-pool, and their gradients.

Backward, a gradient is let through by the activation, or sent to the tap that won the pool, and added to db on the way.
In LLVM IR because each touches four or five arrays: LLVM, which cannot know that they do not overlap, gives up
vectorizing the loops (45 us for an image that takes 5 us here).
"""

from collections.abc import Callable
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
    """A row of ``pixels`` of a pooled output with `channels`, each to the pixels ``places``, one for each tap.

    Places count elements from a pixel's first tap, which lies ``step`` behind that of the pixel before. Where the code
    is `dead` nothing goes anywhere, nor to db. half, half_dy: whether target and dy are bf16; native: the CPU rounds.
    """

    channels: int
    pixels: int
    step: int
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
            target = number_pointer(builder, args[2], spec.half)

            def pixel(q: Any, value: Any, won: Callable[[int], Any], channel: Any, used: int) -> None:
                first = builder.add(channel, builder.mul(q, I64(spec.step)))
                for tap, place in enumerate(spec.places):
                    kept = builder.select(won(tap), value, ir.Constant(value.type, None))
                    floats.store(kept, builder.gep(target, [builder.add(first, I64(place))]), used)

            _on_pooled(spec, numbers, (args[0], args[1], args[3]), pixel)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return kernel


def _on_pooled(
    spec: "Unpool | PairUnpool", numbers: Bf16Lanes, addresses: tuple[Any, Any, Any], each: Callable[..., None]
) -> None:
    """``each(pixel, slope to store, won, channel, used)`` for vectors of channels, pixel by pixel; and db.

    addresses: of dy, codes and db. ``won(tap)`` tells where a tap has won.
    """
    floats, builder = numbers.floats, numbers.floats.builder
    source, total = number_pointer(builder, addresses[0], spec.half_dy), floats.pointer(addresses[2])
    code = builder.inttoptr(addresses[1], I8.as_pointer())
    kind = ir.VectorType(I8, floats.lanes)

    def channels(channel: Any, used: int) -> None:
        sums = floats.at(total, channel)

        def pixel(q: Any, held: list[Any]) -> list[Any]:
            offset = builder.add(channel, builder.mul(q, I64(spec.channels)))
            slope, value = numbers.load_both(floats.at(source, offset), spec.half_dy, spec.half, used)
            winner = floats.load_as(I8, builder.gep(code, [offset]), used)

            def won(tap: int) -> Any:
                return builder.icmp_unsigned("==", winner, ir.Constant(kind, [I8(tap)] * floats.lanes))

            each(q, value, won, channel, used)
            if not spec.bias:
                return []
            return [builder.fadd(held[0], builder.select(won(spec.dead), floats.zero, slope))]

        found = carried_loop(builder, I64(spec.pixels), [floats.load(sums, used)] if spec.bias else [], pixel)
        if spec.bias:
            floats.store(found[0], sums, used)

    for_vectors(builder, spec.channels, floats.lanes, channels)


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
    pixels: int
    pool_h: int
    pool_w: int
    row: int
    plane: int
    dead: int
    bias: bool
    native: bool
    half_dy: bool
    half: bool = True


def pair_unpool(spec: PairUnpool) -> Any:
    """A function for kernels: ``kernel(dy, codes, target, db)``; the first tap of the first pixel begins a pair.

    With an even window its taps are whole pairs and are written; with an odd one they are written half by half.
    """

    @intrinsic
    def kernel(typingctx: Any, dy: Any, codes: Any, target: Any, db: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            numbers = Bf16Lanes(Floats(builder, LANES), spec.native)
            words = ir.VectorType(I32, LANES)

            def pixel(q: Any, value: Any, won: Callable[[int], Any], channel: Any, used: int) -> None:
                lower, zero = builder.zext(value, words), ir.Constant(words, None)
                upper = builder.shl(lower, ir.Constant(words, [I32(16)] * LANES))
                plane = builder.mul(builder.udiv(channel, I64(LANES)), I64(spec.plane))
                place, first = builder.add(args[2], plane), builder.mul(q, I64(spec.pool_w))
                for i in range(spec.pool_h):
                    row = builder.add(place, I64(i * spec.row))
                    if spec.pool_w % 2 == 0:
                        for j in range(0, spec.pool_w, 2):
                            tap, column = i * spec.pool_w + j, builder.add(first, I64(j))
                            pair = builder.add(row, builder.mul(builder.lshr(column, I64(1)), I64(PAIR)))
                            word = builder.select(won(tap), lower, builder.select(won(tap + 1), upper, zero))
                            numbers.floats.store(word, numbers.floats.pointer(pair), used)
                    else:
                        for j in range(spec.pool_w):
                            kept = builder.select(won(i * spec.pool_w + j), lower, zero)
                            _store_half(numbers.floats, kept, row, builder.add(first, I64(j)), used)

            _on_pooled(spec, numbers, (args[0], args[1], args[3]), pixel)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

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
