"""The torch engine against the living definition, and what only this engine has."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from convolt.engines.loops import Loops
from convolt.engines.torch import Torch
from convolt.engines.torch import executor as torch_executor
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
    Sequential,
    SiLU,
)
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import SGD, Adam, AdamW, RMSprop
from convolt.rng import SampleRng

N, CLASSES = 4, 3


@dataclass(frozen=True)
class Wanted:
    precision: str = "fp64"
    seed: int = 3


def executors(model, precision="fp64", engine=None):
    recipe = Wanted(precision)
    return (engine or Torch(threads=1)).executor(model, None, recipe), Loops().executor(model, None, recipe)


def batch(shape, n=N, seed=0):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, *shape)), draw.integers(0, CLASSES, n), SampleRng(7, seed, np.arange(n) + 10 * seed)


def classifier(*layers, shape=(2, 6, 5)):
    """The layers, and a dense layer behind them."""
    features = Model(shape, (*layers, Flatten())).output_shape[0]
    return Model(shape, (*layers, Flatten(), Dense(features, CLASSES)))


# No bias before a norm: its gradient is zero but for rounding, which Adam would turn into steps of full size.
SMALL = classifier(Conv2d(2, 4, 3, padding=1, bias=False), BatchNorm2d(4), ReLU(), MaxPool2d(2), Dropout(0.4))

LAYERS = {
    "conv": (Conv2d(2, 4, 3, padding=1),),
    "conv rectangular": (Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False),),
    "conv same, even kernel": (Conv2d(2, 2, (2, 4), padding="same"),),
    "conv valid": (Conv2d(2, 2, 3, padding="valid"),),
    "conv groups": (Conv2d(2, 4, 1), Conv2d(4, 6, 3, groups=2)),
    "conv depthwise": (Conv2d(2, 4, 3, groups=2),),
    "batch norm": (Conv2d(2, 3, 1), BatchNorm2d(3, eps=1e-3, momentum=0.3)),
    "batch norm, not affine": (Conv2d(2, 3, 1), BatchNorm2d(3, affine=False)),
    "normalize": (Normalize((0.1, 0.2), (0.5, 2.0)), Conv2d(2, 2, 1)),
    "relu": (Conv2d(2, 2, 1), ReLU()),
    "leaky relu": (Conv2d(2, 2, 1), LeakyReLU(0.2)),
    "gelu": (Conv2d(2, 2, 1), GELU()),
    "gelu tanh": (Conv2d(2, 2, 1), GELU("tanh")),
    "silu": (Conv2d(2, 2, 1), SiLU()),
    "max pool": (Conv2d(2, 2, 1), MaxPool2d(3, stride=2, padding=1)),
    "avg pool": (Conv2d(2, 2, 1), AvgPool2d((3, 2), stride=(1, 2), padding=1)),
    "avg pool, padding not counted": (Conv2d(2, 2, 1), AvgPool2d(3, padding=1, count_include_pad=False)),
    "global avg pool": (Conv2d(2, 3, 1), GlobalAvgPool2d()),
    "dropout": (Conv2d(2, 3, 1), Dropout(0.3)),
    "dense": (Flatten(), Dense(60, 5, bias=False), ReLU()),
    "nested": (Sequential((Conv2d(2, 2, 1), Sequential((Dropout(0.5),)))),),
    "residual": (Residual((Conv2d(2, 2, 3, padding=1), ReLU(), Dropout(0.5))),),
    "residual with shortcut": (
        Residual((Conv2d(2, 3, 3, padding=1, stride=2), BatchNorm2d(3)), (Conv2d(2, 3, 1, stride=2),)),
        ReLU(),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS.keys())
def test_layer_equals_its_definition(layers):
    model = classifier(*layers)
    ours, reference = executors(model)
    x, y, rng = batch(model.input_shape)
    np.testing.assert_allclose(ours.predict(x), reference.predict(x), rtol=0, atol=1e-12)
    ready = []
    got = ours.loss_and_grads(x, y, CrossEntropy(), 1 / N, rng, ready.append)
    expected = reference.loss_and_grads(x, y, CrossEntropy(), 1 / N, rng)
    np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=1e-12)
    assert got.loss == pytest.approx(expected.loss, abs=1e-12)
    np.testing.assert_allclose(ours.grads.flat, reference.grads.flat, rtol=0, atol=1e-10)
    np.testing.assert_allclose(ours.params.buffers_flat, reference.params.buffers_flat, rtol=0, atol=1e-12)
    assert sorted(part.start for part in ready) == sorted(part.start for part in ours.params.slices.values())
    np.testing.assert_allclose(ours.predict(x), reference.predict(x), rtol=0, atol=1e-12)


OPTIMIZERS = {
    "sgd": SGD(lr=0.1),
    "momentum": SGD(lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1, decay_norm_and_bias=False),
    "sgd, decoupled decay": SGD(lr=0.1, momentum=0.5, weight_decay=0.1, decoupled_weight_decay=True),
    "adam": Adam(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "adam, decoupled decay of weights": Adam(
        lr=0.01, weight_decay=0.5, decoupled_weight_decay=True, decay_norm_and_bias=False
    ),
    "adamw": AdamW(lr=0.01, eps=1e-6, weight_decay=0.5),
    "rmsprop": RMSprop(lr=0.01, alpha=0.9, weight_decay=0.1),
    "rmsprop centered": RMSprop(
        lr=0.01, alpha=0.9, momentum=0.9, centered=True, weight_decay=0.1, decoupled_weight_decay=True
    ),
}


def steps(executor, optimizer, count, start=0):
    """Steps on a batch of their own each, with a learning rate that changes."""
    losses = []
    for step in range(start, start + count):
        x, y, rng = batch(executor.model.input_shape, seed=step)
        scheduled = replace(optimizer, lr=optimizer.lr / (1 + 0.1 * step))
        losses.append(executor.train_step(x, y, CrossEntropy(0.1), 1 / N, scheduled, rng).loss)
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_twenty_steps_equal_the_definition(optimizer):
    ours, reference = executors(SMALL)
    np.testing.assert_allclose(steps(ours, optimizer, 20), steps(reference, optimizer, 20), rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.params.flat, reference.params.flat, rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.params.buffers_flat, reference.params.buffers_flat, rtol=0, atol=1e-9)
    assert ours.params.buffers["1.num_batches_tracked"] == 20


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("torch_first", [True, False])
def test_a_run_goes_on_with_another_engine(optimizer, torch_first):
    ours, reference = executors(SMALL)
    straight, _ = executors(SMALL)
    first, second = (ours, reference) if torch_first else (reference, ours)
    steps(first, optimizer, 3)
    second.params.load_state_dict(first.params.state_dict())
    second.weights_changed()
    second.load_optimizer_state(first.optimizer_state())
    steps(second, optimizer, 3, start=3)
    steps(straight, optimizer, 6)
    assert second.optimizer_state().keys() == first.optimizer_state().keys()
    assert second.optimizer_state()["step"] == 6
    np.testing.assert_allclose(second.params.flat, straight.params.flat, rtol=0, atol=1e-12)


def test_an_unused_state_does_not_replace_a_missing_one():
    ours, _ = executors(SMALL)
    steps(ours, SGD(lr=0.1), 1)
    with pytest.raises(ConfigError, match="SGD: the run began without momentum_buffer"):
        steps(ours, SGD(lr=0.1, momentum=0.9), 1)


def test_an_optimizer_of_ones_own_is_refused():
    @dataclass(frozen=True)
    class Mine(SGD):
        pass

    ours, _ = executors(SMALL)
    with pytest.raises(EngineError, match="optimizer must be one of SGD, Adam, AdamW, RMSprop; got Mine"):
        ours.update(Mine())


# --- the contract ---


def test_parameters_gradients_and_statistics_share_memory_with_numpy():
    ours, _ = executors(SMALL)
    x, y, rng = batch(SMALL.input_shape)
    before = ours.predict(x)
    ours.params["0.weight"][...] = 0
    assert not np.array_equal(ours.predict(x), before)
    ours.grads.flat[...] = 5
    ours.zero_grads()
    assert not ours.grads.flat.any()
    ours.loss_and_grads(x, y, CrossEntropy(), 1.0, rng)
    assert ours.grad_norm() == pytest.approx(np.linalg.norm(ours.grads.flat), rel=1e-12)
    ours.params.buffers["1.running_var"][...] = 1e6
    np.testing.assert_allclose(ours.predict(x)[:, 0], ours.params["6.bias"][0], atol=0.1)


def test_host_and_device_hand_over_the_newest_values(monkeypatch):
    """CUDA has two memories; here the device's is a second one on the CPU."""

    class Apart(torch_executor._Twin):
        def __init__(self, host, device):
            super().__init__(host, device)
            self._device = self._newest = self._host.clone()

    monkeypatch.setattr(torch_executor, "_Twin", Apart)
    ours, reference = executors(SMALL)
    kept = ours.params
    for executor in (ours, reference):
        steps(executor, Adam(lr=0.01), 2)
        x, y, rng = batch(SMALL.input_shape)
        executor.zero_grads()
        for _ in range(2):
            executor.loss_and_grads(x, y, CrossEntropy(), 1 / N, rng)
            executor.grads.flat[...] *= 0.5
        executor.update(Adam(lr=0.01))
    np.testing.assert_allclose(ours.predict(x), reference.predict(x), rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.grad_norm(), reference.grad_norm(), rtol=1e-9)
    np.testing.assert_allclose(ours.params.flat, reference.params.flat, rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.params.buffers_flat, reference.params.buffers_flat, rtol=0, atol=1e-9)
    assert ours.params is kept
    ours.predict(x)
    kept.flat[...], kept.buffers_flat[...] = 0, 1
    ours.weights_changed()
    np.testing.assert_array_equal(ours.predict(x), np.zeros((N, CLASSES)))


def test_two_micro_batches_are_one_batch():
    model = classifier(Conv2d(2, 4, 3), ReLU(), Dropout(0.5))
    whole, _ = executors(model)
    parts, _ = executors(model)
    x, y, rng = batch(model.input_shape)
    total = whole.loss_and_grads(x, y, CrossEntropy(), 1 / N, rng).loss
    sums = [parts.loss_and_grads(x[p], y[p], CrossEntropy(), 1 / N, rng[p]).loss for p in (slice(0, 1), slice(1, N))]
    assert sum(sums) == pytest.approx(total, rel=1e-12)
    np.testing.assert_allclose(parts.grads.flat, whole.grads.flat, rtol=0, atol=1e-14)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_stay_when_the_loss_is_not_finite(precision, value):
    ours = Torch(threads=1).executor(SMALL, None, Wanted(precision))
    x, y, rng = batch(SMALL.input_shape)
    ours.train_step(x, y, CrossEntropy(), 1 / N, Adam(), rng)
    before, state = ours.params.flat.copy(), ours.optimizer_state()
    x[0, 0, 0, 0] = value
    assert not math.isfinite(ours.train_step(x, y, CrossEntropy(), 1 / N, Adam(), rng).loss)
    np.testing.assert_array_equal(ours.params.flat, before)
    for name in ("step", "exp_avg", "exp_avg_sq"):
        np.testing.assert_array_equal(ours.optimizer_state()[name], state[name])
    assert ours.optimizer_state().get("loss_scale") == state.get("loss_scale")


def test_dropout_can_be_off_and_needs_to_know_the_samples():
    ours, reference = executors(SMALL)
    x, y, rng = batch(SMALL.input_shape)
    for match, given in (("layer 4: Dropout needs rng", None), ("layer 4: Dropout needs rng", rng[:2])):
        with pytest.raises(ConfigError, match=match):
            ours.loss_and_grads(x, y, CrossEntropy(), 1.0, given)
    dropped = ours.loss_and_grads(x, y, CrossEntropy(), 1.0, rng).logits
    ours.dropout = reference.dropout = False
    kept = ours.loss_and_grads(x, y, CrossEntropy(), 1.0)
    assert not np.allclose(dropped, kept.logits)
    np.testing.assert_allclose(kept.logits, reference.loss_and_grads(x, y, CrossEntropy(), 1.0).logits, atol=1e-12)


def test_uint8_images_are_scaled_to_one():
    ours, _ = executors(SMALL)
    pixels = np.random.default_rng(0).integers(0, 256, (N, *SMALL.input_shape), np.uint8)
    expected = ours.predict(pixels / 255)
    for same in (pixels, np.asfortranarray(pixels), pixels[::-1][::-1]):
        np.testing.assert_allclose(ours.predict(same), expected, atol=1e-14)
    pixels.flags.writeable = False
    np.testing.assert_allclose(ours.predict(pixels), expected, atol=1e-14)


def test_a_batch_that_cannot_be_is_named():
    ours, _ = executors(classifier(Conv2d(2, 3, (6, 5)), BatchNorm2d(3)))
    x, y, _ = batch((2, 6, 5))
    with pytest.raises(ConfigError, match=r"images must have shape \(N, 2, 6, 5\); got \(4, 2, 6, 4\)"):
        ours.predict(x[..., :4])
    with pytest.raises(ConfigError, match="layer 1: BatchNorm2d needs more than one value a channel"):
        ours.loss_and_grads(x[:1], y[:1], CrossEntropy(), 1.0)


def test_a_model_without_parameters_has_a_loss():
    ours = Torch(threads=1).executor(Model((CLASSES,), (ReLU(),)), None, Wanted())
    result = ours.train_step(np.zeros((N, CLASSES)), np.zeros(N, np.int64), CrossEntropy(), 1.0, SGD())
    assert result.loss == pytest.approx(N * math.log(CLASSES))


def test_given_parameters_are_copied():
    first, _ = executors(SMALL)
    second = Torch(threads=1).executor(SMALL, first.params, Wanted(seed=8))
    np.testing.assert_array_equal(second.params.flat, first.params.flat)
    steps(second, SGD(lr=1.0), 1)
    assert not np.array_equal(second.params.flat, first.params.flat)


# --- threads, formats, options ---


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_hold_during_a_call_and_not_after(threads, monkeypatch):
    seen = []
    relu = torch.nn.ReLU.forward
    monkeypatch.setattr(torch.nn.ReLU, "forward", lambda m, x: seen.append(torch.get_num_threads()) or relu(m, x))
    before = torch.get_num_threads()
    ours, _ = executors(SMALL, engine=Torch(threads=threads))
    x, y, rng = batch(SMALL.input_shape)
    ours.predict(x)
    ours.train_step(x, y, CrossEntropy(), 1 / N, SGD(), rng)
    with pytest.raises(ConfigError):
        ours.predict(x[:, :1])
    assert seen == [threads, threads]
    assert torch.get_num_threads() == before


def test_making_an_executor_leaves_the_generator_of_torch_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    steps(executors(SMALL)[0], SGD(), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_learns_in_any_precision(precision):
    ours = Torch(threads=1).executor(SMALL, None, Wanted(precision))
    assert ours.params.dtype == ours.grads.dtype == np.float32
    x, y, rng = batch(SMALL.input_shape, n=16)
    x[np.arange(16), 0, y] += 2.0
    losses = [ours.train_step(x, y, CrossEntropy(), 1 / 16, Adam(lr=0.01), rng).loss for _ in range(40)]
    assert losses[-1] < losses[0] / 2
    assert ours.predict(x).dtype == np.float32
    assert (ours.predict(x).argmax(1) == y).mean() > 0.8


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 0.1), ("fp16", 0.02)])
def test_precision_is_as_coarse_as_its_format(precision, tolerance):
    coarse = Torch(threads=1).executor(SMALL, None, Wanted(precision))
    exact, _ = executors(SMALL)
    x, y, rng = batch(SMALL.input_shape)
    for executor in (coarse, exact):
        executor.loss_and_grads(x, y, CrossEntropy(), 1 / N, rng)
    distance = np.linalg.norm(coarse.grads.flat - exact.grads.flat) / exact.grad_norm()
    assert tolerance / 1000 < distance < tolerance


def test_fp16_halves_its_scale_instead_of_skipping_a_step():
    ours = Torch(threads=1).executor(SMALL, None, Wanted("fp16"))
    x, y, rng = batch(SMALL.input_shape)
    ready = []
    ours.loss_and_grads(x, y, CrossEntropy(), 1.0, rng)
    fine = ours.grads.flat.copy()
    ours.load_optimizer_state(ours.optimizer_state() | {"loss_scale": np.array(2.0**30)})
    ours.zero_grads()
    tracked = int(ours.params.buffers["1.num_batches_tracked"])
    ours.loss_and_grads(x, y, CrossEntropy(), 1.0, rng, ready.append)
    np.testing.assert_allclose(ours.grads.flat, fine, rtol=0.01, atol=0.01)
    state = ours.optimizer_state()
    assert 1 < state["loss_scale"] < 2.0**30
    assert state["good_steps"] == 1
    assert ours.params.buffers["1.num_batches_tracked"] == tracked + 1
    assert ready == [slice(0, ours.grads.flat.size)]


def test_fp16_raises_its_scale_after_many_good_steps():
    ours = Torch(threads=1).executor(classifier(), None, Wanted("fp16"))
    state = {"step": np.array(0), "loss_scale": np.array(8.0)}
    ours.load_optimizer_state(state | {"good_steps": np.array(torch_executor.GROWTH_INTERVAL - 1)})
    x, y, _ = batch((2, 6, 5))
    ours.loss_and_grads(x, y, CrossEntropy(), 1.0)
    assert ours.optimizer_state()["loss_scale"] == 16.0
    assert ours.optimizer_state()["good_steps"] == 0


def test_fp16_gradients_add_up():
    ours = Torch(threads=1).executor(classifier(), None, Wanted("fp16"))
    x, y, _ = batch((2, 6, 5))
    ours.loss_and_grads(x, y, CrossEntropy(), 1.0)
    once = ours.grads.flat.copy()
    ours.loss_and_grads(x, y, CrossEntropy(), 1.0)
    np.testing.assert_allclose(ours.grads.flat, 2 * once, rtol=1e-6)


def test_channels_last_changes_the_layout_alone(monkeypatch):
    layouts = []
    pool = torch.nn.MaxPool2d.forward

    def watched(module, x):
        layouts.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        return pool(module, x)

    monkeypatch.setattr(torch.nn.MaxPool2d, "forward", watched)
    ours, reference = executors(SMALL, engine=Torch(threads=1, channels_last=True))
    steps(ours, Adam(lr=0.01), 3)
    steps(reference, Adam(lr=0.01), 3)
    assert layouts == [True] * 3
    np.testing.assert_allclose(ours.params.flat, reference.params.flat, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_steps_equal_the_definition():
    ours, reference = executors(SMALL, engine=Torch(threads=1, compile=True))
    np.testing.assert_allclose(steps(ours, Adam(lr=0.01), 3), steps(reference, Adam(lr=0.01), 3), rtol=0, atol=1e-9)
    x, *_ = batch(SMALL.input_shape, n=3)
    np.testing.assert_allclose(ours.predict(x), reference.predict(x), rtol=0, atol=1e-9)
