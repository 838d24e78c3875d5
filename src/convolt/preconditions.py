"""What can be known to be wrong with a run before anything of it is made."""

from pathlib import Path

from convolt.data import Dataset
from convolt.duration import HOW_TO, is_length
from convolt.engine import Engine
from convolt.errors import ConfigError
from convolt.model import Model
from convolt.params import Params
from convolt.recipe import Recipe
from convolt.schedules import watched


def check_kinds(model: object, data: object, recipe: object, engine: object, params: object) -> None:
    """Objects of the right kind, so that a mistake is told before anything is made. Raises ConfigError."""
    wanted = (("model", model, Model), ("data", data, Dataset), ("recipe", recipe, Recipe), ("engine", engine, Engine))
    for name, value, kind in (*wanted, *((("params", params, Params),) if params is not None else ())):
        if not isinstance(value, kind):
            raise ConfigError(f"fit: {name} must be a {kind.__name__} object; got {value!r}"[:300])


def check_fit(
    model: Model, data: Dataset, recipe: Recipe, resume: bool, out: str | Path | None, checkpoint_every: str
) -> None:
    """Everything that can be known to be wrong before the first step. Raises ConfigError."""
    if model.input_shape != data.input_shape:
        raise ConfigError(
            f"the model takes images {model.input_shape}, {data.name} has {data.input_shape};"
            f" build the model with input_shape={data.input_shape}"
        )
    if model.output_shape != (data.num_classes,):
        raise ConfigError(
            f"the model has outputs {model.output_shape}, {data.name} has {data.num_classes} classes;"
            f" end it with Dense(..., {data.num_classes})"
        )
    if resume and out is None:
        raise ConfigError("resume needs the folder of the run: give out=")
    if data.valid is None:
        for name, holds in (("early_stopping", recipe.early_stopping), ("Plateau", watched(recipe.schedule))):
            if holds:
                raise ConfigError(f"{name} needs a validation split; load the data with valid=0.1 (--valid 0.1)")
    if not is_length(checkpoint_every):
        raise ConfigError(f"checkpoint_every must {HOW_TO}; got {checkpoint_every!r}")
