"""What every layer is made of: shapes, specifications of its arrays, the base class and the checks of its arguments."""

import math
from dataclasses import dataclass
from typing import ClassVar

from convolt.errors import ConfigError, ShapeError

Shape = tuple[int, ...]
Pair = tuple[int, int]


@dataclass(frozen=True)
class ParamSpec:
    """A trainable array: its shape, its first values ``value + U(-bound, bound)``, and whether it is a weight.

    Weight decay may skip everything that is not a weight, that is biases and the scales of norms.
    """

    shape: Shape
    bound: float = 0.0
    value: float = 0.0
    is_weight: bool = True

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class BufferSpec:
    """An array that is part of the model's state but not trained, such as a running mean."""

    shape: Shape
    value: float = 0.0
    integer: bool = False


class Layer:
    """What every layer can say about itself; the defaults are those of an elementwise layer without parameters.

    ``COST`` is the FLOPs for each element of such a layer.
    """

    COST: ClassVar[int] = 1

    def output_shape(self, shape: Shape) -> Shape:
        """The shape this layer makes of ``shape``. Raises ShapeError."""
        return shape

    def parameters(self) -> dict[str, ParamSpec]:
        """The trainable arrays, by PyTorch's names."""
        return {}

    def buffers(self) -> dict[str, BufferSpec]:
        """The arrays that are kept but not trained."""
        return {}

    def flops(self, shape: Shape) -> int:
        """FLOPs of one sample's forward pass; a multiply and an add count as two."""
        return self.COST * math.prod(shape)


def pair(layer: str, name: str, value: object, least: int) -> Pair:
    """An integer or a pair as a pair of integers >= ``least``. Raises ConfigError."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in pair):
        raise ConfigError(f"{layer}: {name} must be an integer >= {least} or a pair of them; got {value!r}")
    return pair


def positive(layer: str, **numbers: int) -> None:
    """Check that the named arguments are integers >= 1. Raises ConfigError."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{layer}: {name} must be an integer >= 1; got {value!r}")


def image(layer: object, shape: Shape) -> tuple[int, int, int]:
    """The (C, H, W) of a layer's input. Raises ShapeError when it is no image."""
    if len(shape) != 3:
        name = type(layer).__name__
        raise ShapeError(f"{name} takes an image (C, H, W); got {shape}; put it before Flatten and Dense")
    return shape[0], shape[1], shape[2]
