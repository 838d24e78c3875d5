"""BatchNorm and input normalization, batch innermost: a channel is one contiguous run of numbers.

BatchNorm forward is one multiply and one add with folded constants. Backward computes the normalized input again
instead of keeping it, channel by channel, in the cache.
"""

import numpy as np

from convolt.chain import Array, Context, Kernel, Scope, Table
from convolt.engines.im2col.windows import channel_runs
from convolt.engines.loops import track_statistics
from convolt.layers import BatchNorm2d, Normalize


def batch_norm_forward(ctx: Context, layer: BatchNorm2d, params: Scope, x: Array) -> Array:
    """``y = scale x + shift`` with ``scale = weight / sqrt(var + eps)`` and ``shift = bias - mean scale``."""
    C = x.shape[0]
    rows = x.reshape(C, -1)
    y = ctx.buffer("y", x.shape, x.dtype)
    mean, var = np.empty(C, x.dtype), np.empty(C, x.dtype)

    def statistics(worker: int, channels: slice) -> None:
        part = rows[channels]
        if not ctx.synchronized:
            np.mean(part, axis=1, out=mean[channels])
        centered = ctx.buffer(f"centered{worker}", part.shape, x.dtype)
        np.subtract(part, mean[channels, None], out=centered)
        np.multiply(centered, centered, out=centered)
        np.sum(centered, axis=1, out=var[channels])

    tiles = channel_runs(C, 2 * rows.shape[1] * x.itemsize)
    if ctx.training:
        count = rows.shape[1]
        if ctx.synchronized:
            sums, counts = ctx.over_ranks(rows.sum(axis=1, dtype=np.float64), count)
            count = int(counts[0])
            mean[...] = sums / count
        ctx.workers.each(tiles, statistics)
        if ctx.synchronized:
            var[...] = ctx.over_ranks(var)[0]
        var /= count
        track_statistics(ctx, layer, mean, var, count)
        ctx.saved["count"] = count
    else:
        mean[...], var[...] = ctx.state["running_mean"], ctx.state["running_var"]
    inverse = 1 / np.sqrt(var + x.dtype.type(layer.eps))
    scale = inverse * params["weight"] if layer.affine else inverse
    shift = params["bias"] - mean * scale if layer.affine else -mean * scale
    ctx.saved.update(x=x, mean=mean, inverse=inverse)

    def apply(worker: int, channels: slice) -> None:
        part = y.reshape(C, -1)[channels]
        np.multiply(rows[channels], scale[channels, None], out=part)
        part += shift[channels, None]

    ctx.workers.each(tiles, apply)
    return y


def batch_norm_backward(ctx: Context, layer: BatchNorm2d, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dx = weight / sqrt(var + eps) (dy - mean(dy) - xhat mean(dy xhat))``; x is centered anew for each tile."""
    x, mean, inverse = ctx.saved["x"], ctx.saved["mean"], ctx.saved["inverse"]
    C, M, count = x.shape[0], x[0].size, ctx.saved["count"]
    dx = ctx.buffer("dx", x.shape, x.dtype)
    dweight, dbias = np.empty(C, x.dtype), np.empty(C, x.dtype)
    products, slope_sums = dweight, dbias  # over the samples that the statistics are of

    def sums(worker: int, channels: slice) -> None:
        slopes, target = dy.reshape(C, M)[channels], dx.reshape(C, M)[channels]
        normalized = ctx.buffer(f"centered{worker}", target.shape, x.dtype)
        np.subtract(x.reshape(C, M)[channels], mean[channels, None], out=normalized)
        normalized *= inverse[channels, None]
        np.multiply(slopes, normalized, out=target)
        np.sum(target, axis=1, out=dweight[channels])
        np.sum(slopes, axis=1, out=dbias[channels])

    def slopes(worker: int, channels: slice) -> None:
        target = dx.reshape(C, M)[channels]
        normalized = ctx.buffer(f"centered{worker}", target.shape, x.dtype)
        if ctx.synchronized:  # other channels were here since
            np.subtract(x.reshape(C, M)[channels], mean[channels, None], out=normalized)
            normalized *= inverse[channels, None]
        normalized *= (products[channels] / count)[:, None]
        np.subtract(dy.reshape(C, M)[channels], normalized, out=target)
        target -= (slope_sums[channels] / count)[:, None]
        target *= _scale(layer, params, inverse)[channels, None]

    def both(worker: int, channels: slice) -> None:
        sums(worker, channels)
        slopes(worker, channels)

    tiles = channel_runs(C, 3 * M * x.itemsize)
    if ctx.synchronized:
        ctx.workers.each(tiles, sums)
        products, slope_sums = (total.astype(x.dtype) for total in ctx.over_ranks(dweight, dbias))
        ctx.workers.each(tiles, slopes)
    else:
        ctx.workers.each(tiles, both)
    if layer.affine:
        grads["weight"][...] += dweight
        grads["bias"][...] += dbias
    return dx


def _scale(layer: BatchNorm2d, params: Scope, inverse: Array) -> Array:
    scale: Array = inverse * params["weight"] if layer.affine else inverse
    return scale


def normalize_forward(ctx: Context, layer: Normalize, params: Scope, x: Array) -> Array:
    """``y = (x - mean) / std`` for each channel."""
    mean, std = (np.array(values, x.dtype)[:, None, None, None] for values in (layer.mean, layer.std))
    y = np.subtract(x, mean, out=ctx.buffer("y", x.shape, x.dtype))
    return np.divide(y, std, out=y)


def normalize_backward(ctx: Context, layer: Normalize, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dx = dy / std``."""
    std = np.array(layer.std, dy.dtype)[:, None, None, None]
    return np.divide(dy, std, out=ctx.buffer("dx", dy.shape, dy.dtype))


NORMALIZATION: Table = {
    (BatchNorm2d,): Kernel(batch_norm_forward, batch_norm_backward),
    (Normalize,): Kernel(normalize_forward, normalize_backward),
}
