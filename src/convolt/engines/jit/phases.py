"""Which tasks share a phase: those by image that follow one another, so that a chunk of images stays in the L2 cache.

What stands between two of them (packing filters, adding up parts of a gradient) and touches neither moves before or
behind both. Tasks that have no buffer in common may change places: all that a kernel reads or writes it is given by
address.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """A kernel at its place in the plan. by_image: its chunks are runs of images, so it can share a phase."""

    label: str
    factory: str
    spec: Any
    arguments: tuple[int, ...]
    chunks: int
    by_image: bool = False

    def touches(self, other: "Task") -> bool:
        """Whether they have a buffer in common, besides the first one, which is everybody's."""
        return not set(self.arguments[1:]).isdisjoint({*other.arguments[1:]} - {0})


@dataclass(frozen=True)
class Call:
    """Something that the host does between two kernels."""

    label: str
    function: Callable[[], None]


Tasks = Sequence[Task | Call]


def grouped(tasks: Iterable[Task]) -> list[list[Task]]:
    """The tasks of each phase, in order."""
    groups: list[list[Task]] = []
    for task in tasks:
        home = max((i for i, group in enumerate(groups) if group[0].by_image), default=None)
        if home is not None and task.by_image and task.chunks == groups[home][0].chunks:
            between = groups[home + 1 :]
            before = [group for group in between if group[0].touches(task)]
            if _may_lead(before, groups[home], between):
                behind = [group for group in between if group not in before]
                groups[home:] = [*before, [*groups[home], task], *behind]
                continue
        groups.append([task])
    return groups


def _may_lead(before: list[list[Task]], home: list[Task], between: list[list[Task]]) -> bool:
    """Whether these of the tasks that stand behind ``home`` can stand in front of it and of the others."""
    others = [task for (task,) in between if [task] not in before]
    return not any(task.touches(other) for (task,) in before for other in [*home, *others])
