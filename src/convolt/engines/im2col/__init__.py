"""The ``im2col`` engine: vectorized NumPy over BLAS, for machines that have nothing else.

Its one idea is the layout: **batch innermost** (C, H, W, N). A patch column is then a few long memory copies, the
filter matrix (K, C R S) times the columns (C R S, P Q N) is already the next layer's input, flattening is free and
agrees with PyTorch's order, and every strided slice of a pool still has N contiguous numbers for NumPy's inner loop.

Convolutions walk over output rows in tiles whose columns stay in the cache, and every buffer is kept from step to
step: after the first step no array of batch size is allocated.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from convolt.chain import Table, TableExecutor
from convolt.engine import Engine, EngineRecipe, Executor, resolve_threads
from convolt.engines.im2col.conv import GEMM
from convolt.engines.im2col.elementwise import ELEMENTWISE
from convolt.engines.im2col.fft import FFT
from convolt.engines.im2col.normalization import NORMALIZATION
from convolt.engines.im2col.pooling import POOLING
from convolt.engines.loops import LOOPS
from convolt.errors import ConfigError, nearest
from convolt.model import Model
from convolt.params import Params

IM2COL: Table = {**LOOPS, **ELEMENTWISE, **NORMALIZATION, **POOLING, **GEMM}
ALGORITHMS: dict[str, Table] = {"gemm": IM2COL, "fft": {**IM2COL, **FFT}}


@dataclass(frozen=True)
class Im2col(Engine):
    """Vectorised NumPy. ``threads`` workers share the tiles of each kernel; 0 means every core that is allowed.

    conv: ``"gemm"`` gathers columns for BLAS; ``"fft"`` multiplies spectra, for large filters.
    """

    threads: int = 0
    conv: Literal["gemm", "fft"] = "gemm"
    NAME: ClassVar[str] = "im2col"
    PRECISIONS: ClassVar[tuple[str, ...]] = ("fp64", "fp32", "fp32-master64")

    def __post_init__(self) -> None:
        if self.conv not in ALGORITHMS:
            raise ConfigError(f"Im2col: conv: unknown algorithm {self.conv!r}; {nearest(self.conv, ALGORITHMS)}")
        object.__setattr__(self, "threads", resolve_threads(self.threads))

    def executor(self, model: Model, params: Params | None, recipe: EngineRecipe) -> Executor:
        """The table of the chosen algorithm on batch-innermost arrays; BLAS keeps to the worker's own thread."""
        own = self.initial_params(model, params, recipe)
        return TableExecutor(model, own, recipe, ALGORITHMS[self.conv], "CHWN", workers=self.threads)
