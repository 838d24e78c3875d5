"""The pool that shares out tiles: every tile once, exceptions reach the caller, the pool survives them."""

import threading
from collections import Counter

import numpy as np
import pytest

from convolt.workers import Workers


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_tile_is_computed_once(count):
    workers, done = Workers(count), []
    for tiles in (range(50), [], range(1)):
        done.clear()
        workers.each(tiles, lambda worker, tile: done.append((worker, tile)))
        assert Counter(tile for _, tile in done) == Counter(tiles)
        assert {worker for worker, _ in done} <= set(range(count))
    workers.close()


def test_workers_do_run_at_the_same_time():
    """Three tiles that wait for each other end only if three threads hold them."""
    workers, barrier = Workers(3), threading.Barrier(3, timeout=30)
    workers.each(range(3), lambda worker, tile: barrier.wait())
    workers.close()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_exception_reaches_the_caller_and_the_pool_goes_on(count):
    def fail(worker, tile):
        if tile == 3:
            raise ZeroDivisionError(f"tile {tile}")

    workers, done = Workers(count), []
    with pytest.raises(ZeroDivisionError, match="tile 3"):
        workers.each(range(10), fail)
    workers.each(range(5), lambda worker, tile: done.append(tile))
    assert sorted(done) == list(range(5))
    workers.close()


def test_an_exception_of_another_thread_reaches_the_caller():
    barrier = threading.Barrier(2, timeout=30)

    def fail_elsewhere(worker, tile):
        barrier.wait()  # both threads hold a tile
        if worker == 1:
            raise KeyError("in the other thread")

    workers = Workers(2)
    with pytest.raises(KeyError, match="in the other thread"):
        workers.each(range(2), fail_elsewhere)
    workers.close()


def test_workers_see_how_the_caller_handles_overflow():
    workers, barrier, seen = Workers(2), threading.Barrier(2, timeout=30), []

    def look(worker, tile):
        barrier.wait()
        seen.append(np.geterr()["over"])

    with np.errstate(over="raise"):
        workers.each(range(2), look)
    assert seen == ["raise", "raise"]
    workers.close()


def test_closing_ends_the_threads():
    workers, seen = Workers(3), set()
    barrier = threading.Barrier(3, timeout=30)

    def look(worker, tile):
        barrier.wait()
        seen.add(threading.current_thread())

    workers.each(range(3), look)
    others = seen - {threading.current_thread()}
    assert len(others) == 2
    workers.close()
    workers.close()
    assert not any(thread.is_alive() for thread in others)
