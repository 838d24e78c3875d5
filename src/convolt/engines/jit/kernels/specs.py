"""What kernels are compiled for: frozen, printable, and free of Numba.

``repr`` of a spec is part of its kernel's name in the cache, and a warm start loads kernels without importing Numba.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from convolt.engines.jit.isa import Unit
from convolt.layers import AvgPool2d, Conv2d, MaxPool2d

if TYPE_CHECKING:  # kernels do not depend on how the graph is made
    from convolt.engines.jit.graph import Tensor

FLOAT = 4  # bytes
VECTORS = 4  # of a block of output columns
BF16 = 2  # bytes
DEPTH = 32  # bf16 numbers in a tile row
BLOCK = 32  # rows and columns of one product: two tiles each way
WIDE = 128  # columns of a dense layer's backward that are packed together
STRIPE = 1024  # columns of a dense layer that the optimizer takes together
WORDS_APART = 16  # a cache line of float32: how arrays in scratch memory are aligned
MOST_TAPS = 160  # of all channels, that are summed over the pixels that won a max-pool
ROWS_MOVED, MOVED_VECTORS = 8, 3  # of a dense layer's float32 weights that the optimizer takes together
GROUP = 128  # output pixels whose columns are gathered at a time
NUMBERS = 8  # scalars of an optimizer step
STATE = 8  # int64 words that every kernel is given: samples, address of the images, whether weights have changed
ONE = 3  # the word of the state that is 1, which LLVM does not know: a loop of so many rounds is not unrolled
DEAD = 255  # code of a pooled output that ReLU set to zero


def number_bytes(half: bool) -> int:
    """Bytes of a number that is kept in bf16, or in float32."""
    return BF16 if half else FLOAT


@dataclass(frozen=True)
class Frame:
    """An NHWC tensor in memory: C channels, H x W pixels inside ``rows`` x ``columns``, the first one at ``origin``.

    planar: bf16 planes (C, rows, columns) instead of float32 pixels; ``origin`` still counts C elements a pixel.
    half: bf16 pixels.
    """

    C: int
    H: int
    W: int
    rows: int
    columns: int
    origin: int
    planar: bool = False
    half: bool = False

    @classmethod
    def of(cls, tensor: "Tensor") -> "Frame":
        """The frame of a tensor; features (F,) are one pixel with F channels."""
        if not tensor.is_image:
            return cls(tensor.shape[0], 1, 1, 1, 1, 0)
        C, H, W = tensor.shape
        return cls(C, H, W, tensor.height, tensor.width, tensor.origin, tensor.planar, tensor.half)

    @property
    def number(self) -> int:
        """Bytes of an element."""
        return number_bytes(self.planar or self.half)

    @property
    def bare(self) -> "Frame":
        """The same without a border, as gradients are."""
        return Frame(self.C, self.H, self.W, self.H, self.W, 0)

    @property
    def size(self) -> int:
        """Elements of one sample."""
        return self.rows * self.columns * self.C

    @property
    def pitch(self) -> int:
        """Elements from a row to the next."""
        return self.columns * self.C


@dataclass(frozen=True)
class Windowing:
    """A window's geometry with plain integers."""

    R: int
    S: int
    stride_h: int
    stride_w: int
    top: int
    left: int
    dilation_h: int
    dilation_w: int

    @classmethod
    def of(cls, layer: Conv2d | MaxPool2d | AvgPool2d) -> "Windowing":
        """From a layer."""
        window = layer.geometry
        (top, _), (left, _) = window.pads
        return cls(*window.kernel, *window.stride, top, left, *window.dilation)

    @classmethod
    def side_by_side(cls, kernel: tuple[int, int]) -> "Windowing":
        """Windows of this size that neither overlap nor leave pixels between them."""
        return cls(*kernel, *kernel, 0, 0, 1, 1)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not less than ``size``."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class ConvSpec:
    """Everything a convolution kernel is compiled for.

    y: where the output goes (after the pool). slope: of the activation's negative side, 1 for none, 0 for ReLU.
    pool: kernel of the fused max-pool whose windows lie side by side, (1, 1) for none; windows: those of any other one,
    which overlap, are padded, lie apart or fit no tile. images: of one chunk. add: whether dx is added.
    unit: what multiplies on tiles. pairs: dot products multiply pairs of bf16 numbers. codes: whether the pool keeps
    which tap won. half_dy, half_dx: whether these are bf16. bands, stripes: parts of the output's rows and of the
    filters into which forward cuts the images of a chunk, each a chunk then.
    """

    x: Frame
    y: Frame
    window: Windowing
    groups: int
    K: int
    P: int
    Q: int
    bias: bool
    slope: float
    pool: tuple[int, int]
    images: int
    lanes: int
    registers: int
    wants_dx: bool = True
    add: bool = False
    unit: Unit = "fma"
    pairs: bool = False
    codes: bool = True
    half_dy: bool = False
    half_dx: bool = False
    bands: int = 1
    stripes: int = 1
    windows: Windowing | None = None

    @property
    def pooled(self) -> bool:
        """Whether a max-pool is fused."""
        return self.pool != (1, 1) or self.windows is not None

    @property
    def pooling(self) -> Windowing:
        """Its windows, whatever they are like; single pixels without one."""
        return self.windows or Windowing.side_by_side(self.pool)

    @property
    def unpooled(self) -> Frame:
        """The convolution's output of one image, in scratch memory, in front of such a pool."""
        return Frame(self.K, self.P, self.Q, self.P, self.Q, 0)

    @property
    def unpooled_size(self) -> int:
        """Elements of it, in whole lines; none without such a pool."""
        return round_up(self.unpooled.size, 16) if self.windows is not None else 0

    @property
    def before_pool(self) -> "ConvSpec":
        """The convolution whose output, or the gradient of it, is that image; itself without such a pool."""
        return self if self.windows is None else replace(self, y=self.unpooled, windows=None)

    @property
    def merged(self) -> bool:
        """Whether (s, c) of a filter row lie contiguous in the image."""
        return self.groups == 1 and self.window.dilation_w == 1

    @property
    def depthwise(self) -> bool:
        """Whether every channel has one filter of its own."""
        return 1 < self.groups == self.x.C == self.K

    @property
    def sparse(self) -> bool:
        """Whether only dw is wanted, of few taps, and three of four slopes are zero: a 2x2 max-pool stands behind."""
        window = self.window
        steps = window.stride_h, window.stride_w, window.dilation_h, window.dilation_w, self.groups
        pooled = self.pool == (2, 2) and self.slope in (0, 1)
        few = window.R * window.S * self.x.C <= MOST_TAPS
        return pooled and few and not self.wants_dx and steps == (1, 1, 1, 1, 1) and self.lanes in (8, 16)

    @property
    def channels(self) -> int:
        """Input channels of a group."""
        return self.x.C // self.groups

    @property
    def filters(self) -> int:
        """Output channels of a group."""
        return self.K // self.groups

    @property
    def together(self) -> int:
        """Numbers that are multiplied at once."""
        return 2 if self.pairs else 1

    @property
    def number(self) -> int:
        """Bytes of each of them."""
        return BF16 if self.pairs else FLOAT

    @property
    def segment_taps(self) -> int:
        """Taps that lie contiguous in the image: those of a filter row, or one alone."""
        return self.window.S if self.merged else 1

    @property
    def segments(self) -> int:
        """Of a filter."""
        return self.window.R * self.window.S // self.segment_taps

    @property
    def depth(self) -> int:
        """Products of a segment; an odd number has a zero as its last one's partner."""
        return -(-self.segment_taps * self.channels // self.together)

    @property
    def packed_columns(self) -> int:
        """Columns of a group's packed forward filters: whole vectors."""
        return round_up(self.filters, self.lanes)

    @property
    def turned_columns(self) -> int:
        """Those of the filters that are packed for dx."""
        return round_up(self.channels, self.lanes)

    @property
    def pool_buffer(self) -> int:
        """Elements of the rows that a max-pool takes together, of one block of filters."""
        return self.pooling.R * self.Q * VECTORS * self.lanes

    @property
    def scratch(self) -> int:
        """Elements of scratch memory for each thread: rows to pool, and the framed dy of one image."""
        rows = self.pool_buffer + self.framed.size + VECTORS * self.lanes
        if self.pairs:  # x and dy in bf16, as ``kernels.pairs`` lays them out
            rows += self.x.size + self.framed.size // 2 + self.P * -(-self.Q // 2) * self.K + 3 * WORDS_APART
        return max(rows, 4 * self.x.size) if self.sparse else rows

    @property
    def framed(self) -> Frame:
        """Dy of one image spread by the stride, with the border that the turned filters want."""
        window = self.window
        top = window.dilation_h * (window.R - 1) - window.top
        left = window.dilation_w * (window.S - 1) - window.left
        rows = max(self.x.H + window.dilation_h * (window.R - 1), top + (self.P - 1) * window.stride_h + 1)
        columns = max(self.x.W + window.dilation_w * (window.S - 1), left + (self.Q - 1) * window.stride_w + 1)
        rows, columns = rows - min(top, 0), columns - min(left, 0)
        return Frame(self.K, self.P, self.Q, rows, columns, (max(top, 0) * columns + max(left, 0)) * self.K)


def turned(spec: ConvSpec) -> ConvSpec:
    """The convolution that makes dx of the framed dy: stride 1, filters turned around, channels swapped."""
    x, window = spec.x, spec.window
    target = Frame(x.C, x.H, x.W, x.H, x.W, 0, half=spec.half_dx)
    rows = Windowing(window.R, window.S, 1, 1, 0, 0, window.dilation_h, window.dilation_w)
    top = window.dilation_h * (window.R - 1) - window.top
    left = window.dilation_w * (window.S - 1) - window.left
    framed = spec.framed
    # Padding beyond the filter's reach cuts the first rows of the frame off.
    source = replace(framed, origin=(max(-top, 0) * framed.columns + max(-left, 0)) * spec.K)
    plain = replace(spec, bias=False, slope=1.0, pool=(1, 1), windows=None, wants_dx=False)
    return replace(plain, x=source, y=target, window=rows, K=x.C, P=x.H, Q=x.W)


@dataclass(frozen=True)
class MapSpec:
    """An elementwise operation or a sum over some images: frames of what it reads and writes.

    kind: which operation, such as "relu" or "add"; number: its constant. half: whether y is bf16; half_slope: whether
    the gradients of x and y are; native: whether the CPU rounds to it.
    """

    kind: str
    x: Frame
    y: Frame
    images: int
    lanes: int
    number: float = 0.0
    add: bool = False
    half: bool = False
    half_slope: bool = False
    native: bool = False


@dataclass(frozen=True)
class AddSpec:
    """The sum of two branches and an activation of this slope (1 for none); adds_a, adds_b: as ``add`` elsewhere."""

    a: Frame
    b: Frame
    y: Frame
    slope: float
    images: int
    lanes: int
    adds_a: bool = False
    adds_b: bool = False


@dataclass(frozen=True)
class PoolSpec:
    """A max- or average-pool over any window. P, Q: output positions; add: whether dx is added to what is there.

    Fused behind a convolution, whose channels then are some of y's: relu: what is not above zero becomes that, with the
    code DEAD, and has no gradient; codes: whether anybody wants them; bias: whether dy is summed up in db. native:
    whether the CPU rounds to bf16.
    """

    x: Frame
    y: Frame
    window: Windowing
    P: int
    Q: int
    images: int
    lanes: int
    count_include_pad: bool = True
    add: bool = False
    relu: bool = False
    codes: bool = True
    bias: bool = False
    native: bool = False

    @property
    def code_bytes(self) -> int:
        """Of the number of a tap."""
        taps = self.window.R * self.window.S
        return 1 if taps <= 1 << 8 else 2 if taps <= 1 << 16 else 4


@dataclass(frozen=True)
class NormSpec:
    """BatchNorm with an activation of this slope (1 for none) behind it, then a max-pool, or a sum and its activation.

    pool: kernel of the max-pool, whose windows cover the image; (1, 1) for none. skip: what is added, and outer: the
    slope of the activation behind the sum. add, adds_skip: whether dx and dskip are added to what is there; wants_skip:
    whether there is a dskip; accumulate: whether dweight and dbias are added. synchronized: whether the sums and the
    count over all ranks' samples are given. half_dy, half_dx: whether these are bf16; native: whether the CPU
    rounds to it.
    """

    x: Frame
    y: Frame
    eps: float
    affine: bool
    slope: float
    images: int
    lanes: int
    pool: tuple[int, int] = (1, 1)
    skip: Frame | None = None
    outer: float = 1.0
    add: bool = False
    adds_skip: bool = False
    wants_skip: bool = True
    accumulate: bool = True
    synchronized: bool = False
    half_dy: bool = False
    half_dx: bool = False
    native: bool = False

    @property
    def columns(self) -> int:
        """Channels in whole vectors: a row of constants or sums."""
        return round_up(self.x.C, self.lanes)

    def lines(self, *frames: Frame | None) -> tuple[int, int]:
        """Runs of output pixels that lie one behind another in all these frames, and how many pixels each has."""
        H, W = self.x.H // self.pool[0], self.x.W // self.pool[1]
        apart = self.pool != (1, 1) or any(frame.columns != frame.W for frame in frames if frame is not None)
        return (H, W) if apart else (1, H * W)


@dataclass(frozen=True)
class InputSpec:
    """Unpacking images (N, C, H, W) into a frame: bytes are scaled to [0, 1], then (x - mean) / std.

    native: whether the CPU rounds to bf16, for planes.
    """

    y: Frame
    bytes: bool
    images: int
    native: bool = False


@dataclass(frozen=True)
class PackSpec:
    """Filters of any size packed for a convolution; turned for its dx; pairs: of bf16, neighbors in depth.

    native: whether the CPU rounds to bf16.
    """

    turned: bool
    pairs: bool = False
    native: bool = False


@dataclass(frozen=True)
class FoldSpec:
    """BatchNorm taken into filters, for prediction; bias: of the convolution."""

    bias: bool
    affine: bool
    eps: float


@dataclass(frozen=True)
class SpreadSpec:
    """Filters with groups as filters without: of any size, so that nothing is compiled into it."""


@dataclass(frozen=True)
class ReduceSpec:
    """Parts of a gradient summed into dw, or added to it; bias: those of db as well."""

    accumulate: bool
    bias: bool
    lanes: int


@dataclass(frozen=True)
class UpdateSpec:
    """An optimizer step; ``kind`` is the optimizer's class name in lower case.

    decoupled: weight decay beside the gradient. lanes: of a vector.
    """

    kind: str
    lanes: int
    momentum: bool = False
    nesterov: bool = False
    centered: bool = False
    decoupled: bool = False

    @property
    def states(self) -> int:
        """Arrays of the optimizer's state that a step reads, at most."""
        return {"sgd": int(self.momentum), "adam": 2, "adamw": 2}.get(self.kind, 3)
