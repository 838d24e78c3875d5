"""Predictions of the jit engine: copies of the weights, few images cut into parts, any order of batch sizes."""

import numpy as np
import pytest
from engine_cases import ON_TILES, TOLERANCE, UNITS
from engine_checks import assert_near
from few_cases import few_predictions_equal_float64

from convolt.engines import JIT, Im2col
from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.isa import FP32, detect
from convolt.engines.jit.phases import Task
from convolt.engines.jit.programs import Programs
from convolt.layers import (
    BatchNorm2d,
    Conv2d,
    Dense,
    Flatten,
    GlobalAvgPool2d,
    Layer,
    LeakyReLU,
    MaxPool2d,
    ReLU,
    Residual,
)
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import SGD
from convolt.params import Params
from convolt.recipe import Recipe

NET = Model(
    (3, 12, 12),
    (
        *(Conv2d(3, 18, 5, padding=2), ReLU(), MaxPool2d(2)),
        *(Conv2d(18, 70, 3, padding=1, bias=False), BatchNorm2d(70), LeakyReLU(0.1)),
        *(Conv2d(70, 20, 3, padding=1), ReLU(), MaxPool2d(2)),
        *(Flatten(), Dense(180, 33), ReLU(), Dense(33, 5)),
    ),
)
SIZES = (1, 8, 33, 1, 5)  # each is a plan of its own to compile, 5 that of the steps before
MORE_SIZES = pytest.param((1, 2, 3, 5, 8, 9, 33, 1, 5), marks=pytest.mark.slow)


def images(model: Model, count: int, kind: type = np.uint8) -> np.ndarray:
    x = np.random.default_rng(count).integers(0, 256, (count, *model.input_shape), np.uint8)
    return x if kind is np.uint8 else x.astype(kind) / kind(255)


def executor_of(threads: int, params: Params | None = None, model: Model = NET):
    return JIT(threads=threads).executor(model, params, Recipe())


def exact(model: Model, params: Params, x: np.ndarray) -> np.ndarray:
    return Im2col(threads=1).executor(model, params, Recipe(precision="fp64")).predict(x)


def steps(executor, count: int = 1):
    """Training steps on five images."""
    for seed in range(count):
        x, y = images(NET, 5), np.random.default_rng(seed).integers(0, 5, 5)
        executor.train_step(x, y, CrossEntropy(), 1 / 5, SGD(lr=0.05))
    return executor


@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("sizes", [SIZES, MORE_SIZES], ids=str)
def test_any_number_of_images_in_any_order(kind, sizes):
    trained = steps(executor_of(2))
    for size in sizes:
        x = images(NET, size, kind)
        assert_near(trained.predict(x), exact(NET, trained.params, x), TOLERANCE["fp32"], f"{size} images")
    apart = images(NET, 8, kind)
    np.testing.assert_array_equal(trained.predict(apart[::2]), trained.predict(apart[::2].copy()))
    trained.close()


@pytest.mark.parametrize("sizes", [SIZES, MORE_SIZES], ids=str)
def test_threads_leave_the_bits_of_predictions(sizes):
    """The number of threads decides into how many parts few images are cut."""
    results = set()
    for threads in (1, 2, 4):
        executor = executor_of(threads)
        results.add(b"".join(executor.predict(images(NET, size)).tobytes() for size in sizes))
        executor.close()
    assert len(results) == 1


def _written(executor):
    executor.params.flat[...] *= np.float32(0.5)
    executor.weights_changed()


def _forward_alone(executor):
    """Moves BatchNorm's running statistics, and nothing else."""
    executor.loss_and_grads(images(NET, 5), np.zeros(5, np.int64), CrossEntropy(), 1.0)


def _restored(executor):
    statistics = executor.statistics()
    executor.restore_statistics({name: array + 1 for name, array in statistics.items()})


@pytest.mark.parametrize("change", [_written, steps, _forward_alone, _restored], ids=lambda change: change.__name__)
@pytest.mark.parametrize("size", [1, 8, pytest.param(9, marks=pytest.mark.slow)])
def test_predictions_follow_the_weights(change, size):
    x, executor = images(NET, size), executor_of(2)
    before = executor.predict(x)
    change(executor)
    after, fresh = executor.predict(x), executor_of(2, executor.params)
    assert (after != before).any()
    np.testing.assert_array_equal(after, fresh.predict(x))
    np.testing.assert_array_equal(after, executor.predict(x))
    executor.close()
    fresh.close()


def test_predictions_leave_training_alone():
    one, other = executor_of(2), executor_of(2)
    for _ in range(3):
        steps(one)
        for size in (1, 8):
            other.predict(images(NET, size))
        steps(other)
    np.testing.assert_array_equal(one.params.flat, other.params.flat)
    np.testing.assert_array_equal(one.params.buffers_flat, other.params.buffers_flat)
    one.close()
    other.close()


@pytest.mark.parametrize("size", [3, 9])
def test_groups_follow_the_weights(size):
    """As filters of one group on tiles, with a BatchNorm in them."""
    layers = (Conv2d(16, 24, 3, padding=1, groups=4, bias=False), BatchNorm2d(24), GlobalAvgPool2d())
    model, unit = Model((16, 7, 6), layers), JIT(threads=2, unit=ON_TILES)
    x, executor = images(model, size), unit.executor(model, None, Recipe(precision="bf16"))
    for factor in (1, -3):
        executor.params.flat[...] *= np.float32(factor)
        executor.weights_changed()
        assert_near(executor.predict(x), exact(model, executor.params, x), 2**-7, f"{size} images")
    executor.close()


def test_what_was_predicted_is_the_callers_own():
    executor = executor_of(1)
    first = executor.predict(images(NET, 2))
    kept = first.copy()
    executor.predict(images(NET, 1))
    np.testing.assert_array_equal(first, kept)
    executor.close()


@pytest.mark.parametrize("unit", UNITS)
def test_few_images_are_predicted_with_dense_weights_in_bf16(unit):
    few_predictions_equal_float64(unit)


# --- 3x3 filters -----------------------------------------------------------------------------------------------------

TILED: dict[str, tuple[tuple[int, ...], tuple[Layer, ...]]] = {
    "odd sizes, pooled": ((16, 7, 9), (Conv2d(16, 5, 3, padding=1), ReLU(), MaxPool2d(2))),
    "no padding": ((17, 6, 8), (Conv2d(17, 65, 3), LeakyReLU(0.2))),
    "pool without activation": ((33, 4, 4), (Conv2d(33, 16, 3, padding=1, bias=False), MaxPool2d(2))),
    "a wider border, for another reader": (
        (16, 6, 6),
        (Residual((Conv2d(16, 16, 3, padding=1),), (Conv2d(16, 16, 5, padding=2),)), ReLU()),
    ),
    "padding on one side more": ((20, 5, 5), (Conv2d(20, 20, 3, padding=2), ReLU(), MaxPool2d(2), GlobalAvgPool2d())),
}


def kernels(model: Model, count: int) -> list[str]:
    isa = detect()
    programs = Programs(model, Params(model), None, count, True, FP32, isa, 2, Compiler(isa))
    return [task.factory for task in programs.forward_tasks if isinstance(task, Task)]


@pytest.mark.parametrize(("shape", "layers"), TILED.values(), ids=TILED)
def test_few_and_many_images_equal_float64(shape, layers):
    model = Model(shape, layers if isinstance(layers[-1], GlobalAvgPool2d) else (*layers, Flatten()))
    params = Params.init(model, 0)
    executor = executor_of(2, params, model)
    for size in (1, 9):
        x = np.random.default_rng(size).normal(size=(size, *shape)).astype(np.float32)
        assert_near(executor.predict(x), exact(model, params, x), TOLERANCE["fp32"], f"{size} images")
    executor.close()


def test_features_are_not_moved_where_a_dense_layer_reads_them():
    assert "images:flatten" not in kernels(NET, 1)
    assert "images:flatten" in kernels(Model((3, 4, 4), (Conv2d(3, 2, 3), Flatten())), 1)
