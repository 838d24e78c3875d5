"""Max- and average-pooling over any window, for pools that are not fused behind a convolution or BatchNorm.

Windows are cut off at the image's edge, so no padding is ever read. Max-pooling keeps the winning tap, as one byte
unless a window has more taps than a byte counts. All four kernels pass over the windows in the same way
(``_each_window``) and differ in what they do with one: channels are vectors, the taps a loop with the result in
registers.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.kernels.specs import FLOAT, Frame, PoolSpec
from convolt.engines.jit.memory import view
from convolt.engines.jit.pixels import Block, element_pointer, for_blocks, on_pixels, splat
from convolt.engines.jit.vectors import F32, I64, Floats, carried_loop

VECTORS = 2  # of a block of channels


def max_pool(spec: PoolSpec) -> Callable[..., None]:
    """The largest value of each window, the first of equals; arguments: state, x, y, codes (N, P, Q, C)."""
    codes = ir.IntType(8 * spec.code_bytes)

    def window(b: Block, x: Any, y: Any, code: Any, taps: "_Taps") -> None:
        floats, builder = b.floats, b.floats.builder
        lowest, none = floats.constant(-math.inf), ir.Constant(ir.VectorType(codes, floats.lanes), None)

        def tap(place: Any, number: Any, held: list[Any]) -> list[Any]:
            best, winners, here = held[: len(b.used)], held[len(b.used) :], splat(floats, number, codes)
            values = b.load(floats.at(x, place))
            better = [builder.fcmp_ordered(">", value, old) for value, old in zip(values, best, strict=True)]
            best = [builder.select(*choice) for choice in zip(better, values, best, strict=True)]
            return best + [builder.select(won, here, old) for won, old in zip(better, winners, strict=True)]

        found = taps.each([*[lowest] * len(b.used), *[none] * len(b.used)], tap)
        b.store(found[: len(b.used)], y)
        b.store(found[len(b.used) :], element_pointer(builder, code, codes))

    return _each_window(spec, spec.x, spec.y, window, clears=False)


def max_pool_backward(spec: PoolSpec) -> Callable[..., None]:
    """The gradient goes to the tap that won; arguments: state, dx, dy, codes."""
    codes = ir.IntType(8 * spec.code_bytes)

    def window(b: Block, dx: Any, dy: Any, code: Any, taps: "_Taps") -> None:
        floats, builder = b.floats, b.floats.builder
        slopes, winners = b.load(dy), b.load_as(codes, element_pointer(builder, code, codes))

        def tap(place: Any, number: Any, nothing: list[Any]) -> list[Any]:
            here = splat(floats, number, codes)
            won = [builder.icmp_unsigned("==", winner, here) for winner in winners]
            sent = [builder.select(w, g, floats.zero) for w, g in zip(won, slopes, strict=True)]
            b.put(sent, floats.at(dx, place), adds=True)
            return []

        taps.each([], tap)

    return _each_window(spec, spec.x.bare, spec.y.bare, window, clears=not spec.add)


def average_pool(spec: PoolSpec) -> Callable[..., None]:
    """The mean of each window; arguments: state, x, y, codes (none)."""

    def window(b: Block, x: Any, y: Any, code: Any, taps: "_Taps") -> None:
        floats, builder = b.floats, b.floats.builder

        def tap(place: Any, number: Any, held: list[Any]) -> list[Any]:
            values = b.load(floats.at(x, place))
            return [builder.fadd(total, value) for total, value in zip(held, values, strict=True)]

        share = taps.share(spec.count_include_pad)
        b.store([builder.fmul(total, share) for total in taps.each([floats.zero] * len(b.used), tap)], y)

    return _each_window(spec, spec.x, spec.y, window, clears=False)


def average_pool_backward(spec: PoolSpec) -> Callable[..., None]:
    """Each pixel of a window gets its share; arguments: state, dx, dy, codes (none)."""

    def window(b: Block, dx: Any, dy: Any, code: Any, taps: "_Taps") -> None:
        share = taps.share(spec.count_include_pad)
        slopes = [b.floats.builder.fmul(slope, share) for slope in b.load(dy)]

        def tap(place: Any, number: Any, nothing: list[Any]) -> list[Any]:
            b.put(slopes, b.floats.at(dx, place), adds=True)
            return []

        taps.each([], tap)

    return _each_window(spec, spec.x.bare, spec.y.bare, window, clears=not spec.add)


class _Taps:
    """The taps of a window that lie inside the image: ``rows`` x ``columns`` from tap number ``first`` on."""

    def __init__(self, floats: Floats, spec: PoolSpec, pitch: int, first: Any, rows: Any, columns: Any) -> None:
        self._floats, self._spec, self._pitch = floats, spec, pitch
        self._first, self._rows, self._columns = first, rows, columns

    def each(self, start: list[Any], tap: Callable[[Any, Any, list[Any]], list[Any]]) -> list[Any]:
        """``values = tap(offset in elements, tap number, values)`` for each."""
        builder, C, S = self._floats.builder, self._spec.x.C, self._spec.window.S

        def row(r: Any, held: list[Any]) -> list[Any]:
            def column(s: Any, values: list[Any]) -> list[Any]:
                place = builder.add(builder.mul(r, I64(self._pitch)), builder.mul(s, I64(C)))
                number = builder.add(builder.add(self._first, builder.mul(r, I64(S))), s)
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


def _each_window(
    spec: PoolSpec, x: Frame, y: Frame, window: Callable[[Block, Any, Any, Any, _Taps], None], clears: bool
) -> Callable[..., None]:
    """A kernel on windows: arguments state, x or dx, y or dy, codes; what it adds to may have to be cleared first."""

    def generate(builder: Any, words: list[Any], pixels: Any) -> None:
        floats = Floats(builder, spec.lanes)
        source, target = floats.pointer(words[0]), floats.pointer(words[1])
        taps = _Taps(floats, spec, x.pitch, words[3], words[4], words[5])
        for_blocks(floats, x.C, VECTORS, lambda b: window(b, source, target, words[2], taps))

    visit = on_pixels(generate)
    shape, P, Q, images, code_bytes = spec.window, spec.P, spec.Q, spec.images, spec.code_bytes
    R, S, stride_h, stride_w, top, left = shape.R, shape.S, shape.stride_h, shape.stride_w, shape.top, shape.left
    C, H, W = x.C, x.H, x.W

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            source = arguments[1] + FLOAT * (image * x_size + x_origin)
            if clears:
                view(source, (x_size,), np.float32)[:] = np.float32(0)
            for p in range(P):
                r_first, r_last = _inside(p, stride_h, top, R, H)
                for q in range(Q):
                    s_first, s_last = _inside(q, stride_w, left, S, W)
                    corner = (p * stride_h - top + r_first) * x_pitch + (q * stride_w - left + s_first) * C
                    visit(
                        (
                            source + FLOAT * corner,
                            arguments[2] + FLOAT * (image * y_size + y_origin + p * y_pitch + q * C),
                            arguments[3] + code_bytes * ((image * P + p) * Q + q) * C,
                            r_first * S + s_first,
                            r_last - r_first,
                            s_last - s_first,
                        ),
                        1,
                    )

    x_size, x_origin, x_pitch = x.size, x.origin, x.pitch
    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch
    return kernel
