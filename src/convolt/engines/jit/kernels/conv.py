"""Convolution in NHWC on frames with a zero border: forward, gradient of the input, gradient of the weights.

All three are one batch-reduce matrix product at different strides (micro-kernel ``gemm``). With x (N, H, W, C),
filters packed as w (R, S, C, K), and for a row p of the output:

    forward    rows = pixels q (stride C),     depth = (s, c) contiguous,  segments = r
    dx         the same on the framed dy, with filters turned around and transposed, for each residue of the stride
    dw         rows = (s, c) contiguous,       depth = pixels q,           segments = p

Nothing is gathered into columns. Columns of filters (at most four vectors) are the outermost loop: their panel stays
in the L2 cache while the images of the chunk pass by. Bias, activation and max-pool are applied to an output row while
it is in the L1 cache; the pool keeps which tap won, or that ReLU let nothing through, as one byte. Where its windows
overlap, rows that two of them see are computed once.

With ``pairs`` operands are bf16, two to a word of 32 bits (``kernels.pairs``), filters are packed (groups, depth,
columns, 2), and forward has images outermost.

Cost: 2 K C/groups R S P Q FLOPs for each image and each of the three.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from convolt.engines.jit.epilogue import Through, Unpool, through, unpool
from convolt.engines.jit.gemm import Gemm
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.kernels.conv_calls import in_turn
from convolt.engines.jit.kernels.conv_rows import activated_rows, output_row, pooled_rows, register_rows
from convolt.engines.jit.kernels.depthwise import (
    depthwise_forward,
    depthwise_input_gradients,
    depthwise_weight_gradient,
)
from convolt.engines.jit.kernels.pairs import BehindFrame, pixel_pairs, rounded
from convolt.engines.jit.kernels.pooling import behind, unpool_image
from convolt.engines.jit.kernels.residues import Part, covers, packed_depth, parts, slope_frame
from convolt.engines.jit.kernels.specs import DEAD, FLOAT, VECTORS, ConvSpec
from convolt.engines.jit.kernels.winners import winners_backward
from convolt.engines.jit.memory import view

# --- forward ---------------------------------------------------------------------------------------------------------


def conv_forward(spec: ConvSpec) -> Callable[..., None]:
    """``y = pool(act(w * x + b))``; arguments: state, x, packed filters, bias, y, codes, scratch.

    Filters are packed (groups, R, S, C/groups, columns). A chunk is a run of images, or of one a stripe of filters and
    a band of rows.
    """
    if spec.depthwise:
        return depthwise_forward(spec)
    if spec.pairs:
        return _forward_in_pairs(spec)
    block = VECTORS * spec.lanes
    whole, rest = divmod(spec.filters, block)
    full, tail = _forward_block(spec, block), _forward_block(spec, rest or block)
    images, groups, rows, x_size = spec.images, spec.groups, spec.y.H, spec.x.size
    bands, stripes = spec.bands, spec.stripes
    height, width = -(-rows // bands), -(-(whole + (1 if rest else 0)) // stripes)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        first = chunk // (bands * stripes) * images
        last = min(first + images, count)
        stripe, band = chunk % stripes, chunk // stripes % bands
        top = band * height
        bottom = min(top + height, rows)
        for group in range(groups):
            if whole:
                for j in range(stripe * width, min((stripe + 1) * width, whole)):
                    for image in range(first, last):
                        source = arguments[1] + FLOAT * image * x_size
                        full(arguments, source, image, top, bottom, thread, group, j * block)
            if rest and stripe + 1 == stripes:
                for image in range(first, last):
                    source = arguments[1] + FLOAT * image * x_size
                    tail(arguments, source, image, top, bottom, thread, group, whole * block)

    return kernel


def _forward_in_pairs(spec: ConvSpec) -> Callable[..., None]:
    """The same in bf16, images outermost: each is rounded once, for all its filters. A chunk is a run of images."""
    block = VECTORS * spec.lanes
    whole, rest = divmod(spec.filters, block)
    full, tail = _forward_block(spec, block), _forward_block(spec, rest or block)
    images, groups, rows, x_size = spec.images, spec.groups, spec.y.H, spec.x.size
    ready, scratch_size, begin = rounded(x_size, spec.lanes), spec.scratch, spec.pool_buffer

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        x = arguments[6] + FLOAT * (thread * scratch_size + begin)
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            ready(arguments[1] + FLOAT * image * x_size, x)
            for group in range(groups):
                for j in range(whole):
                    full(arguments, x, image, 0, rows, thread, group, j * block)
                if rest:
                    tail(arguments, x, image, 0, rows, thread, group, whole * block)

    return kernel


def _forward_block(spec: ConvSpec, columns: int) -> Callable[[Any, int, int, int, int, int, int, int], None]:
    """Rows of some filters of a group: ``block(arguments, x, image, top, bottom, thread, group, first filter)``."""
    x, window, number = spec.x, spec.window, spec.number
    finished = (pooled_rows if spec.pooled else activated_rows)(spec, columns)
    C, filters_of_group, scratch_size = spec.channels, spec.filters, spec.scratch
    corner = x.origin - window.top * x.pitch - window.left * x.C
    group_filters = spec.segments * spec.depth * spec.packed_columns

    @inlined
    def block(arguments: Any, x: int, image: int, top: int, bottom: int, thread: int, group: int, column: int) -> None:
        filters = arguments[2] + FLOAT * (group * group_filters + column)
        rows = arguments[6] + FLOAT * thread * scratch_size
        source = x + number * (corner + group * C)
        finished(arguments, source, filters, rows, image, top, bottom, group * filters_of_group + column)

    found: Callable[[Any, int, int, int, int, int, int, int], None] = block
    return found


# --- backward --------------------------------------------------------------------------------------------------------


def conv_backward(spec: ConvSpec) -> Callable[..., None]:
    """dx, and this chunk's part of dw and db, one image after another.

    Arguments: state, x, turned filters, dy, y, codes, dx, dw parts, db parts, scratch. dy (N, PP, QQ, K) is the
    gradient of the fused output: it is first spread to the gradient of the convolution in the frame of one image.
    Filters are turned and packed (groups, taps, K/groups, columns), taps as ``residues`` orders them. Parts are
    (chunks, R, S, C/groups, K).
    """
    if spec.sparse:
        return winners_backward(spec)
    weight_gradient, input_gradients = _weight_gradient, _input_gradients
    if spec.depthwise:
        weight_gradient, input_gradients = depthwise_weight_gradient, depthwise_input_gradients
    spread, weights = spread_slopes(spec), weight_gradient(spec)
    inputs = in_turn(input_gradients(spec)) if spec.wants_dx else weights
    wants_dx, images, scratch_size = spec.wants_dx, spec.images, spec.scratch
    bias, K = spec.bias, spec.K
    part = spec.window.R * spec.window.S * spec.channels * K
    x_size, bare = spec.x.size, spec.x.H * spec.x.W * spec.x.C
    rows_offset = spec.pool_buffer
    framed_size = slope_frame(spec).size
    gaps = wants_dx and not spec.add and not covers(spec)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        first = chunk * images
        dw = arguments[7] + FLOAT * chunk * part
        view(dw, (part,), np.float32)[:] = np.float32(0)
        if bias:
            view(arguments[8] + FLOAT * chunk * K, (K,), np.float32)[:] = np.float32(0)
        dy = arguments[9] + FLOAT * (thread * scratch_size + rows_offset)
        view(dy, (framed_size,), np.float32)[:] = np.float32(0)
        for image in range(first, min(first + images, count)):
            spread(arguments, image, dy, arguments[8] + FLOAT * chunk * K)
            weights(arguments[1] + FLOAT * image * x_size, dy, dw)
            if gaps:
                view(arguments[6] + FLOAT * image * bare, (bare,), np.float32)[:] = np.float32(0)
            if wants_dx:
                inputs(dy, arguments[2], arguments[6] + FLOAT * image * bare)

    return kernel


def spread_slopes(spec: ConvSpec) -> Callable[[Any, int, int, int], None]:
    """The gradient of the convolution's output, in its frame, and db: ``spread(arguments, image, dy, db)``."""
    framed, y, K, P, Q = slope_frame(spec), spec.y, spec.K, spec.P, spec.Q
    if spec.windows is not None:
        return _windows_spread(spec)
    pool_h, pool_w = spec.pool
    PP, QQ = P // pool_h, Q // pool_w
    row_step, column_step = framed.pitch, K
    taps = tuple(i * row_step + j * column_step for i in range(pool_h) for j in range(pool_w))
    send = unpool(Unpool(K, QQ, pool_w * column_step, taps, DEAD, spec.lanes, False, spec.bias, half=False))
    let_through = through(Through(K, spec.slope, spec.lanes, False, spec.bias, half=False))
    framed_origin, y_size, y_origin, y_pitch = framed.origin, y.size, y.origin, y.pitch

    @inlined
    def pool_spread(arguments: Any, image: int, target: int, db: int) -> None:
        for p in range(PP):
            first = (image * PP + p) * QQ * K
            place = target + FLOAT * (framed_origin + p * pool_h * row_step)
            send(arguments[3] + FLOAT * first, arguments[5] + first, place, db)

    @inlined
    def plain_spread(arguments: Any, image: int, target: int, db: int) -> None:
        for p in range(P):
            dy = arguments[3] + FLOAT * (image * P + p) * Q * K
            output = arguments[4] + FLOAT * (image * y_size + y_origin + p * y_pitch)
            for q in range(Q):
                place = target + FLOAT * (framed_origin + p * row_step + q * column_step)
                let_through(dy + FLOAT * q * K, output + FLOAT * q * K, place, db)

    return pool_spread if spec.pool != (1, 1) else plain_spread


def _windows_spread(spec: ConvSpec) -> Callable[[Any, int, int, int], None]:
    """The same behind any other pool: where windows overlap, slopes meet in a pixel and are added up."""
    unpool_windows = unpool_image(behind(spec, slope_frame(spec)))

    @inlined
    def spread(arguments: Any, image: int, target: int, db: int) -> None:
        unpool_windows(target, arguments[3], arguments[5], db, image)

    found: Callable[[Any, int, int, int], None] = spread
    return found


def _weight_gradient(spec: ConvSpec) -> Callable[[int, int, int], None]:
    """``dw[r, s, c, k] += sum over p, q of x[p + r, q + s, c] dy[p, q, k]``: ``weights(x, dy, dw)``."""
    if spec.pairs:
        return _weight_gradient_in_pairs(spec)
    framed = slope_frame(spec)
    product, begin = _weight_product(spec, framed.pitch), framed.origin

    @inlined
    def weights(x: int, dy: int, dw: int) -> None:
        product(x, dy + FLOAT * begin, dw)

    found: Callable[[int, int, int], None] = weights
    return found


def _weight_gradient_in_pairs(spec: ConvSpec) -> Callable[[int, int, int], None]:
    """The same in bf16, q two by two."""
    lay, places = pixel_pairs(spec), BehindFrame.of(spec)
    product, inputs, slopes = _weight_product(spec, -(-spec.Q // 2) * spec.K), places.inputs, places.slopes

    @inlined
    def weights(x: int, dy: int, dw: int) -> None:
        lay(x, dy)
        product(dy + FLOAT * inputs, dy + FLOAT * slopes, dw)

    found: Callable[[int, int, int], None] = weights
    return found


def _weight_product(spec: ConvSpec, pitch: int) -> Callable[[int, int, int], None]:
    """``product(x, dy, dw)`` adds to dw; dy is at its first pixel, and its rows are ``pitch`` elements apart.

    In pairs x has a word for every number, and every other pixel of it is multiplied.
    """
    x, window = spec.x, spec.window
    R, S, C, K, filters = window.R, window.S, spec.channels, spec.K, spec.filters
    block = VECTORS * spec.lanes
    rows_at_once = S * C if spec.merged else C
    base = Gemm(
        rows=0,
        columns=block,
        depth=-(-spec.Q // spec.together),
        a_row=spec.together,
        a_depth=spec.together * spec.together * window.stride_w * x.C,
        a_segment=spec.together * window.stride_h * x.pitch,
        b_depth=K,
        b_segment=pitch,
        c_row=K,
        lanes=spec.lanes,
        start="load",
        pairs=spec.pairs,
    )
    whole, rest = divmod(filters, block)
    full = register_rows(base, rows_at_once, spec.registers)
    tail = register_rows(replace(base, columns=rest or block), rows_at_once, spec.registers)
    corner = x.origin - window.top * x.pitch - window.left * x.C
    taps = 1 if spec.merged else S
    groups, P = spec.groups, spec.P
    row_step, tap_step = window.dilation_h * x.pitch, window.dilation_w * x.C

    @inlined
    def product(source: int, dy: int, dw: int) -> None:
        for r in range(R):
            for s in range(taps):
                for group in range(groups):
                    a = source + FLOAT * (corner + r * row_step + s * tap_step + group * C)
                    b = dy + FLOAT * group * filters
                    c = dw + FLOAT * ((r * S + s) * C * K + group * filters)
                    if whole:
                        for j in range(whole):
                            full(a, b + FLOAT * j * block, c + FLOAT * j * block, 0, P)
                    if rest:
                        tail(a, b + FLOAT * whole * block, c + FLOAT * whole * block, 0, P)

    found: Callable[[int, int, int], None] = product
    return found


def _input_gradients(spec: ConvSpec) -> tuple[Callable[[int, int, int], None], ...]:
    """``dx`` of one image from the framed dy: ``inputs(dy, filters, dx)`` for each residue; dx is (H, W, C)."""
    found = tuple(_input_part(spec, part) for part in parts(spec))
    if not spec.pairs:
        return found
    ready, place = rounded(slope_frame(spec).size, spec.lanes), BehindFrame.of(spec).rounded

    @inlined
    def round_slopes(dy: int, filters: int, dx: int) -> None:
        ready(dy, dy + FLOAT * place)

    return round_slopes, *found


def _input_part(spec: ConvSpec, part: Part) -> Callable[[int, int, int], None]:
    """The pixels of dx of one residue of the stride: ``inputs(dy, filters, dx)`` from the framed dy of one image."""
    back, window = part.conv, spec.window
    block, pixel = VECTORS * spec.lanes, window.stride_w * spec.x.C
    whole, rest = divmod(back.filters, block)
    full, tail = output_row(back, block, c_row=pixel), output_row(back, rest or block, c_row=pixel)
    groups, C, rows, target = spec.groups, back.filters, back.P, part.target
    source_channels, packed, number = back.channels, back.packed_columns, back.number
    before, group_filters = part.filters * packed, packed_depth(spec, turned=True) * packed
    source = BehindFrame.of(spec).rounded if spec.pairs else 0
    pitch, target_pitch, origin = back.x.pitch, window.stride_h * spec.x.W * spec.x.C, back.x.origin

    @inlined
    def inputs(dy: int, filters: int, dx: int) -> None:
        for group in range(groups):
            w = filters + FLOAT * (group * group_filters + before)
            for j in range(whole + (1 if rest else 0)):
                for h in range(rows):
                    a = dy + FLOAT * source + number * (origin + h * pitch + group * source_channels)
                    c = dx + FLOAT * (target + h * target_pitch + group * C + j * block)
                    if whole and j < whole:
                        full(a, w + FLOAT * j * block, c, 0)
                    elif rest:
                        tail(a, w + FLOAT * j * block, c, 0)

    found: Callable[[int, int, int], None] = inputs
    return found
