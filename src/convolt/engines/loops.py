"""The ``loops`` engine: the living definition of every operation.

Plain NumPy in NCHW with Python loops over output positions, written to be read beside the equation. It is the
single-threaded start of every ladder and the reference that other engines are tested against, so it is never
optimized. Dimension letters follow cuDNN: N batch, C and K channels in and out, H W input, R S filter, P Q output.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np

from convolt.chain import Array, Context, Kernel, Scope, Table, TableExecutor
from convolt.engine import Engine, EngineRecipe, Executor, resolve_threads
from convolt.errors import ConfigError
from convolt.layers import (
    GELU,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    LeakyReLU,
    MaxPool2d,
    Normalize,
    ReLU,
    Residual,
    SiLU,
    Window,
)
from convolt.model import Model
from convolt.params import Params

DRAWS = 1 << 14  # of dropout at a time: no array as large as the batch's activations

# --- windows ---------------------------------------------------------------------------------------------------------


def _padded(x: Array, window: Window, value: float = 0.0) -> Array:
    return np.pad(x, ((0, 0), (0, 0), *window.pads), constant_values=value)


def _unpadded(x: Array, window: Window) -> Array:
    (top, bottom), (left, right) = window.pads
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]


def _positions(window: Window, P: int, Q: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Each output position with the rows and columns of its window in the padded image."""
    for p, q in product(range(P), range(Q)):
        top, left = p * window.stride[0], q * window.stride[1]
        rows = slice(top, top + window.extent[0], window.dilation[0])
        columns = slice(left, left + window.extent[1], window.dilation[1])
        yield p, q, rows, columns


# --- convolution and dense ------------------------------------------------------------------------------------------


def conv2d_forward(ctx: Context, layer: Conv2d, params: Scope, x: Array) -> Array:
    """``y[n, k, p, q] = b[k] + sum_{c, r, s} w[k, c, r, s] x[n, c, p stride + r dilation, q stride + s dilation]``.

    x is padded (N, C, H, W), y (N, K, P, Q); with groups, filters k of a group see only its channels.
    Cost: 2 N K P Q C/groups R S FLOPs; bytes: each window is read once, overlaps again.
    """
    w = params["weight"]
    K, _, P, Q = layer.out_channels, *layer.output_shape(x.shape[1:])
    ctx.saved["x"] = padded = _padded(x, layer.geometry)
    y = np.zeros((x.shape[0], K, P, Q), x.dtype)
    for p, q, rows, columns in _positions(layer.geometry, P, Q):
        for c, k in _groups(layer):
            y[:, k, p, q] = np.einsum("ncrs,kcrs->nk", padded[:, c, rows, columns], w[k])
    return y + params["bias"][:, None, None] if layer.bias else y


def conv2d_backward(ctx: Context, layer: Conv2d, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dw += dy x`` and ``dx = dy w``, both over the windows of forward; ``db[k] += sum_{n, p, q} dy[n, k, p, q]``.

    Cost: twice the forward's FLOPs.
    """
    w, x = params["weight"], ctx.saved["x"]
    dw, dx = grads["weight"], np.zeros_like(x)
    for p, q, rows, columns in _positions(layer.geometry, *dy.shape[2:]):
        for c, k in _groups(layer):
            dw[k] += np.einsum("nk,ncrs->kcrs", dy[:, k, p, q], x[:, c, rows, columns])
            dx[:, c, rows, columns] += np.einsum("nk,kcrs->ncrs", dy[:, k, p, q], w[k])
    if layer.bias:
        grads["bias"][...] += dy.sum(axis=(0, 2, 3))
    return _unpadded(dx, layer.geometry)


def _groups(layer: Conv2d) -> list[tuple[slice, slice]]:
    """Channels in and filters out of each group."""
    c, k = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    return [(slice(g * c, (g + 1) * c), slice(g * k, (g + 1) * k)) for g in range(layer.groups)]


def dense_forward(ctx: Context, layer: Dense, params: Scope, x: Array) -> Array:
    """``y = x W^T + b``; x (N, in), W (out, in), y (N, out). Cost: 2 N in out FLOPs."""
    ctx.saved["x"] = x
    y: Array = x @ params["weight"].T
    return y + params["bias"] if layer.bias else y


def dense_backward(ctx: Context, layer: Dense, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dW += dy^T x``, ``db += sum_n dy``, ``dx = dy W``. Cost: 4 N in out FLOPs."""
    grads["weight"][...] += dy.T @ ctx.saved["x"]
    if layer.bias:
        grads["bias"][...] += dy.sum(axis=0)
    dx: Array = dy @ params["weight"]
    return dx


# --- normalization ---------------------------------------------------------------------------------------------------


def batch_norm_forward(ctx: Context, layer: BatchNorm2d, params: Scope, x: Array) -> Array:
    """``y = weight (x - mean) / sqrt(var + eps) + bias``; statistics over N, H, W for each channel.

    Raises ConfigError when a training batch has one value a channel: its variance says nothing.
    """
    if ctx.training:
        mean, var, count = batch_statistics(ctx, x)
        track_statistics(ctx, layer, mean, var, count)
        ctx.saved["count"] = count
    else:
        mean, var = (ctx.state[name].astype(x.dtype) for name in ("running_mean", "running_var"))
    inverse = 1 / np.sqrt(var + x.dtype.type(layer.eps))
    normalized = (x - _channels(mean)) * _channels(inverse)
    ctx.saved.update(normalized=normalized, inverse=inverse)
    if not layer.affine:
        return normalized
    return normalized * _channels(params["weight"]) + _channels(params["bias"])


def batch_norm_backward(ctx: Context, layer: BatchNorm2d, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dx = weight / sqrt(var + eps) (dy - mean(dy) - xhat mean(dy xhat))`` (Ioffe and Szegedy 2015, section 3)."""
    normalized, inverse = ctx.saved["normalized"], ctx.saved["inverse"]
    if layer.affine:
        grads["weight"][...] += (dy * normalized).sum(axis=(0, 2, 3))
        grads["bias"][...] += dy.sum(axis=(0, 2, 3))
        dy = dy * _channels(params["weight"])
    sums = [dy.sum(axis=(0, 2, 3)), (dy * normalized).sum(axis=(0, 2, 3))]
    if ctx.synchronized:
        sums = [total.astype(dy.dtype) for total in ctx.over_ranks(*sums)]
    mean_dy, mean_dy_normalized = (total / dy.dtype.type(ctx.saved["count"]) for total in sums)
    dx: Array = (dy - _channels(mean_dy) - normalized * _channels(mean_dy_normalized)) * _channels(inverse)
    return dx


def batch_statistics(ctx: Context, x: Array) -> tuple[Array, Array, int]:
    """Mean and biased variance of each channel, and how many values they are of: over the samples of all ranks."""
    C = x.shape[1]
    if not ctx.synchronized:
        return x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3)), x.size // C
    sums, count = ctx.over_ranks(x.sum(axis=(0, 2, 3), dtype=np.float64), x.size // C)
    mean = sums / count
    squares = ctx.over_ranks(np.square(x - _channels(mean)).sum(axis=(0, 2, 3)))[0]
    return mean.astype(x.dtype), (squares / count).astype(x.dtype), int(count[0])


def track_statistics(ctx: Context, layer: BatchNorm2d, mean: Array, var: Array, count: int) -> None:
    """Move the running mean and the running, unbiased variance by ``momentum`` toward the batch's."""
    if count < 2:
        raise ConfigError(
            f"layer {ctx.name}: BatchNorm2d needs more than one value a channel to train; use a larger batch"
        )
    for name, batch in (("running_mean", mean), ("running_var", var * (count / (count - 1)))):
        ctx.state[name][...] += layer.momentum * (batch - ctx.state[name])
    ctx.state["num_batches_tracked"][...] += 1


def _channels(v: Array) -> Array:
    return v[:, None, None]


def normalize_forward(ctx: Context, layer: Normalize, params: Scope, x: Array) -> Array:
    """``y = (x - mean) / std`` for each channel."""
    mean, std = np.array(layer.mean, x.dtype), np.array(layer.std, x.dtype)
    return (x - _channels(mean)) / _channels(std)


def normalize_backward(ctx: Context, layer: Normalize, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dx = dy / std``."""
    return dy / _channels(np.array(layer.std, dy.dtype))


# --- pooling ---------------------------------------------------------------------------------------------------------


def max_pool_forward(ctx: Context, layer: MaxPool2d, params: Scope, x: Array) -> Array:
    """``y[n, c, p, q]`` = the largest value of the window; forward keeps which, the first of equals."""
    _, P, Q = layer.output_shape(x.shape[1:])
    padded = _padded(x, layer.geometry, -np.inf)
    y = np.zeros((*x.shape[:2], P, Q), x.dtype)
    argmax = np.zeros(y.shape, np.int64)
    for p, q, rows, columns in _positions(layer.geometry, P, Q):
        values = padded[:, :, rows, columns].reshape(*x.shape[:2], math.prod(layer.geometry.kernel))
        argmax[:, :, p, q] = values.argmax(axis=2)
        y[:, :, p, q] = values.max(axis=2)
    ctx.saved.update(argmax=argmax, padded_shape=padded.shape)
    return y


def max_pool_backward(ctx: Context, layer: MaxPool2d, params: Scope, grads: Scope, dy: Array) -> Array:
    """The gradient goes to the position that won."""
    dx = np.zeros(ctx.saved["padded_shape"], dy.dtype)
    R, S = layer.geometry.kernel
    taps = np.arange(R * S).reshape(R, S)
    for p, q, rows, columns in _positions(layer.geometry, *dy.shape[2:]):
        won = ctx.saved["argmax"][:, :, p, q, None, None] == taps
        dx[:, :, rows, columns] += dy[:, :, p, q, None, None] * won
    return _unpadded(dx, layer.geometry)


def avg_pool_forward(ctx: Context, layer: AvgPool2d, params: Scope, x: Array) -> Array:
    """``y[n, c, p, q]`` = the sum of the window over its size, or over its unpadded part."""
    _, P, Q = layer.output_shape(x.shape[1:])
    padded = _padded(x, layer.geometry)
    counts = window_counts(layer, x.shape[2], x.shape[3])
    y = np.zeros((*x.shape[:2], P, Q), x.dtype)
    for p, q, rows, columns in _positions(layer.geometry, P, Q):
        y[:, :, p, q] = padded[:, :, rows, columns].sum(axis=(2, 3)) / counts[p, q]
    ctx.saved.update(counts=counts, padded_shape=padded.shape)
    return y


def avg_pool_backward(ctx: Context, layer: AvgPool2d, params: Scope, grads: Scope, dy: Array) -> Array:
    """Each position of a window gets its share of the gradient."""
    dx = np.zeros(ctx.saved["padded_shape"], dy.dtype)
    for p, q, rows, columns in _positions(layer.geometry, *dy.shape[2:]):
        dx[:, :, rows, columns] += dy[:, :, p, q, None, None] / ctx.saved["counts"][p, q]
    return _unpadded(dx, layer.geometry)


def window_counts(layer: AvgPool2d, height: int, width: int) -> Array:
    """The divisor of each window (P, Q) of an image (H, W)."""
    window = layer.geometry
    P, Q = window.output_size("AvgPool2d", height, width)
    ones = np.pad(np.ones((height, width)), window.pads, constant_values=float(layer.count_include_pad))
    counts = np.zeros((P, Q))
    for p, q, rows, columns in _positions(window, P, Q):
        counts[p, q] = ones[rows, columns].sum()
    return counts


def global_avg_pool_forward(ctx: Context, layer: GlobalAvgPool2d, params: Scope, x: Array) -> Array:
    """``y[n, c] = mean over H, W``."""
    ctx.saved["shape"] = x.shape
    y: Array = x.mean(axis=(2, 3))
    return y


def global_avg_pool_backward(ctx: Context, layer: GlobalAvgPool2d, params: Scope, grads: Scope, dy: Array) -> Array:
    """Every position gets ``dy / (H W)``."""
    _, _, H, W = ctx.saved["shape"]
    return np.broadcast_to(dy[:, :, None, None] / (H * W), ctx.saved["shape"])


# --- elementwise: these do not care for the layout -------------------------------------------------------------------


def relu_forward(ctx: Context, layer: ReLU, params: Scope, x: Array) -> Array:
    """``y = max(x, 0)``."""
    ctx.saved["x"] = x
    return np.maximum(x, 0)


def relu_backward(ctx: Context, layer: ReLU, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dx = dy where x > 0``."""
    return dy * (ctx.saved["x"] > 0)


def leaky_relu_forward(ctx: Context, layer: LeakyReLU, params: Scope, x: Array) -> Array:
    """``y = x where x > 0 else negative_slope x``."""
    ctx.saved["x"] = x
    return np.where(x > 0, x, x * x.dtype.type(layer.negative_slope))


def leaky_relu_backward(ctx: Context, layer: LeakyReLU, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dx = dy where x > 0 else negative_slope dy``."""
    return np.where(ctx.saved["x"] > 0, dy, dy * dy.dtype.type(layer.negative_slope))


def gelu_forward(ctx: Context, layer: GELU, params: Scope, x: Array) -> Array:
    """``y = x Phi(x)``, or ``x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``."""
    ctx.saved["x"] = x
    return (x * gelu_gate(layer, x)).astype(x.dtype, copy=False)


def gelu_backward(ctx: Context, layer: GELU, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dx = dy (gate(x) + x gate'(x))``."""
    x = ctx.saved["x"]
    return (dy * (gelu_gate(layer, x) + x * gelu_gate_slope(layer, x))).astype(dy.dtype, copy=False)


_erf = np.vectorize(math.erf, otypes=[np.float64])
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def gelu_gate(layer: GELU, x: Array, erf: Callable[[Array], Array] = _erf) -> Array:
    """``Phi(x) = (1 + erf(x / sqrt 2)) / 2``, the normal distribution function, or its tanh form."""
    if layer.approximate == "none":
        phi: Array = 0.5 * (1 + erf(x / math.sqrt(2)))
        return phi
    gate: Array = 0.5 * (1 + np.tanh(_TANH_SCALE * (x + _TANH_CUBE * x**3)))
    return gate


def gelu_gate_slope(layer: GELU, x: Array) -> Array:
    """The derivative of the gate: the normal density, or that of the tanh form."""
    if layer.approximate == "none":
        density: Array = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return density
    tanh = np.tanh(_TANH_SCALE * (x + _TANH_CUBE * x**3))
    slope: Array = 0.5 * (1 - tanh * tanh) * _TANH_SCALE * (1 + 3 * _TANH_CUBE * x * x)
    return slope


def silu_forward(ctx: Context, layer: SiLU, params: Scope, x: Array) -> Array:
    """``y = x sigmoid(x)``."""
    ctx.saved["x"] = x
    return x * sigmoid(x)


def silu_backward(ctx: Context, layer: SiLU, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dx = dy sigmoid(x) (1 + x (1 - sigmoid(x)))``."""
    x = ctx.saved["x"]
    gate = sigmoid(x)
    dx: Array = dy * gate * (1 + x * (1 - gate))
    return dx


def sigmoid(x: Array) -> Array:
    """``1 / (1 + exp(-x))`` as ``(1 + tanh(x/2)) / 2``, which cannot overflow."""
    y: Array = 0.5 * (1 + np.tanh(0.5 * x))
    return y


def dropout_forward(ctx: Context, layer: Dropout, params: Scope, x: Array) -> Array:
    """``y = x mask / (1 - p)`` in training; the mask depends on (seed, epoch, sample, layer) alone."""
    ctx.saved["mask"] = mask = dropout_mask(ctx, layer, x)
    return x if mask is None else x * mask


def dropout_backward(ctx: Context, layer: Dropout, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dx = dy mask / (1 - p)``."""
    mask = ctx.saved["mask"]
    return dy if mask is None else dy * mask


def dropout_mask(ctx: Context, layer: Dropout, x: Array) -> Array | None:
    """0 or 1/(1 - p) for each element in the layout of x; None when dropout does not act.

    Raises ConfigError when the identity of the samples is not known.
    """
    if not (ctx.training and ctx.phase.dropout and layer.p):
        return None
    if ctx.phase.rng is None:
        raise ConfigError(f"layer {ctx.name}: Dropout needs rng=SampleRng(seed, epoch, indices) in loss_and_grads")
    mask = ctx.buffer("mask", x.shape, x.dtype)
    samples = mask if ctx.phase.layout == "NCHW" else np.moveaxis(mask, -1, 0)
    at_once = max(1, DRAWS // math.prod(samples.shape[1:]))
    for start in range(0, len(samples), at_once):
        part = slice(start, start + at_once)
        kept = ctx.phase.rng[part].uniform(f"dropout:{ctx.name}", samples.shape[1:]) >= layer.p
        np.multiply(kept, x.dtype.type(1 / (1 - layer.p)), out=samples[part])
    return mask


# --- shape and composition -------------------------------------------------------------------------------------------


def flatten_forward(ctx: Context, layer: Flatten, params: Scope, x: Array) -> Array:
    """(N, C, H, W) becomes (N, C H W)."""
    ctx.saved["shape"] = x.shape
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def flatten_backward(ctx: Context, layer: Flatten, params: Scope, grads: Scope, dy: Array) -> Array:
    """The shape of forward's input again."""
    return dy.reshape(ctx.saved["shape"])


def residual_forward(ctx: Context, layer: Residual, params: Scope, x: Array) -> Array:
    """``y = body(x) + shortcut(x)``, in any layout."""
    shape = x.shape[1:] if ctx.phase.layout == "NCHW" else x.shape[:-1]
    body = ctx.chain("body", layer.body, shape).forward(params.at("body"), x)
    return body + ctx.chain("shortcut", layer.shortcut, shape).forward(params.at("shortcut"), x)


def residual_backward(ctx: Context, layer: Residual, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dx`` is the sum of what both branches send back."""
    shape = dy.shape[1:]
    body = ctx.chain("body", layer.body, shape).backward(params.at("body"), grads.at("body"), dy)
    return body + ctx.chain("shortcut", layer.shortcut, shape).backward(params.at("shortcut"), grads.at("shortcut"), dy)


LOOPS: Table = {
    (Conv2d,): Kernel(conv2d_forward, conv2d_backward),
    (Dense,): Kernel(dense_forward, dense_backward),
    (BatchNorm2d,): Kernel(batch_norm_forward, batch_norm_backward),
    (Normalize,): Kernel(normalize_forward, normalize_backward),
    (MaxPool2d,): Kernel(max_pool_forward, max_pool_backward),
    (AvgPool2d,): Kernel(avg_pool_forward, avg_pool_backward),
    (GlobalAvgPool2d,): Kernel(global_avg_pool_forward, global_avg_pool_backward),
    (ReLU,): Kernel(relu_forward, relu_backward),
    (LeakyReLU,): Kernel(leaky_relu_forward, leaky_relu_backward),
    (GELU,): Kernel(gelu_forward, gelu_backward),
    (SiLU,): Kernel(silu_forward, silu_backward),
    (Dropout,): Kernel(dropout_forward, dropout_backward),
    (Flatten,): Kernel(flatten_forward, flatten_backward),
    (Residual,): Kernel(residual_forward, residual_backward),
}


@dataclass(frozen=True)
class Loops(Engine):
    """The reference engine. ``threads`` limits BLAS, which serves the dense layers."""

    threads: int = 1
    NAME: ClassVar[str] = "loops"
    PRECISIONS: ClassVar[tuple[str, ...]] = ("fp64", "fp32", "fp32-master64")

    def __post_init__(self) -> None:
        object.__setattr__(self, "threads", resolve_threads(self.threads))

    def executor(self, model: Model, params: Params | None, recipe: EngineRecipe) -> Executor:
        """The table ``LOOPS`` on NCHW arrays."""
        own = self.initial_params(model, params, recipe)
        return TableExecutor(model, own, recipe, LOOPS, "NCHW", blas_threads=self.threads)
