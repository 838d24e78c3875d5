"""Evaluation of a split: logits batch by batch, the mean loss and the accuracy over all ranks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convolt.comms import Communicator, Serial, shard
from convolt.data import Split
from convolt.engine import Executor
from convolt.losses import CrossEntropy, Distillation, Loss
from convolt.metrics import correct

Array = NDArray[Any]
BATCH = 256


class Evaluation(NamedTuple):
    """Mean loss and accuracy of a split."""

    loss: float
    accuracy: float


def predict(executor: Executor, images: Array, stop: Callable[[], None] | None = None) -> Array:
    """Logits (N, classes) of any number of images, in batches; ``stop`` is called before each and may raise."""
    parts = []
    for start in range(0, len(images), BATCH):
        if stop is not None:
            stop()
        parts.append(executor.predict(images[start : start + BATCH]))
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def evaluate(
    executor: Executor,
    split: Split,
    loss: Loss,
    comm: Communicator | None = None,
    stop: Callable[[], None] | None = None,
) -> Evaluation:
    """Mean loss and accuracy over the whole split; each rank computes its shard and all get the sum.

    stop: called before each batch, equally often on every rank, and may raise.
    """
    comm = comm or Serial()
    mine = shard(len(split), comm)
    largest = -(-len(split) // comm.size)
    sums = np.zeros(2)
    for start in range(mine.start, mine.start + largest, BATCH):
        if stop is not None:
            stop()
        part = slice(start, min(start + BATCH, mine.stop))
        labels = split.labels[part]
        if len(labels):
            logits = executor.predict(split.images[part])
            with np.errstate(over="ignore", invalid="ignore"):  # the caller sees a loss that is not finite
                sums += on_labels(loss)(logits, labels)[0], correct(logits, labels).sum()
    comm.allreduce(sums)
    return Evaluation(*(float(total) / len(split) for total in sums))


def on_labels(loss: Loss) -> Loss:
    """The loss that validation can compute: a student's is cross-entropy, for lack of the teacher."""
    return CrossEntropy() if isinstance(loss, Distillation) else loss
