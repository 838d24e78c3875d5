"""Losses: what a batch of logits costs, and how the cost changes with each logit.

A loss returns the *sum* over the samples and the gradient of that sum. The mean is a matter of the training loop, which
knows the global batch: a gradient scaled by 1 / batch size is then exact for micro-batches, for uneven shards and for
the last, short batch of an epoch. Softmax and cross-entropy are one operation, because their joint gradient is
``softmax(z) - target`` and needs no division by a probability that may be zero.

Notation: z logits (N, C), q target distribution (N, C), p = softmax(z). Sums over samples are taken in float64;
everything else, and the gradient, has the logits' type.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from convolt.checks import check, check_number
from convolt.errors import DataError, ShapeError

Array = NDArray[Any]


class Loss(Protocol):
    """``loss(logits, targets) -> (sum over the samples, gradient of that sum by the logits)``."""

    def __call__(self, logits: Array, targets: Any) -> tuple[float, Array]: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy with label smoothing.

        loss = -sum_c q_c log softmax(z)_c,    q = (1 - label_smoothing) target + label_smoothing / C
        dz   = (sum_c q_c) softmax(z) - q

    targets: labels (N,) integers, or probabilities (N, C), as mix-up makes them.
    Raises ShapeError, DataError for a label outside [0, C).
    Reference: Szegedy et al., "Rethinking the Inception architecture", 2016, section 7 (label smoothing).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_number(self, "label_smoothing", at_least=0, at_most=1)

    def __call__(self, logits: Array, targets: Array) -> tuple[float, Array]:
        q = as_probabilities(targets, logits)
        if self.label_smoothing:
            q = (1 - self.label_smoothing) * q + self.label_smoothing / logits.shape[1]
        log_p = log_softmax(logits)
        return -_total(q * log_p), q.sum(axis=1, keepdims=True) * np.exp(log_p) - q


@dataclass(frozen=True)
class MSE:
    """Mean squared error: the mean over the outputs, summed over the samples.

        loss = 1/C sum_c (z_c - t_c)^2,    dz = 2/C (z - t)

    targets: numbers (N, C), or (N,) for one output, or labels (N,) integers, which stand for one-hot vectors.
    Raises ShapeError, DataError.
    """

    def __call__(self, logits: Array, targets: Array) -> tuple[float, Array]:
        if targets.ndim == 1 and not _are_labels(targets):
            targets = targets[:, None]
        difference = logits - as_probabilities(targets, logits)
        outputs = logits.shape[1]
        return _total(np.square(difference)) / outputs, (2 / outputs) * difference


@dataclass(frozen=True)
class DistillationTargets:
    """What a student learns from: the labels, and the teacher's logits (N, C) for the same samples.

    A slice of it is the targets of a shard or micro-batch, as for arrays.
    """

    labels: Array
    teacher_logits: Array

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> "DistillationTargets":
        return DistillationTargets(self.labels[part], self.teacher_logits[part])


@dataclass(frozen=True)
class Distillation:
    """Cross-entropy on the labels, blended with the teacher's softened answer.

        loss = (1 - alpha) CE(z, labels) + alpha T^2 KL(softmax(teacher / T) || softmax(z / T))
        dz   = (1 - alpha) (softmax(z) - labels) + alpha T (softmax(z / T) - softmax(teacher / T))

    T is the temperature; its square keeps the two gradients of one size whatever T is. ``teacher`` names the run that
    gives the teacher's logits. Raises ShapeError, DataError.
    Reference: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015, section 2.
    """

    temperature: float = 4.0
    alpha: float = 0.9
    teacher: str = ""

    def __post_init__(self) -> None:
        check_number(self, "temperature", above=0)
        check_number(self, "alpha", at_least=0, at_most=1)
        check(self, "teacher", isinstance(self.teacher, str), "be the folder of a run")

    def __call__(self, logits: Array, targets: DistillationTargets) -> tuple[float, Array]:
        if targets.teacher_logits.shape != logits.shape:
            raise ShapeError(
                f"Distillation: the teacher must give logits {logits.shape}; got {targets.teacher_logits.shape}; "
                "teacher and student need the same classes"
            )
        hard_loss, hard_gradient = CrossEntropy()(logits, targets.labels)
        log_p = log_softmax(logits / self.temperature)
        log_q = log_softmax(targets.teacher_logits.astype(logits.dtype, copy=False) / self.temperature)
        p, q = np.exp(log_p), np.exp(log_q)
        divergence = self.temperature**2 * _total(q * (log_q - log_p))
        loss = (1 - self.alpha) * hard_loss + self.alpha * divergence
        return loss, (1 - self.alpha) * hard_gradient + self.alpha * self.temperature * (p - q)


LOSSES: tuple[Callable[..., Loss], ...] = (CrossEntropy, MSE, Distillation)


def log_softmax(logits: Array) -> Array:
    """Logarithm of softmax(z): z - max z - log sum exp(z - max z) along the last axis; no exponential overflows."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_p


def as_probabilities(targets: Array, logits: Array) -> Array:
    """Targets as an array like the logits: labels (N,) become one-hot rows, (N, C) is kept.

    Raises ShapeError, DataError for a label outside [0, C).
    """
    if not _are_labels(targets):
        if targets.shape != logits.shape:
            raise ShapeError(f"targets must be labels (N,) or like the logits {logits.shape}; got {targets.shape}")
        return targets.astype(logits.dtype, copy=False)
    samples, classes = logits.shape
    if len(targets) != samples:
        raise ShapeError(f"targets must hold one label for each of {samples} samples; got {len(targets)}")
    return one_hot(targets, classes, logits.dtype)


def one_hot(labels: Array, classes: int, dtype: Any = np.float32) -> Array:
    """Rows of zeros with a one at the label: (N, classes). Raises DataError for a label outside [0, classes)."""
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(
            f"labels must be >= 0 and < {classes}; got {labels.min()} to {labels.max()}; "
            "the model's last layer needs one output for each class"
        )
    rows = np.zeros((len(labels), classes), dtype)
    rows[np.arange(len(labels)), labels] = 1
    return rows


def _are_labels(targets: Array) -> bool:
    return targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer)


def _total(terms: Array) -> float:
    return float(terms.sum(dtype=np.float64))
