"""Max- and average-pooling over any window.

Windows are cut off at the image's edge, so no padding is ever read. Max-pooling keeps the winning tap, as one byte
unless a window has more taps than a byte counts. All four kernels pass over the windows in the same way
(``_row_of_windows``) and differ in what they do with one: channels are vectors, the taps a loop with the result in
registers. Behind a convolution whose windows overlap, the same passes read and write its scratch memory (``pool_row``,
``pool_behind``, ``unpool_image``).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from llvmlite import ir

from convolt.engines.jit.bf16 import Bf16Lanes
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.isa import converts
from convolt.engines.jit.kernels.specs import DEAD, FLOAT, ConvSpec, Frame, PoolSpec
from convolt.engines.jit.memory import view
from convolt.engines.jit.pixels import (
    Block,
    beats,
    element_pointer,
    for_blocks,
    let_largest_through,
    number_of,
    number_pointer,
    on_pixels,
    splat,
)
from convolt.engines.jit.vectors import F32, I64, Floats, carried_loop

VECTORS = 2  # of a block of channels
Window = Callable[[Block, Any, Any, list[Any], "_Taps"], None]
"""``window(block, x, y, (codes, db), taps)``: what is done with one; x is at its first tap inside the image."""


def max_pool(spec: PoolSpec) -> Callable[..., None]:
    """The largest value of each window, the first of equals; arguments: state, x, y, codes (N, P, Q, C)."""
    return _each_window(spec, spec.x, spec.y, _largest(spec), clears=False)


def max_pool_backward(spec: PoolSpec) -> Callable[..., None]:
    """The gradient goes to the tap that won; arguments: state, dx, dy, codes."""
    return _each_window(spec, spec.x.bare, spec.y.bare, _to_winner(spec), clears=not spec.add)


def average_pool(spec: PoolSpec) -> Callable[..., None]:
    """The mean of each window; arguments: state, x, y, codes (none)."""

    def window(b: Block, x: Any, y: Any, others: list[Any], taps: "_Taps") -> None:
        floats, builder = b.floats, b.floats.builder

        def tap(place: Any, number: Any, held: list[Any]) -> list[Any]:
            values = b.load(floats.at(x, place))
            return [builder.fadd(total, value) for total, value in zip(held, values, strict=True)]

        share = taps.share(spec.count_include_pad)
        b.store([builder.fmul(total, share) for total in taps.each([floats.zero] * len(b.used), tap)], y)

    return _each_window(spec, spec.x, spec.y, window, clears=False)


def average_pool_backward(spec: PoolSpec) -> Callable[..., None]:
    """Each pixel of a window gets its share; arguments: state, dx, dy, codes (none)."""

    def window(b: Block, dx: Any, dy: Any, others: list[Any], taps: "_Taps") -> None:
        share = taps.share(spec.count_include_pad)
        slopes = [b.floats.builder.fmul(slope, share) for slope in b.load(dy)]

        def tap(place: Any, number: Any, nothing: list[Any]) -> list[Any]:
            b.put(slopes, b.floats.at(dx, place), adds=True)
            return []

        taps.each([], tap)

    return _each_window(spec, spec.x.bare, spec.y.bare, window, clears=not spec.add)


# --- fused behind a convolution --------------------------------------------------------------------------------------


def behind(conv: ConvSpec, x: Frame) -> PoolSpec:
    """The pool behind a convolution, whose output lies in this frame."""
    y, relu, native = conv.y, conv.slope == 0, converts(conv.unit)
    plain = PoolSpec(x, y, conv.pooling, y.H, y.W, 1, conv.lanes)
    return replace(plain, relu=relu, codes=conv.codes, bias=conv.bias, native=native)


def pool_row(spec: PoolSpec) -> Callable[[int, int, int, int, int], None]:
    """A row of windows: ``row(x, y, codes, first, last)``, of the rows of taps [first, last), the first of which x is.

    The pixels of x have its channels, those of y and the codes all that y has.
    """
    row = _row_of_windows(spec, spec.x, spec.y, _largest(spec))

    @inlined
    def pool(x: int, y: int, codes: int, first: int, last: int) -> None:
        row(x, y, codes, 0, first, last)

    found: Callable[[int, int, int, int, int], None] = pool
    return found


def pool_image(spec: PoolSpec) -> Callable[[int, int, int, int], None]:
    """One image of a chunk: ``pool(x, y, codes, image)``; x is this image's own, y and codes are those of all."""
    visit, y, codes = _windows_of_image(spec, spec.x, spec.y, _largest(spec)), spec.y, spec.P * spec.Q * spec.y.C

    @inlined
    def pool(x: int, target: int, code: int, image: int) -> None:
        visit(x, target + y_number * (image * y_size + y_origin), code + image * codes, 0)

    y_number, y_size, y_origin = y.number, y.size, y.origin
    found: Callable[[int, int, int, int], None] = pool
    return found


def pool_behind(conv: ConvSpec) -> Callable[[int, int, int, int], None]:
    """The same of the image in front of such a pool; nothing where there is none."""
    return pool_image(behind(conv, conv.unpooled)) if conv.windows is not None else _no_pool


@inlined
def _no_pool(x: int, y: int, codes: int, image: int) -> None:
    """Where there is no such pool."""


def unpool_image(spec: PoolSpec) -> Callable[[int, int, int, int, int], None]:
    """The gradient of a pool's input, in its whole frame, and db: ``unpool(dx, dy, codes, db, image)``; as above."""
    x, y = spec.x, spec.y.bare
    visit, origin, size, codes = _windows_of_image(spec, x, y, _to_winner(spec)), x.origin, x.size, y.size

    @inlined
    def unpool(dx: int, dy: int, code: int, db: int, image: int) -> None:
        view(dx, (size,), np.float32)[:] = np.float32(0)
        visit(dx + FLOAT * origin, dy + FLOAT * image * codes, code + image * codes, db)

    found: Callable[[int, int, int, int, int], None] = unpool
    return found


def unpooled_slopes(conv: ConvSpec) -> Callable[[Any, int, int], Any]:
    """``prepare(arguments, image, scratch)``: arguments for the slopes of ``conv.before_pool``, whose image is 0.

    Where windows overlap, slopes meet in a pixel: they are added up in float32, in scratch memory.
    """
    unpool_windows = unpool_image(replace(behind(conv, conv.unpooled), bias=False))

    @inlined
    def prepare(arguments: Any, image: int, scratch: int) -> Any:
        unpool_windows(scratch, arguments[3], arguments[5], 0, image)
        return 0, 0, 0, scratch, 0, 0

    found: Callable[[Any, int, int], Any] = prepare
    return found


# --- windows ---------------------------------------------------------------------------------------------------------


def _largest(spec: PoolSpec) -> Window:
    """The largest value of a window, and its tap."""
    codes = ir.IntType(8 * spec.code_bytes)

    def window(b: Block, x: Any, y: Any, others: list[Any], taps: "_Taps") -> None:
        floats, builder = b.floats, b.floats.builder
        numbers, lowest = Bf16Lanes(floats, native=spec.native), floats.constant(-math.inf)
        nobody = number_of(floats, DEAD, codes)

        def tap(place: Any, number: Any, held: list[Any]) -> list[Any]:
            best, winners, here = held[: len(b.used)], held[len(b.used) :], splat(floats, number, codes)
            values = b.load(floats.at(x, place))
            better = [beats(floats, value, old) for value, old in zip(values, best, strict=True)]
            best = [builder.select(*choice) for choice in zip(better, values, best, strict=True)]
            return best + [builder.select(won, here, old) for won, old in zip(better, winners, strict=True)]

        first = splat(floats, taps.first, codes)
        found = taps.each([*[lowest] * len(b.used), *[first] * len(b.used)], tap)
        best, winners = found[: len(b.used)], found[len(b.used) :]
        if spec.relu:
            opened = [let_largest_through(floats, *pair, nobody) for pair in zip(best, winners, strict=True)]
            best, winners = [value for value, _ in opened], [winner for _, winner in opened]
        b.put(best, y, narrow=numbers if spec.y.half else None)
        if spec.codes:
            b.store(winners, element_pointer(builder, others[0], codes))

    return window


def _to_winner(spec: PoolSpec) -> Window:
    """The slope of a window added to its winner."""
    codes = ir.IntType(8 * spec.code_bytes)

    def window(b: Block, dx: Any, dy: Any, others: list[Any], taps: "_Taps") -> None:
        floats, builder = b.floats, b.floats.builder
        slopes, winners = b.load(dy), b.load_as(codes, element_pointer(builder, others[0], codes))

        def tap(place: Any, number: Any, nothing: list[Any]) -> list[Any]:
            here = splat(floats, number, codes)
            won = [builder.icmp_unsigned("==", winner, here) for winner in winners]
            sent = [builder.select(w, g, floats.zero) for w, g in zip(won, slopes, strict=True)]
            b.put(sent, floats.at(dx, place), adds=True)
            return []

        taps.each([], tap)
        if spec.bias:
            nobody = number_of(floats, DEAD, codes)
            alive = [builder.icmp_unsigned("!=", winner, nobody) for winner in winners] if spec.relu else []
            added = [builder.select(a, g, floats.zero) for a, g in zip(alive, slopes, strict=True)] if alive else slopes
            b.put(added, floats.pointer(others[1]), adds=True)

    return window


class _Taps:
    """The taps of a window that lie inside the image: ``rows`` x ``columns`` from tap number ``first`` on."""

    def __init__(self, floats: Floats, spec: PoolSpec, pitch: int, first: Any, rows: Any, columns: Any) -> None:
        self._floats, self._spec, self._pitch = floats, spec, pitch
        self.first, self._rows, self._columns = first, rows, columns

    def each(self, start: list[Any], tap: Callable[[Any, Any, list[Any]], list[Any]]) -> list[Any]:
        """``values = tap(offset in elements, tap number, values)`` for each."""
        builder, C, S = self._floats.builder, self._spec.x.C, self._spec.window.S

        def row(r: Any, held: list[Any]) -> list[Any]:
            def column(s: Any, values: list[Any]) -> list[Any]:
                place = builder.add(builder.mul(r, I64(self._pitch)), builder.mul(s, I64(C)))
                number = builder.add(builder.add(self.first, builder.mul(r, I64(S))), s)
                return tap(place, number, values)

            return carried_loop(builder, self._columns, held, column)

        return carried_loop(builder, self._rows, start, row)

    def share(self, every: bool) -> Any:
        """What a pixel counts; ``every``: taps outside the image count too."""
        builder, window = self._floats.builder, self._spec.window
        if every:
            return self._floats.constant(1 / (window.R * window.S))
        taps = splat(self._floats, builder.mul(self._rows, self._columns), I64)
        return builder.fdiv(self._floats.constant(1), builder.sitofp(taps, ir.VectorType(F32, self._floats.lanes)))


@inlined
def _inside(position: int, stride: int, padding: int, kernel: int, size: int) -> tuple[int, int]:
    """The taps [first, last) of a window that lie inside the image."""
    start = position * stride - padding
    return max(0, -start), min(kernel, size - start)


def _row_of_windows(spec: PoolSpec, x: Frame, y: Frame, window: Window) -> Callable[..., None]:
    """``row(x, y, codes, db, first, last)``: a row of windows, of the rows of taps [first, last) inside the image."""

    def generate(builder: Any, words: list[Any], pixels: Any) -> None:
        floats = Floats(builder, spec.lanes)
        source, target = floats.pointer(words[0]), number_pointer(builder, words[1], y.half)
        taps = _Taps(floats, spec, x.pitch, words[4], words[5], words[6])
        for_blocks(floats, x.C, VECTORS, lambda b: window(b, source, target, words[2:4], taps))

    visit, shape, W = on_pixels(generate), spec.window, x.W
    Q, C, y_pixel, code_pixel = spec.Q, x.C, y.number * y.C, spec.code_bytes * y.C
    S, stride, left = shape.S, shape.stride_w, shape.left

    @inlined
    def row(source: int, target: int, codes: int, db: int, first: int, last: int) -> None:
        for q in range(Q):
            s_first, s_last = _inside(q, stride, left, S, W)
            visit(
                (
                    source + FLOAT * (q * stride - left + s_first) * C,
                    target + q * y_pixel,
                    codes + q * code_pixel,
                    db,
                    first * S + s_first,
                    last - first,
                    s_last - s_first,
                ),
                1,
            )

    found: Callable[..., None] = row
    return found


def _windows_of_image(spec: PoolSpec, x: Frame, y: Frame, window: Window) -> Callable[[int, int, int, int], None]:
    """``visit(x, y, codes, db)``: all windows of an image, whose first pixels these are."""
    row, shape, P, H, x_pitch = _row_of_windows(spec, x, y, window), spec.window, spec.P, x.H, x.pitch
    R, stride, top = shape.R, shape.stride_h, shape.top
    y_pitch, code_pitch = y.number * y.pitch, spec.code_bytes * spec.Q * y.C

    @inlined
    def visit(source: int, target: int, codes: int, db: int) -> None:
        for p in range(P):
            first, last = _inside(p, stride, top, R, H)
            place = source + FLOAT * (p * stride - top + first) * x_pitch
            row(place, target + p * y_pitch, codes + p * code_pitch, db, first, last)

    found: Callable[[int, int, int, int], None] = visit
    return found


def _each_window(spec: PoolSpec, x: Frame, y: Frame, window: Window, clears: bool) -> Callable[..., None]:
    """A kernel on windows: arguments state, x or dx, y or dy, codes; what it adds to may have to be cleared first."""
    visit, images, codes = _windows_of_image(spec, x, y, window), spec.images, spec.code_bytes * spec.P * spec.Q * x.C
    x_size, x_origin, y_size, y_origin = x.size, x.origin, y.size, y.origin

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            source = arguments[1] + FLOAT * (image * x_size + x_origin)
            if clears:
                view(source, (x_size,), np.float32)[:] = np.float32(0)
            target = arguments[2] + FLOAT * (image * y_size + y_origin)
            visit(source, target, arguments[3] + image * codes, 0)

    return kernel
