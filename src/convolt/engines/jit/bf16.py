"""bf16 in compiled kernels: conversion, and the packed layout that products want.

bf16 is the upper half of a float32, kept as uint16: Numba has no such type. A tile product needs k along the rows of A
and two neighbors in k side by side in B (the layout Intel calls VNNI). NHWC activations are A as they are; weights are
packed by `pack_pairs`; the weight gradient sums over pixels, so there one operand is packed and the other transposed
(transpose.py).

Rounding is to nearest, ties to even; NaN stays NaN. Where the CPU converts by itself (AVX512-BF16) denormal numbers
become zero, elsewhere they are kept: the only difference.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from convolt.engines.jit.memory import bits_of_float32, float32_of_bits
from convolt.engines.jit.vectors import F32, I16, I32, I64, Floats, carried_loop, declare, for_vectors

Source = Literal["fp32", "bf16"]

TILE = 16
BFLOAT = type("BFloat", (ir.Type,), {"_to_string": lambda self: "bfloat"})()  # llvmlite does not name this LLVM type


def source_of(half: bool) -> Source:
    """The format of images that are kept in bf16, or not."""
    return "bf16" if half else "fp32"


@register_jitable
def float32_of_bf16(bits: Any) -> Any:
    """The float32 value of a bf16 number given as uint16; exact. For plain loops, which vectorize."""
    return float32_of_bits(np.uint32(bits) << np.uint32(16))


@register_jitable
def bf16_of_float32(x: Any) -> Any:
    """The nearest bf16 number as uint16. For plain loops; `to_bf16` converts a run of numbers several times faster."""
    bits = bits_of_float32(x)
    upper = bits >> np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(upper | np.uint32(0x40) if is_nan else rounded)


@dataclass(frozen=True)
class Bf16Lanes:
    """Vectors of bf16 numbers, one in the lower half of each 32-bit lane."""

    floats: Floats
    native: bool

    def load(self, pointer: Any, source: Source, used: int) -> Any:
        """The first `used` numbers at `pointer`, zero in the other lanes."""
        if source == "fp32":
            return self.rounded(self.floats.load(pointer, used))
        halves = self.floats.load_as(I16, pointer, used)
        return self.floats.builder.zext(halves, ir.VectorType(I32, self.floats.lanes))

    def load_float(self, pointer: Any, source: Source, used: int) -> Any:
        """The same as float32 numbers, exactly."""
        if source == "fp32":
            return self.floats.load(pointer, used)
        return self.widened(self.floats.load_as(I16, pointer, used))

    def load_both(self, pointer: Any, half: bool, wanted: bool, used: int) -> tuple[Any, Any]:
        """The same, and as it is stored: ``half``: what lies there; ``wanted``: whether it is stored as bf16."""
        if half and wanted:
            halves = self.floats.load_as(I16, pointer, used)
            return self.widened(halves), halves
        numbers = self.load_float(pointer, source_of(half), used)
        return numbers, self.stored(numbers, wanted)

    def widened(self, halves: Any) -> Any:
        """A vector of bf16 numbers alone as float32, exactly."""
        builder, kind = self.floats.builder, ir.VectorType(I32, self.floats.lanes)
        sixteen = ir.Constant(kind, [I32(16)] * self.floats.lanes)
        return builder.bitcast(builder.shl(builder.zext(halves, kind), sixteen), self.floats.type)

    def rounded(self, x: Any) -> Any:
        builder, lanes = self.floats.builder, self.floats.lanes
        kind = ir.VectorType(I32, lanes)
        if self.native:
            halves = builder.fptrunc(x, ir.VectorType(BFLOAT, lanes))
            return builder.zext(builder.bitcast(halves, ir.VectorType(I16, lanes)), kind)

        def constant(value: int) -> Any:
            return ir.Constant(kind, [I32(value)] * lanes)

        bits = builder.bitcast(x, kind)
        upper = builder.lshr(bits, constant(16))
        tie = builder.add(builder.and_(upper, constant(1)), constant(0x7FFF))
        nearest = builder.lshr(builder.add(bits, tie), constant(16))
        return builder.select(builder.fcmp_unordered("uno", x, x), builder.or_(upper, constant(0x40)), nearest)

    def narrowed(self, x: Any) -> Any:
        """A vector of float32 numbers rounded to one half as long, of bf16 numbers alone."""
        return self.floats.builder.trunc(self.rounded(x), ir.VectorType(I16, self.floats.lanes))

    def stored(self, x: Any, half: bool) -> Any:
        """A vector of float32 numbers as it is stored: as it is, or as bf16 numbers."""
        return self.narrowed(x) if half else x

    def pair(self, even: Any, odd: Any) -> Any:
        """Lane by lane, `even` in the lower half (the lower address) and `odd` in the upper."""
        builder = self.floats.builder
        sixteen = ir.Constant(even.type, [I32(16)] * self.floats.lanes)
        return builder.or_(even, builder.shl(odd, sixteen))

    def rounded_pair(self, even: Any, odd: Any) -> Any:
        """`pair` of two rounded vectors of 16 float32 numbers, in two instructions where the CPU converts by itself."""
        if not self.native:
            return self.pair(self.rounded(even), self.rounded(odd))
        builder = self.floats.builder
        halves = narrowed_pair(builder, even, odd)
        order = [I32(lane) for i in range(TILE) for lane in (i, TILE + i)]
        mixed = builder.shuffle_vector(halves, halves, ir.Constant(ir.VectorType(I32, 2 * TILE), order))
        return builder.bitcast(mixed, ir.VectorType(I32, TILE))


def narrowed_pair(builder: Any, low: Any, high: Any) -> Any:
    """Two vectors of 16 float32 numbers as one of 32 bf16 numbers, where the CPU converts by itself."""
    kind = ir.VectorType(BFLOAT, 2 * TILE)
    convert = declare(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", kind, [low.type, high.type])
    return builder.bitcast(builder.call(convert, [high, low]), ir.VectorType(I16, 2 * TILE))


def to_bf16(count: int, lanes: int, native: bool) -> Any:
    """A function for kernels: ``kernel(x, y)`` rounds `count` float32 numbers at x to bf16 at y (addresses)."""

    @intrinsic
    def kernel(typingctx: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, lanes)
            source, target = floats.pointer(args[0]), builder.inttoptr(args[1], I16.as_pointer())

            def convert(offset: Any, used: int) -> None:
                narrow = Bf16Lanes(floats, native).narrowed(floats.load(floats.at(source, offset), used))
                floats.store(narrow, builder.gep(target, [offset]), used)

            for_vectors(builder, count, lanes, convert)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return kernel


def move_and_peak(count: int) -> Any:
    """A function for kernels: ``kernel(x, y)`` copies `count` bf16 numbers and tells the bits of their largest size.

    NaN counts as larger than infinity.
    """

    @intrinsic
    def kernel(typingctx: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vectors = Floats(builder, 2 * TILE)  # of bf16: 64 bytes
            source, target = (builder.inttoptr(address, I16.as_pointer()) for address in args)
            kind = ir.VectorType(I16, 2 * TILE)
            unsigned = ir.Constant(kind, [I16(0x7FFF)] * (2 * TILE))

            def moved(offset: Any, used: int, largest: Any) -> Any:
                value = vectors.load_as(I16, builder.gep(source, [offset]), used)
                vectors.store(value, builder.gep(target, [offset]), used)
                size = builder.and_(value, unsigned)
                return builder.select(builder.icmp_unsigned(">", size, largest), size, largest)

            def step(i: Any, held: list[Any]) -> list[Any]:
                return [moved(builder.mul(i, I64(2 * TILE)), 2 * TILE, held[0])]

            whole, rest = divmod(count, 2 * TILE)
            (found,) = carried_loop(builder, I64(whole), [ir.Constant(kind, None)], step)
            if rest:
                found = moved(I64(whole * 2 * TILE), rest, found)
            return builder.call(declare(builder, f"llvm.vector.reduce.umax.v{2 * TILE}i16", I16, [kind]), [found])

        return types.uint16(types.int64, types.int64), generate

    return kernel


def pair_up(count: int, distance: int, lanes: int) -> Any:
    """A function for kernels: ``kernel(x, y)`` rounds x[i] and x[i + distance] to a word y[i], for `count` i.

    distance 0 stands for none: zero takes the place of the second number. The CPU must convert by itself.
    """

    @intrinsic
    def kernel(typingctx: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, lanes)
            source, target = (floats.pointer(address) for address in args)

            def convert(offset: Any, used: int) -> None:
                place = floats.at(source, offset)
                second = floats.load(floats.at(place, distance), used) if distance else floats.zero
                words = Bf16Lanes(floats, native=True).rounded_pair(floats.load(place, used), second)
                floats.store(words, floats.at(target, offset), used)

            for_vectors(builder, count, lanes, convert)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return kernel


def pair_lanes(native: bool) -> Any:
    """A function for kernels: ``kernel(x, lane, further, y)`` rounds x[lane j] and x[lane j + further] to a word y[j].

    x and y are addresses, for 16 j; distances count float32 numbers.
    """

    @intrinsic
    def kernel(typingctx: Any, x: Any, lane: Any, further: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, TILE)
            numbers, first = Bf16Lanes(floats, native), floats.pointer(args[0])
            places = [floats.at(first, builder.mul(args[1], I64(j))) for j in range(TILE)]
            even = floats.collect(places)
            odd = floats.collect([floats.at(place, args[2]) for place in places])
            floats.store(numbers.rounded_pair(even, odd), floats.pointer(args[3]))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return kernel


def _interleaved(first: int) -> Any:
    """The shuffle of two vectors of 32 numbers that takes 16 of each, from the first on, in turns."""
    lanes = [I32(lane) for i in range(first, first + TILE) for lane in (i, 2 * TILE + i)]
    return ir.Constant(ir.VectorType(I32, 2 * TILE), lanes)


@dataclass(frozen=True)
class Pairs:
    """x [depth, columns] (`source`) -> y [pair of rows][tile of 16 columns][16][2] bf16; strides in elements.

    An odd depth and columns that are no multiple of 16 are filled up with zeros: a whole tile row is always written.
    Weights for `AmxGemm`: y_pair=32, y_tile=step*16, one call for each step.
    """

    depth: int
    columns: int
    x_row: int
    y_pair: int
    y_tile: int
    source: Source = "bf16"
    native: bool = True


def pack_pairs(spec: Pairs) -> Any:
    """A function for kernels: ``kernel(x, y)``, addresses as int64."""

    @intrinsic
    def kernel(typingctx: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, TILE)
            numbers, wide = Bf16Lanes(floats, spec.native), Floats(builder, 2 * TILE)
            source = builder.inttoptr(args[0], (F32 if spec.source == "fp32" else I16).as_pointer())
            target = builder.inttoptr(args[1], I16.as_pointer())

            def pack(p: Any, both: bool) -> None:
                row = builder.gep(source, [builder.mul(p, I64(2 * spec.x_row))])
                pair = builder.gep(target, [builder.mul(p, I64(spec.y_pair))])

                def tile(j: Any, used: int) -> None:
                    place = builder.gep(row, [builder.mul(j, I64(TILE))])
                    further = floats.at(place, spec.x_row)
                    if not both:
                        value = numbers.load(place, spec.source, used)
                    elif spec.source == "fp32":
                        value = numbers.rounded_pair(floats.load(place, used), floats.load(further, used))
                    else:
                        value = numbers.pair(*(numbers.load(one, spec.source, used) for one in (place, further)))
                    floats.store(value, builder.gep(pair, [builder.mul(j, I64(spec.y_tile))]))

                def two_tiles(i: Any, nothing: list[Any]) -> list[Any]:
                    if both and spec.source == "bf16":
                        place = builder.gep(row, [builder.mul(i, I64(2 * TILE))])
                        rows = [wide.load_as(I16, one, 2 * TILE) for one in (place, floats.at(place, spec.x_row))]
                        for number in range(2):
                            words = builder.shuffle_vector(*rows, _interleaved(number * TILE))
                            tile_number = builder.add(builder.mul(i, I64(2)), I64(number))
                            wide.store(words, builder.gep(pair, [builder.mul(tile_number, I64(spec.y_tile))]))
                    else:
                        for number in range(2):
                            tile(builder.add(builder.mul(i, I64(2)), I64(number)), TILE)
                    return []

                twice, rest = divmod(spec.columns, 2 * TILE)
                carried_loop(builder, I64(twice), [], two_tiles)
                for first in range(0, rest, TILE):
                    tile(I64(2 * twice + first // TILE), min(TILE, rest - first))

            def step(p: Any, nothing: list[Any]) -> list[Any]:
                pack(p, both=True)
                return []

            carried_loop(builder, I64(spec.depth // 2), [], step)
            if spec.depth % 2:
                pack(I64(spec.depth // 2), both=False)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return kernel
