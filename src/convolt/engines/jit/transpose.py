"""Transposes: x [rows, columns] -> y [columns, rows], squares of one vector's width in registers.

The gradient of a weight sums over pixels or samples; bf16 products want that index along the rows of the left operand,
and the dot-product kernel wants it contiguous. For bf16 two neighboring rows are taken as one row of 32-bit pairs.
"""

from dataclasses import dataclass
from typing import Any, Literal

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.bf16 import Bf16Lanes
from convolt.engines.jit.vectors import F32, I16, I32, I64, Floats, carried_loop, transposed


@dataclass(frozen=True)
class Transpose:
    """Strides in elements. Formats of x and y: fp32 to fp32, or fp32 or bf16 to bf16.

    For bf16 an odd number of rows is filled up with a zero: y is written in pairs. native: the CPU converts to bf16.
    """

    rows: int
    columns: int
    x_row: int
    y_row: int
    lanes: int
    x: Literal["fp32", "bf16"] = "fp32"
    y: Literal["fp32", "bf16"] = "fp32"
    native: bool = False


def transpose(spec: Transpose) -> Any:
    """A function for kernels: ``kernel(x, y)``, addresses as int64."""

    @intrinsic
    def kernel(typingctx: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit(spec, Floats(builder, spec.lanes), *args)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return kernel


def _emit(spec: Transpose, floats: Floats, x: Any, y: Any) -> None:
    builder = floats.builder
    x = builder.inttoptr(x, (F32 if spec.x == "fp32" else I16).as_pointer())
    y = builder.inttoptr(y, (F32 if spec.y == "fp32" else I16).as_pointer())
    high = floats.lanes * (2 if spec.y == "bf16" else 1)

    def across(row: Any, rows: int) -> None:
        """Transpose `rows` rows, all columns."""

        def step(j: Any, nothing: list[Any]) -> list[Any]:
            _square(spec, floats, x, y, row, rows, builder.mul(j, I64(floats.lanes)), floats.lanes)
            return []

        whole, rest = divmod(spec.columns, floats.lanes)
        carried_loop(builder, I64(whole), [], step)
        if rest:
            _square(spec, floats, x, y, row, rows, I64(whole * floats.lanes), rest)

    def down(i: Any, nothing: list[Any]) -> list[Any]:
        across(builder.mul(i, I64(high)), high)
        return []

    whole, rest = divmod(spec.rows, high)
    carried_loop(builder, I64(whole), [], down)
    if rest:
        across(I64(whole * high), rest)


def _square(spec: Transpose, floats: Floats, x: Any, y: Any, row: Any, rows: int, column: Any, columns: int) -> None:
    """Transpose the block at (row, column), at most one vector of columns by one vector of rows or of pairs of rows."""
    builder = floats.builder
    corner = floats.at(x, builder.mul(row, I64(spec.x_row)), column)
    target = floats.at(y, builder.mul(column, I64(spec.y_row)), row)
    places = [floats.at(corner, m * spec.x_row) for m in range(rows)]
    if spec.y == "fp32":
        lines = [floats.load(place, columns) for place in places]
        lines += [floats.zero] * (floats.lanes - rows)
        used = rows
    else:
        numbers = Bf16Lanes(floats, spec.native)
        halves = [numbers.load(place, spec.x, columns) for place in places]
        zero = ir.Constant(ir.VectorType(I32, floats.lanes), [I32(0)] * floats.lanes)
        halves += [zero] * (2 * floats.lanes - rows)
        lines = [numbers.pair(*halves[m : m + 2]) for m in range(0, len(halves), 2)]
        used = -(-rows // 2)
    for j, line in enumerate(transposed(builder, lines)[:columns]):
        floats.store(line, floats.at(target, j * spec.y_row), used)
