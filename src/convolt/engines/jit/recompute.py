"""Activation checkpointing: a segment's inner tensors are forgotten after its forward pass and made again for backward.

The operations are cut into segments of about the same memory. What a later segment reads is kept, and so is the whole
last segment, whose backward pass follows at once. A forgotten tensor becomes two buffers, one for each time it is made;
both live shortly, so the plan lets them share memory with others. The tasks that are run again are those of the first
time, on the other buffers: the same kernels on the same numbers give the same bits. Packed weights, dropout masks and
BatchNorm's constants are still there, so no statistic is counted twice.

Reference: Chen, Xu, Zhang and Guestrin 2016, Training deep nets with sublinear memory cost, arXiv:1604.06174.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from convolt.engines.jit.buffers import Buffer
from convolt.engines.jit.graph import Operation, Tensor
from convolt.engines.jit.kernels.specs import BorderSpec, Frame
from convolt.engines.jit.plan import Plan
from convolt.engines.jit.tasks import Task, Tasks


@dataclass(frozen=True)
class Segment:
    """Operations whose inner tensors are made twice. again: the second buffer of each buffer that is forgotten."""

    operations: tuple[Operation, ...]
    forgotten: tuple[Tensor, ...]
    again: dict[Buffer, Buffer]

    def second(self, tasks: Tasks) -> Tasks:
        """The tasks, of forward or backward, on the buffers of the second time."""
        return [task.renamed(self.again) for task in tasks]


def cut(operations: Sequence[Operation], count: int) -> list[list[Operation]]:
    """At most ``count`` runs of operations whose outputs take about the same memory."""
    total = sum(operation.output.size for operation in operations)
    runs: list[list[Operation]] = [[] for _ in range(count)]
    before = 0
    for operation in operations:
        runs[min(count * before // total, count - 1)].append(operation)
        before += operation.output.size
    return [run for run in runs if run]


def forget(plan: Plan, run: Sequence[Operation], everything: Sequence[Operation], forward: Tasks) -> Segment:
    """The segment of a run of operations. forward: its tasks."""
    elsewhere = {tensor for operation in everything if operation not in run for tensor in operation.inputs}
    forgotten = [operation.output for operation in run if operation.output not in elsewhere]
    buffers = [plan.value(tensor).buffer for tensor in forgotten]
    kept_codes = {f"codes {operation.names[0]}" for operation in run if operation.output in elsewhere}
    held = {buffer for task in forward for buffer in task.buffers if buffer.kind == "codes" and buffer.array is None}
    buffers += sorted((one for one in held if one.name not in kept_codes), key=lambda one: one.name)
    again = {buffer: plan.twin(buffer) for buffer in buffers}
    return Segment(tuple(run), tuple(forgotten), again)


def needed_again(segment: Segment, forward: Tasks) -> Tasks:
    """The forward tasks that make what was forgotten, and what they need on the way.

    A task that names no tensor works on weights or statistics: what it made is still there.
    """
    first: dict[Buffer, Task] = {}
    for task in forward:
        for buffer in task.buffers:
            first.setdefault(buffer, task)
    wanted, found = set(segment.again), []
    for task in reversed(forward):
        of_tensors = any(buffer.name.startswith("value ") for buffer in task.buffers)
        if of_tensors and any(first[buffer] is task for buffer in wanted & task.buffers):
            wanted |= task.buffers
            found.append(task)
    return found[::-1]


def clearing(plan: Plan, tensor: Tensor) -> Tasks:
    """Zeros around the images of a tensor whose memory was another's; kernels write inside alone."""
    if not any(tensor.border):
        return []
    spec = BorderSpec(Frame.of(tensor), plan.images)
    return [plan.by_image(f"{tensor.name} border", "borders:clear", spec, plan.value(tensor))]
