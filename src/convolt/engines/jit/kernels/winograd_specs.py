"""Which convolutions go by Winograd's algorithm, and how their tiles are cut into blocks. No Numba, as in ``specs``."""

from dataclasses import dataclass, replace
from typing import Literal

from convolt.engines.jit.kernels.residues import parts, slope_frame
from convolt.engines.jit.kernels.specs import VECTORS, ConvSpec, round_up

TRANSFORMED = 16  # elements of a transformed 3x3 filter, and of a tile
TILES, MANY_TILES = 64, 128  # of a block, about: few enough for the L2 cache; many for filters that fill it themselves
LARGE_FILTERS = 1 << 15  # channels times filters from which they do: 2 MB transformed
PAYS = 16  # channels and filters from which the transforms cost little beside the products
CHANNELS_AT_ONCE = 8  # channels whose gradient parts one chunk adds up

Written = Literal["fp32", "channels", "tiles"]
"""Transformed numbers: float32; or bf16 in pairs, of neighboring channels, or of neighboring tiles of a row."""


def obstacle(spec: ConvSpec) -> str:
    """Why a convolution cannot go by Winograd's algorithm, or would not gain; empty if it can."""
    window, x = spec.window, spec.x
    steps = (window.stride_h, window.stride_w, window.dilation_h, window.dilation_w)
    if (window.R, window.S, *steps) != (3, 3, 1, 1, 1, 1):
        return "not 3x3 with stride 1"
    if spec.groups > 1:
        return "groups"
    if min(x.C, spec.K) < PAYS:
        return f"fewer than {PAYS} channels"
    if spec.P % 2 or spec.Q % 2 or (spec.wants_dx and (x.H % 2 or x.W % 2)):
        return "an odd size"
    if spec.pool not in ((1, 1), (2, 2)) or (spec.pool == (2, 2) and spec.slope not in (0, 1)):
        return "the pool behind it"
    return ""


@dataclass(frozen=True)
class Tiling:
    """An image as ``high`` x ``wide`` tiles of 2x2 pixels; a block is ``rows`` rows of them of ``images`` images."""

    high: int
    wide: int
    rows: int
    images: int

    @property
    def tiles(self) -> int:
        """Of a block."""
        return self.images * self.rows * self.wide


@dataclass(frozen=True)
class Planes:
    """The 16 planes of a block's transformed tiles, in words of 32 bits.

    In each, ``rows`` rows of tiles have ``entries`` of so many ``words``: tiles, or pairs of them.
    """

    written: Written
    rows: int
    entries: int
    words: int

    @classmethod
    def of(cls, tiling: Tiling, channels: int, written: Written = "fp32") -> "Planes":
        """Of tiles with so many channels; of an odd number of tiles the last one has a pair to itself."""
        entries = -(-tiling.wide // 2) if written == "tiles" else tiling.wide
        words = channels // 2 if written == "channels" else channels
        return cls(written, tiling.images * tiling.rows, entries, words)

    @property
    def count(self) -> int:
        """Entries of a plane."""
        return self.rows * self.entries

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
        return TRANSFORMED * self.plane


def tiling(height: int, width: int, images: int, tiles: int = TILES) -> Tiling:
    """Blocks of about so many tiles: whole rows that cut an image evenly, or whole images."""
    high, wide = height // 2, width // 2
    together = max(1, min(images, round(tiles / (high * wide))))
    rows = min((rows for rows in range(1, high + 1) if high % rows == 0), key=lambda rows: abs(rows - tiles / wide))
    return Tiling(high, wide, high if together > 1 else rows, together)


@dataclass(frozen=True)
class WinogradSpec:
    """Everything a convolution by Winograd's algorithm is compiled for."""

    conv: ConvSpec

    def planes(self, tiling: Tiling, channels: int) -> Planes:
        """Of tiles that are multiplied by filters: the sum goes over channels."""
        return Planes.of(tiling, channels, "channels" if self.conv.pairs else "fp32")

    def products_size(self, tiling: Tiling) -> int:
        """Words of a block's transformed inputs and its products."""
        return self.planes(tiling, self.conv.x.C).size + Planes.of(tiling, self.conv.K).size

    def summed(self, channels: int) -> Planes:
        """Of tiles of ``forward`` that are multiplied by those of dy: the sum goes over tiles."""
        return Planes.of(self.forward, channels, "tiles" if self.conv.pairs else "fp32")

    @property
    def depth(self) -> int:
        """Words of depth of the packed filters."""
        return self.conv.x.C // self.conv.together

    @property
    def forward(self) -> Tiling:
        """Of y, before the pool."""
        return tiling(self.conv.P, self.conv.Q, self.conv.images, MANY_TILES if self.large else TILES)

    @property
    def one_block(self) -> bool:
        """Whether all images of a chunk are one block."""
        tiles = self.forward
        return tiles.rows == tiles.high and self.conv.images <= tiles.images

    @property
    def large(self) -> bool:
        """Whether its filters do not stay in the L2 cache."""
        return self.conv.x.C * self.conv.K >= LARGE_FILTERS

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
        """Columns of a panel of transformed filters, which are packed (16, panels, depth, block) words."""
        return VECTORS * self.conv.lanes

    @property
    def panels(self) -> int:
        """How many there are."""
        return -(-self.conv.K // self.block)

    @property
    def packed(self) -> int:
        """Words of the packed filters, and a vector more, which products may read."""
        return TRANSFORMED * self.panels * self.depth * self.block + self.conv.lanes

    @property
    def part(self) -> int:
        """Elements of a chunk's gradient of the transformed filters, (16, C, K)."""
        return TRANSFORMED * self.conv.x.C * self.conv.K

    def part_run(self, channels: int) -> int:
        """Elements of so many of its channels, and a vector more."""
        return TRANSFORMED * channels * self.conv.K + self.conv.lanes

    @property
    def scratch(self) -> int:
        """Words of scratch memory for each thread, forward: transformed inputs and products."""
        return self.products_size(self.forward) + self._spare

    @property
    def back_scratch(self) -> int:
        """The same backward, with the framed dy of a block's images in front."""
        conv = self.conv
        inputs = self.back.products_size(self.inputs) if conv.wants_dx else 0
        return self.frames + max(self.summed(conv.x.C).size + self.summed(conv.K).size, inputs) + self._spare

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
    """Filters of any size transformed and packed in panels of ``block``; turned around and transposed for dx.

    pairs: rounded to bf16, two neighbors in depth side by side.
    """

    block: int
    turned: bool
    pairs: bool
