"""Dense layers in bf16: blocks of products, float32 sums and tensors. Layouts as in ``dense``: W (out, in).

Forward splits the sum: a chunk is a run of inputs, whose panels of x and W are rounded and packed in the L2 cache and
multiplied there; ``total`` then adds the chunks' parts in order, with bias and activation. Every number of x and W is
read once, where blocks of outputs would read x again for each.

Both passes note the largest number they see. If the batch cannot make a gradient that is too large, ``update`` makes dw
and moves the weights in one pass at the end of the step: dw never goes to memory.

Backward goes over blocks of 128 inputs: dw = dy^T x and dx = dy W share nothing but the packed dy, which ``turn`` makes
once. The paired operand (x or W, 128 columns) is packed into the L1 cache.

Cost: 2 N in out FLOPs each; bytes: x and W once forward; x and W once, dw and dx once backward.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from convolt.engines.jit.bf16 import Pairs, float32_of_bf16, move_and_peak, pack_pairs, source_of, to_bf16
from convolt.engines.jit.blocks import BlockGemm, block_gemm, configure, release
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.isa import converts
from convolt.engines.jit.kernels.dense_specs import (
    DenseSpec,
    DenseUpdateSpec,
    dense_backward_scratch,
    dense_forward_scratch,
    dense_update_scratch,
)
from convolt.engines.jit.kernels.specs import (
    BF16,
    BLOCK,
    DEPTH,
    FLOAT,
    NUMBERS,
    STRIPE,
    WIDE,
    number_bytes,
    round_up,
)
from convolt.engines.jit.kernels.weights import copied_step
from convolt.engines.jit.memory import claim, view
from convolt.engines.jit.transpose import Transpose, transpose

LANES = 16  # of a block; LLVM cuts vectors into what the registers hold
TILE_ELEMENTS = 16 * DEPTH
PAIRED_STEP = WIDE // 16 * TILE_ELEMENTS  # elements of 32 paired rows of a wide block


def blocks_of(spec: BlockGemm, rows: int) -> Callable[[int, int, int], None]:
    """A product with any number of rows: ``run(a, b, c)``. The tiles of a last, smaller block get their own shape."""
    whole, rest = divmod(rows, BLOCK)
    main, tail = replace(spec, rows=BLOCK), replace(spec, rows=rest or BLOCK)
    main_shape, main_kernel = configure(main), block_gemm(main)
    tail_shape, tail_kernel = configure(tail), block_gemm(tail)
    a_step, c_step = BF16 * BLOCK * spec.a_row, FLOAT * BLOCK * spec.c_row

    @inlined
    def run(a: int, b: int, c: int) -> None:
        if whole:
            main_shape()
            for block in range(whole):
                main_kernel(a + block * a_step, b, c + block * c_step, 0, 1)
        if rest:
            tail_shape()
            tail_kernel(a + whole * a_step, b, c + whole * c_step, 0, 1)

    return run


def forward(spec: DenseSpec) -> Callable[..., None]:
    """One part of x W^T; arguments: state, x, W in bf16, parts (chunks, N, columns), scratch, peaks.

    A chunk is ``run`` inputs.

    ``peaks[chunk]`` is the largest absolute value of its inputs.
    """
    run, chunks = spec.run, -(-spec.inputs // spec.run)
    last_run = spec.inputs - (chunks - 1) * run
    whole, last, differs = _panel(spec, run), _panel(spec, last_run), last_run != run

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        if chunk + 1 < chunks or not differs:  # a constant: what is never called is not compiled
            whole(arguments, chunk, thread)
        elif differs:
            last(arguments, chunk, thread)

    return kernel


def _panel(spec: DenseSpec, inputs: int) -> Callable[[Any, int, int], None]:
    N, outputs, columns, scratch = spec.N, spec.outputs, round_up(spec.outputs, BLOCK), dense_forward_scratch(spec)
    depth, row, half = round_up(inputs, DEPTH), spec.panel_row, spec.half
    narrow, move = to_bf16(inputs, LANES, converts(spec.unit)), move_and_peak(inputs)
    # W is turned where it lies, unless there is something to fill up with zeros.
    filled = inputs < depth or outputs < columns or spec.inputs % 2 == 1
    w_row = depth if filled else spec.inputs
    turn = transpose(Transpose(16, depth // 2, w_row // 2, 16, LANES))  # pairs of bf16 move as one float32
    tile = depth // 2 * 32
    shape = BlockGemm(spec.unit, BLOCK, BLOCK, DEPTH, depth // DEPTH, row, DEPTH, 0, TILE_ELEMENTS, tile, 0, columns)
    product = blocks_of(shape, N)
    panel_bytes, weights_bytes = BF16 * round_up(N, BLOCK) * row, BF16 * columns * depth
    all_inputs, run, done = spec.inputs, spec.run, release(spec.unit)

    @inlined
    def panel(arguments: Any, chunk: int, thread: int) -> None:
        x = arguments[4] + thread * scratch
        rows = x + panel_bytes
        packed = rows + weights_bytes
        first, count, top = chunk * run, view(arguments[0], (1,), np.int64)[0], np.uint16(0)
        if filled:
            view(x, (panel_bytes + weights_bytes,), np.uint8)[:] = np.uint8(0)
        else:  # what a larger batch, or another kernel, left behind a smaller one
            view(x + BF16 * count * row, ((N - count) * row,), np.uint16)[:] = np.uint16(0)
        for n in range(count):
            target = x + BF16 * n * row
            if half:
                peak = move(arguments[1] + BF16 * (n * all_inputs + first), target)
            else:
                narrow(arguments[1] + FLOAT * (n * all_inputs + first), target)
                peak = largest(target, inputs)
            top = max(top, peak)
        view(arguments[5] + FLOAT * chunk, (1,), np.float32)[0] = float32_of_bf16(top)
        w = arguments[2] + BF16 * first
        if filled:
            for o in range(outputs):
                _move(w + BF16 * o * all_inputs, rows + BF16 * o * depth, inputs)
            w = rows
        for o in range(0, columns, BLOCK):
            turn(w + BF16 * o * w_row, packed)
            turn(w + BF16 * (o + 16) * w_row, packed + BF16 * tile)
            product(x, packed, arguments[3] + FLOAT * (chunk * N * columns + o))
        done()

    return panel


@inlined
def _move(source: int, target: int, count: int) -> None:
    """Copy so many bf16 numbers."""
    numbers, copies = view(source, (count,), np.uint16), view(target, (count,), np.uint16)
    for i in range(count):
        copies[i] = numbers[i]


def round_weights(spec: DenseSpec) -> Callable[..., None]:
    """W in bf16, where the state says that W has changed since; arguments: state, W, its copy. A chunk is an eighth."""
    outputs, inputs = spec.outputs, spec.inputs
    rows, narrow = -(-outputs // 8), to_bf16(inputs, LANES, converts(spec.unit))

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        if view(arguments[0], (3,), np.int64)[2]:
            for o in range(chunk * rows, min((chunk + 1) * rows, outputs)):
                narrow(arguments[1] + FLOAT * o * inputs, arguments[2] + BF16 * o * inputs)

    return kernel


@inlined
def largest(numbers: int, count: int) -> Any:
    """The bits of the largest absolute value of so many bf16 numbers; NaN counts as larger than infinity."""
    values = view(numbers, (count,), np.uint16)
    top = np.uint16(0)
    for i in range(count):
        top = max(top, np.uint16(values[i] & np.uint16(0x7FFF)))
    return top


def total(spec: DenseSpec) -> Callable[..., None]:
    """``y = act(bias + sum of parts)``; arguments: state, parts, bias, y. A chunk is a sixteenth of the samples."""
    N, outputs, columns = spec.N, spec.outputs, round_up(spec.outputs, BLOCK)
    parts, rows = -(-spec.inputs // spec.run), -(-N // 16)
    slope, bias = np.float32(spec.slope), spec.bias

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        for n in range(chunk * rows, min((chunk + 1) * rows, N)):
            y = view(arguments[3] + FLOAT * n * outputs, (outputs,), np.float32)
            offset = view(arguments[2], (outputs,), np.float32)
            for o in range(outputs):
                y[o] = offset[o] if bias else np.float32(0)
            for part in range(parts):
                product = view(arguments[1] + FLOAT * (part * N + n) * columns, (outputs,), np.float32)
                for o in range(outputs):
                    y[o] += product[o]
            for o in range(outputs):
                y[o] = y[o] if y[o] > np.float32(0) else y[o] * slope

    return kernel


def turn(spec: DenseSpec) -> Callable[..., None]:
    """Dy as bf16 rows (N, columns) and turned (columns, N); arguments: state, dy, rows, turned, peak. One chunk."""
    N, outputs = spec.N, spec.outputs
    columns, samples = round_up(outputs, BLOCK), round_up(N, BLOCK)
    narrow = to_bf16(outputs, LANES, converts(spec.unit))
    across = transpose(Transpose(samples, columns, columns, samples, LANES, "bf16", "bf16", converts(spec.unit)))

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        for n in range(N):
            narrow(arguments[1] + FLOAT * n * outputs, arguments[2] + BF16 * n * columns)
        across(arguments[2], arguments[3])
        view(arguments[4], (1,), np.float32)[0] = float32_of_bf16(largest(arguments[2], N * columns))

    return kernel


def backward(spec: DenseSpec) -> Callable[..., None]:
    """``dw (+)= dy^T x`` and ``dx (+)= dy W``; arguments: state, x, W in bf16, dy rows, dy turned, dw, dx, scratch.

    A chunk is ``run`` inputs, a multiple of 128: rows of 512 bytes, which the hardware fetches ahead.
    """
    run, inputs, scratch = spec.run, spec.inputs, dense_backward_scratch(spec)
    rest = inputs % WIDE
    full, tail = _columns(spec, WIDE), _columns(spec, rest or WIDE)
    partial = spec.N % DEPTH > 0 or spec.outputs % DEPTH > 0  # a last step that is not full
    done = release(spec.unit)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        own = arguments[7] + thread * scratch
        if partial:
            view(own, (scratch,), np.uint8)[:] = np.uint8(0)
        for column in range(chunk * run, min((chunk + 1) * run, inputs), WIDE):
            if column + WIDE <= inputs:
                full(arguments, column, own)
            elif rest:
                tail(arguments, column, own)
        done()

    return kernel


def _columns(spec: DenseSpec, columns: int) -> Callable[[Any, int, int], None]:
    """Some columns of dw and of dx: ``both(arguments, first column, scratch)``."""
    N, inputs, outputs, wants_dx, wants_dw = spec.N, spec.inputs, spec.outputs, spec.wants_dx, spec.wants_dw
    wide, samples = round_up(outputs, BLOCK), round_up(N, BLOCK)
    shape = BlockGemm(
        spec.unit,
        BLOCK,
        BLOCK,
        DEPTH,
        samples // DEPTH,
        samples,
        DEPTH,
        0,
        PAIRED_STEP,
        TILE_ELEMENTS,
        0,
        inputs,
        "load" if spec.accumulate else "zero",
    )
    weights = _product(shape, outputs, columns)
    back = replace(shape, steps=wide // DEPTH, a_row=wide, start="load" if spec.add else "zero")
    slopes = _rounded_product(spec, back, columns) if spec.half_dx else _product(back, N, columns)
    pair_x, pair_w = _paired(spec, N, columns, WIDE, spec.half), _paired(spec, outputs, columns, WIDE, True)
    x_width, dx_width = number_bytes(spec.half), number_bytes(spec.half_dx)
    x_bytes = BF16 * WIDE * samples

    @inlined
    def both(arguments: Any, column: int, scratch: int) -> None:
        if wants_dw:
            pair_x(arguments[1] + x_width * column, scratch)
            weights(arguments[4], scratch, arguments[5] + FLOAT * column)
        if wants_dx:
            pair_w(arguments[2] + BF16 * column, scratch + x_bytes)
            slopes(arguments[3], scratch + x_bytes, arguments[6] + dx_width * column)

    return both


def _rounded_product(spec: DenseSpec, shape: BlockGemm, columns: int) -> Callable[[int, int, int], None]:
    """Rows of dx in bf16, 32 samples at a time: ``run(a, b, c)``; behind b is room for their sums in float32."""
    whole, rest = divmod(spec.N, BLOCK)
    apart = replace(shape, c_row=WIDE)
    full, tail = _product(apart, BLOCK, columns), _product(apart, rest or BLOCK, columns)
    narrow, coming = to_bf16(columns, LANES, converts(spec.unit)), claim(BF16 * columns)
    N, inputs, a_step, b_bytes = spec.N, spec.inputs, BF16 * shape.a_row, BF16 * WIDE * shape.a_row

    @inlined
    def run(a: int, b: int, c: int) -> None:
        sums = b + b_bytes
        for first in range(0, N, BLOCK):
            for row in range(min(BLOCK, N - first)):
                coming(c + BF16 * (first + row) * inputs)
            if first < whole * BLOCK:
                full(a + first * a_step, b, sums)
            elif rest:
                tail(a + first * a_step, b, sums)
            for row in range(min(BLOCK, N - first)):
                narrow(sums + FLOAT * row * WIDE, c + BF16 * (first + row) * inputs)

    return run


def update(spec: DenseUpdateSpec) -> Callable[..., None]:
    """``dw = dy^T x`` and the optimizer's step on W; a chunk is ``run`` inputs of a band of the outputs.

    Arguments: state, x, dy turned, W, three vectors of the optimizer's state, numbers, scratch, W in bf16;
    see ``weights.update``.
    """
    dense = spec.dense
    run, inputs, scratch = dense.run, dense.inputs, dense_update_scratch(dense)
    rest = inputs % STRIPE
    full, tail = _stepped_columns(spec, STRIPE), _stepped_columns(spec, rest or STRIPE)
    rows, partial = spec.rows, dense.N % DEPTH > 0
    bands = -(-dense.outputs // rows)
    done = release(dense.unit)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        own = arguments[8] + thread * scratch
        if partial:
            view(own, (scratch,), np.uint8)[:] = np.uint8(0)
        stripe, first = chunk // bands, chunk % bands * rows
        for column in range(stripe * run, min((stripe + 1) * run, inputs), STRIPE):
            if column + STRIPE <= inputs:
                full(arguments, column, first, first + rows, own)
            elif rest:
                tail(arguments, column, first, first + rows, own)
        done()

    return kernel


def _stepped_columns(spec: DenseUpdateSpec, columns: int) -> Callable[[Any, int, int, int, int], None]:
    """Some columns of some rows of W, 32 at a time: their gradient in scratch memory, then the optimizer."""
    dense, step = spec.dense, copied_step(spec.update, columns, converts(spec.dense.unit))
    N, inputs = dense.N, dense.inputs
    samples = round_up(N, BLOCK)
    whole, rest = divmod(dense.outputs, BLOCK)
    steps, b_step = samples // DEPTH, STRIPE // 16 * TILE_ELEMENTS
    shape = BlockGemm(dense.unit, BLOCK, BLOCK, DEPTH, steps, samples, DEPTH, 0, b_step, TILE_ELEMENTS, 0, STRIPE)
    block, last = _product(shape, BLOCK, columns), _product(shape, rest or BLOCK, columns)
    pair = _paired(dense, N, columns, STRIPE, dense.half)
    x_width = BF16 if dense.half else FLOAT
    x_bytes, rows_bytes, outputs = BF16 * STRIPE * samples, BF16 * BLOCK * samples, dense.outputs

    @inlined
    def stepped(arguments: Any, column: int, start: int, stop: int, scratch: int) -> None:
        dw = scratch + x_bytes
        numbers = view(arguments[7], (NUMBERS,), np.float64)
        pair(arguments[1] + x_width * column, scratch)
        for first in range(start, min(stop, outputs), BLOCK):
            turned = arguments[2] + first // BLOCK * rows_bytes
            if first < whole * BLOCK:
                block(turned, scratch, dw)
            elif rest:
                last(turned, scratch, dw)
            for row in range(min(BLOCK, outputs - first)):
                place = FLOAT * ((first + row) * inputs + column)
                w, g = (
                    view(arguments[3] + place, (columns,), np.float32),
                    view(dw + FLOAT * row * STRIPE, (columns,), np.float32),
                )
                one, two, three = (
                    view(arguments[4] + place, (columns,), np.float32),
                    view(arguments[5] + place, (columns,), np.float32),
                    view(arguments[6] + place, (columns,), np.float32),
                )
                step(w, g, one, two, three, numbers, arguments[9] + place // 2)

    return stepped


def _product(spec: BlockGemm, rows: int, columns: int) -> Callable[[int, int, int], None]:
    """A product with any number of rows and up to 128 columns: ``run(a, b, c)``, row blocks outermost."""
    whole, rest = divmod(rows, BLOCK)
    across, edge = divmod(columns, BLOCK)
    main = replace(spec, rows=BLOCK)
    specs = [
        replace(spec, rows=height or BLOCK, columns=width or BLOCK)
        for height in (BLOCK, rest)
        for width in (BLOCK, edge)
    ]
    shape, shape_edge, shape_rest, shape_corner = (configure(each) for each in specs)
    kernel, kernel_edge, kernel_rest, kernel_corner = (block_gemm(each) for each in specs)
    a_step, b_step, c_step = BF16 * BLOCK * main.a_row, BF16 * 2 * TILE_ELEMENTS, FLOAT * BLOCK * main.c_row

    @inlined
    def run(a: int, b: int, c: int) -> None:
        for block in range(whole):
            shape()
            for j in range(across):
                kernel(a + block * a_step, b + j * b_step, c + block * c_step + FLOAT * BLOCK * j, 0, 1)
            if edge:
                shape_edge()
                place = c + block * c_step + FLOAT * BLOCK * across
                kernel_edge(a + block * a_step, b + across * b_step, place, 0, 1)
        if rest:
            shape_rest()
            for j in range(across):
                kernel_rest(a + whole * a_step, b + j * b_step, c + whole * c_step + FLOAT * BLOCK * j, 0, 1)
            if edge:
                shape_corner()
                place = c + whole * c_step + FLOAT * BLOCK * across
                kernel_corner(a + whole * a_step, b + across * b_step, place, 0, 1)

    return run


def _paired(dense: DenseSpec, rows: int, columns: int, wide: int, half: bool) -> Callable[[int, int], None]:
    """Rows as paired bf16 tiles, 32 at a time: ``pair(source, target)``; the rest of ``wide`` stays zero.

    128 columns at a time: lines of more tiles than these, a kilobyte apart, do not stay in the L1 cache until they are
    full. half: whether the rows are bf16 already.
    """
    number, row = number_bytes(half), dense.inputs
    step_bytes, block_bytes = BF16 * wide // 16 * TILE_ELEMENTS, BF16 * WIDE // 16 * TILE_ELEMENTS
    (whole, rest), (across, edge) = divmod(rows, DEPTH), divmod(columns, WIDE)

    def paired_rows(depth: int) -> Callable[[int, int], None]:
        spec = Pairs(depth, WIDE, row, DEPTH, TILE_ELEMENTS, source_of(half), converts(dense.unit))
        main, right = pack_pairs(spec), pack_pairs(replace(spec, columns=edge or WIDE))

        @inlined
        def run(source: int, target: int) -> None:
            for j in range(across):
                main(source + number * j * WIDE, target + j * block_bytes)
            if edge:
                right(source + number * across * WIDE, target + across * block_bytes)

        found: Callable[[int, int], None] = run
        return found

    main, tail = paired_rows(DEPTH), paired_rows(rest or DEPTH)

    @inlined
    def pair(source: int, target: int) -> None:
        for step in range(whole):
            main(source + number * step * DEPTH * row, target + step * step_bytes)
        if rest:
            tail(source + number * whole * DEPTH * row, target + whole * step_bytes)

    return pair
