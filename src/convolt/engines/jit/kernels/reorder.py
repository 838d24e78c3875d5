"""Columns of a dense matrix brought into another order, in place."""

from collections.abc import Callable
from typing import Any

import numpy as np

from convolt.engines.jit.kernels.dense_specs import ReorderSpec
from convolt.engines.jit.kernels.specs import FLOAT
from convolt.engines.jit.memory import view
from convolt.engines.jit.transpose import Transpose, transpose


def reorder(spec: ReorderSpec) -> Callable[..., None]:
    """Rows from (C, H, W) to (H, W, C), or back; arguments: state, matrix, scratch. A chunk is some rows.

    A row passes through scratch memory, which stays in the L1 or L2 cache: each number is read and written once.
    """
    outputs, inputs, rows = spec.outputs, spec.inputs, spec.rows
    before, behind = (spec.channels, spec.pixels) if spec.to_pixels else (spec.pixels, spec.channels)
    turn = transpose(Transpose(before, behind, behind, before, spec.lanes))

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        own = arguments[2] + FLOAT * thread * inputs
        for row in range(chunk * rows, min((chunk + 1) * rows, outputs)):
            place = arguments[1] + FLOAT * row * inputs
            turn(place, own)
            source, target = view(own, (inputs,), np.float32), view(place, (inputs,), np.float32)
            for i in range(inputs):
                target[i] = source[i]

    return kernel
