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


def steps_of_a_call(pace: float) -> int:
    """How many steps of so many seconds may follow one another in a call."""
    return max(1, min(MOST_STEPS, int(LONGEST / max(pace, 1e-6))))


class _Ahead(NamedTuple):
    """Steps to come, and what their optimizers depend on besides the recipe: ``now`` is before the first."""

    now: Time
    lr_factor: float
    batches: list[Batch]
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

    def stretch(self, first: int) -> int:
        """How many steps, from that one on, may be taken before the host has something to do between two of them."""
        recipe, epoch = self.recipe, self.loader.steps_per_epoch
        alone = recipe.ema is not None or self.teacher is not None or first in self.state.progress.left_out
        if alone or self.pace is None or not self.stepper.fuses:
            return 1
        now = self.time(first)
        saved = period(self.checkpoint_every, now)
        ends = [first + steps_of_a_call(self.pace)]
        ends += [(first // every + 1) * every for every in (epoch, saved)]
        ends += [step for step in (length(recipe.dropout_from, now), *self.state.progress.left_out) if step > first]
        return min(ends) - first

    def dropout(self, step: int) -> bool:
        """Whether Dropout acts in a step."""
        return step >= length(self.recipe.dropout_from, self.time(step))

    def parts(self, first: int) -> tuple[list[Batch], list[Optimizer]]:
        """Batches and optimizers of the steps that were made ahead, if that one is the first of them; else of it alone.

        With the teacher's answers where the loss wants them.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.now.step != first:
            batches, optimizers = self.loader.batches(first, 1), self._optimizers(first, 1)
        elif (ahead.now, ahead.lr_factor) != (self.time(first), self.state.progress.lr_factor):
            batches, optimizers = ahead.batches, self._optimizers(first, len(ahead.batches))
        else:
            batches, optimizers = ahead.batches, ahead.optimizers
        if self.teacher is not None:
            batches = [with_teacher(batch, self.teacher.predict(batch.images)) for batch in batches]
        return batches, optimizers

    def ahead(self, first: int) -> None:
        """Make what the next steps need and what does not depend on those before, which are under way.

        If something of it fails, they are taken one by one, and it is told when that step comes: those before it count.
        """
        if first >= self.total_steps:
            return
        with suppress(Exception):
            count, factor = self.stretch(first), self.state.progress.lr_factor
            batches, optimizers = self.loader.batches(first, count), self._optimizers(first, count)
            self._ahead = _Ahead(self.time(first), factor, batches, optimizers)

    def _optimizers(self, first: int, count: int) -> list[Optimizer]:
        factor = self.state.progress.lr_factor
        return [self.recipe.optimizer_at(self.time(step), factor) for step in range(first, first + count)]
