"""Convolution in bf16: blocks of products with float32 sums.

An image that is bf16 already is read where it lies; another one is rounded in the thread's scratch memory (a few cycles
for 32 numbers). Float32 results are finished, and rounded where the output is kept in bf16, while they are in the L1
cache. Two ways for the left operand, chosen by ``TileSpec.direct``:

    direct    16 pixels of an image row, 32 channels of a tap: a tap is an address, nothing is copied
    gathered  the columns of some output rows, (pixels, R S C): for few channels, narrow images, any dilation

Filters are packed (blocks of 32, depth / 32, 2 tiles, 16, 16, 2).

Cost: as in ``conv``; bytes beside: the gathered columns, R S times the image, within the L2 cache.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from convolt.engines.jit.bf16 import bf16_of_float32, float32_of_bf16, pair_lanes, to_bf16
from convolt.engines.jit.blocks import BlockGemm, block_gemm, configure, release
from convolt.engines.jit.epilogue import Finish, MaxOf, finish, max_of
from convolt.engines.jit.half_pool import HalfPool, half_pool
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.isa import converts
from convolt.engines.jit.kernels.planes import columns_of_planes
from convolt.engines.jit.kernels.pooling import pool_behind
from convolt.engines.jit.kernels.specs import BF16, BLOCK, DEAD, DEPTH, FLOAT, Frame, PackSpec
from convolt.engines.jit.kernels.tile_specs import TileSpec
from convolt.engines.jit.memory import bits_of_float32, copy, view

LANES = 16  # of a block; LLVM cuts vectors into what the registers hold
TILE_ELEMENTS = 16 * DEPTH


def product(spec: TileSpec) -> BlockGemm:
    """32 pixels by 32 filters over the whole depth.

    ``segments`` is 1 for gathered columns and R for direct ones.
    """
    conv, window = spec.conv, spec.conv.window
    whole = spec.depth // DEPTH
    steps = whole // window.R if spec.direct else whole
    narrow = spec.direct and conv.Q <= DEPTH // 2
    return BlockGemm(
        unit=conv.unit,
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
        start="bias" if spec.starts_with_bias else "zero",
        a_tile=window.stride_h * conv.x.columns * spec.channels if narrow else None,
    )


def pack(spec: PackSpec) -> Callable[..., None]:
    """Filters (K, C, R, S) as (blocks, depth / 32, 2, 16, 16, 2) bf16; arguments: state, w, packed, bias.

    A chunk is a block. Of any size: the other arguments are the taps of w, K, C, the channels of a tap, the depth, how
    many numbers behind the last tap have the bias for their sum, how many taps are packed and which. Turned, K are the
    inputs of the convolution and C its outputs. Sixteen filters and two channels are taken together; single numbers are
    those of an odd channel, of fewer filters, and all where a tap has an odd number of channels.
    """
    back, words = spec.turned, pair_lanes(spec.native)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        taps, K, C, channels, depth = arguments[4], arguments[5], arguments[6], arguments[7], arguments[8]
        parts, count = arguments[9], arguments[10]
        filters, next_channel = (taps, K * taps) if back else (C * taps, taps)  # how far they lie apart
        block = arguments[2] + BF16 * chunk * depth * BLOCK
        packed = view(block, (depth // DEPTH, 2, 16, 16, 2), np.uint16)
        for tile in range(2):
            k = chunk * BLOCK + 16 * tile
            paired = C // 2 * 2 if channels % 2 == 0 and k + 16 <= K else 0
            for c in range(C):
                for i in range(count):
                    place = i * channels + c
                    step, pair, odd = place // DEPTH, (place % DEPTH) // 2, place % 2
                    w = arguments[1] + FLOAT * (k * filters + c * next_channel + arguments[11 + i])
                    if c >= paired:
                        for j in range(16):
                            value = np.float32(0)
                            if k + j < K:
                                value = view(w + FLOAT * j * filters, (1,), np.float32)[0]
                            packed[step, tile, pair, j, odd] = bf16_of_float32(value)
                    elif not odd:
                        words(w, filters, next_channel, block + 2 * BF16 * 16 * ((step * 2 + tile) * 16 + pair))
            for j in range(16 if parts else 0):
                rest = view(arguments[3] + FLOAT * (k + j), (1,), np.float32)[0] if k + j < K else np.float32(0)
                for place in range(count * channels, count * channels + parts):
                    bits = np.uint16(bits_of_float32(rest) >> np.uint32(16))  # what is cut off fits the next parts
                    if not np.isfinite(rest):
                        bits, rest = bf16_of_float32(rest), np.float32(0)
                    else:
                        rest -= float32_of_bf16(bits)
                    packed[place // DEPTH, tile, place % DEPTH // 2, j, place % 2] = bits

    return kernel


# --- forward ---------------------------------------------------------------------------------------------------------


def conv_forward(spec: TileSpec) -> Callable[..., None]:
    """``y = pool(act(w * x + b))``; arguments: state, x, packed filters, bias, y, codes, scratch."""
    conv = spec.conv
    in_place = spec.in_place
    load, multiply = load_image(conv.x, spec), multiply_group(spec)
    shape, done = configure(product(spec)), release(conv.unit)
    gather = columns_of_planes(spec) if conv.x.planar else gather_rows(spec)
    (whole, rest), windows = divmod(conv.K, BLOCK), conv.windows is not None
    finished = replace(spec, conv=conv.before_pool)
    full, tail = finish_group(finished, BLOCK), finish_group(finished, rest or BLOCK)
    pool = pool_behind(conv)
    images, together, rows_together, P = conv.images, spec.group_images, spec.group_rows, conv.P
    image_bytes, gathered_bytes, scratch = spec.image_bytes, spec.gathered_bytes, spec.scratch
    picture_bytes = BF16 * conv.x.size if in_place else image_bytes
    x_size, filters_bytes, direct = conv.x.size, BF16 * spec.depth * BLOCK, spec.direct
    unpooled_at, unpooled_bytes = scratch - together * spec.unpooled_bytes, FLOAT * conv.unpooled.size

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        own = arguments[6] + thread * scratch
        columns = own + together * image_bytes
        result = columns + gathered_bytes
        # Nor may what another kernel left behind the last tap be a NaN: zero times that is a NaN.
        view(own, (together * image_bytes + gathered_bytes,), np.uint8)[:] = np.uint8(0)
        last = min((chunk + 1) * images, count)
        target = (0, 0, 0, arguments[3], own + unpooled_at if windows else arguments[4], arguments[5])
        shape()
        for first in range(chunk * images, last, together):
            end = min(first + together, last)
            picture = arguments[1] + BF16 * first * x_size if in_place else own
            if not in_place:
                for image in range(first, end):
                    load(arguments[1] + FLOAT * image * x_size, own + (image - first) * image_bytes)
            for p in range(0, P, rows_together):
                if not direct:
                    for image in range(first, end):
                        gather(picture + (image - first) * picture_bytes, columns, p, image - first)
                for block in range(whole + (1 if rest else 0)):
                    filters = arguments[2] + block * filters_bytes
                    multiply(picture, columns, filters, result, p, end - first, arguments[3] + FLOAT * BLOCK * block)
                    for place in range(end - first):
                        image = place if windows else first + place
                        if block < whole:
                            full(target, result, image, place, p, block * BLOCK)
                        elif rest:
                            tail(target, result, image, place, p, block * BLOCK)
            if windows:
                for image in range(first, end):
                    unpooled = own + unpooled_at + (image - first) * unpooled_bytes
                    pool(unpooled, arguments[4], arguments[5], image)
        done()

    return kernel


def load_image(x: Frame, spec: TileSpec) -> Callable[[int, int], None]:
    """One float32 frame as bf16 with the channels the tiles want: ``load(source, target)``."""
    pixels, C, channels = x.rows * x.columns, x.C, spec.channels
    together = to_bf16(pixels * C, LANES, converts(spec.conv.unit))
    apart = to_bf16(C, LANES, converts(spec.conv.unit))
    same = channels == C

    @inlined
    def load(source: int, target: int) -> None:
        if same:
            together(source, target)
        else:
            for pixel in range(pixels):
                apart(source + FLOAT * pixel * C, target + BF16 * pixel * channels)

    return load


def gather_rows(spec: TileSpec) -> Callable[[int, int, int, int], None]:
    """Columns of ``group_rows`` output rows of an image: ``gather(image, columns, p, place in the group)``.

    Columns (pixels, depth): taps in order r, s, c. What lies behind the last tap is any finite number: the filters are
    zero there, and nobody reads dw there. A copy may run over its end; the next one, or the next pixel, comes after.
    """
    conv, window, depth = spec.conv, spec.conv.window, spec.depth
    Q, P, rows, channels, pitch = conv.Q, conv.P, spec.group_rows, spec.channels, conv.x.columns
    corner = conv.x.origin // conv.x.C - window.top * pitch - window.left
    contiguous = window.dilation_w == 1
    R, S, pieces = window.R, window.S, 1 if contiguous else window.S
    move = copy(BF16 * (window.S if contiguous else 1) * channels)
    stride_h, stride_w, dilation_h, dilation_w = window.stride_h, window.stride_w, window.dilation_h, window.dilation_w

    @inlined
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


def multiply_group(spec: TileSpec) -> Callable[[int, int, int, int, int, int, int], None]:
    """Products of a group with a block of filters: ``multiply(image, columns, filters, result, p, images, bias)``."""
    conv, window, channels = spec.conv, spec.conv.window, spec.channels
    kernel = block_gemm(product(spec))
    direct, R, P, Q, rows, row_pixels = spec.direct, window.R, conv.P, conv.Q, spec.group_rows, spec.row_pixels
    pitch, depth = conv.x.columns, spec.depth
    corner = conv.x.origin // conv.x.C - window.top * pitch - window.left
    stride_h, stride_w = window.stride_h, window.stride_w
    rows_a_call = 2 if Q <= DEPTH // 2 else 1

    @inlined
    def multiply(image: int, columns: int, filters: int, result: int, p: int, images: int, bias: int) -> None:
        if direct:
            for i in range(0, min(rows, P - p), rows_a_call):
                row = image + BF16 * (corner + (p + i) * stride_h * pitch) * channels
                target = result + FLOAT * i * row_pixels * BLOCK
                for q in range(0, Q, BLOCK):
                    kernel(row + BF16 * q * stride_w * channels, filters, target + FLOAT * q * BLOCK, bias, R)
        else:
            for pixel in range(0, images * rows * Q, BLOCK):
                kernel(columns + BF16 * pixel * depth, filters, result + FLOAT * pixel * BLOCK, bias, 1)

    return multiply


def finish_group(spec: TileSpec, columns: int) -> Callable[..., None]:
    """Bias, activation and pool of a group: ``finish(arguments, result, image, place, p, channel)``."""
    conv, y = spec.conv, spec.conv.y
    pool_h, pool_w = conv.pool
    K, P, Q, rows, row_pixels = conv.K, conv.P, conv.Q, spec.group_rows, spec.row_pixels
    PP, QQ = P // pool_h, Q // pool_w
    pooled, halves, bias, relu = conv.pool != (1, 1), spec.pools_halves, spec.adds_bias, conv.slope == 0
    y_size, y_origin, y_pitch, adds = y.size, y.origin, spec.step[0] * y.pitch, conv.add

    places = tuple((i * row_pixels + j) * BLOCK for i in range(pool_h) for j in range(pool_w))
    half, native, number, codes = y.half, converts(conv.unit), y.number, conv.codes
    pool = max_of(MaxOf(columns, places, DEAD, LANES, bias, relu, codes, half, native))
    at_once = half_pool(HalfPool(places, pool_w * BLOCK, K, DEAD, codes))

    @inlined
    def finish_pooled(arguments: Any, result: int, image: int, place: int, p: int, channel: int) -> None:
        offset = arguments[3] + FLOAT * channel
        for i in range(min(rows, P - p) // pool_h):
            pp = p // pool_h + i
            values = result + FLOAT * (place * rows + i * pool_h) * row_pixels * BLOCK
            target = arguments[4] + number * (image * y_size + y_origin + pp * y_pitch + channel)
            code = arguments[5] + (image * PP + pp) * QQ * K + channel
            if halves and not at_once(values, target, code, QQ):
                continue
            for q in range(QQ):
                pool(values + FLOAT * q * pool_w * BLOCK, offset, target + number * q * K, code + q * K)

    rows_of = finish(Finish(columns, spec.step[1] * K, BLOCK, bias, conv.slope, adds, half, native))

    @inlined
    def finish_plain(arguments: Any, result: int, image: int, place: int, p: int, channel: int) -> None:
        for i in range(min(rows, P - p)):
            values = result + FLOAT * (place * rows + i) * row_pixels * BLOCK
            target = arguments[4] + number * (image * y_size + y_origin + (p + i) * y_pitch + channel)
            rows_of((values, arguments[3] + FLOAT * channel, target), Q)

    return finish_pooled if pooled else finish_plain


def framed_convolution(tiles: TileSpec, image_bytes: int) -> Callable[[int, int, int, int, int, int], None]:
    """``dx`` of some frames of bf16 slopes, ``image_bytes`` apart: ``run(frames, filters, dx, scratch, images, one)``.

    ``one`` is 1, which LLVM does not know (``specs.ONE``).
    """
    conv, direct = tiles.conv, tiles.direct
    gather, multiply, begin = gather_rows(tiles), multiply_group(tiles), configure(product(tiles))
    whole, rest = divmod(conv.K, BLOCK)
    full, tail = finish_group(tiles, BLOCK), finish_group(tiles, rest or BLOCK)
    rows_together, H, filters_bytes = tiles.group_rows, conv.P, BF16 * tiles.depth * BLOCK
    gathered_bytes, done = tiles.gathered_bytes, release(conv.unit)

    @inlined
    def run(frames: int, filters: int, dx: int, scratch: int, images: int, one: int) -> None:
        result = scratch + gathered_bytes
        arguments = (0, 0, 0, 0, dx, 0)
        begin()
        for h in range(0, H * one, rows_together):
            if not direct:
                for image in range(images):
                    gather(frames + image * image_bytes, scratch, h, image)
            for block in range((whole + (1 if rest else 0)) * one):
                multiply(frames, scratch, filters + block * filters_bytes, result, h, images, 0)
                for image in range(images):
                    if block < whole:
                        full(arguments, result, image, image, h, block * BLOCK)
                    elif rest:
                        tail(arguments, result, image, image, h, block * BLOCK)
        done()

    return run
