"""Distillation: the network that a student learns from, and batches that carry its answers beside the targets."""

from typing import Any

from numpy.typing import NDArray

from convolt.engine import Executor
from convolt.errors import ConfigError
from convolt.loader import Batch
from convolt.losses import Distillation, DistillationTargets
from convolt.model import Model
from convolt.recipe import Recipe
from convolt.run import Run


def teacher_of(model: Model, recipe: Recipe) -> Executor | None:
    """The network that ``model`` learns from, made ready; None for other losses than distillation.

    Raises ConfigError, RunError, CheckpointError.
    """
    if not isinstance(recipe.loss, Distillation):
        return None
    if not recipe.loss.teacher:
        raise ConfigError("Distillation: teacher must be the folder of a run; got ''")
    run = Run.load(recipe.loss.teacher)
    for what in ("input_shape", "output_shape"):
        ours, theirs = getattr(model, what), getattr(run.model, what)
        if ours != theirs:
            raise ConfigError(f"Distillation: teacher must have the student's {what} {ours}; {run.folder} has {theirs}")
    return run.executor()


def with_teacher(batch: Batch, logits: NDArray[Any]) -> Batch:
    """The same batch with a teacher's logits beside the targets."""
    return Batch(batch.images, DistillationTargets(batch.targets, logits), batch.labels, batch.rng, batch.size)
