"""Functions that kernels call: what they compute, and what is left of them."""

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
from numba.core.errors import TypingError

from convolt.engines.jit import codegen, compiler
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.isa import detect


@dataclass(frozen=True)
class Numbers:
    n: int


@inlined
def added(words, *places):
    total = 0
    for place in places:
        total += words[place]
    return total


def sums(spec):
    n = spec.n

    @inlined
    def of_two(words, place):
        return added(words, place, place + 1)

    def kernel(arguments, chunk, thread):
        arguments[n] = of_two(arguments, 0) + of_two(arguments, chunk)
        arguments[n + 1] = added(arguments, n)

    return kernel


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_a_kernel_calls_functions_that_call_others(tmp_path, isa):
    words = np.arange(8)
    kernel = compiler.Compiler(detect(isa), tmp_path).kernel(sums, Numbers(6))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(kernel.address)(words.ctypes.data, 3, 0)
    assert words[6:].tolist() == [0 + 1 + 3 + 4] * 2


def test_a_kernel_holds_no_function_but_its_own():
    text = codegen.assembly(sums(Numbers(6)), detect("plain"))
    assert [line for line in text.splitlines() if line.startswith("\t.globl")] == [f"\t.globl\t{compiler.SYMBOL}"]
    assert "call" not in text


def test_a_function_is_called_with_as_many_arguments_as_it_has():
    @inlined
    def one(number):
        return number

    def kernel(arguments, chunk, thread):
        arguments[0] = one(chunk, thread)

    with pytest.raises((TypingError, TypeError), match="too many"):
        codegen.object_code(kernel, detect("plain"), "kernel")
