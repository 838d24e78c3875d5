"""Medians and their intervals: what a measurement on a shared machine can honestly claim.

Times have a floor and a long tail, so a mean says little and a standard error less. Everything here rests on order
alone: no distribution is assumed, one wild value moves nothing, and there is no random number in it.

Of n independent values, sorted as x_1 <= ... <= x_n, each lies below the true median m with probability 1/2, so

    P(x_k <= m <= x_{n+1-k}) = 1 - 2 P(B <= k - 1),   B ~ Binomial(n, 1/2)

The interval has the largest k that keeps this at the confidence asked for. With fewer than 6 values not even the whole
range reaches 95 %; the interval is then the range, and ``coverage`` says what it is worth.

Reference: Conover 1999, Practical Nonparametric Statistics, 3.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from convolt.errors import ConfigError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """The median of ``n`` values, and an interval that holds the true one with probability ``coverage``."""

    median: float
    low: float
    high: float
    coverage: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The median of independent values with its distribution-free interval. Raises ConfigError without values."""
    if not values:
        raise ConfigError("a median needs at least one value; got none")
    ordered, n = sorted(values), len(values)
    k = 1
    while 2 * (k + 1) <= n and _coverage(n, k + 1) >= confidence:
        k += 1
    return Estimate(median(ordered), ordered[k - 1], ordered[n - k], _coverage(n, k), n)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """The median of ``a_i / b_i``. Both were measured in round i, so what slowed that round down cancels.

    Raises ConfigError unless there are as many of one as of the other.
    """
    if len(numerators) != len(denominators):
        raise ConfigError(f"pairs need equally many values; got {len(numerators)} and {len(denominators)}")
    return estimate([a / b for a, b in zip(numerators, denominators, strict=True)])


def _coverage(n: int, k: int) -> float:
    """``1 - 2 P(Binomial(n, 1/2) <= k - 1)``, never below 0 (one value covers nothing)."""
    below: int = sum(math.comb(n, i) for i in range(k))
    return max(0.0, 1 - 2 * below / 2**n)
