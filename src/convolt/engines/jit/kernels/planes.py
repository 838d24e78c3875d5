"""Convolution over planes: images with few channels, whose taps are runs of pixels.

With one or three channels a pixel is no tile row, and to gather R S C numbers for each pixel costs more than all
products. In planes (C, H, W) of bf16 a tap of the filter is the plane from another pixel on:

    forward     16 pixels of a row are loaded for each tap and transposed in registers: 16 rows of columns
    backward    dw^T = taps dy: the runs of pixels, one for each tap, are the left operand as they are, and the slopes
                are written as pairs of pixels, the right operand, as they come out of the pool

Pixels are counted along the rows of the frame, border included; slopes are zero there.

Cost: 2 K C R S P Q FLOPs for each image and pass; bytes: R S C numbers of bf16 a pixel, within the L1 or L2 cache.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from convolt.engines.jit.blocks import BlockGemm, block_gemm, configure, release
from convolt.engines.jit.epilogue import PairThrough, PairUnpool, pair_through, pair_unpool
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.isa import converts
from convolt.engines.jit.kernels.pooling import unpooled_slopes
from convolt.engines.jit.kernels.specs import BF16, BLOCK, DEAD, DEPTH, FLOAT, ConvSpec, InputSpec, number_bytes
from convolt.engines.jit.kernels.tile_specs import PlaneBackSpec, TileSpec
from convolt.engines.jit.memory import view
from convolt.engines.jit.runs import Columns, Runs, ScaledRow, columns, runs, scaled_row

LANES = 16  # pixels whose columns are made together
PAIR_BYTES = 64  # of 16 channels of two pixels


def unpack(spec: InputSpec) -> Callable[..., None]:
    """Images (N, C, H, W) into bf16 planes, normalized; arguments: state, y, scale, shift.

    y = x scale + shift for each channel, where scale holds 1/255 for bytes and 1/std.
    """
    y, images = spec.y, spec.images
    C, H, W, pitch, plane, size = y.C, y.H, y.W, y.columns, y.rows * y.columns, y.size
    origin, width = y.origin // y.C, 1 if spec.bytes else FLOAT
    scaled = scaled_row(ScaledRow(W, spec.bytes, spec.native))

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        state = view(arguments[0], (2,), np.int64)
        count, pixels, scale, shift = state[0], state[1], arguments[2], arguments[3]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for c in range(C):
                source = pixels + width * (image * C + c) * H * W
                target = arguments[1] + BF16 * (image * size + c * plane + origin)
                for h in range(H):
                    scaled(source + width * h * W, target + BF16 * h * pitch, scale + FLOAT * c, shift + FLOAT * c)

    return kernel


def taps(conv: ConvSpec) -> tuple[int, ...]:
    """How far each tap lies from the output pixel's place in the first plane, in order r, s, c."""
    window, x = conv.window, conv.x
    corner = x.origin // x.C - window.top * x.columns - window.left
    return tuple(
        corner + c * x.rows * x.columns + r * window.dilation_h * x.columns + s * window.dilation_w
        for r in range(window.R)
        for s in range(window.S)
        for c in range(x.C)
    )


def columns_of_planes(spec: TileSpec) -> Callable[[int, int, int, int], None]:
    """Columns of ``group_rows`` output rows of an image: ``gather(image, target, p, place in the group)``."""
    conv, depth = spec.conv, spec.depth
    P, Q, rows, pitch = conv.P, conv.Q, spec.group_rows, conv.x.columns
    transposed = columns(Columns(taps(conv), depth))
    blocks, last = -(-Q // LANES), max(0, Q - LANES)

    @inlined
    def gather(image: int, target: int, p: int, place: int) -> None:
        for i in range(min(rows, P - p)):
            for block in range(blocks):
                # The last block of a row overlaps the one before, or runs over into where the next row comes.
                q = min(block * LANES, last)
                transposed(image + BF16 * ((p + i) * pitch + q), target + BF16 * ((place * rows + i) * Q + q) * depth)

    return gather


def conv_backward(spec: PlaneBackSpec) -> Callable[..., None]:
    """This chunk's part of dw and db; arguments: state, x, -, dy, y, codes, -, dw parts, db parts, scratch.

    Parts are (chunks, depth, filters in whole blocks), with depth in order r, s, c.
    """
    conv, windows = spec.conv, spec.conv.windows is not None
    plain = replace(spec, conv=replace(conv.before_pool, slope=1.0)) if windows else spec
    slopes, prepare = _slopes(plain), unpooled_slopes(conv) if windows else _as_they_are
    weights = _weight_gradient(spec, spec.group_rows)
    rest = spec.rows % spec.group_rows
    last_weights = _weight_gradient(spec, rest or spec.group_rows)
    images, rows, together, K, bias, scratch, part = (
        conv.images,
        spec.rows,
        spec.group_rows,
        conv.K,
        conv.bias,
        spec.scratch,
        spec.part,
    )
    unpooled_at = scratch - FLOAT * conv.unpooled_size
    shifted_bytes, x_size, pitch, done = spec.shifted_bytes, conv.x.size, conv.x.columns, release(conv.unit)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        shifted = arguments[9] + thread * scratch
        pairs = shifted + shifted_bytes
        view(shifted, (scratch,), np.uint8)[:] = np.uint8(0)
        dw, db = arguments[7] + FLOAT * chunk * part, arguments[8] + FLOAT * chunk * K
        view(dw, (part,), np.float32)[:] = np.float32(0)
        if bias:
            view(db, (K,), np.float32)[:] = np.float32(0)
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            planes = arguments[1] + BF16 * image * x_size
            own = prepare(arguments, image, shifted + unpooled_at)
            for p in range(0, rows, together):
                slopes(own, 0 if windows else image, p, pairs, db)
                if p + together <= rows:
                    weights(planes + BF16 * p * pitch, shifted, pairs, dw)
                elif rest:
                    last_weights(planes + BF16 * p * pitch, shifted, pairs, dw)
        done()

    return kernel


@inlined
def _as_they_are(arguments: Any, image: int, scratch: int) -> Any:
    """Without such a pool."""
    return arguments


def _slopes(spec: PlaneBackSpec) -> Callable[[Any, int, int, int, int], None]:
    """The gradient of a group of output rows in pairs of pixels, and db: ``slopes(arguments, image, p, pairs, db)``."""
    conv, y, pitch = spec.conv, spec.conv.y, spec.conv.x.columns
    pool_h, pool_w = conv.pool
    K, P, Q, rows, together = conv.K, conv.P, conv.Q, spec.rows, spec.group_rows
    PP, QQ, native = P // pool_h, Q // pool_w, converts(conv.unit)
    plane = spec.pixels // 2 * PAIR_BYTES
    row_bytes, y_size, y_origin, y_pitch, number = pitch // 2 * PAIR_BYTES, y.size, y.origin, y.pitch, y.number
    dy_number = number_bytes(conv.half_dy)
    spread = pair_unpool(PairUnpool(K, QQ, pool_h, pool_w, row_bytes, plane, DEAD, conv.bias, native, conv.half_dy))
    both = pair_through(
        PairThrough(K, conv.slope, plane, conv.bias, native, both=True, half_y=y.half, half_dy=conv.half_dy)
    )
    single = pair_through(
        PairThrough(K, conv.slope, plane, conv.bias, native, both=False, half_y=y.half, half_dy=conv.half_dy)
    )

    @inlined
    def pooled_slopes(arguments: Any, image: int, p: int, pairs: int, db: int) -> None:
        for i in range(min(together, rows - p) // pool_h):
            first = (image * PP + p // pool_h + i) * QQ * K
            spread(arguments[3] + dy_number * first, arguments[5] + first, pairs + i * pool_h * row_bytes, db)

    @inlined
    def plain_slopes(arguments: Any, image: int, p: int, pairs: int, db: int) -> None:
        for i in range(min(together, rows - p)):
            dy = arguments[3] + dy_number * (image * P + p + i) * Q * K
            output = arguments[4] + number * (image * y_size + y_origin + (p + i) * y_pitch)
            place = pairs + i * row_bytes
            for q in range(0, Q - 1, 2):
                both(dy + dy_number * q * K, output + number * q * K, place + q // 2 * PAIR_BYTES, db)
            if Q % 2:
                q = Q - 1
                single(dy + dy_number * q * K, output + number * q * K, place + q // 2 * PAIR_BYTES, db)

    return pooled_slopes if conv.pool != (1, 1) else plain_slopes


def _weight_gradient(spec: PlaneBackSpec, rows: int) -> Callable[[int, int, int, int], None]:
    """``dw += taps dy`` of a group of output rows: ``weights(planes, scratch, pairs, dw)``."""
    conv, depth, wide, pixels, pitch = spec.conv, spec.depth, spec.wide, spec.pixels, spec.conv.x.columns
    tile = pixels // 2 * BLOCK  # elements of 16 filters
    steps = -(-rows * pitch // DEPTH)
    shape = BlockGemm(
        unit=conv.unit,
        rows=BLOCK,
        columns=BLOCK,
        step=DEPTH,
        steps=steps,
        a_row=pixels,
        a_step=DEPTH,
        a_segment=0,
        b_step=DEPTH // 2 * BLOCK,
        b_tile=tile,
        b_segment=0,
        c_row=wide,
        start="load",
        apart=spec.is_block,
    )
    product, begin = block_gemm(shape), configure(shape)
    # Behind the last pixel of the group the runs are zero, whatever the slopes of the group before left there.
    shift = runs(Runs(taps(conv), (rows - 1) * pitch + conv.Q, steps * DEPTH, pixels))

    @inlined
    def weights(planes: int, shifted: int, pairs: int, dw: int) -> None:
        shift(planes, shifted)
        begin()
        for d in range(0, depth, BLOCK):
            for k in range(0, wide, BLOCK):
                product(shifted + BF16 * d * pixels, pairs + BF16 * k // 16 * tile, dw + FLOAT * (d * wide + k), 0, 1)

    return weights
