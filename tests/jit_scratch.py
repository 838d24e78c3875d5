"""Kernels that find nothing but NaN in the memory that holds nothing from one kernel to the next."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import pytest
from engine_cases import Case
from engine_checks import Step, assert_near, executor_of, step_on

from convolt.engines import JIT
from convolt.engines.jit.buffers import SCRATCH, Buffer
from convolt.engines.jit.runtime import Program, Team

KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


@contextmanager
def lost_scratch() -> Iterator[None]:
    """Programs are run kernel by kernel, chunk by chunk, and before each the scratch memory of all plans is made NaN.

    Which thread runs a chunk after which other one is chance: this is what the worst of it would leave.
    """
    allocate, scratch = Buffer.allocate, []

    def remember(buffer: Buffer) -> Any:
        array = allocate(buffer)
        if buffer.name.startswith(SCRATCH):
            scratch.append(array)
        return array

    def run_apart(team: Team, program: Program) -> None:
        for phase in program.phases:
            for (function, arguments), chunk in product(phase.kernels, range(phase.chunks)):
                for array in scratch:
                    array.view(np.uint8)[...] = 255
                KERNEL(function)(arguments, chunk, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Buffer, "allocate", remember)
        patch.setattr(Team, "run", run_apart)
        yield


def needs_no_scratch_of_others(case: Case, unit: str | None) -> None:
    """A step on all images, and on some, whose last chunk has fewer."""
    engine, precision = JIT(threads=1, unit=unit), "fp32" if unit is None else "bf16"

    def steps() -> list[Step]:
        executor = executor_of(engine, precision, case.model, case.params())
        found = [
            step_on(executor, case.deltas[:n], case.slopes()[:n], case.rng[:n])
            for n in (case.batch, case.batch // 2 + 1)
        ]
        executor.close()
        return found

    with lost_scratch():
        got = steps()
    for one, other in zip(got, steps(), strict=True):
        assert_near(one.outputs, other.outputs, 0, "outputs")
        assert_near(one.gradient, other.gradient, 0, "gradient")
