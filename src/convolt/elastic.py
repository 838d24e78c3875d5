"""Going on without the ranks that died.

Ranks move in step: no rank can be two states ahead of another, for it takes part in sums that need all of them. So the
survivors of a loss stand at the same place, with the same bits, or some stand one state further. All then take the
state of one of those, and what the others were in the middle of is done again, or is done. No step needs a copy of
the weights for that: a rank learns of a loss in a sum, and sums come before weights move.

What the dead rank was to compute falls to the others, as the parts of every batch are cut anew. If it was the one that
writes, the new rank 0 takes the run's folder over, in which it finds what a killed process may leave behind at any
time, and saves: a checkpoint that was being written may be lost.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from convolt.comms import Communicator, texts
from convolt.errors import RanksLost
from convolt.history import Epoch
from convolt.loader import Loader
from convolt.progress import State
from convolt.run import Run
from convolt.step import Stepper


def regroup(run: Run, state: State, stepper: Stepper, loader: Loader, asked: int, keep_last: int) -> tuple[Run, int]:
    """After RanksLost, on all that are left: the same state everywhere, ready for the next step.

    asked: the signal that this rank knows of, 0 for none. Returns the run as this rank holds it from now on, and the
    signal that any of them knows of. Raises RunError where the one that must write now cannot.
    """
    comm, epochs = stepper.comm, list(run.history)
    while True:
        try:
            comm.shrink()
            epochs, asked = same_state(comm, state, epochs, asked)
            stepper.join()
            stepper.prepare(loader.batch(state.progress.step))
            break
        except RanksLost:
            continue  # more of them
    run = writer(run, comm, epochs, keep_last)
    run.log("ranks_lost", {"step": state.progress.step, "left": comm.size})
    return run, asked


def same_state(comm: Communicator, state: State, epochs: list[Epoch], asked: int) -> tuple[list[Epoch], int]:
    """After `Communicator.shrink`: every rank gets the state, and the epochs, of the one that came furthest.

    Returns the epochs and the signal that any of them knows of. Raises RanksLost; this rank's state is then the old one
    or the new one, never half of both.
    """
    table = np.zeros((comm.size, 4), np.int64)
    table[comm.rank] = *state.progress.place, asked
    comm.allreduce(table)
    places = [tuple(row) for row in table[:, :3].tolist()]
    if len(set(places)) > 1:
        root = places.index(max(places))
        told = texts(comm, json.dumps([asdict(epoch) for epoch in epochs]) if comm.rank == root else "")
        state.spread(comm, root)
        epochs = [Epoch(**record) for record in json.loads(told[root])]
    return epochs, int(table[:, 3].max())


def writer(run: Run, comm: Communicator, epochs: Sequence[Epoch], keep_last: int) -> Run:
    """The run on this rank, with these epochs: rank 0 writes it from now on, if it did not before. Raises RunError."""
    if comm.rank == 0 and not run.writes:
        return Run.take_over(run.folder, run.record, epochs, keep_last)
    run.amend(epochs)
    return run
