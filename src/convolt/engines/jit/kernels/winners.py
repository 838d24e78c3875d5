"""dw of a first convolution with stride 1, ReLU or nothing, and a 2x2 max-pool: the sum over the pixels that won.

Where nobody needs the gradient of the images, the slopes of a pooled convolution need not be spread: three of four are
zero (``engines.jit.winners``). Each chunk first writes the fours of an image, every pixel with its neighbors to the
right, below, and below to the right, which stay in the cache.

Cost: 2 K C R S PP QQ FLOPs for each image, a quarter of the usual; one load and one permutation for each of its
multiply-adds of a vector.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.kernels.conv_calls import in_turn
from convolt.engines.jit.kernels.specs import DEAD, FLOAT, ConvSpec
from convolt.engines.jit.memory import view
from convolt.engines.jit.winners import Winners, winners


def winners_backward(spec: ConvSpec) -> Callable[..., None]:
    """This chunk's part of dw and db; arguments as in ``conv.conv_backward``."""
    x, window, K, images, scratch_size = spec.x, spec.window, spec.K, spec.images, spec.scratch
    part, bias, x_size = window.R * window.S * x.C * K, spec.bias, x.size
    pooled = spec.P // 2 * (spec.Q // 2) * K
    fours, sums = _fours(spec), in_turn(_sums(spec))

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        dw, db = arguments[7] + FLOAT * chunk * part, arguments[8] + FLOAT * chunk * K
        view(dw, (part,), np.float32)[:] = np.float32(0)
        if bias:
            view(db, (K,), np.float32)[:] = np.float32(0)
        own = arguments[9] + FLOAT * thread * scratch_size
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            fours(arguments[1] + FLOAT * image * x_size, own)
            sums(own, arguments[3] + FLOAT * image * pooled, arguments[5] + image * pooled, dw, db)

    return kernel


def _fours(spec: ConvSpec) -> Callable[[int, int], None]:
    """Every pixel of an image with its three neighbors, (C, rows, columns, 4): ``fours(x, target)``."""
    rows, columns, C = spec.x.rows, spec.x.columns, spec.x.C

    @inlined
    def fours(source: int, target: int) -> None:
        x = view(source, (rows, columns, C), np.float32)
        for c in range(C):
            for h in range(rows - 1):
                line = view(target + FLOAT * 4 * (c * rows + h) * columns, (columns, 4), np.float32)
                for w in range(columns - 1):
                    line[w, 0] = x[h, w, c]
                    line[w, 1] = x[h, w + 1, c]
                    line[w, 2] = x[h + 1, w, c]
                    line[w, 3] = x[h + 1, w + 1, c]

    found: Callable[[int, int], None] = fours
    return found


def _sums(spec: ConvSpec) -> tuple[Callable[[int, int, int, int, int], None], ...]:
    """Some taps each: ``sums(fours, dy, codes, dw, db)``."""
    x, window, lanes = spec.x, spec.window, spec.lanes
    R, S, C, K = window.R, window.S, x.C, spec.K
    corner = x.origin // C - window.top * x.columns - window.left
    taps = [
        (4 * (c * x.rows * x.columns + corner + r * x.columns + s), ((r * S + s) * C + c) * K)
        for r in range(R)
        for s in range(S)
        for c in range(C)
    ]
    found, start = [], 0
    for size in _equal_parts(len(taps), spec.registers - 5):  # besides the sums: slopes, winners, a value and db
        found.append(_group(spec, tuple(taps[start : start + size]), bias=spec.bias and start == 0))
        start += size
    assert lanes > 4
    return tuple(found)


def _group(spec: ConvSpec, taps: tuple[tuple[int, int], ...], bias: bool) -> Callable[[int, int, int, int, int], None]:
    """All channels, a vector at a time."""
    K, lanes, columns = spec.K, spec.lanes, spec.x.columns
    whole, rest = divmod(K, lanes)

    def vector(used: int) -> Any:
        high, wide = spec.P // 2, spec.Q // 2
        return winners(Winners(taps, high, wide, 4 * 2 * columns, 4 * 2, K, used, DEAD, lanes, bias))

    full, last = vector(lanes), vector(rest or lanes)

    @inlined
    def group(fours: int, dy: int, codes: int, dw: int, db: int) -> None:
        for j in range(whole):
            k = j * lanes
            full(fours, dy + FLOAT * k, codes + k, dw + FLOAT * k, db + FLOAT * k)
        if rest:
            k = whole * lanes
            last(fours, dy + FLOAT * k, codes + k, dw + FLOAT * k, db + FLOAT * k)

    found: Callable[[int, int, int, int, int], None] = group
    return found


def _equal_parts(total: int, most: int) -> tuple[int, ...]:
    """`total` as the fewest sizes of at most `most`, equal but for one, larger ones first: (28, 10) -> 10, 9, 9."""
    count = -(-total // most)
    size, larger = divmod(total, count)
    return (size + 1,) * larger + (size,) * (count - larger)
