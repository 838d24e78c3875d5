"""The programs of one plan: forward, backward, backward in slices, and the whole step in one."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.convolutions import reads_planes
from convolt.engines.jit.graph import Operation, learning, operations
from convolt.engines.jit.half import keep_half
from convolt.engines.jit.isa import Isa, Units
from convolt.engines.jit.kernels.loss_specs import FINDINGS, LossSpec
from convolt.engines.jit.kernels.specs import ONE, UpdateSpec
from convolt.engines.jit.matrices import matrices_of, readers_of_pixels, reads_half, reads_pixels
from convolt.engines.jit.phases import Call, Served, Task, Tasks, without_calls
from convolt.engines.jit.plan import KERNELS, Deferred, Plan, Segments, address_of
from convolt.engines.jit.recompute import cut
from convolt.engines.jit.runtime import Program
from convolt.engines.jit.serve import input_tasks, serve
from convolt.engines.jit.stretch import Desk, Stretch
from convolt.engines.jit.update import Moves, Updater
from convolt.errors import ConfigError
from convolt.explanation import Stage
from convolt.flops import layer_work
from convolt.layers import Normalize
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.params import Params

Array = NDArray[Any]
ROUNDING = "dense_tiles:round_weights"  # makes the bf16 copy of a matrix, as does the pass that moves it
CRITERION = "loss:cross_entropy"
ONE_PASS = "dW and the optimizer in one; dW by itself where its sum, its norm or other ranks come first"
SMALL = 1 << 14  # bytes of images that are sooner copied than their address is asked for
OF_WEIGHTS = (
    "weights:fold_norm",
    "weights:spread_groups",
    "weights:pack",
    "winograd:pack",
    "tiles:pack",
    "dense:pack",
    "normalization:fold_running",
)


class Step(NamedTuple):
    """A whole step, which ends before weights are moved where the look at its gradient finds that they may not.

    late: the program that makes gradients by themselves that the step makes while it moves weights. rounds_all: whether
    it leaves every matrix's bf16 copy as new as the matrix.
    """

    program: Program
    late: Program | None
    rounds_all: bool


class Backward(NamedTuple):
    """The tasks of a backward pass, each with its operation, and what is left for the optimizer's pass."""

    tasks: list[tuple[Task | Call, Operation]]
    deferred: tuple[Deferred, ...]


#: Whether a backward pass accumulates, and whether it leaves something for the optimizer's pass.
WAYS = ((False, False), (True, False), (False, True))


class Programs:
    """One plan of a model, for batches of up to ``capacity`` samples, and what can be run of it.

    grads: what a backward pass adds to; None for prediction alone. add_ranks: see Plan. checkpoints: into how many
    segments a model is cut whose inner tensors are made twice (``recompute``); 0 or 1 keeps all of them. reorders:
    whether whole steps may keep matrices in the order of pixels (``order``).
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        grads: Params | None,
        capacity: int,
        byte_input: bool,
        units: Units,
        isa: Isa,
        threads: int,
        compiler: Compiler,
        add_ranks: Callable[[Array], None] | None = None,
        checkpoints: int = 0,
        reorders: bool = True,
    ) -> None:
        first, found = operations(model, training=grads is not None)
        self.plan = Plan(params, grads, capacity, isa, threads, learning(found), units, add_ranks)
        self._grads, self._compiler = grads, compiler
        self._model = model
        normalize = found[0].layer if found and isinstance(found[0].layer, Normalize) else None
        self._normalizes = normalize is not None
        self._operations = found[1:] if normalize is not None else found
        start = found[0].output if normalize is not None else first
        self._output = self._operations[-1].output if self._operations else start
        if units.tiles is not None and reads_planes(start):
            start.lay_in_planes()
        for operation in self._operations:
            if operation.kind == "Flatten" and reads_pixels(self.plan, operation.inputs[0], operation.output):
                operation.output.image = operation.inputs[0]
            flat = operation.kind == "Flatten"
            operation.output.half = flat and reads_half(self.plan, operation.output)
        for operation in self._operations:
            keep_half(self.plan, operation.output)
        self._served = [serve(self.plan, operation) for operation in self._operations]
        self._input_tasks = input_tasks(self.plan, start, byte_input, normalize)
        self._norms = [(one.names[0], math.prod(one.output.shape[1:])) for one in found if one.kind == "BatchNorm2d"]
        self._state = self.plan.state.data  # its words are written faster than the array's
        kind = np.dtype(np.uint8 if byte_input else np.float32)
        self._copies = capacity * math.prod(model.input_shape) * kind.itemsize <= SMALL
        self._images = np.zeros((capacity if self._copies else 0, *model.input_shape), kind)
        self._address = address_of(self._images)
        outputs = math.prod(self._output.shape)
        self.logits = self._array(f"value {self._output.name}", outputs)
        self.dlogits = self._array(f"slope {self._output.name}", outputs)
        self.labels, self.findings, self.scale = np.zeros(capacity, np.int64), np.zeros(FINDINGS), np.zeros(1)
        self._steps: dict[tuple[float, Moves | None], Step] = {}
        self._stretches: dict[tuple[float, Moves, int], Stretch] = {}
        self._whole: dict[bool, Segments] = {}
        self._slices: dict[bool, list[tuple[Segments, slice]]] = {}
        self.version = -1
        self.prepared = (-1, -1)  # the versions of weights and statistics that ``prepare`` has seen last
        segments = cut(self.plan, self._operations, checkpoints) if self.plan.training else []
        self._segment_of = {operation: segment for segment in segments for operation in segment.operations}
        lasting = [operation for operation in self._operations if operation not in self._segment_of]
        stand_ins = readers_of_pixels(self.plan, lasting) if reorders else {}
        self.of_pixels = matrices_of(stand_ins)  # whose columns a whole step wants in the order of pixels
        self._served_at_once = self._without_flattening(stand_ins)
        self.forward_tasks = list(self._forward_tasks(self._served))
        self._forward_at_once = list(self._forward_tasks(self._served_at_once))
        self._backward = {way: self._make_backward(*way) for way in WAYS if self.plan.training}
        if self.plan.training:
            self.plan.lay_out(*self._orders())

    def _without_flattening(self, stand_ins: Mapping[Operation, Operation]) -> list[Served]:
        """What serves the operations in a whole step, in which these dense layers read pixels."""
        flat = {operation.inputs[0] for operation in stand_ins}
        served: list[Served] = []
        for operation, usual in zip(self._operations, self._served, strict=True):
            if operation in stand_ins:
                served.append(serve(self.plan, stand_ins[operation]))
            else:
                served.append(([], list) if operation.output in flat else usual)
        return served

    def _array(self, name: str, size: int, dtype: Any = np.float32) -> Array:
        capacity = self.plan.capacity
        return self.plan.buffer(name, capacity * size, dtype)[: capacity * size].reshape(capacity, size)

    def load(self, x: Array, version: int) -> None:
        """Tell the first kernel where a batch lies; a large one must not change until the programs have run.

        version: of the weights; copies of them in bf16 are made again when it is another one than theirs.
        """
        if self._copies:
            self._images[: len(x)] = x
        else:
            self._images = np.ascontiguousarray(x, self._images.dtype)
            self._address = address_of(self._images)
        self._state[0], self._state[1] = len(x), self._address
        self._state[2] = version != self.version
        self.version = version

    def tell(self, y: Array, scale: float) -> None:
        """The targets of that batch, and what its loss is scaled by."""
        self.labels[: len(y)] = y
        self.scale[0] = scale

    def memory(self) -> dict[str, int]:
        """Bytes by kind: the plan's buffers, and the tables of calls of several steps."""
        tables = sum(array.nbytes for stretch in self._stretches.values() for array in vars(stretch.desks).values())
        return {**self.plan.memory(), **({"tables of steps": tables} if tables else {})}

    def check_norms(self, count: int) -> None:
        """Refuse to train on so few images that a BatchNorm would see one value a channel. Raises ConfigError."""
        for name, pixels in self._norms if self.plan.add_ranks is None else ():
            if count * pixels < 2:
                raise ConfigError(
                    f"layer {name}: BatchNorm2d needs more than one value a channel to train; use a larger batch"
                )

    # -------------------------------------------------------------------------------------------------- the tasks

    def _forward_tasks(self, served: list[Served]) -> Iterator[Task | Call]:
        """From the images to the logits."""
        yield from self._input_tasks
        for operation, (tasks, _) in zip(self._operations, served, strict=True):
            segment = self._segment_of.get(operation)
            if segment is None:
                yield from tasks
            else:
                yield from segment.first(self.plan, operation, tasks)

    def _make_backward(self, accumulate: bool, fuses_update: bool) -> Backward:
        self.plan.begin_backward(accumulate)
        self.plan.begin_slope(self._output)
        served = self._served_at_once if fuses_update else self._served
        forward = {operation: tasks for operation, (tasks, _) in zip(self._operations, served, strict=True)}
        made: list[tuple[Task | Call, Operation]] = []
        for operation, (_, backward) in zip(reversed(self._operations), reversed(served), strict=True):
            segment = self._segment_of.get(operation)
            # What is left for after the step may not read what is forgotten.
            self.plan.fuses_update = fuses_update and segment is None
            tasks = backward()
            if segment is not None:
                again = segment.again(self.plan, forward) if operation is segment.operations[-1] else []
                tasks = [*again, *segment.second(tasks)]
            made += [(task, operation) for task in tasks]
        return Backward(made, tuple(self.plan.deferred))

    def backward_tasks(self, accumulate: bool, fuses_update: bool = False) -> list[tuple[Task | Call, Operation]]:
        """From the gradient of the logits to those of the parameters, each task with its operation."""
        return self._backward[accumulate, fuses_update].tasks

    def _criterion(self, label_smoothing: float) -> Task:
        """Between forward and backward: loss and gradient of the logits."""
        spec = LossSpec(self.plan.capacity, self.logits.shape[1], label_smoothing)
        logits, dlogits = self.plan.value(self._output), self.plan.slope(self._output)
        labels, findings, scale = map(address_of, (self.labels, self.findings, self.scale))
        return self.plan.whole("loss", CRITERION, spec, 1, logits, labels, dlogits, findings, scale)

    def _step_tasks(self, fuses_update: bool, label_smoothing: float) -> Tasks:
        """Forward, loss, backward."""
        forward = self._forward_at_once if fuses_update else self.forward_tasks
        backward = [task for task, _ in self.backward_tasks(accumulate=False, fuses_update=fuses_update)]
        return [*forward, self._criterion(label_smoothing), *backward]

    def _orders(self) -> Iterator[list[Tasks]]:
        """Which tasks run one after another, from the images to the last reader of what has come of them."""
        for fuses_update in (False, True):
            late = [one.gradient for one in self._backward[False, fuses_update].deferred]
            yield [self._step_tasks(fuses_update, 0.0), late]
        for accumulate in (False, True):
            yield [self.forward_tasks, [task for task, _ in self.backward_tasks(accumulate)]]
            yield [self.forward_tasks, *(tasks for tasks, _ in self._cut(accumulate))]

    def order(self, direction: str) -> dict[str, int]:
        """Places of the operations, by label, in the order in which a direction comes to them."""
        labels = [operation.label for operation in self._operations]
        if direction == "backward":
            labels.reverse()
        return {label: place for place, label in enumerate(labels, start=1)}

    def stages(self) -> list[Stage]:
        """What computes each operation of a step on labels, forward, backward and in the optimizer's pass, and why."""
        works = {work.name: work for work in layer_work(self._model)}
        unpack = tuple(task.factory for task in self._input_tasks)
        why = "Normalize folded into it" if self._normalizes else "pixels as they come to a framed tensor"
        found = [Stage("input", "forward", unpack, why, 0)]
        for operation, (tasks, _) in zip(self._operations, self._served_at_once, strict=True):
            flops = sum(works[name].forward_flops for name in operation.names)
            if tasks:
                found.append(_stage(operation, "forward", tasks, flops))
        found.append(Stage("loss", "backward", (CRITERION,), "softmax, cross-entropy and their gradient in one", 0))
        backward, deferred = self._backward[False, True]
        left = {one.name.rpartition(".")[0]: one for one in deferred}
        updates = []
        for operation in reversed(self._operations):
            tasks = [task for task, served in backward if served is operation]
            flops = sum(works[name].backward_flops for name in operation.names)
            name = operation.names[0]
            if name in left:
                last = left[name].update(UpdateSpec("sgd", self.plan.isa.lanes), (0, 0, 0), 0)
                updates.append(Stage(operation.label, "update", (last.factory,), ONE_PASS, works[name].forward_flops))
                flops -= works[name].forward_flops
            if tasks:
                if not operation.inputs_learn(self.plan.learning):
                    operation.because("no dx: nothing before it learns", "backward")
                found.append(_stage(operation, "backward", tasks, flops))
        look = ("loss:square_sum", "loss:look")
        norm = Stage("gradient norm", "update", look, "looked at before anything is moved", 0)
        rest = "what is left of the parameters, in runs" if updates else "all parameters, in runs"
        return [*found, norm, Stage("update", "update", ("weights:update",), rest, 0), *reversed(updates)]

    @cached_property
    def prepare(self) -> Program | None:
        """What a forward pass needs of the weights alone: filters packed, and with BatchNorm taken in."""
        tasks = [task for task in without_calls(self.forward_tasks) if task.factory in OF_WEIGHTS]
        return self._program(tasks) if tasks else None

    @cached_property
    def infer(self) -> Program:
        """The forward pass behind ``prepare``."""
        return self._program([task for task in without_calls(self.forward_tasks) if task.factory not in OF_WEIGHTS])

    @cached_property
    def forward(self) -> Segments:
        """The forward pass."""
        return self._made(self.forward_tasks)

    def backward(self, accumulate: bool) -> Segments:
        """The backward pass; gradients are added to what is there, or written."""
        if accumulate not in self._whole:
            self._whole[accumulate] = self._made([task for task, _ in self.backward_tasks(accumulate)])
        return self._whole[accumulate]

    def slices(self, accumulate: bool) -> list[tuple[Segments, slice]]:
        """The backward pass cut after each operation with parameters, and the gradient that is final then."""
        if accumulate not in self._slices:
            self._slices[accumulate] = [(self._made(tasks), part) for tasks, part in self._cut(accumulate)]
        return self._slices[accumulate]

    def _cut(self, accumulate: bool) -> list[tuple[Tasks, slice]]:
        assert self._grads is not None
        found: list[tuple[Tasks, slice]] = []
        pending: list[Task | Call] = []
        tasks = self.backward_tasks(accumulate)
        for i, (task, operation) in enumerate(tasks):
            pending.append(task)
            last = i + 1 == len(tasks) or tasks[i + 1][1] is not operation
            if last and operation.has_parameters:
                found.append((pending, _gradients_of(operation, self._grads)))
                pending = []
        return found

    def step(self, loss: CrossEntropy, updater: Updater, moves: Moves | None) -> Step:
        """Forward, loss, backward, the gradient's norm, the look at it all, and the optimizer's step.

        Gradients are written, not added; those of large matrices are made in the optimizer's pass. It wants matrices
        ``of_pixels`` in that order. Without ``moves`` it is a step up to the norm: all gradients, nothing reordered.
        """
        key = loss.label_smoothing, moves
        if key not in self._steps:
            deferred = self._backward[False, moves is not None].deferred
            norm, square_sums = updater.norm_task(tuple(one.name for one in deferred))
            tasks: list[Task | Call] = [*self._step_tasks(moves is not None, loss.label_smoothing), norm]
            keep: list[Any] = [self.labels, self.findings, self.scale, square_sums]
            if moves is not None:
                look, looked_at = updater.look_task(self.findings, square_sums, deferred)
                moving, moved = updater.tasks(moves, deferred)
                tasks += [look, *moving]
                keep += [*looked_at, *moved]
            program = self._program(tasks)
            program.keep += keep
            late = self._program([one.gradient for one in deferred]) if deferred else None
            copied = [task for task in self.forward_tasks if isinstance(task, Task) and task.factory == ROUNDING]
            self._steps[key] = Step(program, late, bool(deferred) and len(copied) == len(deferred))
        return self._steps[key]

    def stretch(self, loss: CrossEntropy, updater: Updater, moves: Moves, count: int) -> Stretch:
        """So many steps, one behind another."""
        key = loss.label_smoothing, moves, count
        if key not in self._stretches:
            desk = Desk(self.plan.state[:ONE], self.labels, self.scale, updater.numbers, self.findings, self.logits)
            step = self.step(loss, updater, moves).program
            self._stretches[key] = Stretch(self.plan, step, desk, self._images.dtype, count, self._compiler)
        return self._stretches[key]

    def forget_steps(self) -> None:
        """The optimizer's state, which they move, is another one."""
        self._steps.clear()
        self._stretches.clear()

    def requests(self, tasks: Tasks) -> list[tuple[str, Any]]:
        """What the compiler is asked for."""
        return [(f"{KERNELS}.{task.factory}", task.spec) for task in without_calls(tasks)]

    def _program(self, tasks: Tasks) -> Program:
        return self.plan.program(without_calls(tasks), self._compiler)

    def _made(self, tasks: Tasks) -> Segments:
        return self.plan.segments(tasks, self._compiler)


def _stage(operation: Operation, direction: str, tasks: Tasks, flops: int) -> Stage:
    """The stage of an operation; backward has the reasons of forward too."""
    reasons = operation.reasons["forward"] + (operation.reasons["backward"] if direction == "backward" else [])
    kernels = tuple(dict.fromkeys(task.factory for task in without_calls(tasks)))
    return Stage(operation.label, direction, kernels, "; ".join(reasons) or "the only kernel for it", flops)


def _gradients_of(operation: Operation, grads: Params) -> slice:
    """The part of the flat gradient that belongs to an operation."""
    parts = [part for name, part in grads.slices.items() if name.rpartition(".")[0] == operation.names[0]]
    return slice(parts[0].start, parts[-1].stop)
