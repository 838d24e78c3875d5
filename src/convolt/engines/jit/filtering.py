"""Winograd's minimal filtering along one axis: two outputs of a filter from fewer products than taps.

    y = A^T [(G w) * (B^T x)],  * element by element        two outputs of t taps from t + 1 products (Winograd 1980)

                1  0 -1  0         1   0   0
    3 taps B^T  0  1  1  0   G    1/2 1/2 1/2   A^T  1  1  1  0      2 taps B^T  1 -1  0   G  1 0   A^T  1 1 0
                0 -1  1  0        1/2 -1/2 1/2       0  1 -1 -1                  0  1  0      1 1        0 1 1
                0  1  0 -1         0   0   1                                     0 -1  1      0 1

A longer filter is cut into such pieces, each of which sees the pixels from its first tap on, and their outputs are
added up: 5 taps are 3 and 2 with 7 products instead of 10. One algorithm for all taps would take 6, but by factors of 4
and more, which float32 pays with digits; here all are 1 and 1/2.

4 and 7 taps end in two pieces of two, *twins*. Tiles are two outputs apart, as these pieces are: what the second sees
in a tile, the first sees in the next one. So the planes of pixels are those of the first alone, and since both become
outputs by the same matrix, their products are added up before: 7 planes of a tile for the 10 of a filter of 7 taps.

Along two axes the transforms are applied one after the other. All methods take and return LLVM values, vectors whose
lanes are channels or filters.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convolt.engines.jit.kernels.winograd_specs import cut, planes_along, products_along, twins
from convolt.engines.jit.vectors import Floats


class Piece(ABC):
    """A filter so short that the matrices above serve it. Values of t + 1 products are called planes."""

    taps: int

    @property
    def planes(self) -> int:
        """Products for two outputs."""
        return self.taps + 1

    @abstractmethod
    def pixels(self, floats: Floats, x: list[Any]) -> list[Any]:
        """B^T x of t + 1 pixels."""

    @abstractmethod
    def slopes(self, floats: Floats, a: Any, b: Any) -> list[Any]:
        """A dy of the slopes of two outputs."""

    @abstractmethod
    def outputs(self, floats: Floats, m: list[Any]) -> list[Any]:
        """A^T m: two outputs."""

    @abstractmethod
    def filters(self, floats: Floats, w: list[Any]) -> list[Any]:
        """G w of t taps."""

    @abstractmethod
    def gradient(self, floats: Floats, du: list[Any]) -> list[Any]:
        """G^T du: t taps."""


class Two(Piece):
    """F(2, 2)."""

    taps = 2

    def pixels(self, floats: Floats, x: list[Any]) -> list[Any]:
        builder = floats.builder
        return [builder.fsub(x[0], x[1]), x[1], builder.fsub(x[2], x[1])]

    def slopes(self, floats: Floats, a: Any, b: Any) -> list[Any]:
        return [a, floats.builder.fadd(a, b), b]

    def outputs(self, floats: Floats, m: list[Any]) -> list[Any]:
        return [floats.builder.fadd(m[0], m[1]), floats.builder.fadd(m[1], m[2])]

    def filters(self, floats: Floats, w: list[Any]) -> list[Any]:
        return [w[0], floats.builder.fadd(w[0], w[1]), w[1]]

    def gradient(self, floats: Floats, du: list[Any]) -> list[Any]:
        return self.outputs(floats, du)


class Three(Piece):
    """F(2, 3)."""

    taps = 3

    def pixels(self, floats: Floats, x: list[Any]) -> list[Any]:
        builder = floats.builder
        return [builder.fsub(x[0], x[2]), builder.fadd(x[1], x[2]), builder.fsub(x[2], x[1]), builder.fsub(x[1], x[3])]

    def slopes(self, floats: Floats, a: Any, b: Any) -> list[Any]:
        builder = floats.builder
        return [a, builder.fadd(a, b), builder.fsub(a, b), builder.fsub(floats.zero, b)]

    def outputs(self, floats: Floats, m: list[Any]) -> list[Any]:
        builder = floats.builder
        high, low = builder.fadd(m[1], m[2]), builder.fsub(m[1], m[2])
        return [builder.fadd(m[0], high), builder.fsub(low, m[3])]

    def filters(self, floats: Floats, w: list[Any]) -> list[Any]:
        builder, half = floats.builder, floats.constant(0.5)
        total, middle = builder.fmul(half, builder.fadd(w[0], w[2])), builder.fmul(half, w[1])
        return [w[0], builder.fadd(total, middle), builder.fsub(total, middle), w[2]]

    def gradient(self, floats: Floats, du: list[Any]) -> list[Any]:
        builder, half = floats.builder, floats.constant(0.5)
        total = builder.fmul(half, builder.fadd(du[1], du[2]))
        difference = builder.fmul(half, builder.fsub(du[1], du[2]))
        return [builder.fadd(du[0], total), difference, builder.fadd(total, du[3])]


PIECES: dict[int, Piece] = {piece.taps: piece for piece in (Two(), Three())}


@dataclass(frozen=True)
class Axis:
    """A filter of so many taps along one axis, cut into pieces whose planes follow one another.

    Those of a filter are as many as its products for two outputs; of a tile twins have theirs in common. apart: not of
    pixels, so that the second twin has planes of its own. bundle: the number of one, if only its pieces are wanted.
    """

    taps: int
    apart: bool = False
    bundle: int | None = None

    @property
    def pieces(self) -> tuple[tuple[int, Piece], ...]:
        """The first tap of each, which is also its first pixel, and the piece."""
        return tuple((first, PIECES[taps]) for first, taps in cut(self.taps, self.bundle))

    @property
    def distinct(self) -> tuple[tuple[int, Piece], ...]:
        """All but the second of twins."""
        return self.pieces[:-1] if twins(self.taps, self.bundle) else self.pieces

    @property
    def seen(self) -> tuple[tuple[int, Piece], ...]:
        """Those that pixels have planes of."""
        return self.pieces if self.apart else self.distinct

    @property
    def reach(self) -> int:
        """Pixels of a tile that they see."""
        return max(first + piece.planes for first, piece in self.seen)

    @property
    def products(self) -> int:
        """Planes of a filter."""
        return products_along(self.taps, self.bundle)

    @property
    def planes(self) -> int:
        """Of a tile of slopes, and of products when those of twins are added up."""
        return planes_along(self.taps, self.bundle)

    def pixels(self, floats: Floats, x: list[Any]) -> list[Any]:
        """The planes of so many pixels as they reach."""
        return [plane for first, piece in self.seen for plane in piece.pixels(floats, x[first:])]

    def slopes(self, floats: Floats, a: Any, b: Any) -> list[Any]:
        """The planes of the slopes of two outputs."""
        return [plane for _, piece in self.distinct for plane in piece.slopes(floats, a, b)]

    def outputs(self, floats: Floats, m: list[Any]) -> list[Any]:
        """Two outputs of the planes of products: those of all pieces added up."""
        first, *others = _each(self.distinct, m, lambda piece, own: piece.outputs(floats, own))
        for other in others:
            first = [floats.builder.fadd(one, two) for one, two in zip(first, other, strict=True)]
        return first

    def filters(self, floats: Floats, w: list[Any]) -> list[Any]:
        """The planes of the taps."""
        return [plane for first, piece in self.pieces for plane in piece.filters(floats, w[first : first + piece.taps])]

    def gradient(self, floats: Floats, du: list[Any]) -> list[Any]:
        """The taps of the planes' gradient."""
        return [tap for taps in _each(self.pieces, du, lambda piece, own: piece.gradient(floats, own)) for tap in taps]


def _each(
    pieces: tuple[tuple[int, Piece], ...], planes: list[Any], apply: Callable[[Piece, list[Any]], list[Any]]
) -> list[list[Any]]:
    """Of each piece and its planes."""
    found, begin = [], 0
    for _, piece in pieces:
        found.append(apply(piece, planes[begin : begin + piece.planes]))
        begin += piece.planes
    return found
