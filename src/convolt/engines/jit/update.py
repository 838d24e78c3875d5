"""The optimizer's step as a program: equations of ``convolt.optimizers`` in compiled loops over runs of parameters."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.isa import Isa
from convolt.engines.jit.kernels.specs import NUMBERS, LossSpec, UpdateSpec
from convolt.engines.jit.phases import Task
from convolt.engines.jit.plan import Deferred, Plan, address_of
from convolt.engines.jit.runtime import Program, Team
from convolt.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop, init_state, runs_within, step_flat
from convolt.params import Params

Array = NDArray[Any]
RUN = 1 << 15  # parameters of a chunk: with gradient and state 512 KB, in the L2 cache


class Updater:
    """Optimizer state, and the programs that move the weights; an optimizer it does not know runs in NumPy."""

    def __init__(self, params: Params, grads: Params, isa: Isa, compiler: Compiler, team: Team) -> None:
        self.state: dict[str, Array] = {}
        self.step = 0
        self.program: Program | None = None
        self._params, self._grads, self._compiler, self._team = params, grads, compiler, team
        self._plan = Plan(params, grads, 1, isa, 1, set())
        self._numbers = np.zeros(NUMBERS)
        self._norms: dict[tuple[str, ...], tuple[Task, Array, Array]] = {}
        self._made_for: tuple[Any, ...] | None = None

    def load(self, state: dict[str, Array]) -> None:
        """Go on from a checkpoint's state."""
        self.step, self.program = int(state["step"]), None
        flat = self._params.flat
        self.state = {name: array.astype(flat.dtype) for name, array in state.items() if array.shape == flat.shape}

    def moved(self) -> None:
        """Weights and gradient have other addresses."""
        self.program = None
        self._norms.clear()

    @property
    def deferred(self) -> Sequence[Deferred]:
        """Whose gradients the last step has made on the way."""
        return self._made_for[3] if self.program is not None and self._made_for is not None else ()

    def fuses(self, optimizer: Optimizer) -> bool:
        """Whether a step of this optimizer can be one pass with the gradient of a matrix."""
        return _spec(optimizer, self._plan.isa.lanes) is not None

    def update(self, optimizer: Optimizer, part: slice | None = None, deferred: Sequence[Deferred] = ()) -> None:
        """One step of all parameters, or of a part of them; of ``deferred`` ones the gradient is made on the way."""
        if not self.state:
            self.state = init_state(optimizer, self._params.flat.size, self._params.dtype)
        self.step += 1
        spec = _spec(optimizer, self._plan.isa.lanes)
        if spec is None or set(optimizer.state_names) - self.state.keys():
            decays = self._params.decays()
            step_flat(optimizer, self._params.flat, self._grads.flat, self.state, self.step, decays, part)
            return
        wanted = (spec, optimizer.decay_norm_and_bias, part, deferred)
        if self.program is None or self._made_for != wanted:
            self._made_for, self.program = wanted, self._make(optimizer, spec, part, deferred)
        numbers = _numbers(optimizer, self.step)
        self._numbers[: len(numbers)] = numbers
        self._team.run(self.program)

    def norm_task(self, without: tuple[str, ...] = ()) -> tuple[Task, Array]:
        """The squares of the gradient, without some parameters', summed run by run; and the array of these sums."""
        if without not in self._norms:
            runs = self._cut(True, self._around(without))
            sums = np.zeros(len(runs))
            arguments = address_of(self._grads.flat), address_of(sums), address_of(runs)
            task = self._plan.whole("gradient norm", "loss:square_sum", LossSpec(), len(runs), *arguments)
            self._norms[without] = task, sums, runs
        return self._norms[without][:2]

    def _make(
        self, optimizer: Optimizer, spec: UpdateSpec, part: slice | None, deferred: Sequence[Deferred]
    ) -> Program:
        vectors = [address_of(self.state[name]) for name in optimizer.state_names]
        if isinstance(optimizer, RMSprop) and not optimizer.centered:
            vectors.insert(1, vectors[0])  # no grad_avg: its place is not read
        vectors += [address_of(self._params.flat)] * (3 - len(vectors))
        parts = [part] if part is not None else self._around(tuple(one.name for one in deferred))
        runs = self._cut(optimizer.decay_norm_and_bias, parts)
        arguments = (
            address_of(self._params.flat),
            address_of(self._grads.flat),
            *vectors,
            address_of(self._numbers),
            address_of(runs),
        )
        task = self._plan.whole("update", "weights:update", spec, len(runs), *arguments)
        tasks = [
            one.update(spec, tuple(vector + self._offset(one.name) for vector in vectors), address_of(self._numbers))
            for one in deferred
        ]
        program = self._plan.program([*tasks, task], self._compiler)
        program.keep += [self, runs]
        return program

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
