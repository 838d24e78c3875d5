"""The gradient of a convolution's input as convolutions of dy with stride 1, one for each residue of the stride.

    dx[h] = sum over taps r with  h + pad - r dilation = p stride  of  w[r] dy[p]

Inputs h that leave the same rest by the stride meet the same taps, every stride / gcd(stride, dilation)-th one, and
dy at neighboring places: a convolution with part of the filter, turned around, that writes every stride-th pixel. Only
products that exist are made, where dy spread with zeros by the stride would take stride^2 times as many. With stride 1
there is one residue, and it is the whole filter turned around.
"""

from dataclasses import dataclass, replace
from itertools import product

from convolt.engines.jit.kernels.specs import ConvSpec, Frame, Windowing


@dataclass(frozen=True)
class Residue:
    """Inputs ``start``, ``start + stride``, ...: ``count`` of them, of one axis.

    taps: of the filter, in the order in which their places in dy ascend. place: of the first input's first tap.
    dilation: from a tap's place to the next one's.
    """

    start: int
    count: int
    taps: tuple[int, ...]
    place: int
    dilation: int

    @property
    def last(self) -> int:
        """The last input's last place in dy."""
        return self.place + (len(self.taps) - 1) * self.dilation + self.count - 1


def along(size: int, kernel: int, stride: int, pad: int, dilation: int) -> tuple[Residue, ...]:
    """The residues of an axis of so many inputs; some may have no taps."""
    found = []
    for start in range(min(stride, size)):
        taps = [r for r in reversed(range(kernel)) if (start + pad - r * dilation) % stride == 0]
        place = (start + pad - taps[0] * dilation) // stride if taps else 0
        step = (taps[0] - taps[1]) * dilation // stride if len(taps) > 1 else 1
        found.append(Residue(start, -(-(size - start) // stride), tuple(taps), place, step))
    return tuple(found)


@dataclass(frozen=True)
class Part:
    """One of the convolutions that make dx: ``conv`` from the framed dy to its pixels of dx, as if they were dense.

    target: elements from the first pixel of dx to its first one. filters: rows of packed filters before its own.
    """

    conv: ConvSpec
    target: int
    filters: int


def _axes(spec: ConvSpec) -> tuple[tuple[Residue, ...], tuple[Residue, ...]]:
    x, window = spec.x, spec.window
    rows = along(x.H, window.R, window.stride_h, window.top, window.dilation_h)
    return rows, along(x.W, window.S, window.stride_w, window.left, window.dilation_w)


def slope_frame(spec: ConvSpec) -> Frame:
    """Dy of one image with the border that the parts of dx want."""
    sizes = []
    for residues, outputs in zip(_axes(spec), (spec.P, spec.Q), strict=True):
        before = max([0, *(-one.place for one in residues if one.taps)])
        behind = max([outputs, *(one.last + 1 for one in residues if one.taps)])
        sizes.append((before, before + behind))
    (top, rows), (left, columns) = sizes
    return Frame(spec.K, spec.P, spec.Q, rows, columns, (top * columns + left) * spec.K)


def parts(spec: ConvSpec) -> tuple[Part, ...]:
    """The convolutions that make dx; inputs that no tap meets are in none of them."""
    x, frame = spec.x, slope_frame(spec)
    found, filters = [], 0
    for rows, columns in product(*_axes(spec)):
        if not rows.taps or not columns.taps:
            continue
        source = replace(frame, origin=frame.origin + rows.place * frame.pitch + columns.place * spec.K)
        conv = replace(
            spec,
            x=source,
            y=Frame(x.C, rows.count, columns.count, rows.count, columns.count, 0),
            window=Windowing(len(rows.taps), len(columns.taps), 1, 1, 0, 0, rows.dilation, columns.dilation),
            K=x.C,
            P=rows.count,
            Q=columns.count,
            bias=False,
            slope=1.0,
            pool=(1, 1),
            windows=None,
            wants_dx=False,
        )
        found.append(Part(conv, (rows.start * x.W + columns.start) * x.C, filters))
        filters += conv.segments * conv.depth
    return tuple(found)


def tap_order(spec: ConvSpec) -> tuple[int, ...]:
    """Taps r S + s of the filter, in the order in which the parts of dx have them packed."""
    return tuple(
        r * spec.window.S + s for rows, columns in product(*_axes(spec)) for r in rows.taps for s in columns.taps
    )


def packed_depth(spec: ConvSpec, turned: bool) -> int:
    """Rows of a group's packed filters, each one's depth after another's; turned for dx."""
    return sum(conv.segments * conv.depth for conv in _packed_for(spec, turned))


def packed_taps(spec: ConvSpec, turned: bool) -> tuple[tuple[int, int], ...]:
    """Taps in the order in which they are packed, and where in depth the numbers of each begin."""
    order = iter(tap_order(spec) if turned else range(spec.window.R * spec.window.S))
    found, begin = [], 0
    for conv in _packed_for(spec, turned):
        for _ in range(conv.segments):
            found += [(next(order), begin + i * conv.channels) for i in range(conv.segment_taps)]
            begin += conv.depth * conv.together
    return tuple(found)


def _packed_for(spec: ConvSpec, turned: bool) -> list[ConvSpec]:
    return [part.conv for part in parts(spec)] if turned else [spec]


def covers(spec: ConvSpec) -> bool:
    """Whether every input is met by a tap."""
    return all(one.taps for residues in _axes(spec) for one in residues)
