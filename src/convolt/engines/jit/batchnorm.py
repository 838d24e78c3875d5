"""BatchNorm on a row of pixels, in LLVM IR: sums, normalization, and both passes of the gradient.

With the channel's constants mean, inverse (1 / standard deviation), scale and shift, for every pixel

    y  = outer(pool(act(scale x + shift)) + skip)                 pool or skip, or neither
    dx = scale dy' + a + b (x - mean)                             dy' = dy in front of the activation

The activation's sign is computed again from x wherever it is needed, by the same instructions, so its output has not to
be read; with a pool it is not even kept, and backward x goes by the code of the tap that won. Each row of constants
fills whole vectors.
"""

from typing import Any

from llvmlite import ir

from convolt.engines.jit.bf16 import Bf16Lanes
from convolt.engines.jit.kernels.specs import NormSpec
from convolt.engines.jit.pixels import (
    Block,
    activated,
    element_pointer,
    for_blocks,
    largest,
    let_through,
    number_of,
    number_pointer,
    on_pixels,
)
from convolt.engines.jit.vectors import I8, I16, I64, Floats, carried_loop

DOUBLE = 8  # bytes
MEAN, INVERSE, SCALE, SHIFT = range(4)  # rows of constants


def add_moments(spec: NormSpec) -> Any:
    """``kernel((x, pivot, sums), pixels)``: adds x - pivot and its square to two rows of float64."""

    def generate(builder: Any, addresses: list[Any], pixels: Any) -> None:
        floats = Floats(builder, spec.lanes)
        x, pivots = (number_pointer(builder, address, spec.x.half) for address in addresses[:2])
        sums = floats.pointer(addresses[2])

        def block(b: Block) -> None:
            pivot = _load(b, spec.x.half, pivots)

            def pixel(i: Any, held: list[Any]) -> list[Any]:
                values = _load(b, spec.x.half, floats.at(x, builder.mul(i, I64(spec.x.C))))
                deltas = [builder.fsub(value, base) for value, base in zip(values, pivot, strict=True)]
                firsts = [builder.fadd(total, delta) for total, delta in zip(held, deltas, strict=False)]
                squares = held[len(deltas) :]
                seconds = [floats.multiply_add(d, d, total) for d, total in zip(deltas, squares, strict=True)]
                return firsts + seconds

            _add_up(b, carried_loop(builder, pixels, [floats.zero] * 2 * len(b.used), pixel), sums, spec)

        for_blocks(floats, spec.x.C, 4, block)

    return on_pixels(generate)


def apply(spec: NormSpec) -> Any:
    """``kernel((x, constants, y, skip, codes), pixels)`` of y: normalization, activation, pool or sum, activation."""

    def generate(builder: Any, addresses: list[Any], pixels: Any) -> None:
        floats = Floats(builder, spec.lanes)
        constants, skip = (floats.pointer(addresses[i]) for i in (1, 3))
        x, y = number_pointer(builder, addresses[0], spec.x.half), number_pointer(builder, addresses[2], spec.y.half)
        codes = element_pointer(builder, addresses[4], I8)
        taps, numbers = _taps(spec, spec.x.pitch), Bf16Lanes(floats, spec.native)

        def block(b: Block) -> None:
            scale, shift = (b.constants(floats.at(constants, row * spec.columns)) for row in (SCALE, SHIFT))

            def pixel(i: Any, nothing: list[Any]) -> list[Any]:
                place = builder.mul(i, I64(spec.x.C))
                first = floats.at(x, builder.mul(i, I64(spec.x.C * spec.pool[1])))
                values = [
                    _normalized(floats, _load(b, spec.x.half, floats.at(first, tap)), scale, shift) for tap in taps
                ]
                best = values[0]
                if len(taps) > 1:
                    found = [largest(floats, vectors) for vectors in zip(*values, strict=True)]
                    best = [value for value, _ in found]
                    b.store([winner for _, winner in found], builder.gep(codes, [place]))
                best = [activated(floats, value, spec.slope) for value in best]
                if spec.skip is not None:
                    others = b.load(floats.at(skip, place))
                    best = [builder.fadd(value, other) for value, other in zip(best, others, strict=True)]
                    best = [activated(floats, value, spec.outer) for value in best]
                b.put(best, floats.at(y, place), narrow=numbers if spec.y.half else None)
                return []

            carried_loop(builder, pixels, [], pixel)

        for_blocks(floats, spec.x.C, 2, block)

    return on_pixels(generate)


def add_slopes(spec: NormSpec) -> Any:
    """``kernel((x, y, dy, codes, constants, sums), pixels)``: adds dy' and dy' (x - mean) to two rows of float64."""

    def generate(builder: Any, addresses: list[Any], pixels: Any) -> None:
        floats = Floats(builder, spec.lanes)
        x = number_pointer(builder, addresses[0], spec.x.half)
        y, constants, sums = (floats.pointer(addresses[i]) for i in (1, 4, 5))
        dy = number_pointer(builder, addresses[2], spec.half_dy)
        codes = element_pointer(builder, addresses[3], I8)
        taps = _taps(spec, spec.x.pitch)

        def block(b: Block) -> None:
            mean, scale, shift = (b.constants(floats.at(constants, row * spec.columns)) for row in (MEAN, SCALE, SHIFT))

            def pixel(i: Any, held: list[Any]) -> list[Any]:
                place = builder.mul(i, I64(spec.x.C))
                first = floats.at(x, builder.mul(i, I64(spec.x.C * spec.pool[1])))
                values = _load(b, spec.x.half, floats.at(first, taps[0]))
                if len(taps) > 1:
                    winners = b.load_as(I8, builder.gep(codes, [place]))
                    for number, tap in enumerate(taps[1:], start=1):
                        others = _load(b, spec.x.half, floats.at(first, tap))
                        won = [_is(floats, winner, number) for winner in winners]
                        values = [builder.select(*choice) for choice in zip(won, others, values, strict=True)]
                slopes = _outer_slopes(spec, b, floats.at(dy, place), floats.at(y, place))
                signs = _normalized(floats, values, scale, shift)
                slopes = [let_through(floats, g, v, spec.slope) for g, v in zip(slopes, signs, strict=True)]
                deltas = [builder.fsub(value, middle) for value, middle in zip(values, mean, strict=True)]
                products = held[len(slopes) :]
                return [
                    *(builder.fadd(total, g) for total, g in zip(held, slopes, strict=False)),
                    *(floats.multiply_add(g, d, t) for g, d, t in zip(slopes, deltas, products, strict=True)),
                ]

            _add_up(b, carried_loop(builder, pixels, [floats.zero] * 2 * len(b.used), pixel), sums, spec)

        for_blocks(floats, spec.x.C, 2, block)

    return on_pixels(generate)


def backward(spec: NormSpec) -> Any:
    """``kernel((x, y, dy, codes, constants, a and b, dx, dskip), pixels)`` of y: writes or adds dx and dskip."""

    def generate(builder: Any, addresses: list[Any], pixels: Any) -> None:
        floats = Floats(builder, spec.lanes)
        x, dx = number_pointer(builder, addresses[0], spec.x.half), number_pointer(builder, addresses[6], spec.half_dx)
        y, constants, terms, dskip = (floats.pointer(addresses[i]) for i in (1, 4, 5, 7))
        dy = number_pointer(builder, addresses[2], spec.half_dy)
        codes = element_pointer(builder, addresses[3], I8)
        taps, targets = _taps(spec, spec.x.pitch), _taps(spec, spec.x.W * spec.x.C)
        numbers = Bf16Lanes(floats, spec.native)

        def block(b: Block) -> None:
            mean, scale, shift = (b.constants(floats.at(constants, row * spec.columns)) for row in (MEAN, SCALE, SHIFT))
            offsets, factors = (b.constants(floats.at(terms, row * spec.columns)) for row in (0, 1))

            def gradient(value: Any, g: Any, i: int) -> Any:
                """Of one vector of x."""
                sign = floats.multiply_add(value, scale[i], shift[i])
                rest = floats.multiply_add(builder.fsub(value, mean[i]), factors[i], offsets[i])
                return floats.multiply_add(let_through(floats, g, sign, spec.slope), scale[i], rest)

            def pixel(i: Any, nothing: list[Any]) -> list[Any]:
                place, first = builder.mul(i, I64(spec.x.C)), builder.mul(i, I64(spec.x.C * spec.pool[1]))
                slopes = _outer_slopes(spec, b, floats.at(dy, place), floats.at(y, place))
                if spec.skip is not None and spec.wants_skip:
                    b.put(slopes, floats.at(dskip, place), spec.adds_skip)
                winners = b.load_as(I8, builder.gep(codes, [place])) if len(taps) > 1 else []
                for number, (tap, target) in enumerate(zip(taps, targets, strict=True)):
                    values, sent = _load(b, spec.x.half, floats.at(x, first, tap)), slopes
                    if winners:
                        won = [_is(floats, winner, number) for winner in winners]
                        sent = [builder.select(w, g, floats.zero) for w, g in zip(won, slopes, strict=True)]
                    result = [gradient(value, g, j) for j, (value, g) in enumerate(zip(values, sent, strict=True))]
                    b.put(result, floats.at(dx, first, target), spec.add, numbers if spec.half_dx else None)
                return []

            carried_loop(builder, pixels, [], pixel)

        for_blocks(floats, spec.x.C, 2, block)

    return on_pixels(generate)


def _load(b: Block, half: bool, pointer: Any) -> list[Any]:
    """A pixel of bf16 or of float32."""
    if not half:
        return b.load(pointer)
    numbers = Bf16Lanes(b.floats, native=True)  # nothing is rounded
    return [numbers.widened(halves) for halves in b.load_as(I16, pointer)]


def _taps(spec: NormSpec, pitch: int) -> tuple[int, ...]:
    """Offsets of a window's pixels in an image with rows of this pitch."""
    return tuple(i * pitch + j * spec.x.C for i in range(spec.pool[0]) for j in range(spec.pool[1]))


def _normalized(floats: Floats, values: list[Any], scale: list[Any], shift: list[Any]) -> list[Any]:
    return [floats.multiply_add(*three) for three in zip(values, scale, shift, strict=True)]


def _is(floats: Floats, codes: Any, number: int) -> Any:
    return floats.builder.icmp_unsigned("==", codes, number_of(floats, number))


def _outer_slopes(spec: NormSpec, b: Block, dy: Any, y: Any) -> list[Any]:
    """The gradient in front of the activation behind the sum, if there is one."""
    slopes = _load(b, spec.half_dy, dy)
    if spec.skip is None or spec.outer == 1:
        return slopes
    return [let_through(b.floats, g, v, spec.outer) for g, v in zip(slopes, b.load(y), strict=True)]


def _add_up(b: Block, totals: list[Any], sums: Any, spec: NormSpec) -> None:
    """Two rows of float64 sums; ``sums`` is a pointer to float32."""
    builder, half = b.floats.builder, len(b.used)
    first = builder.bitcast(sums, ir.DoubleType().as_pointer())
    for row, values in enumerate((totals[:half], totals[half:])):
        b.accumulate(values, b.floats.at(first, row * spec.columns))
