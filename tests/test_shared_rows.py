"""Memory shared by the ranks of a machine: it is the same on both sides, or nobody takes it."""

import os
import subprocess
import sys

import numpy as np
import pytest

from convolt.comms.memory import lives, shared_rows

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nameless files are Linux's")
SIZE, MARK = 64, 12345


@pytest.fixture
def other():
    """The file of another rank, which has written its mark."""
    descriptor = os.memfd_create("other")
    os.truncate(descriptor, SIZE)
    os.pwrite(descriptor, np.int64(MARK).tobytes(), 0)
    yield descriptor
    os.close(descriptor)


def rows_beside(place: tuple[int, ...], failures: int = 0):
    """What rank 0 of 2 gets where the other one says that its file is at ``place``."""
    told: list[bool] = []

    def add(array: np.ndarray) -> None:
        if array.ndim == 2:
            array[1] = place
        else:
            array += failures
        told.append(True)

    return shared_rows(SIZE, 0, 2, add)


def test_what_one_writes_the_other_reads(other):
    rows = rows_beside((1, os.getpid(), other, MARK))
    assert rows is not None
    assert [len(row) for row in rows] == [SIZE, SIZE]
    assert not rows[0].any()
    rows[1][10] = 77
    assert os.pread(other, 1, 10) == b"\x4d"
    os.pwrite(other, b"\x05", 11)
    assert rows[1][11] == 5


@pytest.mark.parametrize("wrong", ["mark", "process", "number", "absent"])
def test_a_file_that_is_not_the_right_one_is_not_taken(wrong, other):
    place = {"there": 1, "process": os.getpid(), "number": other, "mark": MARK}
    place |= {
        "mark": {"mark": MARK + 1},
        "process": {"process": 2**22 + 1},  # beyond the largest number of a process
        "number": {"number": 10_000},
        "absent": {"there": 0},
    }[wrong]
    assert rows_beside(tuple(place.values())) is None


def test_nobody_takes_it_where_one_cannot(other):
    assert rows_beside((1, os.getpid(), other, MARK), failures=1) is None


def test_a_process_lives_until_it_ends_whether_or_not_anybody_asked_how():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert lives(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie
    assert not lives(process.pid)
    process.communicate()
    assert not lives(process.pid)
