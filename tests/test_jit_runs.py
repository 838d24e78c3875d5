"""Columns of planes, as they come out of registers: what is in them, and that nothing beyond their taps is read."""

import ctypes
import mmap

import numpy as np
import pytest
from numba import njit

from convolt.engines.jit.runs import DEPTH, LANES, ONE, Columns, columns

NONE = 0  # PROT_NONE, which the module mmap does not name
PITCH, PLANE = 40, 40 * 50
SIZES = [(5, 5, 1), (3, 3, 1), (3, 3, 3), (7, 7, 3), (5, 5, 3), (3, 3, 8), (4, 4, 2), (2, 2, 1), (9, 9, 1), (1, 11, 1)]


class Guarded:
    """Numbers of 16 bits with a page behind and one before them that nobody may read."""

    def __init__(self, numbers, at_end):
        size, page = numbers.nbytes, mmap.PAGESIZE
        room = -(-size // page) * page
        self._memory = mmap.mmap(-1, room + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._fences = base, base + page + room
        self.address = base + page + (room - size if at_end else 0)
        ctypes.memmove(self.address, numbers.ctypes.data, size)
        self._protect(NONE)

    def _protect(self, how):
        libc = ctypes.CDLL(None, use_errno=True)
        for fence in self._fences:
            assert libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(mmap.PAGESIZE), how) == 0

    def open(self):
        """Before the memory goes back."""
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_columns_are_the_taps_of_16_pixels(size, dilation):
    R, S, C = size
    taps = tuple(c * PLANE + r * dilation * PITCH + s * dilation for r in range(R) for s in range(S) for c in range(C))
    depth = -(-len(taps) // DEPTH) * DEPTH
    turned = columns(Columns(taps, depth))

    @njit
    def call(pixels, target):
        turned(pixels, target)

    numbers = np.arange(1, max(taps) + LANES + 1).astype(np.uint16)
    expected = np.full((LANES, depth), ONE, np.uint16)
    expected[:, : len(taps)] = numbers[np.arange(LANES)[:, None] + np.array(taps)]
    for at_end in (True, False):
        pixels, found = Guarded(numbers, at_end), np.full((LANES, depth), 7, np.uint16)
        call(pixels.address, found.ctypes.data)
        pixels.open()
        np.testing.assert_array_equal(found, expected)
