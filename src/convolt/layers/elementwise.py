"""Activations and dropout: layers that change values and no shapes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from convolt.errors import ConfigError
from convolt.layers.base import Layer


@dataclass(frozen=True)
class ReLU(Layer):
    """``y = max(x, 0)``."""


@dataclass(frozen=True)
class LeakyReLU(Layer):
    """``y = x`` where x > 0, ``negative_slope x`` elsewhere."""

    negative_slope: float = 0.01


@dataclass(frozen=True)
class GELU(Layer):
    """``y = x Phi(x)`` (Hendrycks and Gimpel 2016); ``approximate="tanh"`` is their cheaper form."""

    approximate: Literal["none", "tanh"] = "none"
    COST: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if self.approximate not in ("none", "tanh"):
            raise ConfigError(f"GELU: approximate must be 'none' or 'tanh'; got {self.approximate!r}")


@dataclass(frozen=True)
class SiLU(Layer):
    """``y = x / (1 + exp(-x))``, also called swish."""

    COST: ClassVar[int] = 4


@dataclass(frozen=True)
class Dropout(Layer):
    """In training, zero with probability p and scale the rest by 1/(1 - p) (Srivastava et al. 2014); else identity.

    The mask is a pure function of (seed, epoch, sample index, layer): the same for any engine, batch or rank.
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ConfigError(f"Dropout: p must be in [0, 1); got {self.p}")
