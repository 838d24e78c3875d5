"""What a run shall do, put together from four sources.

The later ones win:

    defaults < recipe file < options < --set

Each is a series of assignments to one plain mapping. Its keys are the fields of ``Recipe``, and

    data              the fields of ``DataSpec``, or a name alone
    model             a network of the zoo, a file, or a mapping that describes the layers
    normalize         whether the data set's mean and deviation stand in front of a network of the zoo
    engine            the engine's fields, or a name alone
    parallel          the fields of ``Parallel``: what ranks do together
    checkpoint_every  a length

A ``run.json`` holds all of it resolved, so replaying a run, and resuming one, is reading it as a recipe file. The seed
of the data's splits is the recipe's seed unless ``data.seed`` is given: one number repeats a whole run.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from convolt import zoo
from convolt.config import Plain, assign, build, read_toml
from convolt.data import Dataset
from convolt.datasets import SOURCES
from convolt.datasets.spec import DataSpec
from convolt.engine import Engine
from convolt.engines import default_engine, engine_class
from convolt.errors import ConfigError, ShapeError, nearest
from convolt.layers import Normalize
from convolt.model import Model
from convolt.parallel import Parallel
from convolt.recipe import Recipe, model_from_plain, plain, recipe_from_plain
from convolt.run import Run

KEYS = (
    *(field.name for field in fields(Recipe)),
    "data",
    "model",
    "normalize",
    "engine",
    "parallel",
    "checkpoint_every",
)
DEFAULT_MODEL = "mnist-cnn"
MODEL_FILES = (".toml", ".json")


@dataclass(frozen=True)
class Settings:
    """Everything that is known before data is loaded. model: a network of the zoo by name, or a described one."""

    data: DataSpec
    model: str | Model
    normalize: bool
    recipe: Recipe
    engine: Engine
    parallel: Parallel
    checkpoint_every: str

    def build_model(self, data: Dataset) -> Model:
        """The model for this data. Raises ConfigError."""
        if isinstance(self.model, Model):
            return self.model
        return zoo.build(
            self.model, data.input_shape, data.num_classes, _normalization(data) if self.normalize else None
        )


def defaults() -> Plain:
    """What a run does when nothing is asked for; the engine is chosen last, when nothing names one."""
    own = plain(Recipe())
    own.pop("type")
    sections: Plain = {"data": {}, "engine": {}, "parallel": {}}
    return {**own, **sections, "model": DEFAULT_MODEL, "normalize": None, "checkpoint_every": "1ep"}


def read_recipe(path: Path) -> Plain:
    """The assignments in a recipe file: TOML, JSON, or the ``run.json`` of a run. Raises ConfigError."""
    given = _read(path)
    return recorded(given["config"], path) if isinstance(given.get("config"), dict) else given


def recorded(config: Plain, where: Path) -> Plain:
    """The assignments that repeat the run with this resolved config. Raises ConfigError."""
    try:
        source, recipe = config["data"]["source"] or {"name": None}, dict(config["recipe"])
        own = {name: config[name] for name in ("model", "engine", "parallel", "checkpoint_every")}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where}: is not the record of a run: it lacks {error}") from None
    recipe.pop("type", None)
    data = {name: value for name, value in source.items() if name != "type"}
    if data.get("seed") == recipe.get("seed"):
        data.pop("seed")  # it followed the recipe's, and shall follow another one
    return {**recipe, **own, "data": data}


def merge(settings: Plain, given: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Make every assignment of a nested mapping; a new type comes first, as it drops the fields of the old one."""
    for name in sorted(given, key=lambda name: name != "type"):
        key, value = f"{prefix}{name}", given[name]
        if name == "type" and prefix:
            put(settings, prefix[:-1], value, where)
        elif isinstance(value, Mapping) and key != "model":
            merge(settings, value, where, f"{key}.")
        else:
            put(settings, key, value, where)


def put(settings: Plain, key: str, value: Any, where: str) -> None:
    """Make one assignment. Raises ConfigError, which begins with ``where``, for a key that nothing reads."""
    if key.partition(".")[0] not in KEYS:
        homes = [f"{name}.{key}" for name, inner in settings.items() if isinstance(inner, dict) and key in inner]
        hint = f"write {homes[0]}" if homes else nearest(key, KEYS)
        raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
    if key == "model":
        settings[key] = value
    else:
        assign(settings, "data.name" if key == "data" else key, value)


def resolve(settings: Plain) -> Settings:
    """The settings as objects. Raises ConfigError, MissingDependency."""
    recipe = recipe_from_plain({field.name: settings[field.name] for field in fields(Recipe)})
    model, normalize = resolve_model(settings["model"]), settings["normalize"]
    if normalize not in (None, True, False):
        raise ConfigError(f"normalize: must be true or false; got {normalize!r}")
    if normalize is not None and isinstance(model, Model):
        raise ConfigError("normalize: is for networks of the zoo; a described model has a Normalize layer of its own")
    if not isinstance(settings["data"], dict) or settings["data"].get("name", "") is None:
        raise ConfigError("data: the run was trained on arrays in memory; name its data set with --data")
    spec = build(DataSpec, {"seed": recipe.seed, **settings["data"]}, "data", {})
    if not isinstance(settings["parallel"], dict):
        raise ConfigError(f"parallel: must be a mapping, such as parallel.wire=bf16; got {settings['parallel']!r}")
    parallel = build(Parallel, settings["parallel"], "parallel", {})
    engine = resolve_engine(settings["engine"], recipe.precision)
    every = settings["checkpoint_every"]
    return Settings(located(spec), model, normalize is not False, recipe, engine, parallel, every)


def resolve_model(given: Any) -> str | Model:
    """A network of the zoo by its name, or the model that a file or a mapping describes. Raises ConfigError."""
    if isinstance(given, str):
        if given in zoo.MODELS:
            return given
        if not given.endswith(MODEL_FILES):
            either = f"or a file that ends in {' or '.join(MODEL_FILES)}"
            raise ConfigError(f"model: unknown name {given!r}; {nearest(given, zoo.MODELS)}, {either}")
    elif not isinstance(given, Mapping):
        raise ConfigError(f"model: must be a name, a file or a mapping with input_shape and layers; got {given!r}")
    where, described = (given, _read(Path(given))) if isinstance(given, str) else ("model", given)
    try:
        return model_from_plain(dict(described), where)
    except ShapeError as error:
        raise ConfigError(f"{where}: {error}") from None


def resolve_engine(given: str | Mapping[str, Any], precision: str = "fp32") -> Engine:
    """The engine of a name or of plain values; the fastest for a precision if nothing names one. Raises ConfigError."""
    own = {"type": given} if isinstance(given, str) else given
    if not isinstance(own, Mapping):
        raise ConfigError(f"engine: must be a name or a mapping with a type; got {given!r}")
    cls = engine_class(str(own["type"])) if "type" in own else type(default_engine(precision))
    return build(cls, own, "engine", {})


def run_engine(run: Run, name: str | None, threads: int | None) -> Engine:
    """The engine that trained a run, but for what is asked for. Raises ConfigError, MissingDependency."""
    settings: Plain = {"engine": dict(run.config["engine"])}
    for key, value in (("engine", name), ("engine.threads", threads)):
        if value is not None:
            assign(settings, key, value)
    return resolve_engine(settings["engine"])


def located(spec: DataSpec) -> DataSpec:
    """The same data with absolute paths: a run can then be resumed and evaluated from any folder."""
    path = Path(spec.name).expanduser()
    is_path = spec.name not in {source.name for source in SOURCES} and path.exists()
    root = None if spec.root is None else os.path.abspath(Path(spec.root).expanduser())
    return replace(spec, name=os.path.abspath(path) if is_path else spec.name, root=root)


def _normalization(data: Dataset) -> Normalize:
    mean, std = data.mean_std()
    if min(std) == 0:
        raise ConfigError(f"{data.name}: a channel is the same everywhere, nothing to normalize by; use --no-normalize")
    return Normalize(mean, std)


def _read(path: Path) -> Plain:
    if path.suffix.lower() != ".json":
        return read_toml(path)
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: must hold a JSON object; got {type(given).__name__}")
    return given
