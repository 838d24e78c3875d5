"""Where the time of a step goes: FLOPs (see flops.py) and bytes of every stage a second.

**Bytes.** The least traffic: every operand moved once, as float32. Forward reads x and w and writes y; backward reads
x, dy and w and writes dw, and dx if it is wanted; the update reads w, dw and the optimizer's state and writes w and
state. Where an engine makes dw in the update's pass, x and dy are read there and dw is in no memory. What stays in a
cache makes the rate exceed the memory's.
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
    works, states = layer_work(model), len(optimizer.state_names)
    one_pass = {stage: _layers(stage, works) for stage, direction in times if direction == "update"}
    return tuple(
        _rate(stage, direction, kernels, works, len(x), states, one_pass)
        for (stage, direction), kernels in times.items()
    )


def _layers(stage: str, works: tuple[Work, ...]) -> tuple[Work, ...]:
    """A stage's name begins with its layer's, or with the first and the last one's: ``0-2 Conv2d+ReLU+MaxPool2d``."""
    return served(stage.partition(" ")[0], works)


def _rate(
    stage: str,
    direction: str,
    kernels: dict[str, float],
    works: tuple[Work, ...],
    images: int,
    states: int,
    one_pass: dict[str, tuple[Work, ...]],
) -> StageRate:
    """one_pass: the layers of the stages whose dw is made in the update's pass."""
    layers, milliseconds = _layers(stage, works), sum(kernels.values())
    flops = values = 0
    if layers:
        first, last, parameters = layers[0], layers[-1], sum(work.parameters for work in layers)
        dw = sum(work.forward_flops for work in layers if work.parameters)
        if direction == "forward":
            flops = sum(work.forward_flops for work in layers)
            values = images * (first.inputs + last.outputs) + parameters
        elif direction == "update":
            flops, values = dw, images * (first.inputs + last.outputs) + (2 + 2 * states) * parameters
        elif stage in one_pass:
            flops = sum(work.backward_flops for work in layers) - dw
            values = images * (first.inputs * first.has_dx + last.outputs) + parameters * first.has_dx
        else:
            flops = sum(work.backward_flops for work in layers)
            values = images * (first.inputs * (1 + first.has_dx) + last.outputs) + 2 * parameters
    elif stage == "update":
        moved = sum(work.parameters for stage_layers in one_pass.values() for work in stage_layers)
        values = (3 + 2 * states) * (sum(work.parameters for work in works) - moved)
    gflops, gigabytes = (_per_second(amount, milliseconds) for amount in (images * flops, FLOAT_BYTES * values))
    return StageRate(stage, direction, milliseconds, gflops, gigabytes, kernels)


def _per_second(amount: float, milliseconds: float) -> float | None:
    """Thousands of millions a second; None for no work, or too little time to tell."""
    return amount / milliseconds / 1e6 if amount and milliseconds > 0 else None
