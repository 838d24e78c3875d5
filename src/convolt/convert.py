"""Conversion from and to PyTorch modules, with weights both ways.

``to_torch`` makes an ``nn.Sequential`` whose state dict has the names and values of ``Params``. ``from_torch`` goes the
other way. An ``nn.Sequential``, nested or not, is read as it stands, so names are kept. Any other module is traced with
``torch.fx`` into a graph, and the graph must be a chain of layers with residual additions: two branches that are added
share a history, and what follows their last common step is the body and the shortcut of a ``Residual``. Weights then
move whatever the modules were called.

A converted part is a ``_Step``: the layer, and its arrays under the layer's local names. Steps nest as layers do, so
names need no map: a chain puts its index before each name, a Residual its branch.
"""

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np

from convolt import layers
from convolt.errors import ConfigError, MissingDependency, ShapeError
from convolt.layers import Layer, Shape
from convolt.model import Model
from convolt.params import Array, Params

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, fx, nn
except ImportError:
    raise MissingDependency("torch", "conversion from and to PyTorch", "torch") from None

# --- to PyTorch ------------------------------------------------------------------------------------------------------


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

# --- from PyTorch ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """A converted part: its layer, its arrays by the layer's local names, and the shape of its output."""

    layer: Layer
    arrays: dict[str, Array]
    output_shape: Shape


def from_torch(net: nn.Module, input_shape: Shape) -> tuple[Model, Params]:
    """``net`` for images of ``input_shape`` (C, H, W), without batch, as a model and a copy of its weights.

    A net in float64 gives float64 parameters, any other float32. AdaptiveAvgPool2d(1) becomes GlobalAvgPool2d, whose
    output is (C,).
    Raises ConfigError that names the module by its path when there is no layer for it, ShapeError.
    """
    input_shape = tuple(input_shape)
    names = {id(module): name for name, module in net.named_modules()}
    twice = [name for name, module in net.named_modules(remove_duplicate=False) if names[id(module)] != name]
    for name in twice:
        if any(True for _ in net.get_submodule(name).parameters()):
            raise ConfigError(f"from_torch: {name} shares its weights with another module, which a Model cannot express")
    steps = _of_sequential(net, "", input_shape) if isinstance(net, nn.Sequential) else _of_graph(net, "", input_shape)
    members, arrays = _chain(steps)
    model = Model(input_shape, members)
    is_double = any(parameter.dtype == torch.float64 for parameter in net.parameters())
    params = Params(model, np.float64 if is_double else np.float32)
    params.load_state_dict(arrays)
    return model, params


def _chain(steps: Sequence[_Step]) -> tuple[tuple[Layer, ...], dict[str, Array]]:
    """Layers in a row, with their index before each name."""
    arrays = {f"{index}.{name}": array for index, step in enumerate(steps) for name, array in step.arrays.items()}
    return tuple(step.layer for step in steps), arrays


def _in_one(steps: Sequence[_Step], shape: Shape) -> _Step:
    """Several steps as one, where a module must keep its index."""
    members, arrays = _chain(steps)
    return _Step(layers.Sequential(members), arrays, steps[-1].output_shape if steps else shape)


def _added(path: str, body: Sequence[_Step], shortcut: Sequence[_Step], shape: Shape) -> _Step:
    """``body(x) + shortcut(x)``; addition commutes, so the longer branch is the body."""
    if len(body) < len(shortcut):
        body, shortcut = shortcut, body
    (inner, body_arrays), (outer, shortcut_arrays) = _chain(body), _chain(shortcut)
    arrays = {f"body.{name}": array for name, array in body_arrays.items()}
    arrays |= {f"shortcut.{name}": array for name, array in shortcut_arrays.items()}
    return _step(path, layers.Residual(inner, outer), arrays, shape)


def _step(path: str, layer: Layer, arrays: dict[str, Array], shape: Shape) -> _Step:
    try:
        return _Step(layer, arrays, layer.output_shape(shape))
    except ShapeError as error:
        raise ShapeError(f"from_torch: {path}: {error}") from None


# --- from modules ---


def _of_sequential(module: nn.Sequential, path: str, shape: Shape) -> list[_Step]:
    """One step for each child, so that indices and names stay."""
    steps: list[_Step] = []
    for name, child in module.named_children():
        steps.append(_of_module(child, f"{path}.{name}".removeprefix("."), shape))
        shape = steps[-1].output_shape
    return steps


def _of_module(module: nn.Module, path: str, shape: Shape) -> _Step:
    if isinstance(module, nn.Sequential):
        return _in_one(_of_sequential(module, path, shape), shape)
    if isinstance(module, nn.Identity):
        return _in_one([], shape)
    if isinstance(module, Residual):
        branches = (_of_sequential(module[name], f"{path}.{name}", shape) for name in ("body", "shortcut"))
        return _added(path, *branches, shape)
    if _is_leaf(module):
        return _step(path, _leaf(module, path), _arrays(module), shape)
    steps = _of_graph(module, path, shape)
    return steps[0] if len(steps) == 1 else _in_one(steps, shape)
