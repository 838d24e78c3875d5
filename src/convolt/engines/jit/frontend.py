"""Numba's front end, from a Python function to LLVM IR, with the passes that kernels need.

Numba's own pipeline has twice as many: for closures, with-blocks, functions inlined by their callers, loops over tuples
of several types, array expressions. Kernels have none of these (an expression of whole arrays would need memory), and
what comes out is the same, byte for byte, in nine tenths of the time that a kernel takes to compile.
"""

from collections.abc import Callable
from typing import Any

from numba.core import typed_passes, untyped_passes
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import PassManager

PASSES = (
    untyped_passes.TranslateByteCode,
    untyped_passes.FixupArgs,
    untyped_passes.IRProcessing,
    untyped_passes.RewriteSemanticConstants,
    untyped_passes.DeadBranchPrune,
    untyped_passes.GenericRewrites,
    untyped_passes.ReconstructSSA,
    untyped_passes.DeadBranchPrune,
    typed_passes.NopythonTypeInference,
    typed_passes.PreLowerStripPhis,
    typed_passes.IRLegalization,
    typed_passes.AnnotateTypes,
    typed_passes.NativeLowering,
    typed_passes.NoPythonBackend,
)


class _Pipeline(CompilerBase):  # type: ignore[misc]
    def define_pipelines(self) -> list[PassManager]:
        manager = PassManager("kernel")
        for each in PASSES:
            manager.add_pass(each, each.__name__)
        manager.finalize()
        return [manager]


def lower(
    typing: Any, target: Any, library: Any, function: Callable[..., Any], args: Any, return_type: Any, flags: Any
) -> Any:
    """Put a function for arguments of these types into a library; return_type: None for what it returns."""
    return _Pipeline(typing, target, library, args, return_type, flags, {}).compile_extra(function)
