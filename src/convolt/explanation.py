"""Which kernel computes each stage of a model on an engine, and why that one.

An engine writes down its reasons where it decides, so an explanation cannot differ from what is done.
"""

from dataclasses import dataclass

from convolt.flops import layer_work
from convolt.model import Model


@dataclass(frozen=True)
class Stage:
    """Layers that are computed together, in one direction.

    name: of the layers, such as ``0-2 Conv2d+ReLU+MaxPool2d``. flops: of one image.
    """

    name: str
    direction: str  # "forward" or "backward"
    kernels: tuple[str, ...]
    reason: str
    flops: int


@dataclass(frozen=True)
class Explanation:
    """The stages of a training step, forward and then backward; as text it is a table."""

    engine: str
    precision: str
    batch_size: int
    stages: tuple[Stage, ...]

    def __str__(self) -> str:
        header = ("stage", "direction", "MFLOP", "kernels", "why")
        rows = [header, *(_row(stage) for stage in self.stages)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        title = f"{self.engine}, {self.precision}, batch {self.batch_size}"
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join([title, *(line.rstrip() for line in lines)])

    __repr__ = __str__  # a prompt shows the table


def layer_by_layer(model: Model, engine: str, precision: str, batch_size: int, reason: str) -> Explanation:
    """The explanation of an engine that computes every layer by itself."""
    works = layer_work(model)
    forward = [Stage(work.label, "forward", (engine,), reason, work.forward_flops) for work in works]
    backward = [
        Stage(work.label, "backward", (engine,), reason, work.backward_flops)
        for work in reversed(works)
        if work.has_dx or work.parameters
    ]
    return Explanation(engine, precision, batch_size, (*forward, *backward))


def _row(stage: Stage) -> tuple[str, ...]:
    return stage.name, stage.direction, f"{stage.flops / 1e6:.3f}", " ".join(stage.kernels), stage.reason
