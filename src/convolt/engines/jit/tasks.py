"""Tasks: kernels at their places in a plan."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from convolt.engines.jit.buffers import Address, Buffer

SCRATCH = "scratch"
"""The buffer that holds nothing from one kernel to the next."""

Argument = Address | int


@dataclass(frozen=True, eq=False)
class Task:
    """A kernel and its arguments, the first of which is the plan's state.

    by_image: its chunks are runs of images, so it can share a phase.
    """

    label: str
    factory: str
    spec: Any
    arguments: tuple[Argument, ...]
    chunks: int
    by_image: bool = False

    @cached_property
    def names(self) -> frozenset[Buffer | int]:
        """The memory that it names and that outlives it: who shares some of it keeps the order."""
        found = (one.buffer if isinstance(one, Address) else one for one in self.arguments[1:])
        return frozenset(one for one in found if one and not (isinstance(one, Buffer) and one.name == SCRATCH))

    @property
    def buffers(self) -> set[Buffer]:
        """The buffers among its arguments."""
        return {one.buffer for one in self.arguments if isinstance(one, Address)}

    def renamed(self, others: Mapping[Buffer, Buffer]) -> "Task":
        """The same kernel on other buffers."""
        arguments = tuple(
            Address(others.get(one.buffer, one.buffer), one.offset) if isinstance(one, Address) else one
            for one in self.arguments
        )
        return replace(self, arguments=arguments)


Tasks = list[Task]
Served = tuple[Tasks, Callable[[], Tasks]]  # forward, and what makes the backward tasks
