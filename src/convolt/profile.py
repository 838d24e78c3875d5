"""Where the time of a step goes: FLOPs (see flops.py) and bytes of every stage a second.

**Bytes.** The least traffic: every operand moved once, as float32. Forward reads x and w and writes y; backward reads
x, dy and w and writes dw, and dx if it is wanted; the update reads w, dw and the optimizer's state and writes w and
state. What stays in a cache makes the rate exceed the memory's.
"""

from dataclasses import dataclass
from statistics import median

from convolt.engine import Array, Executor
from convolt.flops import Work, layer_work, served
from convolt.model import FLOAT_BYTES, Model
from convolt.optimizers import Optimizer

REPEATS = 15


@dataclass(frozen=True)
class StageRate:
    """A stage of a step: wall milliseconds (``kernels``: of each of its kernels), and its rates where it has work."""

    stage: str
    direction: str
    milliseconds: float
    gflops: float | None
    gigabytes: float | None
    kernels: dict[str, float]


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
    layers = served(stage.partition(" ")[0], works)
    if not layers:
        return StageRate(stage, direction, milliseconds, None, None, kernels)
    first, last, parameters = layers[0], layers[-1], sum(work.parameters for work in layers)
    if direction == "forward":
        flops = sum(work.forward_flops for work in layers)
        values = images * (first.inputs + last.outputs) + parameters
    else:
        flops = sum(work.backward_flops for work in layers)
        values = images * (first.inputs * (1 + first.has_dx) + last.outputs) + 2 * parameters
    gflops = _per_second(images * flops, milliseconds)
    return StageRate(stage, direction, milliseconds, gflops, _per_second(FLOAT_BYTES * values, milliseconds), kernels)


def _per_second(amount: float, milliseconds: float) -> float | None:
    """Thousands of millions a second; None for no work, or too little time to tell."""
    return amount / milliseconds / 1e6 if amount and milliseconds > 0 else None
