"""The machine's peaks, measured: multiply-adds and tile products on registers, reads that no cache can serve.

The kernels (``kernels/peaks.py``) run on the same team of threads as a training step. A peak is the *best* of many
short runs: whatever else the machine does can only lower a run, never raise it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.isa import Isa, Unit, detect, units
from convolt.engines.jit.plan import address_of
from convolt.engines.jit.runtime import Phase, Program, Team
from convolt.params import aligned_zeros
from convolt.peaks import Peak, Peaks

SUMS = 12  # independent chains: 2 multiply-adds a cycle, 4 cycles each, need 8; AVX2 has 16 registers
UNROLLED = 4
TILE_FLOPS = 2 * 16 * 16 * 32
BLOCK = 32  # rows and columns of a block of products
READ_FLOATS = 1 << 18  # of a chunk: 1 MiB
READ_CHUNKS = 256  # 256 MiB: beyond the caches
REPEATS, READ_REPEATS, PACE_REPEATS = 40, 8, 15
CHUNKS = 4  # for each thread, so that one that wakes up late takes fewer


@dataclass(frozen=True)
class MultiplyAdds:
    """``turns`` times UNROLLED multiply-adds, or dot products, into each of SUMS vectors."""

    lanes: int
    turns: int = 60_000
    dots: bool = False  # of pairs of bf16 numbers

    @property
    def flops(self) -> int:
        """FLOPs of a chunk."""
        return (4 if self.dots else 2) * self.lanes * SUMS * UNROLLED * self.turns


@dataclass(frozen=True)
class TileProducts:
    """``turns`` times UNROLLED products into each of four tiles."""

    turns: int = 12_000

    @property
    def flops(self) -> int:
        """FLOPs of a chunk."""
        return TILE_FLOPS * 4 * UNROLLED * self.turns


@dataclass(frozen=True)
class BlockProducts:
    """``turns`` products of 32 x ``depth`` by ``depth`` x 32 bf16 numbers by a unit, with operands in the L1 cache."""

    unit: Unit
    turns: int = 300
    depth: int = 128

    @property
    def flops(self) -> int:
        """FLOPs of a chunk."""
        return 2 * BLOCK * BLOCK * self.depth * self.turns


@dataclass(frozen=True)
class Reads:
    """A sum over READ_FLOATS floats that lie one behind the other."""

    lanes: int
    floats: int = READ_FLOATS


def measure(threads: int) -> Peaks:
    """All peaks, on one thread and on ``threads``; takes about two seconds."""
    isa = detect()
    compiler = Compiler(isa)
    single, team = Team(1, compiler), Team(threads, compiler)
    try:
        memory = aligned_zeros(READ_CHUNKS * READ_FLOATS, np.float32)
        memory.fill(1)  # pages that were never written share one page of zeros
        return Peaks(
            threads,
            fp32=Peak(*(_gflops(t, compiler, "multiply_adds", MultiplyAdds(isa.lanes)) for t in (single, team))),
            bf16=_bf16_peak(isa, compiler, single, team),
            memory=Peak(*(_gigabytes(t, compiler, Reads(isa.lanes), memory) for t in (single, team))),
        )
    finally:
        single.close()
        team.close()


class Pace:
    """How fast the cores are at the moment, of the fastest that was seen since this was made.

    Where a hypervisor lets another guest use the other half of a core, arithmetic takes half as long again, and neither
    the counters of processes nor the time that it took away show it.
    """

    def __init__(self, threads: int) -> None:
        compiler = Compiler(detect())
        self._team = Team(threads, compiler)
        spec = MultiplyAdds(detect().lanes)
        self._program = _program(compiler, "multiply_adds", spec, CHUNKS * threads, np.ones(1, np.float32))
        self._shortest = _shortest(self._team, self._program, REPEATS)

    def read(self) -> float:
        """Above 0, and 1 when the cores are as fast as ever; takes some twentieth of a second."""
        seconds = []
        for _ in range(PACE_REPEATS):
            start = time.perf_counter()
            self._team.run(self._program)
            seconds.append(time.perf_counter() - start)
        self._shortest = min(self._shortest, *seconds)
        return self._shortest / median(seconds)

    def close(self) -> None:
        """End the threads."""
        self._team.close()


def _bf16_peak(isa: Isa, compiler: Compiler, single: Team, team: Team) -> Peak | None:
    """Of the widest unit that is made for bf16; None without one."""
    match units(isa)[0]:
        case "amx":
            return Peak(*(_gflops(t, compiler, "tile_products", TileProducts()) for t in (single, team)))
        case "dot":
            spec = MultiplyAdds(isa.lanes, dots=True)
            return Peak(*(_gflops(t, compiler, "multiply_adds", spec) for t in (single, team)))
        case "fma":
            return None


def rates(isa: Isa, candidates: Sequence[Unit], repeats: int = 10) -> tuple[dict[Unit, float], float]:
    """GFLOP/s on one core: products of bf16 in the L1 cache by each unit, and the peak in float32.

    They take turns, ``repeats`` of under a millisecond, and the best of each counts.
    """
    compiler = Compiler(isa)
    team = Team(1, compiler)
    try:
        found, fp32 = dict.fromkeys(candidates, 0.0), 0.0
        operand = np.zeros(1, np.float32)
        for _ in range(repeats):
            for unit in candidates:
                one = BlockProducts(unit)
                operands = aligned_zeros(one.depth * BLOCK + BLOCK * BLOCK, np.float32)
                found[unit] = max(found[unit], _gflops(team, compiler, "block_products", one, operands, repeats=1))
            fp32 = max(fp32, _gflops(team, compiler, "multiply_adds", MultiplyAdds(isa.lanes, 10_000), operand, 1))
        return found, fp32
    finally:
        team.close()


def _gflops(
    team: Team,
    compiler: Compiler,
    kernel: str,
    spec: MultiplyAdds | TileProducts | BlockProducts,
    operand: Any = None,
    repeats: int = REPEATS,
) -> float:
    chunks = CHUNKS * team.threads
    program = _program(compiler, kernel, spec, chunks, np.ones(1, np.float32) if operand is None else operand)
    return chunks * spec.flops / _shortest(team, program, repeats) / 1e9


def _gigabytes(team: Team, compiler: Compiler, spec: Reads, memory: Any) -> float:
    program = _program(compiler, "reads", spec, READ_CHUNKS, memory)
    return memory.nbytes / _shortest(team, program, READ_REPEATS) / 1e9


def _program(compiler: Compiler, kernel: str, spec: Any, chunks: int, operand: Any) -> Program:
    """One phase of one kernel; its arguments are an operand and where each chunk leaves its sums."""
    made = compiler.kernel(f"convolt.engines.jit.kernels.peaks:{kernel}", spec)
    sums = aligned_zeros(chunks * 16, np.float32)
    arguments = np.array([address_of(operand), address_of(sums)], np.int64)
    return Program([Phase(kernel, ((made.address, address_of(arguments)),), chunks)], [made, arguments, operand, sums])


def _shortest(team: Team, program: Program, repeats: int) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        team.run(program)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
