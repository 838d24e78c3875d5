"""Which block of C a GEMM kernel holds in registers.

A block of `rows` x `vectors` costs, for each step in depth, the largest of three times (in cycles): its multiply-adds,
two in a cycle; its loads (a broadcast for each row, a vector of B for each of `vectors`), of which 1.5 in a cycle were
measured; and four cycles, the latency of one multiply-add. The best block is the one that covers the whole of C at the
least cost; on nine shapes and two instruction sets it came within the noise of the best block that was measured. Two
registers more than the block needs must stay free where there are many of them, or LLVM spills.
"""

from convolt.engines.jit.isa import Isa

MOST_VECTORS = 4
OVERHEAD = 0.7  # cycles for each step of a block: fitted to the measurements


def blocking(rows: int, columns: int, isa: Isa) -> tuple[int, int]:
    """The block (rows, vectors) for C [rows, columns]; `parts` cuts the rows into equal blocks of at most that size."""
    whole = -(-columns // isa.lanes)

    def cost(block: tuple[int, int]) -> tuple[float, int, int]:
        row_parts, vector_parts = parts(rows, block[0]), parts(whole, block[1])
        cycles = sum(_cycles(m, v) for m in row_parts for v in vector_parts)
        return cycles, len(set(row_parts)) * len(set(vector_parts)), len(row_parts) * len(vector_parts)

    candidates = [
        (max(parts(rows, m)), max(parts(whole, v)))
        for v in range(1, MOST_VECTORS + 1)
        for m in range(1, _most_rows(v, isa.registers) + 1)
    ]
    return min(candidates, key=cost)


def parts(total: int, most: int) -> tuple[int, ...]:
    """`total` as the fewest sizes of at most `most`, equal but for one, larger ones first: (28, 10) -> 10, 9, 9."""
    count = -(-total // most)
    size, larger = divmod(total, count)
    return (size + 1,) * larger + (size,) * (count - larger)


def _most_rows(vectors: int, registers: int) -> int:
    """Accumulators, B's vectors, one pixel and, where there are many registers, two to spare."""
    spare = 2 if registers > 16 else 0
    return (registers - vectors - 1 - spare) // vectors


def _cycles(rows: int, vectors: int) -> float:
    return max(rows * vectors / 2, (rows + vectors) / 1.5, 4.0) + OVERHEAD
