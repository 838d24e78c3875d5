"""The transforms of Winograd's convolution F(2x2, 3x3), one row of tiles at a time; channels are the lanes.

    y = A^T [ (G w G^T) * (B^T x B) ] A        x 4x4 pixels, y 2x2 pixels, * element by element and summed over channels

           1  0 -1  0           1   0   0           1  1  1  0
    B^T =  0  1  1  0     G =  1/2 1/2 1/2    A^T =  0  1 -1 -1
           0 -1  1  0          1/2 -1/2 1/2
           0  1  0 -1           0   0   1

A tile of 2x2 outputs takes 16 products of each channel and filter where the sum over taps takes 36 (Lavin and Gray
2016). What a transform writes, it writes into 16 planes; in each a tile has its channels, in float32 or bf16. The
gradient of the transformed filters is the product of B^T x B with A dy A^T, the transform of ``slope_tiles``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.bf16 import Bf16Lanes
from convolt.engines.jit.kernels.winograd_specs import Written
from convolt.engines.jit.pixels import activated
from convolt.engines.jit.vectors import F32, I8, I16, I32, I64, Floats, carried_loop, for_vectors

Transformed = tuple[Iterator[Any], list[Any]]
"""The 16 values of a tile, and what the next one of the row takes over."""


@dataclass(frozen=True)
class TileRow:
    """A row of ``tiles``, which have ``channels``; pixels are ``pixel`` elements apart, rows of them ``pitch``.

    Planes are ``plane`` words of 32 bits apart. written: what a transform writes into them.
    """

    tiles: int
    channels: int
    pixel: int
    pitch: int
    plane: int
    lanes: int
    written: Written = "fp32"


def input_tiles(spec: TileRow) -> Any:
    """``kernel(x, v)``: v = B^T x B; x is the first pixel of the first tile. Tiles share two columns of pixels."""

    @intrinsic
    def kernel(typingctx: Any, x: Any, v: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, spec.lanes)
            source, target = floats.pointer(args[0]), args[1]

            def channels(offset: Any, used: int) -> None:
                first = floats.at(source, offset)

                def column(pixel: Any) -> list[Any]:
                    place = floats.at(first, builder.mul(pixel, I64(spec.pixel)))
                    return _input(builder, [floats.load(floats.at(place, i * spec.pitch), used) for i in range(4)])

                def tile(t: Any, held: list[Any]) -> Transformed:
                    left = builder.mul(t, I64(2))
                    fresh = [*column(builder.add(left, I64(2))), *column(builder.add(left, I64(3)))]
                    columns = [*held, *fresh]
                    return (value for i in range(4) for value in _input(builder, columns[i::4])), fresh

                _write(floats, spec, target, offset, used, [*column(I64(0)), *column(I64(1))], tile)

            for_vectors(builder, spec.channels, spec.lanes, channels)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return kernel


def slope_tiles(spec: TileRow) -> Any:
    """``kernel(dy, d)``: d = A dy A^T; dy is the first pixel of the first tile."""

    @intrinsic
    def kernel(typingctx: Any, dy: Any, d: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, spec.lanes)
            source, target = floats.pointer(args[0]), args[1]

            def channels(offset: Any, used: int) -> None:
                def tile(t: Any, nothing: list[Any]) -> Transformed:
                    first = floats.at(source, offset, builder.mul(t, I64(2 * spec.pixel)))
                    columns = []
                    for j in range(2):
                        column = floats.at(first, j * spec.pixel)
                        columns += _slope(
                            floats, *(floats.load(floats.at(column, i * spec.pitch), used) for i in (0, 1))
                        )
                    return (value for i in range(4) for value in _slope(floats, *columns[i::4])), []

                _write(floats, spec, target, offset, used, [], tile)

            for_vectors(builder, spec.channels, spec.lanes, channels)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return kernel


def filter_tiles(lanes: int, turned: bool, pairs: bool) -> Any:
    """``kernel(w, other, step, last, u, plane)``: u = G w G^T of as many filters as there are lanes, ``step`` apart.

    Behind the ``last`` one it is taken again. In pairs the filters at ``other``, too, each beside its neighbor at w.
    ``plane``: words from a plane of u to the next. turned: taps in reverse.
    """

    @intrinsic
    def kernel(typingctx: Any, w: Any, other: Any, step: Any, last: Any, u: Any, plane: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, lanes)
            numbers = Bf16Lanes(floats, native=True)
            w, other, step, last, u, plane = args
            order = range(8, -1, -1) if turned else range(9)
            offsets = [
                builder.mul(step, builder.select(builder.icmp_signed("<", I64(i), last), I64(i), last))
                for i in range(lanes)
            ]

            def transformed(address: Any) -> Iterator[Any]:
                filters = [floats.at(floats.pointer(address), offset) for offset in offsets]
                taps = [floats.collect([floats.at(one, tap) for one in filters]) for tap in order]
                rows = [_filter(floats, taps[s::3]) for s in range(3)]
                return (value for i in range(4) for value in _filter(floats, [row[i] for row in rows]))

            values = transformed(w)
            if pairs:
                values = (numbers.rounded_pair(x, y) for x, y in zip(values, transformed(other), strict=True))
            for number, value in enumerate(values):
                floats.store(value, floats.at(floats.pointer(u), builder.mul(plane, I64(number))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return kernel


def filter_taps(lanes: int, accumulate: bool) -> Any:
    """``kernel(du, plane, dw, step)``: dw (+)= G^T du G of as many filters as there are lanes.

    ``plane``: words from a plane of du to the next; filters of dw are ``step`` apart.
    """

    @intrinsic
    def kernel(typingctx: Any, du: Any, plane: Any, dw: Any, step: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, lanes)
            source, plane, target, step = floats.pointer(args[0]), args[1], floats.pointer(args[2]), args[3]
            planes = [floats.load(floats.at(source, builder.mul(plane, I64(number)))) for number in range(16)]
            columns = [_taps(floats, planes[j::4]) for j in range(4)]
            taps = [value for r in range(3) for value in _taps(floats, [column[r] for column in columns])]
            for lane in range(lanes):
                own = floats.at(target, builder.mul(step, I64(lane)))
                for tap, values in enumerate(taps):
                    value, place = builder.extract_element(values, I32(lane)), floats.at(own, tap)
                    builder.store(builder.fadd(builder.load(place), value) if accumulate else value, place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return kernel


def _write(
    floats: Floats,
    spec: TileRow,
    target: Any,
    offset: Any,
    used: int,
    start: list[Any],
    tile: Callable[[Any, list[Any]], Transformed],
) -> None:
    """Some channels of every tile of a row into the planes at ``target``: ``tile(t, held)``, from left to right.

    Its values are computed as they are written, those of a pair in turns, or they would not stay in registers.
    """
    builder, numbers = floats.builder, Bf16Lanes(floats, native=True)
    halves = spec.written == "channels"
    planes = builder.gep(builder.inttoptr(target, (I16 if halves else F32).as_pointer()), [offset])

    def put(entry: Any, values: Iterator[Any]) -> None:
        place = builder.gep(planes, [builder.mul(entry, I64(spec.channels))])
        for number, value in enumerate(values):
            floats.store(value, floats.at(place, number * spec.plane * (2 if halves else 1)), used)

    def one(t: Any, held: list[Any]) -> list[Any]:
        values, held = tile(t, held)
        put(t, (numbers.narrowed(value) for value in values) if halves else values)
        return held

    def two(pair: Any, held: list[Any]) -> list[Any]:
        left = builder.mul(pair, I64(2))
        even, held = tile(left, held)
        odd, held = tile(builder.add(left, I64(1)), held)
        put(pair, (numbers.rounded_pair(x, y) for x, y in zip(even, odd, strict=True)))
        return held

    if spec.written != "tiles":
        carried_loop(builder, I64(spec.tiles), start, one)
        return
    held = carried_loop(builder, I64(spec.tiles // 2), start, two)
    if spec.tiles % 2:
        alone, _ = tile(I64(spec.tiles - 1), held)
        put(I64(spec.tiles // 2), (numbers.rounded_pair(value, floats.zero) for value in alone))


@dataclass(frozen=True)
class Finish:
    """What becomes of y: bias, activation of this slope (1 for none), max-pool 2x2 with the code of a `dead` ReLU.

    add: to what is there.
    """

    bias: bool
    slope: float
    pooled: bool
    dead: int
    add: bool


def output_tiles(spec: TileRow, finish: Finish) -> Any:
    """``kernel(m, bias, y, codes)``: y = A^T m A of each tile, finished; y is its first pixel, codes (tiles, channels).

    Pooled, a tile is one pixel of y.
    """

    @intrinsic
    def kernel(typingctx: Any, m: Any, bias: Any, y: Any, codes: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, spec.lanes)
            source, offsets, target = (floats.pointer(args[i]) for i in range(3))
            code = builder.inttoptr(args[3], I8.as_pointer())

            def channels(offset: Any, used: int) -> None:
                def tile(t: Any, nothing: list[Any]) -> list[Any]:
                    own = builder.mul(t, I64(spec.channels))
                    place = floats.at(source, offset, own)
                    rows: list[list[Any]] = [[], []]
                    for j in range(4):
                        column = [floats.load(floats.at(place, (4 * i + j) * spec.plane), used) for i in range(4)]
                        for row, value in zip(rows, _output(builder, column), strict=True):
                            row.append(value)
                    values = [value for row in rows for value in _output(builder, row)]
                    shift = floats.load(floats.at(offsets, offset), used) if finish.bias else None
                    if finish.pooled:
                        best, winner = _largest(floats, finish, values, shift)
                        floats.store(best, floats.at(target, offset, builder.mul(t, I64(spec.pixel))), used)
                        floats.store(winner, builder.gep(code, [builder.add(offset, own)]), used)
                        return []
                    first = floats.at(target, offset, builder.mul(t, I64(2 * spec.pixel)))
                    for number, value in enumerate(values):
                        pixel = floats.at(first, number // 2 * spec.pitch + number % 2 * spec.pixel)
                        total = value if shift is None else builder.fadd(value, shift)
                        if finish.add:
                            total = builder.fadd(total, floats.load(pixel, used))
                        floats.store(activated(floats, total, finish.slope), pixel, used)
                    return []

                carried_loop(builder, I64(spec.tiles), [], tile)

            for_vectors(builder, spec.channels, spec.lanes, channels)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return kernel


def _input(builder: Any, d: list[Any]) -> list[Any]:
    """B^T d of four vectors."""
    return [builder.fsub(d[0], d[2]), builder.fadd(d[1], d[2]), builder.fsub(d[2], d[1]), builder.fsub(d[1], d[3])]


def _slope(floats: Floats, a: Any, b: Any) -> list[Any]:
    """A d of two vectors."""
    builder = floats.builder
    return [a, builder.fadd(a, b), builder.fsub(a, b), builder.fsub(floats.zero, b)]


def _output(builder: Any, m: list[Any]) -> list[Any]:
    """A^T m of four vectors."""
    high, low = builder.fadd(m[1], m[2]), builder.fsub(m[1], m[2])
    return [builder.fadd(m[0], high), builder.fsub(low, m[3])]


def _filter(floats: Floats, w: list[Any]) -> list[Any]:
    """G w of three vectors."""
    builder, half = floats.builder, floats.constant(0.5)
    total, middle = builder.fmul(half, builder.fadd(w[0], w[2])), builder.fmul(half, w[1])
    return [w[0], builder.fadd(total, middle), builder.fsub(total, middle), w[2]]


def _taps(floats: Floats, u: list[Any]) -> list[Any]:
    """G^T u of four vectors."""
    builder, half = floats.builder, floats.constant(0.5)
    total = builder.fmul(half, builder.fadd(u[1], u[2]))
    difference = builder.fmul(half, builder.fsub(u[1], u[2]))
    return [builder.fadd(u[0], total), difference, builder.fadd(total, u[3])]


def _largest(floats: Floats, finish: Finish, values: list[Any], shift: Any) -> tuple[Any, Any]:
    """The largest, the first of equals, with bias and ReLU; and which it was, or that ReLU let nothing through."""
    builder, kind = floats.builder, ir.VectorType(I8, floats.lanes)
    best, winner = values[0], ir.Constant(kind, [I8(0)] * floats.lanes)
    for tap, value in enumerate(values[1:], start=1):
        better = builder.fcmp_ordered(">", value, best)
        winner = builder.select(better, ir.Constant(kind, [I8(tap)] * floats.lanes), winner)
        best = builder.select(better, value, best)
    if shift is not None:
        best = builder.fadd(best, shift)
    if finish.slope == 0:
        dead = builder.fcmp_ordered("<=", best, floats.zero)
        winner = builder.select(dead, ir.Constant(kind, [I8(finish.dead)] * floats.lanes), winner)
        best = builder.select(dead, floats.zero, best)
    return best, winner
