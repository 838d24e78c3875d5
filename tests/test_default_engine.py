import warnings

import numpy as np
import pytest

import convolt as cv
from convolt.cli.settings import defaults, merge, resolve
from convolt.config import to_plain
from convolt.layers import Dense, Flatten

MODEL = cv.Model((1, 4, 4), (Flatten(), Dense(16, 2)))


def data() -> cv.Dataset:
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), np.uint8)
    return cv.Dataset.from_arrays(images, np.arange(40) % 2, valid=0.2, test=0.2)


def test_the_fastest_engine_trains_when_none_is_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = cv.fit(MODEL, data(), cv.Recipe(epochs=1, batch_size=8), root=tmp_path)
    assert run.result["engine"] == "jit"
    assert run.config["engine"] == to_plain(cv.engines.JIT())


def test_a_precision_that_it_lacks_is_trained_by_another_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="the engine is im2col; not jit, which has no precision fp64"):
        run = cv.fit(MODEL, data(), cv.Recipe(epochs=1, batch_size=8, precision="fp64"), root=tmp_path)
    assert run.result["engine"] == "im2col"


def test_so_it_is_on_the_command_line():
    settings = defaults()
    merge(settings, {"precision": "fp32-master64", "engine": {"threads": 1}}, "file")
    with pytest.warns(UserWarning, match="not jit, which has no precision fp32-master64"):
        assert resolve(settings).engine == cv.engines.Im2col(threads=1)
