"""Time in training, and lengths of it.

A length carries its unit, because 30 may mean epochs to the one who writes it and batches to the one who reads it:

    "10ep"     epochs
    "500ba"    batches, that is steps of the optimizer
    "0.3dur"   a part of the whole run

``Time`` is where a run stands. Schedules, and everything else that changes during training, are pure functions of it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from convolt.checks import check
from convolt.errors import ConfigError

LENGTH = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(ep|ba|dur)")
HOW_TO = "be a length with a unit, such as '10ep' (epochs), '500ba' (batches) or '0.3dur' (part of the run)"


@dataclass(frozen=True)
class Time:
    """Where a run stands, before a step or after ``step`` of them.

    step: steps done, 0 before the first. metrics: what ``Plateau`` watches, one value for each epoch done.
    """

    step: int
    steps_per_epoch: int
    total_steps: int
    metrics: Sequence[float] = ()

    def __post_init__(self) -> None:
        check(self, "steps_per_epoch", self.steps_per_epoch >= 1, "be >= 1")
        check(self, "step", self.step >= 0, "be >= 0")

    @property
    def epoch(self) -> float:
        """Epochs done, with their fraction."""
        return self.step / self.steps_per_epoch

    @property
    def progress(self) -> float:
        """The part of the run that is done, in [0, 1]."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 1.0


def length(text: str, time: Time) -> int:
    """A length in steps, rounded half up to whole ones.

    The arithmetic is exact: "0.7dur" of 10 steps is 7, where 0.7 * 10 rounded down as floats may not be.
    Raises ConfigError.

    >>> length("2ep", Time(step=0, steps_per_epoch=469, total_steps=4690))
    938
    """
    number, unit = _parse(text)
    steps = {"ba": 1, "ep": time.steps_per_epoch, "dur": time.total_steps}[unit]
    return _nearest(number, steps)


@lru_cache
def _nearest(number: Fraction, steps: int) -> int:
    return int(number * steps + Fraction(1, 2))


def period(text: str, time: Time) -> int:
    """A length to divide by: ``length``, but at least one step, however short the run is."""
    return max(1, length(text, time))


def due(every: str, time: Time) -> bool:
    """Whether ``time.step`` is a multiple of the length, and not 0: for what happens after every so many steps."""
    return time.step > 0 and time.step % period(every, time) == 0


def check_length(config: object, field: str, *, positive: bool = False) -> None:
    """Raise ConfigError unless the field is a length, and longer than nothing if ``positive``."""
    value = getattr(config, field)
    check(config, field, is_length(value), HOW_TO)
    check(config, field, not positive or _parse(value)[0] > 0, "be longer than 0")


def is_length(value: object) -> bool:
    """Whether a value is a length with its unit."""
    return isinstance(value, str) and LENGTH.fullmatch(value) is not None


@lru_cache  # of strings: schedules ask for the same few lengths at every step
def _parse(text: str) -> tuple[Fraction, str]:
    found = LENGTH.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ConfigError(f"a length must {HOW_TO}; got {text!r}")
    return Fraction(found[1]), found[2]
