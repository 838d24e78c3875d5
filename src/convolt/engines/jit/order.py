"""In which order the columns of dense matrices lie in memory.

Features of a flattened image come channel by channel (C, H, W), and so do the columns of the matrix behind them. Pixels
lie the other way, (H, W, C), so a step would turn a whole batch twice, forward and backward, through the L3 cache. A
whole step instead wants the matrix, and what the optimizer keeps of it, in the order of pixels. They are brought there
in place and stay so from step to step, until somebody asks for them: that costs as much as three steps gain.

Whether a step finds its matrices in that order is no matter of chance: whole steps always do, all else never does. So
it is of no influence on the bits who has looked at the weights in between. Where somebody will after every step, as an
average of them does, nothing is brought anywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.graph import Operation
from convolt.engines.jit.isa import Isa
from convolt.engines.jit.kernels.dense_specs import ReorderSpec
from convolt.engines.jit.matrices import defers
from convolt.engines.jit.phases import Task
from convolt.engines.jit.plan import KERNELS, Plan, address_of
from convolt.engines.jit.runtime import Team
from convolt.engines.jit.update import Updater
from convolt.params import Params

Array = NDArray[Any]
REORDER = "reorder:reorder"
Matrices = Mapping[str, int]
"""Names of parameters, and the channels of the images that their columns are of."""


def readers_of_pixels(plan: Plan, operations: Sequence[Operation]) -> dict[Operation, Operation]:
    """Dense layers that can take the pixels of an image as they lie, each with its stand-in that does.

    Where nobody else reads the image, in the same format, and the gradient is not wanted but to move the matrix.
    """
    found = {}
    for flatten in operations:
        source, features = flatten.inputs[0], flatten.output
        alone = flatten.kind == "Flatten" and len(source.readers) == len(features.readers) == 1
        bare = alone and not any(source.border) and not source.planar and source in plan.learning
        alike = (source.half, source.half_slope) == (features.half, features.half_slope)
        if bare and alike and features.readers[0] in operations and defers(plan, features.readers[0]):
            (reader,), pixels = features.readers, replace(features, image=source)
            plan.learning.add(pixels)
            reader.because("in whole steps it reads pixels as they lie, not flattened")
            found[reader] = replace(reader, inputs=(pixels,))
    return found


def matrices_of(stand_ins: Mapping[Operation, Operation]) -> dict[str, int]:
    """Their matrices, but those whose columns are in order either way."""
    images = {f"{each.names[0]}.weight": each.inputs[0].image for each in stand_ins.values()}
    shapes = {name: image.shape for name, image in images.items() if image is not None}
    return {name: C for name, (C, H, W) in shapes.items() if C > 1 and H * W > 1}


class Order:
    """Which matrices, and which of their companions among the optimizer's arrays, are in the order of pixels now."""

    def __init__(
        self, params: Params, grads: Params, updater: Updater, isa: Isa, threads: int, compiler: Compiler, team: Team
    ) -> None:
        self._params, self._grads, self._updater = params, grads, updater
        self._plan = Plan(params, grads, 1, isa, threads, set())
        self._compiler, self._team = compiler, team
        self._weights: Matrices = {}
        self._state: Matrices = {}

    def bring(self, matrices: Matrices) -> bool:
        """These, with the optimizer's arrays, in the order of pixels, no others; whether a matrix has been moved."""
        return self._set(matrices, matrices)

    def restore(self, state: bool) -> bool:
        """All matrices as everybody knows them, and, if so said, the optimizer's arrays; whether one has been moved."""
        return self._set({}, {} if state else self._state)

    def restore_gradient(self, matrices: Matrices) -> None:
        """The gradient of these, which has been made in the order of pixels."""
        self._run([self._task(self._grads.flat, name, channels, False) for name, channels in matrices.items()])

    def forget_state(self) -> None:
        """The optimizer's arrays are other ones."""
        self._state = {}

    def requests(self, matrices: Matrices) -> list[tuple[str, Any]]:
        """What the compiler is asked for."""
        ways = [self._spec(name, channels, to) for name, channels in matrices.items() for to in (True, False)]
        return [(f"{KERNELS}.{REORDER}", spec) for spec in ways]

    def memory(self) -> dict[str, int]:
        """Bytes by kind: through which rows pass."""
        return self._plan.memory()

    def _set(self, weights: Matrices, state: Matrices) -> bool:
        if weights == self._weights and state == self._state:
            return False
        moved = weights != self._weights
        kinds = (self._weights, weights, [self._params.flat]), (self._state, state, list(self._updater.state.values()))
        tasks = []
        for before, behind, vectors in kinds:
            for name in sorted(before.keys() ^ behind.keys()):
                pixels = name in behind
                channels = (behind if pixels else before)[name]
                tasks += [self._task(vector, name, channels, pixels) for vector in vectors]
        self._run(tasks)
        self._weights, self._state = weights, state
        return moved

    def _task(self, vector: Array, name: str, channels: int, to_pixels: bool) -> Task:
        """Of a flat vector, the part that belongs to a matrix."""
        spec, part = self._spec(name, channels, to_pixels), self._params.slices[name]
        arguments = address_of(vector[part]), self._plan.scratch(spec.inputs)
        return self._plan.whole(f"{name} order", REORDER, spec, -(-spec.outputs // spec.rows), *arguments)

    def _spec(self, name: str, channels: int, to_pixels: bool) -> ReorderSpec:
        outputs, inputs = self._params.specs[name].shape
        return ReorderSpec(outputs, inputs, channels, to_pixels, self._plan.isa.lanes)

    def _run(self, tasks: list[Task]) -> None:
        if tasks:
            self._team.run(self._plan.program(tasks, self._compiler))
