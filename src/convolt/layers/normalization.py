"""Normalization: of the input by constants, of activations by the statistics of the batch."""

import math
from dataclasses import dataclass
from typing import ClassVar

from convolt.errors import ConfigError, ShapeError
from convolt.layers.base import BufferSpec, Layer, ParamSpec, Shape, image, positive


@dataclass(frozen=True)
class BatchNorm2d(Layer):
    """``y = weight (x - mean) / sqrt(var + eps) + bias`` for each channel (Ioffe and Szegedy 2015).

    Training takes mean and biased variance of the batch and moves the running ones by ``momentum`` (the running
    variance is the unbiased one, as in PyTorch); prediction takes the running ones.
    """

    num_features: int
    eps: float = 1e-5
    momentum: float = 0.1
    affine: bool = True

    def __post_init__(self) -> None:
        positive("BatchNorm2d", num_features=self.num_features)
        numbers = all(isinstance(value, int | float) for value in (self.eps, self.momentum))
        if not numbers or not self.eps > 0 or not 0 <= self.momentum <= 1:
            raise ConfigError(f"BatchNorm2d: eps must be > 0 and momentum in [0, 1]; got {self.eps}, {self.momentum}")

    def output_shape(self, shape: Shape) -> Shape:
        """The same shape."""
        channels, _, _ = image(self, shape)
        if channels != self.num_features:
            raise ShapeError(
                f"BatchNorm2d(num_features={self.num_features}) got {channels} channels; set num_features={channels}"
            )
        return shape

    def parameters(self) -> dict[str, ParamSpec]:
        """``weight`` (ones) and ``bias`` (zeros), both (C,)."""
        shape = (self.num_features,)
        if not self.affine:
            return {}
        return {"weight": ParamSpec(shape, value=1.0, is_weight=False), "bias": ParamSpec(shape, is_weight=False)}

    def buffers(self) -> dict[str, BufferSpec]:
        """``running_mean``, ``running_var`` and ``num_batches_tracked``."""
        shape = (self.num_features,)
        return {
            "running_mean": BufferSpec(shape),
            "running_var": BufferSpec(shape, value=1.0),
            "num_batches_tracked": BufferSpec((), integer=True),
        }

    def flops(self, shape: Shape) -> int:
        """Two for each element: one multiply, one add, with folded constants."""
        return 2 * math.prod(shape)


@dataclass(frozen=True)
class Normalize(Layer):
    """The input's ``(x - mean) / std`` for each channel, with constants of the data set; images are in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    COST: ClassVar[int] = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(m) for m in self.mean))
        object.__setattr__(self, "std", tuple(float(s) for s in self.std))
        if len(self.mean) != len(self.std) or not self.mean or not all(s > 0 for s in self.std):
            raise ConfigError(f"Normalize: mean and std need one value a channel, std > 0; got {self.mean}, {self.std}")

    def output_shape(self, shape: Shape) -> Shape:
        """The same shape."""
        channels, _, _ = image(self, shape)
        if channels != len(self.mean):
            raise ShapeError(
                f"Normalize has constants for {len(self.mean)} channels and got {channels}; give {channels}"
            )
        return shape
