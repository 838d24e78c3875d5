"""Which convolutions go by Winograd's algorithm, and how their tiles are cut into blocks. No Numba, as in ``specs``."""

from dataclasses import dataclass, replace
from typing import Literal

from convolt.engines.jit.kernels.residues import parts, slope_frame
from convolt.engines.jit.kernels.specs import VECTORS, ConvSpec, ReduceSpec, round_up

TILES, MANY_TILES = 64, 128  # of 16 planes in a block: few enough for the L2 cache; many for filters that fill it
FEWEST_TILES = 32  # in a block, about, of more planes
BUNDLED_TILES = 64  # where not all planes are made at once
LARGE_FILTERS = 1 << 19  # transformed numbers from which they fill it: 2 MB
PAYS = 16  # channels and filters from which the transforms cost little beside the products
MOST_PRODUCTS, MOST_PAIRS = 0.7, 0.6  # of those by taps that pay for the transforms: in float32, in pairs of bf16
TWIN = 3  # planes of a piece of two taps, as each of twins is
LONGEST = 7  # taps along an axis: of a longer filter's tile, the planes are too many
CHANNELS_AT_ONCE = 8  # channels whose gradient parts one chunk adds up

Written = Literal["fp32", "channels", "tiles"]
"""Transformed numbers: float32; or bf16 in pairs, of neighboring channels, or of neighboring tiles of a row."""


def obstacle(spec: ConvSpec) -> str:
    """Why a convolution cannot go by Winograd's algorithm, or would not gain; empty if it can."""
    window, x, dilations = spec.window, spec.x, (spec.window.dilation_h, spec.window.dilation_w)
    sizes = [(spec.P, spec.Q), *([(x.H, x.W)] if spec.wants_dx else [])]
    found = {
        "stride": (window.stride_h, window.stride_w) != (1, 1),
        f"not 2x2 to {LONGEST}x{LONGEST}": min(window.R, window.S) < 2 or max(window.R, window.S) > LONGEST,
        "groups": spec.groups > 1,
        f"fewer than {PAYS} channels": min(x.C, spec.K) < PAYS,
        "no multiple of the dilation": any(pair[i] % dilations[i] for pair in sizes for i in (0, 1)),
    }
    if reasons := [reason for reason, holds in found.items() if holds]:
        return reasons[0]
    return "" if all(_saves(spec, *pair) for pair in sizes) else "too few pixels"


def _saves(spec: ConvSpec, height: int, width: int) -> bool:
    """Whether products are saved that are worth the transforms: tiles at the edge may be half used."""
    window = spec.window
    tiles = -(-height // (2 * window.dilation_h)) * -(-width // (2 * window.dilation_w))
    made = tiles * window.dilation_h * window.dilation_w * products_along(window.R) * products_along(window.S)
    most = MOST_PAIRS if spec.pairs else MOST_PRODUCTS
    return made <= most * height * width * window.R * window.S


def fits_tiles(spec: ConvSpec) -> bool:
    """Whether a max-pool behind it, if there is one, takes the four outputs of a tile together."""
    window = spec.window
    return spec.pool == (1, 1) or (spec.pool == (2, 2) and (window.dilation_h, window.dilation_w) == (1, 1))


def cut(taps: int, bundle: int | None = None) -> tuple[tuple[int, int], ...]:
    """The pieces of three and two taps of a filter along one axis: the first tap of each, and how many it has.

    bundle: the number of one whose pieces are wanted alone. A piece is one by itself, but `twins` are one together.
    """
    twos = {0: 0, 1: 2, 2: 1}[taps % 3]
    threes = (taps - 2 * twos) // 3
    pieces = (*((3 * i, 3) for i in range(threes)), *((3 * threes + 2 * i, 2) for i in range(twos)))
    if bundle is None:
        return pieces
    return pieces[bundle:] if bundle == bundles(taps) - 1 else pieces[bundle : bundle + 1]


def bundles(taps: int) -> int:
    """How many there are."""
    return len(cut(taps)) - int(taps % 3 == 1)


def twins(taps: int, bundle: int | None = None) -> bool:
    """Whether it ends in two pieces of two taps: what the second sees, the first sees one tile further on."""
    return taps % 3 == 1 and bundle in (None, bundles(taps) - 1)


def products_along(taps: int, bundle: int | None = None) -> int:
    """Products for two outputs along such an axis, planes of a filter: one more than each piece has taps."""
    return sum(piece + 1 for _, piece in cut(taps, bundle))


def lone_planes(taps: int, bundle: int | None = None) -> int:
    """Planes, of a filter or of a tile, in front of those of twins; all if there are none."""
    return products_along(taps, bundle) - (2 * TWIN if twins(taps, bundle) else 0)


def planes_along(taps: int, bundle: int | None = None) -> int:
    """Planes of a tile: twins have theirs in common."""
    return products_along(taps, bundle) - (TWIN if twins(taps, bundle) else 0)


@dataclass(frozen=True)
class Tiling:
    """An image as ``high`` x ``wide`` tiles of 2x2 pixels; a block is ``rows`` rows of them of ``images`` images.

    Of an odd height or width the last tiles have one row or column of pixels. With a dilation, the pixels that one tap
    of the filter meets are an image of their own.
    """

    height: int
    width: int
    rows: int
    images: int

    @property
    def high(self) -> int:
        """Rows of tiles."""
        return -(-self.height // 2)

    @property
    def wide(self) -> int:
        """Tiles of a row."""
        return -(-self.width // 2)

    @property
    def tiles(self) -> int:
        """Of a block."""
        return self.images * self.rows * self.wide


@dataclass(frozen=True)
class Planes:
    """The planes of a block's transformed tiles, in words of 32 bits.

    In each, ``images`` have ``rows`` rows of tiles with ``entries`` of so many ``words``: tiles, or pairs of them.
    """

    number: int
    written: Written
    images: int
    rows: int
    entries: int
    words: int

    @classmethod
    def of(
        cls, number: int, tiling: Tiling, channels: int, written: Written = "fp32", further: tuple[int, int] = (0, 0)
    ) -> "Planes":
        """So many, of tiles with so many channels; of an odd number of tiles the last one has a pair to itself.

        further: rows of tiles, and tiles of a row, beyond those of the block.
        """
        entries = -(-tiling.wide // 2) if written == "tiles" else tiling.wide + further[1]
        words = channels // 2 if written == "channels" else channels
        return cls(number, written, tiling.images, tiling.rows + further[0], entries, words)

    @property
    def count(self) -> int:
        """Entries of a plane."""
        return self.images * self.rows * self.entries

    @property
    def image(self) -> int:
        """Words from an image to the next."""
        return self.rows * self.step

    @property
    def step(self) -> int:
        """Words from a row of tiles to the next."""
        return self.entries * self.words

    @property
    def plane(self) -> int:
        """Words from a plane to the next: a cache line more than it has, or all planes would share a few sets."""
        return round_up(self.count * self.words, 16) + 16

    @property
    def size(self) -> int:
        """Words of all."""
        return self.number * self.plane


def tiling(height: int, width: int, images: int, tiles: int = TILES) -> Tiling:
    """Blocks of about so many tiles: whole rows that cut an image of so many pixels evenly, or whole images."""
    high, wide = -(-height // 2), -(-width // 2)
    together = max(1, min(images, round(tiles / (high * wide))))
    rows = min((rows for rows in range(1, high + 1) if high % rows == 0), key=lambda rows: abs(rows - tiles / wide))
    return Tiling(height, width, high if together > 1 else rows, together)


@dataclass(frozen=True)
class WinogradSpec:
    """Everything a convolution by Winograd's algorithm is compiled for."""

    conv: ConvSpec

    @property
    def transformed(self) -> int:
        """Planes of filters: products of a channel for 2x2 outputs."""
        return products_along(self.conv.window.R) * products_along(self.conv.window.S)

    @property
    def tile_planes(self) -> int:
        """Planes of tiles."""
        return planes_along(self.conv.window.R) * planes_along(self.conv.window.S)

    @property
    def further(self) -> tuple[int, int]:
        """Rows of tiles, and tiles of a row, that twins see beyond a block."""
        return int(twins(self.conv.window.R)), int(twins(self.conv.window.S))

    @property
    def residues(self) -> int:
        """Sets of pixels that no tap leads out of: as many as the dilation has positions."""
        return self.conv.window.dilation_h * self.conv.window.dilation_w

    def planes(self, tiling: Tiling) -> Planes:
        """Of tiles that are multiplied by filters: the sum goes over channels."""
        written: Written = "channels" if self.conv.pairs else "fp32"
        return Planes.of(self.tile_planes, tiling, self.conv.x.C, written, self.further)

    def products(self, tiling: Tiling) -> Planes:
        """Of their products."""
        return Planes.of(self.tile_planes, tiling, self.conv.K)

    def products_size(self, tiling: Tiling) -> int:
        """Words of a block's transformed inputs and its products."""
        return self.planes(tiling).size + self.products(tiling).size

    @property
    def bundles(self) -> int:
        """How many bundles the filter's rows have. dw is made of one after the other.

        Fewer planes at a time are more tiles, so that the gradient of the transformed filters, which may be larger than
        all planes of a tile's row, is read and written less often.
        """
        return bundles(self.conv.window.R)

    def summed(self, bundle: int) -> Planes:
        """Of tiles that are multiplied by those of dy: the sum goes over tiles.

        In pairs of tiles twins have planes of their own: what begins at an odd tile is no pair.
        """
        window, C = self.conv.window, self.conv.x.C
        if self.conv.pairs:
            number = products_along(window.R, bundle) * products_along(window.S)
            return Planes.of(number, self.gradient, C, "tiles")
        number, further = planes_along(window.R, bundle) * planes_along(window.S), twins(window.R, bundle)
        return Planes.of(number, self.gradient, C, "fp32", (int(further), self.further[1]))

    def slopes(self, bundle: int) -> Planes:
        """Of those of dy."""
        number = planes_along(self.conv.window.R, bundle) * planes_along(self.conv.window.S)
        return Planes.of(number, self.gradient, self.conv.K, "tiles" if self.conv.pairs else "fp32")

    def summed_size(self, bundle: int) -> int:
        """Words of both."""
        return self.summed(bundle).size + self.slopes(bundle).size

    @property
    def depth(self) -> int:
        """Words of depth of the packed filters."""
        return self.conv.x.C // self.conv.together

    @property
    def forward(self) -> Tiling:
        """Of y, before the pool."""
        conv, window = self.conv, self.conv.window
        tiles = max(FEWEST_TILES, 16 * (MANY_TILES if self.large else TILES) // self.transformed)
        height, width = conv.P // window.dilation_h, conv.Q // window.dilation_w
        if conv.pool != (1, 1):  # which drops what is left
            height, width = height - height % 2, width - width % 2
        return tiling(height, width, conv.images, tiles)

    @property
    def gradient(self) -> Tiling:
        """Of dy, for dw: of the images of ``forward``, but more tiles where there are several bundles."""
        tiles = self.forward
        if self.bundles == 1 or tiles.images > 1:
            return tiles
        return replace(tiles, rows=tiling(tiles.height, tiles.width, 1, BUNDLED_TILES).rows)

    @property
    def one_block(self) -> bool:
        """Whether all images of a chunk are one block."""
        tiles = self.gradient
        return tiles.rows == tiles.high and self.conv.images <= tiles.images and self.residues == 1

    @property
    def rows_apart(self) -> bool:
        """Whether a block's rows of tiles are multiplied one by one: tiles further on lie between them."""
        return any(self.further)

    @property
    def stores_part(self) -> bool:
        """Whether one product is all of a chunk's gradient, which need not begin at zero."""
        return self.one_block and (not self.rows_apart or self.conv.pairs or self.forward.images == 1)

    @property
    def large(self) -> bool:
        """Whether its filters do not stay in the L2 cache."""
        return self.part >= LARGE_FILTERS

    @property
    def back(self) -> "WinogradSpec":
        """The convolution that makes dx of the framed dy."""
        (part,) = parts(self.conv)
        return WinogradSpec(replace(part.conv, images=self.conv.images))

    @property
    def inputs(self) -> Tiling:
        """Of dx, for as many images at once as ``forward`` has."""
        back = self.back.forward
        images = self.forward.images
        return replace(back, images=images, rows=back.high if images > 1 else back.rows)

    @property
    def block(self) -> int:
        """Columns of a panel of transformed filters, which are packed (planes, panels, depth, block) words."""
        return VECTORS * self.conv.lanes

    @property
    def panels(self) -> int:
        """How many there are."""
        return -(-self.conv.K // self.block)

    @property
    def packed(self) -> int:
        """Words of the packed filters, and a vector more, which products may read."""
        return self.transformed * self.panels * self.depth * self.block + self.conv.lanes

    @property
    def part(self) -> int:
        """Elements of a chunk's gradient of the transformed filters, (planes, C, K)."""
        return self.transformed * self.conv.x.C * self.conv.K

    def part_before(self, bundle: int) -> int:
        """Those of the bundles in front of this one."""
        rows = sum(products_along(self.conv.window.R, before) for before in range(bundle))
        return self.part // products_along(self.conv.window.R) * rows

    def part_run(self, channels: int) -> int:
        """Elements of so many of its channels, and a vector more."""
        return self.transformed * channels * self.conv.K + self.conv.lanes

    @property
    def scratch(self) -> int:
        """Words of scratch memory for each thread, forward: transformed inputs and products, images to pool."""
        tiles = self.forward
        return self.products_size(tiles) + self._spare + tiles.images * self.conv.unpooled_size

    @property
    def back_scratch(self) -> int:
        """The same backward, with the framed dy of a block's images in front."""
        conv = self.conv
        inputs = self.back.products_size(self.inputs) if conv.wants_dx else 0
        return self.frames + max(*map(self.summed_size, range(self.bundles)), inputs) + self._spare

    @property
    def frames(self) -> int:
        """Elements of the framed dy of a block's images."""
        return round_up(self.forward.images * slope_frame(self.conv).size, 16) + 16

    @property
    def _spare(self) -> int:
        """What products may read behind the end."""
        return VECTORS * self.conv.lanes


@dataclass(frozen=True)
class WinogradPack:
    """R x S filters, any number, transformed and packed in panels of ``block``; turned around and transposed for dx.

    pairs: rounded to bf16, two neighbors in depth side by side.
    """

    R: int
    S: int
    block: int
    turned: bool
    pairs: bool


@dataclass(frozen=True)
class WinogradReduce(ReduceSpec):
    """Parts of the gradient of transformed R x S filters, any number."""

    R: int
    S: int

    @property
    def planes(self) -> int:
        """Elements of one."""
        return products_along(self.R) * products_along(self.S)
