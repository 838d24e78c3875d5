"""Layers made of layers: nesting and residual sums, and the walk over them that names, checks and shapes."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from convolt.errors import ConfigError, ShapeError
from convolt.layers.base import BufferSpec, Layer, ParamSpec, Shape


def walk(layers: tuple[Layer, ...], shape: Shape, prefix: str = "") -> Iterator[tuple[str, Layer, Shape, Shape]]:
    """Each layer with its name and its input and output shapes; Sequential is opened, Residual is one item.

    Raises ShapeError that names the layer by index.
    """
    for index, layer in enumerate(layers):
        name = f"{prefix}{index}"
        if isinstance(layer, Sequential):
            yield from walk(layer.layers, shape, f"{name}.")
            shape = layer.output_shape(shape)
            continue
        try:
            output = layer.output_shape(shape)
        except ShapeError as error:
            inner = str(error)
            where = f"{name}.{inner[6:]}" if inner.startswith("layer ") else f"{name}: {inner}"
            raise ShapeError(f"layer {where}") from None
        yield name, layer, shape, output
        shape = output


def members(where: str, layers: object) -> tuple[Layer, ...]:
    """Layers as a tuple; ``where`` stands before the index of one that is none. Raises ConfigError."""
    if not isinstance(layers, Iterable):
        raise ConfigError(f"{where}0 must be in a tuple of layers, such as (ReLU(),); got {layers!r}")
    found = tuple(layers)
    for index, layer in enumerate(found):
        if not isinstance(layer, Layer):
            raise ConfigError(f"{where}{index} must be a convolt layer such as ReLU(); got {layer!r}")
    return found


def _output_shape(layers: tuple[Layer, ...], shape: Shape, prefix: str = "") -> Shape:
    for _, _, _, output in walk(layers, shape, prefix):
        shape = output
    return shape


def _merged(specs: dict[str, tuple[Layer, ...]], kind: Literal["parameters", "buffers"]) -> dict[str, Any]:
    return {
        f"{prefix}{index}.{name}": spec
        for prefix, layers in specs.items()
        for index, layer in enumerate(layers)
        for name, spec in getattr(layer, kind)().items()
    }


def _total_flops(layers: tuple[Layer, ...], shape: Shape) -> int:
    return sum(layer.flops(before) for _, layer, before, _ in walk(layers, shape))


@dataclass(frozen=True)
class Sequential(Layer):
    """Layers one after another, nested: it exists so that names agree with nested ``torch.nn.Sequential``."""

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", members("Sequential: layer ", self.layers))

    def output_shape(self, shape: Shape) -> Shape:
        """The last layer's."""
        return _output_shape(self.layers, shape)

    def parameters(self) -> dict[str, ParamSpec]:
        """``"0.weight"`` and so on."""
        return _merged({"": self.layers}, "parameters")

    def buffers(self) -> dict[str, BufferSpec]:
        """``"1.running_mean"`` and so on."""
        return _merged({"": self.layers}, "buffers")

    def flops(self, shape: Shape) -> int:
        """The sum."""
        return _total_flops(self.layers, shape)


@dataclass(frozen=True)
class Residual(Layer):
    """``y = body(x) + shortcut(x)``; an empty shortcut is the identity (He et al. 2016)."""

    body: tuple[Layer, ...]
    shortcut: tuple[Layer, ...] = field(default=())

    def __post_init__(self) -> None:
        for branch in ("body", "shortcut"):
            object.__setattr__(self, branch, members(f"Residual: {branch}.", getattr(self, branch)))

    def output_shape(self, shape: Shape) -> Shape:
        """The body's shape, which must be the shortcut's."""
        body = _output_shape(self.body, shape, "body.")
        shortcut = _output_shape(self.shortcut, shape, "shortcut.")
        if body != shortcut:
            raise ShapeError(
                f"Residual adds body {body} to shortcut {shortcut}; they must be equal:"
                " give a shortcut such as a 1x1 Conv2d with the body's channels and stride"
            )
        return body

    def parameters(self) -> dict[str, ParamSpec]:
        """``"body.0.weight"``, ``"shortcut.0.weight"`` and so on."""
        return _merged({"body.": self.body, "shortcut.": self.shortcut}, "parameters")

    def buffers(self) -> dict[str, BufferSpec]:
        """``"body.1.running_mean"`` and so on."""
        return _merged({"body.": self.body, "shortcut.": self.shortcut}, "buffers")

    def flops(self, shape: Shape) -> int:
        """Both branches and the sum."""
        additions = math.prod(self.output_shape(shape))
        return _total_flops(self.body, shape) + _total_flops(self.shortcut, shape) + additions
