"""Schedules against torch.optim.lr_scheduler stepped each batch, over their whole length."""

import dataclasses
import inspect
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler as peer

from convolt.duration import Time, due, length, period
from convolt.errors import ConfigError
from convolt.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    CosineCyclic,
    Exponential,
    Linear,
    MultiStep,
    OneCycle,
    Piecewise,
    Plateau,
    Step,
    Triangular,
    WarmRestarts,
    Warmup,
)

BASE = 0.1
STEPS_PER_EPOCH, EPOCHS = 13, 9
TOTAL = STEPS_PER_EPOCH * EPOCHS
ONE_EPOCH = STEPS_PER_EPOCH


def start_of_run(total=TOTAL):
    return Time(step=0, steps_per_epoch=STEPS_PER_EPOCH, total_steps=total)


def values(schedule, base=BASE):
    return [schedule(base, dataclasses.replace(start_of_run(), step=step)) for step in range(TOTAL)]


def torch_values(make, key="lr", steps=TOTAL):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE, momentum=0.9)
    scheduler = make(optimizer)
    drawn = []
    for _ in range(steps):
        drawn.append(optimizer.param_groups[0][key])
        optimizer.step()
        scheduler.step()
    return drawn


def warm_up_then(optimizer, over, then):
    line = peer.LinearLR(optimizer, start_factor=0.1, total_iters=over)
    return peer.SequentialLR(optimizer, [line, then(optimizer)], milestones=[over])


# ours, PyTorch's
CASES = {
    "constant": (Constant(), lambda o: peer.ConstantLR(o, factor=1.0)),
    "step, epochs": (Step("2ep", gamma=0.3), lambda o: peer.StepLR(o, 2 * ONE_EPOCH, gamma=0.3)),
    "step, batches": (Step("5ba", gamma=0.9), lambda o: peer.StepLR(o, 5, gamma=0.9)),
    "multistep": (
        MultiStep(("3ep", "60ba", "0.9dur"), gamma=0.2),
        lambda o: peer.MultiStepLR(o, [3 * ONE_EPOCH, 60, round(0.9 * TOTAL)], gamma=0.2),
    ),
    "exponential": (Exponential(gamma=0.97, every="1ba"), lambda o: peer.ExponentialLR(o, 0.97)),
    "cosine": (Cosine(), lambda o: peer.CosineAnnealingLR(o, T_max=TOTAL)),
    "cosine, eta_min": (Cosine(eta_min=1e-3), lambda o: peer.CosineAnnealingLR(o, T_max=TOTAL, eta_min=1e-3)),
    "cosine, cyclic": (
        CosineCyclic("2ep", eta_min=0.01),
        lambda o: peer.CosineAnnealingLR(o, T_max=2 * ONE_EPOCH, eta_min=0.01),
    ),
    "linear, up": (Linear(1 / 3, 1.0, over="5ba"), peer.LinearLR),
    "linear, down": (
        Linear(),
        lambda o: peer.LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=TOTAL),
    ),
    "polynomial of power one": (Linear(), lambda o: peer.PolynomialLR(o, total_iters=TOTAL, power=1.0)),
    "one cycle": (OneCycle(max_lr=0.4), lambda o: peer.OneCycleLR(o, 0.4, total_steps=TOTAL)),
    "one cycle, the base as peak": (OneCycle(), lambda o: peer.OneCycleLR(o, BASE, total_steps=TOTAL)),
    "one cycle, linear": (
        OneCycle(max_lr=0.4, pct_start=0.45, div_factor=10, final_div_factor=100, anneal="linear"),
        lambda o: peer.OneCycleLR(
            o, 0.4, total_steps=TOTAL, pct_start=0.45, div_factor=10, final_div_factor=100, anneal_strategy="linear"
        ),
    ),
    "triangular": (
        Triangular(max_lr=0.5, base_lr=0.02, step_size_up="1ep"),
        lambda o: peer.CyclicLR(o, 0.02, 0.5, step_size_up=ONE_EPOCH),
    ),
    "triangular, uneven": (
        Triangular(max_lr=0.5, base_lr=0.02, step_size_up="4ba", step_size_down="15ba"),
        lambda o: peer.CyclicLR(o, 0.02, 0.5, step_size_up=4, step_size_down=15),
    ),
    "triangular2": (
        Triangular(max_lr=0.5, base_lr=0.02, step_size_up="8ba", mode="triangular2"),
        lambda o: peer.CyclicLR(o, 0.02, 0.5, step_size_up=8, mode="triangular2"),
    ),
    "exp_range": (
        Triangular(max_lr=0.5, base_lr=0.02, step_size_up="8ba", mode="exp_range", gamma=0.98),
        lambda o: peer.CyclicLR(o, 0.02, 0.5, step_size_up=8, mode="exp_range", gamma=0.98),
    ),
    "warm restarts": (
        WarmRestarts("3ep", eta_min=0.01),
        lambda o: peer.CosineAnnealingWarmRestarts(o, 3 * ONE_EPOCH, eta_min=0.01),
    ),
    "warm restarts, longer and longer": (
        WarmRestarts("11ba", T_mult=2),
        lambda o: peer.CosineAnnealingWarmRestarts(o, 11, T_mult=2),
    ),
    "warm-up, cosine": (
        Warmup("2ep", start_factor=0.1),
        lambda o: warm_up_then(o, 2 * ONE_EPOCH, lambda o: peer.CosineAnnealingLR(o, TOTAL - 2 * ONE_EPOCH)),
    ),
    "warm-up, step": (
        Warmup("10ba", start_factor=0.1, then=Step("2ep", gamma=0.5)),
        lambda o: warm_up_then(o, 10, lambda o: peer.StepLR(o, 2 * ONE_EPOCH, gamma=0.5)),
    ),
    "warm-up, multistep": (
        Warmup("1ep", start_factor=0.1, then=MultiStep(("3ep",))),
        lambda o: warm_up_then(o, ONE_EPOCH, lambda o: peer.MultiStepLR(o, [3 * ONE_EPOCH])),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_pytorch(case):
    ours, make = CASES[case]
    np.testing.assert_allclose(values(ours), torch_values(make), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("anneal", ["cos", "linear"])
def test_a_second_one_cycle_moves_the_momentum_as_pytorch_does(anneal):
    ours = OneCycle(max_lr=0.85, div_factor=0.85 / 0.95, final_div_factor=1, anneal=anneal)
    expected = torch_values(lambda o: peer.OneCycleLR(o, 0.4, total_steps=TOTAL, anneal_strategy=anneal), "momentum")
    np.testing.assert_allclose(values(ours, base=0.9), expected, rtol=1e-12)


@pytest.mark.parametrize("monitor", ["valid_loss", "valid_accuracy"])
@pytest.mark.parametrize(
    "options", [{}, {"patience": 1}, {"patience": 0, "cooldown": 2}, {"factor": 0.5, "min_lr": 0.01}]
)
def test_plateau_is_that_of_pytorch(monitor, options):
    options = {"patience": 3, "threshold": 0.01, **options}
    noise = np.random.default_rng(0).normal(size=60)
    metrics = (2 + np.cumsum(noise) / 20).tolist()
    metrics[17] = float("nan")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = peer.ReduceLROnPlateau(optimizer, mode="min" if monitor == "valid_loss" else "max", eps=0, **options)
    ours = Plateau(monitor=monitor, **options)
    state = ours.init()
    for epoch, metric in enumerate(metrics):
        scheduler.step(metric)
        state = ours.observe(json.loads(json.dumps(state)), metric)  # as after a resume
        expected = pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        assert ours.value(BASE, state) == expected
        assert ours(BASE, dataclasses.replace(start_of_run(), metrics=metrics[: epoch + 1])) == expected
    assert state["reductions"] >= 2


def test_plateau_begins_at_the_base_and_never_rises_to_min_lr():
    assert Plateau()(BASE, start_of_run()) == BASE
    assert Plateau(patience=0, min_lr=1.0)(BASE, dataclasses.replace(start_of_run(), metrics=(1.0, 1.0, 1.0))) == BASE


def test_piecewise_lines_and_steps():
    points = (("0ba", 0.1), ("10ba", 1.0), ("2ep", 1.0), ("1dur", 0.0))
    drawn = np.array(values(Piecewise(points), base=2.0))
    np.testing.assert_allclose(drawn, 2 * np.interp(range(TOTAL), [0, 10, 26, TOTAL], [0.1, 1, 1, 0]), atol=1e-12)
    held = values(Piecewise((("3ba", 0.5), ("10ba", 0.25)), interpolate=False), base=2.0)
    assert held == [1.0] * 10 + [0.5] * (TOTAL - 10)


def test_a_jump_is_two_points_at_one_time():
    drawn = values(Piecewise((("0ba", 1.0), ("5ba", 1.0), ("5ba", 0.5), ("9ba", 0.1))), base=1.0)
    np.testing.assert_allclose(drawn[3:11], [1.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1], atol=1e-12)


def test_exponential_acts_within_an_epoch():
    drawn = values(Exponential(gamma=0.5, every="1ep"), base=1.0)
    np.testing.assert_allclose(drawn[::STEPS_PER_EPOCH], 0.5 ** np.arange(EPOCHS), rtol=1e-12)
    assert drawn[1] == pytest.approx(0.5 ** (1 / STEPS_PER_EPOCH))


def test_warm_up_of_nothing_is_the_schedule_itself():
    assert values(Warmup("0ep", then=Cosine())) == values(Cosine())


@pytest.mark.parametrize("schedule", [make() for make in SCHEDULES], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("total", [0, 1, 2, 3])
def test_the_shortest_runs_have_values(schedule, total):
    for step in range(total + 2):
        value = schedule(BASE, dataclasses.replace(start_of_run(total), step=step))
        assert type(value) is float
        assert 0 <= value <= BASE * (1 + 1e-12)


@given(step=st.integers(0, 3 * TOTAL), base=st.floats(1e-6, 10))
def test_schedules_are_proportional_to_the_base(step, base):
    time = dataclasses.replace(start_of_run(), step=step)
    for make in SCHEDULES:
        assert make()(2 * base, time) == pytest.approx(2 * make()(base, time), rel=1e-9)


@pytest.mark.parametrize(
    ("text", "steps"),
    [("10ep", 130), ("500ba", 500), ("0.3dur", 35), ("1dur", 117), ("0.5ep", 7), (".5ep", 7), ("0ba", 0)],
)
def test_lengths(text, steps):
    assert length(text, start_of_run()) == steps


@given(tenths=st.integers(0, 10), total=st.integers(0, 1000))
def test_a_length_is_exact_arithmetic(tenths, total):
    expected = (2 * tenths * total + 10) // 20  # round half up, in integers
    assert length(f"{tenths / 10}dur", start_of_run(total)) == expected


def test_a_period_is_at_least_a_step_and_falls_due_at_its_multiples():
    assert period("0.001dur", start_of_run()) == 1
    times = [dataclasses.replace(start_of_run(), step=step) for step in range(27)]
    assert [time.step for time in times if due("1ep", time)] == [13, 26]


def test_time_counts_epochs_and_progress():
    time = dataclasses.replace(start_of_run(), step=26)
    assert time.epoch == 2.0
    assert time.progress == pytest.approx(2 / 9)
    assert dataclasses.replace(time, step=2 * TOTAL).progress == 1.0
    assert Time(step=0, steps_per_epoch=1, total_steps=0).progress == 1.0


UNIT = "a length with a unit, such as '10ep' (epochs), '500ba' (batches) or '0.3dur' (part of the run)"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Step(step_size=30), f"Step: step_size must be {UNIT}; got 30"),
        (lambda: Step(step_size="30"), f"Step: step_size must be {UNIT}; got '30'"),
        (lambda: Step(step_size="-3ep"), f"Step: step_size must be {UNIT}; got '-3ep'"),
        (lambda: Step(step_size="0ep"), "Step: step_size must be longer than 0; got '0ep'"),
        (lambda: Step(gamma=-1), "Step: gamma must be >= 0; got -1"),
        (lambda: MultiStep(milestones=("30ep", 60)), f"MultiStep: milestones must each be {UNIT}; got ('30ep', 60)"),
        (
            lambda: Piecewise(points=(("0ba",),)),
            "Piecewise: points must be pairs of a length and a factor, such as (('0ba', 0.1), ('5ep', 1.0)); "
            "got (('0ba',),)",
        ),
        (lambda: Cosine(eta_min=None), "Cosine: eta_min must be a finite number >= 0; got None"),
        (lambda: WarmRestarts(T_mult=0), "WarmRestarts: T_mult must be an integer >= 1; got 0"),
        (lambda: WarmRestarts(T_mult=1.5), "WarmRestarts: T_mult must be an integer >= 1; got 1.5"),
        (lambda: OneCycle(pct_start=30), "OneCycle: pct_start must be >= 0 and <= 1; got 30"),
        (lambda: OneCycle(anneal="cosine"), "OneCycle: anneal got 'cosine'; did you mean 'cos'? valid: cos, linear"),
        (
            lambda: Triangular(mode="triangle"),
            "Triangular: mode got 'triangle'; did you mean 'triangular'? valid: exp_range, triangular, triangular2",
        ),
        (lambda: Plateau(factor=1.0), "Plateau: factor must be >= 0 and < 1; got 1.0"),
        (
            lambda: Plateau(monitor="val_loss"),
            "Plateau: monitor got 'val_loss'; did you mean 'valid_loss'? valid: valid_accuracy, valid_loss",
        ),
        (lambda: Warmup(then="cosine"), "Warmup: then must be a schedule, such as Cosine(); got 'cosine'"),
        (lambda: Piecewise(interpolate="no"), "Piecewise: interpolate must be true or false; got 'no'"),
        (lambda: Time(0, 0, 10), "Time: steps_per_epoch must be >= 1; got 0"),
        (lambda: Time(-1, 1, 10), "Time: step must be >= 0; got -1"),
        (lambda: length("5", start_of_run()), f"a length must be {UNIT}; got '5'"),
    ],
)
def test_a_field_that_cannot_be_is_refused(build, message):
    with pytest.raises(ConfigError) as caught:
        build()
    assert str(caught.value) == message


def test_points_out_of_order_are_refused_when_time_tells():
    with pytest.raises(ConfigError, match="Piecewise: points must be in order of time"):
        Piecewise((("2ep", 1.0), ("5ba", 0.1)))(BASE, start_of_run())


def test_defaults_are_those_of_pytorch():
    """Of the options that both have; the docstring of schedules.py lists what differs on purpose."""
    pairs = {
        Step: (peer.StepLR, {"gamma"}),
        MultiStep: (peer.MultiStepLR, {"gamma"}),
        Cosine: (peer.CosineAnnealingLR, {"eta_min"}),
        CosineCyclic: (peer.CosineAnnealingLR, {"eta_min"}),
        WarmRestarts: (peer.CosineAnnealingWarmRestarts, {"T_mult", "eta_min"}),
        OneCycle: (peer.OneCycleLR, {"pct_start", "div_factor", "final_div_factor"}),
        Triangular: (peer.CyclicLR, {"step_size_down", "mode", "gamma"}),
        Plateau: (peer.ReduceLROnPlateau, {"factor", "patience", "threshold", "cooldown", "min_lr"}),
        Warmup: (peer.LinearLR, {"start_factor"}),
    }
    for ours, (theirs, names) in pairs.items():
        defaults = inspect.signature(theirs).parameters
        for name in names:
            assert getattr(ours(), name) == defaults[name].default, (ours.__name__, name)


def test_schedules_are_plain_data():
    for make in SCHEDULES:
        plain = dataclasses.asdict(make())
        leaves = itertools.chain(plain.values(), plain.get("then", {}).values())
        assert all(isinstance(leaf, int | float | str | bool | tuple | dict | None) for leaf in leaves)
        assert hash(make()) == hash(make())
