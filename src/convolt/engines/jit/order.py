"""In which order the columns of dense matrices lie in memory.

Features of a flattened image come channel by channel (C, H, W), and so do the columns of the matrix behind them. Pixels
lie the other way, (H, W, C), so a step would turn a whole batch twice, forward and backward, through the L3 cache. A
whole step instead wants the matrix, and what the optimizer keeps of it, in the order of pixels. They are brought there
in place and stay so from step to step, until somebody asks for them.

Whether a step finds its matrices in that order is no matter of chance: whole steps always do, all else never does. So
it is of no influence on the bits who has looked at the weights in between. Where somebody will after every step, as an
average of them does, nothing is brought anywhere: there and back takes several times what a step gains.

A signal's handler may raise in Python at any time, before a program runs or behind it, so it is the program itself that
notes, at its end, that it has run.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.isa import Isa
from convolt.engines.jit.kernels.dense_specs import ReorderSpec
from convolt.engines.jit.phases import Task
from convolt.engines.jit.plan import KERNELS, Plan, address_of
from convolt.engines.jit.runtime import Program, Team
from convolt.engines.jit.update import Updater
from convolt.params import Params

Array = NDArray[Any]
REORDER = "reorder:reorder"
Matrices = Mapping[str, int]
"""Names of parameters, and the channels of the images that their columns are of."""


class Now(NamedTuple):
    """Whose columns are in the order of pixels, and whose companions among the optimizer's arrays.

    version: grows when a matrix is reordered; copies of it belong to one.
    """

    weights: Matrices
    state: Matrices
    version: int


class Order:
    """The order of all matrices."""

    def __init__(
        self, params: Params, grads: Params, updater: Updater, isa: Isa, threads: int, compiler: Compiler, team: Team
    ) -> None:
        self._params, self._grads, self._updater = params, grads, updater
        self._plan = Plan(params, grads, 1, isa, threads, set())
        self._compiler, self._team = compiler, team
        self._known = self._coming = Now({}, {}, 0)
        self._arrived, self._one = np.zeros(1, np.int64), np.ones(1, np.int64)
        self._row = np.array([(address_of(self._one), address_of(self._arrived), 2)], np.int64)
        self._programs: dict[tuple[Any, ...], Program] = {}

    @property
    def now(self) -> Now:
        """As the last program that has run to its end left it."""
        if self._arrived[0]:
            self._known = self._coming
            self._arrived[0] = 0
        return self._known

    def bring(self, matrices: Matrices) -> None:
        """These, with the optimizer's arrays, in the order of pixels, no others."""
        self._set(matrices, matrices)

    def restore(self, state: bool) -> None:
        """All matrices as everybody knows them and, if so said, the optimizer's arrays."""
        self._set({}, {} if state else self.now.state)

    def restore_gradient(self, matrices: Matrices) -> None:
        """The gradient of these, which has been made in the order of pixels."""
        tasks = [self._task(self._grads.flat, name, channels, False) for name, channels in matrices.items()]
        if tasks:
            self._team.run(self._plan.program(tasks, self._compiler))

    def forget_state(self) -> None:
        """The optimizer's arrays are other ones."""
        self._known = self.now._replace(state={})

    def requests(self, matrices: Matrices) -> list[tuple[str, Any]]:
        """What the compiler is asked for."""
        ways = [self._spec(name, channels, to) for name, channels in matrices.items() for to in (True, False)]
        return [(f"{KERNELS}.{REORDER}", spec) for spec in ways]

    def memory(self) -> dict[str, int]:
        """Bytes by kind: through which rows pass."""
        return self._plan.memory()

    def _set(self, weights: Matrices, state: Matrices) -> None:
        now = self.now
        if (weights, state) == (now.weights, now.state):
            return
        kinds = (now.weights, weights, [self._params.flat]), (now.state, state, list(self._updater.state.values()))
        moves: list[tuple[Array, str, int, bool]] = []
        for before, behind, vectors in kinds:
            for name in sorted(before.keys() ^ behind.keys()):
                to_pixels = name in behind
                channels = (behind if to_pixels else before)[name]
                moves += [(vector, name, channels, to_pixels) for vector in vectors]
        self._coming = Now(weights, state, now.version + (weights != now.weights))
        self._team.run(self._program(moves))

    def _program(self, moves: Sequence[tuple[Array, str, int, bool]]) -> Program:
        """Kept by what it does and where: it is the same a thousand times."""
        key = tuple((address_of(vector), *rest) for vector, *rest in moves)
        if key not in self._programs:
            end = self._plan.whole("arrived order", "stretch:copies", None, 1, address_of(self._row), len(self._row))
            tasks = [self._task(*move) for move in moves]
            parts = [self._plan.program(part, self._compiler) for part in (tasks, [end]) if part]
            self._programs[key] = Program([phase for part in parts for phase in part.phases], [*parts])
        return self._programs[key]

    def _task(self, vector: Array, name: str, channels: int, to_pixels: bool) -> Task:
        """Of a flat vector, the part that belongs to a matrix."""
        spec, part = self._spec(name, channels, to_pixels), self._params.slices[name]
        arguments = address_of(vector[part]), self._plan.scratch(spec.inputs)
        return self._plan.whole(f"{name} order", REORDER, spec, -(-spec.outputs // spec.rows), *arguments)

    def _spec(self, name: str, channels: int, to_pixels: bool) -> ReorderSpec:
        outputs, inputs = self._params.specs[name].shape
        return ReorderSpec(outputs, inputs, channels, to_pixels, self._plan.isa.lanes)
