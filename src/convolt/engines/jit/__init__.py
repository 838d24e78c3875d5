"""The ``jit`` engine: the whole training step in kernels that are compiled for this CPU, this model and this batch.

    graph.py      the model as fused operations         plan.py     buffers, tasks and phases
    serve.py      which kernels serve an operation      executor.py the programs of a step
    kernels/      the kernels, one file a kind of layer
    gemm.py dot.py         micro-kernels, written as LLVM IR; memory.py vectors.py help them
    blocks.py units.py     products in bf16, and what multiplies them: amx.py pair_products.py; bf16.py
    compiler.py            the kernels' cache on disk   runtime.py driver.py  the team of threads   isa.py
    codegen.py             from Python to object code, with frontend.py and inlined.py

Numba compiles the loops, LLVM IR the innermost tiles. A warm start loads object code without importing Numba.
"""

from dataclasses import dataclass
from typing import ClassVar

from convolt.checks import check_integer
from convolt.engine import Engine, EngineRecipe, Executor, resolve_threads
from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.executor import JitExecutor
from convolt.engines.jit.isa import FP32, Isa, Units, check_isa, detect
from convolt.engines.jit.programs import Programs
from convolt.engines.jit.units import bf16_units, check_unit
from convolt.errors import EngineError
from convolt.explanation import Explanation
from convolt.model import Model
from convolt.params import Params


@dataclass(frozen=True)
class JIT(Engine):
    """Compiled kernels. ``threads``: 0 means every core that is allowed. ``isa``: force an instruction set, for tests.

    isa is one of "avx512", "avx2", "neon", "plain"; None takes the widest of this CPU. unit: what multiplies in bf16,
    one of "amx", "dot" (AVX512-BF16), "fma" (float32, everywhere); None takes the fastest for convolutions and for
    dense layers, or float32 where that is faster, and says so. checkpoint_segments: cut the model into so many parts
    whose inner activations are not kept but computed again in backward: less memory, a forward pass more, the same
    bits (a dense layer's sums run in another order where the Flatten before it is computed again); 0 keeps everything.
    Raises EngineError.
    """

    threads: int = 0
    isa: str | None = None
    checkpoint_segments: int = 0
    unit: str | None = None
    NAME: ClassVar[str] = "jit"
    PRECISIONS: ClassVar[tuple[str, ...]] = ("fp32", "bf16")

    def __post_init__(self) -> None:
        object.__setattr__(self, "threads", resolve_threads(self.threads))
        check_integer(self, "checkpoint_segments", at_least=0)
        check_isa(self.isa)
        check_unit(self.unit)

    def executor(self, model: Model, params: Params | None, recipe: EngineRecipe) -> Executor:
        """Plans and kernels are made when the first batch shows its size."""
        own = self.initial_params(model, params, recipe)
        isa = detect(self.isa)
        units = self._units(recipe.precision, isa)
        looked_at = recipe.ema is not None
        return JitExecutor(model, own, isa, self.threads, units, self.checkpoint_segments, looked_at)

    def explain(self, model: Model, precision: str = "fp32", batch_size: int = 128) -> Explanation:
        """Which kernel serves each stage, forward and backward, and why: the plan's own reasons. Raises EngineError."""
        self.check_precision(precision)
        if batch_size < 1:
            raise EngineError(f"engine jit: batch size must be at least 1; got {batch_size}")
        isa = detect(self.isa)
        units = self._units(precision, isa)
        params, grads = Params(model), Params(model)
        own = self.threads, Compiler(isa), None, self.checkpoint_segments
        programs = Programs(model, params, grads, batch_size, True, units, isa, *own)
        return Explanation(self.NAME, precision, batch_size, tuple(programs.stages()))

    def _units(self, precision: str, isa: Isa) -> Units:
        """What multiplies in bf16. Raises EngineError."""
        return bf16_units(isa, self.unit) if precision == "bf16" else FP32
