"""Which kernels serve an operation: the one table from layers to tasks, forward and backward.

A function here takes the plan and the operation and returns the forward tasks and a function that makes the backward
ones. The backward tasks are made later, from the last operation to the first: whether a gradient is written or added
depends on who wrote before.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np

from convolt.engines.jit.convolutions import conv
from convolt.engines.jit.graph import Operation, Tensor
from convolt.engines.jit.isa import converts
from convolt.engines.jit.kernels.specs import (
    AddSpec,
    Frame,
    InputSpec,
    MapSpec,
    NormSpec,
    PoolSpec,
    Windowing,
)
from convolt.engines.jit.matrices import dense
from convolt.engines.jit.phases import Argument, Call, Served, Task, Tasks
from convolt.engines.jit.plan import DropoutMask, Plan, address_of
from convolt.errors import EngineError
from convolt.layers import GELU, AvgPool2d, BatchNorm2d, Dropout, Layer, LeakyReLU, MaxPool2d, Normalize


def input_tasks(plan: Plan, tensor: Tensor, byte_input: bool, normalize: Normalize | None) -> list[Task]:
    """Unpacking of the images, with an input normalization folded in."""
    frame = Frame.of(tensor)
    native = tensor.planar and plan.units.tiles is not None and converts(plan.units.tiles)
    spec = InputSpec(frame, byte_input, plan.images, native)
    scale, shift = np.ones(frame.C), np.zeros(frame.C)
    if normalize is not None:
        scale, shift = 1 / np.array(normalize.std), -np.array(normalize.mean) / np.array(normalize.std)
    if byte_input:
        scale = scale / 255
    constants = plan.buffer("input constants", 2 * frame.C)
    constants[: frame.C], constants[frame.C : 2 * frame.C] = scale, shift
    scales = int(constants.ctypes.data)
    factory = "planes:unpack" if tensor.planar else "images:unpack"
    return [plan.by_image("input", factory, spec, plan.value(tensor), scales, scales + 4 * frame.C)]


def batch_norm(plan: Plan, operation: Operation) -> Served:
    """BatchNorm with what is fused behind it: sums, fold, apply; and back."""
    layer, source, target = cast(BatchNorm2d, operation.layer), operation.inputs[0], operation.output
    label, name = operation.label, operation.names[0]
    spec = norm_spec(plan, operation)
    parts = plan.buffer("sums", plan.chunks * 3 * spec.columns, np.float64)
    sums, totals, pixels = address_of(parts), None, math.prod(source.shape[1:])
    constants = plan.address(f"constants {name}", 4 * spec.columns)
    momentum = int(np.float64(layer.momentum).view(np.int64))
    weight, bias = (plan.parameter(operation, key) if layer.affine else 0 for key in ("weight", "bias"))
    running = (plan.statistic(operation, "running_mean"), plan.statistic(operation, "running_var"))
    folding = (sums, weight, bias, *running, momentum, constants)
    skip = operation.inputs[1] if operation.adds else None
    pooled = spec.pool != (1, 1)
    codes = plan.address(f"codes {name}", plan.capacity * math.prod(target.shape), np.uint8) if pooled else 0
    if operation.consumes:
        plan.put_slope(source, plan.value(source))
    applied = (plan.value(source), constants, plan.value(target), 0 if skip is None else plan.value(skip), codes)
    apply = plan.by_image(label, "normalization:normalize", spec, *applied)
    if not plan.training:
        return [plan.whole(f"{label} fold", "normalization:fold_running", spec, 1, *folding), apply], list
    bare = _bare(spec)
    of_channels = replace(bare, x=replace(bare.x, half=False), y=replace(bare.y, half=False))
    statistics = plan.by_image(f"{label} statistics", "normalization:statistics", bare, plan.value(source), sums)
    forward: list[Task | Call] = [
        statistics,
        plan.whole(f"{label} fold", "normalization:fold", of_channels, 1, *folding),
        apply,
    ]
    if plan.add_ranks is not None:
        totals = plan.buffer(f"totals {name}", 3 * spec.columns + 1, np.float64)[: 3 * spec.columns + 1]
        of_all = replace(of_channels, synchronized=True)
        fold = plan.whole(f"{label} fold", "normalization:fold", of_all, 1, address_of(totals), *folding[1:])
        forward = [statistics, plan.sum_over_ranks(name, parts, totals, pixels, about_pivots=True), fold, apply]

    def backward() -> Tasks:
        add, adds_skip, wants_skip = plan.begin_slope(source), False, False
        if skip is not None and skip in plan.learning:
            adds_skip = plan.begin_slope(skip)
            if not adds_skip:  # it is dy, but for the outer activation, and nobody else needs that
                plan.put_slope(skip, plan.slope(target))
            wants_skip = adds_skip or spec.outer != 1
        dskip = plan.slope(skip) if skip is not None and wants_skip else 0
        back = replace(spec, add=add, adds_skip=adds_skip, wants_skip=wants_skip)
        terms = plan.address("terms of dx", 2 * spec.columns)
        dweight, dbias = (
            plan.parameter(operation, key, gradient=True) if layer.affine else 0 for key in ("weight", "bias")
        )
        seen = (plan.value(source), plan.value(target), plan.slope(target), codes, constants)
        folded, written = replace(of_channels, accumulate=plan.accumulate), (plan.slope(source), dskip)
        summed: tuple[Argument, ...] = sums, dweight, dbias, constants, terms
        between: list[Call] = []
        if totals is not None:
            folded, summed = replace(folded, synchronized=True), (*summed, address_of(totals))
            between = [plan.sum_over_ranks(name, parts, totals, pixels)]
        return [
            plan.by_image(f"{label} slopes", "normalization:slopes", spec, *seen, sums),
            *between,
            plan.whole(f"{label} fold", "normalization:fold_slopes", folded, 1, *summed),
            plan.by_image(f"{label} backward", "normalization:normalize_backward", back, *seen, terms, *written),
        ]

    return forward, backward


def norm_spec(plan: Plan, operation: Operation) -> NormSpec:
    """What BatchNorm's kernels are compiled for."""
    layer = cast(BatchNorm2d, operation.layer)
    return NormSpec(
        Frame.of(operation.inputs[0]),
        Frame.of(operation.output),
        layer.eps,
        layer.affine,
        operation.slope,
        plan.images,
        plan.isa.lanes,
        (1, 1) if operation.pool is None else operation.pool.geometry.kernel,
        Frame.of(operation.inputs[1]) if operation.adds else None,
        operation.outer_slope,
        half_dy=operation.output.half_slope,
        half_dx=operation.inputs[0].half_slope,
        native=_stores_half(plan, operation),
    )


def _stores_half(plan: Plan, operation: Operation) -> bool:
    """Whether BatchNorm writes bf16, on a CPU that rounds by itself."""
    writes = operation.output.half or operation.inputs[0].half_slope
    return writes and plan.units.tiles is not None and converts(plan.units.tiles)


def _bare(spec: NormSpec) -> NormSpec:
    """For kernels that see nothing of what is fused behind: equal ones are compiled once."""
    plain = replace(spec, y=spec.x, slope=1.0, pool=(1, 1), skip=None, outer=1.0)
    return replace(plain, half_dy=False, half_dx=False, native=False)


def pool(plan: Plan, operation: Operation) -> Served:
    """Max- or average-pool over any window."""
    layer, source, target = cast(MaxPool2d | AvgPool2d, operation.layer), operation.inputs[0], operation.output
    _, P, Q = target.shape
    largest = isinstance(layer, MaxPool2d)
    spec = PoolSpec(
        Frame.of(source),
        Frame.of(target),
        Windowing.of(layer),
        P,
        Q,
        plan.images,
        plan.isa.lanes,
        count_include_pad=largest or cast(AvgPool2d, layer).count_include_pad,
    )
    size = plan.capacity * P * Q * target.shape[0] * spec.code_bytes
    codes = plan.address(f"codes {operation.names[0]}", size, np.uint8)
    factory = "pooling:max_pool" if largest else "pooling:average_pool"
    forward = [plan.by_image(operation.label, factory, spec, plan.value(source), plan.value(target), codes)]

    def backward() -> Tasks:
        if source not in plan.learning:
            return []
        back = replace(spec, add=plan.begin_slope(source))
        arguments = (plan.slope(source), plan.slope(target), codes)
        return [plan.by_image(f"{operation.label} backward", f"{factory}_backward", back, *arguments)]

    return forward, backward


def elementwise(plan: Plan, operation: Operation) -> Served:
    """An activation or Dropout that is fused nowhere."""
    layer, source, target = cast(Layer, operation.layer), operation.inputs[0], operation.output
    kind, number = _function(layer)
    spec = MapSpec(kind, Frame.of(source), Frame.of(target), plan.images, plan.isa.lanes, number)
    mask: Argument = 0
    if isinstance(layer, Dropout):
        size = plan.capacity * int(np.prod(source.shape))
        mask = plan.address(f"mask {operation.names[0]}", size)
        held = plan.buffer(f"mask {operation.names[0]}", size)[:size].reshape(plan.capacity, *_nhwc(source))
        plan.masks.append(DropoutMask(layer, operation.names[0], held))
    forward = [plan.by_image(operation.label, "images:elementwise", spec, plan.value(source), plan.value(target), mask)]

    def backward() -> Tasks:
        if source not in plan.learning:
            return []
        back = replace(spec, add=plan.begin_slope(source))
        arguments = (plan.value(source), plan.slope(target), mask, plan.slope(source))
        return [plan.by_image(f"{operation.label} backward", "images:elementwise_backward", back, *arguments)]

    return forward, backward


def _nhwc(tensor: Tensor) -> tuple[int, int, int]:
    C, H, W = tensor.shape if tensor.is_image else (tensor.shape[0], 1, 1)
    return H, W, C


def _function(layer: Layer) -> tuple[str, float]:
    if isinstance(layer, LeakyReLU):
        return "leaky", layer.negative_slope
    if isinstance(layer, GELU):
        return ("gelu" if layer.approximate == "none" else "gelu_tanh"), 0.0
    return type(layer).__name__.lower(), 0.0


def shaping(plan: Plan, operation: Operation) -> Served:
    """Flatten and global average."""
    source, target = operation.inputs[0], operation.output
    factory = "images:flatten" if operation.kind == "Flatten" else "images:global_average"
    if target.image is not None:
        operation.because("its readers take the pixels as they lie")
        return [], list
    frames = Frame.of(source), Frame.of(target)
    native = plan.units.dense is not None and converts(plan.units.dense)
    spec = MapSpec(operation.kind, *frames, plan.images, plan.isa.lanes, half=target.half, native=native)
    own = plan.scratch(math.prod(source.shape)) if target.half and not source.half else 0
    forward = [plan.by_image(operation.label, factory, spec, plan.value(source), plan.value(target), own)]

    def backward() -> Tasks:
        if source not in plan.learning:
            return []
        back = replace(spec, add=plan.begin_slope(source), half_slope=source.half_slope)
        arguments = (plan.slope(target), plan.slope(source))
        return [plan.by_image(f"{operation.label} backward", f"{factory}_backward", back, *arguments)]

    return forward, backward


def add(plan: Plan, operation: Operation) -> Served:
    """The sum of two branches, with activation."""
    left, right = operation.inputs
    target = operation.output
    spec = AddSpec(Frame.of(left), Frame.of(right), Frame.of(target), operation.slope, plan.images, plan.isa.lanes)
    arguments = (plan.value(left), plan.value(right), plan.value(target))
    forward = [plan.by_image(operation.label, "images:add", spec, *arguments)]

    def backward() -> Tasks:
        back = replace(spec, adds_a=plan.begin_slope(left), adds_b=plan.begin_slope(right))
        arguments = (plan.value(target), plan.slope(target), plan.slope(left), plan.slope(right))
        return [plan.by_image(f"{operation.label} backward", "images:add_backward", back, *arguments)]

    return forward, backward


def normalize(plan: Plan, operation: Operation) -> Served:
    """A Normalize that is not at the input: BatchNorm's kernel with constants."""
    layer, source, target = cast(Normalize, operation.layer), operation.inputs[0], operation.output
    C = source.shape[0]
    spec = NormSpec(Frame.of(source), Frame.of(target), 0.0, False, 1.0, plan.images, plan.isa.lanes)
    size = 4 * spec.columns
    constants = plan.buffer(f"constants {operation.names[0]}", size)[:size].reshape(4, spec.columns)
    constants[1:3, :C] = 1 / np.array(layer.std)
    constants[3, :C] = -np.array(layer.mean) / np.array(layer.std)
    held, terms = int(constants.ctypes.data), plan.address("no terms", 2 * spec.columns)
    applied = (plan.value(source), held, plan.value(target), 0, 0)
    forward = [plan.by_image(operation.label, "normalization:normalize", spec, *applied)]

    def backward() -> Tasks:
        if source not in plan.learning:
            return []
        back = replace(spec, add=plan.begin_slope(source))
        seen = (plan.value(source), plan.value(target), plan.slope(target), 0, held, terms)
        backward = "normalization:normalize_backward"
        return [plan.by_image(f"{operation.label} backward", backward, back, *seen, plan.slope(source), 0)]

    return forward, backward


SERVICES: dict[str, Callable[[Plan, Operation], Served]] = {
    "Conv2d": conv,
    "Dense": dense,
    "BatchNorm2d": batch_norm,
    "MaxPool2d": pool,
    "AvgPool2d": pool,
    "GlobalAvgPool2d": shaping,
    "Flatten": shaping,
    "ReLU": elementwise,
    "LeakyReLU": elementwise,
    "GELU": elementwise,
    "SiLU": elementwise,
    "Dropout": elementwise,
    "Normalize": normalize,
    "Add": add,
}


def serve(plan: Plan, operation: Operation) -> Served:
    """The tasks of an operation. Raises EngineError for a layer that this engine does not know."""
    if operation.kind not in SERVICES:
        raise EngineError(f"layer {operation.names[0]}: engine jit has no kernel for {operation.kind}")
    return SERVICES[operation.kind](plan, operation)
