"""Callbacks observe a run; whatever changes it belongs to the recipe.

A callback gets frozen records and no handle on weights or optimizer, so adding one cannot change a result. It may
raise: the exception ends the run like any other and reaches the caller.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from convolt.history import Epoch
from convolt.run import Run


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step.

    step and epoch count from 1; epochs and steps_per_epoch are the run's; loss is the batch's mean (NaN for a batch
    that was skipped), images the size of the global batch, lr the learning rate it was done with.
    """

    step: int
    epoch: int
    epochs: int
    steps_per_epoch: int
    loss: float
    lr: float
    images: int


class Callback(Protocol):
    """What the training loop tells; a subclass defines only the methods it wants."""

    def on_start(self, run: Run) -> None:
        """Before the first step; the run's history holds the epochs before a resume."""

    def on_step(self, step: StepEvent) -> None:
        """After every step; where several steps were one call, after it, for each of them in turn."""

    def on_epoch(self, epoch: Epoch) -> None:
        """After an epoch's validation, when it stands in the history."""

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        """Whatever ended the run; the result is None if it is unfinished (a signal, an error)."""


class ProgressBar(Callback):
    """A progress bar and one line per epoch on standard error; only the lines if that is no terminal.

    Standard output stays free for results.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._epoch = 0
        self._epochs: int | None = None

    def on_start(self, run: Run) -> None:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True, refresh_per_second=4)
            self._task = self._progress.add_task("starting", total=None)
            self._progress.start()

    def on_step(self, step: StepEvent) -> None:
        self._epochs = step.epochs
        if self._progress is None:
            return
        within = step.step - (step.epoch - 1) * step.steps_per_epoch
        if step.epoch != self._epoch:
            self._epoch = step.epoch
            title = f"epoch {step.epoch}/{step.epochs}"
            self._progress.reset(self._task, total=step.steps_per_epoch, completed=within, description=title)
        self._progress.update(self._task, completed=within)

    def on_epoch(self, epoch: Epoch) -> None:
        self._console.print(epoch_line(epoch, self._epochs), soft_wrap=True, markup=False, highlight=False)

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def epoch_line(epoch: Epoch, epochs: int | None = None) -> str:
    """An epoch in one line: losses, accuracies in percent, learning rate, speed, seconds."""
    count = f"{epoch.epoch}" if epochs is None else f"{epoch.epoch:>{len(str(epochs))}}/{epochs}"
    parts = [f"epoch {count}", f"train {epoch.train_loss:.4f} {epoch.train_accuracy:7.2%}"]
    if epoch.valid_loss is not None and epoch.valid_accuracy is not None:
        parts.append(f"valid {epoch.valid_loss:.4f} {epoch.valid_accuracy:7.2%}")
    parts.append(f"lr {epoch.lr:.3g}")
    parts.append(f"{epoch.images_per_second:,.0f} images/s  {epoch.train_seconds:.1f} s")
    if epoch.skipped_steps:
        parts.append(f"{epoch.skipped_steps} steps skipped (loss not finite)")
    return "  ".join(parts)
