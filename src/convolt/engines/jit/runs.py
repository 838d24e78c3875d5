"""Planes of pixels as operands of tile products: runs of a plane, one for each tap, and their transpose.

A tap of a filter is a constant distance between pixels, so both are loads at constant offsets from one address. In
LLVM IR because a tap's loads and stores are a handful of instructions, and there are a few hundred for 16 pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.bf16 import Bf16Lanes
from convolt.engines.jit.vectors import F32, I8, I16, I32, I64, Floats, carried_loop, for_vectors, joined, transposed

LANES = 16
DEPTH = 32  # numbers of a tile row
PIECE = 8  # numbers of 128 bits, inside of which shuffles are cheapest
PER_VECTOR = DEPTH // PIECE
ONE = 0x3F80  # the bits of a one in bf16


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
    """16 pixels in a row and all ``taps`` (distances in pixels) as rows of ``depth`` bf16 numbers, ones behind.

    Filters may have their bias there, and zeros.
    """

    taps: tuple[int, ...]
    depth: int


def columns(spec: Columns) -> Any:
    """A function for kernels: ``kernel(pixels, target)``, addresses; the rows lie one behind another.

    Cost for 32 taps of 16 pixels, beside 16 stores: where two vectors hold all that some pixels want, one permutation
    of both for each pixel, and for each group of so many pixels a load of 16 bytes a run; else 64 such loads and 64
    shuffles and inserts.
    """

    @intrinsic
    def kernel(typingctx: Any, pixels: Any, target: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vectors = Floats(builder, DEPTH)  # of bf16: 64 bytes
            source, rows = (builder.inttoptr(address, I16.as_pointer()) for address in args)
            for start in range(0, spec.depth, DEPTH):
                taps = spec.taps[start : start + DEPTH]
                served = _served(taps)
                found = _turned(builder, source, taps) if served is None else _picked(builder, source, taps, served)
                for pixel, row in enumerate(found):
                    vectors.store(row, vectors.at(rows, pixel * spec.depth + start))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return kernel


def _turned(builder: Any, source: Any, taps: Sequence[int]) -> Iterator[Any]:
    """Rows of up to 32 taps for 16 pixels: vectors of eight pixels of taps that lie eight apart, transposed.

    All shuffles are inside of 128 bits.
    """
    pieces, ones = Floats(builder, PIECE), _ones()

    def run(number: int, pixel: int) -> Any:
        """Eight pixels of a tap."""
        return pieces.load_as(I16, pieces.at(source, taps[number] + pixel), PIECE) if number < len(taps) else ones

    for first in range(0, LANES, PIECE):
        lines = [joined(builder, [run(i + j, first) for j in range(0, DEPTH, PIECE)]) for i in range(PIECE)]
        yield from transposed(builder, lines)


@dataclass(frozen=True)
class _Served:
    """Taps served by runs of eight pixels, for so many ``pixels``; each run's first and last tap; a tap's run."""

    pixels: int
    runs: tuple[tuple[int, int], ...]
    of_tap: tuple[int, ...]

    @property
    def vectors(self) -> int:
        """Vectors that hold the runs, and a one where a row is not full."""
        return -(-(len(self.runs) + (len(self.of_tap) < DEPTH)) // PER_VECTOR)

    @property
    def cost(self) -> float:
        """Of a pixel, in permutations of one vector; runs are brought together by twice as many units."""
        return self.vectors + len(self.runs) / self.pixels / 2


def _served(taps: Sequence[int]) -> _Served | None:
    """The cheapest way with at most two vectors, if there is one: the more pixels a run serves, the fewer taps."""
    ways = []
    for pixels in range(1, PIECE + 1):
        runs: list[tuple[int, int]] = []
        for tap in sorted(taps):
            if not runs or tap - runs[-1][0] > PIECE - pixels:
                runs.append((tap, tap))
            runs[-1] = runs[-1][0], tap
        of_tap = tuple(next(i for i, (low, high) in enumerate(runs) if low <= tap <= high) for tap in taps)
        ways.append(_Served(pixels, tuple(runs), of_tap))
    return min((way for way in ways if way.vectors <= 2), key=lambda way: way.cost, default=None)


def _ones() -> Any:
    """Eight times the number one in bf16."""
    return ir.Constant(ir.VectorType(I16, PIECE), [I16(ONE)] * PIECE)


def _picked(builder: Any, source: Any, taps: Sequence[int], served: _Served) -> Iterator[Any]:
    """The same rows: some pixels' runs lie in a vector or two, and a permutation brings each number to its lane."""
    pieces = Floats(builder, PIECE)
    for first in range(0, LANES, served.pixels):
        # Nothing is read behind what the last pixel's taps want.
        begins = [min(low + first, high + LANES - PIECE) for low, high in served.runs]
        runs = [pieces.load_as(I16, pieces.at(source, begin), PIECE) for begin in begins]
        runs += [_ones()] * (served.vectors * PER_VECTOR - len(runs))
        one, other = joined(builder, runs[:PER_VECTOR]), joined(builder, runs[-PER_VECTOR:])
        for pixel in range(first, min(first + served.pixels, LANES)):
            lanes = [PIECE * run + tap + pixel - begins[run] for tap, run in zip(taps, served.of_tap, strict=True)]
            lanes += [PIECE * len(served.runs)] * (DEPTH - len(taps))
            order = ir.Constant(ir.VectorType(I32, DEPTH), [I32(lane) for lane in lanes])
            yield builder.shuffle_vector(one, other, order)


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
