"""Training batches as a pure function of the step.

The data set lies in memory, so a batch is an indexed copy into one of two sets of buffers in turns; there is no loader
process and no state. The order of an epoch is a permutation by (seed, epoch), augmentation and dropout are draws by
(seed, epoch, sample index): any step of a run can be made again from two integers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convolt.comms import Communicator, shard
from convolt.data import Split
from convolt.recipe import Recipe
from convolt.rng import SampleRng, permutation

Array = NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    images (n, C, H, W), valid until the loader is asked twice more; targets for the loss; labels (n,) for the accuracy;
    rng: the identity of the samples; size: of the global batch.
    """

    images: Array
    targets: Any
    labels: NDArray[np.int64]
    rng: SampleRng
    size: int

    def pieces(self, most: int | None, at_least: int = 0) -> Iterator["Batch"]:
        """Micro-batches of at most ``most`` images, all without a limit; ``at_least`` so many, empty ones last."""
        step = most or max(1, len(self.labels))
        for start in range(0, max(len(self.labels), step * at_least), step):
            part = slice(start, start + step)
            yield Batch(self.images[part], self.targets[part], self.labels[part], self.rng[part], self.size)


class Loader:
    """The batches of a training split under a recipe."""

    def __init__(self, split: Split, recipe: Recipe, num_classes: int, comm: Communicator) -> None:
        self.steps_per_epoch = -(-len(split) // recipe.batch_size)
        self._split, self._recipe, self._classes, self._comm = split, recipe, num_classes, comm
        self._shape = (min(recipe.batch_size, len(split)), *split.images.shape[1:])
        self._buffers: list[list[Array]] = [[], []]  # the last set holds what was made last
        self._order: SampleRng | None = None  # of an epoch

    def batch(self, step: int) -> Batch:
        """This rank's part of the global batch of that step; the last batch of an epoch may be smaller."""
        return self.batches(step, 1)[0]

    def batches(self, first: int, count: int) -> list[Batch]:
        """The batches of so many steps from that one on."""
        self._buffers.reverse()
        buffers = self._buffers[-1]
        while len(buffers) < count:
            buffers.append(np.empty(self._shape, self._split.images.dtype))
        return [self._made(first + i, buffers[i]) for i in range(count)]

    def _made(self, step: int, buffer: Array) -> Batch:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order.epoch != epoch:
            seed = self._recipe.seed
            self._order = SampleRng(seed, epoch, permutation(seed, epoch, len(self._split)))
        size = self._recipe.batch_size
        samples = self._order[position * size : (position + 1) * size]
        mine = shard(len(samples), self._comm)
        if all(augment.per_sample for augment in self._recipe.augment):
            return self._augmented(samples[mine], len(samples), buffer)
        whole = self._augmented(samples, len(samples), buffer)
        return Batch(whole.images[mine], whole.targets[mine], whole.labels[mine], whole.rng[mine], whole.size)

    def _augmented(self, rng: SampleRng, size: int, buffer: Array) -> Batch:
        indices, images = rng.indices, buffer[: len(rng)]
        np.take(self._split.images, indices, axis=0, out=images, mode="clip")  # "clip" writes without a second buffer
        labels = self._split.labels[indices]
        targets: Array = labels
        for augment in self._recipe.augment:
            images, targets = augment(images, targets, rng, self._classes)
        return Batch(images, targets, labels, rng, size)
