"""What this machine can do at most: the ceiling that every measured speed is held against.

Data sheets do not tell (clocks vary, hypervisors hide), so the figures are measured, on one core and on all threads,
by loops that do nothing else: fused multiply-adds, dot products or tile products on registers, and reads of memory that
no cache holds. ``convolt.engines.measured_peaks`` runs them. They are kept for one run of a benchmark and never on
disk: the next run may have other neighbors.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """A rate on one core and on all threads at once: GFLOP/s of arithmetic, GB/s of memory."""

    one_core: float
    all_threads: float


@dataclass(frozen=True)
class Peaks:
    """Peaks of products in float32 and bf16 (None: no instruction) and of reading memory, on ``threads`` threads."""

    threads: int
    fp32: Peak
    bf16: Peak | None
    memory: Peak

    def gflops(self, products: str) -> float | None:
        """The most GFLOP/s for products in this format, None where that was not measured.

        Where others hold a core, all threads together measure less than they can do; so it is never less than the
        figure of one core times their number.
        """
        held = {"fp32": self.fp32, "bf16": self.bf16}.get(products)
        return None if held is None else max(held.all_threads, self.threads * held.one_core)
