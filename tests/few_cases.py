"""Predictions of a few samples in bf16, of which dense layers round the weights alone."""

import numpy as np
from engine_checks import assert_near, executor_of
from jit_cases import rounded

from convolt.engines import JIT, Im2col
from convolt.engines.jit.matrices import BLOCKS_PAY
from convolt.layers import Conv2d, Dense, Flatten, LeakyReLU, MaxPool2d, ReLU
from convolt.model import Model
from convolt.params import Params

# Few of its images are predicted by rows of dense weights: in bf16, of pixels and in more than one part; in bf16, of
# features; in float32.
FEW = Model(
    (3, 16, 16),
    (
        *(Conv2d(3, 18, 5, padding=2), ReLU(), MaxPool2d(2), Flatten()),
        *(Dense(1152, 70), ReLU(), Dense(70, 301, bias=False), LeakyReLU(0.25), Dense(301, 5)),
    ),
)


def few_predictions_equal_float64(unit: str) -> None:
    """Of bf16 images and weights, to float32's sums; again after the weights have changed."""
    params = Params.init(FEW, seed=3, dtype=np.float64)
    params.flat[...] = rounded(params.flat)
    executor = executor_of(JIT(threads=2, unit=unit), "bf16", FEW, params)
    for factor in (1.0, -0.5):
        params.flat[...] *= factor
        executor.params.flat[...] = params.flat
        executor.weights_changed()
        for count in range(1, BLOCKS_PAY[unit]):
            x = rounded(np.random.default_rng(count).normal(size=(count, *FEW.input_shape)))
            want = executor_of(Im2col(), "fp64", FEW, params).predict(x)
            assert_near(executor.predict(x), want, 2e-5, f"{count} images")
    executor.close()
