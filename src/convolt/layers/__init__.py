"""Layers as data: what a network is, and nothing about how it is computed.

A layer is a frozen dataclass with PyTorch's argument names. It answers four questions about itself: the shape it
makes of a shape, the parameters it has, the buffers it has, and the FLOPs of one sample. The arithmetic lives in the
engines, so one description serves every engine, every precision and every export.

Shapes carry no batch dimension: ``(C, H, W)`` for images, ``(F,)`` for features.
"""

from convolt.layers.base import BufferSpec, Layer, Pair, ParamSpec, Shape
from convolt.layers.composition import Residual, Sequential, members, walk
from convolt.layers.elementwise import GELU, Dropout, LeakyReLU, ReLU, SiLU
from convolt.layers.linear import Conv2d, Dense
from convolt.layers.normalization import BatchNorm2d, Normalize
from convolt.layers.pooling import AvgPool2d, Flatten, GlobalAvgPool2d, MaxPool2d
from convolt.layers.window import Window

LAYERS: tuple[type, ...] = (
    Conv2d,
    BatchNorm2d,
    ReLU,
    LeakyReLU,
    GELU,
    SiLU,
    MaxPool2d,
    AvgPool2d,
    GlobalAvgPool2d,
    Dropout,
    Flatten,
    Dense,
    Residual,
    Sequential,
    Normalize,
)

__all__ = [
    "GELU",
    "LAYERS",
    "AvgPool2d",
    "BatchNorm2d",
    "BufferSpec",
    "Conv2d",
    "Dense",
    "Dropout",
    "Flatten",
    "GlobalAvgPool2d",
    "Layer",
    "LeakyReLU",
    "MaxPool2d",
    "Normalize",
    "Pair",
    "ParamSpec",
    "ReLU",
    "Residual",
    "Sequential",
    "Shape",
    "SiLU",
    "Window",
    "members",
    "walk",
]
