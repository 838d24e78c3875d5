"""What a configuration field must hold, checked when its dataclass is built.

One place for the wording: ``SGD: lr must be >= 0; got -1``. The first word is the class, the second the field, so the
message points at the key in a recipe file as well as at the argument in Python.
"""

import math
from collections.abc import Iterable
from numbers import Integral, Real

from convolt.errors import ConfigError, nearest


def check(config: object, field: str, holds: bool, constraint: str) -> None:
    """Raise ConfigError unless ``holds``: '<class>: <field> must <constraint>; got <value>'."""
    if not holds:
        raise ConfigError(f"{type(config).__name__}: {field} must {constraint}; got {getattr(config, field)!r}")


def check_number(
    config: object,
    field: str,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise ConfigError unless the field is a finite number between the bounds given.

    NumPy's numbers become Python's: a float64 scalar would turn float32 arrays into float64 ones.
    """
    value = getattr(config, field)
    within = type(value) in (int, float) and at_least <= value <= at_most and above < value < below
    if within and math.isfinite(value):  # at once: an optimizer is built for each step
        return
    bounds = _bounds(at_least, above, at_most, below)
    is_number = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    check(config, field, is_number, f"be a finite number{' ' if bounds else ''}{bounds}")
    check(config, field, at_least <= value <= at_most and above < value < below, f"be {bounds}")
    if type(value) not in (int, float):
        object.__setattr__(config, field, float(value))


def check_integer(config: object, field: str, *, at_least: int) -> None:
    """Raise ConfigError unless the field is an integer that is large enough."""
    value = getattr(config, field)
    is_integer = not isinstance(value, bool) and isinstance(value, Integral)
    check(config, field, is_integer and value >= at_least, f"be an integer >= {at_least}")


def check_flag(config: object, field: str) -> None:
    """Raise ConfigError unless the field is True or False."""
    check(config, field, isinstance(getattr(config, field), bool), "be true or false")


def check_choice(config: object, field: str, choices: Iterable[str]) -> None:
    """Raise ConfigError unless the field is one of the words."""
    choices, value = tuple(choices), getattr(config, field)
    if value not in choices:
        raise ConfigError(f"{type(config).__name__}: {field} got {value!r}; {nearest(str(value), choices)}")


def _bounds(at_least: float, above: float, at_most: float, below: float) -> str:
    given = ((">=", at_least), (">", above), ("<=", at_most), ("<", below))
    return " and ".join(f"{sign} {bound:g}" for sign, bound in given if math.isfinite(bound))
