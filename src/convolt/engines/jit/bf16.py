"""bf16 numbers in compiled kernels: conversion and the layouts that AMX wants.

bf16 is the upper half of a float32, kept as uint16: Numba has no such type. `pack_pairs` and `transpose` serve the two
operands of a tile product: B wants two neighbors in k side by side ("VNNI"), A wants k along its rows.
"""

from typing import Any

import numpy as np
from numba.extending import register_jitable

from convolt.engines.jit.memory import bits_of_float32, float32_of_bits


@register_jitable
def float32_of_bf16(bits: Any) -> Any:
    """The float32 value of a bf16 number given as uint16; exact."""
    return float32_of_bits(np.uint32(bits) << np.uint32(16))


@register_jitable
def bf16_of_float32(x: Any) -> Any:
    """The nearest bf16 number, ties to even, as uint16; NaN stays a (quiet) NaN."""
    bits = bits_of_float32(x)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(quiet if is_nan else rounded)
