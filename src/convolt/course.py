"""The course of a run: what each step is made of, and how many may follow one another before something else is due.

An engine that makes several steps one call saves what lies between two of them: the host's part of a step of two
milliseconds is slow, because the step has driven Python from the caches. So steps are taken in stretches. One ends
where the host has something to do: at an epoch's end, at a checkpoint, before a step that is left out, where dropout
sets in, and soon enough for a signal to be heeded. How long it is changes nothing but the time.
"""

from contextlib import suppress
from typing import NamedTuple

from convolt.duration import Time, length, period
from convolt.engine import Executor
from convolt.loader import Batch, Loader
from convolt.optimizers import Optimizer
from convolt.progress import State
from convolt.recipe import Recipe
from convolt.schedules import watched
from convolt.step import Stepper
from convolt.teacher import with_teacher

MOST_STEPS = 16  # in a stretch; of 32 mnist-cnn gains no more, and batches ahead take memory
LONGEST = 0.05  # seconds of a stretch, for which a signal waits


class _Ahead(NamedTuple):
    """Optimizers of steps to come, and all that they depend on besides the recipe: ``now`` is before the first."""

    now: Time
    lr_factor: float
    optimizers: list[Optimizer]


class Course:
    """What the steps of one run are made of.

    teacher: whose answers the loss wants. pace: seconds that a step takes, once known.
    """

    def __init__(
        self,
        recipe: Recipe,
        loader: Loader,
        stepper: Stepper,
        state: State,
        checkpoint_every: str,
        teacher: Executor | None,
    ) -> None:
        self.recipe, self.loader, self.stepper, self.state, self.teacher = recipe, loader, stepper, state, teacher
        self.checkpoint_every = checkpoint_every
        self.total_steps = recipe.epochs * loader.steps_per_epoch
        self.pace: float | None = None
        self._ahead: _Ahead | None = None

    def time(self, step: int) -> Time:
        """Where the run stands after ``step`` steps, with what Plateau watches."""
        monitor = watched(self.recipe.schedule)
        metrics = self.state.progress.monitored[monitor] if monitor else ()
        return Time(step, self.loader.steps_per_epoch, self.total_steps, tuple(metrics))

    def ready(self, first: int) -> int:
        """How many steps, from that one on, are made ahead to be taken in one call; else one."""
        ahead = self._ahead
        return len(ahead.optimizers) if ahead is not None and ahead.now.step == first else 1

    def stretch(self, first: int) -> int:
        """How many steps, from that one on, may be taken before the host has something to do between two of them."""
        recipe, epoch = self.recipe, self.loader.steps_per_epoch
        alone = recipe.ema is not None or self.teacher is not None or first in self.state.progress.left_out
        if alone or self.pace is None or not self.stepper.fuses:
            return 1
        now = self.time(first)
        saved = period(self.checkpoint_every, now)
        ends = [first + max(1, int(LONGEST / max(self.pace, 1e-6))), first + MOST_STEPS]
        ends += [(first // every + 1) * every for every in (epoch, saved)]
        ends += [step for step in (length(recipe.dropout_from, now), *self.state.progress.left_out) if step > first]
        return min(ends) - first

    def dropout(self, step: int) -> bool:
        """Whether Dropout acts in a step."""
        return step >= length(self.recipe.dropout_from, self.time(step))

    def batches(self, first: int, count: int) -> list[Batch]:
        """The batches of so many steps, with the teacher's answers where the loss wants them."""
        batches, teacher = self.loader.batches(first, count), self.teacher
        if teacher is None:
            return batches
        return [with_teacher(batch, teacher.predict(batch.images)) for batch in batches]

    def optimizers(self, first: int, count: int) -> list[Optimizer]:
        """The optimizers of so many steps."""
        now, factor, ahead = self.time(first), self.state.progress.lr_factor, self._ahead
        if ahead is not None and (ahead.now, ahead.lr_factor, len(ahead.optimizers)) == (now, factor, count):
            return ahead.optimizers
        return [self.recipe.optimizer_at(self.time(step), factor) for step in range(first, first + count)]

    def ahead(self, first: int) -> None:
        """Make what the next steps need and what does not depend on those before, which are under way.

        If something of it fails, they are taken one by one, and it is told when that step comes: those before it count.
        """
        self._ahead = None
        if first >= self.total_steps:
            return
        with suppress(Exception):
            count = self.stretch(first)
            self.loader.make(first, count)
            optimizers = self.optimizers(first, count)
            self._ahead = _Ahead(self.time(first), self.state.progress.lr_factor, optimizers)
