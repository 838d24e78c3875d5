"""A model as a list of operations on tensors, with the fusions found.

Residual branches become plain operations, so the planner sees one straight list. A fusion is a run of operations whose
inner tensors nobody else reads: an activation joins the convolution, BatchNorm or dense layer before it, a max-pool
joins a convolution or BatchNorm with its activation, and the sum at the end of a residual block joins the BatchNorm
before it. For prediction, filters and bias of a convolution take in the BatchNorm behind it. Tensors are NHWC inside
this engine; ``border`` is the zero frame that the convolutions reading a tensor want around each image, so that no
kernel checks bounds.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

from convolt.layers import BatchNorm2d, Conv2d, Dropout, Layer, LeakyReLU, MaxPool2d, ReLU, Residual, Shape, walk
from convolt.model import Model

FUSED = ("ReLU", "LeakyReLU", "MaxPool2d", "Add")  # what may join the operation before it


@dataclass(eq=False)
class Tensor:
    """What one operation makes and others read. shape: (C, H, W) or (F,).

    border: rows above and below, columns left and right. maker: the operation that writes it. readers: operations that
    read it; with more than one its gradient is a sum. planar: bf16 planes (C, H, W) instead of float32 pixels (H, W,
    C). half: bf16 instead of float32. half_slope: its gradient too. behind: numbers behind the last image that readers
    touch. image: features are the pixels of this tensor as they lie in memory.
    """

    name: str
    shape: Shape
    border: tuple[int, int, int, int] = (0, 0, 0, 0)
    maker: "Operation | None" = None
    readers: list["Operation"] = field(default_factory=list)
    planar: bool = False
    half: bool = False
    half_slope: bool = False
    behind: int = 0
    image: "Tensor | None" = None

    @property
    def is_image(self) -> bool:
        """Whether it has height and width."""
        return len(self.shape) == 3

    @property
    def height(self) -> int:
        """Rows in memory, with the border."""
        return self.shape[1] + self.border[0] + self.border[1]

    @property
    def width(self) -> int:
        """Columns in memory, with the border."""
        return self.shape[2] + self.border[2] + self.border[3]

    @property
    def size(self) -> int:
        """Elements of one sample in memory."""
        return self.shape[0] if not self.is_image else self.shape[0] * self.height * self.width

    @property
    def nbytes(self) -> int:
        """Of one sample in memory."""
        return self.size * (2 if self.planar or self.half else 4)

    @property
    def origin(self) -> int:
        """Element offset of the first pixel inside the border."""
        return (self.border[0] * self.width + self.border[2]) * self.shape[0] if self.is_image else 0

    def lay_in_planes(self) -> None:
        """Few channels: a tap of a filter is then a run of pixels. Rows are even, so that pixels pair up in them."""
        self.planar = True
        top, bottom, left, right = self.border
        self.border = (top, bottom, left, right + self.width % 2)

    def frame(self, layer: Conv2d) -> None:
        """Widen the border to what a convolution wants."""
        (top, bottom), (left, right) = layer.geometry.pads
        self.border = (
            max(self.border[0], top),
            max(self.border[1], bottom),
            max(self.border[2], left),
            max(self.border[3], right),
        )


@dataclass(eq=False)
class Operation:
    """One or more layers computed together. ``kind`` is the first layer's class name, or "Add" for a residual sum.

    names: of the layers, such as "3.body.0". activation, pool: what has been fused behind. A BatchNorm may have a
    second input that is added to what comes of the first, with an activation of the sum, ``outer``. norm: the
    BatchNorm that a convolution has taken in, the second of the names. reasons: why it is computed as it is, by
    direction, from whoever decided.
    """

    kind: str
    names: tuple[str, ...]
    layer: Layer | None
    inputs: tuple[Tensor, ...]
    output: Tensor
    activation: Layer | None = None
    pool: MaxPool2d | None = None
    outer: Layer | None = None
    norm: BatchNorm2d | None = None
    reasons: dict[str, list[str]] = field(default_factory=lambda: {"forward": [], "backward": []})

    @property
    def adds(self) -> bool:
        """Whether it is a BatchNorm with a residual sum behind it."""
        return self.kind == "BatchNorm2d" and len(self.inputs) == 2

    def because(self, reason: str, direction: str = "forward") -> None:
        """Note why it is computed as it is."""
        if reason not in self.reasons[direction]:
            self.reasons[direction].append(reason)

    @property
    def consumes(self) -> bool:
        """Whether nobody needs the first input once its gradient is there, which may then take its place."""
        source = self.inputs[0]
        alone = self.kind == "BatchNorm2d" and len(source.readers) == 1 and not any(source.border)
        return alone and source.maker is not None and source.maker.kind == "Conv2d" and source.maker.slope == 1

    @property
    def has_parameters(self) -> bool:
        """Whether it trains anything itself."""
        return self.kind != "Add" and self.layer is not None and bool(self.layer.parameters())

    def inputs_learn(self, learning: set[Tensor]) -> bool:
        """Whether somebody needs a gradient of what it reads."""
        return any(tensor in learning for tensor in self.inputs)

    @property
    def slope(self) -> float:
        """Of the fused activation where it is negative: 1 without one."""
        return _slope(self.activation)

    @property
    def outer_slope(self) -> float:
        """The same of the activation behind the sum."""
        return _slope(self.outer)

    @property
    def label(self) -> str:
        """For ``explain`` and profiles: ``0-2 Conv2d+ReLU+MaxPool2d``, ``3-7 BatchNorm2d+Add+ReLU``."""
        behind = (layer for layer in (self.norm, self.activation, self.pool) if layer is not None)
        parts = [self.kind, *(type(layer).__name__ for layer in behind)]
        if self.adds:
            parts += ["Add", *([] if self.outer is None else [type(self.outer).__name__])]
        where = self.names[0] if len(self.names) == 1 else f"{self.names[0]}-{self.names[-1]}"
        return f"{where} {'+'.join(parts)}"


def operations(model: Model, training: bool) -> tuple[Tensor, list[Operation]]:
    """The input tensor and the fused operations of a model, in order; Dropout is there in training only."""
    first = Tensor("input", model.input_shape)
    found: list[Operation] = []
    _append(tuple(model.layers), first, found, "", training)
    for operation in found:
        for tensor in operation.inputs:
            tensor.readers.append(operation)
    fused = _fuse(found, training)
    for operation in fused:
        operation.output.maker = operation
        if isinstance(operation.layer, Conv2d):
            operation.inputs[0].frame(operation.layer)
    return first, fused


def learning(found: Iterable[Operation]) -> set[Tensor]:
    """The tensors whose gradient somebody needs: a parameter lies at or before what makes them."""
    tensors: set[Tensor] = set()
    for operation in found:
        if operation.has_parameters or any(tensor in tensors for tensor in operation.inputs):
            tensors.add(operation.output)
    return tensors


def _append(layers: tuple[Layer, ...], tensor: Tensor, found: list[Operation], prefix: str, training: bool) -> Tensor:
    for name, layer, _, shape in walk(layers, tensor.shape, prefix):
        if isinstance(layer, Dropout) and not training:
            continue
        if isinstance(layer, Residual):
            body = _append(layer.body, tensor, found, f"{name}.body.", training)
            shortcut = _append(layer.shortcut, tensor, found, f"{name}.shortcut.", training)
            output = Tensor(name, shape)
            found.append(Operation("Add", (name,), layer, (body, shortcut), output))
        else:
            output = Tensor(name, shape)
            found.append(Operation(type(layer).__name__, (name,), layer, (tensor,), output))
        tensor = output
    return tensor


def _slope(activation: Layer | None) -> float:
    if isinstance(activation, LeakyReLU):
        return activation.negative_slope
    return 1.0 if activation is None else 0.0


def _fuse(found: Iterable[Operation], training: bool) -> list[Operation]:
    fused: list[Operation] = []
    by_output: dict[Tensor, Operation] = {}
    for operation in found:
        before = _sum_before(fused, operation) if operation.kind == "Add" else by_output.get(operation.inputs[0])
        obstacle = "it reads the images" if before is None else _obstacle(before, operation, training)
        if before is None or obstacle:
            if operation.kind in FUSED:
                operation.because(f"not fused: {obstacle}")
            fused.append(operation)
            by_output[operation.output] = operation
            continue
        if operation.kind == "Add":
            (other,) = (tensor for tensor in operation.inputs if tensor is not before.output)
            other.readers[other.readers.index(operation)] = before
            before.inputs += (other,)
        elif isinstance(operation.layer, BatchNorm2d):
            before.norm = operation.layer
        elif isinstance(operation.layer, MaxPool2d):
            before.pool = operation.layer
        elif before.adds:
            before.outer = operation.layer
        else:
            before.activation = operation.layer
        before.because(f"{_described(operation)} fused into it")
        before.names += operation.names
        before.output = operation.output
        by_output[operation.output] = before
    return fused


def _sum_before(fused: list[Operation], operation: Operation) -> Operation | None:
    """The last operation, if it makes one of the two tensors of a sum: the other one is there already."""
    return fused[-1] if fused and fused[-1].output in operation.inputs else None


def _obstacle(before: Operation, operation: Operation, training: bool) -> str:
    """Why an operation cannot be fused into the one before it; empty if it can."""
    if operation.kind not in FUSED and not (isinstance(operation.layer, BatchNorm2d) and _takes_in(before, training)):
        return "it begins one"
    if before.output.readers != [operation]:
        return "what it reads is read elsewhere too"
    if before.pool is not None or before.outer is not None:
        return "a max-pool, or the activation of a sum, ends a fusion"
    if isinstance(operation.layer, MaxPool2d):
        return _pool_obstacle(before, operation)
    if operation.kind == "Add":
        fits = before.kind == "BatchNorm2d" and not before.adds
        return "" if fits else f"{before.kind} takes no sum"
    return _activation_obstacle(before, operation.layer)


def _takes_in(before: Operation, training: bool) -> bool:
    """Whether it is a convolution whose filters can take in a BatchNorm behind it."""
    return not training and before.kind == "Conv2d" and before.activation is None and before.norm is None


def _activation_obstacle(before: Operation, layer: Layer | None) -> str:
    """Why an activation cannot be fused: its gradient must follow from the sign of the output, nothing else is kept."""
    if isinstance(layer, LeakyReLU) and layer.negative_slope <= 0:
        return "the sign of its output does not tell that of its input"
    if before.activation is not None and not before.adds:
        return "an activation is there already"
    return "" if before.kind in ("Conv2d", "BatchNorm2d", "Dense", "Add") else f"{before.kind} takes no activation"


def is_depthwise(conv: Conv2d) -> bool:
    """Whether every channel is a group of its own, with one filter."""
    return 1 < conv.groups == conv.in_channels == conv.out_channels


def _pool_obstacle(before: Operation, operation: Operation) -> str:
    """Why a max-pool cannot be fused."""
    pool, window = cast(MaxPool2d, operation.layer), cast(MaxPool2d, operation.layer).geometry
    if before.kind not in ("Conv2d", "BatchNorm2d") or before.adds:
        return f"{'a residual sum' if before.adds else before.kind} takes no max-pool"
    conv = before.layer
    if isinstance(conv, Conv2d) and is_depthwise(conv):
        return "depthwise kernels pool nothing"
    if before.kind == "BatchNorm2d" and (window.kernel != window.stride or pool.padding != (0, 0)):
        return "its windows overlap or are padded"
    if before.activation is not None and not isinstance(before.activation, ReLU):
        return "the activation before it is no ReLU"
    _, H, W = operation.inputs[0].shape
    if before.kind == "BatchNorm2d" and (H % window.kernel[0] or W % window.kernel[1]):
        return "its windows leave pixels out, and BatchNorm has a gradient there too"
    # Its taps are numbered in a byte, and one number means a dead ReLU.
    return "" if math.prod(window.kernel) < 255 else "its windows have more than 254 taps"


def _described(operation: Operation) -> str:
    """A fused operation in a reason: ``MaxPool2d 2x2``."""
    layer = operation.layer
    window = f" {'x'.join(map(str, layer.geometry.kernel))}" if isinstance(layer, MaxPool2d) else ""
    return f"{'the residual sum' if operation.kind == 'Add' else operation.kind}{window}"
