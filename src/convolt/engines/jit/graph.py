"""A model as a list of operations on tensors, with the fusions found.

Residual branches become plain operations, so the planner sees one straight list. A fusion is a run of operations whose
inner tensors nobody else reads: an activation joins the convolution, BatchNorm or dense layer before it, a max-pool
joins a convolution or BatchNorm with its activation, and the sum at the end of a residual block joins the BatchNorm
before it. Tensors are NHWC inside this engine; ``border`` is the zero frame that the
convolutions reading a tensor want around each image, so that no kernel checks bounds.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from convolt.layers import Conv2d, Dropout, Layer, LeakyReLU, MaxPool2d, ReLU, Residual, Shape, walk
from convolt.model import Model


@dataclass(eq=False)
class Tensor:
    """What one operation makes and others read. shape: (C, H, W) or (F,).

    border: rows above and below, columns left and right. readers: operations that read it; with more than one its
    gradient is a sum. planar: bf16 planes (C, H, W) instead of float32 pixels (H, W, C).
    """

    name: str
    shape: Shape
    border: tuple[int, int, int, int] = (0, 0, 0, 0)
    readers: list["Operation"] = field(default_factory=list)
    planar: bool = False

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

    names: of the layers, such as "3.body.0". activation, pool: what has been fused behind. A BatchNorm may have a second
    input that is added to what comes of the first, with an activation of the sum, ``outer``.
    """

    kind: str
    names: tuple[str, ...]
    layer: Layer | None
    inputs: tuple[Tensor, ...]
    output: Tensor
    activation: Layer | None = None
    pool: MaxPool2d | None = None
    outer: Layer | None = None

    @property
    def adds(self) -> bool:
        """Whether it is a BatchNorm with a residual sum behind it."""
        return self.kind == "BatchNorm2d" and len(self.inputs) == 2

    @property
    def has_parameters(self) -> bool:
        """Whether it trains anything itself."""
        return self.kind != "Add" and self.layer is not None and bool(self.layer.parameters())

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
        parts = [self.kind, *(type(layer).__name__ for layer in (self.activation, self.pool) if layer is not None)]
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
    fused = _fuse(found)
    for operation in fused:
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


def _fuse(found: Iterable[Operation]) -> list[Operation]:
    fused: list[Operation] = []
    by_output: dict[Tensor, Operation] = {}
    for operation in found:
        before = _sum_before(fused, operation) if operation.kind == "Add" else by_output.get(operation.inputs[0])
        if before is None or before.output.readers != [operation] or not _joins(before, operation):
            fused.append(operation)
            by_output[operation.output] = operation
            continue
        if operation.kind == "Add":
            (other,) = (tensor for tensor in operation.inputs if tensor is not before.output)
            other.readers[other.readers.index(operation)] = before
            before.inputs += (other,)
        elif isinstance(operation.layer, MaxPool2d):
            before.pool = operation.layer
        elif before.adds:
            before.outer = operation.layer
        else:
            before.activation = operation.layer
        before.names += operation.names
        before.output = operation.output
        by_output[operation.output] = before
    return fused


def _sum_before(fused: list[Operation], operation: Operation) -> Operation | None:
    """The last operation, if it makes one of the two tensors of a sum: the other one is there already."""
    return fused[-1] if fused and fused[-1].output in operation.inputs else None


def _joins(before: Operation, operation: Operation) -> bool:
    if before.pool is not None or before.outer is not None:
        return False
    if operation.kind == "Add":
        return before.kind == "BatchNorm2d" and not before.adds
    if isinstance(operation.layer, ReLU | LeakyReLU):
        # Their gradients follow from the sign of the output: nothing else has to be kept.
        positive = not isinstance(operation.layer, LeakyReLU) or operation.layer.negative_slope > 0
        fits = before.kind in ("Conv2d", "BatchNorm2d", "Dense", "Add")
        return fits and (before.activation is None or before.adds) and positive
    if isinstance(operation.layer, MaxPool2d):
        window = operation.layer.geometry
        disjoint = window.kernel == window.stride and operation.layer.padding == (0, 0)
        monotone = before.activation is None or isinstance(before.activation, ReLU)
        few = math.prod(window.kernel) < 255  # its taps are numbered in a byte, and one number means a dead ReLU
        if before.kind == "BatchNorm2d":  # it has a gradient beside the windows too
            _, H, W = operation.inputs[0].shape
            covered = H % window.kernel[0] == 0 and W % window.kernel[1] == 0
            return disjoint and covered and monotone and few and not before.adds
        return before.kind == "Conv2d" and disjoint and monotone and few
    return False
