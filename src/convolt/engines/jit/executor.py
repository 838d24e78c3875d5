"""The jit executor: programs of compiled kernels for steps and for predictions.

A step is two programs, forward and backward, with the loss between them, and a third for the optimizer. Plans are made
for a batch capacity when a batch first needs it and kept; a smaller batch runs in the same buffers.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convolt.engine import EngineRecipe, Executor, OnReady, StageTime, StepResult
from convolt.engines.jit.compiler import Compiler, Progress
from convolt.engines.jit.graph import Operation, learning, operations
from convolt.engines.jit.isa import Isa
from convolt.engines.jit.kernels.specs import NUMBERS, UpdateSpec
from convolt.engines.jit.plan import Plan, Task, address_of
from convolt.engines.jit.runtime import Program, Team
from convolt.engines.jit.serve import SERVICES, input_tasks
from convolt.errors import ConfigError
from convolt.layers import Normalize
from convolt.losses import Loss
from convolt.model import Model
from convolt.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop, init_state, step_flat
from convolt.params import Params
from convolt.rng import SampleRng

Array = NDArray[Any]
PREDICT_BATCH = 256
UPDATE_RUN = 1 << 15  # parameters of a chunk: with gradient and state 512 KB, in the L2 cache


class Programs:
    """One plan and its programs."""

    def __init__(
        self, model: Model, params: Params, grads: Params | None, capacity: int, isa: Isa, threads: int, byte_input: bool,
        tiles: bool,
    ) -> None:
        first, found = operations(model, training=grads is not None)
        self.plan = Plan(params, grads, capacity, isa, threads, learning(found), tiles)
        self.input, self.byte_input = first, byte_input
        normalize = found[0].layer if found and isinstance(found[0].layer, Normalize) else None
        rest = found[1:] if normalize is not None else found
        start = found[0].output if normalize is not None else first
        self.output = rest[-1].output if rest else start
        self.forward_tasks = input_tasks(self.plan, start, byte_input, normalize)
        served = [SERVICES[operation.kind](self.plan, operation) for operation in rest]
        for forward, _ in served:
            self.forward_tasks += forward
        self.backward_tasks: list[Task] = []
        self.finals: list[tuple[int, slice]] = []  # after so many of these tasks, this part of the gradient is final
        self.streamed: list[tuple[Program, slice]] = []
        self._norms = [(one.names[0], math.prod(one.output.shape[1:])) for one in found if one.kind == "BatchNorm2d"]
        if grads is not None:
            self.plan.begin_slope(self.output)
            self.plan.slope(self.output)
            for operation, (_, backward) in zip(reversed(rest), reversed(served), strict=True):
                self.backward_tasks += backward()
                if operation.has_parameters:
                    self.finals.append((len(self.backward_tasks), _gradients_of(operation, grads)))
        size = math.prod(model.input_shape)
        dtype = np.uint8 if byte_input else np.float32
        self.pixels = self.plan.buffer("pixels", capacity * size, dtype)[: capacity * size].reshape(capacity, -1)
        outputs = math.prod(self.output.shape)
        self.logits = self._rows("value", outputs)
        self.dlogits = self._rows("slope", outputs) if grads is not None else self.logits

    def _rows(self, kind: str, outputs: int) -> Array:
        size = self.plan.capacity * outputs
        return self.plan.buffer(f"{kind} {self.output.name}", size)[:size].reshape(self.plan.capacity, outputs)

    def load(self, x: Array) -> None:
        """Put a batch where the first kernel reads it."""
        self.plan.state[0] = len(x)
        self.pixels[: len(x)] = x.reshape(len(x), -1)

    def check_norms(self, count: int) -> None:
        """Refuse to train on so few images that a BatchNorm would see one value a channel. Raises ConfigError."""
        for name, pixels in self._norms:
            if count * pixels < 2:
                raise ConfigError(
                    f"layer {name}: BatchNorm2d needs more than one value a channel to train; use a larger batch"
                )


class JitExecutor(Executor):
    """One model on compiled kernels, float32."""

    def __init__(
        self,
        model: Model,
        params: Params,
        recipe: EngineRecipe,
        isa: Isa,
        threads: int,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.params = model, params
        self.grads = Params(model, params.dtype)
        self._isa, self._threads, self._progress = isa, threads, progress
        self._tiles = recipe.precision == "bf16"
        self._compiler = Compiler(isa)
        self._team = Team(threads, self._compiler)
        self._plans: dict[tuple[bool, int, bool], tuple[Programs, Program, Program | None]] = {}
        self._state: dict[str, Array] = {}
        self._step = 0
        self._update: tuple[UpdateSpec, Program, Array] | None = None

    def predict(self, x: Array) -> Array:
        """Logits (N, classes)."""
        self._check(x)
        parts = []
        for start in range(0, len(x), PREDICT_BATCH):
            part = x[start : start + PREDICT_BATCH]
            programs, forward, _ = self._ready(part, training=False)
            programs.load(part)
            self._team.run(forward)
            parts.append(programs.logits[: len(part)].copy())
        return np.concatenate(parts) if parts else np.zeros((0, *self.model.output_shape), np.float32)

    def loss_and_grads(
        self,
        x: Array,
        y: Any,
        loss: Loss,
        scale: float,
        rng: SampleRng | None = None,
        on_ready: OnReady | None = None,
    ) -> StepResult:
        """Forward program, loss, backward program."""
        self._check(x)
        programs, forward, backward = self._ready(x, training=True)
        programs.check_norms(len(x))
        programs.load(x)
        self._draw(programs, rng)
        self._team.run(forward)
        self._count_batches()
        logits = programs.logits[: len(x)].copy()
        total, dlogits = loss(logits, y)
        programs.dlogits[: len(x)] = dlogits * np.float32(scale)
        programs.dlogits[len(x) :] = 0
        if on_ready is not None:
            for program, part in self._streamed(programs):
                self._team.run(program)
                on_ready(part)
        elif backward is not None:
            self._team.run(backward)
        return StepResult(total, logits)

    def update(self, optimizer: Optimizer) -> None:
        """The optimizer's step in compiled code; one that the kernels do not know runs in NumPy."""
        if not self._state:
            self._state = init_state(optimizer, self.params.flat.size, self.params.dtype)
        self._step += 1
        known = _update_spec(optimizer)
        if known is None or set(optimizer.state_names) - self._state.keys():
            step_flat(
                optimizer, self.params.flat, self.grads.flat, self._state, self._step, self.params.decays()
            )
            return
        program, numbers = self._update_program(optimizer, known)
        numbers[: len(_numbers(optimizer, self._step))] = _numbers(optimizer, self._step)
        self._team.run(program)

    def optimizer_state(self) -> dict[str, Array]:
        """The optimizer's flat arrays and ``step``."""
        return {**self._state, "step": np.array(self._step)}

    def load_optimizer_state(self, state: dict[str, Array]) -> None:
        """Go on from a checkpoint's optimizer state."""
        self._step, self._update = int(state["step"]), None
        self._state = {
            name: array.astype(self.params.dtype) for name, array in state.items() if array.shape == self.params.flat.shape
        }

    def profile(self, x: Array, training: bool) -> tuple[StageTime, ...]:
        """The programs of a step once more, on what is in their buffers; a phase's time is shared among its kernels."""
        programs, forward, backward = self._ready(x, training)
        programs.load(x)
        update = self._update[1] if training and self._update is not None else None
        found = []
        for direction, program in (("forward", forward), ("backward", backward), ("update", update)):
            for phase in self._team.profile(program) if program is not None else ():
                part = phase.wall / sum(phase.kernels)
                for label, seconds in zip(phase.name.split(", "), phase.kernels, strict=True):
                    where, kind, kernel = [*label.split(" ", 2), "", ""][:3]
                    found.append(StageTime(f"{where} {kind}".strip(), direction, kernel, seconds * part))
        return tuple(found)

    def close(self) -> None:
        """End the threads."""
        self._team.close()

    # ------------------------------------------------------------------------------------------------------- inside

    def _check(self, x: Array) -> None:
        if x.shape[1:] != self.model.input_shape:
            raise ConfigError(f"images must have shape (N, {str(self.model.input_shape)[1:-1]}); got {x.shape}")

    def _ready(self, x: Array, training: bool) -> tuple[Programs, Program, Program | None]:
        """Programs for a batch: those of the smallest capacity that holds it without waste, or new ones."""
        count, byte_input = len(x), x.dtype == np.uint8
        fits = [
            size
            for kind, size, of_bytes in self._plans
            if (kind, of_bytes) == (training, byte_input) and count <= size <= 4 * count
        ]
        key = (training, min(fits, default=count), byte_input)
        if key not in self._plans:
            grads = self.grads if training else None
            programs = Programs(self.model, self.params, grads, count, self._isa, self._threads, byte_input, self._tiles)
            plan = programs.plan
            tasks = programs.forward_tasks + programs.backward_tasks
            self._compiler.kernels([(f"convolt.engines.jit.kernels.{t.factory}", t.spec) for t in tasks], self._progress)
            forward = plan.program(programs.forward_tasks, self._compiler)
            backward = plan.program(programs.backward_tasks, self._compiler) if programs.backward_tasks else None
            self._plans[key] = programs, forward, backward
        return self._plans[key]

    def _streamed(self, programs: Programs) -> list[tuple[Program, slice]]:
        """The backward program cut after each operation with parameters, and the gradient that is final then."""
        if not programs.streamed:
            start = 0
            for stop, part in programs.finals:
                program = programs.plan.program(programs.backward_tasks[start:stop], self._compiler)
                programs.streamed.append((program, part))
                start = stop
        return programs.streamed

    def _draw(self, programs: Programs, rng: SampleRng | None) -> None:
        for layer, name, mask in programs.plan.masks:
            if not (self.dropout and layer.p):
                mask[...] = 1
                continue
            if rng is None:
                raise ConfigError(f"layer {name}: Dropout needs rng=SampleRng(seed, epoch, indices) in loss_and_grads")
            _, H, W, C = mask.shape
            shape = (C, H, W)
            kept = rng.uniform(f"dropout:{name}", shape) >= layer.p
            mask[: len(kept)] = kept.transpose(0, 2, 3, 1) * np.float32(1 / (1 - layer.p))

    def _count_batches(self) -> None:
        for name, array in self.params.buffers.items():
            if name.endswith("num_batches_tracked"):
                array += 1

    def _update_program(self, optimizer: Optimizer, spec: UpdateSpec) -> tuple[Program, Array]:
        if self._update is None or self._update[0] != spec:
            numbers = np.zeros(NUMBERS)
            vectors = [self._state[name] for name in _state_order(optimizer) if name in self._state]
            addresses = [address_of(vector) for vector in vectors]
            if isinstance(optimizer, RMSprop) and "grad_avg" not in self._state and optimizer.momentum:
                addresses.insert(1, addresses[0])
            addresses += [address_of(self.params.flat)] * (3 - len(addresses))
            runs = self._runs(optimizer)
            plan = Plan(self.params, self.grads, 1, self._isa, self._threads, set())
            arguments = (
                address_of(self.params.flat),
                address_of(self.grads.flat),
                *addresses,
                address_of(numbers),
                address_of(runs),
            )
            task = plan.whole("update", "weights:update", spec, len(runs), *arguments)
            program = plan.program([task], self._compiler)
            program.keep += [numbers, runs, self._state]
            self._update = spec, program, numbers
        return self._update[1], self._update[2]

    def _runs(self, optimizer: Optimizer) -> Array:
        """Runs of parameters that one chunk updates: start, stop, whether weight decay acts."""
        rows = [
            (start, min(start + UPDATE_RUN, segment.stop), int(is_weight or optimizer.decay_norm_and_bias))
            for segment, is_weight in self.params.decays()
            for start in range(segment.start, segment.stop, UPDATE_RUN)
        ]
        return np.array(rows, np.int64)


def _gradients_of(operation: Operation, grads: Params) -> slice:
    """The part of the flat gradient that belongs to an operation."""
    parts = [part for name, part in grads.slices.items() if name.rpartition(".")[0] == operation.names[0]]
    return slice(parts[0].start, parts[-1].stop)


def _state_order(optimizer: Optimizer) -> tuple[str, ...]:
    return optimizer.state_names


def _update_spec(optimizer: Optimizer) -> UpdateSpec | None:
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
        return [*common, optimizer.momentum, 1.0 if first else 1 - optimizer.dampening, 0.0 if first else optimizer.momentum]
    if isinstance(optimizer, RMSprop):
        return [*common, optimizer.alpha, optimizer.eps, optimizer.momentum]
    assert isinstance(optimizer, Adam | AdamW)
    beta1, beta2 = optimizer.betas
    root = math.sqrt(1 - beta2**step)
    return [*common, beta1, beta2, optimizer.eps * root, optimizer.lr * root / (1 - beta1**step)]
