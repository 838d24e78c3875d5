"""No kernel of the jit engine reads scratch memory that it has not written itself."""

import numpy as np
import pytest
from engine_cases import CASES, UNITS, Case
from engine_checks import executor_of, step_on
from half_cases import HALF
from jit_cases import FIRST, PAIRS, TILES
from jit_scratch import needs_no_scratch_of_others
from pool_cases import POOLS
from winograd_cases import WINOGRAD

from convolt.engines import JIT
from convolt.layers import Conv2d, Dense, Flatten, ReLU
from convolt.model import Model
from convolt.params import Params
from convolt.rng import SampleRng

FORCED = [unit for unit in UNITS if unit != "amx"]
BF16 = (HALF | TILES | PAIRS | FIRST | POOLS).items()
FP32 = {case.name: case for case in (*CASES, *WINOGRAD.values(), *POOLS.values())}.items()
ALL = [*((name, case, unit) for name, case in BF16 for unit in FORCED), *((name, case, None) for name, case in FP32)]
QUICK = (
    ("norm and maximum", "fma"),
    ("tiles in pairs", "dot"),
    ("winograd, blocks of whole images", None),
)


@pytest.mark.parametrize(
    ("case", "unit"),
    [
        pytest.param(case, unit, id=f"{name}, {unit}", marks=() if (name, unit) in QUICK else pytest.mark.slow)
        for name, case, unit in ALL
    ],
)
def test_scratch_is_a_kernels_own(case: Case, unit: str | None):
    needs_no_scratch_of_others(case, unit)


@pytest.mark.parametrize("unit", [None, *(pytest.param(unit, marks=pytest.mark.slow) for unit in FORCED)])
@pytest.mark.parametrize("hidden", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_what_was_no_number_is_gone_with_its_batch(unit, hidden):
    """Gradients of dense layers are products with all rows, also with those that a larger batch has left."""
    model = Model((3, 6, 6), (Conv2d(3, 16, 3), ReLU(), Flatten(), Dense(256, hidden), ReLU(), Dense(hidden, 5)))
    slopes, rng, found = np.ones((37, 5), np.float32), SampleRng(0, 0, np.arange(37)), []
    for left in (1, np.nan):
        x = np.ones((37, *model.input_shape), np.float32)
        x[20:] = left
        engine, params = JIT(threads=1, unit=unit), Params.init(model, 0, np.float32)
        executor = executor_of(engine, "bf16" if unit else "fp32", model, params)
        with np.errstate(invalid="ignore"):
            steps = [step_on(executor, x[:n], slopes[:n], rng[:n]) for n in (37, 20)]
        executor.close()
        found.append(steps[-1].gradient)
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(*found)
