"""BatchNorm in NHWC: statistics in parts, folded constants, and one pass forward and two back.

Statistics are sums over chunks of images in float64 (Chan, Golub and LeVeque 1983 warn of the cancellation in
E[x^2] - E[x]^2; with 53 bits it is far below float32's own rounding), added in chunk order. The forward is then
y = act(scale x + shift), which the planner runs in the phase behind. Backward needs sum(dy) and sum(dy xhat) first.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from convolt.engines.jit.kernels.specs import FLOAT, NormSpec
from convolt.engines.jit.memory import float64_of_bits, view

DOUBLE = 8


def statistics(spec: NormSpec) -> Callable[..., None]:
    """Sums of x and of x^2 of a chunk; arguments: state, x, parts (chunks, 2, C) float64."""
    x, images = spec.x, spec.images
    C, H, W = x.C, x.H, x.W

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        sums = view(arguments[2] + DOUBLE * chunk * 2 * C, (2, C), np.float64)
        sums[:] = 0.0
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for h in range(H):
                row = view(arguments[1] + FLOAT * (image * size + origin + h * pitch), (W, C), np.float32)
                for w in range(W):
                    for c in range(C):
                        value = np.float64(row[w, c])
                        sums[0, c] += value
                        sums[1, c] += value * value

    size, origin, pitch = x.size, x.origin, x.pitch
    return kernel


def fold(spec: NormSpec) -> Callable[..., None]:
    """Mean, 1/sqrt(var + eps), scale and shift of the batch, and the running statistics. One chunk.

    Arguments: state, parts, weight, bias, running mean, running var, momentum (bits), constants (4, C): mean,
    inverse, scale, shift.
    """
    C, images, pixels, affine, eps = spec.x.C, spec.images, spec.x.H * spec.x.W, spec.affine, spec.eps

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        chunks = (count + images - 1) // images
        M = np.float64(count * pixels)
        momentum = float64_of_bits(arguments[6])
        running_mean = view(arguments[4], (C,), np.float32)
        running_var = view(arguments[5], (C,), np.float32)
        constants = view(arguments[7], (4, C), np.float32)
        for c in range(C):
            total, squares = 0.0, 0.0
            for part in range(chunks):
                sums = view(arguments[1] + DOUBLE * part * 2 * C, (2, C), np.float64)
                total += sums[0, c]
                squares += sums[1, c]
            mean = total / M
            var = max(squares / M - mean * mean, 0.0)
            inverse = 1.0 / np.sqrt(var + eps)
            scale = inverse * (view(arguments[2], (C,), np.float32)[c] if affine else 1.0)
            shift = (view(arguments[3], (C,), np.float32)[c] if affine else 0.0) - mean * scale
            constants[0, c], constants[1, c] = np.float32(mean), np.float32(inverse)
            constants[2, c], constants[3, c] = np.float32(scale), np.float32(shift)
            running_mean[c] += np.float32(momentum * (mean - running_mean[c]))
            running_var[c] += np.float32(momentum * (var * M / (M - 1.0) - running_var[c]))

    return kernel


def fold_running(spec: NormSpec) -> Callable[..., None]:
    """Scale and shift from the running statistics, for prediction; arguments as ``fold``. One chunk."""
    C, affine, eps = spec.x.C, spec.affine, spec.eps

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        mean, var = view(arguments[4], (C,), np.float32), view(arguments[5], (C,), np.float32)
        constants = view(arguments[7], (4, C), np.float32)
        for c in range(C):
            scale = 1.0 / np.sqrt(var[c] + eps) * (view(arguments[2], (C,), np.float32)[c] if affine else 1.0)
            shift = (view(arguments[3], (C,), np.float32)[c] if affine else 0.0) - mean[c] * scale
            constants[2, c], constants[3, c] = np.float32(scale), np.float32(shift)

    return kernel


def normalize(spec: NormSpec) -> Callable[..., None]:
    """``y = act(scale x + shift)``; arguments: state, x, constants, y."""
    x, y, images, slope = spec.x, spec.y, spec.images, np.float32(spec.slope)
    C, H, W = x.C, x.H, x.W

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        constants = view(arguments[2], (4, C), np.float32)
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for h in range(H):
                source = view(arguments[1] + FLOAT * (image * x_size + x_origin + h * x_pitch), (W, C), np.float32)
                target = view(arguments[3] + FLOAT * (image * y_size + y_origin + h * y_pitch), (W, C), np.float32)
                for w in range(W):
                    for c in range(C):
                        value = source[w, c] * constants[2, c] + constants[3, c]
                        target[w, c] = value if value > np.float32(0) else value * slope

    x_size, x_origin, x_pitch = x.size, x.origin, x.pitch
    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch
    return kernel


def slopes(spec: NormSpec) -> Callable[..., None]:
    """Dy before the activation, in place, and the sums of dy and of dy xhat of a chunk.

    Arguments: state, x, y, dy, constants, parts (chunks, 2, C) float64.
    """
    x, y, images, slope = spec.x, spec.y, spec.images, np.float32(spec.slope)
    C, H, W = x.C, x.H, x.W

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        constants = view(arguments[4], (4, C), np.float32)
        sums = view(arguments[5] + DOUBLE * chunk * 2 * C, (2, C), np.float64)
        sums[:] = 0.0
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for h in range(H):
                source = view(arguments[1] + FLOAT * (image * x_size + x_origin + h * x_pitch), (W, C), np.float32)
                output = view(arguments[2] + FLOAT * (image * y_size + y_origin + h * y_pitch), (W, C), np.float32)
                dy = view(arguments[3] + FLOAT * (image * H + h) * W * C, (W, C), np.float32)
                for w in range(W):
                    for c in range(C):
                        value = dy[w, c] if output[w, c] > np.float32(0) else dy[w, c] * slope
                        dy[w, c] = value
                        sums[0, c] += np.float64(value)
                        sums[1, c] += np.float64(value * ((source[w, c] - constants[0, c]) * constants[1, c]))

    x_size, x_origin, x_pitch = x.size, x.origin, x.pitch
    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch
    return kernel


def fold_slopes(spec: NormSpec) -> Callable[..., None]:
    """Gradients dweight and dbias, which are added, and the means of dy and of dy xhat. One chunk.

    Arguments: state, parts, dweight, dbias, means (2, C).
    """
    accumulate = spec.accumulate
    C, images, pixels, affine = spec.x.C, spec.images, spec.x.H * spec.x.W, spec.affine

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        chunks = (count + images - 1) // images
        M = np.float64(count * pixels)
        means = view(arguments[4], (2, C), np.float32)
        for c in range(C):
            total, products = 0.0, 0.0
            for part in range(chunks):
                sums = view(arguments[1] + DOUBLE * part * 2 * C, (2, C), np.float64)
                total += sums[0, c]
                products += sums[1, c]
            if affine:
                dweight, dbias = view(arguments[2], (C,), np.float32), view(arguments[3], (C,), np.float32)
                dweight[c] = np.float32(products) + (dweight[c] if accumulate else np.float32(0))
                dbias[c] = np.float32(total) + (dbias[c] if accumulate else np.float32(0))
            means[0, c], means[1, c] = np.float32(total / M), np.float32(products / M)

    return kernel


def normalize_backward(spec: NormSpec) -> Callable[..., None]:
    """``dx (+)= scale (dy - mean(dy) - xhat mean(dy xhat))``; arguments: state, x, dy, constants, means, dx."""
    x, images, adds = spec.x, spec.images, spec.add
    C, H, W = x.C, x.H, x.W

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        constants, means = view(arguments[3], (4, C), np.float32), view(arguments[4], (2, C), np.float32)
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for h in range(H):
                source = view(arguments[1] + FLOAT * (image * x_size + x_origin + h * x_pitch), (W, C), np.float32)
                dy = view(arguments[2] + FLOAT * (image * H + h) * W * C, (W, C), np.float32)
                dx = view(arguments[5] + FLOAT * (image * H + h) * W * C, (W, C), np.float32)
                for w in range(W):
                    for c in range(C):
                        normalized = (source[w, c] - constants[0, c]) * constants[1, c]
                        value = constants[2, c] * (dy[w, c] - means[0, c] - normalized * means[1, c])
                        dx[w, c] = dx[w, c] + value if adds else value

    x_size, x_origin, x_pitch = x.size, x.origin, x.pitch
    return kernel
