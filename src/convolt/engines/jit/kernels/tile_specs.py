"""What convolutions in bf16 are compiled for: which way operands are read, and how scratch memory is cut.

Sizes of scratch are bytes for one thread, each part on a 64-byte boundary.
"""

from dataclasses import dataclass, replace

from convolt.engines.jit.kernels.residues import parts, slope_frame
from convolt.engines.jit.kernels.specs import BF16, BLOCK, DEPTH, FLOAT, GROUP, ConvSpec, Frame, round_up, turned
from convolt.errors import EngineError

PLANE_PIXELS = 160  # of a group of output rows: runs and slopes are read once, where one block is the whole gradient
PLANE_BLOCKS_PIXELS = 256  # with several blocks, which come and go with each group
PLANE_GROUP = 64  # output pixels whose columns are gathered from planes at a time: they and results fit the L1 cache
BIAS_PARTS = 3  # bf16 numbers whose sum is a float32 number
SHIFTED_PIXELS = 1280  # of a group of images


@dataclass(frozen=True)
class TileSpec:
    """A convolution in bf16: the float32 one, and how its operands lie in memory.

    pixel: channels of a pixel where the image is bf16 rows already, zeros behind the last channel; 0 where it is not.
    step: the outputs are every so many rows and columns of y. Sizes of scratch are bytes, each part on a 64-byte
    boundary.
    """

    conv: ConvSpec
    pixel: int = 0
    step: tuple[int, int] = (1, 1)

    @property
    def direct(self) -> bool:
        """Whether tile rows are read where the image lies: 16 pixels of a row, 32 channels of a tap."""
        conv = self.conv
        return conv.Q > DEPTH // 4 and conv.x.C >= DEPTH // 2 and conv.window.dilation_w == 1

    @property
    def bias_taps(self) -> int:
        """How many taps of ones behind the last one carry the bias, in three parts: of planes, where there is room."""
        conv, window = self.conv, self.conv.window
        room = self.depth - window.R * window.S * self.channels
        return BIAS_PARTS if conv.bias and conv.x.planar and room >= BIAS_PARTS else 0

    @property
    def adds_bias(self) -> bool:
        """Whether the bias is still to be added to the products."""
        return self.conv.bias and not (self.bias_taps or self.starts_with_bias)

    @property
    def starts_with_bias(self) -> bool:
        """Whether sums of products begin with the bias, as pools on integers want, whether y is bf16 or not."""
        return self._pools_blocks and self.conv.bias and not self.bias_taps

    @property
    def pools_halves(self) -> bool:
        """Whether outputs are rounded before they are pooled, 32 channels at a time (``half_pool``)."""
        return self._pools_blocks and self.conv.y.half

    @property
    def _pools_blocks(self) -> bool:
        """Whether ReLU and a pool follow whole blocks of filters, on a unit whose CPU rounds to bf16."""
        conv = self.conv
        return conv.pool != (1, 1) and conv.slope == 0 and conv.K % BLOCK == 0 and conv.unit == "amx"

    @property
    def channels(self) -> int:
        """Channels of a pixel in the bf16 image: whole tile rows where they are read directly."""
        if self.pixel:
            return self.pixel
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
        return max(1, min(self.conv.images, self._together // (self.conv.P * self.conv.Q)))

    @property
    def group_rows(self) -> int:
        """Output rows of an image that are computed together: whole pools, whole tiles."""
        conv, pool = self.conv, self.conv.pool[0]
        if self.direct:
            pairs = 2 if conv.Q <= DEPTH // 2 else 1
            return pool * pairs if pool % 2 and pairs == 2 else max(pool, pairs)
        if self.group_images > 1:
            return conv.P
        return min(round_up(conv.P, pool), max(1, self._together // conv.Q // pool) * pool)

    @property
    def _together(self) -> int:
        """Output pixels that are gathered at a time, about."""
        return PLANE_GROUP if self.conv.x.planar else GROUP

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
        """The bf16 image, with what tiles read behind it; none where it is bf16 already."""
        conv = self.conv
        if self.in_place or self.pixel:
            return 0
        return round_up(BF16 * (conv.x.rows * conv.x.columns * self.channels + self.behind), 64)

    @property
    def in_place(self) -> bool:
        """Whether the image is bf16 already and read where it lies."""
        return self.conv.x.planar or self.conv.x.half

    @property
    def behind(self) -> int:
        """Numbers behind an image that tiles read, for rows of products that nobody wants."""
        window = self.conv.window
        return (BLOCK * window.stride_w + window.stride_h * self.conv.x.columns + DEPTH) * self.channels

    @property
    def gathered_bytes(self) -> int:
        """Columns of a group, and room for those of 16 pixels behind."""
        return 0 if self.direct else round_up(BF16 * (self.pixels + DEPTH // 2) * self.depth, 64)

    @property
    def result_bytes(self) -> int:
        """Products of a group with one block of filters."""
        return round_up(FLOAT * self.pixels * BLOCK, 64)

    @property
    def scratch(self) -> int:
        """All of it, bytes for each thread."""
        images = self.group_images * (self.image_bytes + self.unpooled_bytes)
        return images + self.gathered_bytes + self.result_bytes

    @property
    def unpooled_bytes(self) -> int:
        """One image's output in front of a pool with ``windows``; none without."""
        return FLOAT * self.conv.unpooled_size


@dataclass(frozen=True)
class TileBackSpec:
    """The backward pass of a convolution in bf16; ``conv`` is the forward's."""

    conv: ConvSpec

    @property
    def gather(self) -> "TileSpec":
        """How x is gathered for dw: always as columns, without the pool's rows."""
        return GatherSpec(replace(self.conv, pool=(1, 1), windows=None))

    @property
    def depth(self) -> int:
        """Numbers of a filter's gradient."""
        return self.gather.depth

    @property
    def channels(self) -> int:
        """Channels of a tap in it."""
        return self.conv.x.C

    @property
    def inputs(self) -> tuple[TileSpec, ...]:
        """The convolutions that make dx of the framed dy, one for each residue of the stride (``residues``)."""
        conv, x, found = self.conv, self.conv.x, []
        for part in parts(conv):
            y = Frame(x.C, x.H, x.W, x.H, x.W, part.target, half=conv.half_dx)
            back = replace(part.conv, y=y, images=self.gather.group_images)
            found.append(TileSpec(back, self.slopes_columns, (conv.window.stride_h, conv.window.stride_w)))
        return tuple(found)

    @property
    def inputs_together(self) -> int:
        """Images whose dx is made together."""
        return min((one.group_images for one in self.inputs), default=1)

    @property
    def frame_bytes(self) -> int:
        """The framed dy of one image as bf16 rows, with what tiles read behind it."""
        frame = slope_frame(self.conv)
        behind = max((one.behind for one in self.inputs), default=0)
        return round_up(BF16 * (frame.rows * frame.columns * self.slopes_columns + behind), 64)

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
        gather = self.gather
        own = gather.group_images * (gather.image_bytes + self.slopes_bytes) + FLOAT * self.conv.unpooled_size
        columns = 2 * gather.gathered_bytes + round_up(BF16 * self.slopes_columns * gather.pixels, 64)
        if not self.conv.wants_dx:
            return own + columns
        products = max((one.gathered_bytes + one.result_bytes for one in self.inputs), default=0)
        return own + columns + self.inputs_together * self.frame_bytes + products


class GatherSpec(TileSpec):
    """A convolution whose columns are always gathered, as the gradient of the weights wants them."""

    @property
    def direct(self) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class ShiftedBackSpec:
    """The backward pass with stride 1: pixels of x and dy are counted alike, along the rows of x's frame.

    A tap is then a constant distance: dw needs no gathered columns, and dy in these rows, zeros around, is the frame
    that dx is computed of. Images of a group lie one behind another and share rows of their borders.
    """

    conv: ConvSpec

    @property
    def channels(self) -> int:
        """Channels of x in whole tiles."""
        return round_up(self.conv.x.C, BLOCK // 2)

    @property
    def depth(self) -> int:
        """Numbers of a filter's gradient."""
        return self.conv.window.R * self.conv.window.S * self.channels

    @property
    def wide(self) -> int:
        """Channels of dy in whole tile rows."""
        return round_up(self.conv.K, DEPTH)

    @property
    def part(self) -> int:
        """Elements of a chunk's dw: (filters, depth)."""
        return round_up(self.conv.K, BLOCK // 2) * self.depth

    @property
    def shared_rows(self) -> int:
        """Rows of an image's border below that are those above the next one.

        So many that dy of the one keeps its rows, and as many rows of zeros around as dx reads, before the other's.
        """
        conv, x, window = self.conv, self.conv.x, self.conv.window
        above = x.origin // x.C // x.columns
        before = max(0, window.dilation_h * (window.R - 1) - window.top)
        return max(0, min(above, x.rows - above - x.H, x.rows - conv.P - before, x.rows - x.H - window.top))

    @property
    def spacing(self) -> int:
        """Pixels from an image to the next, an even number."""
        return round_up((self.conv.x.rows - self.shared_rows) * self.conv.x.columns, 2)

    @property
    def images(self) -> int:
        """Images of a group."""
        return max(1, min(self.conv.images, SHIFTED_PIXELS // self.spacing))

    @property
    def pixels(self) -> int:
        """Pixels of a group, in whole steps."""
        return round_up(self.images * self.spacing, DEPTH)

    @property
    def corner(self) -> int:
        """Where in x the first tap of the first output lies."""
        x, window = self.conv.x, self.conv.window
        return x.origin // x.C - window.top * x.columns - window.left

    @property
    def reach(self) -> int:
        """The pixel of x that the last tap of the first output reads."""
        x, window = self.conv.x, self.conv.window
        return self.corner + (window.R - 1) * window.dilation_h * x.columns + (window.S - 1) * window.dilation_w

    @property
    def pairs(self) -> int:
        """Pairs of pixels of x in the buffer, what the last step reads behind included."""
        frames = (self.images - 1) * self.spacing + self.conv.x.rows * self.conv.x.columns
        return max(self.pixels + self.reach, frames) // 2 + 1

    @property
    def copies(self) -> int:
        """Copies of x: pairs from even pixels on, and from odd ones where a tap begins at an odd pixel."""
        window, x = self.conv.window, self.conv.x
        odd = {
            (self.corner + r * window.dilation_h * x.columns + s * window.dilation_w) % 2
            for r in range(window.R)
            for s in range(window.S)
        }
        return 2 if 1 in odd else 1

    @property
    def inputs(self) -> TileSpec:
        """The convolution that makes dx of dy: stride 1, turned filters, dy in rows as they lie."""
        conv, x, window = self.conv, self.conv.x, self.conv.window
        top = window.dilation_h * (window.R - 1) - window.top
        left = window.dilation_w * (window.S - 1) - window.left
        turned_window = replace(window, top=top, left=left)
        source = Frame(conv.K, conv.P, conv.Q, x.rows, x.columns, 0)
        target = Frame(x.C, x.H, x.W, x.H, x.W, 0, half=conv.half_dx)
        back = replace(turned(conv), x=source, y=target, window=turned_window, images=self.images)
        return TileSpec(back, pixel=self.wide)

    @property
    def lead(self) -> int:
        """Pixels of zeros before dy: what the turned filters read there."""
        window = self.inputs.conv.window
        return max(0, window.top * self.conv.x.columns + window.left)

    @property
    def slopes_bytes(self) -> int:
        """Dy as bf16 rows, zeros before and behind."""
        inputs = self.inputs
        behind = (window_reach(inputs.conv) + BLOCK * 2 + inputs.pixels) * self.wide
        return round_up(BF16 * ((self.lead + self.pixels) * self.wide + behind), 64)

    @property
    def pairs_bytes(self) -> int:
        """One copy of x in pairs."""
        return 2 * BF16 * self.pairs * self.channels

    @property
    def turned_bytes(self) -> int:
        """Dy turned: (steps, wide, 32 pixels)."""
        return BF16 * self.wide * self.pixels

    @property
    def scratch(self) -> int:
        """Bytes for each thread."""
        inputs = self.inputs
        products = inputs.gathered_bytes + inputs.result_bytes if self.conv.wants_dx else 0
        own = self.slopes_bytes + self.copies * self.pairs_bytes + self.turned_bytes
        return own + products + FLOAT * self.conv.unpooled_size


def window_reach(conv: ConvSpec) -> int:
    """Pixels from the first tap of a window to its last."""
    window = conv.window
    return (window.R - 1) * window.dilation_h * conv.x.columns + (window.S - 1) * window.dilation_w


def backward_spec(conv: ConvSpec) -> "PlaneBackSpec | ShiftedBackSpec | TileBackSpec":
    """Which way back: by what the images are like, and the stride."""
    if conv.x.planar:
        return PlaneBackSpec(conv)
    if (conv.window.stride_h, conv.window.stride_w) == (1, 1):
        return ShiftedBackSpec(conv)
    return TileBackSpec(conv)


@dataclass(frozen=True)
class PlaneBackSpec:
    """The gradient of the filters of a convolution that reads planes; nobody wants the gradient of images.

    Pixels are counted along the rows of the frame, gap included: a tap is then one and the same distance everywhere.
    """

    conv: ConvSpec

    @property
    def depth(self) -> int:
        """Taps of all channels, in whole blocks."""
        window = self.conv.window
        return round_up(window.R * window.S * self.conv.x.C, BLOCK)

    @property
    def wide(self) -> int:
        """Filters in whole blocks."""
        return round_up(self.conv.K, BLOCK)

    @property
    def is_block(self) -> bool:
        """Whether one block of products is the whole gradient."""
        return self.depth == self.wide == BLOCK

    @property
    def rows(self) -> int:
        """Output rows that get a gradient: whole pools."""
        return self.conv.P // self.conv.pool[0] * self.conv.pool[0]

    @property
    def group_rows(self) -> int:
        """Output rows taken together: whole pools, about as many pixels as the L1 cache has room for."""
        pool, pixels = self.conv.pool[0], PLANE_PIXELS if self.is_block else PLANE_BLOCKS_PIXELS
        return min(self.rows, max(1, pixels // self.conv.x.columns // pool) * pool)

    @property
    def pixels(self) -> int:
        """Pixels of a group, in whole steps of the product."""
        return round_up(self.group_rows * self.conv.x.columns, DEPTH)

    @property
    def part(self) -> int:
        """Elements of a chunk's dw: (depth, wide)."""
        return self.depth * self.wide

    @property
    def shifted_bytes(self) -> int:
        """One run of pixels for each tap."""
        return BF16 * self.depth * self.pixels

    @property
    def scratch(self) -> int:
        """Bytes for each thread: runs of pixels, the slopes of a group, and those in front of a pool."""
        return self.shifted_bytes + BF16 * self.wide * self.pixels + FLOAT * self.conv.unpooled_size


def input_gradients(conv: ConvSpec) -> tuple[TileSpec, ...]:
    """The convolutions that make dx; their filters are packed one after another, in the order of ``tap_order``."""
    back = backward_spec(conv)
    if isinstance(back, PlaneBackSpec):
        raise EngineError("images in planes have no gradient; this is a mistake in the plan")
    return back.inputs if isinstance(back, TileBackSpec) else (back.inputs,)
