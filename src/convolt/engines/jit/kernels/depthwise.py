"""Depthwise convolution on frames: what takes the place of ``conv``'s products where every channel is its own group.

As a matrix product such a layer has one column and one channel of depth, and fills one lane in sixteen. Here channels
are the lanes (``engines.jit.depthwise``). Filters are packed (R, S, C), for dx turned; dx is the same convolution on
the framed dy, and parts of dw are (R, S, C), as ``conv`` has them.

Cost: 2 R S C P Q FLOPs for each image and each of the three; bound by loads.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from convolt.engines.jit.depthwise import DepthwiseRow, DepthwiseTaps, depthwise_row, depthwise_taps
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.kernels.residues import Part, parts, slope_frame
from convolt.engines.jit.kernels.specs import FLOAT, ConvSpec
from convolt.engines.jit.memory import view


def depthwise_forward(spec: ConvSpec) -> Callable[..., None]:
    """``y = act(w * x + b)``; arguments: state, x, packed filters, bias, y. A chunk is a run of images."""
    x, y, window = spec.x, spec.y, spec.window
    row = _row(spec, "bias" if spec.bias else "zero", spec.K)
    slope, values = np.float32(spec.slope), spec.Q * spec.K
    leaky = spec.slope not in (0, 1)
    corner, row_step = x.origin - window.top * x.pitch - window.left * x.C, window.stride_h * x.pitch
    images, P, x_size, y_size, y_origin, y_pitch = spec.images, spec.P, x.size, y.size, y.origin, y.pitch

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            source = arguments[1] + FLOAT * (image * x_size + corner)
            for p in range(P):
                target = arguments[4] + FLOAT * (image * y_size + y_origin + p * y_pitch)
                row(source + FLOAT * p * row_step, arguments[2], target, arguments[3])
                if leaky:
                    outputs = view(target, (values,), np.float32)
                    for i in range(values):
                        outputs[i] = outputs[i] if outputs[i] > np.float32(0) else outputs[i] * slope

    return kernel


def depthwise_weight_gradient(spec: ConvSpec) -> Callable[[int, int, int], None]:
    """``dw[r, s, c] += sum over p, q of x[p + r, q + s, c] dy[p, q, c]``: ``weights(x, dy, dw)``."""
    x, window, framed = spec.x, spec.window, slope_frame(spec)
    R, S, C, P = window.R, window.S, x.C, spec.P
    taps = depthwise_taps(DepthwiseTaps(spec.Q, C, S, window.stride_w * C, window.dilation_w * C, spec.lanes))
    corner = x.origin - window.top * x.pitch - window.left * C
    x_step, tap_step, dy_step = window.stride_h * x.pitch, window.dilation_h * x.pitch, framed.pitch
    origin = framed.origin

    @inlined
    def weights(source: int, dy: int, dw: int) -> None:
        for r in range(R):
            for p in range(P):
                row = source + FLOAT * (corner + r * tap_step + p * x_step)
                taps(row, dy + FLOAT * (origin + p * dy_step), dw + FLOAT * r * S * C)

    found: Callable[[int, int, int], None] = weights
    return found


def depthwise_input_gradients(spec: ConvSpec) -> tuple[Callable[[int, int, int], None], ...]:
    """``dx`` of one image from the framed dy: ``inputs(dy, filters, dx)`` for each residue; dx is (H, W, C)."""
    return tuple(_input_part(spec, part) for part in parts(spec))


def _input_part(spec: ConvSpec, part: Part) -> Callable[[int, int, int], None]:
    back, window, C = part.conv, spec.window, spec.x.C
    row = _row(back, "load" if spec.add else "zero", window.stride_w * C)
    rows, pitch, origin, target = back.P, back.x.pitch, back.x.origin, part.target
    target_pitch, before = window.stride_h * spec.x.W * C, part.filters * C

    @inlined
    def inputs(dy: int, filters: int, dx: int) -> None:
        for h in range(rows):
            place = dx + FLOAT * (target + h * target_pitch)
            row(dy + FLOAT * (origin + h * pitch), filters + FLOAT * before, place, 0)

    found: Callable[[int, int, int], None] = inputs
    return found


def _row(spec: ConvSpec, start: Literal["zero", "load", "bias"], y_pixel: int) -> Any:
    """One row of output pixels: ``row(x, filters, y, bias)``."""
    window, C = spec.window, spec.x.C
    return depthwise_row(
        DepthwiseRow(
            pixels=spec.Q,
            channels=C,
            R=window.R,
            S=window.S,
            x_pixel=window.stride_w * C,
            x_row=window.dilation_h * spec.x.pitch,
            x_tap=window.dilation_w * C,
            y_pixel=y_pixel,
            lanes=spec.lanes,
            start=start,
            relu=spec.slope == 0,
        )
    )
