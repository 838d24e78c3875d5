"""The transforms of Winograd's convolution, one row of tiles at a time; channels are the lanes.

    y = A^T [ (G w G^T) * (B^T x B) ] A        y 2x2 pixels, * element by element and summed over channels

The matrices are those of ``filtering``, along the rows and along the columns of the filter. A 3x3 filter takes 16
products of each channel for 2x2 outputs where the sum over taps takes 36 (Lavin and Gray 2016), a 5x5 one 49 instead of
100. What a transform writes, it writes into planes, as many or, where the filter has twins, fewer; in each a tile has
its channels, in float32 or bf16. The gradient of the transformed filters is the product of B^T x B with A dy A^T, the
transform of ``slope_tiles``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any

from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.bf16 import Bf16Lanes
from convolt.engines.jit.filtering import Axis, Piece
from convolt.engines.jit.kernels.winograd_specs import Written, lone_planes, planes_along
from convolt.engines.jit.pixels import activated, largest, let_largest_through, number_of
from convolt.engines.jit.vectors import F32, I8, I16, I32, I64, Floats, carried_loop, for_vectors

Transformed = tuple[Iterator[Any], list[Any]]
"""The planes of a tile, row by row, and what the next one takes over."""

Tile = Callable[[Any, int, list[Any]], Transformed]
"""``tile(t, wide, held)``: that of tile t, which has so many columns of pixels, with what the last one left."""


@dataclass(frozen=True)
class TileRow:
    """A row of tiles over ``width`` columns and ``high`` rows of pixels, which have ``channels``.

    R, S: of the filter. Pixels are ``pixel`` elements apart, rows of them ``pitch``, planes ``plane`` words of 32 bits.
    written: what a transform writes into them. Of an odd width the last tile has one column of pixels.

    high: two, or one in the last row of an odd height. Twins see a row of tiles further on, behind which there are as
    many rows of pixels fewer: 0 or -1. further: the row has one more tile, for twins of the filter's columns. bundle:
    the number of one of the filter's rows, if only its planes are wanted.
    """

    R: int
    S: int
    width: int
    high: int
    channels: int
    pixel: int
    pitch: int
    plane: int
    lanes: int
    written: Written = "fp32"
    further: bool = False
    bundle: int | None = None

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Of the filter's rows and columns."""
        apart = self.written == "tiles"
        return Axis(self.R, apart, self.bundle), Axis(self.S, apart)

    def wanted(self, plane: int, wide: int) -> bool:
        """Whether anybody reads this plane of a tile with so many columns: of those further on, twins' alone."""
        i, j = divmod(plane, planes_along(self.S))
        rows, columns = lone_planes(self.R, self.bundle), lone_planes(self.S)
        return (self.high > 0 or i >= rows) and (wide > 0 or j >= columns)


def input_tiles(spec: TileRow) -> Any:
    """``kernel(x, v)``: v = B^T x B; x is the first pixel of the first tile.

    The columns of pixels that a tile shares with the next one stay in registers, if the filter's rows are one piece:
    the planes of all columns are too many else, and each piece loads its own pixels.
    """
    rows, columns = spec.axes

    @intrinsic
    def kernel(typingctx: Any, x: Any, v: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, spec.lanes)
            source, target = floats.pointer(args[0]), args[1]

            def channels(offset: Any, used: int) -> None:
                first = floats.at(source, offset)

                def column(pixel: Any, begin: int, piece: Piece) -> list[Any]:
                    place = floats.at(first, builder.mul(pixel, I64(spec.pixel)))
                    there = range(begin, min(begin + piece.planes, spec.high + spec.R - 1))
                    pixels = [floats.load(floats.at(place, i * spec.pitch), used) for i in there]
                    return piece.pixels(floats, [*pixels, floats.zero][: piece.planes])

                def planes(left: Any, wide: int, begin: int, piece: Piece, held: list[Any]) -> list[Any]:
                    there = range(len(held) // piece.planes, min(columns.reach, wide + spec.S - 1))
                    fresh = (column(builder.add(left, I64(j)), begin, piece) for j in there)
                    behind = [floats.zero] * (columns.reach - there.stop) * piece.planes
                    return [*held, *chain.from_iterable(fresh), *behind]

                def across(piece: Piece, values: list[Any]) -> Iterator[Any]:
                    step = piece.planes
                    return (plane for i in range(step) for plane in columns.pixels(floats, values[i::step]))

                def whole(t: Any, wide: int, held: list[Any]) -> Transformed:
                    (begin, piece), left = rows.seen[0], builder.mul(t, I64(2))
                    values = planes(left, wide, begin, piece, held)
                    return across(piece, values), values[2 * piece.planes :]

                def in_pieces(t: Any, wide: int, nothing: list[Any]) -> Transformed:
                    left = builder.mul(t, I64(2))
                    found = (across(piece, planes(left, wide, begin, piece, [])) for begin, piece in rows.seen)
                    return chain.from_iterable(found), []

                if len(replace(rows, bundle=None).seen) > 1:
                    _write(floats, spec, target, offset, used, [], in_pieces)
                else:
                    shared = chain.from_iterable(column(I64(j), *rows.seen[0]) for j in range(columns.reach - 2))
                    _write(floats, spec, target, offset, used, list(shared), whole)

            for_vectors(builder, spec.channels, spec.lanes, channels)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return kernel


def slope_tiles(spec: TileRow) -> Any:
    """``kernel(dy, d)``: d = A dy A^T; dy is the first pixel of the first tile."""
    rows, columns = spec.axes

    @intrinsic
    def kernel(typingctx: Any, dy: Any, d: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, spec.lanes)
            source, target = floats.pointer(args[0]), args[1]

            def channels(offset: Any, used: int) -> None:
                def tile(t: Any, wide: int, nothing: list[Any]) -> Transformed:
                    first = floats.at(source, offset, builder.mul(t, I64(2 * spec.pixel)))

                    def slope(i: int, j: int) -> Any:
                        there = i < spec.high and j < wide
                        return (
                            floats.load(floats.at(first, i * spec.pitch + j * spec.pixel), used)
                            if there
                            else floats.zero
                        )

                    left, right = (rows.slopes(floats, slope(0, j), slope(1, j)) for j in (0, 1))
                    pairs = zip(left, right, strict=True)
                    return (plane for pair in pairs for plane in columns.slopes(floats, *pair)), []

                _write(floats, spec, target, offset, used, [], tile)

            for_vectors(builder, spec.channels, spec.lanes, channels)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return kernel


def filter_tiles(R: int, S: int, lanes: int, turned: bool, pairs: bool) -> Any:
    """``kernel(w, other, step, last, u, plane)``: u = G w G^T of as many filters as there are lanes, ``step`` apart.

    Behind the ``last`` one it is taken again. In pairs the filters at ``other``, too, each beside its neighbor at w.
    ``plane``: words from a plane of u to the next. turned: taps in reverse.
    """
    rows, columns = Axis(R), Axis(S)

    @intrinsic
    def kernel(typingctx: Any, w: Any, other: Any, step: Any, last: Any, u: Any, plane: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, lanes)
            numbers = Bf16Lanes(floats, native=True)
            w, other, step, last, u, plane = args
            order = range(R * S)[::-1] if turned else range(R * S)
            offsets = [
                builder.mul(step, builder.select(builder.icmp_signed("<", I64(i), last), I64(i), last))
                for i in range(lanes)
            ]

            def transformed(address: Any) -> Iterator[Any]:
                filters = [floats.at(floats.pointer(address), offset) for offset in offsets]
                taps = [floats.collect([floats.at(one, tap) for one in filters]) for tap in order]
                along = zip(*(rows.filters(floats, taps[s::S]) for s in range(S)), strict=True)
                return (plane for planes in along for plane in columns.filters(floats, list(planes)))

            values = transformed(w)
            if pairs:
                values = (numbers.rounded_pair(x, y) for x, y in zip(values, transformed(other), strict=True))
            for number, value in enumerate(values):
                floats.store(value, floats.at(floats.pointer(u), builder.mul(plane, I64(number))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return kernel


def filter_taps(R: int, S: int, lanes: int, accumulate: bool) -> Any:
    """``kernel(du, plane, dw, step)``: dw (+)= G^T du G of as many filters as there are lanes.

    ``plane``: words from a plane of du to the next; filters of dw are ``step`` apart.
    """
    rows, columns = Axis(R), Axis(S)

    @intrinsic
    def kernel(typingctx: Any, du: Any, plane: Any, dw: Any, step: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, lanes)
            source, plane, target, step = floats.pointer(args[0]), args[1], floats.pointer(args[2]), args[3]
            numbers = range(rows.products * columns.products)
            planes = [floats.load(floats.at(source, builder.mul(plane, I64(number)))) for number in numbers]
            along = zip(
                *(rows.gradient(floats, planes[j :: columns.products]) for j in range(columns.products)), strict=True
            )
            taps = [tap for values in along for tap in columns.gradient(floats, list(values))]
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
    tile: Tile,
) -> None:
    """Some channels of every tile of a row into the planes at ``target``, from left to right.

    Its values are computed as they are written, those of a pair in turns, or they would not stay in registers.
    """
    builder, numbers = floats.builder, Bf16Lanes(floats, native=True)
    halves = spec.written == "channels"
    planes = builder.gep(builder.inttoptr(target, (I16 if halves else F32).as_pointer()), [offset])

    def put(entry: Any, values: Iterator[Any], wide: int = 2) -> None:
        place = builder.gep(planes, [builder.mul(entry, I64(spec.channels))])
        for number, value in enumerate(values):
            if spec.wanted(number, wide):
                floats.store(value, floats.at(place, number * spec.plane * (2 if halves else 1)), used)

    def one(t: Any, held: list[Any], wide: int = 2) -> list[Any]:
        values, held = tile(t, wide, held)
        put(t, (numbers.narrowed(value) for value in values) if halves else values, wide)
        return held

    def two(pair: Any, held: list[Any], wide: int = 2) -> list[Any]:
        left = builder.mul(pair, I64(2))
        even, held = tile(left, 2, held)
        odd, held = tile(builder.add(left, I64(1)), wide, held)
        put(pair, (numbers.rounded_pair(x, y) for x, y in zip(even, odd, strict=True)))
        return held

    whole, half = divmod(spec.width, 2)
    if spec.written != "tiles":
        held = carried_loop(builder, I64(whole), start, one)
        if half:
            held = one(I64(whole), held, 1)
        if spec.further:
            one(I64(whole + half), held, -half)
        return
    pairs, single = divmod(whole, 2)
    held = carried_loop(builder, I64(pairs), start, two)
    if single and half:
        two(I64(pairs), held, 1)
    elif single or half:
        alone, _ = tile(I64(2 * pairs), 2 if single else 1, held)
        put(I64(pairs), (numbers.rounded_pair(value, floats.zero) for value in alone))


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
    rows, columns = spec.axes

    @intrinsic
    def kernel(typingctx: Any, m: Any, bias: Any, y: Any, codes: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, spec.lanes)
            source, offsets, target = (floats.pointer(args[i]) for i in range(3))
            code = builder.inttoptr(args[3], I8.as_pointer())

            def channels(offset: Any, used: int) -> None:
                def tile(t: Any, nothing: list[Any], wide: int = 2) -> list[Any]:
                    own = builder.mul(t, I64(spec.channels))
                    place = floats.at(source, offset, own)
                    across = range(columns.planes)
                    products = (
                        [
                            floats.load(floats.at(place, (i * columns.planes + j) * spec.plane), used)
                            for i in range(rows.planes)
                        ]
                        for j in across
                    )
                    along = zip(*(rows.outputs(floats, column) for column in products), strict=True)
                    values = [pixel for row in along for pixel in columns.outputs(floats, list(row))]
                    shift = floats.load(floats.at(offsets, offset), used) if finish.bias else None
                    if finish.pooled:
                        best, winner = largest(floats, values)
                        if shift is not None:
                            best = builder.fadd(best, shift)
                        if finish.slope == 0:
                            best, winner = let_largest_through(floats, best, winner, number_of(floats, finish.dead))
                        floats.store(best, floats.at(target, offset, builder.mul(t, I64(spec.pixel))), used)
                        floats.store(winner, builder.gep(code, [builder.add(offset, own)]), used)
                        return []
                    first = floats.at(target, offset, builder.mul(t, I64(2 * spec.pixel)))
                    for i, j in product(range(spec.high), range(wide)):
                        pixel, value = floats.at(first, i * spec.pitch + j * spec.pixel), values[2 * i + j]
                        total = value if shift is None else builder.fadd(value, shift)
                        if finish.add:
                            total = builder.fadd(total, floats.load(pixel, used))
                        floats.store(activated(floats, total, finish.slope), pixel, used)
                    return []

                carried_loop(builder, I64(spec.width // 2), [], tile)
                if spec.width % 2:
                    tile(I64(spec.width // 2), [], 1)

            for_vectors(builder, spec.channels, spec.lanes, channels)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return kernel
