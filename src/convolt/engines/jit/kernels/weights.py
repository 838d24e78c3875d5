"""Kernels on weights: packing filters, adding up the parts of their gradients, and the optimizer's step.

The master weights and gradients keep PyTorch's layout, so names, checkpoints and other engines see nothing of the
packing. Parts of a gradient are added in chunk order: the same bits for any number of threads.

Those of convolutions are compiled once for all sizes, which come as arguments: they move memory, and a network has as
many shapes of filters as it has layers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from convolt.engines.jit.adam import LANES, adam_step
from convolt.engines.jit.bf16 import bf16_of_float32, to_bf16
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.kernels.specs import FLOAT, NUMBERS, FoldSpec, PackSpec, ReduceSpec, SpreadSpec, UpdateSpec
from convolt.engines.jit.memory import address_of, view

ADAMS = ("adam", "adamw")


def pack(spec: PackSpec) -> Callable[..., None]:
    """Filters (groups, K/groups, C/groups, taps) to (groups, depth, columns), of any size; a chunk is a tap.

    Forward, C/groups of each tap lie along the depth and K/groups along the columns; turned, it is the other way round.
    Arguments: state, w, packed, groups, K/groups, C/groups, taps, columns, depth, and for each chunk its tap and where
    in depth that begins. In pairs: (groups, depth, columns, 2) of bf16. What is written by no tap stays zero.
    """
    back, together = spec.turned, 2 if spec.pairs else 1
    number: Any = bf16_of_float32 if spec.pairs else _same
    kind: Any = np.uint16 if spec.pairs else np.float32

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        groups, filters, C, taps = arguments[3], arguments[4], arguments[5], arguments[6]
        columns, depth, tap, begin = arguments[7], arguments[8], arguments[9 + 2 * chunk], arguments[10 + 2 * chunk]
        w = view(arguments[1], (groups, filters, C, taps), np.float32)
        packed = view(arguments[2], (groups, depth, columns, together), kind)
        for group in range(groups):
            if back:
                for k in range(filters):
                    row, side = (begin + k) // together, (begin + k) % together
                    for c in range(C):
                        packed[group, row, c, side] = number(w[group, k, c, tap])
            else:
                for c in range(C):
                    row, side = (begin + c) // together, (begin + c) % together
                    for k in range(filters):
                        packed[group, row, k, side] = number(w[group, k, c, tap])

    return kernel


@inlined
def _same(x: Any) -> Any:
    """A float32 number as it is."""
    return x


def fold_norm(spec: FoldSpec) -> Callable[..., None]:
    """``w' = w scale`` and ``b' = (b - mean) scale + beta``, with scale = gamma / sqrt(var + eps) of each filter.

    Arguments: state, w (K, row), b, gamma, beta, running mean, running var, w', b', K, row, filters of a chunk.
    """
    bias, affine, eps = spec.bias, spec.affine, spec.eps

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        K, row, run = arguments[9], arguments[10], arguments[11]
        w, folded = view(arguments[1], (K, row), np.float32), view(arguments[7], (K, row), np.float32)
        mean, var = view(arguments[5], (K,), np.float32), view(arguments[6], (K,), np.float32)
        for k in range(chunk * run, min((chunk + 1) * run, K)):
            scale = 1.0 / np.sqrt(np.float64(var[k]) + eps)
            offset = -np.float64(mean[k])
            if bias:
                offset += view(arguments[2], (K,), np.float32)[k]
            if affine:
                scale *= view(arguments[3], (K,), np.float32)[k]
            offset *= scale
            if affine:
                offset += view(arguments[4], (K,), np.float32)[k]
            view(arguments[8], (K,), np.float32)[k] = np.float32(offset)
            for i in range(row):
                folded[k, i] = np.float32(w[k, i] * scale)

    return kernel


def spread_groups(spec: SpreadSpec) -> Callable[..., None]:
    """Filters (groups, K/groups, C/groups, taps) as (K, C, taps), zero for the channels of other groups.

    Arguments: state, w, spread, K, C/groups * taps, groups, filters of a chunk.
    """

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        K, row, groups, run = arguments[3], arguments[4], arguments[5], arguments[6]
        w, spread = view(arguments[1], (K, row), np.float32), view(arguments[2], (K, groups, row), np.float32)
        for k in range(chunk * run, min((chunk + 1) * run, K)):
            for group in range(groups):
                for i in range(row):
                    spread[k, group, i] = w[k, i] if group == k // (K // groups) else np.float32(0)

    return kernel


def reduce_parts(spec: ReduceSpec) -> Callable[..., None]:
    """``dw (+)= sum of parts``, of any size.

    Arguments: state, parts (chunks, taps, C, columns), dw (K, C, taps), db parts, db, K, C, taps, columns, elements of
    a part, images of a part, channels of a chunk; the first chunk adds up db.
    """
    accumulate, add_bias = spec.accumulate, bias_sum(spec)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        K, C, taps, columns = arguments[5], arguments[6], arguments[7], arguments[8]
        size, images, run = arguments[9], arguments[10], arguments[11]
        count = view(arguments[0], (1,), np.int64)[0]
        parts = (count + images - 1) // images
        dw = view(arguments[2], (K, C, taps), np.float32)
        for c in range(chunk * run, min((chunk + 1) * run, C)):
            for tap in range(taps):
                row = arguments[1] + FLOAT * (tap * C + c) * columns
                total = view(row, (columns,), np.float32)
                for part in range(1, parts):
                    other = view(row + FLOAT * part * size, (columns,), np.float32)
                    for k in range(K):
                        total[k] += other[k]
                for k in range(K):
                    dw[k, c, tap] = dw[k, c, tap] + total[k] if accumulate else total[k]
        if chunk == 0:
            add_bias(arguments[3], arguments[4], parts, K, 0, K)

    return kernel


def bias_sum(spec: ReduceSpec) -> Callable[..., None]:
    """For kernels: ``add(db parts (parts, K), db, parts, K, first filter, the one behind the last)``."""
    accumulate, bias = spec.accumulate, spec.bias

    @inlined
    def add(source: int, target: int, parts: int, K: int, first: int, last: int) -> None:
        if bias:
            db = view(target, (K,), np.float32)
            for k in range(first, last):
                value = db[k] if accumulate else np.float32(0)
                for part in range(parts):
                    value += view(source + FLOAT * part * K, (K,), np.float32)[k]
                db[k] = value

    return add


def update(spec: UpdateSpec) -> Callable[..., None]:
    """One optimizer step of a run of parameters, as ``convolt.optimizers`` writes it.

    Arguments: state, w, g, three vectors of the optimizer's state, numbers (float64), runs (chunks, 3) int64: start,
    stop, whether it decays. A chunk is one run. numbers: lr, weight decay, then what the optimizer's function names.
    """
    step = optimizer_step(spec)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        run = view(arguments[7] + 24 * chunk, (3,), np.int64)
        start, count, decays = run[0], run[1] - run[0], run[2]
        w = view(arguments[1] + FLOAT * start, (count,), np.float32)
        g = view(arguments[2] + FLOAT * start, (count,), np.float32)
        first = view(arguments[3] + FLOAT * start, (count,), np.float32)
        second = view(arguments[4] + FLOAT * start, (count,), np.float32)
        third = view(arguments[5] + FLOAT * start, (count,), np.float32)
        step(w, g, first, second, third, view(arguments[6], (NUMBERS,), np.float64), decays)

    return kernel


def optimizer_step(spec: UpdateSpec) -> Callable[..., None]:
    """One step of some weights: ``step(w, g, first, second, third state, numbers, whether they decay)``, float32."""
    move = _move(spec, _adam(spec, copies=False) if spec.kind in ADAMS else _others(spec))

    @inlined
    def step(w: Any, g: Any, first: Any, second: Any, third: Any, numbers: Any, decays: int) -> None:
        move(w, g, first, second, third, numbers, decays, 0)

    return step


def copied_step(spec: UpdateSpec, columns: int, native: bool) -> Callable[..., None]:
    """The same of weights that decay, and their copy in bf16: ``step(w, ..., numbers, address of the copy)``."""
    copies = spec.kind in ADAMS and spec.lanes == LANES and native
    move = _move(spec, _adam(spec, copies) if spec.kind in ADAMS else _others(spec))
    narrow = to_bf16(columns, LANES, native)

    @inlined
    def step(w: Any, g: Any, first: Any, second: Any, third: Any, numbers: Any, copy: int) -> None:
        move(w, g, first, second, third, numbers, 1, copy)
        if not copies:
            narrow(address_of(w, (0,)), copy)

    return step


def _move(spec: UpdateSpec, equations: Callable[..., None]) -> Callable[..., None]:
    decoupled = spec.decoupled

    @inlined
    def move(w: Any, g: Any, first: Any, second: Any, third: Any, numbers: Any, decays: int, copy: int) -> None:
        decay = np.float32(numbers[1]) if decays else np.float32(0)
        shrink = np.float32(1) - np.float32(numbers[0]) * decay if decoupled else np.float32(1)
        pull = np.float32(0) if decoupled else decay
        equations(w, g, first, second, third, numbers, shrink, pull, copy)

    found: Callable[..., None] = move
    return found


def _others(spec: UpdateSpec) -> Callable[..., None]:
    return _sgd(spec) if spec.kind == "sgd" else _rmsprop(spec)


def _sgd(spec: UpdateSpec) -> Callable[..., None]:
    """numbers: lr, decay, momentum, 1 - dampening (1 in the first step), momentum kept (0 in the first step)."""
    momentum, nesterov = spec.momentum, spec.nesterov

    @inlined
    def step(w: Any, g: Any, b: Any, _: Any, __: Any, numbers: Any, shrink: float, pull: float, ___: int) -> None:
        lr, mu = np.float32(numbers[0]), np.float32(numbers[2])
        fresh, kept = np.float32(numbers[3]), np.float32(numbers[4])
        for i in range(len(w)):
            slope = g[i] + pull * w[i]
            if momentum:
                b[i] = kept * b[i] + fresh * slope
                slope = slope + mu * b[i] if nesterov else b[i]
            w[i] = shrink * w[i] - lr * slope

    return step


def _adam(spec: UpdateSpec, copies: bool) -> Callable[..., None]:
    """numbers: lr, decay, beta1, beta2, eps root, rate; root and rate as in ``convolt.optimizers``."""
    vectors = adam_step(copies)

    @inlined
    def wide(w: Any, g: Any, m: Any, v: Any, _: Any, numbers: Any, shrink: float, pull: float, copy: int) -> None:
        beta1, beta2 = np.float32(numbers[2]), np.float32(numbers[3])
        fresh1, fresh2 = np.float32(1 - numbers[2]), np.float32(1 - numbers[3])
        scalars = (shrink, pull, beta1, fresh1, beta2, fresh2, np.float32(numbers[4]), np.float32(numbers[5]))
        addresses = (address_of(w, (0,)), address_of(g, (0,)), address_of(m, (0,)), address_of(v, (0,)))
        vectors(addresses, scalars, len(w), copy)

    if spec.lanes == LANES:
        return wide

    @inlined
    def step(w: Any, g: Any, m: Any, v: Any, _: Any, numbers: Any, shrink: float, pull: float, __: int) -> None:
        beta1, beta2 = np.float32(numbers[2]), np.float32(numbers[3])
        fresh1, fresh2 = np.float32(1 - numbers[2]), np.float32(1 - numbers[3])
        eps, rate = np.float32(numbers[4]), np.float32(numbers[5])
        for i in range(len(w)):
            slope = g[i] + pull * w[i]
            m[i] = beta1 * m[i] + fresh1 * slope
            v[i] = beta2 * v[i] + fresh2 * slope * slope
            w[i] = shrink * w[i] - rate * m[i] / (np.sqrt(v[i]) + eps)

    return step


def _rmsprop(spec: UpdateSpec) -> Callable[..., None]:
    """numbers: lr, decay, alpha, eps, momentum. State: square_avg, then grad_avg, then momentum_buffer."""
    momentum, centered = spec.momentum, spec.centered

    @inlined
    def step(w: Any, g: Any, square: Any, mean: Any, b: Any, numbers: Any, shrink: float, pull: float, _: int) -> None:
        lr, alpha, fresh = np.float32(numbers[0]), np.float32(numbers[2]), np.float32(1 - numbers[2])
        eps, mu = np.float32(numbers[3]), np.float32(numbers[4])
        for i in range(len(w)):
            slope = g[i] + pull * w[i]
            square[i] = alpha * square[i] + fresh * slope * slope
            spread = square[i]
            if centered:
                mean[i] = alpha * mean[i] + fresh * slope
                spread -= mean[i] * mean[i]
            slope /= np.sqrt(spread) + eps
            if momentum:
                b[i] = mu * b[i] + slope
                slope = b[i]
            w[i] = shrink * w[i] - lr * slope

    return step
