"""The plan of a step: where the buffers lie, and which tasks run in which order.

A plan is made once for a model and a batch capacity. Every buffer is named here and gets its place, 64-byte aligned,
when all tasks are known (``buffers``). Operations that treat images one by one are chained: a chunk of images passes
through all of them before the next chunk begins, so activations are still in the L2 cache when the next kernel reads
them. Where an operation must see the whole batch (BatchNorm's statistics, dense layers), a new phase begins; ``phases``
says which tasks share one. ``serve`` says which kernels an operation gets.

Where parts are added up, their number depends on the batch capacity alone, never on the number of threads, and they are
added in chunk order: the bits are the same for any number of threads.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convolt.engines.jit.buffers import SCRATCH, SHORT_LIVED, Address, Buffer, lifetimes, share
from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.graph import Operation, Tensor
from convolt.engines.jit.isa import FP32, Isa, Units
from convolt.engines.jit.kernels.specs import ONE, STATE, UpdateSpec
from convolt.engines.jit.phases import Argument, Call, Task, Tasks, between_calls, grouped
from convolt.engines.jit.runtime import Phase, Program
from convolt.errors import ConfigError
from convolt.layers import Dropout
from convolt.params import Params

Array = NDArray[Any]
CHUNKS = 16  # into which a batch is cut
FEW = 4  # chunks of images for each thread, below which predictions cut images
PARTS = 8  # of images for each thread, then
KERNELS = "convolt.engines.jit.kernels"


Segments = list[Program | Call]


@dataclass(frozen=True, eq=False)
class Deferred:
    """A matrix of weights whose gradient and optimizer step are one pass, behind everything else of a step.

    peaks: the largest inputs of each chunk and, last, the largest slope. gradient: the task that makes the gradient
    alone, where the step has to be looked at first. update: the one pass, of the optimizer's spec, the addresses of
    its state for the first of all parameters, and its numbers.
    """

    name: str
    samples: int
    peaks: Array
    gradient: Task
    update: Callable[[UpdateSpec, tuple[int, ...], int], Task]


class DropoutMask(NamedTuple):
    """Where the host writes a dropout layer's mask, (capacity, H, W, C), and what draws it."""

    layer: Dropout
    name: str
    mask: Array


class Plan:
    """Buffers of one model for batches of up to ``capacity`` samples, and what the kernels need to know of it.

    params: arrays the kernels read. grads: arrays they add to, None for prediction. learning: tensors that need a
    gradient. units: what multiplies in bf16. add_ranks: replaces an array by its sum over ranks,
    where BatchNorm's statistics are those of all ranks. fuses_update: whether gradients may be left to the pass that
    moves the weights; they are then ``deferred``.
    """

    def __init__(
        self,
        params: Params,
        grads: Params | None,
        capacity: int,
        isa: Isa,
        threads: int,
        learning: set[Tensor],
        units: Units = FP32,
        add_ranks: Callable[[Array], None] | None = None,
    ) -> None:
        self.add_ranks = add_ranks
        self.params, self.grads, self.isa, self.capacity = params, grads, isa, capacity
        self.units = units
        self.learning = learning
        self.images = -(-capacity // CHUNKS)
        self.chunks = -(-capacity // self.images)
        self.buffers: dict[str, Buffer] = {}
        self.arena = np.zeros(0, np.uint8)
        self.masks: list[DropoutMask] = []
        self.state = self.buffer("state", STATE, np.int64)
        self.state[ONE] = 1
        self.threads = threads
        self.accumulate, self.fuses_update = True, False
        self.deferred: list[Deferred] = []
        self._written: set[Tensor] = set()
        self._slopes: dict[Tensor, Address] = {}

    @property
    def parts(self) -> int:
        """Into how many parts an image may be cut: more than one where few images are predicted on several threads."""
        few = self.threads > 1 and self.chunks < FEW * self.threads
        return 1 if self.training or not few else -(-PARTS * self.threads // self.chunks)

    @property
    def training(self) -> bool:
        """Whether there is a backward pass."""
        return self.grads is not None

    # ------------------------------------------------------------------------------------------------- the buffers

    def _named(self, name: str, size: int, dtype: Any) -> Buffer:
        key = f"{name} {size}"
        if key not in self.buffers:
            self.buffers[key] = Buffer(name, size, dtype)
        return self.buffers[key]

    def buffer(self, name: str, size: int, dtype: Any = np.float32) -> Array:
        """The array of that name and size, zeros at first, with a place of its own: for what the host reads or writes.

        Kernels keep its address.
        """
        return self._named(name, size, dtype).allocate()

    def address(self, name: str, size: int, dtype: Any = np.float32) -> Address:
        """The address of the buffer of that name and size, which may share memory with others."""
        return Address(self._named(name, size, dtype))

    def value(self, tensor: Tensor) -> Address:
        """The address of a tensor: framed images, or features."""
        if tensor.image is not None:
            return self.value(tensor.image)
        kind = np.uint16 if tensor.planar or tensor.half else np.float32
        return self.address(f"value {tensor.name}", self.capacity * tensor.size + tensor.behind, kind)

    def slope(self, tensor: Tensor) -> Address:
        """The address of a tensor's gradient, without a frame."""
        if tensor.image is not None:
            return self.slope(tensor.image)
        kind, size = np.uint16 if tensor.half_slope else np.float32, self.capacity * math.prod(tensor.shape)
        return self._slopes.get(tensor) or self.address(f"slope {tensor.name}", size, kind)

    def put_slope(self, tensor: Tensor, address: Address) -> None:
        """Let a tensor's gradient lie in memory that is free by then."""
        self._slopes[tensor] = address

    def begin_backward(self, accumulate: bool) -> None:
        """Before the tasks of a backward pass are made: whether it adds to the gradients of the parameters."""
        self.accumulate = accumulate
        self.deferred = []
        self._written.clear()

    def begin_slope(self, tensor: Tensor) -> bool:
        """Whether the gradient of a tensor has been written before, so that this one must be added."""
        before = tensor in self._written
        self._written.add(tensor)
        return before

    def twin(self, buffer: Buffer) -> Buffer:
        """A second buffer for what the first one need not keep any more."""
        again = self._named(f"{buffer.name} again", buffer.size, buffer.dtype)
        buffer.short_lived = again.short_lived = True
        return again

    def scratch(self, floats: int) -> Address:
        """Memory of the threads' own, ``floats`` each; kernels that want as much share it, a thread runs one at a time.

        Others must not: it is cut by threads, and another thread may be running another kernel.
        """
        return self.address(SCRATCH, self.threads * floats)

    def parameter(self, operation: Operation, name: str, gradient: bool = False, layer: int = 0) -> int:
        """The address of a parameter, or of its gradient; ``layer``: which of those computed together."""
        arrays = self.grads if gradient and self.grads is not None else self.params
        return address_of(arrays[f"{operation.names[layer]}.{name}"])

    def statistic(self, operation: Operation, name: str, layer: int = 0) -> int:
        """The address of a buffer of the model, such as a running mean."""
        return address_of(self.params.buffers[f"{operation.names[layer]}.{name}"])

    # ------------------------------------------------------------------------------------------------- the program

    def by_image(self, label: str, factory: str, spec: Any, *arguments: Argument) -> Task:
        """A task that treats images one by one."""
        return Task(label, factory, spec, (address_of(self.state), *arguments), self.chunks, by_image=True)

    def whole(
        self, label: str, factory: str, spec: Any, chunks: int, *arguments: Argument, sizes: tuple[int, ...] = ()
    ) -> Task:
        """A task with chunks of its own, behind a barrier."""
        return Task(label, factory, spec, (address_of(self.state), *arguments), chunks, sizes=sizes)

    def lay_out(self, *orders: Iterable[Tasks]) -> None:
        """Give buffers that are never live together the same memory.

        orders: in each of them these lists of tasks may run one after another.
        """
        self.arena = share([lifetimes(_phases(each)) for each in orders])

    def memory(self) -> dict[str, int]:
        """Bytes by kind of all buffers that have a place; what shares memory is one kind."""
        found = {SHORT_LIVED: self.arena.nbytes} if self.arena.nbytes else {}
        for buffer in self.buffers.values():
            if buffer.array is not None and not np.shares_memory(buffer.array, self.arena):
                found[buffer.kind] = found.get(buffer.kind, 0) + buffer.array.nbytes
        return found

    def sum_over_ranks(self, name: str, parts: Array, totals: Array, pixels: int, about_pivots: bool = False) -> Call:
        """Add up the sums of the chunks (chunks, 3, columns), and how many values they are of, over all ranks.

        about_pivots: they are sums and squares of what the third row was taken from; the totals are about zero.
        """

        def add() -> None:
            images = int(self.state[0])
            chunks = -(-images // self.images)
            rows = parts[: chunks * (len(totals) - 1)].reshape(chunks, 3, -1 if chunks else (len(totals) - 1) // 3)
            sums, squares, pivots = rows[:, 0], rows[:, 1], rows[:, 2]
            if about_pivots:
                n = pixels * np.minimum(self.images, images - self.images * np.arange(chunks))[:, None]
                sums, squares = sums + n * pivots, squares + 2 * pivots * sums + n * pivots * pivots
            totals[:-1] = np.concatenate([sums.sum(axis=0), squares.sum(axis=0), np.zeros(rows.shape[2])])
            totals[-1] = images * pixels
            assert self.add_ranks is not None
            self.add_ranks(totals)
            if totals[-1] < 2:
                raise ConfigError(
                    f"layer {name}: BatchNorm2d needs more than one value a channel to train; use a larger batch"
                )

        return Call(f"{name} sum over ranks", add)

    def segments(self, tasks: Tasks, compiler: Compiler) -> Segments:
        """Tasks as programs, cut where the host has something to do."""
        return [part if isinstance(part, Call) else self.program(part, compiler) for part in between_calls(tasks)]

    def program(self, tasks: Iterable[Task], compiler: Compiler) -> Program:
        """Tasks as phases, with kernels, and addresses for all buffers."""
        keep: list[Any] = [self]
        phases = []
        for group in grouped(tasks):
            entries = []
            for task in group:
                kernel = compiler.kernel(f"{KERNELS}.{task.factory}", task.spec)
                resolved = [one.resolve() if isinstance(one, Address) else one for one in task.arguments]
                arguments = np.array([*resolved, *task.sizes], np.int64)
                keep += [kernel, arguments, task]
                entries.append((kernel.address, address_of(arguments)))
            phases.append(Phase(", ".join(task.label for task in group), tuple(entries), group[0].chunks))
        return Program(phases, keep)


def _phases(order: Iterable[Tasks]) -> Iterator[set[Buffer]]:
    """The buffers of each phase when these lists of tasks run one after another."""
    for tasks in order:
        for part in between_calls(tasks):
            for group in grouped(part) if isinstance(part, list) else ():
                yield set[Buffer]().union(*(task.buffers for task in group))


def address_of(array: Array) -> int:
    """Where an array's memory begins."""
    return int(array.__array_interface__["data"][0])  # several times faster than array.ctypes.data
