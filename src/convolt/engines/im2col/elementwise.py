"""Elementwise layers in place, flattening as a view, and residual sums.

ReLU, LeakyReLU and Dropout write over their input and over the gradient that comes back: the stage before never
needs its own output again, and where it does (GELU, SiLU, BatchNorm) it keeps its input instead. A Residual is the
one place where an array has two readers, so it hands a branch a copy when the branch would begin in place.
"""

import math
from collections.abc import Callable

import numpy as np
from numba import vectorize

from convolt.chain import Array, Context, Kernel, Scope, Stage, Table
from convolt.engines.im2col.windows import channel_runs
from convolt.engines.loops import dropout_mask, gelu_gate, gelu_gate_slope, sigmoid
from convolt.layers import GELU, Dropout, Flatten, Layer, LeakyReLU, ReLU, Residual, SiLU

# What may write over its input (forward) or over the gradient that comes back (backward).
IN_PLACE = (ReLU, LeakyReLU, GELU, SiLU, Dropout, Flatten)


def relu_forward(ctx: Context, layer: ReLU, params: Scope, x: Array) -> Array:
    """``x = max(x, 0)`` in place."""

    def work(worker: int, channels: slice) -> None:
        np.maximum(x[channels], 0, out=x[channels])

    ctx.saved["y"] = x
    ctx.workers.each(_tiles(x), work)
    return x


def relu_backward(ctx: Context, layer: ReLU, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dy = dy where y > 0`` in place."""
    y = ctx.saved["y"]

    def work(worker: int, channels: slice) -> None:
        positive = ctx.buffer(f"positive{worker}", y[channels].shape, np.bool_)
        np.greater(y[channels], 0, out=positive)
        np.multiply(dy[channels], positive, out=dy[channels])

    ctx.workers.each(_tiles(dy), work)
    return dy


def leaky_relu_forward(ctx: Context, layer: LeakyReLU, params: Scope, x: Array) -> Array:
    """``x = x where x > 0 else negative_slope x`` in place; the sign of x is kept as one byte."""
    positive = ctx.buffer("positive", x.shape, np.bool_)
    np.greater(x, 0, out=positive)
    ctx.saved["positive"] = positive
    return _scale_negative(ctx, layer, x, positive)


def leaky_relu_backward(ctx: Context, layer: LeakyReLU, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dy = dy where x > 0 else negative_slope dy`` in place."""
    return _scale_negative(ctx, layer, dy, ctx.saved["positive"])


def _scale_negative(ctx: Context, layer: LeakyReLU, x: Array, positive: Array) -> Array:
    slope = x.dtype.type(layer.negative_slope)

    def work(worker: int, channels: slice) -> None:
        factor = ctx.buffer(f"factor{worker}", x[channels].shape, x.dtype)
        np.multiply(positive[channels], 1 - slope, out=factor)
        factor += slope
        x[channels] *= factor

    ctx.workers.each(_tiles(x), work)
    return x


@vectorize
def erf(x: float) -> float:
    """The error function as a ufunc, which NumPy lacks; compiled when a GELU first asks for it."""
    return math.erf(x)


def gelu_forward(ctx: Context, layer: GELU, params: Scope, x: Array) -> Array:
    """``y = x gate(x)`` into a buffer; x is kept."""
    erf(x.dtype.type(0))  # compiled here, not by several workers at a time
    return _gated(ctx, x, lambda part: part * gelu_gate(layer, part, erf))


def gelu_backward(ctx: Context, layer: GELU, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dy = dy (gate(x) + x gate'(x))`` in place."""
    return _chain_rule(ctx, dy, lambda x: gelu_gate(layer, x, erf) + x * gelu_gate_slope(layer, x))


def silu_forward(ctx: Context, layer: SiLU, params: Scope, x: Array) -> Array:
    """``y = x sigmoid(x)`` into a buffer; x is kept."""
    return _gated(ctx, x, lambda part: part * sigmoid(part))


def silu_backward(ctx: Context, layer: SiLU, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dy = dy sigmoid(x) (1 + x (1 - sigmoid(x)))`` in place."""
    return _chain_rule(ctx, dy, _silu_slope)


def _silu_slope(x: Array) -> Array:
    gate = sigmoid(x)
    slope: Array = gate * (1 + x * (1 - gate))
    return slope


def _gated(ctx: Context, x: Array, gated: Callable[[Array], Array]) -> Array:
    y = ctx.buffer("y", x.shape, x.dtype)
    ctx.saved["x"] = x

    def work(worker: int, channels: slice) -> None:
        y[channels] = gated(x[channels])

    ctx.workers.each(_tiles(x), work)
    return y


def _chain_rule(ctx: Context, dy: Array, slope: Callable[[Array], Array]) -> Array:
    x = ctx.saved["x"]

    def work(worker: int, channels: slice) -> None:
        dy[channels] *= slope(x[channels])

    ctx.workers.each(_tiles(dy), work)
    return dy


def dropout_forward(ctx: Context, layer: Dropout, params: Scope, x: Array) -> Array:
    """``x = x mask / (1 - p)`` in place."""
    ctx.saved["mask"] = mask = dropout_mask(ctx, layer, x)
    return x if mask is None else np.multiply(x, mask, out=x)


def dropout_backward(ctx: Context, layer: Dropout, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dy = dy mask / (1 - p)`` in place."""
    mask = ctx.saved["mask"]
    return dy if mask is None else np.multiply(dy, mask, out=dy)


def flatten_forward(ctx: Context, layer: Flatten, params: Scope, x: Array) -> Array:
    """(C, H, W, N) seen as (C H W, N)."""
    ctx.saved["shape"] = x.shape
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def flatten_backward(ctx: Context, layer: Flatten, params: Scope, grads: Scope, dy: Array) -> Array:
    """The shape of forward's input again."""
    return dy.reshape(ctx.saved["shape"])


def residual_forward(ctx: Context, layer: Residual, params: Scope, x: Array) -> Array:
    """``y = body(x) + shortcut(x)``."""
    sums: list[Array] = []
    for branch, layers in _branches(layer):
        chain = ctx.chain(branch, layers, x.shape[:-1])
        own = _own(ctx, f"{branch}.x", chain.stages[:1], x)
        sums.append(chain.forward(params.at(branch), own))
    return np.add(sums[0], sums[1], out=ctx.buffer("y", sums[0].shape, x.dtype))


def residual_backward(ctx: Context, layer: Residual, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dx`` is the sum of what both branches send back."""
    sums: list[Array] = []
    for branch, layers in _branches(layer):
        chain = ctx.chain(branch, layers, ())  # made by forward
        own = _own(ctx, f"{branch}.dy", chain.stages[-1:], dy)
        sums.append(chain.backward(params.at(branch), grads.at(branch), own))
    return np.add(sums[0], sums[1], out=ctx.buffer("dx", sums[0].shape, dy.dtype))


def _branches(layer: Residual) -> tuple[tuple[str, tuple[Layer, ...]], ...]:
    return ("body", layer.body), ("shortcut", layer.shortcut)


def _own(ctx: Context, key: str, edge: list[Stage], x: Array) -> Array:
    """A copy of x when the stage at the branch's edge writes over it, else x itself."""
    if not any(isinstance(layer, IN_PLACE) for stage in edge for layer in stage.layers):
        return x
    copy = ctx.buffer(key, x.shape, x.dtype)
    copy[...] = x
    return copy


def _tiles(x: Array) -> list[slice]:
    return channel_runs(x.shape[0], 2 * x.itemsize * x[0].size)


ELEMENTWISE: Table = {
    (ReLU,): Kernel(relu_forward, relu_backward),
    (LeakyReLU,): Kernel(leaky_relu_forward, leaky_relu_backward),
    (GELU,): Kernel(gelu_forward, gelu_backward),
    (SiLU,): Kernel(silu_forward, silu_backward),
    (Dropout,): Kernel(dropout_forward, dropout_backward),
    (Flatten,): Kernel(flatten_forward, flatten_backward),
    (Residual,): Kernel(residual_forward, residual_backward),
}
