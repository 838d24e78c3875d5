"""Pooling, batch innermost: each tap of the window is one strided slice over all positions.

Max-pooling keeps the winner of each window as one byte, not an index; average-pooling keeps nothing. A run of
channels is a tile: its slices stay in the cache while the taps pass over them. A ReLU in front of a max-pool acts
behind it, on a quarter of the numbers or less: a larger input never has a smaller output, so the winner is the same,
and where it lets nothing through there is no gradient to go anywhere.
"""

import numpy as np

from convolt.chain import Array, Context, Kernel, Scope, Table
from convolt.engines.im2col.elementwise import relu_backward, relu_forward
from convolt.engines.im2col.windows import channel_runs, taps
from convolt.engines.loops import window_counts
from convolt.layers import AvgPool2d, GlobalAvgPool2d, MaxPool2d, ReLU

Scopes = tuple[Scope, Scope]


def max_pool_forward(ctx: Context, layer: MaxPool2d, params: Scope, x: Array) -> Array:
    """``y`` = largest of the window; ``code`` = which tap, the first of equals. x (C, H, W, N), y (C, P, Q, N)."""
    C, H, W, N = x.shape
    _, P, Q = layer.output_shape((C, H, W))
    y = ctx.buffer("y", (C, P, Q, N), x.dtype)
    codes = ctx.buffer("codes", y.shape, np.uint8 if _taps(layer) <= 256 else np.uint16)
    ctx.saved["image"] = (H, W)

    def work(worker: int, channels: slice) -> None:
        best, code, images = y[channels], codes[channels], x[channels]
        better = ctx.buffer(f"better{worker}", best.shape, np.bool_)
        winner = ctx.buffer(f"winner{worker}", best.shape, codes.dtype)
        best[...] = -np.inf
        code[...] = 0
        for tap in taps(layer.geometry, range(P), Q, H, W):
            place = (slice(None), *tap.at)
            values = images[:, *tap.image]
            np.greater(values, best[place], out=better[place])
            np.maximum(values, best[place], out=best[place])
            # Taps come in rising order, so the last one that was better is the largest number: no masked copy.
            np.multiply(better[place], codes.dtype.type(tap.r * layer.geometry.kernel[1] + tap.s), out=winner[place])
            np.maximum(code[place], winner[place], out=code[place])

    ctx.workers.each(channel_runs(C, 2 * H * W * N * x.itemsize), work)
    return y


def max_pool_backward(ctx: Context, layer: MaxPool2d, params: Scope, grads: Scope, dy: Array) -> Array:
    """The gradient goes to the tap that won."""
    C, P, Q, N = dy.shape
    H, W = ctx.saved["image"]
    R, S = layer.geometry.kernel
    apart = layer.geometry.stride == (R, S) and layer.geometry.dilation == (1, 1)  # no number is in two windows
    whole = apart and layer.geometry.pads == ((0, 0), (0, 0)) and (P * R, Q * S) == (H, W)
    dx = ctx.buffer("dx", (C, H, W, N), dy.dtype)
    codes = ctx.buffer("codes", dy.shape, np.uint8 if _taps(layer) <= 256 else np.uint16)

    def work(worker: int, channels: slice) -> None:
        slopes, code, image = dy[channels], codes[channels], dx[channels]
        won = ctx.buffer(f"better{worker}", slopes.shape, np.bool_)
        if not whole:
            image[...] = 0
        for tap in taps(layer.geometry, range(P), Q, H, W):
            place = (slice(None), *tap.at)
            np.equal(code[place], tap.r * S + tap.s, out=won[place])
            if apart:
                np.multiply(slopes[place], won[place], out=image[:, *tap.image])
                continue
            share = ctx.buffer(f"share{worker}", slopes.shape, dy.dtype)[place]
            image[:, *tap.image] += np.multiply(slopes[place], won[place], out=share)

    ctx.workers.each(channel_runs(C, 2 * H * W * N * dy.itemsize), work)
    return dx


def relu_max_pool_forward(ctx: Context, layers: tuple[ReLU, MaxPool2d], params: Scopes, x: Array) -> Array:
    """``y = max(0, largest of the window)``."""
    return relu_forward(ctx, layers[0], params[0], max_pool_forward(ctx, layers[1], params[1], x))


def relu_max_pool_backward(
    ctx: Context, layers: tuple[ReLU, MaxPool2d], params: Scopes, grads: Scopes, dy: Array
) -> Array:
    """The gradient where y > 0 goes to the tap that won."""
    slopes = relu_backward(ctx, layers[0], params[0], grads[0], dy)
    return max_pool_backward(ctx, layers[1], params[1], grads[1], slopes)


def _taps(layer: MaxPool2d) -> int:
    return layer.geometry.kernel[0] * layer.geometry.kernel[1]


def avg_pool_forward(ctx: Context, layer: AvgPool2d, params: Scope, x: Array) -> Array:
    """``y`` = sum of the window over its size, or over its unpadded part."""
    C, H, W, N = x.shape
    _, P, Q = layer.output_shape((C, H, W))
    y = ctx.buffer("y", (C, P, Q, N), x.dtype)
    inverse = (1 / window_counts(layer, H, W)).astype(x.dtype)[:, :, None]
    ctx.saved.update(image=(H, W), inverse=inverse)

    def work(worker: int, channels: slice) -> None:
        total = y[channels]
        total[...] = 0
        for tap in taps(layer.geometry, range(P), Q, H, W):
            total[:, *tap.at] += x[channels][:, *tap.image]
        total *= inverse

    ctx.workers.each(channel_runs(C, 2 * H * W * N * x.itemsize), work)
    return y


def avg_pool_backward(ctx: Context, layer: AvgPool2d, params: Scope, grads: Scope, dy: Array) -> Array:
    """Each position of a window gets its share."""
    C, P, Q, N = dy.shape
    H, W = ctx.saved["image"]
    dx = ctx.buffer("dx", (C, H, W, N), dy.dtype)

    def work(worker: int, channels: slice) -> None:
        share = ctx.buffer(f"share{worker}", dy[channels].shape, dy.dtype)
        np.multiply(dy[channels], ctx.saved["inverse"], out=share)
        image = dx[channels]
        image[...] = 0
        for tap in taps(layer.geometry, range(P), Q, H, W):
            image[:, *tap.image] += share[:, *tap.at]

    ctx.workers.each(channel_runs(C, 2 * H * W * N * dy.itemsize), work)
    return dx


def global_avg_pool_forward(ctx: Context, layer: GlobalAvgPool2d, params: Scope, x: Array) -> Array:
    """``y[c, n] = mean over H, W``."""
    ctx.saved["shape"] = x.shape
    return np.mean(x, axis=(1, 2), out=ctx.buffer("y", (x.shape[0], x.shape[3]), x.dtype))


def global_avg_pool_backward(ctx: Context, layer: GlobalAvgPool2d, params: Scope, grads: Scope, dy: Array) -> Array:
    """Every position gets ``dy / (H W)``."""
    C, H, W, N = ctx.saved["shape"]
    dx = ctx.buffer("dx", (C, H, W, N), dy.dtype)
    return np.multiply(dy[:, None, None, :], dy.dtype.type(1 / (H * W)), out=dx)


POOLING: Table = {
    (MaxPool2d,): Kernel(max_pool_forward, max_pool_backward),
    (ReLU, MaxPool2d): Kernel(relu_max_pool_forward, relu_max_pool_backward),
    (AvgPool2d,): Kernel(avg_pool_forward, avg_pool_backward),
    (GlobalAvgPool2d,): Kernel(global_avg_pool_forward, global_avg_pool_backward),
}
