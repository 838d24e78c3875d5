"""Losses against PyTorch, against finite differences, and at the edges of the number range."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from convolt.errors import ConfigError, DataError, ShapeError
from convolt.losses import LOSSES, MSE, CrossEntropy, Distillation, DistillationTargets

N, C = 7, 5
generator = np.random.default_rng(0)
LOGITS = generator.normal(0, 3, (N, C))
LABELS = generator.integers(0, C, N)
PROBABILITIES = generator.dirichlet(np.ones(C), N)
TEACHER = generator.normal(0, 2, (N, C))

# loss, targets, the same loss by PyTorch
CASES = {
    **{
        f"cross entropy {smoothing}": (
            CrossEntropy(smoothing),
            LABELS,
            lambda z, t, s=smoothing: F.cross_entropy(z, t, label_smoothing=s, reduction="sum"),
        )
        for smoothing in (0.0, 0.1, 1.0)
    },
    **{
        f"cross entropy of probabilities {smoothing}": (
            CrossEntropy(smoothing),
            PROBABILITIES,
            lambda z, t, s=smoothing: F.cross_entropy(z, t, label_smoothing=s, reduction="sum"),
        )
        for smoothing in (0.0, 0.2)
    },
    "cross entropy, targets that do not sum to one": (
        CrossEntropy(),
        2.5 * PROBABILITIES,
        lambda z, t: F.cross_entropy(z, t, reduction="sum"),
    ),
    "mse": (MSE(), TEACHER, lambda z, t: F.mse_loss(z, t) * N),
    "mse of labels": (MSE(), LABELS, lambda z, t: F.mse_loss(z, F.one_hot(t, C).to(z.dtype)) * N),
}


def distillation_by_torch(z, labels, teacher, temperature, alpha):
    soft = F.kl_div(
        F.log_softmax(z / temperature, 1), F.log_softmax(teacher / temperature, 1), reduction="sum", log_target=True
    )
    return (1 - alpha) * F.cross_entropy(z, labels, reduction="sum") + alpha * temperature**2 * soft


def by_torch(function, logits, targets):
    z = torch.tensor(logits, requires_grad=True)
    loss = function(z, torch.tensor(targets))
    loss.backward()
    return loss.item(), z.grad.numpy()


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_pytorch(case):
    loss, targets, function = CASES[case]
    value, gradient = loss(LOGITS, targets)
    expected_value, expected_gradient = by_torch(function, LOGITS, targets)
    assert value == pytest.approx(expected_value, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("temperature", "alpha"), [(4.0, 0.9), (1.0, 1.0), (2.5, 0.0), (10.0, 0.3)])
@pytest.mark.parametrize("labels", [LABELS, PROBABILITIES], ids=["labels", "probabilities"])
def test_distillation_is_that_of_pytorch(temperature, alpha, labels):
    value, gradient = Distillation(temperature, alpha)(LOGITS, DistillationTargets(labels, TEACHER))
    expected_value, expected_gradient = by_torch(
        lambda z, t: distillation_by_torch(z, t, torch.tensor(TEACHER), temperature, alpha), LOGITS, labels
    )
    assert value == pytest.approx(expected_value, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def test_mse_of_one_output_takes_one_number_a_sample():
    numbers = TEACHER[:, 0]
    value, gradient = MSE()(LOGITS[:, :1], numbers)
    assert value == pytest.approx(np.sum((LOGITS[:, 0] - numbers) ** 2), rel=1e-12)
    np.testing.assert_allclose(gradient[:, 0], 2 * (LOGITS[:, 0] - numbers), rtol=1e-12)


ALL = {name: (loss, targets) for name, (loss, targets, _) in CASES.items()} | {
    "distillation": (Distillation(3.0, 0.7), DistillationTargets(LABELS, TEACHER))
}


@pytest.mark.parametrize("case", ALL)
def test_gradient_is_the_slope(case):
    loss, targets = ALL[case]
    _, gradient = loss(LOGITS, targets)
    h = 1e-5
    for n, c in np.ndindex(N, C):
        step = np.zeros((N, C))
        step[n, c] = h
        slope = (loss(LOGITS + step, targets)[0] - loss(LOGITS - step, targets)[0]) / (2 * h)
        assert gradient[n, c] == pytest.approx(slope, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("case", ALL)
def test_a_batch_costs_what_its_parts_cost(case):
    loss, targets = ALL[case]
    value, gradient = loss(LOGITS, targets)
    first, second = loss(LOGITS[:3], targets[:3]), loss(LOGITS[3:], targets[3:])
    assert value == pytest.approx(first[0] + second[0], rel=1e-12)
    np.testing.assert_array_equal(gradient, np.concatenate([first[1], second[1]]))


@pytest.mark.parametrize("case", ALL)
def test_the_gradient_keeps_the_type_of_the_logits(case):
    loss, targets = ALL[case]
    value, gradient = loss(LOGITS.astype(np.float32), targets)
    exact_value, exact_gradient = loss(LOGITS, targets)
    assert isinstance(value, float)
    assert gradient.dtype == np.float32
    assert value == pytest.approx(exact_value, rel=1e-5)
    np.testing.assert_allclose(gradient, exact_gradient, atol=1e-5)


@pytest.mark.parametrize("case", ALL)
def test_inputs_are_left_alone(case):
    loss, targets = ALL[case]
    logits = LOGITS.copy()
    loss(logits, targets)
    np.testing.assert_array_equal(logits, LOGITS)


@given(
    logits=hnp.arrays(np.float64, (3, 4), elements=st.floats(-50, 50)),
    shift=hnp.arrays(np.float64, (3, 1), elements=st.floats(-100, 100)),
    smoothing=st.floats(0, 1),
)
def test_cross_entropy_does_not_change_when_all_logits_shift(logits, shift, smoothing):
    labels = np.array([0, 3, 1])
    value, gradient = CrossEntropy(smoothing)(logits, labels)
    shifted_value, shifted_gradient = CrossEntropy(smoothing)(logits + shift, labels)
    assert shifted_value == pytest.approx(value, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(shifted_gradient, gradient, atol=1e-9)
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
def test_extreme_logits_do_not_overflow(dtype, size):
    logits = np.zeros((2, 3), dtype)
    logits[:, 0] = size
    for loss, targets in (
        (CrossEntropy(0.1), np.array([0, 1])),
        (Distillation(), DistillationTargets(np.array([0, 1]), logits[:, ::-1])),
    ):
        value, gradient = loss(logits, targets)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
    value, gradient = CrossEntropy()(logits[:1], np.array([1]))
    assert value == pytest.approx(size if size > 0 else np.log(2), rel=1e-6)
    np.testing.assert_allclose(gradient, [[1, -1, 0]] if size > 0 else [[0, -0.5, 0.5]], atol=1e-6)


@pytest.mark.parametrize("labels", [[0, 5], [-1, 0]])
@pytest.mark.parametrize("loss", [CrossEntropy(), MSE()])
def test_a_label_out_of_range_is_refused(loss, labels):
    with pytest.raises(DataError, match="labels must be >= 0 and < 5"):
        loss(LOGITS[:2], np.array(labels))


def test_targets_of_another_shape_are_refused():
    with pytest.raises(ShapeError, match="one label for each of 7 samples; got 6"):
        CrossEntropy()(LOGITS, LABELS[:6])
    with pytest.raises(ShapeError, match=r"like the logits \(7, 5\); got \(7, 4\)"):
        CrossEntropy()(LOGITS, PROBABILITIES[:, :4])
    with pytest.raises(ShapeError, match="teacher must give logits"):
        Distillation()(LOGITS, DistillationTargets(LABELS, TEACHER[:, :4]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CrossEntropy(label_smoothing=1.5), "CrossEntropy: label_smoothing must be >= 0 and <= 1; got 1.5"),
        (lambda: CrossEntropy("0.1"), "CrossEntropy: label_smoothing must be a finite number >= 0 and <= 1; got '0.1'"),
        (lambda: Distillation(temperature=0), "Distillation: temperature must be > 0; got 0"),
        (lambda: Distillation(alpha=-0.1), "Distillation: alpha must be >= 0 and <= 1; got -0.1"),
    ],
)
def test_a_field_that_cannot_be_is_refused(build, message):
    with pytest.raises(ConfigError) as caught:
        build()
    assert str(caught.value) == message


def test_every_loss_has_defaults():
    assert [loss().__class__.__name__ for loss in LOSSES] == ["CrossEntropy", "MSE", "Distillation"]
