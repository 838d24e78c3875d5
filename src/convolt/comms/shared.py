"""Sums through memory that the ranks of one machine share: each rank adds up one part for all, in the order of ranks.

Every rank has a slot as long as the array. It copies what others will add into its slot (what it adds itself stays
where it is), and after a barrier adds its own part of everybody's. The result goes the same way back: to the own part
of the own slot, which nobody else writes, and after a second barrier everyone reads there. So nothing is written that
somebody may still read, two barriers a step are enough, and every element has one owner: the bits are the same on all
ranks and from run to run.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from convolt.comms import Array, part_of

BLOCK = 1 << 16  # elements added at a time: the sum stays in the cache while ranks are added to it


class SharedSum:
    """The summation of one array through shared memory: ``rows`` of bytes, one a rank, 8 bytes an element."""

    def __init__(self, array: Array, rows: list[Array], rank: int, scattered: bool, meet: Callable[[], None]) -> None:
        self._array, self._rows, self._rank, self._meet = array, rows, rank, meet
        self._slots = self._of_type(array)
        self._parts = [part_of(array.size, each, len(rows)) for each in range(len(rows))]
        self._mine = self._parts[rank]
        self._scattered = scattered
        self.own = self._mine if scattered else slice(0, array.size)

    def add(self, part: slice) -> None:
        """Copy what others will add."""
        before = slice(part.start, min(part.stop, self._mine.start))
        behind = slice(max(part.start, self._mine.stop), part.stop)
        for piece in (before, behind):
            if piece.start < piece.stop:
                self._slots[self._rank][piece] = self._array[piece]

    def finish(self) -> None:
        """Add the own part of every rank's; then collect the others', unless the sum stays scattered."""
        self._meet()
        for start in range(self._mine.start, self._mine.stop, BLOCK):
            block = slice(start, min(start + BLOCK, self._mine.stop))
            total: Any = None
            for rank, slot in enumerate(self._slots):
                term = self._array[block] if rank == self._rank else slot[block]
                total = term if total is None else np.add(total, term)
            self._array[block] = total
        if not self._scattered:
            self.share(self._array)

    def share(self, array: Array) -> None:
        """Own parts out, a barrier, the others' in."""
        slots = self._of_type(array)
        slots[self._rank][self._mine] = array[self._mine]
        self._meet()
        for rank, part in enumerate(self._parts):
            if rank != self._rank:
                array[part] = slots[rank][part]

    def _of_type(self, array: Array) -> list[Array]:
        """The rows as numbers of the array's type; its own part begins elsewhere in a row of another width."""
        return [row.view(array.dtype)[: array.size] for row in self._rows]
