"""Several training steps as one program.

Between two steps every core waits while the host, in Python that the step has driven from the caches, reads what the
step has found and says where the next images lie. All of that is copying, and here a kernel does it: in front of every
step but the first it puts away what the last one has found and brings what the host has written down for this one.

A step that ends before weights are moved ends the program, so the steps behind it are not begun.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.plan import Plan, address_of
from convolt.engines.jit.runtime import Program

Array = NDArray[Any]


@dataclass(frozen=True)
class Desk:
    """The arrays through which the host and a step speak; in a `Stretch`, the same for all steps, one row for each.

    state: its first words, how many images there are, where they lie, and whether copies of weights are made again.
    """

    state: Array
    labels: Array
    scale: Array
    numbers: Array
    findings: Array
    logits: Array

    @property
    def given(self) -> tuple[Array, ...]:
        """What the host writes."""
        return self.state, self.labels, self.scale, self.numbers

    @property
    def found(self) -> tuple[Array, ...]:
        """What it reads."""
        return self.findings, self.logits


class Stretch:
    """``count`` times a step of a plan, which speaks with the host through ``desk``; kind: of the images' numbers.

    desks: what the host writes before (of the first step, on the desk itself) and reads behind (of the last step that
    was begun, there too). begun: the number of that one, from 0: so many have moved the weights before it.
    """

    def __init__(self, plan: Plan, step: Program, desk: Desk, kind: DTypeLike, count: int, compiler: Compiler) -> None:
        self.desks = Desk(*(np.zeros((count, *array.shape), array.dtype) for array in vars(desk).values()))
        self.begun, numbers = np.zeros(1, np.int64), np.arange(count)
        self._kind = kind
        phases = list(step.phases)
        keep: list[Any] = [step, desk, self.desks, self.begun, numbers]
        for number in range(1, count):
            copied = [(array, row[number - 1]) for array, row in zip(desk.found, self.desks.found, strict=True)]
            copied += [(row[number], array) for array, row in zip(desk.given, self.desks.given, strict=True)]
            copied += [(numbers[number:], self.begun)]
            rows = np.array([(address_of(a), address_of(b), b.nbytes // 4) for a, b in copied], np.int64)
            task = plan.whole("next step", "stretch:copies", None, 1, address_of(rows), len(rows))
            between = plan.program([task], compiler)
            keep += [rows, between]
            phases += [*between.phases, *step.phases]
        self.program = Program(phases, keep)

    def write(self, number: int, x: Array, y: Array, scale: float, renews: bool) -> Array:
        """Write down what a step but the first works on; the images, which must not change until the program has run.

        renews: whether copies of the weights must be made again.
        """
        images, desks = np.ascontiguousarray(x, self._kind), self.desks
        desks.state[number] = len(images), address_of(images), renews
        desks.labels[number, : len(y)] = y
        desks.scale[number] = scale
        return images

    def read(self, number: int, images: int) -> tuple[float, Array, int]:
        """What a step found, behind which another one was begun: loss, logits, how many of these name their label."""
        loss, right, *_ = self.desks.findings[number].tolist()
        return loss, self.desks.logits[number, :images].copy(), int(right)
