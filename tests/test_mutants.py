"""The checks of the engine suites notice mistakes: every mutant fails at least one of them.

A suite that never fails proves nothing. A mutant that survives is a hole in the suite, to be mended there.
"""

import numpy as np
import pytest
from engine_cases import CASES, operations
from engine_checks import CHECKS, applies
from mutants import MUTANTS, Mutant, Mutated

from convolt.chain import Kernel, Table
from convolt.engines.im2col import IM2COL
from convolt.engines.loops import LOOPS
from convolt.errors import ConvoltError

# What a broken kernel may raise besides a check's own AssertionError.
BREAKDOWNS = (AssertionError, ValueError, IndexError, TypeError, OverflowError, ConvoltError, RuntimeWarning)


def caught_by(engine: Mutated, layer: type) -> str | None:
    """The first check and case that notice the mistake."""
    cases = [case for case in CASES if layer in operations((*case.layers,))]
    for check in CHECKS:
        for case in cases:
            if applies(check, "fp64", case):
                try:
                    check(engine, "fp64", case)
                except BREAKDOWNS as error:
                    return f"{check.__name__}, {case.name}: {error}"
    return None


def described(mutant: Mutant) -> str:
    module = mutant.module.__name__.removeprefix("convolt.engines.")
    return f"{module}-{mutant.layer.__name__}-{mutant.inside}-{mutant.mistake}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=described)
def test_mutant_is_caught(mutant, tmp_path):
    assert caught_by(mutant.engine(tmp_path), mutant.layer), f"nobody noticed: {mutant.wrong}"


def test_mutants_are_many_and_different():
    assert len({(mutant.module, mutant.inside, mutant.right, mutant.wrong) for mutant in MUTANTS}) == len(MUTANTS) >= 40


@pytest.mark.parametrize(("table", "layout"), [(LOOPS, "NCHW"), (IM2COL, "CHWN")], ids=["loops", "im2col"])
def test_no_backward_can_be_silent(table: Table, layout: str):
    """Every operation of every table: a backward that sends back and adds nothing but zeros is noticed."""
    unnoticed = []
    for run, kernel in table.items():
        silent = Kernel(kernel.forward, lambda ctx, layer, params, grads, dy: np.zeros_like(ctx.saved["seen"]))
        listening = Kernel(_remembering(silent.forward), silent.backward)
        if caught_by(Mutated({**table, run: listening}, layout), run[-1]) is None:
            unnoticed.append(run)
    assert unnoticed == []


def _remembering(forward):
    def remember(ctx, layer, params, x):
        ctx.saved["seen"] = x
        return forward(ctx, layer, params, x)

    return remember
