"""Max- and average-pooling over any window, for pools that are not fused behind a convolution.

Windows are cut off at the image's edge, so no padding is ever read. Max-pooling keeps the winning tap, as
one byte unless a window has more taps than a byte counts.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from convolt.engines.jit.kernels.specs import FLOAT, PoolSpec
from convolt.engines.jit.memory import view

_CODES = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@njit
def _taps(position: int, stride: int, padding: int, kernel: int, size: int) -> tuple[int, int]:
    """The taps [first, last) of a window that lie inside the image."""
    start = position * stride - padding
    return max(0, -start), min(kernel, size - start)


def max_pool(spec: PoolSpec) -> Callable[..., None]:
    """The largest value of each window, the first of equals; arguments: state, x, y, codes (N, P, Q, C)."""
    x, y, window, P, Q, images = spec.x, spec.y, spec.window, spec.P, spec.Q, spec.images
    C, H, W, S = x.C, x.H, x.W, window.S
    R, stride_h, stride_w, top, left = window.R, window.stride_h, window.stride_w, window.top, window.left
    code_bytes, number = spec.code_bytes, _CODES[spec.code_bytes]

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for p in range(P):
                r_first, r_last = _taps(p, stride_h, top, R, H)
                for q in range(Q):
                    s_first, s_last = _taps(q, stride_w, left, S, W)
                    best = view(
                        arguments[2] + FLOAT * (image * y_size + y_origin + p * y_pitch + q * C), (C,), np.float32
                    )
                    code = view(arguments[3] + code_bytes * ((image * P + p) * Q + q) * C, (C,), number)
                    best[:] = np.float32(-np.inf)
                    for r in range(r_first, r_last):
                        for s in range(s_first, s_last):
                            h, w = p * stride_h - top + r, q * stride_w - left + s
                            pixel = view(
                                arguments[1] + FLOAT * (image * x_size + x_origin + h * x_pitch + w * C),
                                (C,),
                                np.float32,
                            )
                            tap = number(r * S + s)
                            for c in range(C):
                                better = pixel[c] > best[c]
                                code[c] = tap if better else code[c]
                                best[c] = pixel[c] if better else best[c]

    x_size, x_origin, x_pitch = x.size, x.origin, x.pitch
    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch
    return kernel


def max_pool_backward(spec: PoolSpec) -> Callable[..., None]:
    """The gradient goes to the tap that won; arguments: state, dy, codes, dx."""
    x, window, P, Q, images, adds = spec.x, spec.window, spec.P, spec.Q, spec.images, spec.add
    C, H, W, S = x.C, x.H, x.W, window.S
    R, stride_h, stride_w, top, left = window.R, window.stride_h, window.stride_w, window.top, window.left
    code_bytes, number = spec.code_bytes, _CODES[spec.code_bytes]

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            target = view(arguments[3] + FLOAT * image * H * W * C, (H, W, C), np.float32)
            if not adds:
                target[:] = np.float32(0)
            for p in range(P):
                r_first, r_last = _taps(p, stride_h, top, R, H)
                for q in range(Q):
                    s_first, s_last = _taps(q, stride_w, left, S, W)
                    dy = view(arguments[1] + FLOAT * ((image * P + p) * Q + q) * C, (C,), np.float32)
                    code = view(arguments[2] + code_bytes * ((image * P + p) * Q + q) * C, (C,), number)
                    for r in range(r_first, r_last):
                        for s in range(s_first, s_last):
                            h, w = p * stride_h - top + r, q * stride_w - left + s
                            tap = number(r * S + s)
                            for c in range(C):
                                target[h, w, c] += dy[c] if code[c] == tap else np.float32(0)

    return kernel


def average_pool(spec: PoolSpec) -> Callable[..., None]:
    """The mean of each window; arguments: state, x, y."""
    x, y, window, P, Q, images = spec.x, spec.y, spec.window, spec.P, spec.Q, spec.images
    C, H, W, S = x.C, x.H, x.W, window.S
    R, stride_h, stride_w, top, left = window.R, window.stride_h, window.stride_w, window.top, window.left
    part = _part(spec)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for p in range(P):
                r_first, r_last = _taps(p, stride_h, top, R, H)
                for q in range(Q):
                    s_first, s_last = _taps(q, stride_w, left, S, W)
                    total = view(
                        arguments[2] + FLOAT * (image * y_size + y_origin + p * y_pitch + q * C), (C,), np.float32
                    )
                    total[:] = np.float32(0)
                    share = part(r_last - r_first, s_last - s_first)
                    for r in range(r_first, r_last):
                        for s in range(s_first, s_last):
                            h, w = p * stride_h - top + r, q * stride_w - left + s
                            pixel = view(
                                arguments[1] + FLOAT * (image * x_size + x_origin + h * x_pitch + w * C),
                                (C,),
                                np.float32,
                            )
                            for c in range(C):
                                total[c] += pixel[c]
                    for c in range(C):
                        total[c] *= share

    x_size, x_origin, x_pitch = x.size, x.origin, x.pitch
    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch
    return kernel


def average_pool_backward(spec: PoolSpec) -> Callable[..., None]:
    """Each pixel of a window gets its share; arguments: state, dy, codes (none), dx."""
    x, window, P, Q, images, adds = spec.x, spec.window, spec.P, spec.Q, spec.images, spec.add
    C, H, W, S = x.C, x.H, x.W, window.S
    R, stride_h, stride_w, top, left = window.R, window.stride_h, window.stride_w, window.top, window.left
    part = _part(spec)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            target = view(arguments[3] + FLOAT * image * H * W * C, (H, W, C), np.float32)
            if not adds:
                target[:] = np.float32(0)
            for p in range(P):
                r_first, r_last = _taps(p, stride_h, top, R, H)
                for q in range(Q):
                    s_first, s_last = _taps(q, stride_w, left, S, W)
                    dy = view(arguments[1] + FLOAT * ((image * P + p) * Q + q) * C, (C,), np.float32)
                    share = part(r_last - r_first, s_last - s_first)
                    for r in range(r_first, r_last):
                        for s in range(s_first, s_last):
                            h, w = p * stride_h - top + r, q * stride_w - left + s
                            for c in range(C):
                                target[h, w, c] += dy[c] * share

    return kernel


def _part(spec: PoolSpec) -> Callable[[int, int], Any]:
    """What a pixel counts in a window with so many rows and columns inside the image."""
    whole, every = np.float32(1 / (spec.window.R * spec.window.S)), spec.count_include_pad

    @njit
    def part(rows: int, columns: int) -> Any:
        return whole if every else np.float32(1 / (rows * columns))

    found: Callable[[int, int], Any] = part
    return found
