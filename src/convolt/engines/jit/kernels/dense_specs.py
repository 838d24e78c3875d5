"""What kernels of dense layers are compiled for, and the scratch memory that they take."""

from dataclasses import dataclass

from convolt.engines.jit.isa import Unit
from convolt.engines.jit.kernels.specs import (
    BF16,
    BLOCK,
    DEPTH,
    FLOAT,
    GROUP,
    MOVED_VECTORS,
    ROWS_MOVED,
    STRIPE,
    VECTORS,
    WIDE,
    UpdateSpec,
    round_up,
)


@dataclass(frozen=True)
class DenseSpec:
    """Everything a dense kernel is compiled for. N: capacity in samples. run: outputs or inputs of a chunk.

    accumulate: whether dw is added to what is there; add: whether dx is. wants_dw: whether the backward pass makes dw;
    without, it is made in one pass with the optimizer's step. half, half_dx: whether x and dx are bf16; to such a dx
    nothing is added. unit: what multiplies bf16.
    packed: whether W is given as ``DensePackSpec`` packs it, in panels. rounded: whether W is bf16, for dots of rows.
    """

    N: int
    inputs: int
    outputs: int
    bias: bool
    slope: float
    run: int
    lanes: int
    registers: int
    wants_dx: bool = True
    accumulate: bool = True
    add: bool = False
    wants_dw: bool = True
    half: bool = False
    half_dx: bool = False
    unit: Unit = "fma"
    packed: bool = False
    rounded: bool = False

    @property
    def panel_row(self) -> int:
        """Numbers from a row of a forward panel of x to the next: no multiple of a kilobyte."""
        depth = round_up(self.run, DEPTH)
        return depth + (DEPTH if depth % (2 * GROUP) == 0 else 0)


@dataclass(frozen=True)
class DensePackSpec:
    """W (outputs, inputs) packed for predictions, its inputs ordered as pixels of so many channels, (H, W, C).

    panels: in panels of four vectors of outputs, (inputs, columns) each; else in rows, as W is. unit: what rounds rows
    to bf16; None where they stay float32, as panels do.
    """

    inputs: int
    outputs: int
    channels: int
    lanes: int
    panels: bool
    unit: Unit | None = None

    @property
    def columns(self) -> int:
        """Outputs of a panel."""
        return min(VECTORS * self.lanes, round_up(self.outputs, self.lanes))

    @property
    def size(self) -> int:
        """Elements."""
        return self.inputs * (round_up(self.outputs, self.columns) if self.panels else self.outputs)


@dataclass(frozen=True)
class DenseUpdateSpec:
    """The gradient of a dense layer's weights and the optimizer's step, in one pass.

    rows: outputs of a band, whole blocks; with a run of inputs it is a chunk, and x is paired anew for it. Not looked
    at in float32, where a chunk has all outputs.
    """

    dense: DenseSpec
    update: UpdateSpec
    rows: int = 0


@dataclass(frozen=True)
class ReorderSpec:
    """A matrix (outputs, inputs) whose columns are those of a flattened image (C, H, W), and to be of (H, W, C).

    to_pixels: that way; else back. rows: of a chunk.
    """

    outputs: int
    inputs: int
    channels: int
    to_pixels: bool
    lanes: int
    rows: int = 4

    @property
    def pixels(self) -> int:
        """Of the image."""
        return self.inputs // self.channels


def dense_forward_scratch(spec: DenseSpec) -> int:
    """Bytes of scratch memory for each thread."""
    depth, columns = round_up(spec.run, DEPTH), round_up(spec.outputs, BLOCK)
    return BF16 * (spec.panel_row * round_up(spec.N, BLOCK) + depth * (columns + BLOCK))


def dense_backward_scratch(spec: DenseSpec) -> int:
    """Bytes of scratch memory for each thread: 128 columns of x and W in pairs, and 32 samples of dx to be rounded."""
    rounding = FLOAT * BLOCK * WIDE if spec.half_dx else 0
    return BF16 * WIDE * (round_up(spec.N, BLOCK) + round_up(spec.outputs, BLOCK)) + rounding


def dense_update_scratch(spec: DenseSpec) -> int:
    """Bytes of scratch memory for each thread: a stripe of x in pairs, and of dw for 32 outputs."""
    return STRIPE * (BF16 * round_up(spec.N, BLOCK) + FLOAT * BLOCK)


def dense_panel(spec: DenseSpec) -> int:
    """Elements of scratch memory for each thread: a run of W transposed, or 128 inputs of x and of W."""
    return round_up(max(spec.run * round_up(spec.outputs, BLOCK), WIDE * (spec.N + spec.outputs)), 16) + 16


def dense_moving_scratch(spec: DenseSpec) -> int:
    """Elements of scratch memory for each thread: a run of x, and of some rows of dw."""
    return round_up(spec.run, MOVED_VECTORS * spec.lanes) * (spec.N + ROWS_MOVED) + 16
