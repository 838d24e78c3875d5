"""A model is an input shape and a tuple of layers: it knows shapes, names and FLOPs, and holds no arrays.

Shapes are checked when it is built, so whatever holds a Model can trust it. Parameters are named as
``torch.nn.Sequential`` names them, which lets state dicts pass in both directions without a map.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from convolt.errors import ConfigError, ShapeError
from convolt.layers import BufferSpec, Layer, Normalize, ParamSpec, Residual, Sequential, Shape, members, walk

FLOAT_BYTES = 4
MOST_PARAMETERS = 2**46  # of 4 bytes: what 48 bits address


@dataclass(frozen=True)
class Model:
    """A checked chain of layers. Raises ConfigError, and ShapeError that names the layer by index.

    >>> from convolt.layers import Conv2d, Dense, Flatten, ReLU
    >>> Model((1, 4, 4), (Conv2d(1, 2, 3), ReLU(), Flatten(), Dense(8, 10))).output_shape
    (10,)
    """

    input_shape: Shape
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_shape", tuple(self.input_shape))
        object.__setattr__(self, "layers", members("Model: layer ", self.layers))
        if not all(isinstance(size, int) and size > 0 for size in self.input_shape) or len(self.input_shape) not in (
            1,
            3,
        ):
            raise ConfigError(f"Model: input_shape must be (C, H, W) or (F,), all positive; got {self.input_shape}")
        _ = self.output_shape
        if self.parameter_count > MOST_PARAMETERS:
            raise ShapeError(
                f"Model: {self.parameter_count:.3g} parameters are more than a machine can address "
                f"({MOST_PARAMETERS:.3g}); check the sizes of its layers"
            )

    @cached_property
    def output_shape(self) -> Shape:
        """Shape of one sample's output, ``(classes,)`` for a classifier."""
        return self._whole.output_shape(self.input_shape)

    @cached_property
    def flops(self) -> int:
        """FLOPs of one sample's forward pass; a multiply and an add count as two."""
        return self._whole.flops(self.input_shape)

    @property
    def _whole(self) -> Sequential:
        return Sequential(self.layers)

    def parameters(self) -> dict[str, ParamSpec]:
        """Every trainable array by its PyTorch name, in order."""
        return self._whole.parameters()

    def buffers(self) -> dict[str, BufferSpec]:
        """Every buffer by its PyTorch name, in order."""
        return self._whole.buffers()

    def state_names(self) -> tuple[str, ...]:
        """Names of a state dict in PyTorch's order: layer by layer, a layer's parameters before its buffers."""
        return tuple(_state_names(self.layers, ""))

    @property
    def parameter_count(self) -> int:
        """Number of trainable values."""
        return sum(spec.size for spec in self.parameters().values())

    def with_input(self, normalize: Normalize) -> "Model":
        """The same model behind an input normalization."""
        return replace(self, layers=(normalize, *self.layers))

    def summary(self) -> str:
        """A table: layer, output shape, parameters, MFLOP and activation bytes (float32), each for one sample."""
        rows = list(_rows(self.layers, self.input_shape, ""))
        activations = sum(size for *_, size in rows)
        total = ("total", "", "", self.parameter_count, self.flops, activations)
        header = ("layer", "type", "output", "parameters", "MFLOP", "activation bytes")
        text = [header, *(_text(row) for row in rows), _text(total)]
        widths = [max(len(row[column]) for row in text) for column in range(len(header))]
        lines = [
            "  ".join(_align(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in text
        ]
        rule = "-" * max(len(line) for line in lines)
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _state_names(layers: tuple[Layer, ...], prefix: str) -> Iterator[str]:
    for index, layer in enumerate(layers):
        name = f"{prefix}{index}."
        if isinstance(layer, Sequential):
            yield from _state_names(layer.layers, name)
        elif isinstance(layer, Residual):
            yield from _state_names(layer.body, f"{name}body.")
            yield from _state_names(layer.shortcut, f"{name}shortcut.")
        else:
            yield from (name + local for local in (*layer.parameters(), *layer.buffers()))


Row = tuple[str, str, str, int, int, int]


def _rows(layers: tuple[Layer, ...], shape: Shape, prefix: str) -> Iterable[Row]:
    for name, layer, before, after in walk(layers, shape, prefix):
        if isinstance(layer, Residual):
            yield from _rows(layer.body, before, f"{name}.body.")
            yield from _rows(layer.shortcut, before, f"{name}.shortcut.")
            count, flops, kind = 0, math.prod(after), "Residual (+)"
        else:
            count = sum(spec.size for spec in layer.parameters().values())
            flops, kind = layer.flops(before), type(layer).__name__
        yield name, kind, "x".join(map(str, after)), count, flops, FLOAT_BYTES * math.prod(after)


def _text(row: Row) -> tuple[str, ...]:
    name, kind, shape, count, flops, activation = row
    return name, kind, shape, f"{count:,}", f"{flops / 1e6:.3f}", f"{activation:,}"


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)
