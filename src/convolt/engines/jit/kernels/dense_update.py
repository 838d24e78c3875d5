"""The gradient of a dense layer's float32 weights and the optimizer's step, in one pass behind everything else.

    dw = dy^T x     some rows of W at a time, in scratch memory that stays in the L2 cache
    W, state        moved from there

The gradient never goes to memory: written, read for its norm and read again, it would cost as much time as a third of
the products that make it. The norm is not needed where a bound on the operands shows that the gradient is finite; else
``dense.dense_backward`` makes it and it is looked at first (``plan.Deferred``).

Cost: 2 N in out FLOPs; bytes: x once, W and the optimizer's state once each way.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from convolt.engines.jit.gemm import Gemm
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.kernels.dense import deep_rows, packed_columns
from convolt.engines.jit.kernels.dense_specs import DenseUpdateSpec, dense_moving_scratch
from convolt.engines.jit.kernels.specs import FLOAT, MOVED_VECTORS, NUMBERS, ROWS_MOVED, round_up
from convolt.engines.jit.kernels.weights import optimizer_step
from convolt.engines.jit.memory import LINE, prefetch, view


def update(spec: DenseUpdateSpec) -> Callable[..., None]:
    """``dw = dy^T x`` and the optimizer's step on W; a chunk is ``run`` inputs.

    Arguments: state, x, dy, W, three vectors of the optimizer's state, numbers, scratch; see ``weights.update``.
    """
    dense = spec.dense
    run, inputs, scratch = dense.run, dense.inputs, dense_moving_scratch(dense)
    rest = inputs % run
    full = _moved_columns(spec, min(run, inputs))
    tail = _moved_columns(spec, rest) if rest and inputs > run else full

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        own = arguments[8] + FLOAT * thread * scratch
        if (chunk + 1) * run <= inputs:
            full(arguments, chunk * run, own)
        else:
            tail(arguments, chunk * run, own)

    return kernel


def _moved_columns(spec: DenseUpdateSpec, columns: int) -> Callable[[Any, int, int], None]:
    """Some columns of W: ``moved(arguments, first column, scratch)``."""
    dense, step = spec.dense, optimizer_step(spec.update)
    N, inputs, outputs, block = dense.N, dense.inputs, dense.outputs, MOVED_VECTORS * dense.lanes
    pack = packed_columns(columns, block, inputs)
    whole, rest = divmod(columns, block)
    bands, last_rows = divmod(outputs, ROWS_MOVED)
    shape = Gemm(0, block if whole else rest, 0, 1, outputs, 0, block, 0, columns, dense.lanes)

    def band(rows: int) -> Callable[[Any, int, int, int, int], None]:
        """The gradient of some rows, one block of columns after another; the rows behind them are on their way."""
        main = deep_rows(shape, rows, N, dense.registers)
        edge = deep_rows(replace(shape, columns=rest), rows, N, dense.registers) if whole and rest else main

        @inlined
        def products(arguments: Any, place: int, dy: int, panel: int, dw: int) -> None:
            for j in range(whole):
                _fetch(arguments, place + FLOAT * j * block, block)
                main(dy, panel + FLOAT * j * N * block, dw + FLOAT * j * block)
            if rest:
                _fetch(arguments, place + FLOAT * whole * block, rest)
                edge(dy, panel + FLOAT * whole * N * block, dw + FLOAT * whole * block)

        found: Callable[[Any, int, int, int, int], None] = products
        return found

    @inlined
    def _fetch(arguments: Any, place: int, width: int) -> None:
        for row in range(ROWS_MOVED):
            for line in range(0, FLOAT * width, LINE):
                for matrix in range(3, 3 + matrices):
                    prefetch(arguments[matrix] + place + FLOAT * row * inputs + line)

    matrices = 1 + spec.update.states
    full, tail = band(ROWS_MOVED if bands else last_rows), band(last_rows or ROWS_MOVED)
    x_size = N * round_up(columns, block)

    @inlined
    def moved(arguments: Any, column: int, scratch: int) -> None:
        dw = scratch + FLOAT * x_size
        numbers = view(arguments[7], (NUMBERS,), np.float64)
        _fetch(arguments, FLOAT * column, columns)
        pack(arguments[1] + FLOAT * column, N, scratch)
        for first in range(0, outputs, ROWS_MOVED):
            rows, behind = min(ROWS_MOVED, outputs - first), FLOAT * ((first + ROWS_MOVED) * inputs + column)
            if rows == ROWS_MOVED:
                full(arguments, behind, arguments[2] + FLOAT * first, scratch, dw)
            else:
                tail(arguments, behind, arguments[2] + FLOAT * first, scratch, dw)
            for row in range(rows):
                place = FLOAT * ((first + row) * inputs + column)
                w = view(arguments[3] + place, (columns,), np.float32)
                g = view(dw + FLOAT * row * columns, (columns,), np.float32)
                one = view(arguments[4] + place, (columns,), np.float32)
                two = view(arguments[5] + place, (columns,), np.float32)
                three = view(arguments[6] + place, (columns,), np.float32)
                step(w, g, one, two, three, numbers, 1)

    found: Callable[[Any, int, int], None] = moved
    return found
