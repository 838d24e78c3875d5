"""The geometry of a sliding window, which convolution and pooling share."""

from dataclasses import dataclass
from typing import Literal

from convolt.errors import ShapeError
from convolt.layers.base import Pair


@dataclass(frozen=True)
class Window:
    """The geometry of a sliding window, shared by convolution and pooling."""

    kernel: Pair
    stride: Pair
    padding: Pair | Literal["same", "valid"] = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def extent(self) -> Pair:
        """Rows and columns from the first tap to the last, dilation included."""
        return self.dilation[0] * (self.kernel[0] - 1) + 1, self.dilation[1] * (self.kernel[1] - 1) + 1

    @property
    def pads(self) -> tuple[Pair, Pair]:
        """Padding as ((top, bottom), (left, right))."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if self.padding == "same":
            total = self.extent[0] - 1, self.extent[1] - 1
            return (total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2)
        vertical, horizontal = self.padding
        return (vertical, vertical), (horizontal, horizontal)

    def output_size(self, layer: str, height: int, width: int) -> Pair:
        """(P, Q) for an image of (H, W). Raises ShapeError when not one window fits."""
        (top, bottom), (left, right) = self.pads
        rows = _windows(height, self.kernel[0], self.stride[0], top, bottom, self.dilation[0])
        columns = _windows(width, self.kernel[1], self.stride[1], left, right, self.dilation[1])
        if rows < 1 or columns < 1:
            raise ShapeError(
                f"{layer} has a window of {self.extent[0]}x{self.extent[1]}, larger than the padded image"
                f" {height + top + bottom}x{width + left + right}; use a smaller kernel_size or more padding"
            )
        return rows, columns


def _windows(size: int, kernel: int, stride: int, before: int, after: int, dilation: int = 1) -> int:
    """Number of windows along one axis: ``floor((size + padding - dilation (kernel - 1) - 1) / stride) + 1``."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
