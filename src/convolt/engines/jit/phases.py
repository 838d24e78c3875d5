"""Tasks, and which of them share a phase: those by image that follow one another, so a chunk stays in the L2 cache.

What stands between two of them (packing filters, adding up parts of a gradient) and touches neither moves before or
behind both. Tasks that name no memory in common may change places: all that a kernel reads or writes it is given by
address.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from convolt.engines.jit.buffers import SCRATCH, Address, Buffer

Argument = Address | int


@dataclass(frozen=True, eq=False)
class Task:
    """A kernel at its place in the plan, and its arguments, the first of which is the plan's state.

    by_image: its chunks are runs of images, so it can share a phase. section: with others of the same section. sizes:
    numbers that stand behind the addresses, for kernels that serve all sizes.
    """

    label: str
    factory: str
    spec: Any
    arguments: tuple[Argument, ...]
    chunks: int
    by_image: bool = False
    section: int = 0
    sizes: tuple[int, ...] = ()

    @cached_property
    def names(self) -> frozenset[Buffer | int]:
        """The memory that it names and that outlives it."""
        found = (one.buffer if isinstance(one, Address) else one for one in self.arguments[1:])
        return frozenset(one for one in found if one and not (isinstance(one, Buffer) and one.name == SCRATCH))

    @property
    def buffers(self) -> set[Buffer]:
        """The buffers among it."""
        return {one for one in self.names if isinstance(one, Buffer)}

    def touches(self, other: "Task") -> bool:
        """Whether they have memory in common, besides the state, which is everybody's."""
        return not self.names.isdisjoint(other.names)

    def moved(self, section: int, others: Mapping[Buffer, Buffer]) -> "Task":
        """The same kernel in a section, on other buffers."""
        arguments = tuple(
            Address(others.get(one.buffer, one.buffer), one.offset) if isinstance(one, Address) else one
            for one in self.arguments
        )
        return replace(self, arguments=arguments, section=section)


@dataclass(frozen=True)
class Call:
    """Something that the host does between two kernels."""

    label: str
    function: Callable[[], None]


Tasks = Sequence[Task | Call]
Served = tuple[Tasks, Callable[[], Tasks]]  # forward, and what makes the backward tasks


def without_calls(tasks: Tasks) -> list[Task]:
    """The tasks among which the host has nothing to do."""
    return [task for task in tasks if isinstance(task, Task)]


def between_calls(tasks: Tasks) -> list[list[Task] | Call]:
    """The calls of the host, and the tasks before, between and behind them."""
    found: list[list[Task] | Call] = []
    for task in tasks:
        if isinstance(task, Call):
            found.append(task)
        elif found and isinstance(found[-1], list):
            found[-1].append(task)
        else:
            found.append([task])
    return found


def grouped(tasks: Iterable[Task]) -> list[list[Task]]:
    """The tasks of each phase, in order."""
    groups: list[list[Task]] = []
    for task in tasks:
        home = max((i for i, group in enumerate(groups) if group[0].by_image), default=None)
        if home is not None and task.by_image and _alike(task, groups[home][0]):
            between = groups[home + 1 :]
            before = [group for group in between if group[0].touches(task)]
            if _may_lead(before, groups[home], between):
                behind = [group for group in between if group not in before]
                groups[home:] = [*before, [*groups[home], task], *behind]
                continue
        groups.append([task])
    return groups


def _alike(one: Task, other: Task) -> bool:
    return (one.chunks, one.section) == (other.chunks, other.section)


def _may_lead(before: list[list[Task]], home: list[Task], between: list[list[Task]]) -> bool:
    """Whether these of the tasks that stand behind ``home`` can stand in front of it and of the others."""
    others = [task for (task,) in between if [task] not in before]
    return not any(task.touches(other) for (task,) in before for other in [*home, *others])
