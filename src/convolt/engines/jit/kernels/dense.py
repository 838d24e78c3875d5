"""Dense layers on features (N, F) in float32, with weights in PyTorch's own layout (out, in).

    forward    y = act(x W^T + b)
    dx         dy W                 rows = samples, depth = out
    dw         dy^T x               rows = out, depth = samples

Forward has two ways. A batch splits the sum: a chunk is a run of inputs, whose panel of W is transposed into the L2
cache; ``dense_tiles.total`` then adds the chunks' parts in order, with bias and activation. Every number of x and W is
read once, where blocks of outputs would read x again for each, more than the L3 cache gives. A few samples do not pay
for a transpose: ``dense_dots`` multiplies rows of x and of W as they are, a chunk being a run of outputs. For
predictions W is packed once, in panels and with its inputs in the order in which pixels lie, so nothing is flattened;
for a few samples in rows, which in bf16 are half of what has to be read.

Backward goes over blocks of 128 inputs: rows of 512 bytes, which the hardware fetches ahead. Those of x and of W are
copied into the cache: left where they are, some kilobytes apart, they share few of its sets and drive one another out.
A thread owns columns of dw and of dx. Samples behind the end of a smaller batch are zero rows of dy.

Cost: 2 N in out FLOPs each; bytes: x and W once forward; x and W once, dw and dx once backward.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from convolt.engines.jit.bf16 import source_of, to_bf16
from convolt.engines.jit.dot import Dot, dot
from convolt.engines.jit.gemm import Gemm
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.isa import converts
from convolt.engines.jit.kernels.conv_rows import register_rows
from convolt.engines.jit.kernels.dense_specs import DensePackSpec, DenseSpec, dense_panel
from convolt.engines.jit.kernels.specs import BF16, BLOCK, FLOAT, VECTORS, WIDE, round_up
from convolt.engines.jit.memory import copy, view
from convolt.engines.jit.transpose import Transpose, transpose

DEPTH_BLOCK = 1024  # inputs of a panel of dots
DOT_ROWS, DOT_COLUMNS = 4, 4
DEEPEST = 448  # of a product, so that its columns of the right operand stay in the L1 cache


def dense_forward(spec: DenseSpec) -> Callable[..., None]:
    """One part of x W^T; arguments: state, x, W, parts (chunks, N, columns), scratch, peaks. A chunk is ``run`` inputs.

    ``peaks[chunk]`` is the largest absolute value of its inputs; where there is no address they are not looked at.
    """
    run, chunks = spec.run, -(-spec.inputs // spec.run)
    last_run, whole = spec.inputs - (chunks - 1) * run, _part(spec, run)
    last = whole if last_run == run else _part(spec, last_run)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        if chunk + 1 < chunks:
            whole(arguments, chunk, thread)
        else:
            last(arguments, chunk, thread)

    return kernel


def _part(spec: DenseSpec, inputs: int) -> Callable[[Any, int, int], None]:
    """``parts[chunk] = x W^T`` over a run of so many inputs."""
    N, outputs, all_inputs, run = spec.N, spec.outputs, spec.inputs, spec.run
    columns, block, packed = round_up(outputs, BLOCK), VECTORS * spec.lanes, spec.packed
    turn = transpose(Transpose(outputs, inputs, all_inputs, columns, spec.lanes))
    whole, rest = divmod(outputs, block)
    panels = DensePackSpec(all_inputs, outputs, 1, spec.lanes, panels=True)
    row, step = (panels.columns, all_inputs * panels.columns) if packed else (columns, block)
    shape = Gemm(0, block, 0, all_inputs, 1, 0, row, 0, columns, spec.lanes)
    full = deep_rows(shape if whole else replace(shape, columns=rest), N, inputs, spec.registers)
    tail = deep_rows(replace(shape, columns=rest), N, inputs, spec.registers) if whole and rest else full
    scratch = dense_panel(spec)

    @inlined
    def part(arguments: Any, chunk: int, thread: int) -> None:
        first = FLOAT * chunk * run
        x, c = arguments[1] + first, arguments[3] + FLOAT * chunk * N * columns
        if arguments[5]:
            count = min(view(arguments[0], (1,), np.int64)[0], N)
            view(arguments[5] + FLOAT * chunk, (1,), np.int32)[0] = largest(x, count, inputs, all_inputs)
        if packed:
            panel = arguments[2] + first * row
        else:
            panel = arguments[4] + FLOAT * thread * scratch
            turn(arguments[2] + first, panel)
        for j in range(whole):
            full(x, panel + FLOAT * j * step, c + FLOAT * j * block)
        if rest:
            tail(x, panel + FLOAT * whole * step, c + FLOAT * whole * block)

    found: Callable[[Any, int, int], None] = part
    return found


def pack(spec: DensePackSpec) -> Callable[..., None]:
    """W for predictions; arguments: state, W, packed, scratch. A chunk is one vector's width of outputs."""
    inputs, outputs, channels, lanes, panels = spec.inputs, spec.outputs, spec.channels, spec.lanes, spec.panels
    pixels, columns = inputs // channels, spec.columns
    reorder = transpose(Transpose(channels, pixels, pixels, channels, lanes))
    across = transpose(Transpose(lanes, inputs, inputs, columns, lanes))
    rest = transpose(Transpose(outputs % lanes or lanes, inputs, inputs, columns, lanes))
    plain, rounded = channels in (1, inputs), spec.unit is not None
    narrow = to_bf16(inputs, lanes, converts(spec.unit or "fma"))

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        first = chunk * lanes
        count = min(lanes, outputs - first)
        rows = arguments[1] + FLOAT * first * inputs
        if not plain:
            own, place = arguments[3] + FLOAT * thread * lanes * inputs, arguments[2] + FLOAT * first * inputs
            target = own if panels or rounded else place
            for row in range(count):
                reorder(rows + FLOAT * row * inputs, target + FLOAT * row * inputs)
            rows = target
        if rounded:
            for row in range(count):
                narrow(rows + FLOAT * row * inputs, arguments[2] + BF16 * (first + row) * inputs)
        elif panels:
            place = arguments[2] + FLOAT * (first // columns * inputs * columns + first % columns)
            if first + lanes <= outputs:
                across(rows, place)
            else:
                rest(rows, place)

    return kernel


@inlined
def largest(numbers: int, rows: int, columns: int, row: int) -> Any:
    """The bits of the largest absolute value in rows of float32, ``row`` apart; NaN counts as larger than infinity."""
    found = np.int32(0)
    for i in range(rows):
        bits = view(numbers + FLOAT * i * row, (columns,), np.int32)
        for j in range(columns):
            found = max(found, bits[j] & np.int32(0x7FFFFFFF))
    return found


def dense_peak(spec: DenseSpec) -> Callable[..., None]:
    """The largest absolute value of dy; arguments: state, dy, where it goes. One chunk."""
    N, outputs = spec.N, spec.outputs

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        view(arguments[2], (1,), np.int32)[0] = largest(arguments[1], N, outputs, outputs)

    return kernel


def deep_rows(spec: Gemm, rows: int, depth: int, registers: int) -> Callable[[int, int, int], None]:
    """A product with any number of rows and any depth, in blocks of both: ``run(a, b, c)``."""
    segments = deep_segments(spec, rows, depth, registers)

    @inlined
    def once(a: int, b: int, c: int) -> None:
        segments(a, b, c, 1)

    found: Callable[[int, int, int], None] = once
    return found


def deep_segments(spec: Gemm, rows: int, depth: int, registers: int) -> Callable[[int, int, int, int], None]:
    """The same, of so many segments: ``run(a, b, c, segments)``."""
    count = -(-depth // DEEPEST)
    size = -(-depth // count)
    last = depth - (count - 1) * size
    begin = register_rows(replace(spec, depth=size), rows, registers)

    @inlined
    def once(a: int, b: int, c: int, segments: int) -> None:
        begin(a, b, c, 0, segments)

    if count == 1:
        shallow: Callable[[int, int, int, int], None] = once
        return shallow
    between = register_rows(replace(spec, depth=size, start="load"), rows, registers)
    end = between if last == size else register_rows(replace(spec, depth=last, start="load"), rows, registers)
    a_step, b_step = spec.a_number * size * spec.a_depth, FLOAT * size * spec.b_depth

    @inlined
    def run(a: int, b: int, c: int, segments: int) -> None:
        begin(a, b, c, 0, segments)
        for block in range(1, count - 1):
            between(a + block * a_step, b + block * b_step, c, 0, segments)
        end(a + (count - 1) * a_step, b + (count - 1) * b_step, c, 0, segments)

    found: Callable[[int, int, int, int], None] = run
    return found


def dense_dots(spec: DenseSpec) -> Callable[..., None]:
    """``y = act(x W^T + b)``; arguments: state, x, W, bias, y. A chunk is ``run`` outputs."""
    N, inputs, outputs, run, number = spec.N, spec.inputs, spec.outputs, spec.run, _number(spec)
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
        x, w = arguments[1], arguments[2]
        for block in range(panels):
            whole(x + FLOAT * block * panel, w + number * block * panel, arguments[4], first, end)
        if rest:
            last(x + FLOAT * panels * panel, w + number * panels * panel, arguments[4], first, end)
        if slope != np.float32(1):
            for n in range(N):
                for o in range(first, end):
                    value = y[n, o]
                    y[n, o] = value if value > np.float32(0) else value * slope

    return kernel


def _number(spec: DenseSpec) -> int:
    """Bytes of a number of W."""
    return BF16 if spec.rounded else FLOAT


def _dot_panel(spec: DenseSpec, depth: int) -> Callable[[int, int, int, int, int], None]:
    """``y[:, first:end] += x W^T`` over some inputs: ``panel(x, w, y, first, end)``."""
    N, inputs, outputs, w_row = spec.N, spec.inputs, spec.outputs, _number(spec) * spec.inputs
    row_blocks, row_rest = divmod(N, DOT_ROWS)

    def tile(rows: int, columns: int) -> Callable[[int, int, int, int], None]:
        found: Callable[[int, int, int, int], None] = dot(
            Dot(rows, columns, depth, inputs, inputs, outputs, spec.lanes, "load", b=source_of(spec.rounded))
        )
        return found

    main, edge = tile(DOT_ROWS, DOT_COLUMNS), tile(DOT_ROWS, 1)
    rest_main, rest_edge = tile(row_rest or DOT_ROWS, DOT_COLUMNS), tile(row_rest or DOT_ROWS, 1)

    @inlined
    def panel(x: int, w: int, y: int, first: int, end: int) -> None:
        o = first
        while o + DOT_COLUMNS <= end:
            for block in range(row_blocks):
                n = block * DOT_ROWS
                main(x + FLOAT * n * inputs, w + w_row * o, y + FLOAT * (n * outputs + o), 0)
            if row_rest:
                n = row_blocks * DOT_ROWS
                rest_main(x + FLOAT * n * inputs, w + w_row * o, y + FLOAT * (n * outputs + o), 0)
            o += DOT_COLUMNS
        while o < end:
            for block in range(row_blocks):
                n = block * DOT_ROWS
                edge(x + FLOAT * n * inputs, w + w_row * o, y + FLOAT * (n * outputs + o), 0)
            if row_rest:
                n = row_blocks * DOT_ROWS
                rest_edge(x + FLOAT * n * inputs, w + w_row * o, y + FLOAT * (n * outputs + o), 0)
            o += 1

    found: Callable[[int, int, int, int, int], None] = panel
    return found


def dense_slopes(spec: DenseSpec) -> Callable[..., None]:
    """The gradient before the activation and db: arguments: state, y, dy (changed in place), db, x. One chunk.

    Rows of samples that are not in the batch become zero, in x too: dw is a product with all rows, and zero times what
    a larger batch or another tensor has left there may be no number.
    """
    N, outputs, bias, slope, accumulate = spec.N, spec.outputs, spec.bias, np.float32(spec.slope), spec.accumulate
    row_bytes = (BF16 if spec.half else FLOAT) * spec.inputs

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        y = view(arguments[1], (N, outputs), np.float32)
        dy = view(arguments[2], (N, outputs), np.float32)
        if bias and not accumulate:
            view(arguments[3], (outputs,), np.float32)[:] = np.float32(0)
        for n in range(N):
            if n >= count:
                dy[n, :] = np.float32(0)
                view(arguments[4] + n * row_bytes, (row_bytes,), np.uint8)[:] = np.uint8(0)
            elif slope != np.float32(1):
                for o in range(outputs):
                    dy[n, o] = dy[n, o] if y[n, o] > np.float32(0) else dy[n, o] * slope
            if bias:
                db = view(arguments[3], (outputs,), np.float32)
                for o in range(outputs):
                    db[o] += dy[n, o]

    return kernel


def dense_backward(spec: DenseSpec) -> Callable[..., None]:
    """``dw (+)= dy^T x`` and ``dx (+)= dy W``, or one of them; arguments: state, x, W, dy, dw, dx, scratch.

    A chunk is ``run`` inputs, a multiple of 128.
    """
    run, inputs = spec.run, spec.inputs
    rest = inputs % WIDE
    whole = inputs // WIDE
    full = _columns(spec, WIDE if whole else rest)
    tail = _columns(spec, rest) if whole and rest else full

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        first, end = chunk * run // WIDE, min((chunk + 1) * run, inputs) // WIDE
        if whole:
            for j in range(first, end):
                full(arguments, j * WIDE, thread)
        if rest and (chunk + 1) * run >= inputs:
            tail(arguments, whole * WIDE, thread)

    return kernel


def _columns(spec: DenseSpec, columns: int) -> Callable[[Any, int, int], None]:
    """Some columns of dw and of dx: ``both(arguments, first column, thread)``."""
    N, inputs, outputs, wants_dx, wants_dw = spec.N, spec.inputs, spec.outputs, spec.wants_dx, spec.wants_dw
    block, scratch = VECTORS * spec.lanes, dense_panel(spec)
    sizes = [min(block, columns - start) for start in range(0, columns, block)]
    count, last = len(sizes), sizes[-1]
    pack = packed_columns(columns, block, inputs)
    dw = Gemm(0, block, 0, 1, outputs, 0, block, 0, inputs, spec.lanes, "load" if spec.accumulate else "zero")
    dx = Gemm(0, block, 0, outputs, 1, 0, block, 0, inputs, spec.lanes, "load" if spec.add else "zero")
    last_weights = deep_rows(replace(dw, columns=last), outputs, N, spec.registers)
    last_slopes = deep_rows(replace(dx, columns=last), N, outputs, spec.registers)
    alone = count == 1 or last == block
    weights = last_weights if alone else deep_rows(dw, outputs, N, spec.registers)
    slopes = last_slopes if alone else deep_rows(dx, N, outputs, spec.registers)

    @inlined
    def both(arguments: Any, column: int, thread: int) -> None:
        offset = FLOAT * column
        panel = arguments[6] + FLOAT * thread * scratch
        if wants_dw:
            pack(arguments[1] + offset, N, panel)
            for j in range(count):
                a, b, c = arguments[3], panel + FLOAT * j * N * block, arguments[4] + offset + FLOAT * j * block
                if j + 1 < count:
                    weights(a, b, c)
                else:
                    last_weights(a, b, c)
        if wants_dx:
            pack(arguments[2] + offset, outputs, panel)
            for j in range(count):
                a, b, c = arguments[3], panel + FLOAT * j * outputs * block, arguments[5] + offset + FLOAT * j * block
                if j + 1 < count:
                    slopes(a, b, c)
                else:
                    last_slopes(a, b, c)

    found: Callable[[Any, int, int], None] = both
    return found


def packed_columns(columns: int, block: int, row: int) -> Callable[[int, int, int], None]:
    """Some columns of a matrix, one ``block`` of them after another: ``pack(source, rows, target)``.

    Its rows are ``row`` apart; packed they are a block wide, the last ones too.
    """
    whole, rest = divmod(columns, block)
    move, move_last = copy(FLOAT * block), copy(FLOAT * rest)

    @inlined
    def pack(source: int, rows: int, target: int) -> None:
        for i in range(rows):
            for j in range(whole):
                move(source + FLOAT * (i * row + j * block), target + FLOAT * (j * rows + i) * block)
            if rest:
                move_last(source + FLOAT * (i * row + whole * block), target + FLOAT * (whole * rows + i) * block)

    found: Callable[[int, int, int], None] = pack
    return found
