"""Training: one loop for every engine, every optimizer and any number of ranks.

``fit`` prepares a run, ``_Training.loop`` and ``take_steps`` are the loop, on one screen; everything that changes the
mathematics is a field of the recipe and a visible line in it. Callbacks only observe.

A signal is heeded between two calls of an engine and between two batches of a validation, never elsewhere: there the
state is whole, so what is saved then goes on with the same bits (progress.py). A checkpoint that cannot be written ends
the run: to go on would only be to compute what the next interruption loses.
"""

import math
import signal
import time as clock
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convolt.callbacks import Callback, StepEvent
from convolt.checkpoint import Checkpoint
from convolt.comms import Communicator, Serial, whereabouts
from convolt.course import Course
from convolt.data import Dataset
from convolt.datasets.spec import DataSpec
from convolt.duration import due
from convolt.elastic import regroup
from convolt.engine import Engine, Executor
from convolt.engines import default_engine
from convolt.errors import Interrupted, RanksLost, TrainingError
from convolt.evaluation import Evaluation, evaluate
from convolt.follower import Follower, announced
from convolt.history import Epoch
from convolt.loader import Batch, Loader
from convolt.model import Model
from convolt.optimizers import Optimizer
from convolt.parallel import FREE, Parallel
from convolt.params import Params
from convolt.preconditions import check_fit, check_kinds
from convolt.progress import Progress, State
from convolt.recipe import Recipe, plain
from convolt.run import Run
from convolt.signals import StopAsked, StopRequest
from convolt.step import Outcome, Stepper
from convolt.teacher import teacher_of


def fit(
    model: Model,
    data: Dataset,
    recipe: Recipe | None = None,
    *,
    engine: Engine | None = None,
    params: Params | None = None,
    comm: Communicator | None = None,
    parallel: Parallel | None = None,
    out: str | Path | None = None,
    root: str | Path = "runs",
    resume: bool = False,
    checkpoint_every: str = "1ep",
    keep_last: int = 2,
    callbacks: Sequence[Callback] = (),
    source: DataSpec | None = None,
) -> Run:
    """Train ``model`` on ``data`` by ``recipe`` and return the finished run.

    engine: how to compute; the default is the fastest there is. params: weights to start from. comm: the ranks that
    share every batch, each of which calls this with the same arguments; parallel: how they do it. Rank 0 alone writes.
    out: the run's folder; without it a new one under ``root``. resume: go on with the run in ``out``.
    checkpoint_every: a length such as "1ep" or "200ba". source: where ``data`` came from, if not from
    ``load_dataset``, which tells it.
    Warns when a resumed run passes over a damaged checkpoint, or goes on under other conditions.
    Raises ConfigError, EngineError, RunError, TrainingError, CheckpointError, and Interrupted after SIGINT or SIGTERM.
    """
    recipe, comm, parallel = recipe or Recipe(), comm or Serial(), parallel or Parallel()
    if parallel.elastic:
        comm.survive()
    if engine is None:  # a recipe of the wrong kind is told below
        engine = default_engine(recipe.precision if isinstance(recipe, Recipe) else "fp32")
    check_kinds(model, data, recipe, engine, params)
    check_fit(model, data, recipe, resume, out, checkpoint_every)
    if source is None and data.origin is not None:
        source = DataSpec(**data.origin)
    config = {
        "model": plain(model),
        "data": {**data.fingerprint(), "source": None if source is None else plain(source)},
        "recipe": plain(recipe),
        "engine": plain(engine),
        "ranks": comm.size,
        "parallel": plain(parallel),
        "checkpoint_every": checkpoint_every,
    }
    with ExitStack() as closing:
        loader = Loader(data.train, recipe, data.num_classes, comm)
        loader.batch(0)  # an augmentation that cannot be done is told before there is a folder
        teacher = teacher_of(model, recipe)
        executor = engine.executor(model, params, recipe)
        for each in (executor, teacher):
            if each is not None:
                closing.callback(each.close)
        checkpoint, opened = None, None
        if comm.rank == 0 and resume and out is not None:
            shapes = {name: array.shape for name, array in executor.params.state_dict().items()}
            free = ("engine", "ranks", "checkpoint_every", "data.source", *FREE)
            opened, checkpoint = Run.resume(out, config, may_change=free, expect=shapes, keep_last=keep_last)
        elif comm.rank == 0:
            label = f"{data.name}-{engine.NAME}"
            opened = Run.create(config, label, out=out, root=root, threads=engine.threads, keep_last=keep_last)
        run = closing.enter_context(announced(opened, comm))
        if comm.size > 1:
            run.log("ranks", {"ranks": whereabouts(comm, engine.threads)})
        stop = closing.enter_context(StopRequest())
        stepper = Stepper(executor, recipe, comm, parallel, stop)
        stepper.prepare(loader.batch(0))
        training = _Training(
            run, data, recipe, executor, loader, stepper, tuple(callbacks), checkpoint_every, keep_last, teacher
        )
        closing.callback(training.close)
        try:
            training.start(checkpoint, from_given=params is not None)
            training.go_on(engine)
        finally:
            for callback in callbacks:
                callback.on_end(training.run.result)
    return training.run


class _Training:
    """One run under way."""

    def __init__(
        self,
        run: Run,
        data: Dataset,
        recipe: Recipe,
        executor: Executor,
        loader: Loader,
        stepper: Stepper,
        callbacks: tuple[Callback, ...],
        checkpoint_every: str,
        keep_last: int,
        teacher: Executor | None,
    ) -> None:
        self.run, self.data, self.recipe, self.executor, self.loader = run, data, recipe, executor, loader
        self.stepper, self.comm, self.callbacks = stepper, stepper.comm, callbacks
        self.checkpoint_every, self.keep_last = checkpoint_every, keep_last
        self.state = State(executor, recipe.ema)
        self.course = Course(recipe, loader, stepper, self.state, checkpoint_every, teacher)
        self.saved_step: int | None = None
        self.asked = 0  # the signal that ends the run
        self.training_is_over = False

    def close(self) -> None:
        """Give the run's folder back, whether it was this rank's from the start or not."""
        self.run.close()

    @property
    def writes(self) -> bool:
        """Whether this rank writes the run."""
        return self.run.writes

    @property
    def progress(self) -> Progress:
        """The numbers of the state; another object after a rollback, so it is never kept."""
        return self.state.progress

    # ------------------------------------------------------------------------------------------------- the loop

    def go_on(self, engine: Engine) -> None:
        """The loop and what comes after it, also when ranks die; until the end, or until a signal. Raises as `loop`."""
        while True:
            try:
                if self.asked:
                    self.interrupt(self.asked)
                self.loop()
                return self.finish(engine)
            except StopAsked as stopped:
                self.asked = stopped.signal
            except RanksLost:
                if not self.stepper.parallel.elastic:
                    raise
                self.recover()

    def recover(self) -> None:
        """Go on with the ranks that are left. Raises RunError where the one that must write now cannot."""
        before, known = self.comm.size, len(self.run.history)
        self.run, self.asked = regroup(self.run, self.state, self.stepper, self.loader, self.asked, self.keep_last)
        step = self.progress.step
        self.warn((f"{before - self.comm.size} of {before} ranks died after step {step}; {self.comm.size} go on",))
        if not self.training_is_over:
            ended = step == self.progress.epochs * self.loader.steps_per_epoch
            self.save(best=ended and self.progress.latest_is_best(self.recipe.early_stopping))
        for epoch in self.run.history[known:]:
            for callback in self.callbacks:
                callback.on_epoch(epoch)

    def loop(self) -> None:
        """Steps until the epochs are done, or early stopping. Raises StopAsked, TrainingError, CheckpointError."""
        if self.epoch_is_over:  # a signal came in its validation
            self.close_step()
        while self.progress.step < self.course.total_steps and not self.stopped_early:
            batches, optimizers, outcomes, seconds = self.take_steps()
            for batch, optimizer, outcome in zip(batches, optimizers, outcomes, strict=False):  # up to one not finite
                taken, progress = math.isfinite(outcome.loss), self.progress
                if not taken and progress.step not in progress.left_out and self.rolled_back():
                    break
                progress.step += 1
                progress.lr = optimizer.lr
                if taken:
                    progress.count(outcome.loss, outcome.right, batch.size, seconds)
                else:
                    progress.skipped += 1
                self.tell(batch, outcome.loss if taken else math.nan)
            else:
                self.close_step()

    def take_steps(self) -> tuple[list[Batch], list[Optimizer], list[Outcome], float]:
        """Take the next step, or several in one call: their parts, what they gave, and the seconds of each.

        Nothing comes of a step that is left out. The last one may be one that is not finite, and has changed nothing.
        """
        began, compiled = clock.perf_counter(), self.executor.compile_seconds
        first = self.progress.step
        self.executor.dropout = self.course.dropout(first)
        batches, optimizers = self.course.parts(first)
        if first in self.progress.left_out:
            return batches, optimizers, [Outcome(math.nan, 0)], 0.0
        outcomes = self.stepper.steps(batches, optimizers, partial(self.course.ahead, first + len(batches)))
        if math.isfinite(outcomes[-1].loss):
            self.state.average(self.course.time(first + len(outcomes)))
        seconds = (clock.perf_counter() - began - (self.executor.compile_seconds - compiled)) / len(outcomes)
        self.course.pace = seconds
        return batches, optimizers, outcomes, seconds

    def rolled_back(self) -> bool:
        """Apply the policy to a step that is not finite. Raises TrainingError; True when an earlier step comes next."""
        policy, step = self.recipe.non_finite, self.progress.step
        if policy.policy == "raise" or len(self.progress.left_out) >= policy.limit:
            again = f" for the {policy.limit + 1}th time" if policy.policy != "raise" else ""
            raise TrainingError(
                f"step {step + 1}: the loss, the gradient or a statistic is not finite{again}; the weights are as they"
                " were before. Lower lr, clip the gradient (clip_norm), or choose another policy:"
                " --set non_finite.policy=skip or rollback"
            )
        left_out = [*self.progress.left_out, step]
        event = {"step": step + 1, "policy": policy.policy, "left_out": [number + 1 for number in left_out]}
        if policy.policy == "skip":
            self.progress.left_out = left_out
            self.run.log("non_finite", event)
            return False
        factor = self.progress.lr_factor * policy.lr_factor
        checkpoint = self.run.checkpoints.load("last") if self.writes else None
        self.restore(checkpoint)
        if checkpoint is not None:
            self.run.rewind(checkpoint)
            self.warn(checkpoint.warnings)
        self.progress.left_out, self.progress.lr_factor = left_out, factor
        self.run.log("non_finite", {**event, "back_to": self.progress.step})
        return True

    # --------------------------------------------------------------------------------------- ends of steps, epochs

    def close_step(self) -> None:
        """Validate at an epoch's end, write a checkpoint when one is due, heed a signal."""
        step = self.progress.step
        if self.epoch_is_over or step % self.stepper.parallel.local_steps == 0:
            self.state.meet(self.stepper)
        improved = self.epoch_is_over and self.close_epoch()
        done = step == self.course.total_steps or self.stopped_early
        if improved or done or due(self.checkpoint_every, self.course.time(step)):
            self.save(best=improved)
        self.heed()

    @property
    def epoch_is_over(self) -> bool:
        """Whether the last step of an epoch is done, and its validation is not."""
        return self.progress.step == (self.progress.epochs + 1) * self.loader.steps_per_epoch

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping has had enough."""
        early, state = self.recipe.early_stopping, self.progress.stopping
        return early is not None and state is not None and early.should_stop(state)

    def close_epoch(self) -> bool:
        """Validate, record the epoch, move early stopping; True when this is the best epoch so far."""
        valid = self.validate()  # first: it is left halfway when a signal comes, or when a rank dies
        seconds = self.stepper.all_seconds() if self.comm.size > 1 else {}
        progress = self.progress
        images = progress.images
        record = Epoch(
            epoch=progress.epochs + 1,
            train_loss=progress.loss_sum / images if images else math.nan,
            train_accuracy=progress.correct / images if images else math.nan,
            valid_loss=valid and valid.loss,
            valid_accuracy=valid and valid.accuracy,
            lr=progress.lr,
            train_seconds=progress.seconds,
            images_per_second=images / progress.seconds if progress.seconds else 0.0,
            skipped_steps=progress.skipped,
        )
        improved = False
        if valid is not None:
            metrics = {"valid_loss": valid.loss, "valid_accuracy": valid.accuracy}
            improved = progress.observe(metrics, self.recipe.early_stopping)
        progress.close_epoch()
        self.run.log_epoch(record)
        if self.comm.size > 1:
            self.run.log("ranks_seconds", {"epoch": record.epoch, **seconds})
        for callback in self.callbacks:
            callback.on_epoch(record)
        return improved

    def validate(self) -> Evaluation | None:
        """The validation split under the weights that would be shipped."""
        if self.data.valid is None:
            return None
        with self.state.shipped():
            return evaluate(self.executor, self.data.valid, self.recipe.loss, self.comm, self.heed)

    def heed(self) -> None:
        """Raise StopAsked, on every rank, when a signal came to any of them."""
        asked = self.stepper.asked_to_stop()
        if asked:
            raise StopAsked(asked)

    def interrupt(self, asked: int) -> None:
        """End after a signal, saved. Raises Interrupted."""
        if self.saved_step != self.progress.step:
            self.save(best=False)
        self.comm.barrier()
        done = f"{signal.Signals(asked).name} after step {self.progress.step} of {self.course.total_steps}"
        raise Interrupted(f"{done}, saved; go on with: {self.way_on()}")

    def way_on(self) -> str:
        """How a user resumes this run: by the command line if that can load the data again."""
        if self.run.config["data"]["source"] is None:
            return f"fit(..., out={str(self.run.folder)!r}, resume=True)"
        ranks = f" --ranks {self.comm.size}" if self.comm.size > 1 else ""
        return f"convolt train --resume {self.run.folder}{ranks}"

    def tell(self, batch: Batch, loss: float) -> None:
        """Tell the callbacks of a step."""
        steps, step, lr = self.loader.steps_per_epoch, self.progress.step, self.progress.lr
        event = StepEvent(step, -(-step // steps), self.recipe.epochs, steps, loss / batch.size, lr, batch.size)
        for callback in self.callbacks:
            callback.on_step(event)

    def warn(self, messages: Sequence[str]) -> None:
        """Tell the caller, and the run's log, what is not as it should be."""
        for message in messages if self.writes else ():
            warnings.warn(message, stacklevel=4)  # the caller of fit
            self.run.log("warning", {"message": message})

    # ------------------------------------------------------------------------------------------ start, save, finish

    def start(self, checkpoint: Checkpoint | None, from_given: bool) -> None:
        """Take a checkpoint's state, if rank 0 has one.

        Without one, save what could not be made again (given weights), or what a rollback or a reader will want.
        """
        if checkpoint is not None:
            self.warn(checkpoint.warnings)
        found = np.array([float(checkpoint is not None)])
        self.comm.broadcast(found)
        if found[0]:
            self.restore(checkpoint)
        elif from_given or self.recipe.non_finite.policy == "rollback" or not self.course.total_steps:
            self.save(best=False)
        self.comm.barrier()  # passed by all or by none: from here on the loss of a rank is an affair of `go_on`
        for callback in self.callbacks:
            callback.on_start(self.run)

    def save(self, best: bool) -> None:
        """Write a checkpoint of where the run stands."""
        self.state.meet(self.stepper)
        self.state.save(self.run, best, self.stepper)
        self.saved_step = self.progress.step

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Go back to a checkpoint, which rank 0 has read."""
        if checkpoint is not None:
            self.state.restore(checkpoint)
        self.state.spread(self.comm)
        if isinstance(self.run, Follower):
            self.run.forget(self.progress.epochs)
        self.saved_step = self.progress.step

    def finish(self, engine: Engine) -> None:
        """Take the weights that the recipe asks for, look once at the test set, and write the result."""
        progress, executor = self.progress, self.executor
        self.comm.barrier()  # the last checkpoint is written: its weights are not needed any more
        self.training_is_over = True
        kept = "last"
        if self.state.shadow is not None:
            executor.params.flat[...] = self.state.shadow
        if self.recipe.early_stopping is not None and progress.best is not None:
            if self.writes:
                best = self.run.checkpoints.load("best")
                self.warn(best.warnings)
                executor.params.load_state_dict(best.model)
            for array in (executor.params.flat, *executor.params.buffers.values()):
                self.comm.broadcast(array)
            kept = "best"
        executor.weights_changed()
        measured = {}
        if self.data.test is not None:
            test = evaluate(executor, self.data.test, self.recipe.loss, self.comm, self.heed)
            measured = {"test_accuracy": test.accuracy, "test_loss": test.loss}
        result: dict[str, Any] = {
            **measured,
            "epochs": len(self.run.history),
            "train_seconds": progress.total_seconds,
            "images_per_second": progress.total_images / progress.total_seconds if progress.total_seconds else 0.0,
            "compile_seconds": executor.compile_seconds,
            "engine": engine.NAME,
            "precision": self.recipe.precision,
            "threads": engine.threads,
            "ranks": self.comm.size,
            "seed": self.recipe.seed,
            "weights": kept,
        }
        if self.comm.size > 1:
            result["ranks_seconds"] = self.stepper.all_seconds()
        self.run.finish(result, executor.params)
        self.comm.barrier()
