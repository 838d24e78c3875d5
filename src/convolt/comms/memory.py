"""Memory that the ranks of one machine share: a nameless file for each rank, which all of them map.

It needs nothing of MPI but a sum: MPI's own shared windows do not outlive the loss of a rank, and leave files behind
when all are killed. A nameless file ends with the last process that has it. Others find it under ``/proc``, if the
system lets them look: not where each rank is in a container of its own. A number that only its owner can have written
tells that it is the right one.
"""

import mmap
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convolt.comms import Array


def shared_rows(size: int, rank: int, count: int, add: Callable[[Array], None]) -> list[Array] | None:
    """A row of zeros for each of ``count`` ranks, at least ``size`` bytes long, in memory that all of them share.

    add: replaces an array by its sum over these ranks, all of which come here. None, on all, where that cannot be done.
    """
    size = max(size, 8)
    row, places = None, np.zeros((count, 4), np.int64)
    descriptor = _nameless(size)
    if descriptor is not None:
        row = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
        mark = secrets.randbits(62)
        row[:8].view(np.int64)[0] = mark
        places[rank] = 1, os.getpid(), descriptor, mark
    add(places)
    rows = [row if each == rank else _found(place, size) for each, place in enumerate(places)]
    failed = np.array([sum(each is None for each in rows)], np.int64)
    add(failed)  # everybody has looked
    if descriptor is not None:
        os.close(descriptor)
    if failed[0] or row is None:
        return None
    row[:8] = 0
    add(failed)  # and finds zeros
    return [each for each in rows if each is not None]


def lives(process: int) -> bool:
    """Whether a process of this machine is there, and not only because nobody asked how it ended."""
    try:
        words = Path(f"/proc/{process}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return words.rpartition(b")")[2].split()[0] not in (b"Z", b"X")


def _nameless(size: int) -> int | None:
    if not hasattr(os, "memfd_create"):
        return None
    try:
        descriptor = os.memfd_create("convolt")
        os.truncate(descriptor, size)
    except OSError:
        return None
    return descriptor


def _found(place: Array, size: int) -> Array | None:
    """The memory of another rank; None unless it is there and the right one."""
    there, process, number, mark = (int(value) for value in place)
    try:
        descriptor = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_CLOEXEC) if there else -1
    except OSError:
        return None
    if descriptor < 0:
        return None
    try:
        row = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)
    return row if row[:8].view(np.int64)[0] == mark else None
