"""Max-pools with windows that overlap, are padded or fit no tile, behind every way to compute a convolution."""

from typing import Any

import numpy as np
from engine_cases import Case
from jit_cases import Rounded
from numpy.typing import NDArray

from convolt.layers import Conv2d, Layer, MaxPool2d, ReLU, Shape


class Coarse(Rounded):
    """A case whose slopes are small integers: where windows meet in a pixel, their sums are bf16 numbers too."""

    def slopes(self) -> NDArray[Any]:
        """From -7 to 7."""
        shape = np.shape(Case.slopes(self))
        return np.random.default_rng(2).integers(-7, 8, shape).astype(np.float32)


def _case(name: str, shape: Shape, *layers: Layer, batch: int = 5) -> Coarse:
    return Coarse(f"pool, {name}", shape, layers, batch)


#: Rows that are kept, edges that cut windows off, more than one block of filters, a stride beyond the window; images of
#: a tile, of several blocks, of a dilation.
POOLS = {
    case.name: case
    for case in (
        _case("few channels", (3, 13, 11), Conv2d(3, 20, 3, padding=1), ReLU(), MaxPool2d(3, 2)),
        _case("two blocks of filters", (3, 12, 14), Conv2d(3, 70, 5, 2, padding=1), MaxPool2d(3, 2, 1)),
        _case("whole tiles", (32, 9, 17), Conv2d(32, 32, 3, padding=1), ReLU(), MaxPool2d(3, 2, 1)),
        _case("winograd", (16, 8, 10), Conv2d(16, 20, 3, padding=1), ReLU(), MaxPool2d(3, 2, 1), batch=37),
        _case("images together", (9, 5, 6), Conv2d(9, 20, 3, padding=1), ReLU(), MaxPool2d(3, 2), batch=37),
        _case(
            "groups",
            (8, 12, 10),
            Conv2d(8, 24, 3, padding=1, groups=4, dilation=(1, 2), bias=False),
            ReLU(),
            MaxPool2d((3, 2), (2, 1), (1, 0)),
        ),
        _case("apart", (5, 12, 10), Conv2d(5, 20, 1), ReLU(), MaxPool2d(2, 3)),
        _case("four by four", (16, 9, 13), Conv2d(16, 34, 3, padding=2), ReLU(), MaxPool2d(4)),
        _case("dilation", (16, 8, 12), Conv2d(16, 18, 3, padding=2, dilation=2), ReLU(), MaxPool2d(2)),
        _case("every pixel", (16, 8, 12), Conv2d(16, 18, 5, padding=2), MaxPool2d(5, 1, 2)),
    )
}
