"""What is done between two steps of a stretch: numbers are copied."""

from collections.abc import Callable
from typing import Any

import numpy as np

from convolt.engines.jit.memory import view


def copies(spec: None) -> Callable[..., None]:
    """Arguments: state, rows (int64: from, to, how many words of 32 bits), how many rows. One chunk.

    All is told by the arguments: nothing is compiled for one model. Every word is read once and written once.
    """

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        rows = view(arguments[1], (arguments[2], 3), np.int64)
        for i in range(len(rows)):
            source, target = view(rows[i, 0], (rows[i, 2],), np.int32), view(rows[i, 1], (rows[i, 2],), np.int32)
            for j in range(len(source)):
                target[j] = source[j]

    return kernel
