"""Kernels that do nothing but reach a peak: arithmetic on registers alone, reads of memory alone.

Each leaves a sum in memory, so that LLVM cannot drop the work; without fast-math it may not reorder it either.
"""

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.amx import Tiles
from convolt.engines.jit.blocks import BlockGemm, block_gemm, configure, release
from convolt.engines.jit.pair_products import dot_product
from convolt.engines.jit.peaks import BLOCK, SUMS, UNROLLED, BlockProducts, MultiplyAdds, Reads, TileProducts
from convolt.engines.jit.vectors import I64, Floats, carried_loop

LINE = 64  # bytes of the sums of a chunk
FULL_TILES = BlockGemm("amx", 32, 32, 32, 1, 32, 0, 0, 0, 0, 0, 32)


def multiply_adds(spec: MultiplyAdds) -> Callable[..., None]:
    """``sum_i = x x + sum_i`` for SUMS vectors; x is the operand, a float32 number or a pair of bf16 ones."""

    @intrinsic
    def chains(typingctx: Any, operand: Any, result: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, spec.lanes)
            x = floats.broadcast(floats.pointer(args[0]))

            def turn(i: Any, sums: list[Any]) -> list[Any]:
                for _ in range(UNROLLED):
                    if spec.dots:
                        sums = [dot_product(floats, x, x, c) for c in sums]
                    else:
                        sums = [floats.multiply_add(x, x, c) for c in sums]
                return sums

            _store_sum(floats, carried_loop(builder, I64(spec.turns), [floats.zero] * SUMS, turn), args[1])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    def kernel(arguments: Any, chunk: Any, thread: Any) -> None:
        chains(arguments[0], arguments[1] + chunk * LINE)

    return kernel


def tile_products(spec: TileProducts) -> Callable[..., None]:
    """``C_ij += A_i B_j`` for two by two tiles, all of them zero; tiles 0-3 are C, 4 and 5 A, 6 and 7 B."""
    shape_tiles, done = configure(FULL_TILES), release("amx")

    @intrinsic
    def products(typingctx: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            tiles = Tiles(builder)
            for tile in range(8):
                tiles.zero(tile)

            def turn(i: Any, nothing: list[Any]) -> list[Any]:
                for _ in range(UNROLLED):
                    for c in range(4):
                        tiles.multiply_add(c, 4 + c // 2, 6 + c % 2)
                return []

            carried_loop(builder, I64(spec.turns), [], turn)
            return context.get_dummy_value()

        return types.void(), generate

    def kernel(arguments: Any, chunk: Any, thread: Any) -> None:
        shape_tiles()
        products()
        done()

    return kernel


def block_products(spec: BlockProducts) -> Callable[..., None]:
    """C = A B again and again, all of them in the L1 cache; arguments: A, B packed and C behind it; nothing read."""
    depth, turns = spec.depth, spec.turns
    packed = depth * BLOCK
    shape = BlockGemm(
        spec.unit, BLOCK, BLOCK, BLOCK, depth // BLOCK, depth, BLOCK, 0, BLOCK * BLOCK, BLOCK * BLOCK // 2, 0, BLOCK
    )
    begin, product, done = configure(shape), block_gemm(shape), release(spec.unit)

    def kernel(arguments: Any, chunk: Any, thread: Any) -> None:
        begin()
        for _ in range(turns):
            product(arguments[0], arguments[0] + 2 * packed, arguments[0] + 4 * packed, 0, 1)
        done()

    return kernel


def reads(spec: Reads) -> Callable[..., None]:
    """The sum of the chunk's floats, in SUMS vectors at a time; the rest that is no multiple of them is left out."""
    size = spec.floats * 4
    step = SUMS * spec.lanes

    @intrinsic
    def stream(typingctx: Any, source: Any, result: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = Floats(builder, spec.lanes)
            start = floats.pointer(args[0])

            def turn(i: Any, sums: list[Any]) -> list[Any]:
                at = floats.at(start, builder.mul(i, I64(step)))
                return [builder.fadd(c, floats.load(floats.at(at, j * spec.lanes))) for j, c in enumerate(sums)]

            _store_sum(floats, carried_loop(builder, I64(spec.floats // step), [floats.zero] * SUMS, turn), args[1])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    def kernel(arguments: Any, chunk: Any, thread: Any) -> None:
        stream(arguments[0] + chunk * size, arguments[1] + chunk * LINE)

    return kernel


def _store_sum(floats: Floats, sums: list[Any], address: Any) -> None:
    total = sums[0]
    for c in sums[1:]:
        total = floats.builder.fadd(total, c)
    floats.store(total, floats.pointer(address))
