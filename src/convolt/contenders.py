"""Who takes part in a benchmark: an engine, its options and a precision, under one name.

    ENGINE[-PRECISION][-FIELD[=VALUE]]...      torch    torch-channels_last-bf16    jit-fp32    jit-isa=avx2

The words are those of the registry and of the engine's own fields, so a new engine or option needs nothing here. For
predictions there is one more, ``onnxruntime``, which is no engine because it cannot train.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from convolt import engines
from convolt.config import Plain, build, parse_value
from convolt.engine import Engine
from convolt.errors import ConfigError, MissingDependency, nearest
from convolt.export.runtime import NAME as ONNX_RUNTIME
from convolt.export.runtime import OnnxRuntime
from convolt.precision import PRECISIONS


@dataclass(frozen=True)
class Tolerance:
    """How far a contender may be from float64: of the loss relative, of logits and gradient in relative L2 norm."""

    loss: float
    logits: float
    gradient: float


#: By the format of the products. In half precision a ReLU or a maximum may fall the other way, which moves gradients:
#: those of resnet18 by 0.3 in every engine; a kernel that read the wrong layout was off by 0.85.
TOLERANCES = {
    "fp64": Tolerance(1e-6, 1e-6, 1e-6),
    "fp32": Tolerance(1e-4, 1e-3, 1e-2),
    "bf16": Tolerance(2e-2, 1e-1, 4e-1),
    "fp16": Tolerance(5e-3, 2e-2, 1e-1),
}


@dataclass(frozen=True)
class Contender:
    """An engine and a precision under a name. products: the format in which it multiplies."""

    name: str
    engine: Engine
    precision: str = "fp32"
    products: str = "fp32"


def standard(inference: bool) -> tuple[str, ...]:
    """Who takes part when nothing is named."""
    return (*engines.CONTENDERS, ONNX_RUNTIME) if inference else engines.CONTENDERS


def contender(name: str, threads: int) -> Contender:
    """``ENGINE[-PRECISION][-FIELD[=VALUE]]...``, such as ``torch-channels_last-bf16``; a flag needs no value.

    Raises ConfigError, MissingDependency.
    """
    engine_name, *words = name.split("-")
    cls = OnnxRuntime if engine_name == ONNX_RUNTIME else engines.engine_class(engine_name)
    known = [item.name for item in fields(cls)]  # type: ignore[arg-type]  # engines are dataclasses
    plain: Plain = {"threads": threads}
    precision, products = "fp32", None
    for word in words:
        key, equals, value = word.partition("=")
        if key in PRECISIONS and not equals:
            precision = key
        elif key in known:
            plain[key] = parse_value(value) if equals else True
            products = value if value in TOLERANCES else products
        else:
            raise ConfigError(f"contender {name}: unknown word {word!r}; {nearest(word, [*known, *cls.PRECISIONS])}")
    return Contender(name, build(cls, plain, f"contender {name}", {}), precision, products or precision)


def assemble(names: Sequence[str], threads: int) -> tuple[list[Contender], dict[str, str]]:
    """Contenders by name, and why others are not there: their library is not installed. Raises ConfigError."""
    if len(set(names)) < len(names):
        raise ConfigError(f"contenders must be different; got {', '.join(names)}")
    found, absent = [], {}
    for name in names:
        try:
            found.append(contender(name, threads))
        except MissingDependency as error:
            absent[name] = str(error)
    return found, absent
