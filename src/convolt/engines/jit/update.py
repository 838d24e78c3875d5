"""The optimizer's step as a program: equations of ``convolt.optimizers`` in compiled loops over runs of parameters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.isa import Isa
from convolt.engines.jit.kernels.loss_specs import LossSpec
from convolt.engines.jit.kernels.specs import NUMBERS, UpdateSpec
from convolt.engines.jit.phases import Task
from convolt.engines.jit.plan import Deferred, Plan, address_of
from convolt.engines.jit.runtime import Program, Team
from convolt.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop, init_state, runs_within, step_flat
from convolt.params import Params

Array = NDArray[Any]
FLAGS = ("momentum", "nesterov", "centered", "decoupled_weight_decay", "decay_norm_and_bias")
"""The hyperparameters that decide, where they are set, what a step computes; the others are numbers of it."""
RUN = 1 << 15  # parameters of a chunk: with gradient and state 512 KB, in the L2 cache


@dataclass(frozen=True, eq=False)
class Moves:
    """A step of an optimizer as kernels know it: what they are compiled for, names of the state, what decays.

    One object for each kind of step, so that whatever is made for it is found quickly.
    """

    spec: UpdateSpec
    names: tuple[str, ...]
    decays_all: bool


class Updater:
    """Optimizer state, and the programs that move the weights; an optimizer it does not know runs in NumPy."""

    def __init__(self, params: Params, grads: Params, isa: Isa, compiler: Compiler, team: Team) -> None:
        self.state: dict[str, Array] = {}
        self.step = 0
        self.program: Program | None = None
        self._params, self._grads, self._compiler, self._team = params, grads, compiler, team
        self._plan = Plan(params, grads, 1, isa, 1, set())
        self.numbers = np.zeros(NUMBERS)
        self._norms: dict[tuple[str, ...], tuple[Task, Array, Array]] = {}
        self._made_for: tuple[Moves, slice | None] | None = None
        self._moves: dict[tuple[Any, ...], Moves | None] = {}

    def load(self, state: dict[str, Array]) -> None:
        """Go on from a checkpoint's state."""
        flat = self._params.flat
        self.step = int(state["step"])
        self.state = {name: array.astype(flat.dtype) for name, array in state.items() if array.shape == flat.shape}
        self.moved()

    def moved(self) -> None:
        """Weights, gradient or state have other addresses."""
        self.program = None
        self._norms.clear()
        self._moves.clear()

    def kind(self, optimizer: Optimizer) -> tuple[Any, ...]:
        """Optimizers of one kind move weights by the same kernels; their steps differ in numbers."""
        return (type(optimizer), *(bool(getattr(optimizer, name, False)) for name in FLAGS))

    def moves(self, optimizer: Optimizer) -> Moves | None:
        """A step of this optimizer as kernels know it, with its state; None where it is one for NumPy."""
        kind = self.kind(optimizer)
        if kind not in self._moves:
            self._moves[kind] = self._moves_of(optimizer)
        return self._moves[kind]

    def _moves_of(self, optimizer: Optimizer) -> Moves | None:
        spec = _spec(optimizer, self._plan.isa.lanes)
        if spec is None:
            return None
        self._begin(optimizer)
        if set(optimizer.state_names) - self.state.keys():
            return None
        names = tuple(optimizer.state_names)
        if isinstance(optimizer, RMSprop) and not optimizer.centered:
            names = (*names[:1], *names)  # no grad_avg: its place is not read
        return Moves(spec, names, optimizer.decay_norm_and_bias)

    def _begin(self, optimizer: Optimizer) -> None:
        if not self.state:
            self.state = init_state(optimizer, self._params.flat.size, self._params.dtype)
            self.moved()

    def update(self, optimizer: Optimizer, part: slice | None = None) -> None:
        """One step of all parameters, or of a part of them."""
        moves = self.moves(optimizer)
        self.step += 1
        if moves is None:
            self._begin(optimizer)
            decays = self._params.decays()
            step_flat(optimizer, self._params.flat, self._grads.flat, self.state, self.step, decays, part)
            return
        if self.program is None or self._made_for != (moves, part):
            tasks, keep = self.tasks(moves, part=part)
            self._made_for, self.program = (moves, part), self._plan.program(tasks, self._compiler)
            self.program.keep += keep
        self.set_numbers(optimizer, self.step)
        self._team.run(self.program)

    def set_numbers(self, optimizer: Optimizer, step: int, place: Array | None = None) -> None:
        """Tell the kernels the scalars of a step, or write them down in another place."""
        numbers = _numbers(optimizer, step)
        (self.numbers if place is None else place)[: len(numbers)] = numbers

    def norm_task(self, without: tuple[str, ...] = ()) -> tuple[Task, Array]:
        """The squares of the gradient, without some parameters', summed run by run; and the array of these sums."""
        if without not in self._norms:
            runs = self._cut(True, self._around(without))
            sums = np.zeros(len(runs))
            arguments = address_of(self._grads.flat), address_of(sums), address_of(runs)
            task = self._plan.whole("gradient norm", "loss:square_sum", LossSpec(), len(runs), *arguments)
            self._norms[without] = task, sums, runs
        return self._norms[without][:2]

    def look_task(self, findings: Array, squares: Array, deferred: Sequence[Deferred]) -> tuple[Task, list[Any]]:
        """The look at a step's findings, behind which it ends or weights are moved; and what must be kept."""
        rows = np.array([(one.samples, address_of(one.peaks), len(one.peaks)) for one in deferred], np.int64)
        statistics = self._params.buffers_flat
        arguments = (
            *(address_of(findings), address_of(squares), len(squares)),
            *(address_of(statistics), statistics.size),
            *(address_of(rows), len(rows), self._team.ended),
        )
        task = self._plan.whole("gradient norm look", "loss:look", LossSpec(), 1, *arguments)
        return task, [rows, statistics, squares, findings]

    def tasks(
        self, moves: Moves, deferred: Sequence[Deferred] = (), part: slice | None = None
    ) -> tuple[list[Task], list[Any]]:
        """What moves the weights, and what must be kept; of ``deferred`` ones the gradient is made on the way."""
        vectors = [address_of(self.state[name]) for name in moves.names]
        vectors += [address_of(self._params.flat)] * (3 - len(vectors))
        parts = [part] if part is not None else self._around(tuple(one.name for one in deferred))
        runs = self._cut(moves.decays_all, parts)
        numbers = address_of(self.numbers)
        arguments = address_of(self._params.flat), address_of(self._grads.flat), *vectors, numbers, address_of(runs)
        task = self._plan.whole("update", "weights:update", moves.spec, len(runs), *arguments)
        fused = [
            one.update(moves.spec, tuple(vector + self._offset(one.name) for vector in vectors), numbers)
            for one in deferred
        ]
        return [*fused, task], [self, runs, self.state]

    def _offset(self, name: str) -> int:
        """Bytes from the first of all parameters to this one."""
        return self._params.flat.itemsize * self._params.slices[name].start

    def _around(self, without: tuple[str, ...]) -> list[slice]:
        """All parameters but these."""
        stops = sorted((self._params.slices[name].start, self._params.slices[name].stop) for name in without)
        starts = [0, *(stop for _, stop in stops)]
        ends = [*(start for start, _ in stops), self._params.flat.size]
        return [slice(start, end) for start, end in zip(starts, ends, strict=True) if end > start]

    def _cut(self, decays_all: bool, parts: Sequence[slice]) -> Array:
        """Runs of parameters that one chunk takes: start, stop, whether weight decay acts."""
        whole = [(slice(0, self._params.flat.size), True)]
        rows = [
            (start, min(start + RUN, segment.stop), int(decays))
            for part in parts
            for segment, decays in runs_within(whole if decays_all else self._params.decays(), part)
            for start in range(segment.start, segment.stop, RUN)
        ]
        return np.array(rows or [(0, 0, 0)], np.int64)  # a phase has a chunk, and where all is left out it is empty


def _spec(optimizer: Optimizer, lanes: int) -> UpdateSpec | None:
    if isinstance(optimizer, SGD):
        return UpdateSpec(
            "sgd", lanes, optimizer.momentum != 0, optimizer.nesterov, False, optimizer.decoupled_weight_decay
        )
    if isinstance(optimizer, Adam):
        return UpdateSpec("adam", lanes, decoupled=optimizer.decoupled_weight_decay)
    if isinstance(optimizer, AdamW):
        return UpdateSpec("adamw", lanes, decoupled=True)
    if isinstance(optimizer, RMSprop):
        return UpdateSpec(
            "rmsprop", lanes, optimizer.momentum != 0, False, optimizer.centered, optimizer.decoupled_weight_decay
        )
    return None


def _numbers(optimizer: Optimizer, step: int) -> list[float]:
    """The scalars of a step, in the order that ``kernels.weights`` names."""
    common = [optimizer.lr, optimizer.weight_decay]
    if isinstance(optimizer, SGD):
        first = step == 1
        return [
            *common,
            optimizer.momentum,
            1.0 if first else 1 - optimizer.dampening,
            0.0 if first else optimizer.momentum,
        ]
    if isinstance(optimizer, RMSprop):
        return [*common, optimizer.alpha, optimizer.eps, optimizer.momentum]
    assert isinstance(optimizer, Adam | AdamW)
    beta1, beta2 = optimizer.betas
    root = math.sqrt(1 - beta2**step)
    return [*common, beta1, beta2, optimizer.eps * root, optimizer.lr * root / (1 - beta1**step)]
