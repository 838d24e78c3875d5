"""The oracle of the engine suites: layers written once more, with ``torch.nn.functional`` and autograd, in float64.

It shares nothing with the engines but the layers' descriptions: padding is taken from PyTorch's documentation, not
from ``Window``, and gradients from autograd.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from convolt import layers
from convolt.layers import Layer
from convolt.model import Model
from convolt.params import Params
from convolt.rng import SampleRng

Array = NDArray[Any]


@dataclass
class Oracle:
    """A model's values in PyTorch; one training step, or one prediction, on copies of ``params``."""

    model: Model
    params: Params
    rng: SampleRng | None = None
    training: bool = True

    def __post_init__(self) -> None:
        self.state = {name: torch.from_numpy(array) for name, array in self.params.state_dict().items()}
        for name in self.params:
            self.state[name].requires_grad_(True)

    def __call__(self, x: Array) -> Tensor:
        """Outputs (N, ...) of images in float64."""
        return self._sequence(self.model.layers, torch.from_numpy(x), "")

    def gradient(self) -> Array:
        """The gradient of every parameter after ``backward``, flat."""
        parts = [self.state[name].grad for name in self.params]
        return np.concatenate([np.zeros(0), *(part.numpy().reshape(-1) for part in parts)])

    def _sequence(self, members: tuple[Layer, ...], x: Tensor, prefix: str) -> Tensor:
        for index, layer in enumerate(members):
            x = _FUNCTIONS[type(layer)](self, layer, x, f"{prefix}{index}")
        return x

    def _local(self, name: str) -> Mapping[str, Tensor]:
        return {key.rpartition(".")[2]: value for key, value in self.state.items() if key.rpartition(".")[0] == name}

    def conv2d(self, layer: layers.Conv2d, x: Tensor, name: str) -> Tensor:
        """``padding="same"`` pads by dilation (kernel - 1) in all, the smaller half in front."""
        local, padding = self._local(name), layer.padding
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            x = F.pad(x, [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2])
        padding = 0 if isinstance(padding, str) else padding
        weight, bias = local["weight"], local.get("bias")
        return F.conv2d(x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)

    def dense(self, layer: layers.Dense, x: Tensor, name: str) -> Tensor:
        """``x W^T + b``."""
        local = self._local(name)
        return F.linear(x, local["weight"], local.get("bias"))

    def batch_norm(self, layer: layers.BatchNorm2d, x: Tensor, name: str) -> Tensor:
        """Statistics are moved in place, as the module does."""
        local = self._local(name)
        if self.training:
            local["num_batches_tracked"] += 1
        mean, var = local["running_mean"], local["running_var"]
        weight, bias = local.get("weight"), local.get("bias")
        return F.batch_norm(x, mean, var, weight, bias, self.training, layer.momentum, layer.eps)

    def normalize(self, layer: layers.Normalize, x: Tensor, name: str) -> Tensor:
        """By constants."""
        mean, std = (torch.tensor(values, dtype=x.dtype)[:, None, None] for values in (layer.mean, layer.std))
        return (x - mean) / std

    def dropout(self, layer: layers.Dropout, x: Tensor, name: str) -> Tensor:
        """The mask is Convolt's own: a function of the samples."""
        if not self.training:
            return x
        assert self.rng is not None
        return x * torch.from_numpy(self.rng.uniform(f"dropout:{name}", x.shape[1:]) >= layer.p) / (1 - layer.p)

    def residual(self, layer: layers.Residual, x: Tensor, name: str) -> Tensor:
        """The sum of both branches."""
        return self._sequence(layer.body, x, f"{name}.body.") + self._sequence(layer.shortcut, x, f"{name}.shortcut.")

    def sequential(self, layer: layers.Sequential, x: Tensor, name: str) -> Tensor:
        """One after another."""
        return self._sequence(layer.layers, x, f"{name}.")


Function = Callable[[Oracle, Any, Tensor, str], Tensor]
_FUNCTIONS: dict[type[Layer], Function] = {
    layers.Conv2d: Oracle.conv2d,
    layers.Dense: Oracle.dense,
    layers.BatchNorm2d: Oracle.batch_norm,
    layers.Normalize: Oracle.normalize,
    layers.Dropout: Oracle.dropout,
    layers.Residual: Oracle.residual,
    layers.Sequential: Oracle.sequential,
    layers.ReLU: lambda oracle, layer, x, name: F.relu(x),
    layers.LeakyReLU: lambda oracle, layer, x, name: F.leaky_relu(x, layer.negative_slope),
    layers.GELU: lambda oracle, layer, x, name: F.gelu(x, approximate=layer.approximate),
    layers.SiLU: lambda oracle, layer, x, name: F.silu(x),
    layers.MaxPool2d: lambda oracle, layer, x, name: F.max_pool2d(x, layer.kernel_size, layer.stride, layer.padding),
    layers.AvgPool2d: lambda oracle, layer, x, name: F.avg_pool2d(
        x, layer.kernel_size, layer.stride, layer.padding, count_include_pad=layer.count_include_pad
    ),
    layers.GlobalAvgPool2d: lambda oracle, layer, x, name: x.mean(dim=(2, 3)),
    layers.Flatten: lambda oracle, layer, x, name: x.flatten(1),
}
