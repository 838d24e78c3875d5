"""The seam between describing a network and computing it.

An ``Engine`` is an immutable description, such as ``Im2col(threads=2)``; it makes an ``Executor``: one model made
ready, with its parameters, gradients, plan and reused buffers. The training loop knows nothing but the executor, so a
new engine is one new file or folder under ``engines/`` and no change anywhere else.

Gradients are *added* into ``grads``: accumulation over micro-batches, weight sharing and residual branches cost
nothing extra. Losses are *sums* and ``scale`` is 1/(global batch): exact for uneven shards, for micro-batches and for
a last batch that is smaller.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from convolt.errors import ConfigError, EngineError
from convolt.explanation import Explanation, layer_by_layer
from convolt.losses import Loss
from convolt.machine import allowed_cores
from convolt.model import Model
from convolt.optimizers import Optimizer
from convolt.params import Params
from convolt.precision import Precision, precision
from convolt.rng import SampleRng

Array = NDArray[Any]
OnReady = Callable[[slice], None]

COMPILING = "convolt.compiling"
"""The logger of engines that compile: records of level INFO with the arguments (done, total, name)."""


class StepResult(NamedTuple):
    """What a step tells the loop: the summed loss and the logits (N, classes).

    right: how many logits name their target, where targets are classes and an engine has counted them on the way.
    """

    loss: float
    logits: Array
    right: int | None = None


class StepInput(NamedTuple):
    """What a training step works on: images, targets, 1/(global batch), what moves the weights, which samples."""

    x: Array
    y: Any
    scale: float
    optimizer: Optimizer
    rng: SampleRng | None = None


class StageTime(NamedTuple):
    """Wall seconds of one kernel of a step.

    stage: the layers it serves, by the names of the first and the last one, and their types:
    ``"0-2 Conv2d+ReLU+MaxPool2d"``. The seconds of all kernels add up to those of the step.
    """

    stage: str
    direction: str  # "forward", "backward" or "update"
    kernel: str
    seconds: float


class Executor(ABC):
    """One model made ready on one engine.

    params: the master weights, on the host. An engine may have them elsewhere or otherwise between steps, and asking
    brings them: ask anew behind each step, also to write to them, as for ``optimizer_state``. grads: the same names and
    shapes; backward adds into it. dropout: whether Dropout acts in training; the recipe may leave it off for the first
    epochs. fuses_steps: whether it gains by ``train_steps``.
    """

    params: Params
    grads: Params
    dropout: bool = True
    fuses_steps: bool = False

    @abstractmethod
    def predict(self, x: Array) -> Array:
        """Logits (N, classes) of images (N, C, H, W); uint8 images are scaled to [0, 1]."""

    @abstractmethod
    def loss_and_grads(
        self,
        x: Array,
        y: Any,
        loss: Loss,
        scale: float,
        rng: SampleRng | None = None,
        on_ready: OnReady | None = None,
        fresh: bool = False,
    ) -> StepResult:
        """Forward and backward of one batch; ``scale`` times the gradient of the summed loss is added to ``grads``.

        rng: the identity of the samples, which dropout needs. on_ready: called with each slice of ``grads.flat`` as
        soon as it is final, so that its allreduce can start while backward goes on. fresh: forget what ``grads`` holds.
        """

    @abstractmethod
    def update(self, optimizer: Optimizer, part: slice | None = None) -> None:
        """One optimizer step on ``params`` with ``grads``; the schedule has already set the optimizer's lr.

        part: of the flat vectors, where other ranks move the rest; the same part in every step.
        """

    @abstractmethod
    def optimizer_state(self) -> dict[str, Array]:
        """The optimizer's flat arrays and its ``step``, for a checkpoint; good until the next step."""

    @abstractmethod
    def load_optimizer_state(self, state: dict[str, Array]) -> None:
        """Go on from a checkpoint's optimizer state."""

    def weights_changed(self) -> None:
        """Tell the executor that ``params``, asked for behind the last step, was written to from outside."""
        return

    def statistics(self) -> dict[str, Array]:
        """A copy of the buffers (BatchNorm's statistics), to undo a step with."""
        return self.params.statistics()

    def restore_statistics(self, statistics: dict[str, Array]) -> None:
        """Put back what ``statistics`` gave."""
        self.params.restore_statistics(statistics)

    def statistics_are_finite(self) -> bool:
        """Whether the buffers are sound: a variance may overflow where the normalized values do not."""
        return all(np.isfinite(array).all() for array in self.statistics().values())

    @property
    def compile_seconds(self) -> float:
        """What compiling has taken so far: once a machine, so no part of a step's time."""
        return 0.0

    def prepare(self, x: Array) -> None:
        """Make ready what training steps on such images need, as far as that takes long."""
        return

    def zero_grads(self) -> None:
        """Forget the gradients before a new step."""
        self.grads.flat[...] = 0

    def grad_norm(self) -> float:
        """Euclidean norm of the whole gradient; not finite as soon as one element is not."""
        return math.sqrt(float(np.einsum("i,i", self.grads.flat, self.grads.flat)))  # np.dot takes every core it finds

    def train_step(
        self,
        x: Array,
        y: Any,
        loss: Loss,
        scale: float,
        optimizer: Optimizer,
        rng: SampleRng | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> StepResult:
        """A whole step when nothing stands between gradient and update; an engine may fuse it.

        The weights stay untouched when the loss, the gradient or a statistic is not finite; the result then holds a
        loss that is not. meanwhile: work of the caller's that an engine with threads of its own may do while they
        compute, once or not at all. It must not raise, nor touch x, y or the executor.
        """
        self.zero_grads()
        result = self.loss_and_grads(x, y, loss, scale, rng)
        if not (math.isfinite(result.loss + self.grad_norm()) and self.statistics_are_finite()):
            return StepResult(math.nan, result.logits)
        self.update(optimizer)
        return result

    def train_steps(
        self, steps: Sequence[StepInput], loss: Loss, meanwhile: Callable[[], None] | None = None
    ) -> list[StepResult]:
        """Whole steps, one behind another, up to the first that is not finite; an engine may make them one call.

        The same bits as by ``train_step``. meanwhile: as there; once for all of them.
        """
        results: list[StepResult] = []
        for step in steps:
            result = self.train_step(step.x, step.y, loss, step.scale, step.optimizer, step.rng, meanwhile)
            results.append(result)
            meanwhile = None
            if not math.isfinite(result.loss):
                break
        return results

    def move(self, weights: Array, gradient: Array) -> bool:
        """Keep the flat weights and the flat gradient in this memory from now on.

        False, and nothing is done, by an engine that has them in places of its own.
        """
        return False

    def synchronize_statistics(self, add: Callable[[Array], None]) -> None:
        """From now on BatchNorm takes its statistics over all ranks; ``add`` replaces an array by its sum over them.

        ``loss_and_grads`` is then called by all ranks equally often, also without images. Raises EngineError.
        """
        raise EngineError(
            f"{type(self).__name__}: this engine has no sync_batch_norm; set parallel.sync_batch_norm=false"
        )

    def profile(self, x: Array, training: bool) -> tuple[StageTime, ...]:
        """Time every kernel of a step on these images; an engine that cannot gives nothing.

        A training step must have been done before. Weights and gradients are worth nothing afterwards.
        """
        return ()

    def memory(self) -> dict[str, int]:
        """Bytes that it holds, by what they are for (activations are made with the first batch); empty if unknown."""
        return {}

    def close(self) -> None:
        """Give back threads and device memory; an executor that holds none does nothing."""
        return


def resolve_threads(threads: int) -> int:
    """The number of threads to use: 0 means every core that affinity and control group allow. Raises ConfigError."""
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 0:
        raise ConfigError(f"threads must be an integer >= 1, or 0 for every allowed core; got {threads!r}")
    cores = allowed_cores()
    if threads > max(64, 8 * cores):
        raise ConfigError(
            f"threads={threads} is far beyond the {cores} usable cores; give {cores}, or 0 for all of them"
        )
    return threads or cores


class EngineRecipe(Protocol):
    """What an engine reads of a recipe."""

    @property
    def precision(self) -> str:
        """Name of the precision."""

    @property
    def seed(self) -> int:
        """Seed of the first weights."""

    @property
    def ema(self) -> object | None:
        """Not None where weights are averaged, for which somebody looks at them after every step."""


class Engine(ABC):
    """How operations are computed: a frozen dataclass with at least ``threads``.

    NAME: the word of the command line. PRECISIONS: what it can compute in. DESCRIPTION: one line for ``doctor``.
    """

    NAME: ClassVar[str]
    PRECISIONS: ClassVar[tuple[str, ...]]
    threads: int

    @abstractmethod
    def executor(self, model: Model, params: Params | None, recipe: EngineRecipe) -> Executor:
        """Make ``model`` ready; without ``params`` the weights start from the recipe's seed. Raises EngineError."""

    def explain(self, model: Model, precision: str = "fp32", batch_size: int = 128) -> Explanation:
        """Which kernel computes each stage of a training step, and why; ``print`` shows a table. Raises EngineError."""
        self.check_precision(precision)
        return layer_by_layer(model, self.NAME, precision, batch_size, f"engine {self.NAME} has one way to do it")

    def check_precision(self, name: str) -> Precision:
        """The precision of that name. Raises EngineError unless this engine has it."""
        wanted = precision(name)
        if wanted.name not in self.PRECISIONS:
            raise EngineError(
                f"engine {self.NAME}: precision must be one of {', '.join(self.PRECISIONS)}; got {wanted.name!r}"
            )
        return wanted

    def initial_params(self, model: Model, params: Params | None, recipe: EngineRecipe) -> Params:
        """Master weights of their own: a copy of ``params``, or the first weights of the recipe's seed."""
        wanted = self.check_precision(recipe.precision)
        if params is None:
            return Params.init(model, recipe.seed, wanted.master)
        own = Params(model, wanted.master)
        own.load_state_dict(params.state_dict())
        return own
