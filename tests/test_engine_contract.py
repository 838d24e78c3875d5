"""What every executor promises to the training loop, on every engine."""

import tracemalloc
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import ENGINES, TOLERANCE, Entry
from engine_checks import assert_near
from threadpoolctl import threadpool_info, threadpool_limits

from convolt import engines, zoo
from convolt.engine import Executor
from convolt.engines.im2col import Im2col, windows
from convolt.errors import ConfigError, EngineError
from convolt.layers import (
    GELU,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    LeakyReLU,
    MaxPool2d,
    Normalize,
    ReLU,
    Residual,
    SiLU,
)
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import SGD, Adam, AdamW, RMSprop
from convolt.params import Params
from convolt.precision import PRECISIONS, precision
from convolt.recipe import Recipe
from convolt.rng import SampleRng

CLASSES = 5
NET = Model(
    (2, 8, 6),
    (
        *(Conv2d(2, 6, 3, padding=1), ReLU(), MaxPool2d(2)),
        Residual((Conv2d(6, 6, 3, padding=1), ReLU())),
        *(Conv2d(6, 4, 3, stride=2, padding=1, groups=2), ReLU(), Flatten(), Dense(16, CLASSES)),
    ),
)
NORMS = Model((2, 6, 6), (Conv2d(2, 5, 3), BatchNorm2d(5), ReLU(), GlobalAvgPool2d(), Dense(5, CLASSES)))
DROPS = Model((2, 6, 6), (Flatten(), Dense(72, 9), ReLU(), Dropout(0.4), Dense(9, CLASSES)))

every_engine = pytest.mark.parametrize("entry", ENGINES, ids=lambda entry: entry.name)
every_precision = pytest.mark.parametrize(
    ("entry", "precision_name"),
    [
        pytest.param(entry, name, marks=[pytest.mark.slow] if entry.compiles and name != entry.finest else [])
        for entry in ENGINES
        for name in entry.precisions
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)


@dataclass
class Batch:
    """Images, labels, and who they are."""

    model: Model
    size: int = 7
    seed: int = 1
    x: Any = field(init=False)
    y: Any = field(init=False)
    rng: SampleRng = field(init=False)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(self.seed)
        self.x = generator.normal(size=(self.size, *self.model.input_shape))
        self.y = generator.integers(0, CLASSES, self.size)
        self.rng = SampleRng(0, 0, np.arange(self.size))


def executor_of(entry: Entry, model: Model = NET, name: str | None = None, threads: int = 1, seed: int = 0) -> Executor:
    return entry.make(threads).executor(model, None, Recipe(precision=name or entry.finest, seed=seed))


def train(executor: Executor, batch: Batch, optimizer=SGD(lr=0.1, momentum=0.9)):  # noqa: B008  # frozen
    return executor.train_step(batch.x, batch.y, CrossEntropy(), 1 / batch.size, optimizer, batch.rng)


# --- prediction ------------------------------------------------------------------------------------------------------


@every_precision
def test_prediction_of_a_sample_does_not_depend_on_its_batch(entry, precision_name):
    executor, x = executor_of(entry, NORMS, precision_name), Batch(NORMS).x
    whole = executor.predict(x)
    assert whole.shape == (7, CLASSES)
    assert whole.dtype.kind == "f"
    parts = np.concatenate([executor.predict(x[:1]), executor.predict(x[1:4]), executor.predict(x[4:])])
    assert_near(parts, whole, TOLERANCE[precision_name], "predictions")


@every_engine
def test_prediction_changes_nothing(entry):
    executor = executor_of(entry, NORMS)
    before = executor.params.state_dict()
    executor.predict(Batch(NORMS).x)
    for name, array in executor.params.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


@every_precision
def test_bytes_are_scaled_to_one(entry, precision_name):
    pixels = np.random.default_rng(0).integers(0, 256, (4, *NET.input_shape), np.uint8)
    executor = executor_of(entry, NET, precision_name)
    want = executor.predict(pixels / 255)
    assert_near(executor.predict(pixels), want, TOLERANCE[precision_name], "predictions")


@every_engine
def test_results_are_not_overwritten_and_inputs_are_not_changed(entry):
    executor, batch, other = executor_of(entry), Batch(NET), Batch(NET, seed=2)
    x, y = batch.x.copy(), batch.y.copy()
    batch.x.flags.writeable = batch.y.flags.writeable = False
    predicted, trained = executor.predict(batch.x), train(executor, batch).logits
    copies = predicted.copy(), trained.copy()
    train(executor, other)
    executor.predict(other.x)
    np.testing.assert_array_equal(predicted, copies[0])
    np.testing.assert_array_equal(trained, copies[1])
    np.testing.assert_array_equal(batch.x, x)
    np.testing.assert_array_equal(batch.y, y)


@every_engine
def test_images_may_lie_anywhere_in_memory(entry):
    executor, x = executor_of(entry), Batch(NET).x
    mirrored = np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1]
    assert not mirrored.flags.c_contiguous
    assert_near(executor.predict(mirrored), executor.predict(x), TOLERANCE[entry.finest], "predictions")


@every_engine
def test_images_of_another_shape_are_refused(entry):
    with pytest.raises(ConfigError, match=r"images must have shape \(N, 2, 8, 6\); got \(3, 2, 6, 8\)"):
        executor_of(entry).predict(np.zeros((3, 2, 6, 8)))


# --- loss and gradients ----------------------------------------------------------------------------------------------


@every_precision
def test_losses_are_sums_and_gradients_add_up_over_uneven_parts(entry, precision_name):
    batch, scale = Batch(NET, size=9), 1 / 9
    whole, parts = (executor_of(entry, NET, precision_name) for _ in range(2))
    want = whole.loss_and_grads(batch.x, batch.y, CrossEntropy(), scale)
    pieces = [slice(0, 1), slice(1, 6), slice(6, 9)]
    got = [parts.loss_and_grads(batch.x[piece], batch.y[piece], CrossEntropy(), scale) for piece in pieces]
    tolerance = 1e-12 if precision_name == "fp64" else TOLERANCE[precision_name]
    assert sum(result.loss for result in got) == pytest.approx(want.loss, rel=tolerance)
    assert_near(parts.grads.flat, whole.grads.flat, tolerance, "gradient")
    mean = CrossEntropy()(want.logits, batch.y)[0] / 9
    assert want.loss / 9 == pytest.approx(mean, rel=1e-6)


@every_engine
def test_any_loss_that_keeps_the_protocol_will_do(entry):
    def half_square(logits, targets):
        return float(0.5 * np.square(logits).sum()), logits

    executor, batch = executor_of(entry), Batch(NET)
    result = executor.loss_and_grads(batch.x, batch.y, half_square, 1.0)
    assert result.loss == pytest.approx(0.5 * np.square(result.logits).sum(), rel=1e-6)
    last = executor.grads[list(executor.grads)[-1]]  # the last bias: its gradient is the sum of the logits
    np.testing.assert_allclose(last, result.logits.sum(axis=0), rtol=1e-5)


@every_precision
@pytest.mark.parametrize("model", [NET, NORMS, DROPS], ids=["residual", "norms", "dense"])
def test_each_slice_is_announced_once_and_then_final(entry, precision_name, model):
    executor, batch = executor_of(entry, model, precision_name), Batch(model)
    announced: list[tuple[slice, np.ndarray]] = []

    def on_ready(part):
        announced.append((part, executor.grads.flat[part].copy()))

    executor.loss_and_grads(batch.x, batch.y, CrossEntropy(), 1.0, batch.rng, on_ready)
    times = np.zeros(executor.grads.flat.size, int)
    for part, values in announced:
        times[part] += 1
        np.testing.assert_array_equal(values, executor.grads.flat[part])
    assert set(times) == {1}


@every_engine
def test_streaming_begins_before_backward_ends(entry):
    """The last layer's gradient is announced first, so that its allreduce can hide behind the rest."""
    executor, batch, order = executor_of(entry), Batch(NET), []
    executor.loss_and_grads(batch.x, batch.y, CrossEntropy(), 1.0, None, lambda part: order.append(part.start))
    assert len(order) > 1
    starts = {name: part.start for name, part in executor.params.slices.items()}
    assert order[0] >= starts["7.weight"]
    assert order[-1] <= starts["0.bias"]


@every_engine
def test_dropout_can_be_off_and_then_needs_no_rng(entry):
    batch = Batch(DROPS)
    plain = Model(DROPS.input_shape, tuple(Dropout(0.0) if isinstance(one, Dropout) else one for one in DROPS.layers))
    with_dropout, off, without = executor_of(entry, DROPS), executor_of(entry, DROPS), executor_of(entry, plain)
    off.dropout = False
    for executor, rng in ((with_dropout, batch.rng), (off, None), (without, None)):
        executor.loss_and_grads(batch.x, batch.y, CrossEntropy(), 1.0, rng)
    assert_near(off.grads.flat, without.grads.flat, TOLERANCE[entry.finest], "gradient")
    assert np.abs(with_dropout.grads.flat - without.grads.flat).max() > 1e-3


@every_engine
def test_dropout_does_not_guess_who_the_samples_are(entry):
    batch = Batch(DROPS)
    with pytest.raises(ConfigError, match=r"layer 3: Dropout needs rng=SampleRng"):
        executor_of(entry, DROPS).loss_and_grads(batch.x, batch.y, CrossEntropy(), 1.0)


@every_engine
def test_batch_norm_refuses_one_value_a_channel(entry):
    model = Model((2, 3, 3), (Conv2d(2, 3, 3), BatchNorm2d(3), Flatten(), Dense(3, CLASSES)))
    batch = Batch(model, size=1)
    with pytest.raises(ConfigError, match=r"layer 1: BatchNorm2d needs more than one value a channel"):
        executor_of(entry, model).loss_and_grads(batch.x, batch.y, CrossEntropy(), 1.0)


# --- weights and updates ---------------------------------------------------------------------------------------------


@every_precision
def test_weights_have_the_master_format_and_start_from_the_seed(entry, precision_name):
    executor = executor_of(entry, NET, precision_name, seed=4)
    master = precision(precision_name).master
    assert executor.params.dtype == master
    np.testing.assert_array_equal(executor.params.flat, Params.init(NET, 4, master).flat)


@every_engine
def test_given_weights_are_copied(entry):
    given = Params.init(NORMS, 9, np.float64)
    before = given.state_dict()
    executor = entry.make(1).executor(NORMS, given, Recipe(precision=entry.finest))
    own = given.flat.astype(executor.params.dtype)
    np.testing.assert_array_equal(executor.params.flat, own)
    train(executor, Batch(NORMS))
    assert (executor.params.flat != own).any()
    for name, array in given.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


@every_precision
def test_weights_written_from_outside_are_used(entry, precision_name):
    executor, other = (executor_of(entry, NET, precision_name, seed=seed) for seed in (0, 1))
    x = Batch(NET).x
    executor.predict(x)
    executor.params.load_state_dict(other.params.state_dict())
    executor.weights_changed()
    np.testing.assert_array_equal(executor.predict(x), other.predict(x))


@every_precision
def test_a_step_that_is_not_finite_leaves_weights_and_optimizer_alone(entry, precision_name):
    executor, batch = executor_of(entry, NET, precision_name), Batch(NET)
    train(executor, batch)
    weights, state = executor.params.flat.copy(), executor.optimizer_state()
    bad = Batch(NET)
    bad.x[3, 1, 2, 2] = np.nan
    assert not np.isfinite(train(executor, bad).loss)
    bad.x[...] = batch.x
    infinite = executor.train_step(batch.x, batch.y, CrossEntropy(), np.inf, SGD(lr=0.1, momentum=0.9), batch.rng)
    assert not np.isfinite(infinite.loss), "the loss is finite, the gradient is not"
    np.testing.assert_array_equal(executor.params.flat, weights)
    for name in ("step", "momentum_buffer"):
        np.testing.assert_array_equal(executor.optimizer_state()[name], state[name])
    assert np.isfinite(train(executor, batch).loss)


@every_engine
@pytest.mark.parametrize(
    "optimizer",
    [SGD(lr=0.1), SGD(lr=0.1, momentum=0.9), Adam(), AdamW(), RMSprop(momentum=0.5, centered=True)],
    ids=lambda optimizer: f"{type(optimizer).__name__}-{len(optimizer.state_names)}",
)
def test_optimizer_state_goes_on_anywhere(entry, optimizer):
    """From a checkpoint on the same engine to the bit; from another engine's state by the same equations."""
    first, second = executor_of(entry), executor_of(entry)
    other = engines.Loops().executor(NET, None, Recipe(precision=entry.finest))
    batches = [Batch(NET, seed=seed) for seed in range(4)]
    for batch in batches[:2]:
        train(first, batch, optimizer)
        train(other, batch, optimizer)
    state = first.optimizer_state()
    assert set(state) >= {"step", *optimizer.state_names}
    assert int(state["step"]) == 2
    second.params.load_state_dict(first.params.state_dict())
    second.weights_changed()
    second.load_optimizer_state(state)
    third = executor_of(entry)
    third.params.load_state_dict(other.params.state_dict())
    third.weights_changed()
    third.load_optimizer_state(other.optimizer_state())
    for batch in batches[2:]:
        for executor in (first, second, third):
            train(executor, batch, optimizer)
    np.testing.assert_array_equal(second.params.flat, first.params.flat)
    assert_near(third.params.flat, first.params.flat, 100 * TOLERANCE[entry.finest], "weights")
    assert int(state["step"]) == 2, "the state that was handed out is a copy"


@every_engine
def test_precisions_are_those_it_lists(entry):
    for name in PRECISIONS:
        if name in entry.precisions:
            assert np.isfinite(train(executor_of(entry, NET, name), Batch(NET)).loss)
            continue
        with pytest.raises(EngineError, match=r"precision must be one of .*; got ") as caught:
            executor_of(entry, NET, name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", [e for e in ENGINES if "fp32-master64" in e.precisions], ids=lambda e: e.name)
def test_updates_smaller_than_a_float32_are_kept(entry):
    executor, batch = executor_of(entry, NET, "fp32-master64"), Batch(NET)
    before = executor.params.flat.copy()
    for _ in range(3):
        train(executor, batch, SGD(lr=1e-12))
    assert (before.astype(np.float32) == executor.params.flat.astype(np.float32)).mean() > 0.99
    moved = before - executor.params.flat
    assert_near(moved, 3e-12 * executor.grads.flat, 1e-3, "movement")


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [entry for entry in ENGINES if entry.owner_computes], ids=lambda entry: entry.name)
@pytest.mark.parametrize("model", [NET, NORMS, DROPS], ids=["residual", "norms", "dropout"])
def test_number_of_threads_does_not_change_the_bits(entry, model, monkeypatch):
    monkeypatch.setattr(windows, "TILE_BYTES", 1000)  # many small tiles to quarrel about
    results = []
    for threads in (1, 2, 3, 4):
        executor = executor_of(entry, model, "fp32" if "fp32" in entry.precisions else None, threads)
        losses = [train(executor, Batch(model, size=16, seed=seed), Adam(lr=0.01)).loss for seed in range(3)]
        results.append((losses, executor.params.flat.tobytes(), executor.predict(Batch(model).x).tobytes()))
        executor.close()
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("entry", [entry for entry in ENGINES if not entry.compiles], ids=lambda entry: entry.name)
def test_threads_limit_the_libraries_below_and_give_them_back(entry):
    """Compiled kernels have no library below them."""
    seen = []

    def spy(logits, targets):
        seen.append((_blas_threads(), torch.get_num_threads()))
        return CrossEntropy()(logits, targets)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with threadpool_limits(3, user_api="blas"):
            for threads in (1, 2):
                executor, batch = executor_of(entry, NET, None, threads), Batch(NET)
                executor.loss_and_grads(batch.x, batch.y, spy, 1.0)
                executor.close()
            assert _blas_threads() == 3
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    library = 1 if entry.name.startswith("torch") else 0
    for threads, counts in zip((1, 2), seen, strict=True):
        assert counts[library] <= threads


def _blas_threads() -> int:
    return max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")


# --- memory ----------------------------------------------------------------------------------------------------------


def allocated_by_a_step(model: Model, batch_size: int, precision_name: str = "fp32") -> int:
    """Bytes that the second to fifth step had allocated at their peak, beyond what was held before them.

    One thread: a second worker makes its scratch for a tile when it first gets one, in whatever step that is.
    """
    pixels = np.zeros((batch_size, *model.input_shape), np.uint8)
    labels, rng = np.zeros(batch_size, np.int64), SampleRng(0, 0, np.arange(batch_size))
    executor = Im2col(threads=1).executor(model, None, Recipe(precision=precision_name))
    step = (pixels, labels, CrossEntropy(), 1 / batch_size, Adam(), rng)
    executor.train_step(*step)
    tracemalloc.start()
    try:
        held, _ = tracemalloc.get_traced_memory()
        for _ in range(4):
            executor.train_step(*step)
        return tracemalloc.get_traced_memory()[1] - held
    finally:
        tracemalloc.stop()
        executor.close()


@pytest.mark.parametrize(
    "layer",
    [
        *(LeakyReLU(), GELU(), SiLU(), Dropout(0.5), BatchNorm2d(8), Normalize((0.5,) * 8, (2,) * 8)),
        *(AvgPool2d(2), MaxPool2d(3, 1, 1)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_im2col_allocates_no_more_for_a_larger_batch(layer):
    """A tile's temporaries are the same for any batch."""
    features = int(np.prod(layer.output_shape((8, 32, 32))))
    model = Model((3, 32, 32), (Conv2d(3, 8, 1), layer, Flatten(), Dense(features, CLASSES)))
    activation_of_64 = 64 * 8 * 32 * 32 * 4
    assert allocated_by_a_step(model, 128) - allocated_by_a_step(model, 64) < activation_of_64 / 4


BODY = (Conv2d(8, 8, 3, padding=1), BatchNorm2d(8), ReLU())
RESIDUAL_NET = Model(
    (3, 32, 32), (Conv2d(3, 8, 3, padding=1), Residual(BODY), MaxPool2d(2), Flatten(), Dense(2048, CLASSES))
)


@pytest.mark.parametrize(
    ("model", "smallest_activation"),
    [(zoo.mnist_cnn(), 32 * 14 * 14 * 4), (RESIDUAL_NET, 8 * 16 * 16 * 4)],
    ids=["mnist-cnn", "residual"],
)
def test_im2col_allocates_no_array_of_batch_size_after_the_first_step(model, smallest_activation):
    """What remains is the logits, the weights' blocks of the optimizer, and the tiles' bookkeeping."""
    batch_size = 64
    assert allocated_by_a_step(model, batch_size) < smallest_activation * batch_size
