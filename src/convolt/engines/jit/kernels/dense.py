"""Dense layers on features (N, F), with weights in PyTorch's own layout (out, in).

    forward    y = act(x W^T + b)   both operands contiguous in ``in``: the micro-kernel ``dot``
    dx         dy W                 rows = samples, depth = out
    dw         dy^T x               rows = out, depth = samples

so that neither weights nor gradients are ever transposed or packed. The forward is blocked over ``in``: a panel of x
stays in L2 while the chunk's outputs pass by. Backward goes over blocks of ``in``: a thread owns columns of W, of dw
and of dx. Samples behind the end of a smaller batch are zero rows of dy.

Cost: 2 N in out FLOPs each; bytes: W is read twice and dw written once, x and dy stay in the caches.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from convolt.engines.jit.dot import Dot, dot
from convolt.engines.jit.gemm import Gemm
from convolt.engines.jit.kernels.conv import register_rows
from convolt.engines.jit.kernels.specs import FLOAT, VECTORS, DenseSpec
from convolt.engines.jit.memory import view

DEPTH_BLOCK = 1024  # inputs of a panel: 128 samples of it are 512 KB
DOT_ROWS, DOT_COLUMNS = 4, 4


def dense_forward(spec: DenseSpec) -> Callable[..., None]:
    """``y = act(x W^T + b)``; arguments: state, x, W, bias, y. A chunk is ``run`` outputs."""
    N, inputs, outputs, run = spec.N, spec.inputs, spec.outputs, spec.run
    slope, bias = np.float32(spec.slope), spec.bias
    panel = min(DEPTH_BLOCK, inputs)
    panels, rest = divmod(inputs, panel)
    whole = _dot_panel(spec, panel)
    last = _dot_panel(spec, rest) if rest else whole

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        first = chunk * run
        end = min(first + run, outputs)
        y = view(arguments[4], (N, outputs), np.float32)
        for n in range(N):
            for o in range(first, end):
                y[n, o] = view(arguments[3], (outputs,), np.float32)[o] if bias else np.float32(0)
        for block in range(panels):
            whole(arguments[1] + FLOAT * block * panel, arguments[2] + FLOAT * block * panel, arguments[4], first, end)
        if rest:
            last(arguments[1] + FLOAT * panels * panel, arguments[2] + FLOAT * panels * panel, arguments[4], first, end)
        if slope != np.float32(1):
            for n in range(N):
                for o in range(first, end):
                    value = y[n, o]
                    y[n, o] = value if value > np.float32(0) else value * slope

    return kernel


def _dot_panel(spec: DenseSpec, depth: int) -> Callable[[int, int, int, int, int], None]:
    """``y[:, first:end] += x W^T`` over some inputs: ``panel(x, w, y, first, end)``."""
    N, inputs, outputs = spec.N, spec.inputs, spec.outputs
    row_blocks, row_rest = divmod(N, DOT_ROWS)

    def tile(rows: int, columns: int) -> Callable[[int, int, int, int], None]:
        found: Callable[[int, int, int, int], None] = dot(
            Dot(rows, columns, depth, inputs, inputs, outputs, spec.lanes, start="load")
        )
        return found

    main, edge = tile(DOT_ROWS, DOT_COLUMNS), tile(DOT_ROWS, 1)
    rest_main, rest_edge = tile(row_rest or DOT_ROWS, DOT_COLUMNS), tile(row_rest or DOT_ROWS, 1)

    @njit
    def panel(x: int, w: int, y: int, first: int, end: int) -> None:
        o = first
        while o + DOT_COLUMNS <= end:
            for block in range(row_blocks):
                n = block * DOT_ROWS
                main(x + FLOAT * n * inputs, w + FLOAT * o * inputs, y + FLOAT * (n * outputs + o), 0)
            if row_rest:
                n = row_blocks * DOT_ROWS
                rest_main(x + FLOAT * n * inputs, w + FLOAT * o * inputs, y + FLOAT * (n * outputs + o), 0)
            o += DOT_COLUMNS
        while o < end:
            for block in range(row_blocks):
                n = block * DOT_ROWS
                edge(x + FLOAT * n * inputs, w + FLOAT * o * inputs, y + FLOAT * (n * outputs + o), 0)
            if row_rest:
                n = row_blocks * DOT_ROWS
                rest_edge(x + FLOAT * n * inputs, w + FLOAT * o * inputs, y + FLOAT * (n * outputs + o), 0)
            o += 1

    found: Callable[[int, int, int, int, int], None] = panel
    return found


def dense_slopes(spec: DenseSpec) -> Callable[..., None]:
    """The gradient before the activation and db: arguments: state, y, dy (changed in place), db. One chunk.

    Rows of samples that are not in the batch become zero.
    """
    N, outputs, bias, slope, accumulate = spec.N, spec.outputs, spec.bias, np.float32(spec.slope), spec.accumulate

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        y = view(arguments[1], (N, outputs), np.float32)
        dy = view(arguments[2], (N, outputs), np.float32)
        if bias and not accumulate:
            view(arguments[3], (outputs,), np.float32)[:] = np.float32(0)
        for n in range(N):
            if n >= count:
                dy[n, :] = np.float32(0)
            elif slope != np.float32(1):
                for o in range(outputs):
                    dy[n, o] = dy[n, o] if y[n, o] > np.float32(0) else dy[n, o] * slope
            if bias:
                db = view(arguments[3], (outputs,), np.float32)
                for o in range(outputs):
                    db[o] += dy[n, o]

    return kernel


def dense_backward(spec: DenseSpec) -> Callable[..., None]:
    """``dw (+)= dy^T x`` and ``dx (+)= dy W``; arguments: state, x, W, dy, dw, dx. A chunk is ``run`` inputs."""
    run, inputs = spec.run, spec.inputs
    block = VECTORS * spec.lanes
    rest = inputs % block
    full, tail = _columns(spec, block), _columns(spec, rest or block)
    whole = inputs // block

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        first, end = chunk * run // block, min((chunk + 1) * run, inputs) // block
        if whole:
            for j in range(first, end):
                full(arguments, j * block)
        if rest and (chunk + 1) * run >= inputs:
            tail(arguments, whole * block)

    return kernel


def _columns(spec: DenseSpec, columns: int) -> Callable[[Any, int], None]:
    """Some columns of dw and of dx: ``both(arguments, first column)``."""
    N, inputs, outputs, wants_dx = spec.N, spec.inputs, spec.outputs, spec.wants_dx
    weights = register_rows(
        Gemm(0, columns, N, 1, outputs, 0, inputs, 0, inputs, spec.lanes, "load" if spec.accumulate else "zero"),
        outputs,
        spec.registers,
    )
    slopes = register_rows(
        Gemm(0, columns, outputs, outputs, 1, 0, inputs, 0, inputs, spec.lanes, "load" if spec.add else "zero"),
        N,
        spec.registers,
    )

    @njit
    def both(arguments: Any, column: int) -> None:
        offset = FLOAT * column
        weights(arguments[3], arguments[1] + offset, arguments[4] + offset, 0, 1)
        if wants_dx:
            slopes(arguments[3], arguments[2] + offset, arguments[5] + offset, 0, 1)

    found: Callable[[Any, int], None] = both
    return found
