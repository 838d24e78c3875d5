"""Convolution on AMX tiles: bf16 products, float32 sums, float32 tensors around them.

Tensors between layers stay float32. A kernel rounds an image to bf16 in its thread's scratch memory (a few cycles for
32 numbers), multiplies there, and finishes float32 results while they are in the L1 cache. Two ways for the left
operand, chosen by ``TileSpec.direct``:

    direct    16 pixels of an image row, 32 channels of a tap: a tap is an address, nothing is copied
    gathered  the columns of some output rows, (pixels, R S C): for few channels, narrow images, any dilation

dw = dy^T columns always gathers: its sum runs over pixels, so the columns are paired (VNNI) and dy is transposed, for
a few hundred pixels at a time. Filters are packed (blocks of 32, depth / 32, 2 tiles, 16, 16, 2).

Cost: as in ``conv``; bytes beside: the gathered columns, R S times the image, within the L2 cache.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from convolt.engines.jit.amx import AmxGemm, amx, configure, release
from convolt.engines.jit.bf16 import Pairs, bf16_of_float32, pack_pairs, to_bf16
from convolt.engines.jit.kernels.specs import (
    BF16,
    BLOCK,
    DEAD,
    DEPTH,
    FLOAT,
    Frame,
    PackSpec,
    TileBackSpec,
    TileSpec,
)
from convolt.engines.jit.memory import copy, view
from convolt.engines.jit.transpose import Transpose, transpose

LANES = 16  # AMX comes with AVX-512
TILE_ELEMENTS = 16 * DEPTH


def product(spec: TileSpec) -> AmxGemm:
    """32 pixels by 32 filters over the whole depth; ``segments`` is 1 for gathered columns and R for direct ones."""
    conv, window = spec.conv, spec.conv.window
    whole = spec.depth // DEPTH
    steps = whole // window.R if spec.direct else whole
    narrow = spec.direct and conv.Q <= DEPTH // 2
    return AmxGemm(
        rows=BLOCK,
        columns=BLOCK,
        step=DEPTH,
        steps=steps,
        a_row=window.stride_w * spec.channels if spec.direct else spec.depth,
        a_step=DEPTH,
        a_segment=window.dilation_h * conv.x.columns * spec.channels,
        b_step=2 * TILE_ELEMENTS,
        b_tile=TILE_ELEMENTS,
        b_segment=steps * 2 * TILE_ELEMENTS,
        c_row=BLOCK,
        a_tile=window.stride_h * conv.x.columns * spec.channels if narrow else None,
    )


def pack(spec: PackSpec) -> Callable[..., None]:
    """Filters (K, C, R, S) as (blocks, depth / 32, 2, 16, 16, 2) bf16; arguments: state, w, packed. A chunk is a block.

    Turned, a block is of input channels and taps are in reverse.
    """
    tiles = TileBackSpec(spec.conv).inputs if spec.turned else TileSpec(spec.conv)
    conv = tiles.conv
    R, S, K, C, channels, depth = conv.window.R, conv.window.S, conv.K, conv.x.C, tiles.channels, tiles.depth
    back = spec.turned

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        forward = view(arguments[1], (K, C, R, S), np.float32)
        reverse = view(arguments[1], (C, K, R, S), np.float32)
        packed = view(arguments[2] + BF16 * chunk * depth * BLOCK, (depth // DEPTH, 2, 16, 16, 2), np.uint16)
        for r in range(R):
            for s in range(S):
                for c in range(C):
                    place = (r * S + s) * channels + c
                    step, pair, odd = place // DEPTH, (place % DEPTH) // 2, place % 2
                    for j in range(BLOCK):
                        k = chunk * BLOCK + j
                        value = np.float32(0)
                        if k < K:
                            value = reverse[c, k, R - 1 - r, S - 1 - s] if back else forward[k, c, r, s]
                        packed[step, j // 16, pair, j % 16, odd] = bf16_of_float32(value)

    return kernel


# --- forward ---------------------------------------------------------------------------------------------------------


def conv_forward(spec: TileSpec) -> Callable[..., None]:
    """``y = pool(act(w * x + b))``; arguments: state, x, packed filters, bias, y, codes, scratch."""
    conv = spec.conv
    load, gather, multiply = _load(conv.x, spec), _gather(spec), _multiply(spec)
    shape = configure(product(spec))
    whole, rest = divmod(conv.K, BLOCK)
    full, tail = _finish(spec, BLOCK), _finish(spec, rest or BLOCK)
    images, together, rows_together, P = conv.images, spec.group_images, spec.group_rows, conv.P
    image_bytes, gathered_bytes, scratch = spec.image_bytes, spec.gathered_bytes, spec.scratch
    x_size, filters_bytes, direct = conv.x.size, BF16 * spec.depth * BLOCK, spec.direct

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        own = arguments[6] + thread * scratch
        columns = own + together * image_bytes
        result = columns + gathered_bytes
        view(own, (together * image_bytes,), np.uint8)[:] = np.uint8(0)
        last = min((chunk + 1) * images, count)
        shape()
        for first in range(chunk * images, last, together):
            end = min(first + together, last)
            for image in range(first, end):
                load(arguments[1] + FLOAT * image * x_size, own + (image - first) * image_bytes)
            for p in range(0, P, rows_together):
                if not direct:
                    for image in range(first, end):
                        gather(own + (image - first) * image_bytes, columns, p, image - first)
                for block in range(whole + (1 if rest else 0)):
                    filters = arguments[2] + block * filters_bytes
                    multiply(own, columns, filters, result, p, end - first)
                    for image in range(first, end):
                        if block < whole:
                            full(arguments, result, image, image - first, p, block * BLOCK)
                        else:
                            tail(arguments, result, image, image - first, p, block * BLOCK)
        release()

    return kernel


def _load(x: Frame, spec: TileSpec) -> Callable[[int, int], None]:
    """One float32 frame as bf16 with the channels the tiles want: ``load(source, target)``."""
    pixels, C, channels = x.rows * x.columns, x.C, spec.channels
    together = to_bf16(pixels * C, LANES, True)
    apart = to_bf16(C, LANES, True)
    same = channels == C

    @njit
    def load(source: int, target: int) -> None:
        if same:
            together(source, target)
        else:
            for pixel in range(pixels):
                apart(source + FLOAT * pixel * C, target + BF16 * pixel * channels)

    return load


def _gather(spec: TileSpec) -> Callable[[int, int, int, int], None]:
    """Columns of ``group_rows`` output rows of an image: ``gather(image, columns, p, place in the group)``.

    Columns (pixels, depth): taps in order r, s, c. What lies behind the last tap is of no meaning: the filters are zero
    there, and nobody reads dw there. A copy may run over its end; the next one, or the next pixel, comes after.
    """
    conv, window, depth = spec.conv, spec.conv.window, spec.depth
    Q, P, rows, channels, pitch = conv.Q, conv.P, spec.group_rows, spec.channels, conv.x.columns
    corner = conv.x.origin // conv.x.C - window.top * pitch - window.left
    contiguous = window.dilation_w == 1
    R, S, pieces = window.R, window.S, 1 if contiguous else window.S
    move = copy(BF16 * (window.S if contiguous else 1) * channels)
    stride_h, stride_w, dilation_h, dilation_w = window.stride_h, window.stride_w, window.dilation_h, window.dilation_w

    @njit
    def gather(image: int, columns: int, p: int, place: int) -> None:
        for i in range(min(rows, P - p)):
            for q in range(Q):
                target = columns + BF16 * ((place * rows + i) * Q + q) * depth
                source = image + BF16 * (corner + (p + i) * stride_h * pitch + q * stride_w) * channels
                for r in range(R):
                    for s in range(pieces):
                        move(
                            source + BF16 * (r * dilation_h * pitch + s * dilation_w) * channels,
                            target + BF16 * (r * S + s) * channels,
                        )

    return gather


def _multiply(spec: TileSpec) -> Callable[[int, int, int, int, int, int], None]:
    """Products of a group with a block of filters: ``multiply(image, columns, filters, result, p, images)``."""
    conv, window, channels = spec.conv, spec.conv.window, spec.channels
    kernel = amx(product(spec))
    direct, R, Q, rows, row_pixels = spec.direct, window.R, conv.Q, spec.group_rows, spec.row_pixels
    pitch, depth = conv.x.columns, spec.depth
    corner = conv.x.origin // conv.x.C - window.top * pitch - window.left
    stride_h, stride_w = window.stride_h, window.stride_w
    rows_a_call = 2 if Q <= DEPTH // 2 else 1

    @njit
    def multiply(image: int, columns: int, filters: int, result: int, p: int, images: int) -> None:
        if direct:
            for i in range(0, rows, rows_a_call):
                row = image + BF16 * (corner + (p + i) * stride_h * pitch) * channels
                target = result + FLOAT * i * row_pixels * BLOCK
                for q in range(0, Q, BLOCK):
                    kernel(row + BF16 * q * stride_w * channels, filters, target + FLOAT * q * BLOCK, 0, R)
        else:
            for pixel in range(0, images * rows * Q, BLOCK):
                kernel(columns + BF16 * pixel * depth, filters, result + FLOAT * pixel * BLOCK, 0, 1)

    return multiply


def _finish(spec: TileSpec, columns: int) -> Callable[..., None]:
    """Bias, activation and pool of a group: ``finish(arguments, result, image, place, p, channel)``."""
    conv, y = spec.conv, spec.conv.y
    pool_h, pool_w = conv.pool
    K, P, Q, rows, row_pixels = conv.K, conv.P, conv.Q, spec.group_rows, spec.row_pixels
    PP, QQ = P // pool_h, Q // pool_w
    pooled, bias, slope, relu = conv.pool != (1, 1), conv.bias, np.float32(conv.slope), conv.slope == 0
    y_size, y_origin, y_pitch, adds = y.size, y.origin, y.pitch, conv.add

    @njit
    def finish_pooled(arguments: Any, result: int, image: int, place: int, p: int, channel: int) -> None:
        offset = view(arguments[3] + FLOAT * channel, (BLOCK,), np.float32)
        for i in range(min(rows, P - p) // pool_h):
            pp = p // pool_h + i
            values = view(
                result + FLOAT * (place * rows + i * pool_h) * row_pixels * BLOCK,
                (pool_h, row_pixels, BLOCK),
                np.float32,
            )
            target = view(
                arguments[4] + FLOAT * (image * y_size + y_origin + pp * y_pitch + channel), (QQ, K), np.float32
            )
            code = view(arguments[5] + (image * PP + pp) * QQ * K + channel, (QQ, K), np.uint8)
            for q in range(QQ):
                for k in range(columns):
                    best, winner = values[0, q * pool_w, k], np.uint8(0)
                    for a in range(pool_h):
                        for b in range(pool_w):
                            value = values[a, q * pool_w + b, k]
                            better = value > best
                            winner = np.uint8(a * pool_w + b) if better else winner
                            best = value if better else best
                    if bias:
                        best += offset[k]
                    if relu:
                        winner = winner if best > np.float32(0) else np.uint8(DEAD)
                        best = max(best, np.float32(0))
                    target[q, k] = best
                    code[q, k] = winner

    @njit
    def finish_plain(arguments: Any, result: int, image: int, place: int, p: int, channel: int) -> None:
        offset = view(arguments[3] + FLOAT * channel, (BLOCK,), np.float32)
        for i in range(min(rows, P - p)):
            values = view(result + FLOAT * (place * rows + i) * row_pixels * BLOCK, (Q, BLOCK), np.float32)
            target = view(
                arguments[4] + FLOAT * (image * y_size + y_origin + (p + i) * y_pitch + channel), (Q, K), np.float32
            )
            for q in range(Q):
                for k in range(columns):
                    value = values[q, k]
                    if bias:
                        value += offset[k]
                    if slope != np.float32(1):
                        value = value if value > np.float32(0) else value * slope
                    target[q, k] = target[q, k] + value if adds else value

    return finish_pooled if pooled else finish_plain


# --- backward --------------------------------------------------------------------------------------------------------


def conv_backward(spec: TileBackSpec) -> Callable[..., None]:
    """dx, and this chunk's part of dw and db.

    Arguments: state, x, turned filters, dy, y, codes, dx, dw parts, db parts, scratch. Parts are (chunks, filters in
    whole blocks, depth), with depth in order r, s, c.
    """
    conv, gather = spec.conv, spec.gather
    load, collect, slopes = _load(conv.x, gather), _gather(gather), _slopes(spec)
    weights, inputs = _weight_gradient(spec), _input_gradient(spec) if conv.wants_dx else None
    images, together, rows_together, P, Q, K = conv.images, gather.group_images, gather.group_rows, conv.P, conv.Q, conv.K
    image_bytes, slopes_bytes, gathered_bytes = gather.image_bytes, spec.slopes_bytes, gather.gathered_bytes
    row_bytes, inputs_together = spec.row_bytes, spec.inputs.group_images
    scratch, part, bias, wants_dx = spec.scratch, spec.part, conv.bias, conv.wants_dx
    x_size, bare, wide, pixels = conv.x.size, conv.x.H * conv.x.W * conv.x.C, spec.slopes_columns, gather.pixels

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        own = arguments[9] + thread * scratch
        dy = own + together * image_bytes
        columns = dy + together * slopes_bytes
        room = columns - row_bytes
        rest = columns + 2 * gathered_bytes + (BF16 * wide * pixels + 63) // 64 * 64
        view(own, (scratch,), np.uint8)[:] = np.uint8(0)
        dw = arguments[7] + FLOAT * chunk * part
        view(dw, (part,), np.float32)[:] = np.float32(0)
        db = arguments[8] + FLOAT * chunk * K
        if bias:
            view(db, (K,), np.float32)[:] = np.float32(0)
        last = min((chunk + 1) * images, count)
        for first in range(chunk * images, last, together):
            end = min(first + together, last)
            for image in range(first, end):
                load(arguments[1] + FLOAT * image * x_size, own + (image - first) * image_bytes)
                # Slopes of the images of a group lie one behind another, as their columns do.
                slopes(arguments, image, dy + BF16 * (image - first) * P * Q * wide, db, room)
            for p in range(0, P, rows_together):
                for image in range(first, end):
                    collect(own + (image - first) * image_bytes, columns, p, image - first)
                count_pixels = (end - first) * P * Q if together > 1 else min(rows_together, P - p) * Q
                weights(columns, dy + BF16 * p * Q * wide, dw, count_pixels)
            if wants_dx:
                for image in range(first, end, inputs_together):
                    inputs(
                        dy + BF16 * (image - first) * P * Q * wide,
                        arguments[2],
                        arguments[6] + FLOAT * image * bare,
                        rest,
                        min(inputs_together, end - image),
                    )

    return kernel


def _slopes(spec: TileBackSpec) -> Callable[[Any, int, int, int, int], None]:
    """The gradient of the convolution's output as bf16 rows (pixels, K in blocks), and db; ``room`` holds a row."""
    conv, y, wide = spec.conv, spec.conv.y, spec.slopes_columns
    pool_h, pool_w = conv.pool
    K, P, Q = conv.K, conv.P, conv.Q
    PP, QQ = P // pool_h, Q // pool_w
    pooled, bias, slope = conv.pool != (1, 1), conv.bias, np.float32(conv.slope)
    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch

    narrow, narrow_pixel = to_bf16(QQ * K, LANES, True), to_bf16(K, LANES, True)

    @njit
    def pooled_slopes(arguments: Any, image: int, target: int, db: int, room: int) -> None:
        rows = view(target, (P, Q, wide), np.uint16)
        total = view(db, (K,), np.float32)
        small = view(room, (QQ, K), np.uint16)
        for p in range(PP):
            source = view(arguments[3] + FLOAT * (image * PP + p) * QQ * K, (QQ, K), np.float32)
            code = view(arguments[5] + (image * PP + p) * QQ * K, (QQ, K), np.uint8)
            narrow(arguments[3] + FLOAT * (image * PP + p) * QQ * K, room)
            for q in range(QQ):
                for i in range(pool_h):
                    for j in range(pool_w):
                        tap = np.uint8(i * pool_w + j)
                        for k in range(K):
                            value = small[q, k]
                            rows[p * pool_h + i, q * pool_w + j, k] = value if code[q, k] == tap else np.uint16(0)
                if bias:
                    for k in range(K):
                        total[k] += source[q, k] if code[q, k] != np.uint8(DEAD) else np.float32(0)

    @njit
    def plain_slopes(arguments: Any, image: int, target: int, db: int, room: int) -> None:
        small = view(room, (K,), np.float32)
        total = view(db, (K,), np.float32)
        for p in range(P):
            source = view(arguments[3] + FLOAT * (image * P + p) * Q * K, (Q, K), np.float32)
            output = view(arguments[4] + FLOAT * (image * y_size + y_origin + p * y_pitch), (Q, K), np.float32)
            for q in range(Q):
                for k in range(K):
                    value = source[q, k]
                    if slope != np.float32(1):
                        value = value if output[q, k] > np.float32(0) else value * slope
                    small[k] = value
                    if bias:
                        total[k] += value
                narrow_pixel(room, target + BF16 * (p * Q + q) * wide)

    return pooled_slopes if pooled else plain_slopes


def _weight_gradient(spec: TileBackSpec) -> Callable[[int, int, int, int], None]:
    """``dw += dy^T columns`` of a group: ``weights(columns, dy, dw, pixels)``; columns are followed by their pairs."""
    gather = spec.gather
    depth, pixels, wide = gather.depth, gather.pixels, spec.slopes_columns
    step = 2 * TILE_ELEMENTS
    shape = AmxGemm(
        rows=BLOCK,
        columns=BLOCK,
        step=DEPTH,
        steps=1,
        a_row=pixels,
        a_step=DEPTH,
        a_segment=DEPTH,
        b_step=depth * DEPTH,
        b_tile=TILE_ELEMENTS,
        b_segment=depth * DEPTH,
        c_row=depth,
        start="load",
    )
    kernel, begin = amx(shape), configure(shape)
    pair = pack_pairs(Pairs(DEPTH, depth, depth, DEPTH, TILE_ELEMENTS))
    turn = transpose(Transpose(DEPTH, wide, wide, pixels, LANES, "bf16", "bf16", True))
    gathered_bytes = gather.gathered_bytes

    @njit
    def weights(columns: int, dy: int, dw: int, count: int) -> None:
        pairs = columns + gathered_bytes
        turned = pairs + gathered_bytes
        steps = (count + DEPTH - 1) // DEPTH
        for i in range(steps):
            if (i + 1) * DEPTH > count:  # rows behind the group's last pixel count for nothing
                for row in range(count, steps * DEPTH):
                    view(columns + BF16 * row * depth, (depth,), np.uint16)[:] = np.uint16(0)
            pair(columns + BF16 * i * DEPTH * depth, pairs + BF16 * i * DEPTH * depth)
            turn(dy + BF16 * i * DEPTH * wide, turned + BF16 * i * DEPTH)
        begin()
        for j in range(depth // BLOCK):
            for k in range(0, wide, BLOCK):
                place = dw + FLOAT * (k * depth + j * BLOCK)
                kernel(turned + BF16 * k * pixels, pairs + BF16 * j * step, place, 0, steps)
        release()

    return weights


def _input_gradient(spec: TileBackSpec) -> Callable[[int, int, int, int, int], None]:
    """``dx`` of some images: ``inputs(dy, filters, dx, scratch, images)``: dy spread into frames, then a convolution."""
    tiles = spec.inputs
    conv, framed, window = tiles.conv, spec.conv.framed, spec.conv.window
    gather, multiply, begin = _gather(tiles), _multiply(tiles), configure(product(tiles))
    whole, rest = divmod(conv.K, BLOCK)
    full, tail = _finish(tiles, BLOCK), _finish(tiles, rest or BLOCK)
    P, Q, K, wide, channels = spec.conv.P, spec.conv.Q, spec.conv.K, spec.slopes_columns, tiles.channels
    origin, pitch = framed.origin // K, framed.columns
    stride_h, stride_w = window.stride_h, window.stride_w
    rows_together, together, H, direct = tiles.group_rows, tiles.group_images, conv.P, tiles.direct
    image_bytes, gathered_bytes, filters_bytes = tiles.image_bytes, tiles.gathered_bytes, BF16 * tiles.depth * BLOCK

    @njit
    def spread(dy: int, frame: int) -> None:
        for p in range(P):
            for q in range(Q):
                source = view(dy + BF16 * (p * Q + q) * wide, (channels,), np.uint16)
                place = origin + p * stride_h * pitch + q * stride_w
                target = view(frame + BF16 * place * channels, (channels,), np.uint16)
                for k in range(channels):
                    target[k] = source[k]

    @njit
    def inputs(dy: int, filters: int, dx: int, scratch: int, images: int) -> None:
        columns = scratch + together * image_bytes
        result = columns + gathered_bytes
        arguments = (0, 0, 0, 0, dx, 0)
        for image in range(images):
            spread(dy + BF16 * image * P * Q * wide, scratch + image * image_bytes)
        begin()
        for h in range(0, H, rows_together):
            if not direct:
                for image in range(images):
                    gather(scratch + image * image_bytes, columns, h, image)
            for block in range(whole + (1 if rest else 0)):
                multiply(scratch, columns, filters + block * filters_bytes, result, h, images)
                for image in range(images):
                    if block < whole:
                        full(arguments, result, image, image, h, block * BLOCK)
                    else:
                        tail(arguments, result, image, image, h, block * BLOCK)
        release()

    return inputs


def reduce_parts(spec: TileBackSpec) -> Callable[..., None]:
    """``dw (+)= sum of parts``; arguments: state, parts, dw (K, C, R, S), db parts, db. A chunk is 16 filters."""
    conv, gather = spec.conv, spec.gather
    K, C, R, S, images, depth, part = conv.K, conv.x.C, conv.window.R, conv.window.S, conv.images, gather.depth, spec.part
    bias, accumulate = conv.bias, spec.accumulate

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        parts = (count + images - 1) // images
        dw = view(arguments[2], (K, C, R, S), np.float32)
        for k in range(chunk * 16, min((chunk + 1) * 16, K)):
            total = view(arguments[1] + FLOAT * k * depth, (depth,), np.float32)
            for i in range(1, parts):
                other = view(arguments[1] + FLOAT * (i * part + k * depth), (depth,), np.float32)
                for d in range(depth):
                    total[d] += other[d]
            for c in range(C):
                for r in range(R):
                    for s in range(S):
                        value = total[(r * S + s) * C + c]
                        dw[k, c, r, s] = dw[k, c, r, s] + value if accumulate else value
            if bias:
                db = view(arguments[4], (K,), np.float32)
                if not accumulate:
                    db[k] = np.float32(0)
                for i in range(parts):
                    db[k] += view(arguments[3] + FLOAT * i * K, (K,), np.float32)[k]

    return kernel
