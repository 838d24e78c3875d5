"""BatchNorm whose statistics are those of all ranks' samples, in PyTorch on the CPU.

The sum over ranks is an operation of autograd, whose gradient is again a sum over ranks; everything else follows from
the equations. PyTorch's own SyncBatchNorm needs CUDA and a process group.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convolt.errors import ConfigError
from convolt.params import Array

Add = Callable[[Array], None]


class _SumOverRanks(torch.autograd.Function):  # type: ignore[misc]  # torch is Any to mypy
    """``y = sum over ranks of x``, so ``dx = sum over ranks of dy``: every rank's loss depends on every rank's x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, add: Add) -> Tensor:
        ctx.add = add
        return _summed(x, add)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _summed(dy, ctx.add), None


class SynchronizedNorm(nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    """``inner`` with the statistics of all ranks in training; its parameters and buffers are still its own."""

    def __init__(self, inner: nn.BatchNorm2d, name: str, add: Add) -> None:
        super().__init__()
        self.inner, self._name, self._add = inner, name, add

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner
        if not inner.training:
            return inner(x)
        x = x if x.dtype == torch.float64 else x.float()
        C = x.shape[1]
        own = torch.cat([x.sum((0, 2, 3)).double(), torch.tensor([float(x.numel() // C)]).double()])
        total = _SumOverRanks.apply(own, self._add)
        M = float(total[-1])
        if M < 2:
            raise ConfigError(
                f"layer {self._name}: BatchNorm2d needs more than one value a channel to train; use a larger batch"
            )
        mean = (total[:-1] / M).to(x.dtype)
        centered = x - mean[:, None, None]
        var = _SumOverRanks.apply(centered.square().sum((0, 2, 3)).double(), self._add).to(x.dtype) / M
        with torch.no_grad():
            inner.running_mean.lerp_(mean, inner.momentum)
            inner.running_var.lerp_(var * (M / (M - 1)), inner.momentum)
            inner.num_batches_tracked.add_(1)
        y = centered * torch.rsqrt(var + inner.eps)[:, None, None]
        return y * inner.weight[:, None, None] + inner.bias[:, None, None] if inner.affine else y


def _summed(x: Tensor, add: Add) -> Tensor:
    array = x.detach().cpu().numpy().copy()
    add(array)
    return torch.from_numpy(array).to(x.device)
