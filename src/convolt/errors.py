"""Every error a user can cause, as one small tree.

    ConvoltError
    ├── ConfigError         an option, a recipe field or a name that cannot be right
    ├── ShapeError          layers that do not fit together, found when the Model is built
    ├── DataError           a data set that is missing, damaged, hostile or unusable
    ├── EngineError         something this engine, or this machine, cannot do
    ├── TrainingError       a loss that is not finite
    ├── CheckpointError     a checkpoint that cannot be written or trusted
    ├── RunError            a run directory that is taken, missing or full
    ├── Interrupted         a signal ended training; a checkpoint is written
    ├── RanksLost           other processes of this run are gone
    └── MissingDependency   an optional library that is not installed

A message is one line: where, what must hold, what was given, how to fix it. The command line prints that line alone
and keeps the traceback for ``--debug``.
"""

import difflib
from collections.abc import Iterable

# The newest torch drags in gigabytes of CUDA; this one has a CPU build.
TORCH_INSTALL = "pip install torch==2.13.0"


class ConvoltError(Exception):
    """The base of every error that Convolt raises on purpose."""


class ConfigError(ConvoltError):
    """An option, a recipe field or a name is not valid."""


class ShapeError(ConvoltError):
    """The layers of a model do not fit together."""


class DataError(ConvoltError):
    """A data set is missing, damaged or not usable."""


class EngineError(ConvoltError):
    """The engine or the machine cannot do what was asked."""


class TrainingError(ConvoltError):
    """Training cannot go on: the loss or a gradient is not finite."""


class CheckpointError(ConvoltError):
    """A checkpoint cannot be written, read or trusted."""


class RunError(ConvoltError):
    """A run directory is in use, missing or not writable."""


class Interrupted(ConvoltError):
    """A signal ended training in good order: a checkpoint is written and the run can be resumed."""


class RanksLost(ConvoltError):
    """Ranks died that this one was working with; those that are left may go on without them (`Parallel.elastic`)."""


class MissingDependency(ConvoltError):
    """An optional library is needed and not installed."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        self.package = package
        install = TORCH_INSTALL if package == "torch" else f"pip install 'convolt[{extra}]'"
        message = f"{purpose} needs {package}, which is not installed; run: {install}"
        super().__init__(message)


def nearest(given: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest valid one, or all of them.

    >>> nearest("adm", ["adam", "sgd"])
    "did you mean 'adam'? valid: adam, sgd"
    """
    names = sorted(valid)
    close = difflib.get_close_matches(given, names, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}valid: {', '.join(names)}"
