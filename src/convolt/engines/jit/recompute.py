"""Activation checkpointing: a segment's inner tensors are forgotten after its forward pass and made again for backward.

The operations are cut into segments of about the same memory. What a later segment reads is kept, and so is the whole
last segment, whose backward pass follows at once. A forgotten tensor becomes two buffers, one for each time it is made;
both live shortly, so the plan lets them share memory with others. The tasks that are run again are those of the first
time, on the other buffers: the same kernels on the same numbers give the same bits. Packed weights, dropout masks and
BatchNorm's constants are still there, so no statistic is counted twice. No two segments share a phase, or their inner
tensors would be there at the same time.

Reference: Chen, Xu, Zhang and Guestrin 2016, Training deep nets with sublinear memory cost, arXiv:1604.06174.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from convolt.engines.jit.buffers import Buffer
from convolt.engines.jit.graph import Operation, Tensor
from convolt.engines.jit.kernels.specs import Frame, MapSpec
from convolt.engines.jit.phases import Call, Task, Tasks, without_calls
from convolt.engines.jit.plan import Plan


@dataclass(frozen=True)
class Segment:
    """Operations whose inner tensors are made twice. twins: the second buffer of each buffer that is forgotten.

    number: from 1, which is the first one's.
    """

    number: int
    operations: tuple[Operation, ...]
    forgotten: tuple[Tensor, ...]
    twins: dict[Buffer, Buffer]

    def first(self, plan: Plan, operation: Operation, tasks: Tasks) -> Tasks:
        """The forward tasks of an operation for the first time."""
        borders = _clearing(plan, operation.output) if operation.output in self.forgotten else []
        return [_moved(task, self.number, {}) for task in [*borders, *tasks]]

    def again(self, plan: Plan, forward: Mapping[Operation, Tasks]) -> Tasks:
        """The forward tasks that make what was forgotten, for the second time."""
        borders = [task for tensor in self.forgotten for task in _clearing(plan, tensor)]
        return self.second([*borders, *self._needed([task for one in self.operations for task in forward[one]])])

    def second(self, tasks: Tasks) -> Tasks:
        """Tasks, of forward or backward, on the buffers of the second time."""
        return [_moved(task, -self.number, self.twins) for task in tasks]

    def _needed(self, forward: Tasks) -> Tasks:
        """The forward tasks that make what was forgotten, and what they need on the way.

        A task that names no tensor works on weights or statistics: what it made is still there, and so are the tensors
        that are not forgotten, unless gradients have taken their place.
        """
        tasks = without_calls(forward)
        first: dict[Buffer, Task] = {}
        for task in tasks:
            for buffer in task.buffers:
                first.setdefault(buffer, task)
        wanted, found = set(self.twins), []
        for task in reversed(tasks):
            of_tensors = any(map(_is_value, task.buffers))
            if of_tensors and any(first[buffer] is task for buffer in wanted & task.buffers):
                wanted |= {buffer for buffer in task.buffers if buffer in self.twins or not _is_value(buffer)}
                found.append(task)
        return found[::-1]


def cut(plan: Plan, operations: Sequence[Operation], count: int) -> list[Segment]:
    """At most ``count`` runs of operations whose outputs take about the same memory; the last one forgets nothing."""
    if count < 2:
        return []
    total = sum(operation.output.nbytes for operation in operations)
    runs: list[list[Operation]] = [[] for _ in range(count)]
    before = 0
    for operation in operations:
        runs[min(count * before // total, count - 1)].append(operation)
        before += operation.output.nbytes
    return [_forget(plan, number, run, operations) for number, run in enumerate([run for run in runs if run][:-1], 1)]


def _forget(plan: Plan, number: int, run: Sequence[Operation], everything: Sequence[Operation]) -> Segment:
    elsewhere = {tensor for operation in everything if operation not in run for tensor in operation.inputs}
    forgotten = [operation.output for operation in run if operation.output not in elsewhere]
    buffers = [plan.value(tensor).buffer for tensor in forgotten]
    codes = {f"codes {operation.names[0]}" for operation in run if operation.output in forgotten}
    buffers += [buffer for buffer in plan.buffers.values() if buffer.name in codes]
    return Segment(number, tuple(run), tuple(forgotten), {buffer: plan.twin(buffer) for buffer in buffers})


def _moved(task: Task | Call, section: int, others: Mapping[Buffer, Buffer]) -> Task | Call:
    return task.moved(section, others) if isinstance(task, Task) else task


def _is_value(buffer: Buffer) -> bool:
    return buffer.name.startswith("value ")


def _clearing(plan: Plan, tensor: Tensor) -> list[Task]:
    """Zeros around the images of a tensor whose memory was another's; kernels write inside alone."""
    if not any(tensor.border):
        return []
    frame = Frame.of(tensor)
    spec = MapSpec("border", frame, frame, plan.images, plan.isa.lanes)
    return [plan.by_image(f"{tensor.name} border", "borders:clear", spec, plan.value(tensor))]
