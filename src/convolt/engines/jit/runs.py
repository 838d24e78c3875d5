"""Planes of pixels as operands of tile products: runs of a plane, one for each tap, and their transpose.

A tap of a filter is a constant distance between pixels, so both are loads at constant offsets from one address. In
LLVM IR because a tap's loads and stores are a handful of instructions, and there are a few hundred for 16 pixels.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.bf16 import Bf16Lanes
from convolt.engines.jit.vectors import F32, I8, I16, I64, Floats, carried_loop, for_vectors, joined, transposed

LANES = 16
DEPTH = 32  # numbers of a tile row
PIECE = 8  # numbers of 128 bits, inside of which shuffles are cheapest


@dataclass(frozen=True)
class ScaledRow:
    """``count`` numbers of an image's row, bytes or float32; native: whether the CPU rounds to bf16."""

    count: int
    bytes: bool
    native: bool


def scaled_row(spec: ScaledRow) -> Any:
    """A function for kernels: ``kernel(row, target, scale, shift)``, addresses: ``row scale + shift`` in bf16."""

    @intrinsic
    def kernel(typingctx: Any, row: Any, target: Any, scale: Any, shift: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, LANES)
            numbers, element = Bf16Lanes(floats, spec.native), I8 if spec.bytes else F32
            source = builder.inttoptr(args[0], element.as_pointer())
            pixels = builder.inttoptr(args[1], I16.as_pointer())
            scale, shift = (floats.broadcast(floats.pointer(address)) for address in args[2:])

            def scaled(offset: Any, used: int) -> None:
                value = floats.load_as(element, builder.gep(source, [offset]), used)
                if spec.bytes:
                    value = builder.uitofp(value, floats.type)
                value = builder.fadd(builder.fmul(value, scale), shift)
                floats.store(numbers.narrowed(value), builder.gep(pixels, [offset]), used)

            for_vectors(builder, spec.count, LANES, scaled)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return kernel


@dataclass(frozen=True)
class Columns:
    """16 pixels in a row and all ``taps`` (distances in pixels) as rows of ``depth`` bf16 numbers, zero behind."""

    taps: tuple[int, ...]
    depth: int


def columns(spec: Columns) -> Any:
    """A function for kernels: ``kernel(pixels, target)``, addresses; the rows lie one behind another.

    All happens inside of 128 bits: a vector is eight pixels of taps that lie eight apart. Cost: 64 loads of 16 bytes,
    64 shuffles and inserts, and 16 stores for each 32 taps.
    """

    @intrinsic
    def kernel(typingctx: Any, pixels: Any, target: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vectors = Floats(builder, DEPTH)  # of bf16: 64 bytes
            source, rows = (builder.inttoptr(address, I16.as_pointer()) for address in args)
            pieces, zero = Floats(builder, PIECE), ir.Constant(ir.VectorType(I16, PIECE), None)

            def run(number: int, pixel: int) -> Any:
                """Eight pixels of a tap."""
                if number >= len(spec.taps):
                    return zero
                return pieces.load_as(I16, pieces.at(source, spec.taps[number] + pixel), PIECE)

            for start in range(0, spec.depth, DEPTH):
                for first in range(0, LANES, PIECE):
                    lines = [
                        joined(builder, [run(start + i + j, first) for j in range(0, DEPTH, PIECE)])
                        for i in range(PIECE)
                    ]
                    for pixel, row in enumerate(transposed(builder, lines), start=first):
                        vectors.store(row, vectors.at(rows, pixel * spec.depth + start))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return kernel


@dataclass(frozen=True)
class Runs:
    """``used`` pixels from each of the ``taps`` on, followed by zeros up to ``length``; a run every ``row`` numbers."""

    taps: tuple[int, ...]
    used: int
    length: int
    row: int


def runs(spec: Runs) -> Any:
    """A function for kernels: ``kernel(pixels, target)``, addresses of bf16."""

    @intrinsic
    def kernel(typingctx: Any, pixels: Any, target: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vectors = Floats(builder, DEPTH)  # of bf16: 64 bytes
            source, rows = (builder.inttoptr(address, I16.as_pointer()) for address in args)
            whole, rest = divmod(spec.used, DEPTH)
            zero = ir.Constant(ir.VectorType(I16, DEPTH), None)

            def step(i: Any, nothing: list[Any]) -> list[Any]:
                offset = builder.mul(i, I64(DEPTH))
                place, run = builder.gep(source, [offset]), builder.gep(rows, [offset])
                for number, tap in enumerate(spec.taps):
                    value = vectors.load_as(I16, vectors.at(place, tap), DEPTH)
                    vectors.store(value, vectors.at(run, number * spec.row))
                return []

            carried_loop(builder, I64(whole), [], step)
            for number, tap in enumerate(spec.taps):
                behind = whole * DEPTH
                if rest:
                    value = vectors.load_as(I16, vectors.at(source, tap + behind), rest)
                    vectors.store(value, vectors.at(rows, number * spec.row + behind))
                    behind += DEPTH
                for place in range(behind, spec.length, DEPTH):
                    vectors.store(zero, vectors.at(rows, number * spec.row + place))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return kernel
