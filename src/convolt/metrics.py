"""Metrics: how good predictions are, from logits (N, C) and labels (N,).

A class is predicted by its rank among the logits. Of equal logits the first class ranks first, as in argmax, and a
logit that is not a number ranks last and spoils nothing but its own row: a network that has diverged scores 0, not 1.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convolt.errors import ConfigError, ShapeError

Array = NDArray[Any]

# What early stopping, the best checkpoint and Plateau may watch. Validation decides; the test set never does.
MONITORS = ("valid_loss", "valid_accuracy")
HIGHER_IS_BETTER = frozenset({"valid_accuracy"})


def accuracy(logits: Array, labels: Array) -> float:
    """The part of the samples whose label has the largest logit."""
    return top_k(logits, labels, 1)


def top_k(logits: Array, labels: Array, k: int = 5) -> float:
    """The part of the samples whose label is among the k largest logits; 0 for no samples."""
    if k < 1:
        raise ConfigError(f"top_k: k must be >= 1; got {k}")
    return float(correct(logits, labels, k).mean()) if len(labels) else 0.0


def correct(logits: Array, labels: Array, k: int = 1) -> NDArray[np.bool_]:
    """Whether each sample's label is among its k largest logits: (N,). Raises ShapeError."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ShapeError(f"metrics need logits (N, C) and labels (N,); got {logits.shape} and {labels.shape}")
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    # "Not less or equal" instead of "greater", so that a comparison with NaN counts against the sample.
    ahead = ~(logits <= own)
    ahead |= (logits == own) & (np.arange(logits.shape[1]) < labels[:, None])
    right: NDArray[np.bool_] = ahead.sum(axis=1) < k
    return right


def confusion_matrix(predictions: Array, labels: Array, num_classes: int) -> NDArray[np.int64]:
    """How often label i was predicted as class j: (num_classes, num_classes), row i, column j.

    predictions: classes (N,), or logits (N, num_classes).
    """
    if predictions.ndim == 2:
        predictions = predictions.argmax(axis=1)
    if predictions.shape != labels.shape:
        raise ShapeError(
            f"confusion_matrix needs one prediction for each label; got {predictions.shape} and {labels.shape}"
        )
    counts = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


class PerClass(NamedTuple):
    """One number for each class: (num_classes,) arrays."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    support: NDArray[np.int64]


def per_class(confusion: NDArray[np.int64]) -> PerClass:
    """Precision, recall, F1 and support of each class from a confusion matrix.

        precision = hits / times predicted,   recall = hits / support,   F1 = 2 hits / (times predicted + support)

    A ratio of nothing to nothing is 0.
    """
    hits, predicted, support = confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)
    return PerClass(
        precision=_ratio(hits, predicted),
        recall=_ratio(hits, support),
        f1=_ratio(2 * hits, predicted + support),
        support=support,
    )


def _ratio(part: Array, whole: Array) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)
