"""BatchNorm in NHWC: statistics in parts, folded constants, and one pass forward and two back.

Statistics are sums of x and of x^2, of each chunk of images and about a pivot of its own, its first pixel, because
E[x^2] - E[x]^2 cancels (Chan, Golub and LeVeque 1983): float32 in registers over a run of pixels, float64 between the
runs, added in chunk order. Forward is then y = act(scale x + shift), in the phase behind, with the sum of a residual
branch or a max-pool on the way (``batchnorm``). Backward needs sum(dy) and sum(dy xhat) first.

Cost: statistics read x, forward reads x and writes y, the sums backward read x and dy, dx reads both again.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from convolt.engines.jit.batchnorm import DOUBLE, add_moments, add_slopes, apply, backward
from convolt.engines.jit.bf16 import float32_of_bf16
from convolt.engines.jit.kernels.specs import FLOAT, NormSpec, number_bytes
from convolt.engines.jit.memory import float64_of_bits, view

RUN = 64  # pixels whose sums stay in float32


def statistics(spec: NormSpec) -> Callable[..., None]:
    """Sums about the pivot of a chunk; arguments: state, x, parts (chunks, 3, columns) of sums, squares, pivot."""
    x, images, columns = spec.x, spec.images, spec.columns
    C, (lines, pixels) = x.C, replace(spec, pool=(1, 1)).lines(x)
    add, half, number = add_moments(spec), x.half, x.number

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        place = arguments[2] + DOUBLE * chunk * 3 * columns
        sums = view(place, (3, columns), np.float64)
        sums[:] = 0.0
        pivot = arguments[1] + number * (chunk * images * size + origin)
        for c in range(C):
            if half:
                sums[2, c] = float32_of_bf16(view(pivot, (C,), np.uint16)[c])
            else:
                sums[2, c] = view(pivot, (C,), np.float32)[c]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for line in range(lines):
                row = arguments[1] + number * (image * size + origin + line * pitch)
                for start in range(0, pixels, RUN):
                    add((row + number * start * C, pivot, place), min(RUN, pixels - start))

    size, origin, pitch = x.size, x.origin, x.pitch
    return kernel


def fold(spec: NormSpec) -> Callable[..., None]:
    """Mean, 1/sqrt(var + eps), scale and shift of the batch, and the running statistics. One chunk.

    Arguments: state, parts, weight, bias, running mean, running var, momentum (bits), constants (4, columns): mean,
    inverse, scale, shift. Synchronized, parts are one row of sums over all ranks, with their count behind it.
    """
    C, images, pixels, affine, eps = spec.x.C, spec.images, spec.x.H * spec.x.W, spec.affine, spec.eps
    columns, synchronized = spec.columns, spec.synchronized

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        chunks = 1 if synchronized else (count + images - 1) // images
        M = np.float64(count * pixels)
        if synchronized:
            M = view(arguments[1], (3 * columns + 1,), np.float64)[3 * columns]
        momentum = float64_of_bits(arguments[6])
        running_mean = view(arguments[4], (C,), np.float32)
        running_var = view(arguments[5], (C,), np.float32)
        constants = view(arguments[7], (4, columns), np.float32)
        for c in range(C):
            total, squares = 0.0, 0.0
            pivot = view(arguments[1], (3, columns), np.float64)[2, c]
            for part in range(chunks):
                sums = view(arguments[1] + DOUBLE * part * 3 * columns, (3, columns), np.float64)
                n = np.float64(min(images, count - part * images) * pixels)
                apart = sums[2, c] - pivot
                total += sums[0, c] + n * apart
                squares += sums[1, c] + 2.0 * apart * sums[0, c] + n * apart * apart
            mean = total / M
            var = max(squares / M - mean * mean, 0.0)
            mean += pivot
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
    C, affine, eps, columns = spec.x.C, spec.affine, spec.eps, spec.columns

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        mean, var = view(arguments[4], (C,), np.float32), view(arguments[5], (C,), np.float32)
        constants = view(arguments[7], (4, columns), np.float32)
        for c in range(C):
            scale = 1.0 / np.sqrt(var[c] + eps) * (view(arguments[2], (C,), np.float32)[c] if affine else 1.0)
            shift = (view(arguments[3], (C,), np.float32)[c] if affine else 0.0) - mean[c] * scale
            constants[2, c], constants[3, c] = np.float32(scale), np.float32(shift)

    return kernel


def normalize(spec: NormSpec) -> Callable[..., None]:
    """``y = outer(pool(act(scale x + shift)) + skip)``; arguments: state, x, constants, y, skip, codes."""
    x, y, images, (lines, pixels) = spec.x, spec.y, spec.images, spec.lines(spec.x, spec.y, spec.skip)
    skip = spec.skip if spec.skip is not None else y
    row = apply(spec)
    C, rows, x_number, y_number = x.C, spec.pool[0], x.number, y.number

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for line in range(lines):
                source = arguments[1] + x_number * (image * x_size + x_origin + line * rows * x_pitch)
                target = arguments[3] + y_number * (image * y_size + y_origin + line * y_pitch)
                other = arguments[4] + FLOAT * (image * skip_size + skip_origin + line * skip_pitch)
                codes = arguments[5] + (image * lines + line) * pixels * C
                row((source, arguments[2], target, other, codes), pixels)

    x_size, x_origin, x_pitch = x.size, x.origin, x.pitch
    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch
    skip_size, skip_origin, skip_pitch = skip.size, skip.origin, skip.pitch
    return kernel


def slopes(spec: NormSpec) -> Callable[..., None]:
    """The sums of dy in front of the activation, and of that times x - mean, of a chunk.

    Arguments: state, x, y, dy, codes, constants, parts (chunks, 3, columns) float64.
    """
    x, y, images, columns = spec.x, spec.y, spec.images, spec.columns
    lines, pixels = spec.lines(x, y if spec.outer != 1 else None)
    add = add_slopes(spec)
    C, (rows, across), number, dy_number = x.C, spec.pool, x.number, number_bytes(spec.half_dy)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        sums = arguments[6] + DOUBLE * chunk * 3 * columns
        view(sums, (3, columns), np.float64)[:] = 0.0
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for line in range(lines):
                source = arguments[1] + number * (image * x_size + x_origin + line * rows * x_pitch)
                output = arguments[2] + FLOAT * (image * y_size + y_origin + line * y_pitch)
                place = (image * lines + line) * pixels * C
                for start in range(0, pixels, RUN):
                    add(
                        (
                            source + number * start * across * C,
                            output + FLOAT * start * C,
                            arguments[3] + dy_number * (place + start * C),
                            arguments[4] + place + start * C,
                            arguments[5],
                            sums,
                        ),
                        min(RUN, pixels - start),
                    )

    x_size, x_origin, x_pitch = x.size, x.origin, x.pitch
    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch
    return kernel


def fold_slopes(spec: NormSpec) -> Callable[..., None]:
    """Gradients dweight and dbias, which are added, and a and b of ``dx = scale dy + a + b (x - mean)``. One chunk.

    a = -scale mean(dy) and b = -scale mean(dy xhat) inverse. Arguments: state, parts, dweight, dbias, constants, terms
    (2, columns), and synchronized the sums over all ranks with their count behind them.
    """
    accumulate, synchronized = spec.accumulate, spec.synchronized
    C, images, pixels, affine, columns = spec.x.C, spec.images, spec.x.H * spec.x.W, spec.affine, spec.columns

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        chunks = (count + images - 1) // images
        M = np.float64(count * pixels)
        constants = view(arguments[4], (4, columns), np.float32)
        terms = view(arguments[5], (2, columns), np.float32)
        for c in range(C):
            total, products = 0.0, 0.0
            for part in range(chunks):
                sums = view(arguments[1] + DOUBLE * part * 3 * columns, (3, columns), np.float64)
                total += sums[0, c]
                products += sums[1, c]
            inverse, scale = np.float64(constants[1, c]), np.float64(constants[2, c])
            products *= inverse
            if affine:
                dweight, dbias = view(arguments[2], (C,), np.float32), view(arguments[3], (C,), np.float32)
                dweight[c] = np.float32(products) + (dweight[c] if accumulate else np.float32(0))
                dbias[c] = np.float32(total) + (dbias[c] if accumulate else np.float32(0))
            if synchronized:
                sums = view(arguments[6], (3, columns), np.float64)
                total, products = sums[0, c], sums[1, c] * inverse
                M = view(arguments[6], (3 * columns + 1,), np.float64)[3 * columns]
            terms[0, c] = np.float32(-scale * total / M)
            terms[1, c] = np.float32(-scale * products / M * inverse)

    return kernel


def normalize_backward(spec: NormSpec) -> Callable[..., None]:
    """``dx (+)= scale dy' + a + b (x - mean)``, and ``dskip (+)= dy`` in front of the outer activation.

    Arguments: state, x, y, dy, codes, constants, terms, dx, dskip.
    """
    x, y, images = spec.x, spec.y, spec.images
    lines, pixels = spec.lines(x, y if spec.outer != 1 else None)
    row = backward(spec)
    C, (rows, across) = x.C, spec.pool
    x_number, dy_number, dx_number = x.number, number_bytes(spec.half_dy), number_bytes(spec.half_dx)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for line in range(lines):
                place = (image * lines + line) * pixels * C
                row(
                    (
                        arguments[1] + x_number * (image * x_size + x_origin + line * rows * x_pitch),
                        arguments[2] + FLOAT * (image * y_size + y_origin + line * y_pitch),
                        arguments[3] + dy_number * place,
                        arguments[4] + place,
                        arguments[5],
                        arguments[6],
                        arguments[7] + dx_number * place * rows * across,
                        arguments[8] + FLOAT * place,
                    ),
                    pixels,
                )

    x_size, x_origin, x_pitch = x.size, x.origin, x.pitch
    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch
    return kernel
