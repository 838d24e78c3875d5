"""Images that convolutions on tiles and BatchNorm hand to one another in bf16, against the same in float32."""

import pytest
from engine_cases import ON_TILES, UNITS
from half_cases import HALF, NORMS, equals_float32, has_the_bits_of, reads_what_was_written, step_of

from convolt.engines import JIT

QUICK = ("direct rows", "norm and maximum", "residual of norms")  # what every run of the tests meets


def some(cases, quick=QUICK):
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in cases]
    )


def engine(threads: int = 2, checkpoint_segments: int = 0) -> JIT:
    return JIT(threads=threads, unit=ON_TILES, checkpoint_segments=checkpoint_segments)


@pytest.mark.parametrize("name", HALF)
def test_something_is_kept_in_bf16(name):
    stages = engine().explain(HALF[name].model, "bf16", HALF[name].batch).stages
    kept = [stage for stage in stages if "kept in bf16" in stage.reason]
    assert len(kept) >= (2 if name in NORMS else 1)


@some(HALF)
def test_half_equals_float32(name):
    equals_float32(HALF[name], ON_TILES)


@some(HALF, ("residual of norms",))
def test_half_reads_what_was_written(name):
    reads_what_was_written(HALF[name], ON_TILES)


@some(HALF, ("norm and maximum",))
def test_threads_leave_the_bits(name):
    one, two, three = (step_of(HALF[name], engine(threads)) for threads in (1, 2, 3))
    has_the_bits_of(two, one)
    has_the_bits_of(three, one)


@some(HALF, ("residual of norms",))
def test_images_that_are_made_twice_have_the_same_bits(name):
    has_the_bits_of(step_of(HALF[name], engine(checkpoint_segments=3)), step_of(HALF[name], engine()))


@pytest.mark.skipif("dot" not in UNITS, reason="this CPU has no dot products of bf16 pairs (AVX512-BF16)")
def test_dot_products_keep_float32():
    """Their convolutions round what they read as they lay it out in pairs."""
    case = NORMS["norm and maximum"]
    stages = JIT(threads=1, unit="dot").explain(case.model, "bf16", case.batch).stages
    assert not any("kept in bf16" in stage.reason for stage in stages)
