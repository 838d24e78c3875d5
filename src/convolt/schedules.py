"""Schedules: the value of a hyperparameter as a pure function of time.

``schedule(base, time)`` is the value for the step that follows ``time.step`` steps; ``base`` is the optimizer's own
value. There is no state: step 700 of a resumed run has the learning rate of step 700, and a schedule can be plotted
before anything is trained. A schedule serves any number, the momentum as well as the learning rate.

Names, defaults and values are PyTorch's, whose schedulers count in ``scheduler.step()`` calls, here one for each
batch. Where this file differs, and why:

    lengths        carry their unit: PyTorch's ``step_size=30`` is "30ba" if it steps each batch, "30ep" each epoch
    Cosine         T_max is the whole run; ``CosineCyclic`` has a T_max of its own and climbs back after it
    Exponential    gamma is for one ``every`` and acts in between; PyTorch's is for one step, that is every="1ba"
    Linear         falls from 1 to 0 over the run; PyTorch's default rises from 1/3 to 1 in five steps
    OneCycle       max_lr may be left out, the optimizer's lr is then the peak; it sets one hyperparameter, and the
                   momentum is cycled by a second schedule (see its docstring)
    Triangular     is CyclicLR; the optimizer's lr is the peak unless max_lr is given, and base_lr is 0 unless given
    Warmup         is SequentialLR of LinearLR and ``then``, whose run begins after the warm-up and is shorter by it
    Plateau        names what it monitors, which tells whether less or more is better (PyTorch's ``mode``); the
                   threshold is relative; reductions below PyTorch's ``eps`` are made too
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Protocol, TypedDict

from convolt.checks import check, check_choice, check_flag, check_integer, check_number
from convolt.duration import HOW_TO, Time, check_length, is_length, length, period
from convolt.errors import ConfigError
from convolt.metrics import HIGHER_IS_BETTER, MONITORS


class Schedule(Protocol):
    """``schedule(base, time) -> value``."""

    def __call__(self, base: float, time: Time) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The base value throughout."""

    def __call__(self, base: float, time: Time) -> float:
        return base


@dataclass(frozen=True)
class Step:
    """Multiplied by gamma after every ``step_size``: base gamma^floor(t / step_size)."""

    step_size: str = "30ep"
    gamma: float = 0.1

    def __post_init__(self) -> None:
        check_length(self, "step_size", positive=True)
        check_number(self, "gamma", at_least=0)

    def __call__(self, base: float, time: Time) -> float:
        return base * self.gamma ** (time.step // period(self.step_size, time))


@dataclass(frozen=True)
class MultiStep:
    """Multiplied by gamma at each milestone: base gamma^(milestones reached)."""

    milestones: tuple[str, ...] = ("30ep", "60ep")
    gamma: float = 0.1

    def __post_init__(self) -> None:
        many = isinstance(self.milestones, tuple | list)
        check(self, "milestones", many and all(map(is_length, self.milestones)), f"each {HOW_TO}")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        check_number(self, "gamma", at_least=0)

    def __call__(self, base: float, time: Time) -> float:
        reached = sum(length(milestone, time) <= time.step for milestone in self.milestones)
        return base * self.gamma**reached


@dataclass(frozen=True)
class Piecewise:
    """Factors of the base at given times, straight lines between them, constant before and after.

    points: (length, factor) pairs in order of time. With ``interpolate=False`` a factor holds until the next point.
    Raises ConfigError when the points are out of order.
    """

    points: tuple[tuple[str, float], ...] = (("0ba", 1.0), ("1dur", 0.0))
    interpolate: bool = True

    def __post_init__(self) -> None:
        many = isinstance(self.points, tuple | list) and len(self.points) > 0
        pairs = many and all(isinstance(point, tuple | list) and len(point) == 2 for point in self.points)
        good = pairs and all(is_length(at) and isinstance(factor, int | float) for at, factor in self.points)
        check(self, "points", good, "be pairs of a length and a factor, such as (('0ba', 0.1), ('5ep', 1.0))")
        object.__setattr__(self, "points", tuple((at, float(factor)) for at, factor in self.points))
        check_flag(self, "interpolate")

    def __call__(self, base: float, time: Time) -> float:
        steps = [length(at, time) for at, _ in self.points]
        if steps != sorted(steps):
            raise ConfigError(f"Piecewise: points must be in order of time; got {self.points}, at steps {steps}")
        after = bisect.bisect_right(steps, time.step)
        start, end = max(after - 1, 0), min(after, len(steps) - 1)
        if not self.interpolate or steps[start] == steps[end]:
            return base * self.points[start][1]
        part = (time.step - steps[start]) / (steps[end] - steps[start])
        return base * _line(self.points[start][1], self.points[end][1], part)


@dataclass(frozen=True)
class Exponential:
    """Multiplied by gamma in the course of each ``every``: base gamma^(t / every)."""

    gamma: float = 0.95
    every: str = "1ep"

    def __post_init__(self) -> None:
        check_number(self, "gamma", above=0)
        check_length(self, "every", positive=True)

    def __call__(self, base: float, time: Time) -> float:
        return float(base * self.gamma ** (time.step / period(self.every, time)))


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the base down to ``eta_min`` over the run.

        eta_min + (base - eta_min) (1 + cos(pi progress)) / 2

    Reference: Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017, eq. 5.
    """

    eta_min: float = 0.0

    def __post_init__(self) -> None:
        check_number(self, "eta_min", at_least=0)

    def __call__(self, base: float, time: Time) -> float:
        return _cosine(base, self.eta_min, time.progress)


@dataclass(frozen=True)
class CosineCyclic:
    """A cosine wave that starts at the base, reaches ``eta_min`` after ``T_max`` and the base again after twice that.

    This is PyTorch's CosineAnnealingLR when it steps on past its T_max.
    """

    T_max: str = "5ep"
    eta_min: float = 0.0

    def __post_init__(self) -> None:
        check_length(self, "T_max", positive=True)
        check_number(self, "eta_min", at_least=0)

    def __call__(self, base: float, time: Time) -> float:
        return _cosine(base, self.eta_min, time.step / period(self.T_max, time))


@dataclass(frozen=True)
class WarmRestarts:
    """Half cosines from the base to ``eta_min``; the first lasts ``T_0``, each next one ``T_mult`` times as long.

    Reference: Loshchilov and Hutter 2017, section 3.
    """

    T_0: str = "10ep"
    T_mult: int = 1
    eta_min: float = 0.0

    def __post_init__(self) -> None:
        check_length(self, "T_0", positive=True)
        check_integer(self, "T_mult", at_least=1)
        check_number(self, "eta_min", at_least=0)

    def __call__(self, base: float, time: Time) -> float:
        t, T = time.step, period(self.T_0, time)
        while t >= T and self.T_mult > 1:
            t, T = t - T, T * self.T_mult
        return _cosine(base, self.eta_min, t % T / T)


@dataclass(frozen=True)
class Linear:
    """A straight line from ``start_factor`` to ``end_factor`` of the base over ``over``, then constant."""

    start_factor: float = 1.0
    end_factor: float = 0.0
    over: str = "1dur"

    def __post_init__(self) -> None:
        check_number(self, "start_factor", at_least=0)
        check_number(self, "end_factor", at_least=0)
        check_length(self, "over", positive=True)

    def __call__(self, base: float, time: Time) -> float:
        return base * _line(self.start_factor, self.end_factor, min(1.0, time.step / period(self.over, time)))


@dataclass(frozen=True)
class OneCycle:
    """Up from max_lr / div_factor to max_lr in the first ``pct_start`` of the run, then down to almost nothing.

    max_lr: the peak; the base if None. The last value is max_lr / div_factor / final_div_factor.

    The momentum moves the other way by a second schedule, ``OneCycle(max_lr=0.85, div_factor=0.85 / 0.95,
    final_div_factor=1)``: 0.95, then 0.85 at the peak of the learning rate, then 0.95.
    Reference: Smith and Topin, "Super-convergence: very fast training of neural networks using large learning rates",
    2018. As in PyTorch there are two phases, the second goes below the start, and the peak falls on step
    pct_start * total_steps - 1.
    """

    max_lr: float | None = None
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    anneal: str = "cos"

    def __post_init__(self) -> None:
        if self.max_lr is not None:
            check_number(self, "max_lr", at_least=0)
        check_number(self, "pct_start", at_least=0, at_most=1)
        check_number(self, "div_factor", above=0)
        check_number(self, "final_div_factor", above=0)
        check_choice(self, "anneal", ("cos", "linear"))

    def __call__(self, base: float, time: Time) -> float:
        peak = base if self.max_lr is None else self.max_lr
        start = peak / self.div_factor
        end = start / self.final_div_factor
        anneal = _cosine if self.anneal == "cos" else _line
        top, last = self.pct_start * time.total_steps - 1, time.total_steps - 1
        if time.step <= top or top >= last:
            return anneal(start, peak, min(1.0, time.step / top) if top > 0 else 1.0)
        return anneal(peak, end, min(1.0, (time.step - top) / (last - top)))


@dataclass(frozen=True)
class Triangular:
    """Up and down between two values, in straight lines.

    mode: "triangular"; "triangular2" halves the height of each next cycle; "exp_range" multiplies it by gamma^t.
    max_lr: the base if None. step_size_down: as long as step_size_up if None.
    Reference: Smith, "Cyclical learning rates for training neural networks", WACV 2017.
    """

    max_lr: float | None = None
    base_lr: float = 0.0
    step_size_up: str = "2ep"
    step_size_down: str | None = None
    mode: str = "triangular"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.max_lr is not None:
            check_number(self, "max_lr", at_least=0)
        check_number(self, "base_lr", at_least=0)
        check_length(self, "step_size_up", positive=True)
        if self.step_size_down is not None:
            check_length(self, "step_size_down", positive=True)
        check_choice(self, "mode", ("triangular", "triangular2", "exp_range"))
        check_number(self, "gamma", above=0)

    def __call__(self, base: float, time: Time) -> float:
        peak = base if self.max_lr is None else self.max_lr
        up = period(self.step_size_up, time)
        down = up if self.step_size_down is None else period(self.step_size_down, time)
        cycle, t = divmod(time.step, up + down)
        height = t / up if t <= up else 1 - (t - up) / down
        scale = {"triangular": 1.0, "triangular2": 0.5**cycle, "exp_range": self.gamma**time.step}[self.mode]
        return self.base_lr + (peak - self.base_lr) * height * scale


class PlateauState(TypedDict):
    """What ``Plateau`` remembers from epoch to epoch; plain numbers, so it can be saved as JSON."""

    best: float | None
    bad_epochs: int
    cooldown_left: int
    reductions: int


@dataclass(frozen=True)
class Plateau:
    """Multiplied by ``factor`` when the monitored metric has not improved for more than ``patience`` epochs.

    A metric improves when it beats the best one by more than the fraction ``threshold``. After a reduction ``cooldown``
    epochs are not counted. The value never falls below ``min_lr``. ``time.metrics`` holds the metric of each epoch
    done; a loop that would rather keep a state than the list uses ``init``, ``observe`` and ``value``.
    """

    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    cooldown: int = 0
    min_lr: float = 0.0
    monitor: str = "valid_loss"

    def __post_init__(self) -> None:
        check_number(self, "factor", at_least=0, below=1)
        check_integer(self, "patience", at_least=0)
        check_number(self, "threshold", at_least=0)
        check_integer(self, "cooldown", at_least=0)
        check_number(self, "min_lr", at_least=0)
        check_choice(self, "monitor", MONITORS)

    def __call__(self, base: float, time: Time) -> float:
        return self.value(base, reduce(self.observe, time.metrics, self.init()))

    def init(self) -> PlateauState:
        """The state before the first epoch."""
        return {"best": None, "bad_epochs": 0, "cooldown_left": 0, "reductions": 0}

    def observe(self, state: PlateauState, metric: float) -> PlateauState:
        """The state after an epoch with this metric. A metric that is not a number is no improvement."""
        best, cooldown, reductions = state["best"], state["cooldown_left"], state["reductions"]
        bad_epochs = state["bad_epochs"] + 1
        if self._improves(metric, best):
            best, bad_epochs = metric, 0
        if cooldown:
            cooldown, bad_epochs = cooldown - 1, 0
        if bad_epochs > self.patience:
            cooldown, bad_epochs, reductions = self.cooldown, 0, reductions + 1
        return {"best": best, "bad_epochs": bad_epochs, "cooldown_left": cooldown, "reductions": reductions}

    def value(self, base: float, state: PlateauState) -> float:
        """The value in this state: base factor^reductions, but at least ``min_lr``."""
        return max(base * self.factor ** state["reductions"], min(base, self.min_lr))

    def _improves(self, metric: float, best: float | None) -> bool:
        if best is None:
            return math.isfinite(metric)
        if self.monitor in HIGHER_IS_BETTER:
            return metric > best * (1 + self.threshold)
        return metric < best * (1 - self.threshold)


@dataclass(frozen=True)
class Warmup:
    """A straight line from ``start_factor`` to the base, and ``then`` another schedule with the rest of the run.

    Lengths of ``then`` count from the end of the warm-up. Warming up makes large batches train stably.
    Reference: Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017, section 2.2.
    """

    over: str = "5ep"
    start_factor: float = 1 / 3
    then: Schedule = field(default_factory=Cosine)

    def __post_init__(self) -> None:
        check_length(self, "over")
        check_number(self, "start_factor", at_least=0, at_most=1)
        check(self, "then", callable(self.then), "be a schedule, such as Cosine()")

    def __call__(self, base: float, time: Time) -> float:
        over = length(self.over, time)
        if time.step < over:
            return base * _line(self.start_factor, 1.0, time.step / over)
        return self.then(base, replace(time, step=time.step - over, total_steps=max(0, time.total_steps - over)))


SCHEDULES: tuple[Callable[..., Schedule], ...] = (
    Constant,
    Step,
    MultiStep,
    Piecewise,
    Exponential,
    Cosine,
    CosineCyclic,
    WarmRestarts,
    Linear,
    OneCycle,
    Triangular,
    Plateau,
    Warmup,
)


def watched(schedule: Schedule) -> str | None:
    """The metric that a ``Plateau`` in it monitors, or None."""
    if isinstance(schedule, Warmup):
        return watched(schedule.then)
    return schedule.monitor if isinstance(schedule, Plateau) else None


def _line(start: float, end: float, part: float) -> float:
    return start + (end - start) * part


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2
