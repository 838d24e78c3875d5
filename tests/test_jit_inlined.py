"""Functions that kernels call: what they compute, and what is left of them."""

import ctypes
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from numba.core import dispatcher
from numba.core.errors import TypingError

from convolt.engines.jit import codegen, compiler
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.isa import detect
from convolt.engines.jit.memory import view


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


NUMBERS = {
    "int64": [-(2**62), -1, 0, 3, 2**62],
    "uint16": [0, 1, 2**15, 2**16 - 1],
    "float32": [-np.inf, -1.5, 0.0, 2.0, np.inf, np.nan],
    "float64": [-1e300, 0.0, 1e-300, np.nan],
}


@dataclass(frozen=True)
class Pairs:
    count: int
    kind: str


def extremes(spec):
    count, kind = spec.count, np.dtype(spec.kind).type

    def kernel(arguments, chunk, thread):
        numbers, results = view(arguments[0], (count, 2), kind), view(arguments[1], (count, 2), kind)
        for i in range(count):
            results[i, 0] = min(numbers[i, 0], numbers[i, 1])
            results[i, 1] = max(numbers[i, 0], numbers[i, 1])

    return kernel


@pytest.mark.parametrize("kind", NUMBERS)
def test_min_and_max_of_two_numbers_are_those_of_python(kind, tmp_path):
    """The first one if they do not compare."""
    pairs = np.array(list(itertools.product(NUMBERS[kind], repeat=2)), kind)
    found = np.zeros_like(pairs)
    kernel = compiler.Compiler(detect("plain"), tmp_path).kernel(extremes, Pairs(len(pairs), kind))
    words = np.array([pairs.ctypes.data, found.ctypes.data])
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(kernel.address)(words.ctypes.data, 0, 0)
    np.testing.assert_array_equal(found, np.array([(min(one, other), max(one, other)) for one, other in pairs], kind))


def test_numba_compiles_no_function_of_its_own_for_min_and_max(monkeypatch):
    def compile_one(*arguments):
        raise AssertionError("Numba compiles a function")

    monkeypatch.setattr(dispatcher._FunctionCompiler, "compile", compile_one)
    assert codegen.object_code(extremes(Pairs(7, "int64")), detect("plain"), "kernel")


def test_min_is_of_two_numbers():
    def kernel(arguments, chunk, thread):
        arguments[0] = min(chunk, thread, 3)

    with pytest.raises((TypingError, TypeError)):
        codegen.object_code(kernel, detect("plain"), "kernel")
