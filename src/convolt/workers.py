"""A pool of threads that share out the tiles of one kernel.

NumPy and BLAS release the GIL, so plain threads are enough. Tiles are handed out one by one, not split in advance:
when another process takes one of the cores, the free core goes on with the next tile instead of waiting. Which worker
computes a tile never changes its result, so the thread count does not change the bits.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

Tile = TypeVar("Tile")


class Workers:
    """``count`` threads, the caller's included; with one, everything runs in the caller."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count - 1, thread_name_prefix="convolt") if count > 1 else None

    def each(self, tiles: Iterable[Tile], work: Callable[[int, Tile], None]) -> None:
        """Call ``work(worker, tile)`` for every tile; ``worker`` < count tells which scratch memory is free."""
        shared = iter(list(tiles))  # a list's iterator may be shared by threads: each next() is one atomic step

        def drain(worker: int) -> None:
            for tile in shared:
                work(worker, tile)

        others = []
        if self._pool is not None:  # with the caller's context, to which np.errstate belongs
            others = [self._pool.submit(copy_context().run, drain, worker) for worker in range(1, self.count)]
        try:
            drain(0)
        finally:
            for other in others:
                other.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
