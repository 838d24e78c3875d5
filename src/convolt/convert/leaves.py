"""PyTorch's modules and functions that are one layer each.

A function such as ``F.max_pool2d`` is read as the module it is the function of, so there is one conversion, and one set
of checks, for both.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from convolt import layers
from convolt.convert.modules import GlobalAvgPool2d, Normalize
from convolt.errors import ConfigError
from convolt.layers import Layer


def layer_of(module: nn.Module, path: str) -> Layer:
    """The layer of one module. Raises ConfigError when there is none, or not for these arguments."""
    kind, where = type(module).__name__, path or "the net"
    convert = _LAYERS.get(type(module))
    if convert is None:
        raise unsupported(f"{where} is {kind}")
    for name, allowed in _FIXED.get(type(module), {}).items():
        given = getattr(module, name)
        if given not in allowed:
            raise ConfigError(f"from_torch: {where}: {kind} must have {name}={allowed[0]!r}; got {given!r}")
    if isinstance(module, nn.BatchNorm2d) and module.momentum is None:
        raise ConfigError(f"from_torch: {where}: {kind} must have a number as momentum; got None, a cumulative average")
    return convert(module)


def module_of_function(function: Any) -> Callable[..., nn.Module] | None:
    """What makes the module of ``function(x, ...)`` or ``x.function(...)`` from its other arguments, if we know it."""
    return _MODULES.get(function)


def unsupported(what: str) -> ConfigError:
    """The error for a part that has no layer."""
    known = ", ".join(sorted({kind.__name__ for kind in _LAYERS}))
    return ConfigError(
        f"from_torch: {what}, which has no layer; supported: {known}, Identity, Sequential, and additions of branches"
    )


# --- modules to layers ---


def _conv2d(module: nn.Conv2d) -> Layer:
    return layers.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.bias is not None,
    )


def _normalize(module: Normalize) -> Layer:
    return layers.Normalize(tuple(module.mean.flatten().tolist()), tuple(module.std.flatten().tolist()))


def _avg_pool2d(module: nn.AvgPool2d) -> Layer:
    return layers.AvgPool2d(module.kernel_size, module.stride, module.padding, module.count_include_pad)


_LAYERS: dict[type, Callable[[Any], Layer]] = {
    nn.Conv2d: _conv2d,
    nn.Linear: lambda module: layers.Dense(module.in_features, module.out_features, module.bias is not None),
    nn.BatchNorm2d: lambda module: layers.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine),
    nn.ReLU: lambda module: layers.ReLU(),
    nn.LeakyReLU: lambda module: layers.LeakyReLU(module.negative_slope),
    nn.GELU: lambda module: layers.GELU(module.approximate),
    nn.SiLU: lambda module: layers.SiLU(),
    nn.MaxPool2d: lambda module: layers.MaxPool2d(module.kernel_size, module.stride, module.padding),
    nn.AvgPool2d: _avg_pool2d,
    nn.AdaptiveAvgPool2d: lambda module: layers.GlobalAvgPool2d(),
    nn.Dropout: lambda module: layers.Dropout(module.p),
    nn.Flatten: lambda module: layers.Flatten(),
    GlobalAvgPool2d: lambda module: layers.GlobalAvgPool2d(),
    Normalize: _normalize,
}

# Arguments that a layer does not have, with the values that stand for their absence; the first is named in the error.
_FIXED: dict[type, dict[str, Sequence[Any]]] = {
    nn.Conv2d: {"padding_mode": ("zeros",)},
    nn.MaxPool2d: {"dilation": (1, (1, 1)), "ceil_mode": (False,), "return_indices": (False,)},
    nn.AvgPool2d: {"ceil_mode": (False,), "divisor_override": (None,)},
    nn.AdaptiveAvgPool2d: {"output_size": (1, (1, 1), [1, 1])},
    nn.Flatten: {"start_dim": (1,), "end_dim": (-1, 3)},
    nn.BatchNorm2d: {"track_running_stats": (True,)},
}


# --- functions to modules ---


def _max_pool2d(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> nn.Module:
    return nn.MaxPool2d(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


def _flatten(start_dim: int = 0, end_dim: int = -1) -> nn.Module:
    return nn.Flatten(start_dim, end_dim)


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
    """Whether it trains is not the layer's to say."""
    return nn.Dropout(p, inplace)


def _mean(dim: Any = None, keepdim: bool = False) -> nn.Module:
    if not isinstance(dim, list | tuple) or {axis % 4 for axis in dim} != {2, 3}:
        raise unsupported(f"a mean over {dim}")
    return nn.AdaptiveAvgPool2d(1) if keepdim else GlobalAvgPool2d()


_MODULES: dict[Any, Callable[..., nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    F.leaky_relu: nn.LeakyReLU,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.dropout: _dropout,
    torch.flatten: _flatten,
    "flatten": _flatten,
    torch.mean: _mean,
    "mean": _mean,
}
