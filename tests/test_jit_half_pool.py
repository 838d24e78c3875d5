"""ReLU and a max-pool on bf16 numbers as integers, and the bias that comes with the products before it."""

import numpy as np
import pytest
from engine_cases import UNITS
from engine_checks import executor_of
from jit_kernels import as_bf16
from numba import njit

from convolt.engines import JIT
from convolt.engines.jit.half_pool import HalfPool, half_pool
from convolt.engines.jit.kernels.specs import DEAD
from convolt.layers import Conv2d, Dense, Flatten, MaxPool2d, ReLU
from convolt.model import Model
from convolt.params import Params

CHANNELS = 32
converts = pytest.mark.skipif(not {"amx", "dot"} & set(UNITS), reason="this CPU does not convert to bf16")


def pooled(values, window, codes=True):
    """What the kernel makes of (rows, columns, 32) values: y in float32, codes, whether there was a NaN."""
    (R, S), columns = window, values.shape[1]
    places = tuple((r * columns + s) * CHANNELS for r in range(R) for s in range(S))
    pool, pixels = half_pool(HalfPool(places, S * CHANNELS, CHANNELS, DEAD, codes)), columns // S

    @njit
    def call(source, target, winners, count):
        return pool(source, target, winners, count)

    y, winners = np.full((pixels + 1, CHANNELS), 7, np.uint16), np.full((pixels + 1, CHANNELS), 7, np.uint8)
    found = call(values.ctypes.data, y.ctypes.data, winners.ctypes.data, pixels)
    np.testing.assert_array_equal(y[-1], 7)  # nothing is written behind the row
    np.testing.assert_array_equal(winners[-1], 7)
    return floats(y[:-1]), winners[:-1], bool(found)


def floats(bits):
    """Numbers in bf16 as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def taps(values, window):
    """The taps of each pixel, rounded: (pixels, taps, 32)."""
    (R, S), columns = window, values.shape[1]
    rounded = floats(as_bf16(values)).reshape(R, columns // S, S, CHANNELS)
    return rounded.transpose(1, 0, 2, 3).reshape(columns // S, R * S, CHANNELS)


@converts
@pytest.mark.parametrize("window", [(2, 2), (1, 2), (3, 2), (4, 4)])
def test_largest_of_the_rounded_values(window):
    """Values of few bits, so that many are equal, and infinities and zeros of both signs among them."""
    rng = np.random.default_rng(0)
    values = (rng.integers(-6, 7, (window[0], 5 * window[1], CHANNELS)) / 4).astype(np.float32)
    values += rng.normal(scale=1e-4, size=values.shape).astype(np.float32) * (rng.random(values.shape) < 0.5)
    for special in (np.inf, -np.inf, 0.0, -0.0):
        values[rng.random(values.shape) < 0.02] = special
    y, winners, found = pooled(values, window)
    each = taps(values, window)
    best = each.max(axis=1)
    np.testing.assert_array_equal(y, np.maximum(best, 0))
    np.testing.assert_array_equal(winners, np.where(best > 0, each.argmax(axis=1), DEAD))
    assert not found


@converts
def test_no_codes_where_nobody_wants_them():
    values = np.random.default_rng(1).normal(size=(2, 8, CHANNELS)).astype(np.float32)
    y, winners, _ = pooled(values, (2, 2), codes=False)
    np.testing.assert_array_equal(y, pooled(values, (2, 2))[0])
    assert (winners == 7).all()


@converts
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 5, 31), (0, 7, 16)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_nan_is_seen_or_is_the_largest(place, sign):
    values = np.random.default_rng(2).normal(size=(2, 8, CHANNELS)).astype(np.float32)
    values[place] = np.copysign(np.nan, sign)
    y, _, found = pooled(values, (2, 2))
    assert found or np.isnan(y[place[1] // 2, place[2]])


def predictions(model, params, x, unit):
    executor = executor_of(JIT(threads=1, unit=unit), "bf16", model, params)
    found = executor.predict(x)
    executor.close()
    return found


@pytest.mark.parametrize("unit", sorted(UNITS))
@pytest.mark.parametrize("weight", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_no_number_does_not_vanish_in_a_pool(unit, weight):
    """Infinity times the zeros of the border is a NaN, with a sign on x86."""
    layers = (Conv2d(1, 32, 5, padding=2), ReLU(), MaxPool2d(2), Flatten(), Dense(32 * 36, 32))
    model = Model((1, 12, 12), layers)
    params = Params.init(model, seed=0)
    params["0.weight"][3, 0, 0, 0] = weight
    found = predictions(model, params, np.ones((9, 1, 12, 12), np.float32), unit)
    assert np.isnan(found).all()


@pytest.mark.parametrize("unit", sorted(UNITS))
@pytest.mark.parametrize(("kernel", "channels"), [(5, 1), (3, 3), (3, 1), (7, 2), (4, 2)])
def test_the_bias_is_not_rounded(unit, kernel, channels):
    """Where there is room behind the taps it is three more of them; 4x4 of two planes has none."""
    layers = (Conv2d(channels, 40, kernel), ReLU(), Flatten())
    model = Model((channels, kernel, kernel), layers)
    params = Params.init(model, seed=0)
    params["0.weight"][...] = 0
    params["0.bias"][...] = np.random.default_rng(3).uniform(1, 1000, 40)
    params["0.bias"][:3] = np.inf, 3.4e38, -np.inf
    found = predictions(model, params, np.ones((2, *model.input_shape), np.float32), unit)
    np.testing.assert_allclose(found, np.tile(np.maximum(params["0.bias"], 0), (2, 1)), rtol=3e-7)
