"""The backward pass of a convolution in bf16: dx, dw and db of a chunk of images.

dw = dy^T columns: the sum runs over pixels, so the columns of x are gathered and paired (VNNI) and dy is transposed,
for a few hundred pixels at a time. dx is a convolution of the framed dy with turned filters for each residue of the
stride.
Parts of dw, one a chunk, are added in chunk order.

Cost: 2 K C R S P Q FLOPs for each image, once for dw and once for dx.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from convolt.engines.jit.bf16 import Pairs, pack_pairs
from convolt.engines.jit.blocks import BlockGemm, block_gemm, configure, release
from convolt.engines.jit.epilogue import Through, Unpool, through, unpool
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.isa import converts
from convolt.engines.jit.kernels.conv_calls import in_turn
from convolt.engines.jit.kernels.pooling import unpooled_slopes
from convolt.engines.jit.kernels.residues import covers, slope_frame
from convolt.engines.jit.kernels.specs import (
    BF16,
    BLOCK,
    DEAD,
    DEPTH,
    FLOAT,
    ONE,
    STATE,
    ConvSpec,
    ReduceSpec,
    number_bytes,
)
from convolt.engines.jit.kernels.tile_specs import TileBackSpec, TileSpec
from convolt.engines.jit.kernels.tiles import LANES, TILE_ELEMENTS, framed_convolution, gather_rows, load_image
from convolt.engines.jit.kernels.weights import bias_sum
from convolt.engines.jit.memory import copy, view
from convolt.engines.jit.transpose import Transpose, transpose


def conv_backward(spec: TileBackSpec) -> Callable[..., None]:
    """dx, and this chunk's part of dw and db.

    Arguments: state, x, turned filters, dy, y, codes, dx, dw parts, db parts, scratch. Parts are (chunks, filters in
    whole blocks, depth), with depth in order r, s, c.
    """
    conv, gather = spec.conv, spec.gather
    load, collect, slopes = (
        load_image(conv.x, gather),
        gather_rows(gather),
        slope_rows(conv, spec.slopes_columns, conv.Q),
    )
    weights, inputs = _weight_gradient(spec), _input_gradient(spec)
    images, together, rows_together, P, Q, K = (
        conv.images,
        gather.group_images,
        gather.group_rows,
        conv.P,
        conv.Q,
        conv.K,
    )
    image_bytes, slopes_bytes, gathered_bytes = gather.image_bytes, spec.slopes_bytes, gather.gathered_bytes
    inputs_together, in_place = spec.inputs_together, gather.in_place
    picture_bytes, dx_number = BF16 * conv.x.size if in_place else image_bytes, number_bytes(conv.half_dx)
    gaps = conv.wants_dx and not conv.add and not covers(conv)
    scratch, part, bias, wants_dx = spec.scratch, spec.part, conv.bias, conv.wants_dx
    unpooled_at = scratch - FLOAT * conv.unpooled_size
    x_size, bare, wide, pixels = conv.x.size, conv.x.H * conv.x.W * conv.x.C, spec.slopes_columns, gather.pixels

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        state = view(arguments[0], (STATE,), np.int64)
        count, one = state[0], state[ONE]
        own = arguments[9] + thread * scratch
        dy = own + together * image_bytes
        columns = dy + together * slopes_bytes
        rest = columns + 2 * gathered_bytes + (BF16 * wide * pixels + 63) // 64 * 64
        unpooled = own + unpooled_at
        view(own, (scratch,), np.uint8)[:] = np.uint8(0)
        dw = arguments[7] + FLOAT * chunk * part
        view(dw, (part,), np.float32)[:] = np.float32(0)
        db = arguments[8] + FLOAT * chunk * K
        if bias:
            view(db, (K,), np.float32)[:] = np.float32(0)
        last = min((chunk + 1) * images, count)
        for first in range(chunk * images, last, together):
            end = min(first + together, last)
            picture = arguments[1] + BF16 * first * x_size if in_place else own
            for image in range(first, end):
                if not in_place:
                    load(arguments[1] + FLOAT * image * x_size, own + (image - first) * image_bytes)
                # Slopes of the images of a group lie one behind another, as their columns do.
                slopes(arguments, image, dy + BF16 * (image - first) * P * Q * wide, db, unpooled)
            for p in range(0, P, rows_together):
                for image in range(first, end):
                    collect(picture + (image - first) * picture_bytes, columns, p, image - first)
                count_pixels = (end - first) * P * Q if together > 1 else min(rows_together, P - p) * Q
                weights(columns, dy + BF16 * p * Q * wide, dw, count_pixels)
            if gaps:
                place, size = arguments[6] + dx_number * first * bare, dx_number * (end - first) * bare
                view(place, (size,), np.uint8)[:] = np.uint8(0)
            if wants_dx:
                for image in range(first, end, inputs_together):
                    inputs(
                        dy + BF16 * (image - first) * P * Q * wide,
                        arguments[2],
                        arguments[6] + dx_number * image * bare,
                        rest,
                        min(inputs_together, end - image),
                        one,
                    )

    return kernel


def slope_rows(conv: ConvSpec, wide: int, pitch: int) -> Callable[[Any, int, int, int, int], None]:
    """The gradient of the output as bf16 rows of ``wide`` channels, ``pitch`` pixels a row, and db.

    ``slopes(arguments, image, target, db, scratch)``.
    """
    if conv.windows is not None:
        prepare, plain = unpooled_slopes(conv), slope_rows(replace(conv.before_pool, slope=1.0), wide, pitch)

        @inlined
        def windows_slopes(arguments: Any, image: int, target: int, db: int, scratch: int) -> None:
            plain(prepare(arguments, image, scratch), 0, target, db, scratch)

        found: Callable[[Any, int, int, int, int], None] = windows_slopes
        return found
    y, native = conv.y, converts(conv.unit)
    pool_h, pool_w = conv.pool
    K, P, Q = conv.K, conv.P, conv.Q
    PP, QQ = P // pool_h, Q // pool_w
    taps = tuple((i * pitch + j) * wide for i in range(pool_h) for j in range(pool_w))
    spread = unpool(Unpool(K, QQ, pool_w * wide, taps, DEAD, LANES, native, conv.bias, half_dy=conv.half_dy))
    let_through = through(Through(K, conv.slope, LANES, native, conv.bias, half_y=y.half, half_dy=conv.half_dy))
    y_size, y_origin, y_pitch, number = y.size, y.origin, y.pitch, y.number
    dy_number = number_bytes(conv.half_dy)

    @inlined
    def pooled_slopes(arguments: Any, image: int, target: int, db: int, scratch: int) -> None:
        for p in range(PP):
            first = (image * PP + p) * QQ * K
            place = target + BF16 * p * pool_h * pitch * wide
            spread(arguments[3] + dy_number * first, arguments[5] + first, place, db)

    @inlined
    def plain_slopes(arguments: Any, image: int, target: int, db: int, scratch: int) -> None:
        for p in range(P):
            dy = arguments[3] + dy_number * (image * P + p) * Q * K
            output = arguments[4] + number * (image * y_size + y_origin + p * y_pitch)
            for q in range(Q):
                place = target + BF16 * (p * pitch + q) * wide
                let_through(dy + dy_number * q * K, output + number * q * K, place, db)

    return pooled_slopes if conv.pool != (1, 1) else plain_slopes


def _weight_gradient(spec: TileBackSpec) -> Callable[[int, int, int, int], None]:
    """``dw += dy^T columns`` of a group: ``weights(columns, dy, dw, pixels)``; columns are followed by their pairs."""
    gather = spec.gather
    depth, pixels, wide = gather.depth, gather.pixels, spec.slopes_columns
    step = 2 * TILE_ELEMENTS
    shape = BlockGemm(
        unit=spec.conv.unit,
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
    kernel, begin = block_gemm(shape), configure(shape)
    native, done = converts(spec.conv.unit), release(spec.conv.unit)
    pair = pack_pairs(Pairs(DEPTH, depth, depth, DEPTH, TILE_ELEMENTS))
    turn = transpose(Transpose(DEPTH, wide, wide, pixels, LANES, "bf16", "bf16", native))
    gathered_bytes = gather.gathered_bytes

    @inlined
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
        done()

    return weights


def _input_gradient(spec: TileBackSpec) -> Callable[..., None]:
    """``dx`` of some images: dy in frames, then convolutions: ``inputs(dy, filters, dx, scratch, images, one)``."""
    frame, K, wide, P, Q = slope_frame(spec.conv), spec.conv.K, spec.slopes_columns, spec.conv.P, spec.conv.Q
    origin, pitch, move = frame.origin // K, frame.columns, copy(BF16 * wide)
    image_bytes, frames_bytes = spec.frame_bytes, spec.inputs_together * spec.frame_bytes
    found, before = [], 0
    for one in spec.inputs:
        found.append(_residue(one, image_bytes, before))
        before += BF16 * one.columns * one.depth
    convolve = in_turn(tuple(found))

    @inlined
    def inputs(dy: int, filters: int, dx: int, scratch: int, images: int, one: int) -> None:
        for image in range(images):
            for p in range(P):
                row = scratch + image * image_bytes + BF16 * (origin + p * pitch) * wide
                for q in range(Q):
                    move(dy + BF16 * ((image * P + p) * Q + q) * wide, row + BF16 * q * wide)
        convolve(scratch, filters, dx, scratch + frames_bytes, images, one)

    found_inputs: Callable[..., None] = inputs
    return found_inputs


def _residue(tiles: TileSpec, image_bytes: int, before: int) -> Callable[..., None]:
    """One of the convolutions, whose filters begin ``before`` bytes behind the first ones."""
    convolve = framed_convolution(tiles, image_bytes)

    @inlined
    def run(frames: int, filters: int, dx: int, scratch: int, images: int, one: int) -> None:
        convolve(frames, filters + before, dx, scratch, images, one)

    found: Callable[..., None] = run
    return found


def reduce_parts(spec: ReduceSpec) -> Callable[..., None]:
    """``dw (+)= sum of parts``, of any size. A chunk is some filters.

    Arguments: state, parts (chunks, filters, depth), dw (K, C/groups, taps), db parts, db, K, K/groups, C/groups, taps,
    channels of a tap, depth, elements of a part, images of a part, filters of a chunk. Of what is between the channels
    of one group and the filters of another nothing is taken.
    """
    accumulate, add_bias = spec.accumulate, bias_sum(spec)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        K, filters, C, taps, channels = arguments[5], arguments[6], arguments[7], arguments[8], arguments[9]
        depth, part, images, run = arguments[10], arguments[11], arguments[12], arguments[13]
        count = view(arguments[0], (1,), np.int64)[0]
        parts = (count + images - 1) // images
        dw = view(arguments[2], (K, C, taps), np.float32)
        first, last = chunk * run, min((chunk + 1) * run, K)
        for k in range(first, last):
            total = view(arguments[1] + FLOAT * k * depth, (depth,), np.float32)
            for i in range(1, parts):
                other = view(arguments[1] + FLOAT * (i * part + k * depth), (depth,), np.float32)
                for d in range(depth):
                    total[d] += other[d]
            begin = k // filters * C
            for c in range(C):
                for tap in range(taps):
                    value = total[tap * channels + begin + c]
                    dw[k, c, tap] = dw[k, c, tap] + value if accumulate else value
        add_bias(arguments[3], arguments[4], parts, K, first, last)

    return kernel
