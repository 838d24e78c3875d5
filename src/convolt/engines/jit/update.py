"""The optimizer's step as a program: equations of ``convolt.optimizers`` in compiled loops over runs of parameters."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.isa import Isa
from convolt.engines.jit.kernels.specs import NUMBERS, LossSpec, UpdateSpec
from convolt.engines.jit.plan import Plan, Task, address_of
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
        self._made_for: tuple[UpdateSpec, slice | None] | None = None
        self._all = self._cut(True, None)
        self.square_sums = np.zeros(len(self._all))

    def load(self, state: dict[str, Array]) -> None:
        """Go on from a checkpoint's state."""
        self.step, self.program = int(state["step"]), None
        flat = self._params.flat
        self.state = {name: array.astype(flat.dtype) for name, array in state.items() if array.shape == flat.shape}

    def update(self, optimizer: Optimizer, part: slice | None = None) -> None:
        """One step of all parameters, or of a part of them."""
        if not self.state:
            self.state = init_state(optimizer, self._params.flat.size, self._params.dtype)
        self.step += 1
        spec = _spec(optimizer)
        if spec is None or set(optimizer.state_names) - self.state.keys():
            decays = self._params.decays()
            step_flat(optimizer, self._params.flat, self._grads.flat, self.state, self.step, decays, part)
            return
        if self.program is None or self._made_for != (spec, part):
            self._made_for, self.program = (spec, part), self._make(optimizer, spec, part)
        numbers = _numbers(optimizer, self.step)
        self._numbers[: len(numbers)] = numbers
        self._team.run(self.program)

    def norm_task(self) -> Task:
        """The squares of the gradient, summed run by run into ``square_sums``."""
        arguments = address_of(self._grads.flat), address_of(self.square_sums), address_of(self._all)
        return self._plan.whole("gradient norm", "loss:square_sum", LossSpec(), len(self._all), *arguments)

    def _make(self, optimizer: Optimizer, spec: UpdateSpec, part: slice | None) -> Program:
        vectors = [address_of(self.state[name]) for name in optimizer.state_names]
        if isinstance(optimizer, RMSprop) and not optimizer.centered:
            vectors.insert(1, vectors[0])  # no grad_avg: its place is not read
        vectors += [address_of(self._params.flat)] * (3 - len(vectors))
        runs = self._cut(optimizer.decay_norm_and_bias, part)
        arguments = (
            address_of(self._params.flat),
            address_of(self._grads.flat),
            *vectors,
            address_of(self._numbers),
            address_of(runs),
        )
        task = self._plan.whole("update", "weights:update", spec, len(runs), *arguments)
        program = self._plan.program([task], self._compiler)
        program.keep += [self, runs]
        return program

    def _cut(self, decays_all: bool, part: slice | None) -> Array:
        """Runs of parameters that one chunk takes: start, stop, whether weight decay acts."""
        whole = [(slice(0, self._params.flat.size), True)]
        rows = [
            (start, min(start + RUN, segment.stop), int(decays))
            for segment, decays in runs_within(whole if decays_all else self._params.decays(), part)
            for start in range(segment.start, segment.stop, RUN)
        ]
        return np.array(rows, np.int64).reshape(-1, 3)


def _spec(optimizer: Optimizer) -> UpdateSpec | None:
    if isinstance(optimizer, SGD):
        return UpdateSpec("sgd", optimizer.momentum != 0, optimizer.nesterov, False, optimizer.decoupled_weight_decay)
    if isinstance(optimizer, Adam):
        return UpdateSpec("adam", decoupled=optimizer.decoupled_weight_decay)
    if isinstance(optimizer, AdamW):
        return UpdateSpec("adamw", decoupled=True)
    if isinstance(optimizer, RMSprop):
        return UpdateSpec(
            "rmsprop", optimizer.momentum != 0, False, optimizer.centered, optimizer.decoupled_weight_decay
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
