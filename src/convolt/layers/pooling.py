"""Pooling and flattening: from images to smaller images and to features."""

import math
from dataclasses import dataclass

from convolt.errors import ConfigError
from convolt.layers.base import Layer, Pair, Shape, image, pair
from convolt.layers.window import Window


@dataclass(frozen=True)
class _Pool(Layer):
    """What max- and average-pooling share: the window and the shapes."""

    kernel_size: int | Pair
    stride: int | Pair | None = None
    padding: int | Pair = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "kernel_size", pair(name, "kernel_size", self.kernel_size, 1))
        stride = self.kernel_size if self.stride is None else self.stride
        object.__setattr__(self, "stride", pair(name, "stride", stride, 1))
        object.__setattr__(self, "padding", pair(name, "padding", self.padding, 0))
        pads, kernel = self.geometry.pads, self.geometry.kernel
        if any(2 * max(sides) > extent for sides, extent in zip(pads, kernel, strict=True)):
            raise ConfigError(
                f"{name}: padding must be at most half of kernel_size; got {self.padding}, {self.kernel_size}"
            )

    @property
    def geometry(self) -> Window:
        """Kernel, stride and padding as an engine needs them."""
        return Window(self.kernel_size, self.stride, self.padding)  # type: ignore[arg-type]  # pairs since __post_init__

    def output_shape(self, shape: Shape) -> Shape:
        """``(C, P, Q)``."""
        channels, height, width = image(self, shape)
        return (channels, *self.geometry.output_size(type(self).__name__, height, width))

    def flops(self, shape: Shape) -> int:
        """One for each element of each window."""
        return math.prod(self.output_shape(shape)) * math.prod(self.geometry.kernel)


@dataclass(frozen=True)
class MaxPool2d(_Pool):
    """The largest value of each window; the gradient goes to the first of equal values, as in PyTorch."""


@dataclass(frozen=True)
class AvgPool2d(_Pool):
    """The mean of each window; padding zeros count unless ``count_include_pad`` is false."""

    count_include_pad: bool = True


@dataclass(frozen=True)
class GlobalAvgPool2d(Layer):
    """``y[c] = mean over H x W``: (C, H, W) becomes (C,)."""

    def output_shape(self, shape: Shape) -> Shape:
        """``(C,)``."""
        return (image(self, shape)[0],)

    def flops(self, shape: Shape) -> int:
        """One for each element."""
        return math.prod(shape)


@dataclass(frozen=True)
class Flatten(Layer):
    """(C, H, W) becomes (C H W,), channels slowest, as in PyTorch."""

    def output_shape(self, shape: Shape) -> Shape:
        """``(C H W,)``."""
        return (math.prod(shape),)

    def flops(self, shape: Shape) -> int:
        """Nothing is computed."""
        return 0
