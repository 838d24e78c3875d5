"""Convolutions by Winograd's algorithm, and gradients of strided ones residue by residue: the same as tap by tap."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from engine_checks import adds_gradients, equals_pytorch, needs_no_input_gradient, reuses_buffers, step_on
from jit_cases import empty_batch_has_no_gradient, poisoned
from winograd_cases import POOLED_FIRST, WINOGRAD

from convolt.engines import JIT
from convolt.engines.jit import convolutions
from convolt.engines.jit.kernels.residues import covers, parts, slope_frame, tap_order
from convolt.engines.jit.kernels.specs import ConvSpec, Frame, Windowing
from convolt.engines.jit.kernels.winograd_specs import (
    WinogradSpec,
    bundles,
    cut,
    lone_planes,
    obstacle,
    planes_along,
    products_along,
    tiling,
)
from convolt.layers import Conv2d, Dense, Flatten, MaxPool2d, ReLU
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import SGD
from convolt.recipe import Recipe
from convolt.rng import SampleRng

CASES = list(WINOGRAD.values())
IN_EVERY_RUN = {
    *("winograd, some channels of a vector, max-pool", "winograd, blocks of whole images"),
    *("winograd, a filter in pieces", "winograd, dilation", "winograd, twins, odd sizes, two panels"),
}


def spec(channels=16, filters=16, size=8, kernel=3, stride=1, padding=1, dilation=1, groups=1, pool=1, slope=0.0):
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    high, inside = size + 2 * padding, outputs // pool
    x = Frame(channels, size, size, high, high, padding * (high + 1) * channels)
    y = Frame(filters, inside, inside, inside, inside, 0)
    window = Windowing(kernel, kernel, stride, stride, padding, padding, dilation, dilation)
    return ConvSpec(x, y, window, groups, filters, outputs, outputs, True, slope, (pool, pool), 4, 16, 32)


@pytest.mark.parametrize(
    ("case", "check"),
    [
        pytest.param(case, check, marks=() if number < 2 and check is adds_gradients else pytest.mark.slow)
        for number, case in enumerate(CASES)
        for check in (equals_pytorch, adds_gradients, reuses_buffers, needs_no_input_gradient)
    ],
    ids=lambda value: value.__name__ if callable(value) else value.name,
)
def test_winograd(case, check):
    check(JIT(threads=2), "fp32", case)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case.name in IN_EVERY_RUN else pytest.mark.slow) for case in CASES],
)
def test_memory_that_nobody_wrote_is_not_read(case):
    with poisoned():
        equals_pytorch(JIT(threads=2), "fp32", case)


def test_large_filters_have_few_parts_of_their_gradient(monkeypatch):
    """A part is of more images then: as many as the kernel that adds them up believes."""
    monkeypatch.setattr(convolutions, "LARGE_PART", 1000)
    case = replace(CASES[0], batch=18)
    for check in (equals_pytorch, adds_gradients):
        check(JIT(threads=2), "fp32", case)


@pytest.mark.parametrize("case", CASES[:1] + list(POOLED_FIRST.values())[:1], ids=lambda case: case.name)
def test_an_empty_batch_has_no_gradient(case):
    empty_batch_has_no_gradient("fp32", case)


def test_an_image_that_no_tap_meets_has_no_gradient():
    """One pixel in four of the padded image is looked at, and that is never one of the image's own."""
    model = Model((2, 2, 2), (Conv2d(2, 2, 1), Conv2d(2, 3, 1, 4, 1), Flatten()))
    x, slopes = np.ones((3, 2, 2, 2), np.float32), np.ones((3, 3), np.float32)
    executor = JIT(threads=1).executor(model, None, Recipe())
    step = step_on(executor, x, slopes, SampleRng(0, 0, np.arange(3)))
    np.testing.assert_array_equal(step.outputs, np.tile(executor.params["1.bias"], (3, 1)))
    gradient = {name: step.gradient[part] for name, part in executor.params.slices.items()}
    assert gradient.pop("1.bias").tolist() == [3, 3, 3]
    assert all(not part.any() for part in gradient.values())


@pytest.mark.parametrize("isa", ["avx2", pytest.param("plain", marks=pytest.mark.slow)])
def test_winograd_on_narrow_vectors(isa):
    equals_pytorch(JIT(threads=2, isa=isa), "fp32", CASES[0])


def test_the_same_bits_for_any_number_of_threads():
    layers = (Conv2d(16, 20, 3, padding=1), ReLU(), Conv2d(20, 40, 3, 2, 1), ReLU(), MaxPool2d(2), Flatten())
    model = Model((16, 16, 16), (*layers, Dense(640, 120), ReLU(), Dense(120, 10)))
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 256, (37, *model.input_shape), np.uint8), generator.integers(0, 10, 37)
    found = set()
    for threads in (1, 2, 4):
        executor = JIT(threads=threads).executor(model, None, Recipe())
        for _ in range(2):
            executor.train_step(x, y, CrossEntropy(), 1 / 37, SGD(lr=0.1))
        found.add(executor.params.flat.tobytes())
        executor.close()
    assert len(found) == 1


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ({"kernel": 1, "padding": 0}, "2x2 to 7x7"),
        ({"kernel": 9, "padding": 4}, "2x2 to 7x7"),
        ({"stride": 2}, "stride"),
        ({"dilation": 3, "padding": 3}, "dilation"),
        ({"groups": 2}, "groups"),
        ({"channels": 8}, "channels"),
        ({"filters": 15}, "channels"),
        ({"size": 3}, "few pixels"),
    ],
)
def test_other_convolutions_go_tap_by_tap(what, word):
    assert word in obstacle(spec(**what))


@pytest.mark.parametrize(
    "what", [{}, {"pool": 2}, {"pool": 4}, {"kernel": 5, "padding": 2}, {"size": 7}, {"dilation": 2, "padding": 2}]
)
def test_these_go_by_winograds_algorithm(what):
    assert obstacle(spec(**what)) == ""


def test_pairs_pay_for_fewer_transforms():
    """Of 7x7 pixels tiles cover 8x8: 58 per cent of the products by taps; of 5x5 they cover 6x6, 64 per cent."""
    for size, word in ((7, ""), (5, "too few pixels")):
        assert obstacle(replace(spec(size=size), pairs=True)) == word
        assert obstacle(spec(size=size)) == ""


def test_images_of_few_pixels_whose_gradient_nobody_needs():
    """Of 8x8 outputs all tiles are whole, of 3x3 inputs most are not."""
    small = spec(size=3, padding=3, kernel=2)
    assert (small.P, small.Q) == (8, 8)
    assert "few pixels" in obstacle(small)
    assert obstacle(replace(small, wants_dx=False)) == ""


@pytest.mark.parametrize("taps", range(2, 8))
def test_pieces_are_the_whole_filter(taps):
    found = [first + i for first, length in cut(taps) for i in range(length)]
    assert found == list(range(taps))
    assert products_along(taps) == taps + len(cut(taps)) < 2 * taps


@pytest.mark.parametrize("taps", range(2, 8))
def test_bundles_are_all_pieces(taps):
    """In their order. Twins are the last one and have planes of a tile once; there are two bundles at most."""
    each = range(bundles(taps))
    assert sum((cut(taps, bundle) for bundle in each), ()) == cut(taps)
    assert sum(products_along(taps, bundle) for bundle in each) == products_along(taps)
    assert sum(planes_along(taps, bundle) for bundle in each) == planes_along(taps)
    twins = [bundle for bundle in each if len(cut(taps, bundle)) == 2]
    assert twins == ([bundles(taps) - 1] if taps in (4, 7) else [])
    assert products_along(taps) - planes_along(taps) == 3 * len(twins)
    assert planes_along(taps) - lone_planes(taps) == 3 * len(twins)
    assert len(each) <= 2


@pytest.mark.parametrize(("size", "images"), list(product([2, 4, 5, 7, 8, 14, 32, 63], [1, 3, 8, 32])))
def test_blocks_hold_an_image_evenly(size, images):
    found = tiling(size, size, images)
    assert found.high == found.wide == (size + 1) // 2
    assert found.high % found.rows == 0
    assert 1 <= found.images <= images
    assert found.images == 1 or found.rows == found.high
    assert found.tiles <= 96 or found.images == found.rows == 1


def test_scratch_memory_holds_what_a_block_needs():
    made = WinogradSpec(spec(channels=20, filters=70, size=4))
    for tiles in (made.forward, made.inputs):
        assert made.back_scratch - made.frames >= 16 * tiles.tiles * (20 + 70)
    assert made.frames >= made.forward.images * slope_frame(made.conv).size


# --- the pixels that won a pool --------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", [None, *(pytest.param(isa, marks=pytest.mark.slow) for isa in ("avx2", "plain"))])
@pytest.mark.parametrize("case", POOLED_FIRST.values(), ids=lambda case: case.name)
def test_gradient_from_the_pixels_that_won(case, isa):
    engine = JIT(threads=2, isa=isa)
    with poisoned():
        needs_no_input_gradient(engine, "fp32", case)
    adds_gradients(engine, "fp32", case)


# --- residues of the stride ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "stride", "dilation"), list(product([1, 2, 3, 5], [1, 2, 3], [1, 2, 3])))
def test_parts_of_dx_are_the_adjoint(kernel, stride, dilation):
    """Along one axis, by hand: every product that the convolution makes, once, and no other."""
    for size, padding in product([1, 2, 5, 8], [0, 1, 4]):
        outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if outputs > 0:
            assert_parts_are_the_adjoint(spec(1, 1, size, kernel, stride, padding, dilation))


def assert_parts_are_the_adjoint(conv: ConvSpec) -> None:
    size, outputs, window = conv.x.H, conv.P, conv.window
    inputs = {
        (p, r): p * window.stride_h + r * window.dilation_h - window.top
        for p, r in product(range(outputs), range(window.R))
    }
    want = {(h, p, r) for (p, r), h in inputs.items() if 0 <= h < size}
    frame, order, found = slope_frame(conv), tap_order(conv), set()
    top = frame.origin // frame.pitch
    for part in parts(conv):
        own, first = part.conv.window, part.conv.x.origin // frame.pitch
        for i, n in product(range(own.R), range(part.conv.P)):
            row = first + n + i * own.dilation_h
            assert 0 <= row < frame.rows
            if 0 <= row - top < outputs:
                tap = order[part.filters + i * own.S] // window.R
                found.add((part.target // size + n * window.stride_h, row - top, tap))
    assert found == want
    assert frame.size <= conv.framed.size
    residues = {(h + window.top) % window.stride_h for h in range(size)}
    reached = {r * window.dilation_h % window.stride_h for r in range(window.R)}
    assert covers(conv) == (residues <= reached)
