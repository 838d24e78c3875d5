"""Frozen dataclasses to plain values and back: recipe files, ``run.json`` and ``--set``.

The objects are the configuration. Plain, an object is a mapping of its fields with its class under ``"type"``; a name
alone stands for the class with its defaults, so ``optimizer = "adam"`` and ``optimizer = {type = "adam", lr = 0.001}``
are the same thing. Only classes of the family that a field belongs to can be named: no import path, no evaluation.
"""

import ast
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from convolt.errors import ConfigError, nearest

Built = TypeVar("Built")
Plain = dict[str, Any]

# The interface a field is annotated with -> the classes that may stand there.
Families = Mapping[Any, Iterable[Callable[..., Any]]]


def plain_name(cls: Callable[..., Any]) -> str:
    """The name of a class on the command line and in files: ``OneCycle`` is ``onecycle``."""
    return cls.__name__.lower()


def to_plain(value: Any) -> Any:
    """Numbers, strings, lists and mappings that ``build`` turns into the same object again."""
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
        return {"type": plain_name(type(value)), **own}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def build(cls: type[Built], plain: Mapping[str, Any], where: str, families: Families) -> Built:
    """The dataclass of these plain values. Raises ConfigError that names the key, the value and the nearest valid key.

    >>> from convolt.layers import Dropout
    >>> build(Dropout, {"type": "dropout", "p": 0.25}, "layer", {})
    Dropout(p=0.25)
    """
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # every family is of dataclasses
    for key in plain:
        if key not in known and key != "type":
            options = nearest(key, known) if known else "it has none"
            raise ConfigError(f"{where}: {plain_name(cls)} has no key {key!r}; {options}")
    values = {
        key: _convert(hints[key], value, f"{where}.{key}", families) for key, value in plain.items() if key != "type"
    }
    lacking = [field.name for field in fields(cls) if _is_required(field) and field.name not in values]  # type: ignore[arg-type]  # the same
    if lacking:
        raise ConfigError(f"{where}: {plain_name(cls)} lacks {', '.join(lacking)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {plain_name(cls)} cannot be made of {sorted(values)}: {error}") from None


def _is_required(field: Field[Any]) -> bool:
    return field.init and field.default is MISSING and field.default_factory is MISSING


def _convert(annotation: Any, value: Any, where: str, families: Families) -> Any:
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if value is None and NoneType in options:
        return None
    for option in options:
        if option in families:
            return _member(families[option], value, where, families)
        if get_origin(option) is tuple and get_args(option)[0] in families:
            items = value if isinstance(value, list | tuple) else [value]
            return tuple(
                _member(families[get_args(option)[0]], item, f"{where}[{i}]", families) for i, item in enumerate(items)
            )
        if get_origin(option) in (dict, Mapping) and get_args(option)[1] in families:
            members = families[get_args(option)[1]]
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: must be a mapping of names; got {value!r}")
            return {key: _member(members, item, f"{where}.{key}", families) for key, item in value.items()}
    if get_origin(annotation) is Literal and value not in get_args(annotation):
        raise ConfigError(f"{where}: unknown word {value!r}; {nearest(str(value), get_args(annotation))}")
    if str in options:
        return value  # a length, a name: the class itself says best what it must be
    try:
        return msgspec.convert(value, annotation, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {str(error)[:1].lower()}{str(error)[1:]}; got {value!r}") from None


def _member(members: Iterable[Callable[..., Any]], value: Any, where: str, families: Families) -> Any:
    classes = {plain_name(member): member for member in members}
    if any(isinstance(value, member) for member in classes.values() if isinstance(member, type)):
        return value
    plain: Mapping[str, Any] = {"type": value} if isinstance(value, str) else value
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{where}: must be a name or a mapping with a type; got {value!r}")
    default = next(iter(classes)) if len(classes) == 1 else None
    if plain.get("type", default) is None:
        raise ConfigError(f"{where}: must have a type; valid: {', '.join(sorted(classes))}")
    name = canonical(str(plain.get("type", default)))
    if name not in classes:
        raise ConfigError(f"{where}: unknown type {plain.get('type')!r}; {nearest(name, classes)}")
    return build(classes[name], plain, where, families)  # type: ignore[arg-type]  # a family lists dataclasses


def canonical(name: str) -> str:
    """``One-Cycle``, ``one_cycle`` and ``OneCycle`` are all ``onecycle``."""
    return name.lower().replace("-", "").replace("_", "")


# --- merging: file, options, --set ------------------------------------------------------------------------------------


def read_toml(path: Path) -> Plain:
    """The contents of a recipe file. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None


def assign(plain: Plain, key: str, value: Any) -> None:
    """Set a dotted key; a new ``type`` drops the fields of the old one.

    >>> recipe = {"optimizer": {"type": "sgd", "momentum": 0.9}}
    >>> assign(recipe, "optimizer", "adam"); assign(recipe, "optimizer.lr", 0.01); recipe
    {'optimizer': {'type': 'adam', 'lr': 0.01}}
    """
    *path, last = key.split(".")
    for name in path:
        inner = plain.get(name)
        plain[name] = inner if isinstance(inner, dict) else {} if inner is None else {"type": inner}
        plain = plain[name]
    old = plain.get(last)
    if isinstance(old, dict) and isinstance(value, str):
        if canonical(str(old.get("type"))) != canonical(value):
            plain[last] = {"type": value}
    else:
        plain[last] = value


def parse_assignment(text: str) -> tuple[str, Any]:
    """``"optimizer.betas=(0.9,0.95)"`` as key and value. Raises ConfigError.

    >>> parse_assignment("optimizer.betas=(0.9,0.95)")
    ('optimizer.betas', (0.9, 0.95))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes key=value, such as optimizer.betas=(0.9,0.95); got {text!r}")
    return key.strip(), parse_value(value.strip())


def parse_value(text: str) -> Any:
    """A Python literal, ``true``/``false``/``none`` in any case, or else the text itself; nothing is evaluated."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
