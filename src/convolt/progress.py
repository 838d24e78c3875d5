"""Where a run stands: everything beside the arrays that a checkpoint must know to go on with the same bits.

Plain numbers only, so that a checkpoint is readable. The order of samples, augmentation and dropout are functions of
the step and are not here. ``epochs`` counts those that are validated and recorded: after the last step of an epoch it
lags behind ``step`` until validation is done, and a run that was stopped in between does the validation first.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from convolt.early_stopping import EarlyStopping, StoppingState
from convolt.metrics import HIGHER_IS_BETTER


@dataclass
class Progress:
    """The state of a run between two steps.

    step: steps done; epochs: epochs closed; lr: of the last step. loss_sum, correct, images (this rank's), seconds and
    skipped belong to the epoch under way, total_images and total_seconds to those before it. left_out: the steps that
    were not finite; lr_factor: what rollbacks have made of the learning rate. best: the best value of the metric that
    decides, larger is better. monitored: the metrics of each epoch, which Plateau watches.
    """

    step: int = 0
    epochs: int = 0
    lr: float = 0.0
    loss_sum: float = 0.0
    correct: int = 0
    images: int = 0
    seconds: float = 0.0
    skipped: int = 0
    total_images: int = 0
    total_seconds: float = 0.0
    left_out: list[int] = field(default_factory=list)
    lr_factor: float = 1.0
    best: float | None = None
    stopping: StoppingState | None = None
    monitored: dict[str, list[float]] = field(default_factory=lambda: {"valid_loss": [], "valid_accuracy": []})

    @classmethod
    def from_plain(cls, state: Mapping[str, Any]) -> "Progress":
        """What ``plain`` gave; other keys of a checkpoint's state are passed over."""
        return cls(**{name: state[name] for name in asdict(cls())})

    def plain(self) -> dict[str, Any]:
        """Numbers, lists and mappings, for a checkpoint."""
        return asdict(self)

    def count(self, loss_sum: float, right: int, images: int, seconds: float) -> None:
        """Add a step that was taken to the sums of its epoch."""
        self.loss_sum += loss_sum
        self.correct += right
        self.images += images
        self.seconds += seconds

    def close_epoch(self, images: int) -> None:
        """Begin the sums of the next epoch; ``images`` is what all ranks saw in this one."""
        self.epochs += 1
        self.total_images += images
        self.total_seconds += self.seconds
        self.loss_sum, self.correct, self.images, self.seconds, self.skipped = 0.0, 0, 0, 0.0, 0

    def observe(self, metrics: Mapping[str, float], early: EarlyStopping | None) -> bool:
        """Take an epoch's validation metrics; True when it is the best epoch so far.

        Early stopping's metric decides, or else the accuracy. A value that is not finite is never the best.
        """
        for name, value in metrics.items():
            self.monitored[name].append(value)
        if early is not None:
            self.stopping = early.observe(self.stopping or early.init(), metrics[early.monitor], self.epochs + 1)
        monitor = early.monitor if early is not None else "valid_accuracy"
        value = metrics[monitor] if monitor in HIGHER_IS_BETTER else -metrics[monitor]
        improved = math.isfinite(value) and (self.best is None or value > self.best)
        if improved:
            self.best = value
        return improved
