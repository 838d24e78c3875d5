"""Convolution through the Fourier transform, batch innermost: its cost does not depend on the filter's size.

A cross-correlation is a product in the frequency domain. With X = F(x), W = F(w) and D = F(dy), all zero-padded to
one size, and * the complex conjugate,

    Y = sum_c conj(W[k, c]) X[c]        dX = sum_k W[k, c] D[k]        dW = sum_n conj(D[k, n]) X[c, n]

which are small matrix products at each frequency. Strides are a subsampling of the dense output, dilation a spread
of the filter's taps. It pays for large filters: Mathieu, Henaff and LeCun 2013.
"""

import numpy as np

from convolt.chain import Array, Context, Kernel, Scope, Table
from convolt.layers import Conv2d, Pair, Window

AXES = (-2, -1)


def conv2d_forward(ctx: Context, layer: Conv2d, params: Scope, x: Array) -> Array:
    """``y = F^-1(sum_c conj(W) X) + b``: x (C, H, W, N), y (K, P, Q, N).

    Cost: 8 N K C/groups F FLOPs for F frequencies, and the transforms.
    """
    C, H, W, N = x.shape
    K, P, Q = layer.output_shape((C, H, W))
    window, size = layer.geometry, _transform_size(layer.geometry, H, W)
    (top, _), (left, _) = window.pads
    padded = np.zeros((C, *size, N), x.dtype)
    padded[:, top : top + H, left : left + W] = x
    ctx.saved.update(X=_to_frequency(padded, layer.groups), size=size, shape=x.shape)
    filters = _filters(layer, params["weight"], size)
    dense = _from_frequency(filters.conj() @ ctx.saved["X"], size, x.dtype)
    rows, columns = _outputs(window, P, Q)
    y = ctx.buffer("y", (K, P, Q, N), x.dtype)
    y[...] = dense[:, rows, columns]
    if layer.bias:
        y += params["bias"][:, None, None, None]
    return y


def conv2d_backward(ctx: Context, layer: Conv2d, params: Scope, grads: Scope, dy: Array) -> Array:
    """``dw = F^-1(conj(D) X)`` at the filter's taps, ``dx = F^-1(W D)`` without the padding, ``db = sum dy``."""
    (_, H, W, N), size, window = ctx.saved["shape"], ctx.saved["size"], layer.geometry
    K, P, Q = dy.shape[:3]
    spread = np.zeros((K, *size, N), dy.dtype)
    rows, columns = _outputs(window, P, Q)
    spread[:, rows, columns] = dy
    D = _to_frequency(spread, layer.groups)
    correlation = ctx.saved["X"] @ D.conj().swapaxes(*AXES)  # (F, G, C/G, K/G), summed over the batch
    dw = _from_frequency(correlation.swapaxes(*AXES), size, dy.dtype)  # (G K/G, h, w, C/G)
    grads["weight"][...] += dw[:, *_taps(window)].transpose(0, 3, 1, 2)
    if layer.bias:
        grads["bias"][...] += dy.reshape(K, -1).sum(axis=1)
    if not ctx.needs_dx:
        return dy
    filters = _filters(layer, params["weight"], size)
    (top, _), (left, _) = window.pads
    dx = _from_frequency(filters.swapaxes(*AXES) @ D, size, dy.dtype)
    return np.ascontiguousarray(dx[:, top : top + H, left : left + W])


def _transform_size(window: Window, H: int, W: int) -> Pair:
    """The padded image: with the filter's taps inside it, the wanted outputs never wrap around."""
    (top, bottom), (left, right) = window.pads
    return H + top + bottom, W + left + right


def _to_frequency(x: Array, groups: int) -> Array:
    """(G M, h, w, N) real to (frequencies, G, M, N) complex."""
    spectrum = np.fft.rfft2(x, axes=(1, 2))
    _, h, half, N = spectrum.shape
    return np.ascontiguousarray(spectrum.reshape(groups, -1, h * half, N).transpose(2, 0, 1, 3))


def _from_frequency(spectrum: Array, size: Pair, dtype: np.dtype[np.floating]) -> Array:
    """(frequencies, G, M, N) complex to (G M, h, w, N) real."""
    _, groups, M, N = spectrum.shape
    half = size[1] // 2 + 1
    image = spectrum.transpose(1, 2, 0, 3).reshape(groups * M, size[0], half, N)
    return np.fft.irfft2(image, s=size, axes=(1, 2)).astype(dtype, copy=False)


def _filters(layer: Conv2d, w: Array, size: Pair) -> Array:
    """Filters (K, C/G, R, S) spread by the dilation, as (frequencies, G, K/G, C/G)."""
    spread = np.zeros((w.shape[0], *size, w.shape[1]), w.dtype)
    spread[:, *_taps(layer.geometry)] = w.transpose(0, 2, 3, 1)
    return _to_frequency(spread, layer.groups)


def _taps(window: Window) -> tuple[slice, slice]:
    return slice(0, window.extent[0], window.dilation[0]), slice(0, window.extent[1], window.dilation[1])


def _outputs(window: Window, P: int, Q: int) -> tuple[slice, slice]:
    vertical, horizontal = window.stride
    return slice(0, (P - 1) * vertical + 1, vertical), slice(0, (Q - 1) * horizontal + 1, horizontal)


FFT: Table = {(Conv2d,): Kernel(conv2d_forward, conv2d_backward)}
