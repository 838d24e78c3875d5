"""The laws of scaling: what a speedup is, what bounds it, and what a measured one says about the serial part.

T_1 is the time of the best serial program, T_p that of p workers (cores: ranks times threads). All fractions here are
parts of T_1 or of T_p as the law says, and none is clipped: a negative serial fraction is a speedup beyond p, which
happens when p caches hold what one did not, and a reader must see it.

References: Amdahl 1967, Validity of the single processor approach (AFIPS 30, 483-485). Gustafson 1988, Reevaluating
Amdahl's law (CACM 31(5), 532-533). Karp and Flatt 1990, Measuring parallel processor performance (CACM 33(5), 539-543).
"""

from collections.abc import Sequence

from convolt.errors import ConfigError


def speedup(serial_seconds: float, parallel_seconds: float) -> float:
    """``S = T_1 / T_p``. Raises ConfigError unless both times are positive."""
    if not (serial_seconds > 0 and parallel_seconds > 0):
        raise ConfigError(f"a speedup needs two positive times; got {serial_seconds} and {parallel_seconds}")
    return serial_seconds / parallel_seconds


def efficiency(speedup: float, workers: int) -> float:
    """``E = S / p``: the part of p workers that did what one did before."""
    return speedup / _at_least_one(workers)


def amdahl(serial_fraction: float, workers: int) -> float:
    """``S(p) = 1 / (f + (1 - f) / p)`` for a fixed problem, f the serial part of T_1 (Amdahl 1967)."""
    return 1 / (serial_fraction + (1 - serial_fraction) / _at_least_one(workers))


def gustafson(serial_fraction: float, workers: int) -> float:
    """``S(p) = p - f (p - 1)`` for a problem that grows with p, f the serial part of T_p (Gustafson 1988)."""
    return _at_least_one(workers) - serial_fraction * (workers - 1)


def karp_flatt(speedup: float, workers: int) -> float:
    """``e = (1 / S - 1 / p) / (1 - 1 / p)``: the serial fraction that one measured speedup stands for.

    A fraction that grows with p is overhead (communication, waiting); one that stays is serial work.
    Raises ConfigError for fewer than 2 workers. Reference: Karp and Flatt 1990, eq. 2.
    """
    if workers < 2:
        raise ConfigError(f"the Karp-Flatt metric needs at least 2 workers; got {workers}")
    return (1 / speedup - 1 / workers) / (1 - 1 / workers)


def fit_amdahl(workers: Sequence[int], speedups: Sequence[float]) -> float:
    """The serial fraction f whose ``1 / S(p)`` is nearest to the measured ones, by least squares.

    Amdahl's law is linear in f for times: with ``x = 1 - 1/p`` and ``y = 1/S - 1/p`` it says ``y = f x``, so

        f = sum x y / sum x^2

    Raises ConfigError without a measurement on 2 workers or more.
    """
    pairs = _pairs(workers, speedups)
    return _through_origin([(1 - 1 / p, 1 / s - 1 / p) for p, s in pairs])


def fit_gustafson(workers: Sequence[int], speedups: Sequence[float]) -> float:
    """The serial fraction f whose scaled speedups are nearest to the measured ones, by least squares.

    With ``x = p - 1`` and ``y = p - S`` Gustafson's law says ``y = f x``. Raises ConfigError as ``fit_amdahl`` does.
    """
    return _through_origin([(p - 1, p - s) for p, s in _pairs(workers, speedups)])


def _pairs(workers: Sequence[int], speedups: Sequence[float]) -> list[tuple[int, float]]:
    """What says something about the serial part: measurements on more than one worker."""
    if len(workers) != len(speedups):
        raise ConfigError(f"a fit needs one speedup for each number of workers; got {len(speedups)}, {len(workers)}")
    pairs = [(p, s) for p, s in zip(workers, speedups, strict=True) if p > 1]
    if not pairs:
        raise ConfigError("a serial fraction needs a speedup on at least 2 workers; none was measured")
    return pairs


def _through_origin(points: Sequence[tuple[float, float]]) -> float:
    """The slope f of the line ``y = f x`` with the least sum of squares."""
    return sum(x * y for x, y in points) / sum(x * x for x, _ in points)


def _at_least_one(workers: int) -> int:
    if workers < 1:
        raise ConfigError(f"workers must be at least 1; got {workers}")
    return workers
