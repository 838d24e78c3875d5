"""Kernels that change images one by one: unpacking, elementwise layers, sums, flattening and averages.

Backward kernels either write a gradient or, where a tensor has several readers, add to it (``spec.add``). Gradients
have no border. Cost: one read and one write of each element; the input and output of an image are in the L2 cache when
the kernels around run on the same chunk.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from convolt.engines.jit.bf16 import to_bf16
from convolt.engines.jit.kernels.specs import BF16, FLOAT, AddSpec, InputSpec, MapSpec
from convolt.engines.jit.memory import view
from convolt.engines.jit.transpose import Transpose, transpose


def unpack(spec: InputSpec) -> Callable[..., None]:
    """Images (N, C, H, W) into the frame, NHWC, normalized; arguments: state, y, scale, shift.

    y = x scale + shift for each channel, where scale holds 1/255 for bytes and 1/std.
    """
    y, images = spec.y, spec.images
    C, H, W, columns, origin, size = y.C, y.H, y.W, y.columns, y.origin, y.size
    dtype = np.uint8 if spec.bytes else np.float32
    width = 1 if spec.bytes else FLOAT

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        state = view(arguments[0], (2,), np.int64)
        count, pixels = state[0], state[1]
        scale, shift = view(arguments[2], (C,), np.float32), view(arguments[3], (C,), np.float32)
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            source = view(pixels + width * image * C * H * W, (C, H, W), dtype)
            for h in range(H):
                target = view(arguments[1] + FLOAT * (image * size + origin + h * columns * C), (W, C), np.float32)
                for c in range(C):
                    for w in range(W):
                        target[w, c] = np.float32(source[c, h, w]) * scale[c] + shift[c]

    return kernel


def elementwise(spec: MapSpec) -> Callable[..., None]:
    """``y = f(x)``; arguments: state, x, y, mask. ``mask`` (N, H, W, C) is Dropout's."""
    f = _function(spec)
    x, y, images, masked = spec.x, spec.y, spec.images, spec.kind == "dropout"
    H, row = x.H, x.W * x.C

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for h in range(H):
                source = view(arguments[1] + FLOAT * (image * x_size + x_origin + h * x_pitch), (row,), np.float32)
                target = view(arguments[2] + FLOAT * (image * y_size + y_origin + h * y_pitch), (row,), np.float32)
                if masked:
                    mask = view(arguments[3] + FLOAT * (image * H + h) * row, (row,), np.float32)
                    for i in range(row):
                        target[i] = source[i] * mask[i]
                else:
                    for i in range(row):
                        target[i] = f(source[i])

    x_size, x_origin, x_pitch = x.size, x.origin, x.pitch
    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch
    return kernel


def elementwise_backward(spec: MapSpec) -> Callable[..., None]:
    """``dx (+)= dy f'(x)``; arguments: state, x, dy, mask, dx. x is a frame, dy and dx (N, H, W, C)."""
    slope = _slope(spec)
    x, images, masked, add = spec.x, spec.images, spec.kind == "dropout", spec.add
    H, row = x.H, x.W * x.C

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for h in range(H):
                source = view(arguments[1] + FLOAT * (image * x_size + x_origin + h * x_pitch), (row,), np.float32)
                dy = view(arguments[2] + FLOAT * (image * H + h) * row, (row,), np.float32)
                mask = view(arguments[3] + FLOAT * (image * H + h) * row, (row,), np.float32)
                dx = view(arguments[4] + FLOAT * (image * H + h) * row, (row,), np.float32)
                for i in range(row):
                    value = dy[i] * (mask[i] if masked else slope(source[i]))
                    dx[i] = dx[i] + value if add else value

    x_size, x_origin, x_pitch = x.size, x.origin, x.pitch
    return kernel


def _function(spec: MapSpec) -> Callable[[float], float]:
    number, half, one, zero = np.float32(spec.number), np.float32(0.5), np.float32(1), np.float32(0)
    root, cube, scale = np.float32(math.sqrt(0.5)), np.float32(0.044715), np.float32(math.sqrt(2 / math.pi))
    functions = {
        "relu": lambda v: v if v > zero else zero,
        "leaky": lambda v: v if v > zero else v * number,
        "silu": lambda v: v / (one + np.exp(-v)),
        "gelu": lambda v: half * v * (one + np.float32(math.erf(v * root))),
        "gelu_tanh": lambda v: half * v * (one + np.tanh(scale * (v + cube * v * v * v))),
        "copy": lambda v: v,
        "dropout": lambda v: v,
        "scale": lambda v: v * number,
    }
    found: Callable[[float], float] = njit(functions[spec.kind])
    return found


def _slope(spec: MapSpec) -> Callable[[float], float]:
    number, half, one, zero = np.float32(spec.number), np.float32(0.5), np.float32(1), np.float32(0)
    root, cube, scale = np.float32(math.sqrt(0.5)), np.float32(0.044715), np.float32(math.sqrt(2 / math.pi))
    density, three = np.float32(1 / math.sqrt(2 * math.pi)), np.float32(3)

    def relu(v: float) -> Any:
        return one if v > zero else zero

    def leaky(v: float) -> Any:
        return one if v > zero else number

    def silu(v: float) -> Any:
        gate = one / (one + np.exp(-v))
        return gate * (one + v * (one - gate))

    def gelu(v: float) -> Any:
        return half * (one + np.float32(math.erf(v * root))) + v * density * np.exp(-half * v * v)

    def gelu_tanh(v: float) -> Any:
        t = np.tanh(scale * (v + cube * v * v * v))
        return half * (one + t) + half * v * (one - t * t) * scale * (one + three * cube * v * v)

    def copy(v: float) -> Any:
        return one

    functions = {"relu": relu, "leaky": leaky, "silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}
    found: Callable[[float], float] = njit(functions.get(spec.kind, copy))
    return found


def add(spec: AddSpec) -> Callable[..., None]:
    """``y = act(a + b)``; arguments: state, a, b, y."""
    a, b, y, images, slope = spec.a, spec.b, spec.y, spec.images, np.float32(spec.slope)
    H, row = y.H, y.W * y.C

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for h in range(H):
                left = view(arguments[1] + FLOAT * (image * a_size + a_origin + h * a_pitch), (row,), np.float32)
                right = view(arguments[2] + FLOAT * (image * b_size + b_origin + h * b_pitch), (row,), np.float32)
                target = view(arguments[3] + FLOAT * (image * y_size + y_origin + h * y_pitch), (row,), np.float32)
                for i in range(row):
                    value = left[i] + right[i]
                    target[i] = value if value > np.float32(0) else value * slope

    a_size, a_origin, a_pitch = a.size, a.origin, a.pitch
    b_size, b_origin, b_pitch = b.size, b.origin, b.pitch
    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch
    return kernel


def add_backward(spec: AddSpec) -> Callable[..., None]:
    """``da (+)= dy act'(y)`` and the same for db; arguments: state, y, dy, da, db."""
    y, images, slope = spec.y, spec.images, np.float32(spec.slope)
    adds_a, adds_b = spec.adds_a, spec.adds_b
    H, row = y.H, y.W * y.C

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for h in range(H):
                offset = FLOAT * (image * H + h) * row
                output = view(arguments[1] + FLOAT * (image * y_size + y_origin + h * y_pitch), (row,), np.float32)
                dy, da = (
                    view(arguments[2] + offset, (row,), np.float32),
                    view(arguments[3] + offset, (row,), np.float32),
                )
                db = view(arguments[4] + offset, (row,), np.float32)
                for i in range(row):
                    value = dy[i] if output[i] > np.float32(0) else dy[i] * slope
                    da[i] = da[i] + value if adds_a else value
                    db[i] = db[i] + value if adds_b else value

    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch
    return kernel


def flatten(spec: MapSpec) -> Callable[..., None]:
    """(H, W, C) to features in PyTorch's order (C, H, W); arguments: state, x, y, scratch; y may be bf16."""
    x, images, half = spec.x, spec.images, spec.half
    C, H, W = x.C, x.H, x.W
    rows, at_once = (1, H * W) if x.columns == W else (H, W)
    turn = transpose(Transpose(at_once, C, C, H * W, spec.lanes))
    features = C * H * W
    narrow = to_bf16(features, spec.lanes, half)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            target = arguments[3] + FLOAT * thread * features if half else arguments[2] + FLOAT * image * features
            for h in range(rows):
                turn(arguments[1] + FLOAT * (image * size + origin + h * pitch), target + FLOAT * h * W)
            if half:
                narrow(target, arguments[2] + BF16 * image * features)

    size, origin, pitch = x.size, x.origin, x.pitch
    return kernel


def flatten_backward(spec: MapSpec) -> Callable[..., None]:
    """Features to (H, W, C); arguments: state, dy, dx."""
    x, images, adds = spec.x, spec.images, spec.add
    C, H, W = x.C, x.H, x.W
    turn = transpose(Transpose(C, H * W, H * W, C, spec.lanes))

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            offset = FLOAT * image * C * H * W
            if adds:
                dy = view(arguments[1] + offset, (C, H * W), np.float32)
                dx = view(arguments[2] + offset, (H * W, C), np.float32)
                for pixel in range(H * W):
                    for c in range(C):
                        dx[pixel, c] += dy[c, pixel]
            else:
                turn(arguments[1] + offset, arguments[2] + offset)

    return kernel


def global_average(spec: MapSpec) -> Callable[..., None]:
    """``y[c] = mean over H, W``; arguments: state, x, y."""
    x, images = spec.x, spec.images
    C, H, W, part = x.C, x.H, x.W, np.float32(1 / (x.H * x.W))

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            y = view(arguments[2] + FLOAT * image * C, (C,), np.float32)
            y[:] = np.float32(0)
            for h in range(H):
                row = view(arguments[1] + FLOAT * (image * size + origin + h * pitch), (W, C), np.float32)
                for w in range(W):
                    for c in range(C):
                        y[c] += row[w, c]
            for c in range(C):
                y[c] *= part

    size, origin, pitch = x.size, x.origin, x.pitch
    return kernel


def global_average_backward(spec: MapSpec) -> Callable[..., None]:
    """Every pixel gets ``dy / (H W)``; arguments: state, dy, dx."""
    x, images, adds = spec.x, spec.images, spec.add
    C, pixels, part = x.C, x.H * x.W, np.float32(1 / (x.H * x.W))

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            dy = view(arguments[1] + FLOAT * image * C, (C,), np.float32)
            dx = view(arguments[2] + FLOAT * image * C * pixels, (pixels, C), np.float32)
            for pixel in range(pixels):
                for c in range(C):
                    value = dy[c] * part
                    dx[pixel, c] = dx[pixel, c] + value if adds else value

    return kernel
