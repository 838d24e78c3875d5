"""Loops over pixels in LLVM IR, a block of channels at a time: for kernels that stream several arrays.

LLVM cannot know that the arrays of a plain loop do not overlap, so with more than two of them it vectorizes nothing.
Here the vectors are written out. Channels are the outer loop: what belongs to a channel (a scale, a sum) stays in
registers while the pixels of a row pass by.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from convolt.engines.jit.bf16 import Bf16Lanes
from convolt.engines.jit.vectors import F32, I8, I16, I32, I64, Floats, carried_loop

F64 = ir.DoubleType()


def on_pixels(generate: Callable[[Any, list[Any], Any], None]) -> Any:
    """A function for kernels, ``kernel((word, ...), pixels)``, written by ``generate(builder, words, pixels)``.

    The words are addresses or numbers, int64.
    """

    @intrinsic
    def kernel(typingctx: Any, addresses: Any, pixels: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values = zip(cgutils.unpack_tuple(builder, args[0]), addresses, strict=True)
            words = [context.cast(builder, value, kind, types.int64) for value, kind in values]
            generate(builder, words, context.cast(builder, args[1], pixels, types.int64))
            return context.get_dummy_value()

        return types.void(addresses, pixels), lower

    return kernel


@dataclass(frozen=True)
class Block:
    """Channels from ``offset`` on, as vectors of which so many lanes are ``used``.

    What is kept for each channel (constants, sums) fills whole vectors; images do not.
    """

    floats: Floats
    offset: Any
    used: tuple[int, ...]

    def _places(self, pointer: Any) -> list[tuple[Any, int]]:
        first = self.floats.at(pointer, self.offset)
        return [(self.floats.at(first, i * self.floats.lanes), used) for i, used in enumerate(self.used)]

    def load(self, pointer: Any) -> list[Any]:
        """Of a pixel; zero in the lanes behind the last channel."""
        return [self.floats.load(place, used) for place, used in self._places(pointer)]

    def load_as(self, element: Any, pointer: Any) -> list[Any]:
        """Of a pixel with other elements."""
        return [self.floats.load_as(element, place, used) for place, used in self._places(pointer)]

    def store(self, values: Sequence[Any], pointer: Any) -> None:
        """To a pixel, of any element."""
        for value, (place, used) in zip(values, self._places(pointer), strict=True):
            self.floats.store(value, place, used)

    def put(self, values: Sequence[Any], pointer: Any, adds: bool = False, narrow: Bf16Lanes | None = None) -> None:
        """To a pixel, or added to what is there; narrow: what rounds them to bf16, to which nothing is added."""
        if narrow is not None:
            values = [narrow.narrowed(value) for value in values]
        elif adds:
            values = [self.floats.builder.fadd(old, new) for old, new in zip(self.load(pointer), values, strict=True)]
        self.store(values, pointer)

    def constants(self, pointer: Any) -> list[Any]:
        """One number a channel."""
        return [self.floats.load(place) for place, _ in self._places(pointer)]

    def accumulate(self, values: Sequence[Any], pointer: Any) -> None:
        """Add float32 numbers to float64 ones, one a channel."""
        builder, wide = self.floats.builder, ir.VectorType(F64, self.floats.lanes)
        for value, (place, _) in zip(values, self._places(pointer), strict=True):
            sums = builder.bitcast(place, wide.as_pointer())
            total = builder.load(sums)
            total.align = 8
            builder.store(builder.fadd(total, builder.fpext(value, wide)), sums).align = 8


def for_blocks(floats: Floats, channels: int, vectors: int, each: Callable[[Block], None]) -> None:
    """``each`` of some blocks of at most ``vectors`` vectors, which cover the channels."""
    whole, rest = divmod(channels, vectors * floats.lanes)

    def step(i: Any, nothing: list[Any]) -> list[Any]:
        each(Block(floats, floats.builder.mul(i, I64(vectors * floats.lanes)), (floats.lanes,) * vectors))
        return []

    if whole:
        carried_loop(floats.builder, I64(whole), [], step)
    if rest:
        full, part = divmod(rest, floats.lanes)
        used = (floats.lanes,) * full + ((part,) if part else ())
        each(Block(floats, I64(whole * vectors * floats.lanes), used))


def element_pointer(builder: Any, address: Any, element: Any = F32) -> Any:
    """An int64 address as a pointer to elements."""
    return builder.inttoptr(address, element.as_pointer())


def number_pointer(builder: Any, address: Any, half: bool) -> Any:
    """An int64 address as a pointer to bf16 numbers or to float32."""
    return element_pointer(builder, address, I16 if half else F32)


def splat(floats: Floats, number: Any, element: Any) -> Any:
    """An integer in every lane, of this element type."""
    builder, kind = floats.builder, ir.VectorType(element, floats.lanes)
    narrow = number if element.width == number.type.width else builder.trunc(number, element)
    undefined = ir.Constant(kind, ir.Undefined)
    lane = builder.insert_element(undefined, narrow, I32(0))
    return builder.shuffle_vector(lane, undefined, ir.Constant(ir.VectorType(I32, floats.lanes), None))


def activated(floats: Floats, x: Any, slope: float) -> Any:
    """The activation with this slope on its negative side: 1 for none, 0 for ReLU."""
    if slope == 1:
        return x
    if slope == 0:
        return floats.relu(x)
    builder = floats.builder
    positive = builder.fcmp_ordered(">", x, floats.zero)
    return builder.select(positive, x, builder.fmul(x, floats.constant(slope)))


def let_through(floats: Floats, dy: Any, y: Any, slope: float) -> Any:
    """The gradient in front of that activation; ``y`` is anything of the sign that it saw."""
    if slope == 1:
        return dy
    builder = floats.builder
    less = floats.zero if slope == 0 else builder.fmul(dy, floats.constant(slope))
    return builder.select(builder.fcmp_ordered(">", y, floats.zero), dy, less)


def beats(floats: Floats, value: Any, best: Any) -> Any:
    """Where a max-pool takes ``value`` for ``best``: it is larger, or a NaN, which no later value replaces."""
    builder = floats.builder
    return builder.or_(builder.fcmp_ordered(">", value, best), builder.fcmp_unordered("uno", value, value))


def largest(floats: Floats, taps: Sequence[Any]) -> tuple[Any, Any]:
    """The largest of some vectors, lane by lane, the first of equals, and its number in bytes."""
    builder, best = floats.builder, taps[0]
    winner = number_of(floats, 0)
    for tap, value in enumerate(taps[1:], start=1):
        better = beats(floats, value, best)
        winner = builder.select(better, number_of(floats, tap), winner)
        best = builder.select(better, value, best)
    return best, winner


def number_of(floats: Floats, tap: int, element: Any = I8) -> Any:
    """The same integer in every lane."""
    return ir.Constant(ir.VectorType(element, floats.lanes), [element(tap)] * floats.lanes)


def let_largest_through(floats: Floats, best: Any, winner: Any, dead: Any) -> tuple[Any, Any]:
    """ReLU of it: where that is closed zero, and ``dead`` for its tap."""
    builder = floats.builder
    closed = builder.fcmp_ordered("<=", best, floats.zero)
    return builder.select(closed, floats.zero, best), builder.select(closed, dead, winner)
