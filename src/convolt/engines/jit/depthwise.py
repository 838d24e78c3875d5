"""Depthwise convolution, one row of pixels at a time: channels in the lanes, and no sum over them: no matrix product.

    forward    y[q, c] = start + sum over r, s of  w[r, s, c] x[r, q stride + s, c]
    dw         dw[s, c] += sum over q of  x[q stride + s, c] dy[q, c]

A block of eight pixels, or of at most eight taps, is held in registers while the sum runs. Each multiply-add loads one
vector of x, so that two loads a cycle bound it at the peak, and the L1 cache below it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.vectors import I64, Floats, carried_loop

AT_ONCE = 8  # sums in registers
STRAIGHT_LINE = 256  # multiply-adds of a block that are unrolled whole


@dataclass(frozen=True)
class DepthwiseRow:
    """Sizes and strides in elements, all constants; w is (R, S, channels). `start`: as it is (load), or bias."""

    pixels: int
    channels: int
    R: int
    S: int
    x_pixel: int
    x_row: int
    x_tap: int
    y_pixel: int
    lanes: int
    start: Literal["zero", "load", "bias"] = "zero"
    relu: bool = False


def depthwise_row(spec: DepthwiseRow) -> Any:
    """A function for kernels: ``kernel(x, w, y, bias)``, addresses as int64."""

    @intrinsic
    def kernel(typingctx: Any, x: Any, w: Any, y: Any, bias: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, spec.lanes)
            x, w, y, bias = (floats.pointer(address) for address in args)

            def channels(offset: Any, used: int) -> None:
                places = [floats.at(pointer, offset) for pointer in (x, w, y, bias)]

                def pixels(first: Any, count: int) -> None:
                    block = floats.at(places[0], builder.mul(first, I64(spec.x_pixel)))
                    target = floats.at(places[2], builder.mul(first, I64(spec.y_pixel)))
                    _pixels(spec, floats, (block, places[1], target, places[3]), count, used)

                _in_blocks(builder, spec.pixels, AT_ONCE, pixels)

            _in_blocks(builder, spec.channels, spec.lanes, channels)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return kernel


def _pixels(spec: DepthwiseRow, floats: Floats, places: tuple[Any, Any, Any, Any], count: int, used: int) -> None:
    """Some pixels, one vector of channels."""
    x, w, y, bias = places
    targets = [floats.at(y, m * spec.y_pixel) for m in range(count)]
    if spec.start == "load":
        sums = [floats.load(target, used) for target in targets]
    else:
        sums = [floats.load(bias, used) if spec.start == "bias" else floats.zero] * count

    def row(x: Any, w: Any, sums: list[Any]) -> list[Any]:
        for s in range(spec.S):
            weight = floats.load(floats.at(w, s * spec.channels), used)
            taps = [floats.load(floats.at(x, m * spec.x_pixel + s * spec.x_tap), used) for m in range(count)]
            sums = [floats.multiply_add(tap, weight, total) for tap, total in zip(taps, sums, strict=True)]
            floats.order_loads()
        return sums

    if spec.R * spec.S * count <= STRAIGHT_LINE:
        for r in range(spec.R):
            sums = row(floats.at(x, r * spec.x_row), floats.at(w, r * spec.S * spec.channels), sums)
    else:
        steps = spec.x_row, spec.S * spec.channels

        def further(r: Any, sums: list[Any]) -> list[Any]:
            here = [floats.at(p, floats.builder.mul(r, I64(step))) for p, step in zip((x, w), steps, strict=True)]
            return row(here[0], here[1], sums)

        sums = carried_loop(floats.builder, I64(spec.R), sums, further)
    for target, total in zip(targets, sums, strict=True):
        floats.store(floats.relu(total) if spec.relu else total, target, used)


@dataclass(frozen=True)
class DepthwiseTaps:
    """Sizes and strides in elements, all constants; dw is (S, channels)."""

    pixels: int
    channels: int
    S: int
    x_pixel: int
    x_tap: int
    lanes: int


def depthwise_taps(spec: DepthwiseTaps) -> Any:
    """A function for kernels: ``kernel(x, dy, dw)``, addresses as int64; adds to dw."""

    @intrinsic
    def kernel(typingctx: Any, x: Any, dy: Any, dw: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, spec.lanes)
            x, dy, dw = (floats.pointer(address) for address in args)

            def channels(offset: Any, used: int) -> None:
                places = [floats.at(pointer, offset) for pointer in (x, dy, dw)]
                for first in range(0, spec.S, AT_ONCE):
                    _taps(spec, floats, places, range(first, min(first + AT_ONCE, spec.S)), used)

            _in_blocks(builder, spec.channels, spec.lanes, channels)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return kernel


def _taps(spec: DepthwiseTaps, floats: Floats, places: list[Any], taps: range, used: int) -> None:
    """Some taps, one vector of channels."""
    x, dy, dw = places
    targets = [floats.at(dw, s * spec.channels) for s in taps]

    def pixel(q: Any, sums: list[Any]) -> list[Any]:
        slope = floats.load(floats.at(dy, floats.builder.mul(q, I64(spec.channels))), used)
        here = floats.at(x, floats.builder.mul(q, I64(spec.x_pixel)))
        values = [floats.load(floats.at(here, s * spec.x_tap), used) for s in taps]
        return [floats.multiply_add(value, slope, total) for value, total in zip(values, sums, strict=True)]

    start = [floats.load(target, used) for target in targets]
    for target, total in zip(targets, carried_loop(floats.builder, I64(spec.pixels), start, pixel), strict=True):
        floats.store(total, target, used)


def _in_blocks(builder: Any, count: int, size: int, each: Callable[[Any, int], None]) -> None:
    """``each(first, size)`` for whole blocks, then for the rest."""
    whole, rest = divmod(count, size)

    def step(i: Any, nothing: list[Any]) -> list[Any]:
        each(builder.mul(i, I64(size)), size)
        return []

    if whole:
        carried_loop(builder, I64(whole), [], step)
    if rest:
        each(I64(whole * size), rest)
