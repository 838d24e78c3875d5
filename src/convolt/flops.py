"""FLOPs: how much work every layer of a model is, forward and backward.

A multiply and an add count as two; F is a layer's forward count (``Layer.flops``) for one image. Backward is

    with parameters       F for dw (and db), and F for dx
    without parameters    F for dx

where dx is left out of what no gradient must pass through: every layer up to and including the first one with
parameters. A training step of N images therefore counts ``N (sum F_forward + sum F_backward)``; the optimizer, a few
FLOPs for each parameter, is not counted, nor is what an engine computes beyond this, such as padding or a recomputed
activation. An algorithm with fewer multiplications (Winograd, FFT) counts as the same work done faster: ``needed`` is
what is left of the work where every convolution goes by the best of the kind that engines use here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from convolt.layers import Conv2d, Layer, Residual, Shape, walk
from convolt.model import Model


@dataclass(frozen=True)
class Work:
    """What one layer must do: elements of input and output of one image, its parameters, and FLOPs of one image.

    needed: the part of these FLOPs that the fastest algorithm takes.
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    parameters: int
    forward_flops: int
    backward_flops: int
    has_dx: bool
    needed: Fraction = Fraction(1)

    @property
    def label(self) -> str:
        """Its name and type: ``0 Conv2d``."""
        return f"{self.name} {self.kind}"


def layer_work(model: Model) -> tuple[Work, ...]:
    """Every layer in order, branches of a Residual opened; the Residual itself is the sum at their end."""
    return tuple(_work(model.layers, model.input_shape, "", needed=False))


def _work(layers: tuple[Layer, ...], shape: Shape, prefix: str, needed: bool) -> Iterator[Work]:
    """needed: whether a layer with parameters lies before, so that a gradient must pass through."""
    for name, layer, before, after in walk(layers, shape, prefix):
        has_parameters = bool(layer.parameters())
        inputs, outputs = math.prod(before), math.prod(after)
        if isinstance(layer, Residual):
            yield from _work(layer.body, before, f"{name}.body.", needed)
            yield from _work(layer.shortcut, before, f"{name}.shortcut.", needed)
            yield Work(
                name, "Residual", 2 * outputs, outputs, 0, outputs, 0, False
            )  # dy is both branches' gradient as it is
        else:
            flops, size = layer.flops(before), sum(spec.size for spec in layer.parameters().values())
            backward = flops * (needed + has_parameters)
            yield Work(name, type(layer).__name__, inputs, outputs, size, flops, backward, needed, _needed(layer))
        needed = needed or has_parameters


def _needed(layer: Layer) -> Fraction:
    """The least part of the products where outputs are made two by two, as engines here do at most.

    Along an axis two outputs of n taps take n + 1 products (Winograd 1980): with 3x3 taps 16 instead of 36 for four.
    """
    if not isinstance(layer, Conv2d) or layer.geometry.stride != (1, 1) or layer.groups > 1:
        return Fraction(1)
    R, S = layer.geometry.kernel
    return Fraction((R + 1) * (S + 1), 4 * R * S)


def needed_part(model: Model, training: bool) -> float:
    """Which part of the FLOPs of a model must be computed by any algorithm that engines use: at most 1."""
    works = layer_work(model)
    counts = [work.forward_flops + training * work.backward_flops for work in works]
    least = sum(work.needed * count for work, count in zip(works, counts, strict=True))
    return float(least / sum(counts)) if sum(counts) else 1.0


def training_flops(model: Model) -> int:
    """FLOPs of forward and backward for one image, without dx of the first layer."""
    return sum(work.forward_flops + work.backward_flops for work in layer_work(model))


def served(names: str, works: tuple[Work, ...]) -> tuple[Work, ...]:
    """The layers from the first name to the last one, none if they are no layers."""
    order = [work.name for work in works]
    first, _, last = names.partition("-")
    if first not in order or (last or first) not in order:
        return ()
    return works[order.index(first) : order.index(last or first) + 1]
