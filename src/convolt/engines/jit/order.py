"""The order of a plan's tasks: as few phases as their dependencies allow.

Two tasks that name the same memory keep their order; others may pass each other. So filters are packed before the first
image is unpacked, and parts of a gradient are added up when all convolutions are done; between them a chunk of images
passes through all the convolutions, and what one writes is still in the L2 cache when the next one reads it.
"""

from collections.abc import Iterable, Sequence

from convolt.engines.jit.buffers import Buffer
from convolt.engines.jit.tasks import Task


class Group:
    """A phase to be: tasks, and all memory they name."""

    def __init__(self, *tasks: Task) -> None:
        self.tasks = list(tasks)
        self.names = frozenset[Buffer | int]().union(*(task.names for task in tasks))
        self.by_image = tasks[0].by_image

    def add(self, task: Task) -> None:
        """One more task for every chunk."""
        self.tasks.append(task)
        self.names |= task.names

    @property
    def buffers(self) -> set[Buffer]:
        """The buffers among the memory."""
        return {name for name in self.names if isinstance(name, Buffer)}


def in_turn(tasks: Iterable[Task]) -> list[Group]:
    """The phases of tasks in the order they are in: successive ones by image share a phase."""
    groups: list[Group] = []
    for task in tasks:
        if groups and task.by_image and groups[-1].by_image:
            groups[-1].add(task)
        else:
            groups.append(Group(task))
    return groups


def arranged(tasks: Sequence[Task]) -> list[Group]:
    """The same tasks in fewer phases, each as early as it may be."""
    groups: list[Group] = []
    for task in tasks:
        last = max((i for i, group in enumerate(groups) if group.names & task.names), default=-1)
        if not task.by_image:
            groups.insert(last + 1, Group(task))
            continue
        open_to = [i for i in range(max(last, 0), len(groups)) if groups[i].by_image]
        if open_to:
            groups[open_to[0]].add(task)
        else:
            groups.append(Group(task))
    return groups


def restricted(groups: Iterable[Group], tasks: Iterable[Task]) -> list[Group]:
    """The groups with some of their tasks alone."""
    wanted = set(tasks)
    kept = ([task for task in group.tasks if task in wanted] for group in groups)
    return [Group(*found) for found in kept if found]
