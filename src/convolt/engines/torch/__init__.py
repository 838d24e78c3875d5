"""The ``torch`` engine: PyTorch on CPU or CUDA, the oracle of the tests and the peer of the benchmarks.

It is written as a PyTorch user would write it, because a peer that we slow down is no peer: native modules, native
losses, fused native optimizers, autocast. What makes it an executor is memory. Weights, gradients and the optimizer's
state are flat tensors, and modules hold views of them. On the CPU those tensors *are* the vectors of ``Params``.

This is the one place that finds PyTorch missing; the modules beside it import it freely.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from convolt.checks import check_choice, check_flag
from convolt.engine import Engine, EngineRecipe, Executor, resolve_threads
from convolt.errors import EngineError, MissingDependency
from convolt.model import Model
from convolt.params import Params

try:
    import torch
except ImportError:
    raise MissingDependency("torch", "engine torch", "torch") from None

from convolt.engines.torch.executor import TorchExecutor


@dataclass(frozen=True)
class Torch(Engine):
    """PyTorch. ``threads`` limits its operators on the CPU during each call; 0 means every core that is allowed.

    device: ``"auto"`` takes CUDA if there is one. channels_last: images lie as N H W C in memory, which many
    convolutions prefer. compile: ``torch.compile``, which needs a C++ compiler and a long run to pay for itself.
    fp32_precision: ``"bf16"`` multiplies float32 tensors in bf16 where the CPU can do that (torch.backends.mkldnn).
    """

    threads: int = 0
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    channels_last: bool = False
    compile: bool = False
    fp32_precision: Literal["ieee", "bf16"] = "ieee"
    NAME: ClassVar[str] = "torch"
    PRECISIONS: ClassVar[tuple[str, ...]] = ("fp64", "fp32", "bf16", "fp16")

    def __post_init__(self) -> None:
        object.__setattr__(self, "threads", resolve_threads(self.threads))
        check_choice(self, "device", ("cpu", "cuda", "auto"))
        check_flag(self, "channels_last")
        check_flag(self, "compile")
        check_choice(self, "fp32_precision", ("ieee", "bf16"))

    def executor(self, model: Model, params: Params | None, recipe: EngineRecipe) -> Executor:
        """Native modules around views of the flat weights."""
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise EngineError("engine torch: device='cuda' needs a GPU and a CUDA build of torch; use device='cpu'")
        if self.compile:
            _find_compiler()
        own = self.initial_params(model, params, recipe)
        return TorchExecutor(
            model,
            own,
            recipe.precision,
            torch.device("cuda" if cuda and self.device != "cpu" else "cpu"),
            self.threads,
            torch.channels_last if self.channels_last else torch.contiguous_format,
            self.compile,
            self.fp32_precision,
        )


def _find_compiler() -> None:
    """Fail now in one line, not in the first step in a hundred."""
    from torch._inductor import cpp_builder, exc  # takes seconds to import

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise EngineError("engine torch: compile=True needs a C++ compiler; install g++ or use compile=False") from None
