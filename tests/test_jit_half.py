"""Images that convolutions on tiles and BatchNorm hand to one another in bf16, against the same in float32."""

import pytest
from engine_cases import ON_TILES, UNITS
from half_cases import HALF, KEPT, NORMS, equals_float32, has_the_bits_of, reads_what_was_written, step_of

from convolt.engines import JIT

EVERY_RUN = "norm and maximum"
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == EVERY_RUN else pytest.mark.slow) for name in HALF]
)


def engine(threads: int = 2, checkpoint_segments: int = 0) -> JIT:
    return JIT(threads=threads, unit=ON_TILES, checkpoint_segments=checkpoint_segments)


def kept(model, unit: str, batch: int) -> set[str]:
    stages = JIT(threads=1, unit=unit).explain(model, "bf16", batch).stages
    return {stage.name for stage in stages if stage.direction == "forward" and "output in bf16" in stage.reason}


@pytest.mark.parametrize("name", HALF)
def test_outputs_are_kept_in_bf16(name):
    assert kept(HALF[name].model, ON_TILES, HALF[name].batch) == KEPT[name]


@every_case
def test_half_equals_float32(name):
    equals_float32(HALF[name], ON_TILES, bare=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_half_behind_a_first_layer_equals_float32(name):
    equals_float32(HALF[name], ON_TILES, bare=True)


@every_case
def test_half_reads_what_was_written(name):
    reads_what_was_written(HALF[name], ON_TILES)


@every_case
def test_threads_leave_the_bits(name):
    one, two, three = (step_of(HALF[name], engine(threads)) for threads in (1, 2, 3))
    has_the_bits_of(two, one)
    has_the_bits_of(three, one)


@every_case
def test_images_that_are_made_twice_have_the_same_bits(name):
    has_the_bits_of(step_of(HALF[name], engine(checkpoint_segments=3)), step_of(HALF[name], engine()))


@pytest.mark.skipif("dot" not in UNITS, reason="this CPU has no dot products of bf16 pairs (AVX512-BF16)")
def test_dot_products_keep_float32():
    """Their convolutions round what they read as they lay it out in pairs."""
    case = NORMS["norm and maximum"]
    assert kept(case.model, "dot", case.batch) == set()
