"""A recipe is everything that changes the mathematics of a run, and nothing else.

Two runs with one recipe, one model and one data set learn the same weights on any engine, any number of threads and
any number of ranks (up to rounding). Engine, threads, folders and plots are therefore no part of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from convolt.augment import AUGMENTS, Augment
from convolt.checks import check, check_choice, check_integer, check_number
from convolt.config import Families, Plain, build, to_plain
from convolt.duration import Time, check_length
from convolt.early_stopping import EarlyStopping
from convolt.errors import ConfigError, nearest
from convolt.layers import LAYERS, Layer
from convolt.losses import LOSSES, CrossEntropy, Loss
from convolt.model import Model
from convolt.optimizers import EMA, OPTIMIZERS, Adam, Optimizer
from convolt.precision import precision
from convolt.schedules import SCHEDULES, Constant, Schedule


@dataclass(frozen=True)
class NonFinite:
    """What to do about a step whose loss or gradient is not finite; it never reaches the weights.

    policy: ``"raise"`` ends the run; ``"skip"`` leaves the step out; ``"rollback"`` returns to the last checkpoint,
    leaves the step out when it comes again, and multiplies every later lr by ``lr_factor``.
    limit: after so many of them the run ends whatever the policy.
    """

    policy: Literal["raise", "skip", "rollback"] = "raise"
    limit: int = 10
    lr_factor: float = 0.5

    def __post_init__(self) -> None:
        check_choice(self, "policy", ("raise", "skip", "rollback"))
        check_integer(self, "limit", at_least=1)
        check_number(self, "lr_factor", above=0, at_most=1)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    batch_size: the global batch, over ranks and micro-batches. micro_batch_size: at most so many images at a time,
    with the same result (gradients are accumulated). schedule: of the learning rate; schedules: of any other field of
    the optimizer, such as ``{"momentum": Linear(...)}``. dropout_from: when Dropout begins to act.
    Raises ConfigError.
    """

    epochs: int = 10
    batch_size: int = 128
    micro_batch_size: int | None = None
    loss: Loss = field(default_factory=CrossEntropy)
    optimizer: Optimizer = field(default_factory=Adam)
    schedule: Schedule = field(default_factory=Constant)
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    precision: str = "fp32"
    seed: int = 0
    augment: tuple[Augment, ...] = ()
    clip_norm: float | None = None
    clip_value: float | None = None
    ema: EMA | None = None
    early_stopping: EarlyStopping | None = None
    dropout_from: str = "0ep"
    non_finite: NonFinite = field(default_factory=NonFinite)

    def __post_init__(self) -> None:
        for name, example in (("loss", "CrossEntropy()"), ("schedule", "Cosine()"), ("optimizer", "Adam()")):
            value = getattr(self, name)
            usable = hasattr(value, "update") if name == "optimizer" else callable(value)
            check(self, name, usable and not isinstance(value, type), f"be an object such as {example}")
        for name, kind in (("ema", EMA), ("early_stopping", EarlyStopping), ("non_finite", NonFinite)):
            absent = getattr(self, name) is None and name != "non_finite"
            check(self, name, absent or isinstance(getattr(self, name), kind), f"be {kind.__name__}(...)")
        augments = isinstance(self.augment, tuple | list) and all(hasattr(one, "per_sample") for one in self.augment)
        check(self, "augment", augments, "be a tuple of augmentations such as (Flip(),)")
        check_integer(self, "epochs", at_least=0)
        check_integer(self, "batch_size", at_least=1)
        check_integer(self, "seed", at_least=0)
        check(self, "seed", self.seed < 2**64, "be < 2^64")
        if self.micro_batch_size is not None:
            check_integer(self, "micro_batch_size", at_least=1)
        for name in ("clip_norm", "clip_value"):
            if getattr(self, name) is not None:
                check_number(self, name, above=0)
        precision(self.precision)
        check_length(self, "dropout_from")
        object.__setattr__(self, "augment", tuple(self.augment))
        object.__setattr__(self, "schedules", dict(self.schedules))
        own = {item.name: getattr(self.optimizer, item.name) for item in fields(self.optimizer)}  # type: ignore[arg-type]  # optimizers are dataclasses
        scheduled = [
            name
            for name, value in own.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "lr"
        ]
        for name in self.schedules:
            if name == "lr":
                raise ConfigError("Recipe: schedules: the schedule of lr is the field schedule; give it there")
            if name not in scheduled:
                raise ConfigError(
                    f"Recipe: schedules: no hyperparameter {name!r} to schedule; {nearest(name, scheduled)}"
                )

    def optimizer_at(self, time: Time, lr_factor: float = 1.0) -> Optimizer:
        """The optimizer with the hyperparameters that the schedules give it at this time."""
        values = {name: schedule(getattr(self.optimizer, name), time) for name, schedule in self.schedules.items()}
        values["lr"] = self.schedule(self.optimizer.lr, time) * lr_factor
        return replace(self.optimizer, **values)  # type: ignore[type-var]  # optimizers are dataclasses


FAMILIES: Families = {
    Loss: LOSSES,
    Optimizer: OPTIMIZERS,
    Schedule: SCHEDULES,
    Augment: AUGMENTS,
    EMA: (EMA,),
    EarlyStopping: (EarlyStopping,),
    NonFinite: (NonFinite,),
    Layer: LAYERS,
}


def recipe_from_plain(plain: Plain, where: str = "recipe") -> Recipe:
    """A recipe from plain values, as ``run.json`` and recipe files hold it. Raises ConfigError."""
    return build(Recipe, plain, where, FAMILIES)


def model_from_plain(plain: Plain, where: str = "model") -> Model:
    """A model from plain values, as ``run.json`` holds it. Raises ConfigError, ShapeError."""
    return build(Model, plain, where, FAMILIES)


def plain(value: Any) -> Plain:
    """A recipe or a model as plain values."""
    result: Plain = to_plain(value)
    return result
