"""The batch-reduce GEMM: one generator serves convolution forward and backward, and dense layers.

    C[m, j] = start + sum over s < segments, k < depth of  A[m*a_row + k*a_depth + s*a_segment]
                                                          * B[k*b_depth + s*b_segment + j]

One call computes a block of C that lies in registers: `rows` x ceil(`columns` / `lanes`) accumulators (Georganas et al.
2020, "Harnessing deep learning via a single building block"). Sizes and strides are constants of the compiled code, so
every operand is a base register plus a constant; with strides in registers the same kernel spills and runs at a third.
What the letters stand for:

                      A                   rows           depth                  segments
    conv forward      x [H, W, C]         pixels         S*C (contiguous)       R filter rows
    conv dw           x                   S*C, or a part pixels of one row      rows of the image
    dense             x [N, in]           samples        a block of inputs      1, or blocks

Each element sums in the same order (s, then k) with one accumulator, whatever the block or the vector width: every
blocking and every CPU with fused multiply-add gives the same bits.

With ``pairs`` an element of A and of B is two bf16 numbers, neighbors in depth, in the 32 bits of a float32, and a step
in depth adds both products by one instruction (AVX512-BF16): what serves float32 serves bf16 at twice the rate. The
strides of A then count bf16 numbers, for a pair may begin at any; all else counts pairs. C and its sums stay float32.

Columns that fill no more than half of the last vector of 16 lanes are half a vector: where 512 bits take two passes
through the adders they cost half as much, elsewhere the same.

B is read in whole vectors, so 64 bytes behind its end must be readable; C and bias are touched only where they exist.
"""

from dataclasses import dataclass
from typing import Any, Literal

from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.pair_products import dot_product
from convolt.engines.jit.vectors import F32, I16, I64, Floats, carried_loop

WIDEST = 16  # lanes
STRAIGHT_LINE = 512  # multiply-adds: a loop over depth that is no longer than this is unrolled whole


@dataclass(frozen=True)
class Gemm:
    """Sizes and strides in elements, all constants. `start`: zero, C as it is (load), or bias[columns].

    pairs: A and B are pairs of bf16 numbers, and strides of A count numbers; wants 16 lanes.
    """

    rows: int
    columns: int
    depth: int
    a_row: int
    a_depth: int
    a_segment: int
    b_depth: int
    b_segment: int
    c_row: int
    lanes: int
    start: Literal["zero", "load", "bias"] = "zero"
    relu: bool = False
    unroll: int = 4
    pairs: bool = False

    @property
    def a_number(self) -> int:
        """Bytes of what the strides of A count."""
        return 2 if self.pairs else 4

    @property
    def vectors(self) -> int:
        return -(-self.columns // self.lanes)


def gemm(spec: Gemm) -> Any:
    """A function for kernels: ``kernel(a, b, c, bias, segments)``, addresses and a count as int64."""

    @intrinsic
    def kernel(typingctx: Any, a: Any, b: Any, c: Any, bias: Any, segments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit(spec, Floats(builder, spec.lanes), *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return kernel


def _emit(spec: Gemm, floats: Floats, a: Any, b: Any, c: Any, bias: Any, segments: Any) -> None:
    a = floats.builder.inttoptr(a, (I16 if spec.pairs else F32).as_pointer())
    b, c, bias = (floats.pointer(address) for address in (b, c, bias))
    vectors = _vectors(spec, floats)
    used = [min(one.lanes, spec.columns - j * spec.lanes) for j, one in enumerate(vectors)]
    block = [(m, j) for m in range(spec.rows) for j in range(spec.vectors)]
    places = {(m, j): floats.at(c, m * spec.c_row + j * spec.lanes) for m, j in block}
    if spec.start == "load":
        start = [vectors[j].load(places[m, j], used[j]) for m, j in block]
    elif spec.start == "bias":
        row = [one.load(floats.at(bias, j * spec.lanes), used[j]) for j, one in enumerate(vectors)]
        start = [row[j] for m, j in block]
    else:
        start = [vectors[j].zero for m, j in block]

    def segment(s: Any, sums: list[Any]) -> list[Any]:
        offset = [floats.builder.mul(s, I64(stride)) for stride in (spec.a_segment, spec.b_segment)]
        return _over_depth(spec, vectors, floats.at(a, offset[0]), floats.at(b, offset[1]), sums)

    sums = carried_loop(floats.builder, segments, start, segment)
    for (m, j), value in zip(block, sums, strict=True):
        vectors[j].store(vectors[j].relu(value) if spec.relu else value, places[m, j], used[j])


def _vectors(spec: Gemm, floats: Floats) -> list[Floats]:
    """Those of a row of C."""
    last = spec.columns - (spec.vectors - 1) * spec.lanes
    half = spec.lanes == WIDEST and last <= WIDEST // 2
    return [floats] * (spec.vectors - 1) + [Floats(floats.builder, WIDEST // 2) if half else floats]


def _over_depth(spec: Gemm, vectors: list[Floats], a: Any, b: Any, sums: list[Any]) -> list[Any]:
    """Add the outer products of one segment."""
    floats = vectors[0]

    def outer_product(a: Any, b: Any, k: int, sums: list[Any]) -> list[Any]:
        weights = [one.load(floats.at(b, k * spec.b_depth + j * spec.lanes)) for j, one in enumerate(vectors)]
        floats.order_loads()
        following = []
        for m in range(spec.rows):
            pixel = floats.broadcast(floats.at(a, m * spec.a_row + k * spec.a_depth), spec.a_number)
            row = sums[m * spec.vectors : (m + 1) * spec.vectors]
            for one, w, c in zip(vectors, weights, row, strict=True):
                left = pixel if one.lanes == floats.lanes else floats.low_half(pixel)
                following.append(dot_product(one, left, w, c) if spec.pairs else one.multiply_add(left, w, c))
        return following

    def unrolled(i: Any, sums: list[Any]) -> list[Any]:
        a_i, b_i = (
            floats.at(x, floats.builder.mul(i, I64(spec.unroll * stride)))
            for x, stride in ((a, spec.a_depth), (b, spec.b_depth))
        )
        for k in range(spec.unroll):
            sums = outer_product(a_i, b_i, k, sums)
        return sums

    looped = spec.depth - spec.depth % spec.unroll
    if spec.depth * spec.rows * spec.vectors <= STRAIGHT_LINE:
        looped = 0
    if looped:
        sums = carried_loop(floats.builder, I64(looped // spec.unroll), sums, unrolled)
    for k in range(looped, spec.depth):
        sums = outer_product(a, b, k, sums)
    return sums
