"""Early stopping: end a run that no longer improves on the validation set.

The configuration is frozen and the state is a plain dictionary that a loop keeps, saves with each checkpoint and gives
back after a resume. Which weights to return in the end is no business of this file: ``state["best_epoch"]`` says which
epoch was best, whatever ended the run.
"""

import math
from dataclasses import dataclass
from typing import TypedDict

from convolt.checks import check_choice, check_integer, check_number
from convolt.metrics import HIGHER_IS_BETTER, MONITORS


class StoppingState(TypedDict):
    """What early stopping remembers; plain numbers, so it can be saved as JSON."""

    best: float | None
    best_epoch: int | None
    bad_epochs: int


@dataclass(frozen=True)
class EarlyStopping:
    """Stop after ``patience`` epochs in a row without an improvement of more than ``min_delta``.

    monitor: "valid_loss", where less is better, or "valid_accuracy", where more is.
    Reference: Prechelt, "Early stopping - but when?", in "Neural networks: tricks of the trade", 1998.
    """

    patience: int = 5
    min_delta: float = 0.0
    monitor: str = "valid_loss"

    def __post_init__(self) -> None:
        check_integer(self, "patience", at_least=1)
        check_number(self, "min_delta", at_least=0)
        check_choice(self, "monitor", MONITORS)

    def init(self) -> StoppingState:
        """The state before the first epoch."""
        return {"best": None, "best_epoch": None, "bad_epochs": 0}

    def observe(self, state: StoppingState, value: float, epoch: int) -> StoppingState:
        """The state after an epoch whose metric is ``value``. A value that is not a number is no improvement."""
        if self._improves(value, state["best"]):
            return {"best": value, "best_epoch": epoch, "bad_epochs": 0}
        return {"best": state["best"], "best_epoch": state["best_epoch"], "bad_epochs": state["bad_epochs"] + 1}

    def should_stop(self, state: StoppingState) -> bool:
        """Whether patience is at its end."""
        return state["bad_epochs"] >= self.patience

    def _improves(self, value: float, best: float | None) -> bool:
        if best is None:
            return math.isfinite(value)
        gain = value - best if self.monitor in HIGHER_IS_BETTER else best - value
        return gain > self.min_delta
