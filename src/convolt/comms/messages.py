"""Sums by messages between machines, in buckets that leave while backward goes on.

A bucket is a run of the array, taken from its end, as backward makes gradients last layer first; it leaves when all of
it is final and those before it have left, so every rank sends the same buckets in the same order. Each rank gets its
own part of a bucket from all others (an all-to-all), adds in the order of ranks, and gives the sum back to all (an
all-gather): 2 (p - 1)/p n bytes a rank, as a ring does, and the same bits on all ranks as through shared memory.

In bf16 a number takes two bytes on the wire (rounded to nearest even) and is added in float32; the sum is rounded once
more for its way back.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from convolt.comms import Array, part_of

BUCKET = 1 << 18  # elements; a megabyte of float32 takes a 10 Gb/s network about as long as one layer's backward


class BucketSum:
    """The summation of one array by non-blocking messages.

    start_all_to_all(sent, counts, received, counts) and start_all_gather(array, counts) begin one and return what
    ``wait`` waits for; ``progress`` lets those under way go on.
    """

    early = True

    def __init__(
        self,
        array: Array,
        rank: int,
        size: int,
        scattered: bool,
        half: bool,
        start_all_to_all: Callable[[Array, list[int], Array, list[int]], Any],
        start_all_gather: Callable[[Array, list[int]], Any],
        wait: Callable[[Any], None],
        progress: Callable[[], object],
    ) -> None:
        self._array, self._rank, self._size = array, rank, size
        self.scattered, self._half = scattered, half and array.dtype == np.float32
        self._all_to_all, self._all_gather = start_all_to_all, start_all_gather
        self._wait, self._progress = wait, progress
        self._parts = [part_of(array.size, each, size) for each in range(size)]
        self._mine = self._parts[rank]
        self.own = self._mine if scattered else slice(0, array.size)
        stops = range(array.size, 0, -BUCKET)
        self._buckets = [slice(max(0, stop - BUCKET), stop) for stop in stops]
        self._missing = [bucket.stop - bucket.start for bucket in self._buckets]
        self._sent: list[tuple[slice, Array, Array, Any]] = []

    def add(self, part: slice) -> None:
        """Count what is final; send every bucket whose turn it is."""
        for number, bucket in enumerate(self._buckets):
            self._missing[number] -= max(0, min(part.stop, bucket.stop) - max(part.start, bucket.start))
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send(self._buckets[len(self._sent)])
        self._progress()

    def finish(self) -> None:
        """Wait for every bucket and add; then give the sums to all, unless they stay scattered."""
        for mine, _, received, request in self._sent:
            self._wait(request)
            terms = from_bf16(received) if self._half else received
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            self._array[mine] = total
        self._missing = [bucket.stop - bucket.start for bucket in self._buckets]
        self._sent = []
        if not self.scattered:
            self._share_sums()

    def share(self, array: Array) -> None:
        """One all-gather in place."""
        self._wait(self._all_gather(array, [part.stop - part.start for part in self._parts]))

    def _share_sums(self) -> None:
        if not self._half:
            self.share(self._array)
            return
        short = np.zeros(self._array.size, np.uint16)
        short[self._mine] = to_bf16(self._array[self._mine])
        self.share(short)
        self._array[...] = from_bf16(short)

    def _send(self, bucket: slice) -> None:
        pieces = [_overlap(bucket, part) for part in self._parts]
        counts = [piece.stop - piece.start for piece in pieces]
        mine, values = pieces[self._rank], self._array[bucket]
        sent = to_bf16(values) if self._half else values
        received = np.empty((self._size, counts[self._rank]), sent.dtype)
        request = self._all_to_all(sent, counts, received, [counts[self._rank]] * self._size)
        self._sent.append((mine, sent, received, request))


def to_bf16(values: Array) -> Array:
    """The upper halves of float32 numbers, rounded to nearest even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def from_bf16(short: Array) -> Array:
    """Float32 numbers of their upper halves."""
    return (short.astype(np.uint32) << 16).view(np.float32)


def _overlap(a: slice, b: slice) -> slice:
    start = max(a.start, b.start)
    return slice(start, max(start, min(a.stop, b.stop)))
