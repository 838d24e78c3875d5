"""Precisions: in which format an engine computes, and in which it keeps the master weights.

``fp64`` is the oracle's, ``fp32`` the default. ``fp32-master64`` computes in float32 and adds the small updates to
float64 weights. ``bf16`` and ``fp16`` compute products in half precision and keep float32 masters; fp16 has so few
exponent bits that its loss must be scaled (Micikevicius et al. 2018).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from convolt.errors import ConfigError, nearest


@dataclass(frozen=True)
class Precision:
    """Formats of one way to compute: ``half`` names the 16-bit format of products, if there is one."""

    name: str
    compute: np.dtype[Any]
    master: np.dtype[Any]
    half: str | None = None


_F32, _F64 = np.dtype(np.float32), np.dtype(np.float64)

PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp64", _F64, _F64),
        Precision("fp32", _F32, _F32),
        Precision("fp32-master64", _F32, _F64),
        Precision("bf16", _F32, _F32, half="bfloat16"),
        Precision("fp16", _F32, _F32, half="float16"),
    )
}


def precision(name: str) -> Precision:
    """The precision of that name. Raises ConfigError with the nearest valid name."""
    if not isinstance(name, str) or name not in PRECISIONS:
        raise ConfigError(f"precision: unknown name {name!r}; {nearest(str(name), PRECISIONS)}")
    return PRECISIONS[name]
