"""The memory of a plan: buffers that have a name and a size first, and a place later.

Kernels are given addresses, but where a buffer lies is decided when all tasks are known: buffers that are never live at
the same time share memory. A task is live from start to end of its phase, a buffer from its first task to its last.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convolt.params import ALIGNMENT, aligned_zeros

Array = NDArray[Any]
SCRATCH = "scratch"
"""The name of the buffers that hold nothing from one kernel to the next."""
SLACK = 32  # elements behind a buffer that a vector may read

#: What ``memory`` calls a buffer whose name begins so; all others are workspaces.
KINDS = {
    "value ": "activations",
    "mask ": "activations",
    "slope ": "slopes",
    "codes ": "codes",
    "filters ": "packed weights",
    "turned filters ": "packed weights",
    "bf16 weights ": "packed weights",
}
WORKSPACES = "workspaces"
#: Slopes, parts of gradients and activations that are made twice.
SHORT_LIVED = "slopes and others in shared memory"
#: Written before they are read, whatever was there: these may share memory.
SHARED = ("slope ", "parts of ")


@dataclass(eq=False)
class Buffer:
    """Memory that kernels know by address. array: None until it has a place. short_lived: it need not keep anything."""

    name: str
    size: int
    dtype: Any
    array: Array | None = None
    short_lived: bool = False

    @property
    def shares(self) -> bool:
        """Whether its memory may be another's before and after: whoever writes first does not look."""
        return self.array is None and (self.short_lived or self.name.startswith(SHARED))

    @property
    def nbytes(self) -> int:
        """With the slack behind it, in whole cache lines."""
        bytes_needed = (self.size + SLACK) * np.dtype(self.dtype).itemsize
        return -(-bytes_needed // ALIGNMENT) * ALIGNMENT

    @property
    def kind(self) -> str:
        """What it is for."""
        return next((kind for prefix, kind in KINDS.items() if self.name.startswith(prefix)), WORKSPACES)

    def allocate(self) -> Array:
        """Its own memory, zeros at first; nothing happens if it has a place already."""
        if self.array is None:
            self.array = aligned_zeros(self.size + SLACK, self.dtype)
        return self.array


@dataclass(frozen=True)
class Address:
    """A place in a buffer, ``offset`` bytes from its start."""

    buffer: Buffer
    offset: int = 0

    def __add__(self, offset: int) -> "Address":
        return Address(self.buffer, self.offset + offset)

    def resolve(self) -> int:
        """The address, once the buffer has a place; one that has none yet gets its own."""
        return int(self.buffer.allocate().ctypes.data) + self.offset


Lifetime = tuple[int, int]  # first and last phase


def lifetimes(phases: Iterable[Iterable[Buffer]]) -> dict[Buffer, Lifetime]:
    """The first and the last phase in which each buffer is used."""
    found: dict[Buffer, Lifetime] = {}
    for number, buffers in enumerate(phases):
        for buffer in buffers:
            found[buffer] = found.get(buffer, (number, number))[0], number
    return found


def share(orders: Sequence[Mapping[Buffer, Lifetime]]) -> Array:
    """Give the buffers that share places in one array, such that those that overlap in any order lie apart.

    orders: lifetimes in each order in which the phases may run. Largest first, each at the lowest place that is free.
    """
    buffers = [one for one in dict.fromkeys(chain.from_iterable(orders)) if one.shares]
    placed: list[tuple[Buffer, int]] = []
    for buffer in sorted(buffers, key=lambda one: -one.nbytes):
        start = 0
        for other, place in sorted(placed, key=lambda pair: pair[1]):
            meets = any(_meet(lives.get(buffer), lives.get(other)) for lives in orders)
            if meets and place < start + buffer.nbytes and start < place + other.nbytes:
                start = place + other.nbytes
        placed.append((buffer, start))
    arena = aligned_zeros(max((start + one.nbytes for one, start in placed), default=0), np.uint8)
    for buffer, start in placed:
        end = start + (buffer.size + SLACK) * np.dtype(buffer.dtype).itemsize
        buffer.array = arena[start:end].view(buffer.dtype)
    return arena


def _meet(one: Lifetime | None, other: Lifetime | None) -> bool:
    return one is not None and other is not None and one[0] <= other[1] and other[0] <= one[1]
