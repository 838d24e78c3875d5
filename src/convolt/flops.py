"""FLOPs: how much work every layer of a model is, forward and backward.

A multiply and an add count as two; F is a layer's forward count (``Layer.flops``) for one image. Backward is

    with parameters       F for dw (and db), and F for dx
    without parameters    F for dx

where dx is left out of what no gradient must pass through: every layer up to and including the first one with
parameters. A training step of N images therefore counts ``N (sum F_forward + sum F_backward)``; the optimizer, a few
FLOPs for each parameter, is not counted, nor is what an engine computes beyond this, such as padding or a recomputed
activation. An algorithm with fewer multiplications (Winograd, FFT) counts as the same work done faster.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from convolt.layers import Layer, Residual, Shape, walk
from convolt.model import Model


@dataclass(frozen=True)
class Work:
    """What one layer must do: elements of input and output of one image, its parameters, and FLOPs of one image."""

    name: str
    kind: str
    inputs: int
    outputs: int
    parameters: int
    forward_flops: int
    backward_flops: int
    has_dx: bool

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
            yield Work(name, type(layer).__name__, inputs, outputs, size, flops, backward, needed)
        needed = needed or has_parameters


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
