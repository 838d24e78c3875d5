"""Optimizers, clipping and averaging against torch.optim, 20 steps in float64."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convolt import optimizers
from convolt.errors import ConfigError
from convolt.optimizers import (
    EMA,
    OPTIMIZERS,
    SGD,
    Adam,
    AdamW,
    RMSprop,
    clip_by_norm,
    clip_by_value,
    init_state,
    step_flat,
)

SIZES = (700, 10, 300, 5)  # weight, bias, weight, bias
DECAYS = [(slice(0, 700), True), (slice(700, 710), False), (slice(710, 1010), True), (slice(1010, 1015), False)]
STEPS = 20

# ours, PyTorch's class, its options. A decoupled decay that PyTorch does not have is applied by hand.
CASES = {
    "sgd": (SGD(lr=0.1), torch.optim.SGD, {"lr": 0.1}),
    "sgd, defaults": (SGD(), torch.optim.SGD, {}),
    "sgd, L2": (SGD(lr=0.1, weight_decay=0.01), torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "sgd, momentum": (
        SGD(lr=0.1, momentum=0.9, weight_decay=0.01),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    ),
    "sgd, dampening": (
        SGD(lr=0.1, momentum=0.9, dampening=0.3),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    ),
    "sgd, nesterov": (
        SGD(lr=0.1, momentum=0.85, nesterov=True, weight_decay=0.02),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.85, "nesterov": True, "weight_decay": 0.02},
    ),
    "sgd, decoupled": (
        SGD(lr=0.1, momentum=0.9, weight_decay=0.1, decoupled_weight_decay=True),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9},
    ),
    "adam, defaults": (Adam(), torch.optim.Adam, {}),
    "adam, L2": (
        Adam(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.03),
        torch.optim.Adam,
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.03},
    ),
    "adam, decoupled": (
        Adam(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
        torch.optim.Adam,
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "adamw, defaults": (AdamW(), torch.optim.AdamW, {}),
    "adamw": (
        AdamW(lr=0.02, betas=(0.7, 0.9), weight_decay=0.2),
        torch.optim.AdamW,
        {"lr": 0.02, "betas": (0.7, 0.9), "weight_decay": 0.2},
    ),
    "rmsprop, defaults": (RMSprop(), torch.optim.RMSprop, {}),
    "rmsprop, L2, momentum": (
        RMSprop(lr=0.01, alpha=0.9, eps=1e-5, weight_decay=0.02, momentum=0.8),
        torch.optim.RMSprop,
        {"lr": 0.01, "alpha": 0.9, "eps": 1e-5, "weight_decay": 0.02, "momentum": 0.8},
    ),
    "rmsprop, centered": (
        RMSprop(lr=0.01, centered=True, momentum=0.5),
        torch.optim.RMSprop,
        {"lr": 0.01, "centered": True, "momentum": 0.5},
    ),
    "rmsprop, decoupled": (
        RMSprop(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
        torch.optim.RMSprop,
        {"lr": 0.01},
    ),
}


def gradients(w, step):
    """A loss with a different slope at each step, so that momentum and averages matter."""
    return np.sin(3 * w + step) + 0.1 * w


def starting_point():
    return np.random.default_rng(0).normal(size=sum(SIZES))


def run_ours(optimizer, decays=DECAYS, steps=STEPS, dtype=np.float64):
    w = starting_point().astype(dtype)
    state = init_state(optimizer, w.size, w.dtype)
    for step in range(1, steps + 1):
        step_flat(optimizer, w, gradients(w, step), state, step, decays)
    return w, state


def run_torch(ours, torch_class, options):
    """The same by PyTorch: one parameter for each segment, one parameter group for weights and one for the rest."""
    parts = [torch.nn.Parameter(torch.tensor(part)) for part in np.split(starting_point(), np.cumsum(SIZES)[:-1])]
    groups = [{"params": parts[0::2]}, {"params": parts[1::2]}]
    if not ours.decay_norm_and_bias:
        groups[1]["weight_decay"] = 0.0
    optimizer = torch_class(groups, **options)
    by_hand = (
        ours.weight_decay if ours.weight_decay and "weight_decay" not in options and type(ours) is not AdamW else 0
    )
    for step in range(1, STEPS + 1):
        for part in parts:
            part.grad = torch.tensor(gradients(part.detach().numpy(), step))
        for position, part in enumerate(parts):
            if position % 2 == 0 or ours.decay_norm_and_bias:
                part.data.mul_(1 - ours.lr * by_hand)
        optimizer.step()
    return np.concatenate([part.detach().numpy() for part in parts]), optimizer, parts


@pytest.mark.parametrize("decay_all", [True, False], ids=["decay all", "spare norms and biases"])
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_are_those_of_pytorch(case, decay_all):
    optimizer, torch_class, options = CASES[case]
    optimizer = dataclasses.replace(optimizer, decay_norm_and_bias=decay_all)
    w, state = run_ours(optimizer)
    expected, torch_optimizer, parts = run_torch(optimizer, torch_class, options)
    np.testing.assert_allclose(w, expected, rtol=0, atol=1e-12)
    for name in optimizer.state_names:
        vectors = [torch_optimizer.state[part][name].numpy() for part in parts]
        np.testing.assert_allclose(state[name], np.concatenate(vectors), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_float32_stays_float32_and_near(case):
    w, state = run_ours(CASES[case][0], dtype=np.float32)
    assert {w.dtype, *(vector.dtype for vector in state.values())} == {np.dtype(np.float32)}
    np.testing.assert_allclose(w, run_ours(CASES[case][0])[0], atol=2e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("decay_all", [True, False])
def test_the_block_size_does_not_change_a_bit(case, decay_all, monkeypatch):
    optimizer = dataclasses.replace(CASES[case][0], decay_norm_and_bias=decay_all)
    whole, _ = run_ours(optimizer, steps=5)
    monkeypatch.setattr(optimizers, "BLOCK", 37)
    np.testing.assert_array_equal(run_ours(optimizer, steps=5)[0], whole)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_left_alone(case):
    optimizer = CASES[case][0]
    w, g = starting_point(), gradients(starting_point(), 1)
    before = g.copy()
    step_flat(optimizer, w, g, init_state(optimizer, w.size, w.dtype), 1, DECAYS)
    np.testing.assert_array_equal(g, before)


def test_l2_and_decoupled_decay_differ_under_momentum_and_agree_without():
    def end(optimizer):
        return run_ours(optimizer)[0]

    plain = SGD(lr=0.1, weight_decay=0.05)
    np.testing.assert_allclose(end(plain), end(dataclasses.replace(plain, decoupled_weight_decay=True)), atol=1e-12)
    heavy = dataclasses.replace(plain, momentum=0.9)
    assert np.abs(end(heavy) - end(dataclasses.replace(heavy, decoupled_weight_decay=True))).max() > 1e-3


def test_a_scheduled_learning_rate_is_that_of_pytorch():
    optimizer, w = SGD(lr=0.1, momentum=0.9), starting_point()
    state = init_state(optimizer, w.size, w.dtype)
    part = torch.nn.Parameter(torch.tensor(starting_point()))
    torch_optimizer = torch.optim.SGD([part], lr=0.1, momentum=0.9)
    for step in range(1, STEPS + 1):
        lr = 0.1 * 0.8**step
        step_flat(dataclasses.replace(optimizer, lr=lr), w, gradients(w, step), state, step, DECAYS)
        torch_optimizer.param_groups[0]["lr"] = lr
        part.grad = torch.tensor(gradients(part.detach().numpy(), step))
        torch_optimizer.step()
    np.testing.assert_allclose(w, part.detach().numpy(), atol=1e-12)


def test_a_momentum_that_appears_late_is_refused():
    with pytest.raises(ConfigError, match="SGD: the run began without momentum_buffer"):
        step_flat(
            SGD(momentum=0.9), np.zeros(3), np.ones(3), init_state(SGD(), 3, np.float64), 2, [(slice(0, 3), True)]
        )


@given(
    norm=st.sampled_from([0.0, 1e-3, 0.999, 1.0, 1.0000005, 7.0, 1e6]),
    max_norm=st.sampled_from([0.0, 0.5, 1.0, 100.0]),
    size=st.integers(1, 40_000),
)
def test_clipping_by_norm_is_that_of_pytorch(norm, max_norm, size):
    g = np.random.default_rng(size).normal(size=size)
    g *= norm / np.linalg.norm(g)
    part = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
    part.grad = torch.tensor(g)
    expected = torch.nn.utils.clip_grad_norm_([part], max_norm).item()
    assert clip_by_norm(g, max_norm) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(g, part.grad.numpy(), rtol=1e-12)


def test_clipping_by_norm_survives_large_float32_gradients():
    g = np.full(4, 1e30, np.float32)
    assert clip_by_norm(g, 1.0) == pytest.approx(2e30)
    assert g.dtype == np.float32
    np.testing.assert_allclose(g, 0.5, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_clipping_by_norm_does_not_hide_a_gradient_that_is_not_finite(bad):
    g = np.array([1.0, bad, 3.0])
    before = g.copy()
    assert not math.isfinite(clip_by_norm(g, 1.0))
    np.testing.assert_array_equal(g, before)


def test_clipping_by_value_is_that_of_pytorch():
    g = 3 * starting_point()
    part = torch.nn.Parameter(torch.zeros(g.size, dtype=torch.float64))
    part.grad = torch.tensor(g)
    torch.nn.utils.clip_grad_value_([part], 1.5)
    clip_by_value(g, 1.5)
    np.testing.assert_array_equal(g, part.grad.numpy())


def test_the_moving_average_is_that_of_pytorch():
    part = torch.nn.ParameterList([torch.tensor(starting_point())])
    averaged = torch.optim.swa_utils.AveragedModel(part, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(part)  # the first call copies
    w = starting_point()
    shadow = w.copy()
    for step in range(STEPS):
        w += gradients(w, step)
        part[0].data.copy_(torch.tensor(w))
        averaged.update_parameters(part)
        EMA(decay=0.9).update(shadow, w)
    np.testing.assert_allclose(shadow, averaged.module[0].detach().numpy(), atol=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SGD(lr=-1), "SGD: lr must be >= 0; got -1"),
        (lambda: SGD(lr="fast"), "SGD: lr must be a finite number >= 0; got 'fast'"),
        (lambda: SGD(lr=math.nan), "SGD: lr must be a finite number >= 0; got nan"),
        (lambda: SGD(momentum=-0.1), "SGD: momentum must be >= 0; got -0.1"),
        (lambda: SGD(nesterov=1), "SGD: nesterov must be true or false; got 1"),
        (
            lambda: SGD(nesterov=True),
            "SGD: nesterov must have momentum > 0 and dampening 0; got momentum=0.0, dampening=0.0",
        ),
        (lambda: Adam(betas=(0.9, 1.0)), "Adam: betas must be two numbers >= 0 and < 1; got (0.9, 1.0)"),
        (lambda: Adam(betas=0.9), "Adam: betas must be two numbers >= 0 and < 1; got 0.9"),
        (lambda: AdamW(weight_decay=-1e-4), "AdamW: weight_decay must be >= 0; got -0.0001"),
        (lambda: RMSprop(eps=-1), "RMSprop: eps must be >= 0; got -1"),
        (lambda: RMSprop(alpha=2), "RMSprop: alpha must be >= 0 and <= 1; got 2"),
        (lambda: EMA(decay=1.1), "EMA: decay must be >= 0 and <= 1; got 1.1"),
        (
            lambda: EMA(every=5),
            "EMA: every must be a length with a unit, such as '10ep' (epochs), '500ba' (batches) or '0.3dur' "
            "(part of the run); got 5",
        ),
        (lambda: EMA(every="0ba"), "EMA: every must be longer than 0; got '0ba'"),
    ],
)
def test_a_field_that_cannot_be_is_refused(build, message):
    with pytest.raises(ConfigError) as caught:
        build()
    assert str(caught.value) == message


def test_numbers_of_numpy_become_numbers_of_python():
    assert type(SGD(lr=np.float64(0.1)).lr) is float
    assert type(Adam(lr=np.float32(0.5)).lr) is float


def test_defaults_are_those_of_pytorch():
    part = torch.nn.Parameter(torch.zeros(1))
    for optimizer in OPTIMIZERS:
        options = {"lr": 1e-3} if optimizer is SGD else {}
        defaults = getattr(torch.optim, optimizer.__name__)([part], **options).defaults
        ours = dataclasses.asdict(optimizer())
        for name in ours.keys() & defaults.keys():
            if name != "decoupled_weight_decay":
                assert ours[name] == defaults[name], (optimizer.__name__, name)
