"""Stopping in good order: a signal asks, the training loop answers behind the steps that are under way.

A handler runs between any two bytecodes, so it only sets a flag; the loop looks at it behind each call of an engine, in
training and in validation, saves a checkpoint and ends with `ExitCode.INTERRUPTED`. A second signal ends the process at
once: the checkpoint being written is then lost, the one before it is not.

| code | meaning |
|---|---|
| 0 | done |
| 1 | an error, told in one line on standard error |
| 2 | the command line is wrong |
| 75 | interrupted by a signal and saved: go on with ``--resume`` (sysexits' EX_TEMPFAIL: try again later) |
| 130, 143 | a second SIGINT or SIGTERM: ended at once, unsaved since the last checkpoint |
"""

import os
import signal
import threading
from collections.abc import Callable
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], Any] | int | None


class ExitCode(IntEnum):
    """How the ``convolt`` command ends; after a second signal the code is 128 + its number."""

    OK = 0
    ERROR = 1
    USAGE = 2
    INTERRUPTED = 75


class StopAsked(Exception):
    """Leaves whatever the loop is in the middle of, once a signal came; never seen outside of training."""

    def __init__(self, number: int) -> None:
        self.signal = number


class StopRequest:
    """While it is entered, SIGINT and SIGTERM set ``requested`` instead of ending the process; the second one ends it.

    Python lets only the main thread handle signals: entered in another thread it changes nothing, and ``requested``
    stays False.

    >>> with StopRequest() as stop:
    ...     stop.requested
    False
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Handler] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came; ``signal`` tells which."""
        return self.signal is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed by Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)  # no clean-up: whoever asks twice does not want to wait for it
        self.signal = signal.Signals(number)
