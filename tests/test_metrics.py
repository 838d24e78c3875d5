"""Metrics against PyTorch, against counting by hand, and for networks that have diverged."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from convolt.errors import ConfigError, ShapeError
from convolt.metrics import accuracy, confusion_matrix, correct, per_class, top_k

C = 6
batches = st.integers(1, 30).flatmap(
    lambda n: st.tuples(
        hnp.arrays(np.float64, (n, C), elements=st.floats(-9, 9), unique=True),
        hnp.arrays(np.int64, n, elements=st.integers(0, C - 1)),
    )
)


@given(batch=batches, k=st.integers(1, C))
def test_top_k_is_that_of_pytorch(batch, k):
    logits, labels = batch
    best = torch.topk(torch.tensor(logits), k, dim=1).indices.numpy()
    assert top_k(logits, labels, k) == pytest.approx(np.mean((best == labels[:, None]).any(axis=1)))


@given(
    logits=hnp.arrays(np.float32, (20, C), elements=st.integers(-2, 2).map(float)),
    labels=hnp.arrays(np.int64, 20, elements=st.integers(0, C - 1)),
)
def test_accuracy_breaks_ties_as_argmax_does(logits, labels):
    assert accuracy(logits, labels) == pytest.approx(np.mean(logits.argmax(axis=1) == labels))


def test_a_dead_network_is_right_for_one_class_only():
    assert accuracy(np.zeros((C, C)), np.arange(C)) == pytest.approx(1 / C)
    assert top_k(np.zeros((C, C)), np.arange(C), 2) == pytest.approx(2 / C)


def test_what_is_not_a_number_is_never_right():
    assert accuracy(np.full((C, C), np.nan), np.arange(C)) == 0
    logits = np.eye(3)
    logits[0, 1] = np.nan
    np.testing.assert_array_equal(correct(logits, np.arange(3)), [False, True, True])


def test_no_samples_and_impossible_requests():
    assert accuracy(np.zeros((0, C)), np.zeros(0, np.int64)) == 0
    with pytest.raises(ConfigError, match="k must be >= 1; got 0"):
        top_k(np.zeros((1, C)), np.zeros(1, np.int64), 0)
    with pytest.raises(ShapeError, match=r"got \(2, 6\) and \(3,\)"):
        accuracy(np.zeros((2, C)), np.zeros(3, np.int64))
    with pytest.raises(ShapeError, match="one prediction for each label"):
        confusion_matrix(np.zeros(2, np.int64), np.zeros(3, np.int64), C)


@given(batch=batches)
def test_confusion_matrix_and_its_ratios_are_counts(batch):
    logits, labels = batch
    predictions = logits.argmax(axis=1)
    confusion = confusion_matrix(logits, labels, C)
    np.testing.assert_array_equal(confusion, confusion_matrix(predictions, labels, C))
    assert confusion.shape == (C, C)
    assert accuracy(logits, labels) == pytest.approx(np.trace(confusion) / len(labels))
    scores = per_class(confusion)
    for c in range(C):
        right = np.sum((predictions == c) & (labels == c))
        predicted, support = np.sum(predictions == c), np.sum(labels == c)
        assert confusion[c, (c + 1) % C] == np.sum((labels == c) & (predictions == (c + 1) % C))
        assert scores.support[c] == support
        assert scores.precision[c] == pytest.approx(right / predicted if predicted else 0)
        assert scores.recall[c] == pytest.approx(right / support if support else 0)
        harmonic = 2 * scores.precision[c] * scores.recall[c] / (scores.precision[c] + scores.recall[c]) if right else 0
        assert scores.f1[c] == pytest.approx(harmonic)
