"""Convolution and dense layers as matrix products, batch innermost.

For a tile of output rows the columns (C R S, rows Q N) are gathered by R S long copies, then

    y  = w (K, C R S) @ columns        dw = dy (K, rows Q N) @ columns^T        dcolumns = w^T @ dy

Backward gathers the columns again: from the cache that is cheaper than keeping R S copies of the input. ``dw`` is
summed over tiles in tile order, so the number of workers does not change a bit. Groups are a batched product.
"""

import numpy as np

from convolt.chain import Array, Context, Kernel, Scope, Table
from convolt.engines.im2col.windows import row_tiles, runs, taps
from convolt.layers import Conv2d, Dense

DENSE_RUN = 64  # outputs (and an eighth of the inputs) that one worker computes at a time


def conv2d_forward(ctx: Context, layer: Conv2d, params: Scope, x: Array) -> Array:
    """``y = w columns + b``: x (C, H, W, N), y (K, P, Q, N).

    Cost: 2 N K P Q C/groups R S FLOPs; bytes: x is read and the columns written R S times, within the cache.
    """
    C, H, W, N = x.shape
    K, P, Q = layer.output_shape((C, H, W))
    G, window = layer.groups, layer.geometry
    w = params["weight"].reshape(G, K // G, -1)
    y = ctx.buffer("y", (K, P, Q, N), x.dtype)
    products = y.reshape(G, K // G, P * Q * N)
    ctx.saved["x"] = x
    depth = C * window.kernel[0] * window.kernel[1]

    def work(worker: int, rows: range) -> None:
        columns = gather(ctx, worker, layer, x, rows, Q)
        part = slice(rows.start * Q * N, rows.stop * Q * N)
        np.matmul(w, columns.reshape(G, depth // G, -1), out=products[:, :, part])
        if layer.bias:
            y[:, rows.start : rows.stop] += params["bias"][:, None, None, None]

    ctx.workers.each(row_tiles(P, depth * Q * N * x.itemsize), work)
    return y


def conv2d_backward(ctx: Context, layer: Conv2d, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dw += dy columns^T``, ``db += sum dy``, and ``dx`` by adding ``w^T dy`` back where the columns came from.

    Cost: twice the forward's FLOPs, once where nobody reads dx.
    """
    x = ctx.saved["x"]
    C, H, W, N = x.shape
    K, P, Q = dy.shape[:3]
    G, window = layer.groups, layer.geometry
    w = params["weight"].reshape(G, K // G, -1)
    depth = C * window.kernel[0] * window.kernel[1]
    slopes = dy.reshape(G, K // G, P * Q * N)
    tiles = row_tiles(P, depth * Q * N * x.itemsize)
    partial = ctx.buffer("dw", (len(tiles), *w.shape), x.dtype)

    def weights(worker: int, tile: int) -> None:
        rows = tiles[tile]
        part = slice(rows.start * Q * N, rows.stop * Q * N)
        columns = gather(ctx, worker, layer, x, rows, Q).reshape(G, depth // G, -1)
        np.matmul(slopes[:, :, part], columns.transpose(0, 2, 1), out=partial[tile])

    ctx.workers.each(range(len(tiles)), weights)
    grads["weight"][...] += partial.sum(axis=0).reshape(grads["weight"].shape)
    if layer.bias:
        grads["bias"][...] += dy.reshape(K, -1).sum(axis=1)
    return scatter(ctx, layer, w, slopes, x, P, Q) if ctx.needs_dx else dy


def scatter(ctx: Context, layer: Conv2d, w: Array, slopes: Array, x: Array, P: int, Q: int) -> Array:
    """``dx`` (C, H, W, N): ``w^T dy`` added back tap by tap.

    A worker owns a run of input channels (of groups, where there are several), so that nobody adds into another's
    rows and the order of additions is fixed.
    """
    _, H, W, N = x.shape
    R, S = layer.geometry.kernel
    dx = ctx.buffer("dx", x.shape, x.dtype)

    def work(worker: int, part: tuple[slice, slice]) -> None:
        groups, channels = part
        count = channels.stop - channels.start
        filters = w[groups, :, channels.start * R * S : channels.stop * R * S].transpose(0, 2, 1)
        first = groups.start * (layer.in_channels // layer.groups) + channels.start
        image = dx[first : first + len(filters) * count]
        image[...] = 0
        for rows in row_tiles(P, len(image) * R * S * Q * N * x.itemsize):
            columns = ctx.buffer(f"dcolumns{worker}", (len(image), R, S, len(rows), Q, N), x.dtype)
            dy = slopes[groups, :, rows.start * Q * N : rows.stop * Q * N]
            np.matmul(filters, dy, out=columns.reshape(len(filters), count * R * S, -1))
            for tap in taps(layer.geometry, rows, Q, H, W):
                image[:, *tap.image] += columns[:, tap.r, tap.s, *tap.at]

    ctx.workers.each(_owners(layer), work)
    return dx


def _owners(layer: Conv2d) -> list[tuple[slice, slice]]:
    """Runs of input channels as (groups, channels of the group), about eight channels each."""
    channels = layer.in_channels // layer.groups
    if layer.groups > 1:
        return [(groups, slice(0, channels)) for groups in runs(layer.groups, max(1, 8 // channels))]
    return [(slice(0, 1), part) for part in runs(channels, 8)]


def gather(ctx: Context, worker: int, layer: Conv2d, x: Array, rows: range, Q: int) -> Array:
    """Columns (C, R, S, rows, Q, N) of some output rows; padding is zero."""
    C, H, W, N = x.shape
    columns = ctx.buffer(f"columns{worker}", (C, *layer.geometry.kernel, len(rows), Q, N), x.dtype)
    for tap in taps(layer.geometry, rows, Q, H, W):
        target = columns[:, tap.r, tap.s]
        if not tap.whole:
            target[...] = 0
        target[:, *tap.at] = x[:, *tap.image]
    return columns


def dense_forward(ctx: Context, layer: Dense, params: Scope, x: Array) -> Array:
    """``y = W x + b``: x (in, N), W (out, in), y (out, N). Cost: 2 N in out FLOPs."""
    ctx.saved["x"] = x
    y = ctx.buffer("y", (layer.out_features, x.shape[1]), x.dtype)

    def work(worker: int, outputs: slice) -> None:
        np.matmul(params["weight"][outputs], x, out=y[outputs])
        if layer.bias:
            y[outputs] += params["bias"][outputs, None]

    ctx.workers.each(runs(layer.out_features, DENSE_RUN), work)
    return y


def dense_backward(ctx: Context, layer: Dense, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dW += dy x^T``, ``db += sum_n dy``, ``dx = W^T dy``. Cost: 4 N in out FLOPs."""
    x, w = ctx.saved["x"], params["weight"]
    dx = ctx.buffer("dx", x.shape, x.dtype)

    def work(worker: int, inputs: slice) -> None:
        dw = ctx.buffer(f"dw{worker}", (layer.out_features, inputs.stop - inputs.start), x.dtype)
        grads["weight"][:, inputs] += np.matmul(dy, x[inputs].T, out=dw)
        if ctx.needs_dx:
            np.matmul(w[:, inputs].T, dy, out=dx[inputs])

    ctx.workers.each(runs(layer.in_features, DENSE_RUN * 8), work)
    if layer.bias:
        grads["bias"][...] += dy.sum(axis=1)
    return dx


GEMM: Table = {
    (Conv2d,): Kernel(conv2d_forward, conv2d_backward),
    (Dense,): Kernel(dense_forward, dense_backward),
}
