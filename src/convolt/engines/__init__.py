"""Engines: how operations are computed. A folder means "pick one of these".

==========  =========================================================================================
``loops``   the living definition: NumPy and Python loops over positions, one thread, never optimized
``im2col``  vectorized NumPy over BLAS, batch innermost, every buffer reused
``jit``     fused kernels compiled for this CPU: the fastest
``torch``   PyTorch on CPU or CUDA: the oracle of the tests and the peer of the benchmarks
==========  =========================================================================================

A new engine is one new file or folder here and one line in ``_MODULES``; nothing else names it. Modules are imported
when an engine is asked for, so that ``import convolt`` and ``--help`` stay fast.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

from convolt.engine import Engine
from convolt.errors import ConfigError, nearest
from convolt.peaks import Peaks

if TYPE_CHECKING:
    from convolt.engines.im2col import Im2col
    from convolt.engines.jit import JIT
    from convolt.engines.loops import Loops
    from convolt.engines.torch import Torch

# name on the command line -> (module, class)
_MODULES = {
    "loops": ("convolt.engines.loops", "Loops"),
    "im2col": ("convolt.engines.im2col", "Im2col"),
    "jit": ("convolt.engines.jit", "JIT"),
    "torch": ("convolt.engines.torch", "Torch"),
}
__all__ = ["JIT", "Im2col", "Loops", "Torch", "default_engine", "engine_class", "measured_peaks", "names"]

#: Which engine is taken when none is named.
FASTEST_FIRST = ("jit", "im2col")

#: What ``convolt bench`` compares when nothing is named: PyTorch in every form that may be its fastest.
CONTENDERS = (
    *("jit-fp32", "jit-bf16", "im2col"),
    *("torch", "torch-channels_last", "torch-fp32_precision=bf16", "torch-bf16", "torch-channels_last-bf16"),
)


def names() -> tuple[str, ...]:
    """Names of all engines, as the command line takes them."""
    return tuple(_MODULES)


def engine_class(name: str) -> type[Engine]:
    """The engine's class; importing it may need an optional library. Raises ConfigError, MissingDependency."""
    if name not in _MODULES:
        raise ConfigError(f"engine: unknown name {name!r}; {nearest(name, _MODULES)}")
    module, attribute = _MODULES[name]
    found: type[Engine] = getattr(import_module(module), attribute)
    return found


def default_engine(precision: str = "fp32") -> Engine:
    """The engine when none is named: the fastest that can do this precision, on every core that is allowed.

    Warns, with the reason, when it is not the fastest of all.
    """
    reasons: list[str] = []
    for name in FASTEST_FIRST:
        cls = engine_class(name)
        if precision in cls.PRECISIONS:
            if reasons:
                warnings.warn(f"the engine is {name}; not {'; not '.join(reasons)}", stacklevel=2)
            return cls()
        reasons.append(f"{name}, which has no precision {precision}")
    return engine_class(FASTEST_FIRST[0])()


def measured_peaks(threads: int) -> Peaks:
    """What this machine's cores and memory can do at most, measured now, by compiled kernels."""
    peaks: Peaks = import_module("convolt.engines.jit.peaks").measure(threads)
    return peaks


def __getattr__(attribute: str) -> type[Engine]:
    for name, (_, class_name) in _MODULES.items():
        if class_name == attribute:
            return engine_class(name)
    raise AttributeError(f"module 'convolt.engines' has no engine {attribute!r}")
