"""Where the time of a step goes, and how much work was there: FLOPs and bytes of every layer, rates of every stage.

**FLOPs.** A multiply and an add count as two; F is a layer's forward count (``Layer.flops``) for one image. Backward is

    with parameters       F for dw (and db), and F for dx
    without parameters    F for dx

where dx is left out of what no gradient must pass through: every layer up to and including the first one with
parameters. A training step of N images therefore counts ``N (sum F_forward + sum F_backward)``; the optimizer, a few
FLOPs for each parameter, is not counted, nor is what an engine computes beyond this, such as padding or a recomputed
activation. An algorithm with fewer multiplications (Winograd, FFT) counts as the same work done faster.

**Bytes.** The least traffic: every operand moved once, as float32. Forward reads x and w and writes y; backward reads
x, dy and w and writes dw, and dx if it is wanted; the update reads w, dw and the optimizer's state and writes w and
state. What stays in a cache makes the rate exceed the memory's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from convolt.engine import Array, Executor
from convolt.layers import Layer, Residual, Shape, walk
from convolt.model import FLOAT_BYTES, Model
from convolt.optimizers import Optimizer

REPEATS = 15


@dataclass(frozen=True)
class Work:
    """What one layer must do: elements of input and output of one image, its parameters, and FLOPs of one image."""

    name: str
    inputs: int
    outputs: int
    parameters: int
    forward_flops: int
    backward_flops: int
    has_dx: bool


@dataclass(frozen=True)
class StageRate:
    """A stage of a step: wall milliseconds (``kernels``: of each of its kernels), and its rates where it has work."""

    stage: str
    direction: str
    milliseconds: float
    gflops: float | None
    gigabytes: float | None
    kernels: dict[str, float]


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
            yield Work(name, 2 * outputs, outputs, 0, outputs, 0, False)  # dy is both branches' gradient as it is
        else:
            flops, size = layer.flops(before), sum(spec.size for spec in layer.parameters().values())
            backward = flops * (needed + has_parameters)
            yield Work(name, inputs, outputs, size, flops, backward, needed)
        needed = needed or has_parameters


def training_flops(model: Model) -> int:
    """FLOPs of forward and backward for one image, without dx of the first layer."""
    return sum(work.forward_flops + work.backward_flops for work in layer_work(model))


def profile(
    executor: Executor, model: Model, x: Array, optimizer: Optimizer, training: bool = True
) -> tuple[StageRate, ...]:
    """The stages of a step in order, medians over some repeats; empty for an engine that cannot time its kernels.

    The executor's weights and gradients are worth nothing afterwards.
    """
    runs = [executor.profile(x, training) for _ in range(REPEATS)]
    if not runs[0]:
        return ()
    times: dict[tuple[str, str], dict[str, float]] = {}
    for same in zip(*runs, strict=True):
        kernels = times.setdefault((same[0].stage, same[0].direction), {})
        kernels[same[0].kernel] = kernels.get(same[0].kernel, 0.0) + 1e3 * median(time.seconds for time in same)
    works = layer_work(model)
    return tuple(
        _rate(stage, direction, kernels, works, len(x), optimizer) for (stage, direction), kernels in times.items()
    )


def _rate(
    stage: str, direction: str, kernels: dict[str, float], works: tuple[Work, ...], images: int, optimizer: Optimizer
) -> StageRate:
    """A stage's name begins with its layer's, or with the first and the last one's: ``0-2 Conv2d+ReLU+MaxPool2d``."""
    milliseconds = sum(kernels.values())
    if direction == "update":
        values = (3 + 2 * len(optimizer.state_names)) * sum(work.parameters for work in works)
        return StageRate(stage, direction, milliseconds, None, _per_second(FLOAT_BYTES * values, milliseconds), kernels)
    served = _served(stage.partition(" ")[0], works)
    if not served:
        return StageRate(stage, direction, milliseconds, None, None, kernels)
    first, last, parameters = served[0], served[-1], sum(work.parameters for work in served)
    if direction == "forward":
        flops = sum(work.forward_flops for work in served)
        values = images * (first.inputs + last.outputs) + parameters
    else:
        flops = sum(work.backward_flops for work in served)
        values = images * (first.inputs * (1 + first.has_dx) + last.outputs) + 2 * parameters
    gflops = _per_second(images * flops, milliseconds)
    return StageRate(stage, direction, milliseconds, gflops, _per_second(FLOAT_BYTES * values, milliseconds), kernels)


def _served(names: str, works: tuple[Work, ...]) -> tuple[Work, ...]:
    """The layers from the first name to the last one, none if they are no layers."""
    order = [work.name for work in works]
    first, _, last = names.partition("-")
    if first not in order or (last or first) not in order:
        return ()
    return works[order.index(first) : order.index(last or first) + 1]


def _per_second(amount: float, milliseconds: float) -> float | None:
    """Thousands of millions a second; None for no work, or too little time to tell."""
    return amount / milliseconds / 1e6 if amount and milliseconds > 0 else None
