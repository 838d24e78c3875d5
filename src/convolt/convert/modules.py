"""Models as PyTorch modules: an ``nn.Sequential`` whose state dict has the names of ``Params``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convolt import layers
from convolt.layers import Layer
from convolt.model import Model
from convolt.params import Params


class Residual(nn.ModuleDict):  # type: ignore[misc]  # torch is Any to mypy
    """``body(x) + shortcut(x)``; an empty ``nn.Sequential`` is the identity."""

    def forward(self, x: Tensor) -> Tensor:
        return self["body"](x) + self["shortcut"](x)


class GlobalAvgPool2d(nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    """``mean over H x W``: (N, C, H, W) becomes (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class Normalize(nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    """``(x - mean) / std`` for each channel. The constants are not part of the state dict, as in ``Params``."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            constant = torch.tensor(values, dtype=torch.float64, device="cpu")[:, None, None]
            self.register_buffer(name, constant, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x)) / self.std.to(x)


def to_torch(model: Model, params: Params | None = None) -> nn.Sequential:
    """``model`` as an ``nn.Sequential`` with copies of ``params``; without them the weights are PyTorch's first ones.

    The state dict has the names of ``params``, running statistics included.
    """
    if params is None:
        return _sequential(model.layers)
    return module_of(model, {name: torch.from_numpy(array) for name, array in params.state_dict().items()})


def module_of(model: Model, tensors: dict[str, Tensor]) -> nn.Sequential:
    """``model`` as modules around the very ``tensors`` given, by name; nothing is copied and nothing is drawn."""
    with torch.device("meta"):
        module = _sequential(model.layers)
    module.load_state_dict(tensors, assign=True)
    return module


def _sequential(members: tuple[Layer, ...]) -> nn.Sequential:
    return nn.Sequential(*(_TO_TORCH[type(layer)](layer) for layer in members))


def _conv2d(layer: layers.Conv2d) -> nn.Module:
    window = layer.geometry
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        window.kernel,
        window.stride,
        window.padding,
        window.dilation,
        layer.groups,
        layer.bias,
    )


def _residual(layer: layers.Residual) -> nn.Module:
    return Residual({"body": _sequential(layer.body), "shortcut": _sequential(layer.shortcut)})


_TO_TORCH: dict[type, Callable[[Any], nn.Module]] = {
    layers.Conv2d: _conv2d,
    layers.BatchNorm2d: lambda layer: nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum, layer.affine),
    layers.ReLU: lambda layer: nn.ReLU(),
    layers.LeakyReLU: lambda layer: nn.LeakyReLU(layer.negative_slope),
    layers.GELU: lambda layer: nn.GELU(layer.approximate),
    layers.SiLU: lambda layer: nn.SiLU(),
    layers.MaxPool2d: lambda layer: nn.MaxPool2d(layer.kernel_size, layer.stride, layer.padding),
    layers.AvgPool2d: lambda layer: nn.AvgPool2d(
        layer.kernel_size, layer.stride, layer.padding, count_include_pad=layer.count_include_pad
    ),
    layers.GlobalAvgPool2d: lambda layer: GlobalAvgPool2d(),
    layers.Dropout: lambda layer: nn.Dropout(layer.p),
    layers.Flatten: lambda layer: nn.Flatten(),
    layers.Dense: lambda layer: nn.Linear(layer.in_features, layer.out_features, layer.bias),
    layers.Residual: _residual,
    layers.Sequential: lambda layer: _sequential(layer.layers),
    layers.Normalize: lambda layer: Normalize(layer.mean, layer.std),
}
