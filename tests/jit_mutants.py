"""Kernels and plans of the jit engine with one mistake each, which its suites must notice, and who notices which.

Wrong addresses may end a process, so each mutant lives in one of its own:

    python tests/jit_mutants.py 0 7 12      # prints as JSON how each was noticed, null where it was not
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from engine_cases import CASES, ENGINES, Case
from engine_checks import adds_gradients, equals_pytorch, needs_no_input_gradient, reuses_buffers
from few_cases import few_predictions_equal_float64
from half_cases import HALF as HALVES
from half_cases import equals_float32, reads_what_was_written
from jit_cases import (
    FIRST,
    OPTIMIZERS,
    PAIRS,
    TILES,
    Rounded,
    equals_float64,
    equals_float64_as_first_layer,
    forced_unit_is_taken,
    one_pass_gives_the_bits_of_two,
    overflow_leaves_the_weights,
    poisoned,
    unit_is_the_fastest,
    update_is_that_of_the_optimizer,
)
from jit_kernels import check_conversion, check_product
from jit_mutant import JitMutant
from jit_mutants_bf16 import BF16, BLOCK_OF_C, CONVERSION, FASTEST, FORCED, ONE_PASS, OVERFLOW
from jit_mutants_few import FEW, FEW_IN_BF16
from jit_mutants_fp32 import FP32
from jit_mutants_fp32 import ONE_PASS as ONE_PASS_FP32
from jit_mutants_half import HALF
from jit_mutants_order import IN_BF16 as PIXELS_IN_BF16
from jit_mutants_order import ORDERED, PIXELS
from jit_mutants_pairs import PAIRS as OF_PAIRS
from jit_mutants_steps import IN_BF16, REFUSALS, STEPS, STRETCHES
from jit_mutants_windows import WINDOWS
from jit_scratch import needs_no_scratch_of_others
from order_cases import matrices_are_brought_in_order
from pool_cases import POOLS
from step_cases import refuses
from stretch_cases import stretches_are_steps
from winograd_cases import POOLED_FIRST, WINOGRAD

from convolt.engines import JIT
from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.isa import detect
from convolt.errors import ConvoltError
from convolt.optimizers import Adam

# What a broken plan may raise besides a check's own AssertionError.
BREAKDOWNS = (AssertionError, ValueError, IndexError, TypeError, KeyError, OverflowError, ConvoltError, RuntimeWarning)
MUTANTS = (*FP32, *BF16, *OF_PAIRS, *HALF, *WINDOWS, *FEW, *STEPS, *ORDERED)
REPRESENTATIVE = tuple(number for number, mutant in enumerate(MUTANTS) if mutant.quick)


# --- the judges ------------------------------------------------------------------------------------------------------


def _layer(case: Case, unit: str) -> None:
    for one in (equals_pytorch, adds_gradients, reuses_buffers, needs_no_input_gradient):
        one(JIT(threads=2), "fp32", case)
    with poisoned():
        equals_pytorch(JIT(threads=2), "fp32", case)


def _tiles(case: Rounded, unit: str) -> None:
    equals_float64(case, unit)
    adds_gradients(JIT(threads=2, unit=unit), "bf16", case)
    with poisoned():
        equals_float64(case, unit)


def _first(case: Rounded, unit: str) -> None:
    equals_float64_as_first_layer(case, unit)
    with poisoned():
        equals_float64_as_first_layer(case, unit)


def _pool(case: Rounded, unit: str) -> None:
    with poisoned():
        equals_pytorch(JIT(threads=2), "fp32", case)
        equals_float64(case, unit)
        equals_float64_as_first_layer(case, unit)
    needs_no_scratch_of_others(case, unit)


def _half(case: Case, unit: str) -> None:
    for bare in (False, True):
        equals_float32(case, unit, bare)
    reads_what_was_written(case, unit)


def _once(check: Callable[..., None], *arguments: Any) -> Callable[[str], None]:
    return lambda unit: check(*arguments)


JUDGES: dict[str, Callable[[str], None]] = {
    **{case.name: partial(_layer, case) for case in (*CASES, *WINOGRAD.values(), *POOLED_FIRST.values())},
    **{name: partial(_tiles, case) for name, case in (TILES | PAIRS).items()},
    **{name: partial(_first, case) for name, case in FIRST.items()},
    **{name: partial(_half, case) for name, case in HALVES.items()},
    **{name: partial(_pool, case) for name, case in POOLS.items()},
    **{repr(optimizer): _once(update_is_that_of_the_optimizer, optimizer) for optimizer in OPTIMIZERS},
    **{
        f"{ONE_PASS}{optimizer!r}": _once(one_pass_gives_the_bits_of_two, optimizer, "bf16") for optimizer in OPTIMIZERS
    },
    ONE_PASS_FP32: _once(one_pass_gives_the_bits_of_two, Adam(lr=0.01), "fp32"),
    REFUSALS: _once(refuses, next(entry for entry in ENGINES if entry.name == "jit")),
    STRETCHES: _once(stretches_are_steps, "fp32"),
    IN_BF16: _once(stretches_are_steps, "bf16"),
    PIXELS: _once(matrices_are_brought_in_order, "fp32"),
    PIXELS_IN_BF16: _once(matrices_are_brought_in_order, "bf16"),
    OVERFLOW: _once(overflow_leaves_the_weights, "bf16"),
    FEW_IN_BF16: few_predictions_equal_float64,
    FASTEST: _once(unit_is_the_fastest),
    FORCED: _once(forced_unit_is_taken),
    BLOCK_OF_C: lambda unit: check_product(Compiler(detect()), unit, 20, 32, 24, 3, 2, "bias"),
    CONVERSION: lambda unit: check_conversion(Compiler(detect()), False),
}


def caught(mutant: JitMutant | None, judge: JitMutant) -> str | None:
    """How a process with the mistake failed; None if it did not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(600)
        os.write(writer, (_outcome(mutant, judge) or "").encode()[:60_000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        message = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = f"ended with status {status}" if status else message or None
    who = "innocent" if mutant is None else f"{mutant.file}: {mutant.mistake}"
    print(f"{judge.by}: {who}: {found}", file=sys.stderr, flush=True)  # for who waits
    return found


def _outcome(mutant: JitMutant | None, judge: JitMutant) -> str | None:
    torch.set_num_threads(1)
    if mutant is not None:
        mutant.apply()
    try:
        JUDGES[judge.by](judge.unit)
    except BREAKDOWNS as error:
        return f"{type(error).__name__}: {error}"
    return None


def judged(numbers: Iterable[int]) -> dict[str, Any]:
    """How each mutant was caught that this CPU can have, and what the same judges say of the engine as it is."""
    chosen = [number for number in numbers if MUTANTS[number].runs_here]
    innocent = {(MUTANTS[number].by, MUTANTS[number].unit): MUTANTS[number] for number in chosen}
    return {
        "innocent": {" ".join(who): caught(None, judge) for who, judge in innocent.items()},
        "mutants": {number: caught(MUTANTS[number], MUTANTS[number]) for number in chosen},
    }


if __name__ == "__main__":
    print(json.dumps(judged(map(int, sys.argv[1:]))))
