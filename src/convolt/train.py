"""Training: one loop for every engine, every optimizer and any number of ranks.

``fit`` prepares a run, ``_Training.loop`` is the loop, on one screen; everything that changes the mathematics is a
field of the recipe and a visible line in it. Callbacks only observe.

What a checkpoint must know beside the arrays is ``Progress``: plain numbers. The order of samples, augmentation and
dropout are functions of the step, so a resumed run goes on with the same bits.
"""

import math
import time as clock
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convolt.callbacks import Callback, StepEvent
from convolt.checkpoint import Checkpoint
from convolt.comm import Communicator, Serial
from convolt.data import Dataset
from convolt.datasets.spec import DataSpec
from convolt.duration import HOW_TO, Time, due, is_length, length
from convolt.early_stopping import StoppingState
from convolt.engine import Engine, Executor, StepResult
from convolt.engines import default_engine
from convolt.errors import ConfigError, Interrupted, TrainingError
from convolt.evaluation import Evaluation, evaluate
from convolt.history import Epoch
from convolt.loader import Batch, Loader, with_teacher
from convolt.losses import Distillation
from convolt.metrics import HIGHER_IS_BETTER, correct
from convolt.model import Model
from convolt.optimizers import Optimizer, clip_by_norm, clip_by_value
from convolt.params import Params
from convolt.recipe import Recipe, plain
from convolt.run import Run
from convolt.schedules import watched
from convolt.signals import StopRequest

EMA_WEIGHTS = "weights"  # beside the optimizer's arrays: the weights that are trained, when the average is the model


@dataclass
class Progress:
    """Where a run stands. step: steps done; the sums are of the epoch under way; ``left_out``: steps not finite."""

    step: int = 0
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

    def count(self, loss_sum: float, right: int, images: int, seconds: float) -> None:
        """Add a step that was taken."""
        self.loss_sum += loss_sum
        self.correct += right
        self.images += images
        self.seconds += seconds

    def close_epoch(self) -> None:
        """Begin the sums of the next epoch."""
        self.total_images += self.images
        self.total_seconds += self.seconds
        self.loss_sum, self.correct, self.images, self.seconds, self.skipped = 0.0, 0, 0, 0.0, 0


def fit(
    model: Model,
    data: Dataset,
    recipe: Recipe | None = None,
    *,
    engine: Engine | None = None,
    params: Params | None = None,
    comm: Communicator | None = None,
    out: str | Path | None = None,
    root: str | Path = "runs",
    resume: bool = False,
    checkpoint_every: str = "1ep",
    keep_last: int = 2,
    callbacks: Sequence[Callback] = (),
    source: DataSpec | None = None,
) -> Run:
    """Train ``model`` on ``data`` by ``recipe`` and return the finished run.

    engine: how to compute; the default is the fastest there is. params: weights to start from. out: the run's folder;
    without it a new one under ``root``. resume: go on with the run in ``out``. checkpoint_every: a length such as
    "1ep" or "200ba". source: where ``data`` came from, recorded so that the run can be resumed and evaluated alone.
    Raises ConfigError, EngineError, RunError, TrainingError, CheckpointError, and Interrupted after SIGINT or SIGTERM.
    """
    recipe = recipe or Recipe()
    engine = engine or default_engine()
    comm = comm or Serial()
    _check(model, data, recipe, resume, out, checkpoint_every)
    config = {
        "model": plain(model),
        "data": {**_fingerprint(data), "source": None if source is None else plain(source)},
        "recipe": plain(recipe),
        "engine": plain(engine),
        "ranks": comm.size,
        "checkpoint_every": checkpoint_every,
    }
    executor = engine.executor(model, params, recipe)
    checkpoint = None
    if resume and out is not None:
        shapes = {name: array.shape for name, array in executor.params.state_dict().items()}
        free = ("engine", "ranks", "checkpoint_every", "data.source")
        run, checkpoint = Run.resume(out, config, may_change=free, expect=shapes, keep_last=keep_last)
    else:
        label = f"{data.name}-{engine.NAME}"
        run = Run.create(config, label, out=out, root=root, threads=engine.threads, keep_last=keep_last)
    with run, StopRequest() as stop:
        training = _Training(run, data, recipe, engine, executor, comm, stop, tuple(callbacks), checkpoint_every)
        try:
            training.start(checkpoint)
            training.loop()
            training.finish()
        finally:
            for callback in callbacks:
                callback.on_end(run.result)
            executor.close()
    return run


class _Training:
    """One run under way."""

    def __init__(
        self,
        run: Run,
        data: Dataset,
        recipe: Recipe,
        engine: Engine,
        executor: Executor,
        comm: Communicator,
        stop: StopRequest,
        callbacks: tuple[Callback, ...],
        checkpoint_every: str,
    ) -> None:
        self.run, self.data, self.recipe, self.engine, self.executor = run, data, recipe, engine, executor
        self.comm, self.stop, self.callbacks, self.checkpoint_every = comm, stop, callbacks, checkpoint_every
        self.loader = Loader(data.train, recipe, data.num_classes, comm)
        self.total_steps = recipe.epochs * self.loader.steps_per_epoch
        self.progress = Progress()
        self.shadow = executor.params.flat.copy() if recipe.ema else None
        self.teacher = Run.load(recipe.loss.teacher).executor() if isinstance(recipe.loss, Distillation) else None
        if recipe.early_stopping:
            self.progress.stopping = recipe.early_stopping.init()

    # ------------------------------------------------------------------------------------------------- the loop

    def loop(self) -> None:
        """Steps until the epochs are done, or early stopping, or a signal."""
        recipe, progress = self.recipe, self.progress
        while progress.step < self.total_steps and not self.stopped_early:
            began = clock.perf_counter()
            now = self.time(progress.step)
            self.executor.dropout = now.step >= length(recipe.dropout_from, now)
            optimizer = recipe.optimizer_at(now, progress.lr_factor)
            batch = self.batch(progress.step)
            result = None if progress.step in progress.left_out else self.step(batch, optimizer)
            finite = result is not None and math.isfinite(result.loss)
            if result is not None and not finite and self.rolled_back(result.loss):
                continue
            progress.step += 1
            progress.skipped += not finite
            if result is not None and finite:
                self.average()
                right = int(correct(result.logits, batch.labels).sum())
                progress.count(result.loss, right, len(batch.labels), clock.perf_counter() - began)
            self.tell(batch, result.loss if result is not None and finite else math.nan, optimizer.lr)
            self.close_step(optimizer.lr)

    def step(self, batch: Batch, optimizer: Optimizer) -> StepResult:
        """One optimizer step on the global batch; weights and statistics stay as they are when it is not finite."""
        recipe, executor = self.recipe, self.executor
        scale, pieces = 1 / batch.size, list(batch.pieces(recipe.micro_batch_size))
        statistics = executor.statistics()
        if self.comm.size == 1 and len(pieces) == 1 and not (recipe.clip_norm or recipe.clip_value):
            result = executor.train_step(batch.images, batch.targets, recipe.loss, scale, optimizer, batch.rng)
        else:
            executor.zero_grads()
            parts = [
                executor.loss_and_grads(piece.images, piece.targets, recipe.loss, scale, piece.rng) for piece in pieces
            ]
            result = self.combined(parts, executor)
            if math.isfinite(result.loss):
                if recipe.clip_value:
                    clip_by_value(executor.grads.flat, recipe.clip_value)
                if recipe.clip_norm:
                    clip_by_norm(executor.grads.flat, recipe.clip_norm)
                executor.update(optimizer)
        if not math.isfinite(result.loss):
            executor.restore_statistics(statistics)
        return result

    def combined(self, parts: list[StepResult], executor: Executor) -> StepResult:
        """Sums over micro-batches and ranks; the loss is NaN when any gradient is not finite."""
        self.comm.allreduce(executor.grads.flat)
        loss = np.array([sum(part.loss for part in parts)])
        self.comm.allreduce(loss)
        finite = math.isfinite(float(loss[0]) + executor.grad_norm())
        logits = np.concatenate([part.logits for part in parts]) if parts else np.zeros((0, self.data.num_classes))
        return StepResult(float(loss[0]) if finite else math.nan, logits)

    def batch(self, step: int) -> Batch:
        """The batch of a step, with the teacher's answer where the loss wants it."""
        batch = self.loader.batch(step)
        return batch if self.teacher is None else with_teacher(batch, self.teacher.predict(batch.images))

    def average(self) -> None:
        """Move the average of the weights, when the recipe has one."""
        if self.recipe.ema and due(self.recipe.ema.every, self.time(self.progress.step)):
            assert self.shadow is not None
            self.recipe.ema.update(self.shadow, self.executor.params.flat)

    def rolled_back(self, loss: float) -> bool:
        """Apply the policy to a step that is not finite. Raises TrainingError; True when an earlier step comes next."""
        policy, progress = self.recipe.non_finite, self.progress
        step = progress.step
        where = f"step {step + 1}: the loss or the gradient is not finite"
        if policy.policy == "raise" or len(progress.left_out) >= policy.limit:
            raise TrainingError(
                f"{where}; lower lr, clip the gradient (clip_norm), or choose a policy"
                " (--set non_finite.policy=skip or rollback); the weights of the last checkpoint are sound"
            )
        left_out = [*progress.left_out, step]
        if policy.policy == "skip":
            progress.left_out = left_out
            self.run.log("non_finite", {"step": step + 1, "policy": policy.policy})
            return False
        checkpoint = self.run.checkpoints.load("last")
        factor = progress.lr_factor * policy.lr_factor
        self.restore(checkpoint)
        self.run.rewind(checkpoint)
        self.progress.left_out, self.progress.lr_factor = left_out, factor
        self.run.log("non_finite", {"step": step + 1, "policy": policy.policy, "back_to": checkpoint.step})
        return True

    # --------------------------------------------------------------------------------------- ends of steps, epochs

    def close_step(self, lr: float) -> None:
        """Validate at an epoch's end, write a checkpoint when one is due, and stop when a signal asked for it."""
        now = self.time(self.progress.step)
        improved = False
        if now.step % self.loader.steps_per_epoch == 0:
            improved = self.close_epoch(now.step // self.loader.steps_per_epoch, lr)
        last = now.step == self.total_steps or self.stopped_early
        if improved or last or due(self.checkpoint_every, now) or self.stop.requested:
            self.save(best=improved)
        if self.stop.requested and not last:
            self.interrupt()

    def close_epoch(self, epoch: int, lr: float) -> bool:
        """Validate, record the epoch, move early stopping; True when this is the best epoch so far."""
        progress, valid = self.progress, self.validate()
        sums = np.array([progress.correct, progress.images], np.float64)
        self.comm.allreduce(sums)
        right, images = (float(value) for value in sums)
        record = Epoch(
            epoch=epoch,
            train_loss=progress.loss_sum / images if images else math.nan,
            train_accuracy=right / images if images else math.nan,
            valid_loss=valid and valid.loss,
            valid_accuracy=valid and valid.accuracy,
            lr=lr,
            train_seconds=progress.seconds,
            images_per_second=images / progress.seconds if progress.seconds else 0.0,
            skipped_steps=progress.skipped,
        )
        improved = self.observe(valid, epoch)
        progress.images = int(images)
        progress.close_epoch()
        self.run.log_epoch(record)
        for callback in self.callbacks:
            callback.on_epoch(record)
        return improved

    def validate(self) -> Evaluation | None:
        """The validation split under the weights that would be shipped."""
        if self.data.valid is None:
            return None
        with self.shipped():
            return evaluate(self.executor, self.data.valid, self.recipe.loss, self.comm)

    def observe(self, valid: Evaluation | None, epoch: int) -> bool:
        """Whether this epoch is the best so far, by early stopping's metric or else the validation accuracy."""
        if valid is None:
            return False
        progress, early = self.progress, self.recipe.early_stopping
        values = {"valid_loss": valid.loss, "valid_accuracy": valid.accuracy}
        for name, value in values.items():
            progress.monitored[name].append(value)
        if early is not None and progress.stopping is not None:
            progress.stopping = early.observe(progress.stopping, values[early.monitor], epoch)
        monitor = early.monitor if early else "valid_accuracy"
        value = values[monitor] if monitor in HIGHER_IS_BETTER else -values[monitor]
        improved = math.isfinite(value) and (progress.best is None or value > progress.best)
        if improved:
            progress.best = value
        return improved

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping has had enough."""
        early, state = self.recipe.early_stopping, self.progress.stopping
        return early is not None and state is not None and early.should_stop(state)

    def time(self, step: int) -> Time:
        """Where the run stands after ``step`` steps, with what Plateau watches."""
        monitor = watched(self.recipe.schedule)
        metrics = self.progress.monitored[monitor] if monitor else ()
        return Time(step, self.loader.steps_per_epoch, self.total_steps, tuple(metrics))

    def tell(self, batch: Batch, loss: float, lr: float) -> None:
        """Tell the callbacks of a step."""
        steps = self.loader.steps_per_epoch
        step = self.progress.step
        event = StepEvent(step, -(-step // steps), self.recipe.epochs, steps, loss / batch.size, lr, batch.size)
        for callback in self.callbacks:
            callback.on_step(event)

    # ------------------------------------------------------------------------------------------ start, save, finish

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Take a checkpoint's state, if there is one; a rollback policy needs one to return to."""
        if checkpoint is not None:
            for warning in checkpoint.warnings:
                self.run.log("warning", {"message": warning})
            self.restore(checkpoint)
        elif self.recipe.non_finite.policy == "rollback":
            self.save(best=False)
        for callback in self.callbacks:
            callback.on_start(self.run)

    def save(self, best: bool) -> None:
        """A checkpoint: the weights that would be shipped, the optimizer, and where the run stands."""
        optimizer = self.executor.optimizer_state()
        if self.shadow is not None:
            optimizer[EMA_WEIGHTS] = self.executor.params.flat.copy()
        with self.shipped():
            model = self.executor.params.state_dict()
        self.run.save_checkpoint(self.progress.step, model, optimizer, asdict(self.progress), best)

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
        self.progress = Progress(**{name: checkpoint.state[name] for name in asdict(self.progress)})

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

    def interrupt(self) -> None:
        """End after a signal; the checkpoint is written. Raises Interrupted."""
        name = self.stop.signal.name if self.stop.signal else "a signal"
        raise Interrupted(
            f"{name} after step {self.progress.step} of {self.total_steps}, saved;"
            f" go on with: convolt train --resume {self.run.folder}"
        )

    def finish(self) -> None:
        """Take the weights that the recipe asks for, look once at the test set, and write the result."""
        progress, executor = self.progress, self.executor
        kept = "last"
        if self.shadow is not None:
            executor.params.flat[...] = self.shadow
            executor.weights_changed()
        if self.recipe.early_stopping is not None and self.run.checkpoints.best_step is not None:
            executor.params.load_state_dict(self.run.checkpoints.load("best").model)
            executor.weights_changed()
            kept = "best"
        test = None if self.data.test is None else evaluate(executor, self.data.test, self.recipe.loss, self.comm)
        measured = {} if test is None else {"test_accuracy": test.accuracy, "test_loss": test.loss}
        result: dict[str, Any] = {
            **measured,
            "epochs": len(self.run.history),
            "train_seconds": progress.total_seconds,
            "images_per_second": progress.total_images / progress.total_seconds if progress.total_seconds else 0.0,
            "engine": self.engine.NAME,
            "precision": self.recipe.precision,
            "threads": self.engine.threads,
            "ranks": self.comm.size,
            "seed": self.recipe.seed,
            "weights": kept,
        }
        self.run.finish(result, executor.params)


def _check(
    model: Model, data: Dataset, recipe: Recipe, resume: bool, out: str | Path | None, checkpoint_every: str
) -> None:
    """Everything that can be known to be wrong before the first step. Raises ConfigError."""
    if model.input_shape != data.input_shape:
        raise ConfigError(
            f"the model takes images {model.input_shape}, {data.name} has {data.input_shape};"
            f" build the model with input_shape={data.input_shape}"
        )
    if model.output_shape != (data.num_classes,):
        raise ConfigError(
            f"the model has outputs {model.output_shape}, {data.name} has {data.num_classes} classes;"
            f" end it with Dense(..., {data.num_classes})"
        )
    if resume and out is None:
        raise ConfigError("resume needs the folder of the run: give out=")
    if data.valid is None:
        for name, holds in (("early_stopping", recipe.early_stopping), ("Plateau", watched(recipe.schedule))):
            if holds:
                raise ConfigError(f"{name} needs a validation split; load the data with valid=0.1 (--valid 0.1)")
    if isinstance(recipe.loss, Distillation) and not recipe.loss.teacher:
        raise ConfigError("Distillation: teacher must be the folder of a run; got ''")
    if not is_length(checkpoint_every):
        raise ConfigError(f"checkpoint_every must {HOW_TO}; got {checkpoint_every!r}")


def _fingerprint(data: Dataset) -> dict[str, Any]:
    """What tells that a resumed run sees the same data."""
    return {"name": data.name, "classes": list(data.classes), "splits": {name: len(s) for name, s in data.splits()}}
