"""The backward pass of a convolution with stride 1 in bf16: nothing is gathered.

Pixels of x and of dy are counted alike, along the rows of x's frame, and images of a group one behind another. A tap of
the filter is then one and the same distance between the two everywhere:

    dw[k, tap, c] = sum over pixels of dy[pixel, k] x[pixel + tap, c]

Tile rows must begin on a line of the cache. dy, the left operand, is transposed and stays where it is; x, the right
one, is paired (two neighbors in the sum side by side), so a row of it is a pair of pixels, and a tap an even number of
pixels further is another row. For the odd taps x is paired once more, from the second pixel on. Between rows and
between images dy is zero: what x holds there counts for nothing. The same zeros are the border that the turned filters
want, so dx is a convolution of dy as it lies.

Parts of dw, one a chunk, are added in chunk order.

Cost: 2 K C R S FLOPs for each pixel of the frame, once for dw, and for each input pixel, once for dx; bytes, beside x
and dy: x twice as bf16 and dy twice, written once and read C / 32 or K / 32 times within the L2 cache.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from convolt.engines.jit.bf16 import Pairs, pack_pairs, source_of
from convolt.engines.jit.blocks import BlockGemm, block_gemm, configure, release
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.isa import converts
from convolt.engines.jit.kernels.specs import BF16, BLOCK, DEPTH, FLOAT, ONE, STATE, number_bytes
from convolt.engines.jit.kernels.tile_specs import ShiftedBackSpec
from convolt.engines.jit.kernels.tiles import LANES, framed_convolution
from convolt.engines.jit.kernels.tiles_backward import slope_rows
from convolt.engines.jit.memory import view
from convolt.engines.jit.transpose import Transpose, transpose

TILE = 16
PAIR = 2 * TILE  # elements of 16 channels of two pixels


def conv_backward(spec: ShiftedBackSpec) -> Callable[..., None]:
    """dx, and this chunk's part of dw and db.

    Arguments: state, x, turned filters, dy, y, codes, dx, dw parts, db parts, scratch. Parts are (chunks, filters in
    whole tiles, depth), with depth in order r, s, c.
    """
    conv = spec.conv
    pair, slopes = _pairs(spec), slope_rows(conv, spec.wide, conv.x.columns)
    clear, weights = _cleared(spec), _weight_gradient(spec)
    inputs = framed_convolution(spec.inputs, BF16 * spec.spacing * spec.wide)
    images, together, inputs_together = conv.images, spec.images, spec.inputs.group_images
    K, bias, wants_dx, part, scratch = conv.K, conv.bias, conv.wants_dx, spec.part, spec.scratch
    lead_bytes, slopes_bytes = BF16 * spec.lead * spec.wide, spec.slopes_bytes
    x_size, number, dx_number = conv.x.size, conv.x.number, number_bytes(conv.half_dx)
    image_bytes, pairs_bytes = BF16 * spec.spacing * spec.wide, spec.copies * spec.pairs_bytes
    runs, run_bytes = spec.copies * spec.channels // TILE, 2 * PAIR * spec.pairs
    even = conv.x.rows * conv.x.columns % 2 == 0  # of an odd frame the second copy leaves a pair out, and that is read
    image_filled = 2 * PAIR * spec.spacing // 2 if even else 0
    turned_bytes, bare = spec.turned_bytes, conv.x.H * conv.x.W * conv.x.C
    unpooled_at = scratch - FLOAT * conv.unpooled_size
    image_pairs, wide, spacing = 2 * BF16 * TILE * spec.spacing // 2, spec.wide, spec.spacing

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        state = view(arguments[0], (STATE,), np.int64)
        count, one = state[0], state[ONE]
        own = arguments[9] + thread * scratch
        dy = own + lead_bytes
        pairs = own + slopes_bytes
        turned = pairs + pairs_bytes
        rest = turned + turned_bytes
        clear(own)
        last = min((chunk + 1) * images, count)
        filled = min(together, max(0, last - chunk * images)) * image_filled
        for i in range(runs):  # behind the last image of the first group, where its last step reads
            view(pairs + i * run_bytes + filled, (run_bytes - filled,), np.uint8)[:] = np.uint8(0)
        dw, db = arguments[7] + FLOAT * chunk * part, arguments[8] + FLOAT * chunk * K
        if bias:
            view(db, (K,), np.float32)[:] = np.float32(0)
        if last <= chunk * images:
            view(dw, (part,), np.float32)[:] = np.float32(0)
        for first in range(chunk * images, last, together):
            end = min(first + together, last)
            for image in range(first, end):
                pair(arguments[1] + number * image * x_size, pairs + (image - first) * image_pairs)
                slopes(arguments, image, dy + (image - first) * image_bytes, db, own + unpooled_at)
            if end - first < together:  # what the group before left behind the last image counts for nothing
                view(dy + (end - first) * image_bytes, (DEPTH * wide,), np.uint16)[:] = np.uint16(0)
            weights(dy, turned, pairs, dw, (end - first) * spacing, first > chunk * images, one)
            if wants_dx:
                for image in range(first, end, inputs_together):
                    inputs(
                        dy + (image - first) * image_bytes,
                        arguments[2],
                        arguments[6] + dx_number * image * bare,
                        rest,
                        min(inputs_together, end - image),
                        one,
                    )

    return kernel


def _cleared(spec: ShiftedBackSpec) -> Callable[[int], None]:
    """Zeros where slopes are never written, before, between and behind them: ``clear(scratch)``."""
    conv, wide, pitch, together = spec.conv, spec.wide, spec.conv.x.columns, spec.images
    rows, columns = conv.P // conv.pool[0] * conv.pool[0], conv.Q // conv.pool[1] * conv.pool[1]
    pixel_bytes, image_bytes, slopes_bytes = BF16 * wide, BF16 * spec.spacing * wide, spec.slopes_bytes
    lead_bytes, whole = BF16 * spec.lead * wide, wide == conv.K
    between_bytes, below = (pitch - columns) * pixel_bytes, rows * pitch * pixel_bytes

    @inlined
    def clear(scratch: int) -> None:
        if not whole:
            view(scratch, (slopes_bytes,), np.uint8)[:] = np.uint8(0)
            return
        view(scratch, (lead_bytes,), np.uint8)[:] = np.uint8(0)
        for image in range(together):
            first = scratch + lead_bytes + image * image_bytes
            for row in range(rows):
                view(first + (row * pitch + columns) * pixel_bytes, (between_bytes,), np.uint8)[:] = np.uint8(0)
            view(first + below, (image_bytes - below,), np.uint8)[:] = np.uint8(0)
        behind = lead_bytes + together * image_bytes
        view(scratch + behind, (slopes_bytes - behind,), np.uint8)[:] = np.uint8(0)

    found: Callable[[int], None] = clear
    return found


def _pairs(spec: ShiftedBackSpec) -> Callable[[int, int], None]:
    """An image's frame in pairs of pixels, from the first pixel on and from the second: ``pair(x, pairs)``."""
    x, plane, copy_bytes, copies = spec.conv.x, spec.pairs * PAIR, spec.pairs_bytes, spec.copies
    pixels, C, native = x.rows * x.columns, x.C, converts(spec.conv.unit)
    source = source_of(x.half)
    even = pack_pairs(Pairs(pixels, C, C, PAIR, plane, source, native))
    odd = pack_pairs(Pairs(pixels - 1, C, C, PAIR, plane, source, native))
    number = x.number

    @inlined
    def pair(image: int, pairs: int) -> None:
        even(image, pairs)
        if copies == 2:
            odd(image + number * C, pairs + copy_bytes)

    return pair


def _weight_gradient(spec: ShiftedBackSpec) -> Callable[..., None]:
    """``dw (+)= dy^T x`` of a group: ``weights(dy, turned, pairs, dw, pixels, whether it is added, one)``."""
    depth, channels, wide, plane = spec.depth, spec.channels, spec.wide, spec.pairs * PAIR
    filters = -(-spec.conv.K // TILE) * TILE
    # For each 32 pixels, rows of 64 bytes one behind another: to the memory a block's tiles are two runs.
    turn = transpose(Transpose(DEPTH, wide, wide, DEPTH, LANES, "bf16", "bf16", converts(spec.conv.unit)))
    main, right = _tap_products(spec, BLOCK, BLOCK), _tap_products(spec, BLOCK, TILE)
    lower, corner = _tap_products(spec, TILE, BLOCK), _tap_products(spec, TILE, TILE)
    edge, bottom, done = channels % BLOCK, filters % BLOCK, release(spec.conv.unit)

    @inlined
    def weights(dy: int, turned: int, pairs: int, dw: int, pixels: int, adds: int, one: int) -> None:
        steps = (pixels + DEPTH - 1) // DEPTH
        for i in range(steps):
            turn(dy + BF16 * i * DEPTH * wide, turned + BF16 * i * DEPTH * wide)
        for c in range(0, channels * one, BLOCK):
            x = pairs + BF16 * c // TILE * plane
            for k in range(0, filters, BLOCK):
                slopes, place = turned + BF16 * k * DEPTH, dw + FLOAT * (k * depth + c)
                # What a layer of whole blocks does not need is not compiled: these are constants.
                if c + BLOCK <= channels:
                    if k + BLOCK <= filters:
                        main(slopes, x, place, adds, steps, one)
                    elif bottom:
                        lower(slopes, x, place, adds, steps, one)
                elif edge:
                    if k + BLOCK <= filters:
                        right(slopes, x, place, adds, steps, one)
                    elif bottom:
                        corner(slopes, x, place, adds, steps, one)
        done()

    return weights


def _tap_products(spec: ShiftedBackSpec, rows: int, columns: int) -> Callable[[int, int, int, int, int, int], None]:
    """The products of so many filters with so many channels of every tap: ``run(dy, x, dw, adds, steps, one)``."""
    conv, window, depth, channels = spec.conv, spec.conv.window, spec.depth, spec.channels
    shape = BlockGemm(
        unit=conv.unit,
        rows=rows,
        columns=columns,
        step=DEPTH,
        steps=1,
        a_row=DEPTH,
        a_step=0,
        a_segment=DEPTH * spec.wide,
        b_step=0,
        b_tile=spec.pairs * PAIR,
        b_segment=DEPTH // 2 * PAIR,
        c_row=depth,
        start="either",
    )
    begin, block = configure(shape), block_gemm(shape)
    R, S, pitch, corner, copy_bytes = window.R, window.S, conv.x.columns, spec.corner, spec.pairs_bytes
    dilation_h, dilation_w = window.dilation_h, window.dilation_w

    @inlined
    def run(left: int, right: int, dw: int, adds: int, steps: int, one: int) -> None:
        begin()
        for tap in range(R * S * one):
            pixel = corner + tap // S * dilation_h * pitch + tap % S * dilation_w
            source = right + pixel % 2 * copy_bytes + BF16 * (pixel // 2) * PAIR
            block(left, source, dw + FLOAT * tap * channels, adds, steps)

    return run
