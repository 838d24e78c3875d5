"""Which kernels serve an operation: the one table from layers to tasks, forward and backward.

A function here takes the plan and the operation and returns the forward tasks and a function that makes the backward
ones. The backward tasks are made later, from the last operation to the first: whether a gradient is written or added
depends on who wrote before.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np

from convolt.engines.jit.graph import Operation, Tensor
from convolt.engines.jit.kernels.specs import (
    BLOCK,
    FLOAT,
    WIDE,
    AddSpec,
    ConvSpec,
    DenseSpec,
    Frame,
    InputSpec,
    MapSpec,
    NormSpec,
    PackSpec,
    PoolSpec,
    ReduceSpec,
    TileBackSpec,
    TileSpec,
    Windowing,
    dense_backward_scratch,
    dense_forward_scratch,
    round_up,
    turned,
)
from convolt.engines.jit.plan import DropoutMask, Plan, Task
from convolt.layers import GELU, AvgPool2d, BatchNorm2d, Conv2d, Dense, Dropout, Layer, LeakyReLU, MaxPool2d, Normalize

Tasks = list[Task]
Served = tuple[Tasks, Callable[[], Tasks]]
DENSE_CHUNKS = 16
LARGE_PART = 1 << 17  # elements of a part of dw, half a megabyte, above which a batch is cut into fewer chunks
FEW_CHUNKS = 4
TILES_PAY = 1 << 14  # weights of a dense layer from which rounding and packing pay
FILTERS_AT_ONCE = 16  # filters whose gradient parts one chunk adds up


def input_tasks(plan: Plan, tensor: Tensor, byte_input: bool, normalize: Normalize | None) -> Tasks:
    """Unpacking of the images, with an input normalization folded in."""
    frame = Frame.of(tensor)
    spec = InputSpec(frame, byte_input, plan.images)
    scale, shift = np.ones(frame.C), np.zeros(frame.C)
    if normalize is not None:
        scale, shift = 1 / np.array(normalize.std), -np.array(normalize.mean) / np.array(normalize.std)
    if byte_input:
        scale = scale / 255
    constants = plan.buffer("input constants", 2 * frame.C)
    constants[: frame.C], constants[frame.C : 2 * frame.C] = scale, shift
    pixels = plan.address("pixels", plan.capacity * frame.C * frame.H * frame.W, np.uint8 if byte_input else np.float32)
    scales = int(constants.ctypes.data)
    return [plan.by_image("input", "images:unpack", spec, pixels, plan.value(tensor), scales, scales + 4 * frame.C)]


def conv_spec(plan: Plan, operation: Operation) -> ConvSpec:
    """What a convolution's kernels are compiled for."""
    layer, source = cast(Conv2d, operation.layer), operation.inputs[0]
    window = layer.geometry
    _, P, Q = layer.output_shape(source.shape)
    return ConvSpec(
        x=Frame.of(source),
        y=Frame.of(operation.output),
        window=Windowing.of(layer),
        groups=layer.groups,
        K=layer.out_channels,
        P=P,
        Q=Q,
        bias=layer.bias,
        slope=operation.slope,
        pool=(1, 1) if operation.pool is None else operation.pool.geometry.kernel,
        images=plan.images,
        lanes=plan.isa.lanes,
        registers=plan.isa.registers,
        wants_dx=source in plan.learning,
    )


def conv(plan: Plan, operation: Operation) -> Served:
    """Convolution with activation and max-pool: pack, forward; pack turned, backward in parts, sum of parts."""
    if plan.tiles and cast(Conv2d, operation.layer).groups == 1:
        return conv_on_tiles(plan, operation)
    spec, name, label = conv_spec(plan, operation), operation.names[0], operation.label
    window, source, target = spec.window, operation.inputs[0], operation.output
    taps = window.R * window.S
    weight = plan.parameter(operation, "weight")
    bias = plan.parameter(operation, "bias") if spec.bias else 0
    packed = plan.address(f"filters {name}", taps * spec.groups * spec.channels * spec.packed_columns)
    codes = plan.address(f"codes {name}", plan.capacity * spec.P * spec.Q * spec.K, np.uint8)
    scratch = plan.scratch(spec.scratch)
    arguments = (plan.value(source), packed, bias, plan.value(target), codes, scratch)
    forward = [
        plan.whole(f"{label} pack", "weights:pack", PackSpec(spec, turned=False), taps, weight, packed),
        plan.by_image(label, "conv:conv_forward", spec, *arguments),
    ]

    def backward() -> Tasks:
        back = _adding(plan, spec, source)
        columns = turned(back).packed_columns
        reverse = plan.address(f"turned filters {name}", taps * spec.groups * spec.filters * columns)
        parts = plan.address("parts of dw", plan.chunks * taps * spec.channels * spec.K)
        bias_parts = plan.address("parts of db", plan.chunks * spec.K)
        dx = plan.slope(source) if back.wants_dx else 0
        tasks = []
        if back.wants_dx:
            tasks.append(
                plan.whole(f"{label} pack turned", "weights:pack", PackSpec(back, True), taps, weight, reverse)
            )
        arguments = (plan.value(source), reverse, plan.slope(target), plan.value(target), codes, dx)
        tasks.append(
            plan.by_image(f"{label} backward", "conv:conv_backward", back, *arguments, parts, bias_parts, scratch)
        )
        reduce = ReduceSpec(
            spec.K, spec.channels, window.R, window.S, plan.images, FILTERS_AT_ONCE, accumulate=plan.accumulate, bias=spec.bias
        )
        dw = plan.parameter(operation, "weight", gradient=True)
        db = plan.parameter(operation, "bias", gradient=True) if spec.bias else 0
        chunks = -(-spec.K // FILTERS_AT_ONCE)
        tasks.append(
            plan.whole(f"{label} dw", "weights:reduce_parts", reduce, chunks, parts, dw, bias_parts, db)
        )
        return tasks

    return forward, backward


def conv_on_tiles(plan: Plan, operation: Operation) -> Served:
    """The same on AMX tiles, bf16 products."""
    spec, name, label = conv_spec(plan, operation), operation.names[0], operation.label
    tiles, source, target = TileSpec(spec), operation.inputs[0], operation.output
    weight = plan.parameter(operation, "weight")
    bias = plan.parameter(operation, "bias") if spec.bias else 0
    packed = plan.address(f"filters {name}", tiles.columns * tiles.depth, np.uint16)
    codes = plan.address(f"codes {name}", plan.capacity * spec.P * spec.Q * spec.K, np.uint8)
    arguments = (plan.value(source), packed, bias, plan.value(target), codes, plan.scratch(tiles.scratch // FLOAT))
    forward = [
        plan.whole(
            f"{label} pack", "tiles:pack", PackSpec(spec, turned=False), tiles.columns // BLOCK, weight, packed
        ),
        plan.by_image(label, "tiles:conv_forward", tiles, *arguments),
    ]

    def backward() -> Tasks:
        back = TileBackSpec(_adding(plan, spec, source), plan.accumulate)
        chunks = plan.chunks
        if back.part > LARGE_PART:  # fewer parts: to write and add up sixteen of them would take longer than to compute
            chunks = min(plan.chunks, FEW_CHUNKS)
            back = replace(back, conv=replace(back.conv, images=-(-plan.capacity // chunks)))
        parts = plan.address("parts of dw", chunks * back.part)
        bias_parts = plan.address("parts of db", chunks * spec.K)
        dx, turned_filters, tasks = 0, 0, []
        if spec.wants_dx:
            dx, inputs = plan.slope(source), back.inputs
            turned_filters = plan.address(f"turned filters {name}", inputs.columns * inputs.depth, np.uint16)
            tasks.append(
                plan.whole(
                    f"{label} pack turned",
                    "tiles:pack",
                    PackSpec(back.conv, True),
                    inputs.columns // BLOCK,
                    weight,
                    turned_filters,
                )
            )
        arguments = (plan.value(source), turned_filters, plan.slope(target), plan.value(target), codes, dx)
        scratch = plan.scratch(back.scratch // FLOAT)
        pieces = (*arguments, parts, bias_parts, scratch)
        if chunks == plan.chunks:
            tasks.append(plan.by_image(f"{label} backward", "tiles:conv_backward", back, *pieces))
        else:
            tasks.append(plan.whole(f"{label} backward", "tiles:conv_backward", back, chunks, *pieces))
        dw = plan.parameter(operation, "weight", gradient=True)
        db = plan.parameter(operation, "bias", gradient=True) if spec.bias else 0
        filters = -(-spec.K // FILTERS_AT_ONCE)
        tasks.append(plan.whole(f"{label} dw", "tiles:reduce_parts", back, filters, parts, dw, bias_parts, db))
        return tasks

    return forward, backward


def _adding(plan: Plan, spec: ConvSpec, source: Tensor) -> ConvSpec:
    return replace(spec, add=plan.begin_slope(source)) if spec.wants_dx else spec


def dense_on_tiles(plan: Plan, operation: Operation) -> Served:
    """Dense layer with activation on AMX tiles, bf16 products."""
    layer, source, target = cast(Dense, operation.layer), operation.inputs[0], operation.output
    label, name, N = operation.label, operation.names[0], plan.capacity
    run = round_up(-(-layer.in_features // DENSE_CHUNKS), BLOCK)
    wide_run = round_up(run, WIDE)
    chunks = -(-layer.in_features // run)
    columns, samples = round_up(layer.out_features, BLOCK), round_up(N, BLOCK)
    spec = _dense_spec(plan, operation, run)
    weight = plan.parameter(operation, "weight")
    bias = plan.parameter(operation, "bias") if layer.bias else 0
    x, y = plan.value(source), plan.value(target)
    parts = plan.address(f"parts of {name}", chunks * N * columns)
    scratch = plan.scratch(dense_forward_scratch(spec) // FLOAT)
    forward = [
        plan.whole(label, "dense_tiles:forward", spec, chunks, x, weight, parts, scratch),
        plan.whole(f"{label} total", "dense_tiles:total", spec, 16, parts, bias, y),
    ]

    def backward() -> Tasks:
        back = replace(spec, run=wide_run, accumulate=plan.accumulate, add=spec.wants_dx and plan.begin_slope(source))
        rows = plan.address(f"bf16 slopes {name}", samples * columns, np.uint16)
        turned_rows = plan.address(f"bf16 slopes turned {name}", samples * columns, np.uint16)
        dw = plan.parameter(operation, "weight", gradient=True)
        db = plan.parameter(operation, "bias", gradient=True) if layer.bias else 0
        dx = plan.slope(source) if spec.wants_dx else 0
        own = plan.scratch(dense_backward_scratch(spec) // FLOAT)
        wide_chunks = -(-layer.in_features // wide_run)
        dy = plan.slope(target)
        return [
            plan.whole(f"{label} slopes", "dense:dense_slopes", back, 1, y, dy, db),
            plan.whole(f"{label} turn", "dense_tiles:turn", back, 1, dy, rows, turned_rows),
            plan.whole(
                f"{label} backward", "dense_tiles:backward", back, wide_chunks, x, weight, rows, turned_rows, dw, dx, own
            ),
        ]

    return forward, backward


def _dense_spec(plan: Plan, operation: Operation, run: int) -> DenseSpec:
    layer = cast(Dense, operation.layer)
    return DenseSpec(
        plan.capacity,
        layer.in_features,
        layer.out_features,
        layer.bias,
        operation.slope,
        run,
        plan.isa.lanes,
        plan.isa.registers,
        wants_dx=operation.inputs[0] in plan.learning,
    )


def dense(plan: Plan, operation: Operation) -> Served:
    """Dense layer with activation."""
    if plan.tiles and cast(Dense, operation.layer).in_features * cast(Dense, operation.layer).out_features >= TILES_PAY:
        return dense_on_tiles(plan, operation)
    layer, source, target = cast(Dense, operation.layer), operation.inputs[0], operation.output
    label = operation.label
    block = 4 * plan.isa.lanes
    run = round_up(-(-layer.out_features // DENSE_CHUNKS), 4)
    spec = _dense_spec(plan, operation, run)
    weight = plan.parameter(operation, "weight")
    bias = plan.parameter(operation, "bias") if layer.bias else 0
    x, y = plan.value(source), plan.value(target)
    chunks = -(-layer.out_features // run)
    forward = [plan.whole(label, "dense:dense_forward", spec, chunks, x, weight, bias, y)]

    def backward() -> Tasks:
        columns = round_up(-(-layer.in_features // DENSE_CHUNKS), block)
        back = replace(spec, run=columns, accumulate=plan.accumulate, add=spec.wants_dx and plan.begin_slope(source))
        dw = plan.parameter(operation, "weight", gradient=True)
        db = plan.parameter(operation, "bias", gradient=True) if layer.bias else 0
        dx = plan.slope(source) if spec.wants_dx else 0
        return [
            plan.whole(f"{label} slopes", "dense:dense_slopes", back, 1, y, plan.slope(target), db),
            plan.whole(
                f"{label} backward",
                "dense:dense_backward",
                back,
                -(-layer.in_features // columns),
                x,
                weight,
                plan.slope(target),
                dw,
                dx,
            ),
        ]

    return forward, backward


def batch_norm(plan: Plan, operation: Operation) -> Served:
    """BatchNorm with activation: sums, fold, apply; and back."""
    layer, source, target = cast(BatchNorm2d, operation.layer), operation.inputs[0], operation.output
    label, name, C = operation.label, operation.names[0], layer.num_features
    spec = NormSpec(Frame.of(source), Frame.of(target), layer.eps, layer.affine, operation.slope, plan.images)
    sums = plan.address("sums", plan.chunks * 2 * C, np.float64)
    constants = plan.address(f"constants {name}", 4 * C)
    momentum = int(np.float64(layer.momentum).view(np.int64))
    weight, bias = (plan.parameter(operation, key) if layer.affine else 0 for key in ("weight", "bias"))
    running = (plan.statistic(operation, "running_mean"), plan.statistic(operation, "running_var"))
    folding = (sums, weight, bias, *running, momentum, constants)
    apply = plan.by_image(label, "normalization:normalize", spec, plan.value(source), constants, plan.value(target))
    if not plan.training:
        return [plan.whole(f"{label} fold", "normalization:fold_running", spec, 1, *folding), apply], list
    forward = [
        plan.by_image(f"{label} statistics", "normalization:statistics", spec, plan.value(source), sums),
        plan.whole(f"{label} fold", "normalization:fold", spec, 1, *folding),
        apply,
    ]

    def backward() -> Tasks:
        back = replace(spec, add=plan.begin_slope(source), accumulate=plan.accumulate)
        means = plan.address("means of slopes", 2 * C)
        dweight, dbias = (
            plan.parameter(operation, key, gradient=True) if layer.affine else 0 for key in ("weight", "bias")
        )
        x, y, dy, dx = plan.value(source), plan.value(target), plan.slope(target), plan.slope(source)
        return [
            plan.by_image(f"{label} slopes", "normalization:slopes", spec, x, y, dy, constants, sums),
            plan.whole(f"{label} fold", "normalization:fold_slopes", back, 1, sums, dweight, dbias, means),
            plan.by_image(
                f"{label} backward", "normalization:normalize_backward", back, x, dy, constants, means, dx
            ),
        ]

    return forward, backward


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
        arguments = (plan.slope(target), codes, plan.slope(source))
        return [plan.by_image(f"{operation.label} backward", f"{factory}_backward", back, *arguments)]

    return forward, backward


def elementwise(plan: Plan, operation: Operation) -> Served:
    """An activation or Dropout that is fused nowhere."""
    layer, source, target = cast(Layer, operation.layer), operation.inputs[0], operation.output
    kind, number = _function(layer)
    spec = MapSpec(kind, Frame.of(source), Frame.of(target), plan.images, number)
    mask = 0
    if isinstance(layer, Dropout):
        size = plan.capacity * int(np.prod(source.shape))
        mask = plan.address(f"mask {operation.names[0]}", size)
        held = plan.buffer(f"mask {operation.names[0]}", size)[:size].reshape(plan.capacity, *_nhwc(source))
        plan.masks.append(DropoutMask(layer, operation.names[0], held))
    forward = [
        plan.by_image(operation.label, "images:elementwise", spec, plan.value(source), plan.value(target), mask)
    ]

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
    spec = MapSpec(operation.kind, Frame.of(source), Frame.of(target), plan.images, lanes=plan.isa.lanes)
    forward = [plan.by_image(operation.label, factory, spec, plan.value(source), plan.value(target))]

    def backward() -> Tasks:
        if source not in plan.learning:
            return []
        back = replace(spec, add=plan.begin_slope(source))
        arguments = (plan.slope(target), plan.slope(source))
        return [plan.by_image(f"{operation.label} backward", f"{factory}_backward", back, *arguments)]

    return forward, backward


def add(plan: Plan, operation: Operation) -> Served:
    """The sum of two branches, with activation."""
    left, right = operation.inputs
    target = operation.output
    spec = AddSpec(Frame.of(left), Frame.of(right), Frame.of(target), operation.slope, plan.images)
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
    spec = NormSpec(Frame.of(source), Frame.of(target), 0.0, False, 1.0, plan.images)
    constants = plan.buffer(f"constants {operation.names[0]}", 4 * C)[: 4 * C].reshape(4, C)
    constants[1] = constants[2] = 1 / np.array(layer.std)
    constants[3] = -np.array(layer.mean) / np.array(layer.std)
    held, means = int(constants.ctypes.data), plan.address("no means", 2 * C)
    forward = [
        plan.by_image(operation.label, "normalization:normalize", spec, plan.value(source), held, plan.value(target))
    ]

    def backward() -> Tasks:
        if source not in plan.learning:
            return []
        back = replace(spec, add=plan.begin_slope(source))
        arguments = (plan.value(source), plan.slope(target), held, means, plan.slope(source))
        return [plan.by_image(f"{operation.label} backward", "normalization:normalize_backward", back, *arguments)]

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
