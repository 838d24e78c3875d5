"""What convolutions on AMX tiles are compiled for: which way operands are read, and how scratch memory is cut.

Sizes of scratch are bytes for one thread, each part on a 64-byte boundary.
"""

from dataclasses import dataclass, replace

from convolt.engines.jit.kernels.specs import BF16, BLOCK, DEPTH, FLOAT, GROUP, ConvSpec, round_up, turned


@dataclass(frozen=True)
class TileSpec:
    """A convolution on AMX tiles: the float32 one, and how its operands lie in the thread's scratch memory.

    Sizes of scratch are bytes, each part on a 64-byte boundary.
    """

    conv: ConvSpec

    @property
    def direct(self) -> bool:
        """Whether tile rows are read where the image lies: 16 pixels of a row, 32 channels of a tap."""
        conv = self.conv
        return conv.Q > DEPTH // 4 and conv.x.C >= DEPTH // 2 and conv.window.dilation_w == 1

    @property
    def channels(self) -> int:
        """Channels of a pixel in the bf16 image: whole tile rows where they are read directly."""
        return round_up(self.conv.x.C, DEPTH) if self.direct else self.conv.x.C

    @property
    def depth(self) -> int:
        """Length of the sum: all taps of all channels, in whole tile rows."""
        window = self.conv.window
        return round_up(window.R * window.S * self.channels, DEPTH)

    @property
    def columns(self) -> int:
        """Output channels in whole blocks."""
        return round_up(self.conv.K, BLOCK)

    @property
    def group_images(self) -> int:
        """Images that are gathered together."""
        if self.direct:
            return 1
        return max(1, min(self.conv.images, GROUP // (self.conv.P * self.conv.Q)))

    @property
    def group_rows(self) -> int:
        """Output rows of an image that are computed together: whole pools, whole tiles."""
        conv, pool = self.conv, self.conv.pool[0]
        if self.direct:
            pairs = 2 if conv.Q <= DEPTH // 2 else 1
            return pool * pairs if pool % 2 and pairs == 2 else max(pool, pairs)
        if self.group_images > 1:
            return conv.P
        return min(round_up(conv.P, pool), max(1, GROUP // conv.Q // pool) * pool)

    @property
    def row_pixels(self) -> int:
        """Pixels from one output row to the next in the scratch of results."""
        return round_up(self.conv.Q, DEPTH // 2 if self.conv.Q <= DEPTH // 2 else DEPTH) if self.direct else self.conv.Q

    @property
    def pixels(self) -> int:
        """Output pixels of a group, in whole blocks."""
        return round_up(self.group_images * self.group_rows * self.row_pixels, BLOCK)

    @property
    def image_bytes(self) -> int:
        """The bf16 image, with what tiles read behind it."""
        conv = self.conv
        behind = (BLOCK * conv.window.stride_w + conv.window.stride_h * conv.x.columns + DEPTH) * self.channels
        return round_up(BF16 * (conv.x.rows * conv.x.columns * self.channels + behind), 64)

    @property
    def gathered_bytes(self) -> int:
        """Columns of a group."""
        return 0 if self.direct else round_up(BF16 * self.pixels * self.depth, 64)

    @property
    def result_bytes(self) -> int:
        """Products of a group with one block of filters."""
        return round_up(FLOAT * self.pixels * BLOCK, 64)

    @property
    def scratch(self) -> int:
        """All of it, bytes for each thread."""
        return self.group_images * self.image_bytes + self.gathered_bytes + self.result_bytes


@dataclass(frozen=True)
class TileBackSpec:
    """The backward pass of a convolution on AMX tiles; ``conv`` is the forward's. accumulate: whether dw is added."""

    conv: ConvSpec
    accumulate: bool = True

    @property
    def gather(self) -> "TileSpec":
        """How x is gathered for dw: always as columns, without the pool's rows."""
        return GatherSpec(replace(self.conv, pool=(1, 1)))

    @property
    def inputs(self) -> TileSpec:
        """The convolution that makes dx of the framed dy."""
        return TileSpec(replace(turned(self.conv), images=self.gather.group_images))

    @property
    def slopes_columns(self) -> int:
        """Channels of dy in whole blocks."""
        return round_up(self.conv.K, BLOCK)

    @property
    def part(self) -> int:
        """Elements of a chunk's dw: (columns, depth)."""
        return self.slopes_columns * self.gather.depth

    @property
    def slopes_bytes(self) -> int:
        """Slopes of one image as bf16 rows (pixels, K in whole blocks), zeros behind, and room for a row of floats."""
        pixels = self.conv.P * self.conv.Q + self.gather.pixels
        return round_up(BF16 * pixels * self.slopes_columns, 64)

    @property
    def scratch(self) -> int:
        """Bytes for each thread."""
        gather, inputs = self.gather, self.inputs
        own = gather.group_images * (gather.image_bytes + self.slopes_bytes)
        columns = 2 * gather.gathered_bytes + round_up(BF16 * self.slopes_columns * gather.pixels, 64)
        return own + columns + (inputs.scratch if self.conv.wants_dx else 0)


class GatherSpec(TileSpec):
    """A convolution whose columns are always gathered, as the gradient of the weights wants them."""

    @property
    def direct(self) -> bool:
        """Never."""
        return False
