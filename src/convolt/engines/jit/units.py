"""Which unit multiplies bf16 numbers when a run asks for bf16, or whether float32 is better.

Tiles always win. Without them the same instructions are a gain on one CPU and a loss on another: dot products have half
of float32's rate on some CPUs and twice that on others, with the same flags. So the rates are measured, in 20 ms, and
where float32 is faster it computes, with a warning that tells both figures. Forcing a unit is for tests, and for those
who want a bf16 run's numbers on a CPU without it.

Dot products serve convolutions by the kernels of float32, whose numbers become pairs (``gemm``), and dense layers by
those of the tiles. Multiply-adds of bf16 numbers serve dense layers if they should be the fastest; convolutions by them
are for tests.
"""

import warnings
from collections.abc import Mapping
from typing import get_args

from convolt.engines.jit.isa import FP32, Isa, Unit, Units, units
from convolt.engines.jit.peaks import rates
from convolt.errors import EngineError, nearest

#: How each unit is called in reasons and messages.
UNITS: Mapping[Unit, str] = {
    "amx": "AMX tiles",
    "dot": "AVX512-BF16 dot products",
    "fma": "float32 multiply-adds of bf16 numbers",
}


def check_unit(forced: str | None) -> None:
    """Raises EngineError for a name that no CPU has."""
    if forced is not None and forced not in get_args(Unit):
        raise EngineError(f"engine jit: unknown unit {forced!r}; {nearest(str(forced), get_args(Unit))}")


def bf16_units(isa: Isa, forced: str | None) -> Units:
    """The units for bf16 products; `FP32`, with a warning, where float32 is faster.

    forced: take this one everywhere. Raises EngineError where the CPU has not got it.
    """
    possible = units(isa)
    if forced is not None:
        for unit in possible:
            if unit == forced:
                return Units(unit, unit)
        raise EngineError(
            f"engine jit: unit={forced!r} multiplies by {UNITS[forced]}, which this CPU, its kernel or "  # type: ignore[index]
            f"isa={isa.name!r} does not offer; use one of {', '.join(possible)}, or leave it out"
        )
    if possible[0] == "amx":
        return Units("amx", "amx")
    found, fp32 = rates(isa, possible)
    best = max(found, key=found.__getitem__)
    if found[best] > fp32:
        return Units("dot" if best == "dot" else None, best)
    warnings.warn(
        f"engine jit: bf16 is computed in float32, which is faster on this CPU: {fp32:.0f} GFLOP/s on one core, "
        f"{UNITS[best]} {found[best]:.0f}; to have bf16 all the same: engine.unit={best}",
        stacklevel=2,
    )
    return FP32
