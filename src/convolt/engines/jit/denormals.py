"""Numbers below 2^-126 as zeros, while a thread is in compiled code.

Adam's first moment of a weight that has no gradient any more shrinks by beta1 each step, is denormal after 830 of them
and stays so for good: nine tenths of the smallest number round to that number again. A CPU may take a hundred cycles
and more for an operation that meets one, so a step of a network with dead units would take several times as long.
Multiply-adds of bf16 take denormal numbers for zeros in any case.
"""

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from convolt.engines.jit.vectors import BYTES, I32, I64, declare

FLUSH_X86 = 1 << 15 | 1 << 6  # MXCSR: results to zero (FTZ), operands as zeros (DAZ); Intel SDM, volume 1, 10.2.3
FLUSH_ARM = 1 << 24  # FPCR: both (FZ); Arm ARM, C5.2.8


@intrinsic
def flush_denormals(typingctx: Any) -> Any:
    """Take denormal numbers for zeros from now on, in this thread; the mode of before, for ``restore_mode``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        before = _read(builder)
        _write(builder, builder.or_(before, I64({"x86_64": FLUSH_X86, "aarch64": FLUSH_ARM}[platform.machine()])))
        return before

    return types.int64(), generate


@intrinsic
def restore_mode(typingctx: Any, mode: Any) -> Any:
    """Back to the mode of before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _write(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _read(builder: Any) -> Any:
    if platform.machine() == "aarch64":
        return builder.call(declare(builder, "llvm.aarch64.get.fpcr", I64, []), [])
    word = _word(builder)
    builder.call(declare(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), [BYTES]), [builder.bitcast(word, BYTES)])
    return builder.zext(builder.load(word), I64)


def _write(builder: Any, mode: Any) -> None:
    if platform.machine() == "aarch64":
        builder.call(declare(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), [I64]), [mode])
        return
    word = _word(builder)
    builder.store(builder.trunc(mode, I32), word)
    builder.call(declare(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [BYTES]), [builder.bitcast(word, BYTES)])


def _word(builder: Any) -> Any:
    """Four bytes on the stack of the function."""
    with builder.goto_entry_block():
        return builder.alloca(I32)
