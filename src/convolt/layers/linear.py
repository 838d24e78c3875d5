"""The layers with weight matrices: convolution and dense."""

import math
from dataclasses import dataclass
from typing import Literal

from convolt.errors import ConfigError, ShapeError
from convolt.layers.base import Layer, Pair, ParamSpec, Shape, image, pair, positive
from convolt.layers.window import Window


@dataclass(frozen=True)
class Conv2d(Layer):
    """Cross-correlation of C x H x W images with K filters of C/groups x R x S.

    ``y[k, p, q] = b[k] + sum_{c, r, s} w[k, c, r, s] x[c, i, j]`` at ``i = p stride + r dilation - padding`` and
    ``j = q stride + s dilation - padding``.

    ``padding`` is one integer, a pair, ``"valid"`` (none) or ``"same"`` (stride 1 only; an even kernel gets the odd
    row and column at the end, as PyTorch does). ``groups`` = ``in_channels`` is a depthwise convolution.
    """

    in_channels: int
    out_channels: int
    kernel_size: int | Pair
    stride: int | Pair = 1
    padding: int | Pair | Literal["same", "valid"] = 0
    dilation: int | Pair = 1
    groups: int = 1
    bias: bool = True

    def __post_init__(self) -> None:
        positive("Conv2d", in_channels=self.in_channels, out_channels=self.out_channels, groups=self.groups)
        for name, least in (("kernel_size", 1), ("stride", 1), ("dilation", 1)):
            object.__setattr__(self, name, pair("Conv2d", name, getattr(self, name), least))
        if self.padding not in ("same", "valid"):
            if isinstance(self.padding, str):
                raise ConfigError(
                    f"Conv2d: padding must be an integer, a pair, 'same' or 'valid'; got {self.padding!r}"
                )
            object.__setattr__(self, "padding", pair("Conv2d", "padding", self.padding, 0))
        if self.padding == "same" and self.stride != (1, 1):
            raise ConfigError(
                f"Conv2d: padding='same' needs stride 1; got stride={self.stride}; give padding as numbers"
            )
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise ConfigError(f"Conv2d: {name}={getattr(self, name)} must be divisible by groups={self.groups}")

    @property
    def geometry(self) -> Window:
        """Kernel, stride, padding and dilation as an engine needs them."""
        return Window(self.kernel_size, self.stride, self.padding, self.dilation)  # type: ignore[arg-type]  # pairs since __post_init__

    def output_shape(self, shape: Shape) -> Shape:
        """``(out_channels, P, Q)``."""
        channels, height, width = image(self, shape)
        if channels != self.in_channels:
            raise ShapeError(
                f"Conv2d(in_channels={self.in_channels}) got {channels} channels; set in_channels={channels}"
            )
        return (self.out_channels, *self.geometry.output_size("Conv2d", height, width))

    def parameters(self) -> dict[str, ParamSpec]:
        """``weight`` (K, C/groups, R, S) and ``bias`` (K), uniform in +-1/sqrt(fan_in) as PyTorch has it."""
        kernel = self.geometry.kernel
        shape = (self.out_channels, self.in_channels // self.groups, *kernel)
        return _affine(shape, self.out_channels, self.bias)

    def flops(self, shape: Shape) -> int:
        """``2 C/groups R S K P Q``, and K P Q for the bias."""
        outputs = math.prod(self.output_shape(shape))
        return outputs * (2 * math.prod(self.parameters()["weight"].shape[1:]) + self.bias)


@dataclass(frozen=True)
class Dense(Layer):
    """``y = W x + b`` for features; W is (out_features, in_features). PyTorch calls it Linear."""

    in_features: int
    out_features: int
    bias: bool = True

    def __post_init__(self) -> None:
        positive("Dense", in_features=self.in_features, out_features=self.out_features)

    def output_shape(self, shape: Shape) -> Shape:
        """``(out_features,)``."""
        if len(shape) != 1:
            raise ShapeError(f"Dense takes features (F,); got {shape}; put Flatten() or GlobalAvgPool2d() before it")
        if shape[0] != self.in_features:
            raise ShapeError(
                f"Dense(in_features={self.in_features}) got {shape[0]} features; set in_features={shape[0]}"
            )
        return (self.out_features,)

    def parameters(self) -> dict[str, ParamSpec]:
        """``weight`` (out, in) and ``bias`` (out), uniform in +-1/sqrt(in_features) as PyTorch has it."""
        return _affine((self.out_features, self.in_features), self.out_features, self.bias)

    def flops(self, shape: Shape) -> int:
        """``2 in out``, and ``out`` for the bias."""
        return self.out_features * (2 * self.in_features + self.bias)


def _affine(weight_shape: Shape, outputs: int, bias: bool) -> dict[str, ParamSpec]:
    bound = 1.0 / math.sqrt(math.prod(weight_shape[1:]))
    specs = {"weight": ParamSpec(weight_shape, bound)}
    return specs | {"bias": ParamSpec((outputs,), bound, is_weight=False)} if bias else specs
