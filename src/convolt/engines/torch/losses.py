"""Losses in PyTorch's own form, with the values of ``convolt.losses``.

Targets are checked on the host, where they come from: on CUDA a label out of range would end the process's context.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convolt.errors import DataError, ShapeError
from convolt.losses import MSE, CrossEntropy, Distillation, DistillationTargets, Loss
from convolt.params import Array


def total_loss(loss: Loss, logits: Tensor, y: Any) -> Tensor:
    """The summed loss of logits (N, C) as a scalar for autograd. Raises ShapeError, DataError."""
    native = _NATIVE.get(type(loss))
    return native(loss, logits, y) if native else _HostLoss.apply(logits, loss, y)


def to_tensor(array: Array, device: torch.device) -> Tensor:
    """A tensor of an array, sharing its memory on the CPU where PyTorch can: not if read-only, reversed or swapped."""
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"])).to(device)


def to_numpy(tensor: Tensor) -> Array:
    """An array of a tensor, sharing its memory on the CPU."""
    array: Array = tensor.detach().cpu().numpy()
    return array


def _cross_entropy(loss: CrossEntropy, logits: Tensor, y: Array) -> Tensor:
    return F.cross_entropy(logits, _targets(y, logits), reduction="sum", label_smoothing=loss.label_smoothing)


def _mse(loss: MSE, logits: Tensor, y: Array) -> Tensor:
    targets = _targets(y[:, None] if y.ndim == 1 and y.dtype.kind == "f" else y, logits)
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1]).to(logits.dtype)
    return F.mse_loss(logits, targets, reduction="sum") / logits.shape[1]


def _distillation(loss: Distillation, logits: Tensor, y: DistillationTargets) -> Tensor:
    T = loss.temperature
    teacher = _targets(y.teacher_logits, logits)
    log_p, log_q = F.log_softmax(logits / T, dim=1), F.log_softmax(teacher / T, dim=1)
    hard = F.cross_entropy(logits, _targets(y.labels, logits), reduction="sum")
    soft = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return (1 - loss.alpha) * hard + loss.alpha * T**2 * soft


_NATIVE: dict[type, Callable[[Any, Tensor, Any], Tensor]] = {
    CrossEntropy: _cross_entropy,
    MSE: _mse,
    Distillation: _distillation,
}


class _HostLoss(torch.autograd.Function):  # type: ignore[misc]  # torch is Any to mypy
    """A loss that PyTorch does not have: its own equations give the value and the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Loss, y: Any) -> Tensor:
        total, dlogits = loss(to_numpy(logits), y)
        ctx.save_for_backward(to_tensor(dlogits, logits.device))
        return logits.new_tensor(total)

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None, None]:
        (dlogits,) = ctx.saved_tensors
        return dtotal * dlogits, None, None


def _targets(y: Array, logits: Tensor) -> Tensor:
    """Labels (N,) as int64, or an array like the logits in their type."""
    samples, classes = logits.shape
    if y.ndim != 1 or y.dtype.kind not in "iu":
        if y.shape != (samples, classes):
            shape = (samples, classes)
            raise ShapeError(f"targets must be labels (N,) or an array {shape} like the logits; got {y.shape}")
        return to_tensor(y, logits.device).to(logits.dtype)
    if len(y) != samples:
        raise ShapeError(f"targets must hold one label for each of {samples} samples; got {len(y)}")
    if samples and not 0 <= y.min() <= y.max() < classes:
        raise DataError(
            f"labels must be >= 0 and < {classes}; got {y.min()} to {y.max()}; "
            "the model's last layer needs one output for each class"
        )
    return to_tensor(y, logits.device).to(torch.int64)
