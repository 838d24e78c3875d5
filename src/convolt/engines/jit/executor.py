"""The jit executor: programs of compiled kernels for steps and for predictions.

A whole step - unpacking, forward, softmax and cross-entropy, backward, the gradient's norm, the look at whether all is
finite and the optimizer - is one call into compiled code. The gradient of a large dense matrix is made in the
optimizer's pass, a few rows before they are moved, if operands are so small that it must be finite: after
``train_step`` it is not in ``grads``. Such a matrix may also have its columns in another order between whole steps
(``order``), until somebody asks for ``params``. Other losses, accumulation and gradients that somebody waits for take
the same kernels in two or more programs. Plans are made for a batch capacity when a batch first needs it and kept; a
smaller batch runs in the same buffers.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convolt.engine import Executor, OnReady, StageTime, StepInput, StepResult
from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.isa import FP32, Isa, Units
from convolt.engines.jit.kernels.loss_specs import MOVED, UNBOUNDED, UNLABELED
from convolt.engines.jit.order import Order
from convolt.engines.jit.plan import Segments
from convolt.engines.jit.programs import Programs, Step
from convolt.engines.jit.runtime import Program, Team
from convolt.engines.jit.update import Moves, Updater
from convolt.errors import ConfigError
from convolt.layers import Dropout, walk
from convolt.losses import CrossEntropy, Loss
from convolt.model import Model
from convolt.optimizers import Optimizer
from convolt.params import Params
from convolt.rng import SampleRng

Array = NDArray[Any]
PREDICT_BATCH = 256
BEGINS = {"loss": "backward", "gradient norm": "update"}  # kernels with which a direction of a whole step begins
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it lie far apart, modulo 1


class JitExecutor(Executor):
    """One model on compiled kernels.

    units: what multiplies in bf16. looked_at: whether somebody asks for the weights after every step; they then always
    have their own order.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        isa: Isa,
        threads: int,
        units: Units = FP32,
        segments: int = 0,
        looked_at: bool = False,
    ) -> None:
        self.model, self._params = model, params
        self.grads = Params(model, params.dtype)
        self._isa, self._threads = isa, threads
        self._units, self._segments, self._looked_at = units, segments, looked_at
        self._compiler = Compiler(isa, processes=threads, begin=os.getpid() * GOLDEN % 1)
        self._team = Team(threads, self._compiler)
        self._plans: dict[tuple[bool, int, bool], Programs] = {}
        self._add_ranks: Callable[[Array], None] | None = None
        self._changes = 0  # of the weights
        self._statistics = 0  # versions of BatchNorm's running statistics
        self._moves: Moves | None = None  # with which the last step was one program
        self.fuses_steps = not params.buffers and not any(
            isinstance(layer, Dropout) for _, layer, _, _ in walk(model.layers, model.input_shape)
        )
        self._updater = Updater(params, self.grads, isa, self._compiler, self._team)
        self._order = Order(params, self.grads, self._updater, isa, threads, self._compiler, self._team)

    @property
    def params(self) -> Params:  # type: ignore[override]  # whole steps keep matrices in another order
        """The master weights and the statistics, in their own order."""
        self._in_order(state=False)
        return self._params

    def predict(self, x: Array) -> Array:
        """Logits (N, classes)."""
        self._check(x)
        if len(x) <= PREDICT_BATCH:
            return self._logits(x)
        return np.concatenate(
            [self._logits(x[start : start + PREDICT_BATCH]) for start in range(0, len(x), PREDICT_BATCH)]
        )

    def loss_and_grads(
        self,
        x: Array,
        y: Any,
        loss: Loss,
        scale: float,
        rng: SampleRng | None = None,
        on_ready: OnReady | None = None,
        fresh: bool = False,
    ) -> StepResult:
        """Forward program, loss, backward program."""
        self._check(x)
        programs = self._ready(x, training=True)
        self._in_order(state=False)
        self._load(programs, x, rng)
        self._run(programs.forward)
        self._count_batches()
        logits = programs.logits[: len(x)].copy()
        total, dlogits = loss(logits, y)
        programs.dlogits[: len(x)] = dlogits * np.float32(scale)
        programs.dlogits[len(x) :] = 0
        if on_ready is not None:
            for segments, part in programs.slices(accumulate=not fresh):
                self._run(segments)
                on_ready(part)
        else:
            self._run(programs.backward(accumulate=not fresh))
        return StepResult(total, logits)

    def train_step(
        self,
        x: Array,
        y: Any,
        loss: Loss,
        scale: float,
        optimizer: Optimizer,
        rng: SampleRng | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> StepResult:
        """A whole step in one call into compiled code, for cross-entropy on labels; else as any executor does it."""
        return self.train_steps([StepInput(x, y, scale, optimizer, rng)], loss, meanwhile)[0]

    def train_steps(
        self, steps: Sequence[StepInput], loss: Loss, meanwhile: Callable[[], None] | None = None
    ) -> list[StepResult]:
        """As many of them in one call as fit into one program."""
        results: list[StepResult] = []
        while len(results) < len(steps) and (not results or math.isfinite(results[-1].loss)):
            rest, began = steps[len(results) :], not self._updater.state
            count = self._together(rest, loss)
            if count and isinstance(loss, CrossEntropy):
                results += self._at_once(rest[:count], loss, began, meanwhile)
            else:
                x, y, scale, optimizer, rng = rest[0]
                results.append(Executor.train_step(self, x, y, loss, scale, optimizer, rng, meanwhile))
            meanwhile = None
        return results

    def _together(self, steps: Sequence[StepInput], loss: Loss) -> int:
        """How many of these, from the first on, one program can do; 0 where a step is more than one."""
        for step in steps:  # all, before one of them moves anything
            self._check(step.x)
        first, kind = steps[0], self._updater.kind(steps[0].optimizer)
        if type(loss) is not CrossEntropy or self._add_ranks or not self._are_labels(first.y, len(first.x)):
            return 0
        if self._updater.moves(first.optimizer) is None:
            return 0
        programs, count = self._ready(first.x, training=True), 1
        while count < len(steps) and self.fuses_steps:
            x, y, _, optimizer, _ = steps[count]
            labeled = self._are_labels(y, len(x)) and self._updater.kind(optimizer) == kind
            if not labeled or self._ready(x, training=True) is not programs:
                break
            count += 1
        return count

    def _at_once(
        self, steps: Sequence[StepInput], loss: CrossEntropy, began: bool, meanwhile: Callable[[], None] | None
    ) -> list[StepResult]:
        """Steps as one program, up to the first that may not move weights; ``began``: there was no state before."""
        first, moves = steps[0], self._updater.moves(steps[0].optimizer)
        assert moves is not None
        programs = self._ready(first.x, training=True)
        self._order.bring(programs.of_pixels)
        programs.tell(first.y, first.scale)
        self._updater.set_numbers(first.optimizer, self._updater.step + 1)
        whole, results = programs.step(loss, self._updater, moves), []
        if len(steps) == 1:
            self._load(programs, first.x, first.rng)
            self._team.run(whole.program, meanwhile)
        else:
            stretch = programs.stretch(loss, self._updater, moves, len(steps))
            kept = []  # the images are where they must not move from, until the program has run
            for number, (x, y, scale, optimizer, _) in enumerate(steps[1:], 1):
                kept.append(stretch.write(number, x, y, scale, renews=not whole.rounds_all))
                self._updater.set_numbers(optimizer, self._updater.step + 1 + number, stretch.desks.numbers[number])
            stretch.begun[0] = 0
            self._load(programs, first.x, first.rng)
            self._team.run(stretch.program, meanwhile)
            results = [StepResult(*stretch.read(i, len(steps[i].x))) for i in range(stretch.begun[0])]
            self._moved(len(results), programs, whole)
        self._moves = moves
        self._count_batches()
        return [*results, self._judged(programs, whole, steps[len(results)], loss, began and not results)]

    def _moved(self, steps: int, programs: Programs, whole: Step) -> None:
        """So many steps have moved the weights."""
        self._updater.step += steps
        self._changes += steps
        if steps and whole.rounds_all:  # the kernel that moves these weights has rounded them as well
            programs.version = self._version

    def _judged(self, programs: Programs, whole: Step, step: StepInput, loss: Loss, began: bool) -> StepResult:
        """What came of the last step that was begun; ``began``: of all. Raises what the loss does."""
        (total, right, _, verdict), logits = programs.findings.tolist(), programs.logits[: len(step.x)].copy()
        if verdict == MOVED:
            self._moved(1, programs, whole)
            return StepResult(total, logits, int(right))
        if began:  # as if it had not been tried
            self.load_optimizer_state({"step": np.array(self._updater.step)})
        if verdict == UNLABELED:
            loss(logits, step.y)  # raises, and tells which label is none
        if verdict == UNBOUNDED and whole.late is not None:
            self._team.run(whole.late)
            self._order.restore_gradient(programs.of_pixels)
            if math.isfinite(self.grad_norm()):
                self.update(step.optimizer)
                return StepResult(total, logits, int(right))
        return StepResult(math.nan, logits)

    def update(self, optimizer: Optimizer, part: slice | None = None) -> None:
        """The optimizer's step in compiled code; one that the kernels do not know runs in NumPy."""
        self._in_order()
        self._updater.update(optimizer, part)
        self._changes += 1
        self._moves = None

    def weights_changed(self) -> None:
        """Copies of the weights are made again."""
        self._changes += 1

    def statistics(self) -> dict[str, Array]:
        """A copy of the buffers."""
        return self._params.statistics()

    def restore_statistics(self, statistics: dict[str, Array]) -> None:
        """Put back what ``statistics`` gave; filters take them in again."""
        self._params.restore_statistics(statistics)
        self._statistics += 1

    def optimizer_state(self) -> dict[str, Array]:
        """The optimizer's flat arrays and ``step``."""
        self._in_order()
        return {**self._updater.state, "step": np.array(self._updater.step)}

    def load_optimizer_state(self, state: dict[str, Array]) -> None:
        """Go on from a checkpoint's optimizer state."""
        self._updater.load(state)
        self._order.forget_state()
        self._moves = None
        for programs in self._plans.values():
            programs.forget_steps()

    def profile(self, x: Array, training: bool) -> tuple[StageTime, ...]:
        """The programs of the last step once more, on what is in their buffers; weights move, whatever is found.

        A phase's time is shared among its kernels. The loss, which makes the first gradient, counts as backward, the
        gradient's norm as update.
        """
        programs = self._ready(x, training)
        if training and self._moves is not None:
            self._order.bring(programs.of_pixels)
        else:
            self._in_order()
        programs.load(x, self._version)
        segments = [("forward", segment) for segment in programs.forward]
        if training and self._add_ranks:
            segments += [("backward", segment) for segment in programs.backward(accumulate=False)]
        elif training:
            programs.scale[0] = 1 / len(x)
            segments = [("forward", programs.step(CrossEntropy(), self._updater, self._moves).program)]
        if training and self._moves is None and self._updater.program is not None:
            segments += [("update", self._updater.program)]
        found: dict[str, list[StageTime]] = {"forward": [], "backward": [], "update": []}
        for first, program in segments:
            now = first
            for phase in self._team.profile(program) if isinstance(program, Program) else ():
                part = phase.wall / sum(phase.kernels)
                for label, seconds in zip(phase.name.split(", "), phase.kernels, strict=True):
                    now = BEGINS.get(label, now)
                    where, kind, kernel = [*label.split(" ", 2), "", ""][:3]
                    found[now].append(StageTime(f"{where} {kind}".strip(), now, kernel, seconds * part))
        # Packing filters, for one, may have gone ahead.
        orders = {direction: programs.order(direction) for direction in found}
        return tuple(
            time
            for direction, times in found.items()
            for time in sorted(times, key=lambda time: orders[direction].get(time.stage, 0))
        )

    def memory(self) -> dict[str, int]:
        """Bytes of everything that is held, plans that have been made included."""
        flat = self._params.flat.nbytes
        found = {
            "weights": flat + self._params.buffers_flat.nbytes,
            "gradients": self.grads.flat.nbytes + self.grads.buffers_flat.nbytes,
            "optimizer state": sum(array.nbytes for array in self._updater.state.values()),
        }
        for part in (self._order.memory(), *(programs.memory() for programs in self._plans.values())):
            for kind, size in part.items():
                found[kind] = found.get(kind, 0) + size
        return found

    def close(self) -> None:
        """End the threads."""
        try:
            self._in_order()
        finally:
            self._team.close()

    @property
    def compile_seconds(self) -> float:
        """Of the kernels that were not on disk."""
        return self._compiler.statistics.seconds

    def prepare(self, x: Array) -> None:
        """Plan, and compile what is not yet on disk."""
        self._ready(x, training=True)

    def move(self, weights: Array, gradient: Array) -> bool:
        """Plans hold addresses, so they are made anew."""
        self._in_order()
        self._params.move(weights)
        self.grads.move(gradient)
        self._plans.clear()
        self._updater.moved()
        self._moves = None
        return True

    def synchronize_statistics(self, add: Callable[[Array], None]) -> None:
        """Plans are made anew, with a call between BatchNorm's sums and what is made of them."""
        self._add_ranks, self._moves = add, None
        self._plans.clear()

    # ------------------------------------------------------------------------------------------------------- inside

    def _in_order(self, state: bool = True) -> None:
        """Matrices, and the optimizer's ``state``, as everybody knows them."""
        self._order.restore(state)

    @property
    def _version(self) -> int:
        """Of the weights and their order: copies of them (packed, folded, in bf16) belong to one."""
        return self._changes + self._order.now.version

    def _run(self, segments: Segments) -> None:
        for segment in segments:
            if isinstance(segment, Program):
                self._team.run(segment)
            else:
                segment.function()

    def _are_labels(self, y: Any, count: int) -> bool:
        """Whether targets are one integer for each sample: the compiled loss takes these and finds what is no label."""
        classifies = len(self.model.output_shape) == 1
        return classifies and isinstance(y, np.ndarray) and y.shape == (count,) and y.dtype.kind in "iu"

    def _check(self, x: Array) -> None:
        if x.shape[1:] != self.model.input_shape:
            raise ConfigError(f"images must have shape (N, {str(self.model.input_shape)[1:-1]}); got {x.shape}")

    def _load(self, programs: Programs, x: Array, rng: SampleRng | None) -> None:
        """Put a training batch in place, just before a program runs: it makes the copies of weights that are old."""
        programs.check_norms(len(x))
        self._draw(programs, rng)
        self._statistics += 1
        programs.load(x, self._version)

    def _ready(self, x: Array, training: bool) -> Programs:
        """Programs for a batch: those of the smallest capacity that holds it without waste, or new ones."""
        count, byte_input = max(1, len(x)), x.dtype == np.uint8
        exact = self._plans.get((training, count, byte_input))
        if exact is not None:
            return exact
        fits = [
            size
            for kind, size, of_bytes in self._plans
            if (kind, of_bytes) == (training, byte_input) and count <= size <= 4 * count
        ]
        key = (training, min(fits, default=count), byte_input)
        if key not in self._plans:
            grads = self.grads if training else None
            programs = Programs(
                self.model,
                self._params,
                grads,
                count,
                byte_input,
                self._units,
                self._isa,
                self._threads,
                self._compiler,
                self._add_ranks if training else None,
                self._segments,
                reorders=not self._looked_at,
            )
            tasks = list(programs.forward_tasks)
            if training:
                tasks += [task for task, _ in programs.backward_tasks(accumulate=False)]
            self._compiler.kernels([*programs.requests(tasks), *self._order.requests(programs.of_pixels)])
            self._plans[key] = programs
        return self._plans[key]

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

    def _logits(self, x: Array) -> Array:
        """A copy of the logits of a batch that a plan can hold."""
        programs = self._ready(x, training=False)
        self._in_order(state=False)
        programs.load(x, self._version)
        weights = self._version, self._statistics
        if programs.prepared != weights:
            if programs.prepare is not None:
                self._team.run(programs.prepare)
            programs.prepared = weights
        self._team.run(programs.infer)
        return programs.logits[: len(x)].copy()

    def _count_batches(self) -> None:
        for name, array in self._params.buffers.items():
            if name.endswith("num_batches_tracked"):
                array[...] += 1
