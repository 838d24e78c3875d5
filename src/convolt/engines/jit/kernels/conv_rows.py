"""Rows of a convolution's output, tap by tap: products in register blocks, then bias, activation and max-pool.

Of a pool's windows a thread keeps as many rows of some filters as a window is high. Where windows overlap, rows that
two of them see are moved up instead of computed again.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from convolt.engines.jit.epilogue import MaxOf, max_of
from convolt.engines.jit.gemm import Gemm, gemm
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.kernels.pooling import behind, pool_row
from convolt.engines.jit.kernels.specs import DEAD, FLOAT, ConvSpec, Frame
from convolt.engines.jit.memory import hidden, view


def _blocking(rows: int, vectors: int, registers: int) -> int:
    """Rows of a register block: as many as the accumulators allow, and an even share of ``rows``.

    Where there are many registers two are left free, or LLVM spills; more than 24 sums gain nothing.
    """
    most = (registers - vectors - 1) // vectors if registers <= 16 else min(registers - vectors - 3, 24) // vectors
    most = max(1, most)
    return -(-rows // -(-rows // most))


def register_rows(spec: Gemm, total: int, registers: int) -> Callable[[int, int, int, int, int], None]:
    """A product with any number of rows, in register blocks: ``run(a, b, c, bias, segments)``."""
    vectors = -(-spec.columns // spec.lanes)
    rows = _blocking(total, vectors, registers)
    blocks, rest = divmod(total, rows)
    main = gemm(replace(spec, rows=rows))
    tail = gemm(replace(spec, rows=rest)) if rest else main
    a_step, c_step = spec.a_number * rows * spec.a_row, FLOAT * rows * spec.c_row

    @inlined
    def run(a: int, b: int, c: int, bias: int, segments: int) -> None:
        for block in range(hidden(blocks)):
            main(a + block * a_step, b, c + block * c_step, bias, segments)
        if rest:
            tail(a + blocks * a_step, b, c + blocks * c_step, bias, segments)

    found: Callable[[int, int, int, int, int], None] = run
    return found


def activated_rows(spec: ConvSpec, columns: int) -> Callable[[Any, int, int, int, int, int, int, int], None]:
    """Rows [top, bottom) of y: ``run(arguments, x, filters, scratch, image, top, bottom, channel)``."""
    row, finish, y = output_row(spec, columns, c_row=spec.K), _activate_row(spec, columns), spec.y
    row_step, y_size, y_origin, y_pitch = spec.number * spec.window.stride_h * spec.x.pitch, y.size, y.origin, y.pitch

    @inlined
    def run(
        arguments: Any, x: int, filters: int, scratch: int, image: int, top: int, bottom: int, channel: int
    ) -> None:
        for p in range(top, bottom):
            target = arguments[4] + FLOAT * (image * y_size + y_origin + p * y_pitch + channel)
            row(x + p * row_step, filters, target, arguments[3] + FLOAT * channel)
            finish(target)

    found: Callable[[Any, int, int, int, int, int, int, int], None] = run
    return found


def pooled_rows(spec: ConvSpec, columns: int) -> Callable[[Any, int, int, int, int, int, int, int], None]:
    """The same of a pooled y. Rows that the next windows see as well are moved up."""
    row, pool, windows = output_row(spec, columns, c_row=columns), _pool_rows(spec, columns), spec.pooling
    row_step, line = spec.number * spec.window.stride_h * spec.x.pitch, spec.Q * columns
    R, stride, padding, P = windows.R, windows.stride_h, windows.top, spec.P
    shared = max(0, R - stride)

    @inlined
    def run(
        arguments: Any, x: int, filters: int, scratch: int, image: int, top: int, bottom: int, channel: int
    ) -> None:
        bias = arguments[3] + FLOAT * channel
        for p in range(top, bottom):
            first = p * stride - padding
            if shared and p > top:
                kept = view(scratch, (R * line,), np.float32)
                for i in range(shared * line):
                    kept[i] = kept[i + stride * line]
            for i in range(shared if p > top else 0, R):
                if 0 <= first + i < P:
                    row(x + (first + i) * row_step, filters, scratch + FLOAT * i * line, bias)
            pool(scratch, arguments[4], arguments[5], image, p, channel)

    found: Callable[[Any, int, int, int, int, int, int, int], None] = run
    return found


def output_row(spec: ConvSpec, columns: int, c_row: int) -> Callable[[int, int, int, int], None]:
    """One row of Q output pixels: ``row(a, b, c, bias)``."""
    x, window, packed, R = spec.x, spec.window, spec.packed_columns, spec.window.R
    start: Literal["zero", "load", "bias"] = "load" if spec.add else "bias" if spec.bias else "zero"
    relu = spec.merged and spec.slope == 0
    merged = Gemm(
        rows=0,
        columns=columns,
        depth=spec.depth,
        a_row=window.stride_w * x.C,
        a_depth=spec.together,
        a_segment=window.dilation_h * x.pitch if spec.merged else window.dilation_w * x.C,
        b_depth=packed,
        b_segment=spec.depth * packed,
        c_row=c_row,
        lanes=spec.lanes,
        start=start,
        relu=relu,
        pairs=spec.pairs,
    )
    if spec.merged:
        whole = register_rows(merged, spec.Q, spec.registers)

        @inlined
        def row(a: int, b: int, c: int, bias: int) -> None:
            whole(a, b, c, bias, R)
    else:
        begin = register_rows(merged, spec.Q, spec.registers)
        further = register_rows(replace(merged, start="load"), spec.Q, spec.registers)
        S = window.S
        a_step, b_step = spec.number * window.dilation_h * x.pitch, FLOAT * S * spec.depth * packed

        @inlined
        def row(a: int, b: int, c: int, bias: int) -> None:
            begin(a, b, c, bias, S)
            for r in range(1, R):
                further(a + r * a_step, b + r * b_step, c, bias, S)

    return row


def _activate_row(spec: ConvSpec, columns: int) -> Callable[[int], None]:
    """Apply the activation to a row that the product has not applied it to already: ``finish(target)``."""
    slope, Q, K = np.float32(spec.slope), spec.Q, spec.K
    done = slope == 1 or (slope == 0 and spec.merged)

    @inlined
    def finish(target: int) -> None:
        if not done:
            row = view(target, (Q, K), np.float32)
            for q in range(Q):
                for k in range(columns):
                    value = row[q, k]
                    row[q, k] = value if value > 0 else value * slope

    return finish


def _pool_rows(spec: ConvSpec, columns: int) -> Callable[[int, int, int, int, int, int], None]:
    """Max-pool of as many finished rows as a window has, and ReLU: ``finish(rows, y, codes, image, p, channel)``."""
    frame, K, windows, P = spec.y, spec.K, spec.pooling, spec.P
    PP, QQ = frame.H, frame.W
    y_size, y_origin, y_pitch, line = frame.size, frame.origin, frame.pitch, spec.Q * columns
    if spec.windows is not None:
        pool_windows = pool_row(behind(spec, Frame(columns, P, spec.Q, P, spec.Q, 0)))
        R, stride, padding = windows.R, windows.stride_h, windows.top

        @inlined
        def whole_row(rows: int, target: int, code: int, p: int) -> None:
            first, last = max(0, padding - p * stride), min(R, P + padding - p * stride)
            pool_windows(rows + FLOAT * first * line, target, code, first, last)
    else:
        S = windows.S
        places = tuple(i * line + j * columns for i in range(windows.R) for j in range(S))
        pool = max_of(MaxOf(columns, places, DEAD, spec.lanes, bias=False, relu=spec.slope == 0, codes=spec.codes))

        @inlined
        def whole_row(rows: int, target: int, code: int, p: int) -> None:
            for q in range(QQ):
                pool(rows + FLOAT * q * S * columns, 0, target + FLOAT * q * K, code + q * K)

    @inlined
    def finish(rows: int, y: int, codes: int, image: int, p: int, channel: int) -> None:
        target = y + FLOAT * (image * y_size + y_origin + p * y_pitch + channel)
        whole_row(rows, target, codes + ((image * PP + p) * QQ * K + channel), p)

    found: Callable[[int, int, int, int, int, int], None] = finish
    return found
