"""Convolution tap by tap in bf16: the products of ``conv`` on pairs of numbers, two for each one of float32.

A word of 32 bits holds two neighbors along the sum, and takes the place of a float32 number (``gemm``):

    forward    two channels:  x rounded as it lies; where they are odd in number a tap's last one goes with the next
                              tap's first, and a filter row's last one with a number whose filter is zero
    dx         two filters:   the framed dy in the same way
    dw         two pixels:    x[q] and x[q + stride] for every q, so that each tap finds its pairs as it would find
                              pixels; dy[q] and dy[q + 1] for every other q, with a zero behind an odd row's end

Images are rounded one by one, into scratch memory that stays in the L2 cache. Sums, dx and dw are float32.

Cost: 2 K C/groups R S P Q FLOPs for each image and each of the three, two to a word; bytes: x and dy are read once more
in float32, and 2 (forward) or 4 (dw) bytes of each number written.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from convolt.engines.jit.bf16 import pair_up, to_bf16
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.kernels.conv import forward_block, input_part, spread_slopes, weight_product
from convolt.engines.jit.kernels.conv_calls import in_turn
from convolt.engines.jit.kernels.residues import covers, parts, slope_frame
from convolt.engines.jit.kernels.specs import BF16, FLOAT, VECTORS, WORDS_APART, ConvSpec, round_up
from convolt.engines.jit.memory import view


def conv_forward(spec: ConvSpec) -> Callable[..., None]:
    """``y = pool(act(w * x + b))``; arguments: state, x, packed filters, bias, y, codes, scratch.

    Filters are packed (groups, depth, columns, 2) as ``residues.packed_taps`` tells. A chunk is a run of images.
    """
    block = VECTORS * spec.lanes
    whole, rest = divmod(spec.filters, block)
    full, tail = forward_block(spec, block), forward_block(spec, rest or block)
    images, groups, rows, x_size = spec.images, spec.groups, spec.P // spec.pool[0], spec.x.size
    rounded, scratch_size, begin = to_bf16(x_size, spec.lanes, True), spec.scratch, spec.pooled_rows

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        x = arguments[6] + FLOAT * (thread * scratch_size + begin)
        view(x + BF16 * x_size, (1,), np.uint16)[:] = np.uint16(0)
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            rounded(arguments[1] + FLOAT * image * x_size, x)
            for group in range(groups):
                if whole:
                    for j in range(whole):
                        full(arguments, x, image, 0, rows, thread, group, j * block)
                if rest:
                    tail(arguments, x, image, 0, rows, thread, group, whole * block)

    return kernel


def conv_backward(spec: ConvSpec) -> Callable[..., None]:
    """dx, and this chunk's part of dw and db, one image after another; the arguments of ``conv.conv_backward``.

    Turned filters are packed as those of ``conv_forward``.
    """
    frame, spread = slope_frame(spec), spread_slopes(spec)
    weights, rounded = _weight_gradient(spec), to_bf16(frame.size, spec.lanes, True)
    inputs = in_turn(tuple(input_part(spec, part) for part in parts(spec))) if spec.wants_dx else _no_gradient
    wants_dx, images, scratch_size = spec.wants_dx, spec.images, spec.scratch
    bias, K, part = spec.bias, spec.K, spec.window.R * spec.window.S * spec.channels * spec.K
    x_size, bare, frame_size, frame_at = spec.x.size, spec.x.H * spec.x.W * spec.x.C, frame.size, spec.pooled_rows
    words_at = round_up(frame_size, WORDS_APART)
    pairs_at = words_at + round_up(frame_size // 2 + 1, WORDS_APART)
    gaps = wants_dx and not spec.add and not covers(spec)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        dw, db = arguments[7] + FLOAT * chunk * part, arguments[8] + FLOAT * chunk * K
        view(dw, (part,), np.float32)[:] = np.float32(0)
        if bias:
            view(db, (K,), np.float32)[:] = np.float32(0)
        dy = arguments[9] + FLOAT * (thread * scratch_size + frame_at)
        view(dy, (frame_size,), np.float32)[:] = np.float32(0)
        words = dy + FLOAT * words_at
        view(words + BF16 * frame_size, (1,), np.uint16)[:] = np.uint16(0)
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            spread(arguments, image, dy, db)
            weights(arguments[1] + FLOAT * image * x_size, dy, dy + FLOAT * pairs_at, dw)
            if gaps:
                view(arguments[6] + FLOAT * image * bare, (bare,), np.float32)[:] = np.float32(0)
            if wants_dx:
                rounded(dy, words)
                inputs(words, arguments[2], arguments[6] + FLOAT * image * bare)

    return kernel


@inlined
def _no_gradient(dy: int, filters: int, dx: int) -> None:
    """Of images that nobody needs a gradient of."""


def _weight_gradient(spec: ConvSpec) -> Callable[[int, int, int, int], None]:
    """``dw += x dy`` of an image, in pairs of pixels: ``weights(x, framed dy, scratch, dw)``."""
    frame, K, P, Q, lanes = slope_frame(spec), spec.K, spec.P, spec.Q, spec.lanes
    depth, apart = -(-Q // 2), spec.window.stride_w * spec.x.C
    both = max(0, spec.x.size - apart)  # of x's numbers; nothing of the image lies a stride behind the others
    inputs, last_inputs = pair_up(both, apart, lanes), pair_up(spec.x.size - both, 0, lanes)
    slopes, last_slopes = pair_up(K, K, lanes), pair_up(K, 0, lanes)
    product = weight_product(spec, depth * K)
    slopes_at, origin, pitch = round_up(spec.x.size, WORDS_APART), frame.origin, frame.pitch
    whole, odd = Q // 2, Q % 2 == 1

    @inlined
    def weights(x: int, dy: int, scratch: int, dw: int) -> None:
        inputs(x, scratch)
        last_inputs(x + FLOAT * both, scratch + FLOAT * both)
        pairs = scratch + FLOAT * slopes_at
        for p in range(P):
            row, target = dy + FLOAT * (origin + p * pitch), pairs + FLOAT * p * depth * K
            for q in range(whole):
                slopes(row + FLOAT * 2 * q * K, target + FLOAT * q * K)
            if odd:
                last_slopes(row + FLOAT * 2 * whole * K, target + FLOAT * whole * K)
        product(scratch, pairs, dw)

    found: Callable[[int, int, int, int], None] = weights
    return found
