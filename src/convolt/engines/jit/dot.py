"""The dot-product kernel: both operands contiguous along the sum, which is in float32.

    C[i, j] = start + sum over k < depth of A[i*a_row + k] * B[j*b_row + k]

The input gradient of a dense layer (dx = dy w^T), and its forward pass with weights [out, in], have this shape. Every
element has a vector of partial sums; they are added across lanes once, at the end. B may be bf16: a product with few
rows is bound by reading it. `depth` may be anything: the last vectors are masked. rows * columns accumulators lie in
registers: 5 x 5 on AVX-512, 3 x 4 on AVX2.
The order of the sum depends on `lanes`, not on the blocking.
"""

from dataclasses import dataclass
from typing import Any, Literal

from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.bf16 import Bf16Lanes, Source
from convolt.engines.jit.vectors import F32, I16, I64, Floats, carried_loop


@dataclass(frozen=True)
class Dot:
    """Sizes and strides in elements, all constants; columns <= lanes. `start` as in `Gemm`; b: the format of B."""

    rows: int
    columns: int
    depth: int
    a_row: int
    b_row: int
    c_row: int
    lanes: int
    start: Literal["zero", "load", "bias"] = "zero"
    relu: bool = False
    b: Source = "fp32"


def dot(spec: Dot) -> Any:
    """A function for kernels: ``kernel(a, b, c, bias)``, addresses as int64."""

    @intrinsic
    def kernel(typingctx: Any, a: Any, b: Any, c: Any, bias: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit(spec, Floats(builder, spec.lanes), *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return kernel


def _emit(spec: Dot, floats: Floats, a: Any, b: Any, c: Any, bias: Any) -> None:
    a, c, bias = (floats.pointer(address) for address in (a, c, bias))
    b = floats.builder.inttoptr(b, (F32 if spec.b == "fp32" else I16).as_pointer())
    numbers = Bf16Lanes(floats, native=False)  # widening is a shift everywhere

    def products(k: Any, sums: list[Any], used: int | None = None) -> list[Any]:
        count = spec.lanes if used is None else used
        right = [numbers.load_float(floats.at(b, j * spec.b_row, k), spec.b, count) for j in range(spec.columns)]
        following = []
        for i in range(spec.rows):
            left = floats.load(floats.at(a, i * spec.a_row, k), used)
            row = sums[i * spec.columns : (i + 1) * spec.columns]
            following += [floats.multiply_add(left, r, s) for r, s in zip(right, row, strict=True)]
        return following

    def step(i: Any, sums: list[Any]) -> list[Any]:
        return products(floats.builder.mul(i, I64(spec.lanes)), sums)

    steps, rest = divmod(spec.depth, spec.lanes)
    sums = carried_loop(floats.builder, I64(steps), [floats.zero] * (spec.rows * spec.columns), step)
    if rest:
        sums = products(steps * spec.lanes, sums, rest)
    for i in range(spec.rows):
        place = floats.at(c, i * spec.c_row)
        total = floats.sums(sums[i * spec.columns : (i + 1) * spec.columns])
        if spec.start != "zero":
            total = floats.builder.fadd(total, floats.load(place if spec.start == "load" else bias, spec.columns))
        floats.store(floats.relu(total) if spec.relu else total, place, spec.columns)
