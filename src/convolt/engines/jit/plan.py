"""The plan of a step: where the buffers lie, and which tasks run in which order.

A plan is made once for a model and a batch capacity. Every buffer is named here and gets its place, 64-byte aligned,
when all tasks are known (``buffers``). Operations that treat images one by one are chained: a chunk of images passes
through all of them before the next chunk begins, so activations are still in the L2 cache when the next kernel reads
them. Where an operation must see the whole batch (BatchNorm's statistics, dense layers), a new phase begins; ``order``
finds as few phases as dependencies allow. ``serve`` says which kernels an operation gets.

The number of chunks depends on the batch capacity alone, never on the number of threads, and parts are added in chunk
order: the bits are the same for any number of threads.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convolt.engines.jit.buffers import SHORT_LIVED, Address, Buffer, lifetimes, share
from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.graph import Operation, Tensor
from convolt.engines.jit.isa import Isa
from convolt.engines.jit.kernels.specs import UpdateSpec
from convolt.engines.jit.order import Group
from convolt.engines.jit.runtime import Phase, Program
from convolt.engines.jit.tasks import SCRATCH, Argument, Task
from convolt.layers import Dropout
from convolt.params import Params

Array = NDArray[Any]
CHUNKS = 16  # into which a batch is cut
KERNELS = "convolt.engines.jit.kernels"


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

    @property
    def bound(self) -> float:
        """What no element of the gradient can exceed; NaN if an operand was."""
        return float(self.samples * self.peaks[:-1].max() * self.peaks[-1])


class DropoutMask(NamedTuple):
    """Where the host writes a dropout layer's mask, (capacity, H, W, C), and what draws it."""

    layer: Dropout
    name: str
    mask: Array


class Plan:
    """Buffers of one model for batches of up to ``capacity`` samples, and what the kernels need to know of it.

    params: arrays the kernels read. grads: arrays they add to, None for prediction. learning: tensors that need a
    gradient. tiles: whether products run in bf16 on AMX tiles.
    """

    def __init__(
        self,
        params: Params,
        grads: Params | None,
        capacity: int,
        isa: Isa,
        threads: int,
        learning: set[Tensor],
        tiles: bool = False,
    ) -> None:
        self.params, self.grads, self.isa, self.capacity = params, grads, isa, capacity
        self.tiles = tiles
        self.learning = learning
        self.images = -(-capacity // CHUNKS)
        self.chunks = -(-capacity // self.images)
        self.buffers: dict[str, Buffer] = {}
        self.arena = np.zeros(0, np.uint8)
        self.masks: list[DropoutMask] = []
        self.state = self.buffer("state", 8, np.int64)
        self._threads = threads
        self.accumulate, self.fuses_update = True, False
        self.deferred: list[Deferred] = []
        self._written: set[Tensor] = set()

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
        kind = np.uint16 if tensor.planar or tensor.half else np.float32
        return self.address(f"value {tensor.name}", self.capacity * tensor.size, kind)

    def slope(self, tensor: Tensor) -> Address:
        """The address of a tensor's gradient, without a frame."""
        return self.address(f"slope {tensor.name}", self.capacity * math.prod(tensor.shape))

    def begin_backward(self, accumulate: bool, fuses_update: bool = False) -> None:
        """Before the tasks of a backward pass are made: whether it adds to the gradients of the parameters.

        fuses_update: whether gradients may be left to the pass that moves the weights; they are then ``deferred``.
        """
        self.accumulate, self.fuses_update = accumulate, fuses_update
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
        return self.address(SCRATCH, self._threads * floats)

    def parameter(self, operation: Operation, name: str, gradient: bool = False) -> int:
        """The address of a parameter, or of its gradient."""
        arrays = self.grads if gradient and self.grads is not None else self.params
        return address_of(arrays[f"{operation.names[0]}.{name}"])

    def statistic(self, operation: Operation, name: str) -> int:
        """The address of a buffer of the model, such as a running mean."""
        return address_of(self.params.buffers[f"{operation.names[0]}.{name}"])

    # ------------------------------------------------------------------------------------------------- the program

    def by_image(self, label: str, factory: str, spec: Any, *arguments: Argument) -> Task:
        """A task that treats images one by one."""
        return Task(label, factory, spec, (address_of(self.state), *arguments), self.chunks, by_image=True)

    def whole(self, label: str, factory: str, spec: Any, chunks: int, *arguments: Argument) -> Task:
        """A task with chunks of its own, behind a barrier."""
        return Task(label, factory, spec, (address_of(self.state), *arguments), chunks)

    def lay_out(self, *orders: Iterable[Group]) -> None:
        """Give buffers that are never live together the same memory; ``orders`` are those in which they may run."""
        self.arena = share([lifetimes(group.buffers for group in order) for order in orders])

    def memory(self) -> dict[str, int]:
        """Bytes by kind of all buffers that have a place; what shares memory is one kind."""
        found = {SHORT_LIVED: self.arena.nbytes} if self.arena.nbytes else {}
        for buffer in self.buffers.values():
            if buffer.array is not None and not np.shares_memory(buffer.array, self.arena):
                found[buffer.kind] = found.get(buffer.kind, 0) + buffer.array.nbytes
        return found

    def program(self, groups: Iterable[Group], compiler: Compiler) -> Program:
        """Groups as phases, with kernels, and addresses for all buffers."""
        phases: list[Phase] = []
        keep: list[Any] = [self]
        for group in groups:
            entries = []
            for task in group.tasks:
                kernel = compiler.kernel(f"{KERNELS}.{task.factory}", task.spec)
                resolved = [one.resolve() if isinstance(one, Address) else one for one in task.arguments]
                arguments = np.array(resolved, np.int64)
                keep += [kernel, arguments]
                entries.append((kernel.address, address_of(arguments)))
            phases.append(Phase(", ".join(task.label for task in group.tasks), tuple(entries), group.tasks[0].chunks))
        return Program(phases, keep)


def address_of(array: Array) -> int:
    """Where an array's memory begins."""
    return int(array.ctypes.data)
