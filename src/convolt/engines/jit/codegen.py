"""From a kernel's Python function to object code: Numba types and lowers it, LLVM optimizes it for one instruction set.

Numba's own ``cfunc`` always compiles for the CPU at hand and loads the result through Numba; here its ahead-of-time
back end is given the target, so that a narrower instruction set is forced in every stage (vectorizer and instruction
selection), and the object code that comes out needs nothing of Numba: a warm start loads it with llvmlite alone.

Functions that a kernel calls (``inlined``) are linked in as LLVM IR and optimized with it. Numba makes machine code of
some of its own before that, which changes the IR as only a code generator may: a sum of integers becomes null plus an
offset. The optimizer, which then sees memory at null, would drop all that leads there; so it is told that null may be
an address.

A kernel cannot raise. The C function around it traps if Numba's status says "exception", and a trap that the optimizer
could not remove is refused here, at compile time. So is a symbol that an ordinary process does not have.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, compiler
from numba.core.codegen import AOTCodeLibrary, AOTCPUCodegen
from numba.core.compiler_lock import global_compiler_lock
from numba.core.cpu_options import FastMathOptions
from numba.core.registry import cpu_target

from convolt.engines.jit.frontend import lower
from convolt.engines.jit.inlined import Typing
from convolt.engines.jit.isa import Isa, target
from convolt.errors import EngineError

SIGNATURE = types.void(types.CPointer(types.int64), types.int64, types.int64)
"""void kernel(int64_t* arguments, int64_t chunk, int64_t thread)"""

FASTMATH = frozenset({"contract", "nsz", "arcp", "reassoc"})
"""What LLVM may do to float arithmetic in a kernel's own Python code, not in functions that it calls; NaN stays NaN.

``reassoc`` lets it vectorize sums (in an order that is fixed when it compiles, so that results repeat bit for bit); it
also cancels ``(x + magic) - magic``: round with ``np.rint`` or ``np.floor``.
"""


class _Kernel(AOTCodeLibrary):  # type: ignore[misc]
    """The module of a kernel, named as its C function; all others are internal, so that what they return is known."""

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if not function.is_declaration and function.name != self.name:
                function.linkage = "internal"
        manager, builder = self._codegen._module_pass_manager()
        manager.run(self._final_module, builder)  # Numba does it twice, for reference counts, of which there are none


class _Codegen(AOTCPUCodegen):  # type: ignore[misc]
    """Numba's ahead-of-time back end for one instruction set; Numba itself offers whole CPU models only."""

    def __init__(self, isa: Isa):
        cpu, self._features = target(isa)
        AOTCPUCodegen.__init__(self, "convolt", cpu)

    def _customize_tm_features(self) -> str:
        return self._features


@cache
def _target(isa: Isa) -> tuple[Any, Typing]:
    """Numba's contexts of a target and of types; of new ones for each kernel a megabyte would stay behind."""
    context = cpu_target.target_context.subtarget(_internal_codegen=_Codegen(isa))
    return context, Typing(context, _flags())


def _flags() -> Any:
    flags = compiler.Flags()
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True  # the C function is all there is
    flags.error_model = "numpy"
    return flags


def _kernel_flags() -> Any:
    flags = _flags()
    flags.forceinline = True
    flags.fastmath = FastMathOptions(set(FASTMATH))
    return flags


@global_compiler_lock
def object_code(function: Callable[..., None], isa: Isa, symbol: str) -> bytes:
    """Object code (ELF) that defines `function` as the C function `symbol`. Raises EngineError if it could raise."""
    with _no_collections():
        code: bytes = _library(function, isa, symbol).emit_native_object()
    return code


@contextmanager
def _no_collections() -> Iterator[None]:
    """No garbage is collected meanwhile: what Numba makes, some million objects, lives until the kernel is done.

    Looking through them again and again took a tenth of the time.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@global_compiler_lock
def assembly(function: Callable[..., None], isa: Isa) -> str:
    """The same code in assembly language, to see what LLVM made of a kernel."""
    library = _library(function, isa, "kernel")
    text: str = library.get_asm_str()
    return text


def _library(function: Callable[..., None], isa: Isa, symbol: str) -> Any:
    """The optimized module, in Numba's wrapping."""
    context, typing = _target(isa)
    library = _Kernel(context.codegen(), symbol)
    try:
        compiled = lower(typing, context, library, function, SIGNATURE.args, SIGNATURE.return_type, _kernel_flags())
    finally:
        typing.forget()
    library.add_ir_module(_c_function(context, compiled.fndesc, symbol))
    for name in (symbol, compiled.fndesc.llvm_func_name):
        library.get_function(name).add_function_attribute("null_pointer_is_valid")
    library.finalize()
    if "@llvm.trap" in library.get_llvm_str():
        raise EngineError(
            f"kernel {function.__qualname__}: it could raise an exception, which compiled code cannot; remove raise, "
            "assert, and ranges whose step is not a constant"
        )
    if library.has_dynamic_globals:
        raise EngineError(
            f"kernel {function.__qualname__}: it refers to an object of this process by address (a large array, a "
            "compiled function), which means nothing in the next; pass the address as an argument"
        )
    return library


def _c_function(context: Any, description: Any, symbol: str) -> ir.Module:
    """The C function around Numba's own, which returns whether it raised."""
    module = context.create_module("c_function")
    callee = context.declare_function(module, description)
    parameters = [context.get_value_type(kind) for kind in SIGNATURE.args]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), parameters), symbol)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    status, _ = context.call_conv.call_function(builder, callee, SIGNATURE.return_type, SIGNATURE.args, function.args)
    with builder.if_then(status.is_error, likely=False):
        builder.call(cgutils.get_or_insert_function(module, ir.FunctionType(ir.VoidType(), []), "llvm.trap"), [])
        builder.unreachable()
    builder.ret_void()
    return module
