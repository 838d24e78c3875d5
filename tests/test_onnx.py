"""ONNX graphs: the function of every layer, its names, and ONNX Runtime as a peer that predicts."""

import sys

import numpy as np
import pytest
from engine_cases import CASES

from convolt import zoo
from convolt.bench import Workload, bench
from convolt.contenders import assemble, contender, standard
from convolt.engines import Loops
from convolt.errors import ConfigError, EngineError, MissingDependency
from convolt.export.onnx import to_onnx
from convolt.export.runtime import OnnxRuntime
from convolt.layers import Conv2d, Dense, Flatten, Normalize, ReLU, Residual, Sequential
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import Adam
from convolt.params import Params
from convolt.recipe import Recipe

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

MODEL = Model((2, 4, 4), (Conv2d(2, 3, 3), ReLU(), Flatten(), Dense(12, 5)))


def settled(model, seed=0):
    """Parameters with statistics that are not the first ones."""
    params, generator = Params.init(model, seed), np.random.default_rng(seed)
    for name, array in params.buffers.items():
        if array.dtype.kind == "f":
            array[...] = (
                generator.uniform(0.5, 2, array.shape) if name.endswith("var") else generator.normal(size=array.shape)
            )
    return params


def predictions(engine, model, params, x):
    executor = engine.executor(model, params, Recipe())
    logits = executor.predict(x)
    executor.close()
    return logits


def assert_same_function(model, x, tolerance=2e-5):
    params = settled(model)
    expected = predictions(Loops(), model, params, x)
    found = predictions(OnnxRuntime(threads=1), model, params, x)
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layer_is_itself(case):
    x = np.random.default_rng(0).normal(size=(case.batch, *case.shape)).astype(np.float32)
    assert_same_function(case.bare, x)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_zoo(name):
    grey = name in ("mnist-cnn", "lenet5")
    shape = (1, 28, 28) if grey else (3, 16, 16)
    model = zoo.build(name, shape, 7, Normalize((0.4,) * shape[0], (0.3,) * shape[0]))
    onnx.checker.check_model(to_onnx(model, Params.init(model, 0)), full_check=True)
    assert_same_function(model, np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8))


def test_floats_and_bytes_are_the_same_images():
    params, x = settled(MODEL), np.random.default_rng(0).integers(0, 256, (3, 2, 4, 4), np.uint8)
    executor = OnnxRuntime(threads=1).executor(MODEL, params, Recipe())
    of_bytes, of_floats = executor.predict(x), executor.predict(x / np.float32(255))
    np.testing.assert_allclose(of_bytes, of_floats, rtol=0, atol=1e-6)


def test_names_are_those_of_the_parameters():
    body = (Sequential((Conv2d(2, 2, 1), ReLU())),)
    model = Model((2, 4, 4), (Residual(body), Flatten(), Dense(32, 3)))
    params = Params.init(model, 0)
    graph = to_onnx(model, params).graph
    arrays = {array.name: onnx.numpy_helper.to_array(array) for array in graph.initializer}
    assert arrays.keys() == set(params)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, params[name])
    assert [output for node in graph.node for output in node.output] == [
        *("0.body.0.0", "0.body.0.1", "0", "1", "2", "logits"),
    ]


def test_new_weights_are_used_when_told():
    params = Params.init(MODEL, 0)
    executor = OnnxRuntime(threads=1).executor(MODEL, params, Recipe())
    x = np.ones((1, *MODEL.input_shape), np.float32)
    before = executor.predict(x)
    executor.params.flat[...] *= 2
    executor.weights_changed()
    assert (executor.predict(x) != before).any()
    executor.params.flat[...] /= 2
    executor.weights_changed()
    np.testing.assert_array_equal(executor.predict(x), before)


def test_wrong_images_are_refused():
    with pytest.raises(ConfigError, match=r"images must have shape \(N, 2, 4, 4\); got \(1, 3, 4, 4\)"):
        predictions(OnnxRuntime(threads=1), MODEL, None, np.zeros((1, 3, 4, 4), np.float32))


# -- as a contender ---------------------------------------------------------------------------------------------------


def test_default_of_inference_alone():
    assert "onnxruntime" not in standard(inference=False)
    assert standard(inference=True) == (*standard(inference=False), "onnxruntime")


def test_contender_has_its_options():
    assert contender("onnxruntime", 2).engine == OnnxRuntime(threads=2)
    assert contender("onnxruntime-spinning=false", 2).engine == OnnxRuntime(threads=2, spinning=False)
    with pytest.raises(ConfigError, match="unknown word 'spining=false'; did you mean 'spinning'"):
        contender("onnxruntime-spining=false", 2)


def test_predictions_are_timed_and_training_is_refused():
    contenders = [contender(name, 1) for name in ("onnxruntime", "im2col")]
    report = bench(Workload(MODEL, 3, inference=True), contenders, rounds=1, slice_seconds=0)
    assert [result.status for result in report.results] == ["timed", "timed"]
    assert report.peer == "onnxruntime"
    report = bench(Workload(MODEL, 3), contenders, rounds=1, slice_seconds=0)
    assert [result.status for result in report.results] == ["unavailable", "timed"]
    assert report.results[0].reason == "onnxruntime runs predictions only; train with one of the engines"


def test_nothing_but_predictions():
    executor = OnnxRuntime(threads=1).executor(MODEL, None, Recipe())
    x, y = np.zeros((1, *MODEL.input_shape), np.uint8), np.zeros(1, int)
    for refused in (
        lambda: executor.loss_and_grads(x, y, CrossEntropy(), 1.0),
        lambda: executor.train_step(x, y, CrossEntropy(), 1.0, Adam()),
        lambda: executor.update(Adam()),
        lambda: executor.load_optimizer_state({}),
    ):
        with pytest.raises(EngineError, match="predictions only"):
            refused()
    assert executor.optimizer_state() == {}


@pytest.mark.parametrize("library", ["onnx", "onnxruntime"])
def test_missing_library_is_one_line(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependency, match=rf"needs {library}, which is not installed; run: pip install"):
        predictions(OnnxRuntime(threads=1), MODEL, None, np.zeros((1, *MODEL.input_shape), np.uint8))
    assert assemble(["onnxruntime"], 1)[0]
    (result,) = bench(
        Workload(MODEL, 3, inference=True), assemble(["onnxruntime"], 1)[0], rounds=1, slice_seconds=0
    ).results
    assert (result.status, result.name) == ("unavailable", "onnxruntime")
