"""The run as the ranks see it that do not write it.

Rank 0 has the folder. The others hold what it said of it at the start, follow the history in memory, and write nothing:
they may be on machines that do not see the folder at all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from convolt.checkpoint import Arrays, Checkpoint, Checkpointer
from convolt.comms import Communicator, texts
from convolt.directory import CHECKPOINTS
from convolt.history import Epoch
from convolt.params import Params
from convolt.run import Run


class Follower(Run):
    """A run that another rank writes."""

    def __init__(self, folder: Path, record: dict[str, Any], history: list[Epoch]) -> None:
        self.folder, self.record = folder, record
        self.checkpoints = Checkpointer(folder / CHECKPOINTS)
        self._writer = None
        self._history = history
        self._result: dict[str, Any] | None = None
        self._params: Params | None = None

    def log(self, event: str, record: Mapping[str, Any]) -> None:
        """Rank 0 logs it."""

    def log_epoch(self, epoch: Epoch) -> None:
        """Remember it."""
        self._history.append(epoch)

    def save_checkpoint(
        self, step: int, model: Arrays, optimizer: Arrays, state: Mapping[str, Any], best: bool = False
    ) -> Path:
        """Rank 0 saves it."""
        return self.folder

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Rank 0 does; here the epochs are forgotten by `forget`."""

    def forget(self, epochs: int) -> None:
        """Only so many epochs are left."""
        del self._history[epochs:]

    def amend(self, epochs: Sequence[Epoch]) -> None:
        """These are the epochs."""
        self._history[:] = epochs

    def finish(self, result: Mapping[str, Any], params: Params | None = None) -> None:
        """Remember it."""
        self._result = {**result, "run": str(self.folder)}
        self._params = params


def announced(run: Run | None, comm: Communicator) -> Run:
    """The run on every rank: the one that rank 0 has opened, and what follows it on the others."""
    if comm.size == 1:
        assert run is not None
        return run
    about = ""
    if run is not None:
        about = json.dumps([str(run.folder), run.record, [asdict(epoch) for epoch in run.history]])
    folder, record, history = json.loads(texts(comm, about)[0])
    return run or Follower(Path(folder), record, [Epoch(**epoch) for epoch in history])
