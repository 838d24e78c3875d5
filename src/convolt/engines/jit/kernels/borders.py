"""Zeros around images, where memory was another tensor's before.

Cost: no FLOPs; bytes of the border, written once.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from convolt.engines.jit.kernels.specs import BF16, MapSpec
from convolt.engines.jit.memory import view


def clear(spec: MapSpec) -> Callable[..., None]:
    """Zero outside H x W; arguments: state, x."""
    x, images = spec.x, spec.images
    x_size, rows, columns, C, H, W = x.size, x.rows, x.columns, x.C, x.H, x.W
    number, dtype = x.number, np.uint16 if x.number == BF16 else np.float32
    top, left = x.origin // x.pitch, x.origin % x.pitch // x.C

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            frame = view(arguments[1] + number * image * x_size, (rows, columns * C), dtype)
            for row in range(rows):
                if row < top or row >= top + H:
                    frame[row, :] = 0
                else:
                    frame[row, : left * C] = 0
                    frame[row, (left + W) * C :] = 0

    return kernel
