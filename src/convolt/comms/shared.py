"""Sums through memory that the ranks of one machine share: each rank adds up one part for all, in the order of ranks.

Every rank has a row with three places as long as the array. Into the first it copies what others will add (what it
adds itself stays where it is), and after a barrier it adds its own part of everybody's. What a rank gives to all goes
through the other two in turn: while a slow rank still reads one, a fast one writes the other, and it cannot be two
ahead, for there is a barrier between. So two barriers a step are enough, and every element has one owner: the bits are
the same on all ranks and from run to run.

A gradient that lies in a `Home` is read where it is, and so are weights: two copies less. Nothing stands between such
weights and their owner's next word about them, so nobody goes on before all have read: one barrier more.
"""

from collections.abc import Callable, Sequence

import numpy as np

from convolt.comms import Array, Home, part_of

WIDEST = 8  # bytes of a number
BLOCK = 1 << 16  # elements added at a time: the sum stays in the cache while ranks are added to it


class SharedSum:
    """The summation of one array through shared memory: ``rows`` of bytes, one a rank, as long as `row_bytes` says.

    home: in which the array is the gradient. Nothing is gained by adding early: a copy takes the core's time whenever
    it is made.
    """

    early = False

    def __init__(
        self,
        array: Array,
        rows: list[Array],
        rank: int,
        scattered: bool,
        meet: Callable[[], None],
        home: Home | None = None,
    ) -> None:
        self._array, self._rows, self._rank, self._meet, self._home = array, rows, rank, meet, home
        self._slots = self._place(0, array) if home is None else home.gradients
        self._turn = 1
        self._partial = np.empty(BLOCK, array.dtype)
        self._parts = [part_of(array.size, each, len(rows)) for each in range(len(rows))]
        self._mine = self._parts[rank]
        self.scattered = scattered
        self.own = self._mine if scattered else slice(0, array.size)

    def add(self, part: slice) -> None:
        """Copy what others will add, unless they find it where it is."""
        if self._home is not None:
            return
        before = slice(part.start, min(part.stop, self._mine.start))
        behind = slice(max(part.start, self._mine.stop), part.stop)
        for piece in (before, behind):
            if piece.start < piece.stop:
                self._slots[self._rank][piece] = self._array[piece]

    def finish(self) -> None:
        """Add the own part of every rank's; then collect the others', unless the sum stays scattered."""
        self._meet()
        places = [self._array if rank == self._rank else slot for rank, slot in enumerate(self._slots)]
        for start in range(self._mine.start, self._mine.stop, BLOCK):
            block = slice(start, min(start + BLOCK, self._mine.stop))
            total, *others = (place[block] for place in places)
            for left, term in zip(reversed(range(len(others))), others, strict=True):
                total = np.add(total, term, out=self._partial[: len(term)] if left else self._array[block])
        if not self.scattered:
            self.share(self._array)

    def share(self, array: Array) -> None:
        """Own parts out, a barrier, the others' in; of weights at home the others' in between two barriers."""
        at_home = self._home is not None and array is self._home.weights
        if self._home is not None and at_home:
            slots: Sequence[Array] = self._home.all_weights
        else:
            slots = self._place(self._turn, array)
            self._turn = 3 - self._turn
            slots[self._rank][self._mine] = array[self._mine]
        self._meet()
        for rank, part in enumerate(self._parts):
            if rank != self._rank:
                array[part] = slots[rank][part]
        if at_home:
            self._meet()

    def _place(self, number: int, array: Array) -> tuple[Array, ...]:
        """One of the places in every row, as numbers of the array's type."""
        return places(self._rows, array, number * WIDEST * array.size)


def places(rows: Sequence[Array], array: Array, start: int = 0) -> tuple[Array, ...]:
    """In each of these rows of bytes, ``start`` bytes from its beginning, an array like this one."""
    return tuple(row[start : start + array.nbytes].view(array.dtype) for row in rows)


def row_bytes(array: Array) -> int:
    """What a rank's row takes for the sum of this array, and for sharing arrays of its length and any type."""
    return 3 * WIDEST * array.size
