"""ONNX Runtime behind the seam of the engines: the second peer of the benchmarks, for predictions.

It runs the graph of ``export.onnx`` with everything that ONNX Runtime does by itself: all graph optimizations, an arena
of memory, bytes scaled inside the graph. It takes as many threads as the engine it is compared with. Its threads spin
between operators, as they do unless told otherwise, which is its faster form where cores are free; ``spinning=False``
lets them sleep. It trains nothing, so it is in no list of engines.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from convolt.checks import check_flag
from convolt.engine import Array, Engine, EngineRecipe, Executor, OnReady, StepResult, resolve_threads
from convolt.errors import ConfigError, EngineError, MissingDependency
from convolt.export.onnx import INPUT, to_onnx
from convolt.losses import Loss
from convolt.model import Model
from convolt.optimizers import Optimizer
from convolt.params import Params
from convolt.rng import SampleRng

NAME = "onnxruntime"


@dataclass(frozen=True)
class OnnxRuntime(Engine):
    """Predictions by ONNX Runtime on the CPU; ``threads``: 0 means every core that is allowed."""

    threads: int = 0
    spinning: bool = True
    NAME: ClassVar[str] = NAME
    PRECISIONS: ClassVar[tuple[str, ...]] = ("fp32",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "threads", resolve_threads(self.threads))
        check_flag(self, "spinning")

    def executor(self, model: Model, params: Params | None, recipe: EngineRecipe) -> Executor:
        """A graph and a session for each format of the images, made when it is first needed."""
        return OnnxExecutor(model, self.initial_params(model, params, recipe), self.threads, self.spinning)


class OnnxExecutor(Executor):
    """One model as sessions of ONNX Runtime: float32, predictions alone. Raises MissingDependency."""

    def __init__(self, model: Model, params: Params, threads: int, spinning: bool) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingDependency("onnxruntime", "running ONNX", "export") from None
        self.model, self.params = model, params
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.log_severity_level = 3  # errors
        self._library, self._options = onnxruntime, options
        self._sessions: dict[bool, Any] = {}
        self._written = params.state_dict()

    def predict(self, x: Array) -> Array:
        """Logits (N, classes)."""
        if x.shape[1:] != self.model.input_shape:
            raise ConfigError(f"images must have shape (N, {str(self.model.input_shape)[1:-1]}); got {x.shape}")
        of_bytes = x.dtype == np.uint8
        if of_bytes not in self._sessions:
            graph = to_onnx(self.model, self.params, byte_input=of_bytes).SerializeToString()
            self._sessions[of_bytes] = self._library.InferenceSession(graph, self._options, ["CPUExecutionProvider"])
        images = x if of_bytes else x.astype(np.float32, copy=False)
        logits: Array = self._sessions[of_bytes].run(None, {INPUT: images})[0]
        return logits

    def weights_changed(self) -> None:
        """A session holds copies of the weights: it is made anew if they are others."""
        state = self.params.state_dict()
        if any((state[name] != array).any() for name, array in self._written.items()):
            self._sessions.clear()
            self._written = state

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
        """Refused. Raises EngineError."""
        raise _predicts_only()

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
        """Refused. Raises EngineError."""
        raise _predicts_only()

    def update(self, optimizer: Optimizer, part: slice | None = None) -> None:
        """Refused. Raises EngineError."""
        raise _predicts_only()

    def optimizer_state(self) -> dict[str, Array]:
        """There is none."""
        return {}

    def load_optimizer_state(self, state: dict[str, Array]) -> None:
        """Refused. Raises EngineError."""
        raise _predicts_only()


def _predicts_only() -> EngineError:
    return EngineError(f"{NAME} runs predictions only; train with one of the engines")
