"""Windows on batch-innermost images: which rows and columns of an image one tap of a kernel meets.

A tap (r, s) of a window touches the image at ``(p stride + r dilation - top, q stride + s dilation - left)``. Padding
is never materialised: for each tap the output positions that fall outside the image are left out instead.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from convolt.layers import Window

TILE_BYTES = 1 << 21  # scratch of a tile: as much as an L2 cache has, or a core's share of the L3 behind a smaller one


class Tap(NamedTuple):
    """One tap of a window: output positions ``at`` (two slices) meet the image at ``image`` (two slices)."""

    r: int
    s: int
    at: tuple[slice, slice]
    image: tuple[slice, slice]
    whole: bool


@lru_cache(maxsize=1 << 12)  # asked for each tile of each step, and always the same
def taps(window: Window, rows: range, Q: int, H: int, W: int) -> tuple[Tap, ...]:
    """Every tap for output rows ``rows`` (positions in ``at`` count from their first) of an H x W image."""
    return tuple(_taps(window, rows, Q, H, W))


def _taps(window: Window, rows: range, Q: int, H: int, W: int) -> Iterator[Tap]:
    (top, _), (left, _) = window.pads
    for r in range(window.kernel[0]):
        for s in range(window.kernel[1]):
            vertical = _meeting(rows.start, rows.stop, window.stride[0], r * window.dilation[0] - top, H)
            horizontal = _meeting(0, Q, window.stride[1], s * window.dilation[1] - left, W)
            at, image = (vertical[0], horizontal[0]), (vertical[1], horizontal[1])
            whole = at == (slice(0, len(rows)), slice(0, Q))
            yield Tap(r, s, at, image, whole)


def _meeting(start: int, stop: int, stride: int, offset: int, size: int) -> tuple[slice, slice]:
    """Positions p in [start, stop) with 0 <= p stride + offset < size, and the image's places they meet."""
    first = max(start, -(offset // stride))
    last = min(stop, (size - 1 - offset) // stride + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    places = slice(first * stride + offset, (last - 1) * stride + offset + 1, stride)
    return slice(first - start, last - start), places


def row_tiles(P: int, bytes_a_row: int) -> list[range]:
    """The P output rows in tiles of about TILE_BYTES, at least one row each."""
    rows = max(1, TILE_BYTES // max(1, bytes_a_row))
    return [range(p, min(p + rows, P)) for p in range(0, P, rows)]


def runs(size: int, each: int) -> list[slice]:
    """``size`` things in runs of ``each``, the last one shorter."""
    return [slice(start, min(start + each, size)) for start in range(0, size, each)]


def channel_runs(channels: int, bytes_a_channel: int) -> list[slice]:
    """Channels in runs of about TILE_BYTES, at least one each."""
    return runs(channels, max(1, TILE_BYTES // max(1, bytes_a_channel)))
