"""Where a run stands: all that a checkpoint must hold for the run to go on with the same bits.

``Progress`` is plain numbers, ``State`` adds the arrays: weights, their average, the optimizer's. The order of samples,
augmentation and dropout are functions of the step and are not here.

``Progress.epochs`` counts the epochs that are validated and recorded. After the last step of an epoch it lags behind
``step`` until validation is done; a run that was stopped in between does the validation first.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np

from convolt.checkpoint import Checkpoint
from convolt.comms import Array, Communicator, texts
from convolt.duration import Time, due
from convolt.early_stopping import EarlyStopping, StoppingState
from convolt.engine import Executor
from convolt.errors import TrainingError
from convolt.metrics import HIGHER_IS_BETTER
from convolt.optimizers import EMA
from convolt.run import Run
from convolt.step import Stepper

EMA_WEIGHTS = "weights"  # beside the optimizer's arrays: the weights that are trained, when the average is the model


@dataclass
class Progress:
    """The state of a run between two steps.

    step: steps done; epochs: epochs closed; lr: of the last step. loss_sum, correct, images, seconds and skipped belong
    to the epoch under way, total_images and total_seconds to those before it. left_out: the steps that
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

    @property
    def place(self) -> tuple[int, int, int]:
        """How far the run is: every change of state makes it larger, also a rollback."""
        return len(self.left_out), self.step, self.epochs

    def count(self, loss_sum: float, right: int, images: int, seconds: float) -> None:
        """Add a step that was taken to the sums of its epoch."""
        self.loss_sum += loss_sum
        self.correct += right
        self.images += images
        self.seconds += seconds

    def close_epoch(self) -> None:
        """Begin the sums of the next epoch."""
        self.epochs += 1
        self.total_images += self.images
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
        improved = self.latest_is_best(early)
        if improved:
            monitor = _deciding(early)
            self.best = metrics[monitor] if monitor in HIGHER_IS_BETTER else -metrics[monitor]
        return improved

    def latest_is_best(self, early: EarlyStopping | None) -> bool:
        """Whether the last epoch that was observed is the best one so far."""
        monitor = _deciding(early)
        sign = 1 if monitor in HIGHER_IS_BETTER else -1
        *earlier, value = [sign * each for each in self.monitored[monitor]] or [math.nan]
        return math.isfinite(value) and all(value > each for each in earlier if math.isfinite(each))


def _deciding(early: EarlyStopping | None) -> str:
    """The metric that tells which epoch is best."""
    return early.monitor if early is not None else "valid_accuracy"


class State:
    """The executor's weights and optimizer, the average of the weights if there is one, and the progress."""

    def __init__(self, executor: Executor, ema: EMA | None) -> None:
        self.executor = executor
        self.ema = ema
        self.progress = Progress()
        self.shadow = None if ema is None else executor.params.flat.copy()

    def average(self, now: Time) -> None:
        """Move the average towards the weights, where there is one and it is due."""
        if self.ema is not None and self.shadow is not None and due(self.ema.every, now):
            self.ema.update(self.shadow, self.executor.params.flat)

    @contextmanager
    def shipped(self) -> Iterator[None]:
        """Within it the executor holds the weights that would be shipped: the average, where there is one."""
        if self.shadow is None:
            yield
            return
        params = self.executor.params
        trained = params.flat.copy()
        params.flat[...] = self.shadow
        self.executor.weights_changed()
        try:
            yield
        finally:
            params.flat[...] = trained
            self.executor.weights_changed()

    def save(self, run: Run, best: bool, stepper: Stepper) -> None:
        """Write a checkpoint: the weights that would be shipped, the optimizer, the progress.

        Every rank comes here; ``run`` writes on one of them.
        Raises CheckpointError (the checkpoints before it are intact), TrainingError when a weight is not finite.
        """
        optimizer = self.executor.optimizer_state()
        stepper.whole(self._vectors(optimizer))
        if self.shadow is not None:
            optimizer[EMA_WEIGHTS] = self.executor.params.flat.copy()
        with self.shipped():
            model = self.executor.params.state_dict()
        step = self.progress.step
        for name, array in model.items():
            if not np.isfinite(array).all():
                raise TrainingError(f"step {step}: {name} is not finite, so it is not saved; lower lr")
        run.save_checkpoint(step, model, optimizer, asdict(self.progress), best)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint."""
        params = self.executor.params
        params.load_state_dict(checkpoint.model)
        optimizer = dict(checkpoint.optimizer)
        if self.shadow is not None:
            self.shadow[...] = params.flat
            params.flat[...] = optimizer.pop(EMA_WEIGHTS)
        self.executor.weights_changed()
        self.executor.load_optimizer_state(optimizer)
        self.progress = Progress(**{name: checkpoint.state[name] for name in asdict(Progress())})

    def meet(self, stepper: Stepper) -> None:
        """After local steps: weights, their average and the optimizer's arrays become the mean over ranks."""
        if not stepper.drifted:
            return
        optimizer = self.executor.optimizer_state()
        shadow = () if self.shadow is None else (self.shadow,)
        stepper.meet((self.executor.params.flat, *shadow, *self._vectors(optimizer)))
        self.executor.weights_changed()
        self.executor.load_optimizer_state(optimizer)

    def spread(self, comm: Communicator, root: int = 0) -> None:
        """The state of one rank on all of them: after it has read a checkpoint, or when others are gone.

        It is taken in one go when all of it is here. Raises RanksLost before that, never in between.
        """
        if comm.size == 1:
            return
        own = self.executor.optimizer_state()
        described = {name: (array.dtype.str, array.shape) for name, array in own.items()}
        said = json.loads(texts(comm, json.dumps([asdict(self.progress), described]))[root])
        progress, names = said
        optimizer = {name: own.get(name, np.zeros(shape, dtype)) for name, (dtype, shape) in names.items()}
        optimizer = {name: np.array(array, order="C") for name, array in optimizer.items()}
        shadow = () if self.shadow is None else (self.shadow,)
        params = self.executor.params
        kept = (params.flat, *params.buffers.values(), *shadow)
        copies = [array.copy() for array in kept]
        for array in (*copies, *optimizer.values()):
            comm.broadcast(array, root)
        for array, copy in zip(kept, copies, strict=True):
            array[...] = copy
        self.executor.weights_changed()
        self.executor.load_optimizer_state(optimizer)
        self.progress = Progress(**progress)

    def _vectors(self, optimizer: Mapping[str, Array]) -> list[Array]:
        """The optimizer's flat arrays, in the same order on every rank."""
        shape = self.executor.params.flat.shape
        return [optimizer[name] for name in sorted(optimizer) if optimizer[name].shape == shape]
