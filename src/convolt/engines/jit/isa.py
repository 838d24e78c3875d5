"""Instruction sets: which vectors and matrix tiles the kernels may use, and what LLVM is told to compile for.

An `Isa` is chosen by the CPU's feature flags as LLVM reads them (CPUID, and whether the operating system saves the
registers), never by its model name, which lies under hypervisors. Forcing a narrower one than the CPU has is how every
path is tested on one machine: `target` then switches the wider features off in LLVM itself, so that neither a loop
that it vectorizes nor an instruction that it selects can use them.

A *unit* is what multiplies bf16 numbers: AMX tiles, the dot products of AVX512-BF16, or, on every CPU, float32
multiply-adds of the numbers' halves of a float32. Which is worth using is measured (`units.py`), for the same
instruction has half of float32's rate on one CPU and twice that on another.

AMX tiles need two permissions: one of the process, from Linux (`request_amx`), and a tile configuration in each thread,
which a kernel loads before its first tile.
"""

import ctypes
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import llvmlite.binding as llvm

from convolt.errors import EngineError, nearest

Name = Literal["avx512", "avx2", "neon", "plain"]
Unit = Literal["amx", "dot", "fma"]


class Units(NamedTuple):
    """What multiplies bf16 numbers in convolutions and in dense layers; None where float32 computes."""

    conv: Unit | None = None
    dense: Unit | None = None

    @property
    def tiles(self) -> Unit | None:
        """What multiplies convolutions on tiles; dot products take the kernels of float32, with pairs of numbers."""
        return None if self.conv == "dot" else self.conv


FP32 = Units()

#: The features (LLVM's names) that an instruction set stands for; the widest that a CPU has comes first.
REQUIRED: Mapping[Name, frozenset[str]] = {
    "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"}),
    "avx2": frozenset({"avx2", "fma"}),
    "neon": frozenset({"neon"}),
    "plain": frozenset(),
}

_BEYOND_AVX2 = ("avx512", "avx10", "amx", "evex512")


@dataclass(frozen=True)
class Isa:
    """What a kernel generator may count on.

    lanes: float32 numbers in a vector register. registers: how many there are. amx: bf16 matrix tiles.
    bf16_convert: an instruction that rounds float32 vectors to bf16.
    """

    name: Name
    lanes: int
    registers: int
    amx: bool = False
    bf16_convert: bool = False


def host_features() -> dict[str, bool]:
    """Every feature that LLVM knows for this architecture, and whether the CPU has it; empty where it cannot tell."""
    try:
        features: dict[str, bool] = dict(llvm.get_host_cpu_features())
    except RuntimeError:
        return {}
    if platform.machine() == "aarch64":
        features["neon"] = True  # part of the base architecture
    return features


def check_isa(forced: str | None) -> None:
    """Raises EngineError for a name that no CPU has."""
    if forced is not None and forced not in get_args(Name):
        raise EngineError(f"engine jit: unknown isa {forced!r}; {nearest(str(forced), get_args(Name))}")


def detect(forced: str | None = None, features: Mapping[str, bool] | None = None) -> Isa:
    """The widest instruction set of this CPU, or the one that is `forced`.

    features: what the CPU has (default: this one). Raises EngineError for a name that is unknown or beyond the CPU.
    """
    has = frozenset(name for name, there in (host_features() if features is None else features).items() if there)
    possible = [name for name, required in REQUIRED.items() if required <= has]
    if forced is None:
        return _isa(possible[0], has)
    check_isa(forced)
    name = cast(Name, forced)
    if name not in possible:
        missing = ", ".join(sorted(REQUIRED[name] - has))
        raise EngineError(
            f"engine jit: isa={forced!r} needs CPU features that are missing here ({missing}); "
            f"use one of {', '.join(possible)}, or leave it out"
        )
    return _isa(name, has)


def _isa(name: Name, has: frozenset[str]) -> Isa:
    match name:
        case "avx512":
            return Isa(name, 16, 32, amx={"amx-tile", "amx-bf16"} <= has, bf16_convert="avx512bf16" in has)
        case "avx2":
            return Isa(name, 8, 16)
        case "neon":
            return Isa(name, 4, 32, bf16_convert="bf16" in has)
        case "plain":
            return Isa(name, 4, 16)


def target(isa: Isa) -> tuple[str, str]:
    """LLVM's CPU name and feature list to compile for.

    "plain" is the architecture's baseline. "avx2" is this CPU with everything wider switched off by name, because the
    CPU's own name would imply it.
    """
    if isa.name == "plain":
        return ("x86-64" if platform.machine() == "x86_64" else "generic"), ""
    features = host_features()
    if isa.name == "avx2":
        features = {name: there and not name.startswith(_BEYOND_AVX2) for name, there in features.items()}
    listed = (f"{'+' if there else '-'}{name}" for name, there in sorted(features.items()))
    return llvm.get_host_cpu_name(), ",".join(listed)


def units(isa: Isa) -> tuple[Unit, ...]:
    """What can multiply bf16 numbers with this instruction set, in this process; the widest comes first."""
    found: list[Unit] = ["amx"] if isa.amx and request_amx() else []
    if isa.bf16_convert and isa.name == "avx512":  # AVX512-BF16 has both instructions
        found.append("dot")
    return (*found, "fma")


def converts(unit: Unit) -> bool:
    """Whether a CPU with this unit rounds float32 to bf16 by an instruction."""
    return unit != "fma"


def request_amx() -> bool:
    """Ask Linux to let this process use AMX tiles (asking twice does no harm); False where it refuses.

    Reference: https://docs.kernel.org/arch/x86/xstate.html (ARCH_REQ_XCOMP_PERM, feature 18 is the tile data).
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0
