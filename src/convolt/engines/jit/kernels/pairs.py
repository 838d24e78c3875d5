"""How bf16 pairs lie for a convolution tap by tap, so that the products of ``conv`` are twice as many as in float32.

A word of 32 bits holds two neighbors along the sum, and takes the place of a float32 number (``gemm``):

    forward    two channels:  x rounded as it lies; where they are odd in number a tap's last one goes with the next
                              tap's first, and a filter row's last one with a number whose filter is zero
    dx         two filters:   the framed dy in the same way
    dw         two pixels:    x[q] and x[q + stride] for every q, so that each tap finds its pairs as it would find
                              pixels; dy[q] and dy[q + 1] for every other q, with a zero behind an odd row's end

A number whose filter is zero must be finite: next to an infinite one, of which nothing should come, an output is NaN.

Images are rounded one by one, into scratch memory that stays in the cache if they are small. Sums, dx and dw are
float32.

Bytes: x (forward), dy (dx) or both (dw) are read once more in float32; of each of their numbers 2 bytes are written, 4
of x for dw.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from convolt.engines.jit.bf16 import pair_up, to_bf16
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.kernels.residues import slope_frame
from convolt.engines.jit.kernels.specs import BF16, FLOAT, WORDS_APART, ConvSpec, round_up
from convolt.engines.jit.memory import view


@dataclass(frozen=True)
class BehindFrame:
    """Where pairs lie behind the framed dy of an image, in words of 32 bits: dy rounded, and pixels of x and of dy."""

    rounded: int
    inputs: int
    slopes: int

    @classmethod
    def of(cls, spec: ConvSpec) -> "BehindFrame":
        """All on cache lines; ``ConvSpec.scratch`` has room for them."""
        frame = slope_frame(spec).size
        rounded = round_up(frame, WORDS_APART)
        inputs = rounded + round_up(frame // 2 + 1, WORDS_APART)
        return cls(rounded, inputs, inputs + round_up(spec.x.size, WORDS_APART))


def rounded(count: int, lanes: int) -> Callable[[int, int], None]:
    """``run(x, y)`` rounds so many numbers, and puts a zero behind them: a last pair may reach that far."""
    convert = to_bf16(count, lanes, True)

    @inlined
    def run(x: int, y: int) -> None:
        convert(x, y)
        view(y + BF16 * count, (1,), np.uint16)[:] = np.uint16(0)

    found: Callable[[int, int], None] = run
    return found


def pixel_pairs(spec: ConvSpec) -> Callable[[int, int], None]:
    """``lay(x, dy)`` puts pairs of pixels behind the framed dy of an image."""
    frame, places, K, P, Q, lanes = slope_frame(spec), BehindFrame.of(spec), spec.K, spec.P, spec.Q, spec.lanes
    apart = spec.window.stride_w * spec.x.C
    both = max(0, spec.x.size - apart)  # of x's numbers; nothing of the image lies a stride behind the others
    inputs, last_inputs = pair_up(both, apart, lanes), pair_up(spec.x.size - both, 0, lanes)
    slopes, last_slopes = pair_up(K, K, lanes), pair_up(K, 0, lanes)
    depth, whole, origin, pitch = -(-Q // 2), Q // 2, frame.origin, frame.pitch
    inputs_at, slopes_at = places.inputs, places.slopes

    @inlined
    def lay(x: int, dy: int) -> None:
        target = dy + FLOAT * inputs_at
        inputs(x, target)
        last_inputs(x + FLOAT * both, target + FLOAT * both)
        for p in range(P):
            row, pairs = dy + FLOAT * (origin + p * pitch), dy + FLOAT * (slopes_at + p * depth * K)
            for q in range(whole):
                slopes(row + FLOAT * 2 * q * K, pairs + FLOAT * q * K)
            if whole < depth:
                last_slopes(row + FLOAT * 2 * whole * K, pairs + FLOAT * whole * K)

    found: Callable[[int, int], None] = lay
    return found
