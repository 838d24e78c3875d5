"""Which kernels serve the layers with weight matrices: convolution and dense, in float32 and in bf16.

The contract is that of ``serve``, whose table leads here.
"""

import math
from dataclasses import replace
from typing import cast

import numpy as np

from convolt.engines.jit.buffers import Address
from convolt.engines.jit.graph import Operation, Tensor
from convolt.engines.jit.isa import Unit
from convolt.engines.jit.kernels.residues import columns_of, taps_of
from convolt.engines.jit.kernels.specs import (
    BLOCK,
    FLOAT,
    QUARTERS,
    STRIPE,
    WIDE,
    ConvSpec,
    DenseSpec,
    DenseUpdateSpec,
    FoldSpec,
    Frame,
    PackSpec,
    ReduceSpec,
    UpdateSpec,
    Windowing,
    dense_backward_scratch,
    dense_forward_scratch,
    dense_moving_scratch,
    dense_panel,
    dense_update_scratch,
    round_up,
)
from convolt.engines.jit.kernels.tile_specs import (
    PlaneBackSpec,
    ShiftedBackSpec,
    TileBackSpec,
    TileSpec,
    backward_spec,
    input_gradient,
)
from convolt.engines.jit.kernels.winograd_specs import (
    CHANNELS_AT_ONCE,
    WinogradPack,
    WinogradReduce,
    WinogradSpec,
    obstacle,
)
from convolt.engines.jit.phases import Argument, Served, Task, Tasks
from convolt.engines.jit.plan import Deferred, Plan, address_of
from convolt.engines.jit.units import UNITS
from convolt.layers import Conv2d, Dense

DENSE_CHUNKS = 8
RUNS = 16  # of inputs or outputs, into which a dense layer in float32 is cut
FEW_SAMPLES = 8  # below this number a dense layer's W is not worth transposing
SHORT_RUN = 64  # inputs of a chunk, at least
BACKWARD_CHUNKS = 64  # of inputs, into which its backward pass is cut: fine enough to be even among threads
UPDATE_PAYS = 1 << 16  # weights of a dense layer from which its gradient is made in the optimizer's pass
LARGE_PART = 1 << 17  # elements of a part of dw, half a megabyte, above which a batch is cut into fewer chunks
FEW_CHUNKS = 4
FORWARD_CHUNKS = 8  # of a convolution by Winograd's algorithm whose filters are large
BACKWARD = {PlaneBackSpec: "planes", ShiftedBackSpec: "tiles_shifted", TileBackSpec: "tiles_backward"}
REDUCE = {
    "planes": "planes:reduce_parts",
    "tiles_shifted": "tiles_backward:reduce_parts",
    "tiles_backward": "tiles_backward:reduce_parts",
}
PLANES = 8  # channels up to which images are kept in planes
TILES_PAY = 1 << 14  # weights of a dense layer from which rounding and packing pay
FILTERS_AT_ONCE = 16  # filters whose gradient parts one chunk adds up


def conv_spec(plan: Plan, operation: Operation) -> ConvSpec:
    """What a convolution's kernels are compiled for."""
    layer, source = cast(Conv2d, operation.layer), operation.inputs[0]
    _, P, Q = layer.output_shape(source.shape)
    return ConvSpec(
        x=Frame.of(source),
        y=Frame.of(operation.output),
        window=Windowing.of(layer),
        groups=layer.groups,
        K=layer.out_channels,
        P=P,
        Q=Q,
        bias=layer.bias or operation.norm is not None,
        slope=operation.slope,
        pool=(1, 1) if operation.pool is None else operation.pool.geometry.kernel,
        images=plan.images,
        lanes=plan.isa.lanes,
        registers=plan.isa.registers,
        wants_dx=source in plan.learning,
    )


def filters(plan: Plan, operation: Operation) -> tuple[Argument, Argument, Tasks]:
    """Where a convolution's filters and bias are (0 for none); with a BatchNorm taken in, what puts them there."""
    layer, norm = cast(Conv2d, operation.layer), operation.norm
    weight = plan.parameter(operation, "weight")
    bias = plan.parameter(operation, "bias") if layer.bias else 0
    if norm is None:
        return weight, bias, []
    K, row = layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.geometry.kernel)
    folded, offset = (plan.address(f"folded {operation.names[0]}", size) for size in (K * row, K))
    affine = (plan.parameter(operation, key, layer=1) if norm.affine else 0 for key in ("weight", "bias"))
    running = (plan.statistic(operation, f"running_{key}", layer=1) for key in ("mean", "var"))
    spec = FoldSpec(K, row, layer.bias, norm.affine, norm.eps, FILTERS_AT_ONCE)
    arguments: tuple[Argument, ...] = (weight, bias, *affine, *running, folded, offset)
    task = plan.whole(f"{operation.label} fold", "weights:fold_norm", spec, -(-K // FILTERS_AT_ONCE), *arguments)
    return folded, offset, [task]


def conv(plan: Plan, operation: Operation) -> Served:
    """Convolution with activation and max-pool: pack, forward; pack turned, backward in parts, sum of parts."""
    groups = cast(Conv2d, operation.layer).groups
    if plan.unit is not None and groups == 1:
        operation.because(f"{UNITS[plan.unit]}: bf16, groups 1")
        return conv_on_tiles(plan, operation, plan.unit)
    why = "fp32" if plan.unit is None else f"groups {groups}, bf16 takes 1"
    operation.because(f"{plan.isa.name} vectors: {why}")
    spec, name, label = conv_spec(plan, operation), operation.names[0], operation.label
    slow = obstacle(spec)
    if not slow:
        operation.because("Winograd F(2x2, 3x3)")
        return conv_by_winograd(plan, operation, spec)
    operation.because(f"tap by tap: {slow}")
    window, source, target = spec.window, operation.inputs[0], operation.output
    taps = window.R * window.S
    weight, bias, folding = filters(plan, operation)
    packed = plan.address(f"filters {name}", taps * spec.groups * spec.channels * spec.packed_columns)
    codes = plan.address(f"codes {name}", plan.capacity * spec.P * spec.Q * spec.K, np.uint8)
    scratch = plan.scratch(spec.scratch)
    arguments = (plan.value(source), packed, bias, plan.value(target), codes, scratch)
    forward = [
        *folding,
        plan.whole(f"{label} pack", "weights:pack", PackSpec(spec, turned=False), taps, weight, packed),
        plan.by_image(label, "conv:conv_forward", spec, *arguments),
    ]

    def backward() -> Tasks:
        back = _adding(plan, spec, source)
        turned = PackSpec(back, turned=True)
        order = taps_of(turned)
        reverse_size = len(order) * spec.groups * spec.filters * columns_of(turned)
        reverse = plan.address(f"turned filters {name}", reverse_size)
        parts = plan.address("parts of dw", plan.chunks * taps * spec.channels * spec.K)
        bias_parts = plan.address("parts of db", plan.chunks * spec.K)
        dx = plan.slope(source) if back.wants_dx else 0
        tasks = []
        if back.wants_dx:
            tasks.append(plan.whole(f"{label} pack turned", "weights:pack", turned, len(order), weight, reverse))
        arguments = (plan.value(source), reverse, plan.slope(target), plan.value(target), codes, dx)
        tasks.append(
            plan.by_image(f"{label} backward", "conv:conv_backward", back, *arguments, parts, bias_parts, scratch)
        )
        reduce = ReduceSpec(
            spec.K,
            spec.channels,
            window.R,
            window.S,
            plan.images,
            FILTERS_AT_ONCE,
            accumulate=plan.accumulate,
            bias=spec.bias,
        )
        dw = plan.parameter(operation, "weight", gradient=True)
        db = plan.parameter(operation, "bias", gradient=True) if spec.bias else 0
        chunks = -(-spec.K // FILTERS_AT_ONCE)
        tasks.append(plan.whole(f"{label} dw", "weights:reduce_parts", reduce, chunks, parts, dw, bias_parts, db))
        return tasks

    return forward, backward


def conv_by_winograd(plan: Plan, operation: Operation, spec: ConvSpec) -> Served:
    """The same by Winograd's algorithm: filters and tiles of pixels are transformed, then multiplied."""
    name, label, source, target = operation.names[0], operation.label, operation.inputs[0], operation.output
    winograd, forward_chunks = WinogradSpec(spec), plan.chunks
    if winograd.large and plan.chunks > FORWARD_CHUNKS:  # more images for each time that the filters are read
        images = -(-plan.capacity // FORWARD_CHUNKS)
        winograd, forward_chunks = WinogradSpec(replace(spec, images=images)), -(-plan.capacity // images)
    weight, bias, folding = filters(plan, operation)
    packed = plan.address(f"filters {name}", winograd.packed)
    codes = plan.address(f"codes {name}", plan.capacity * spec.P * spec.Q * spec.K, np.uint8)
    arguments = (plan.value(source), packed, bias, plan.value(target), codes, plan.scratch(winograd.scratch))

    def transformed(what: str, spec: WinogradSpec, turned: bool, to: Address) -> Task:
        run = -(-spec.conv.x.C // RUNS)
        pack = WinogradPack(spec, turned, run)
        return plan.whole(f"{label} {what}", "winograd:pack", pack, -(-spec.conv.x.C // run), weight, to)

    forward = [
        *folding,
        transformed("pack", winograd, False, packed),
        plan.by_image(label, "winograd:forward", winograd, *arguments)
        if forward_chunks == plan.chunks
        else plan.whole(label, "winograd:forward", winograd, forward_chunks, *arguments),
    ]

    def backward() -> Tasks:
        chunks, tasks = plan.chunks, []
        if winograd.part > LARGE_PART:
            chunks = min(plan.chunks, FEW_CHUNKS)
            operation.because(f"{chunks} parts of dw: one has {winograd.part:,} elements", "backward")
        images = -(-plan.capacity // chunks)
        chunks = -(-plan.capacity // images)
        back = WinogradSpec(replace(_adding(plan, spec, source), images=images))
        parts = plan.address("parts of dw", chunks * back.part)
        bias_parts = plan.address("parts of db", chunks * spec.K)
        dx: Argument = 0
        turned_filters: Argument = 0
        if spec.wants_dx:
            dx, turned = plan.slope(source), plan.address(f"turned filters {name}", back.back.packed)
            turned_filters = turned
            tasks.append(transformed("pack turned", back.back, True, turned))
        arguments = (plan.value(source), turned_filters, plan.slope(target), plan.value(target), codes, dx)
        pieces = (*arguments, parts, bias_parts, plan.scratch(back.back_scratch))
        if chunks == plan.chunks:
            tasks.append(plan.by_image(f"{label} backward", "winograd:backward", back, *pieces))
        else:
            tasks.append(plan.whole(f"{label} backward", "winograd:backward", back, chunks, *pieces))
        dw = plan.parameter(operation, "weight", gradient=True)
        db = plan.parameter(operation, "bias", gradient=True) if spec.bias else 0
        reduce = WinogradReduce(back, plan.accumulate)
        runs = -(-spec.x.C // CHANNELS_AT_ONCE)
        tasks.append(plan.whole(f"{label} dw", "winograd:reduce_parts", reduce, runs, parts, dw, bias_parts, db))
        return tasks

    return forward, backward


def reads_planes(tensor: Tensor) -> bool:
    """Whether the convolutions on tiles that read the images would rather have planes: few channels, stride 1."""
    layers = [cast(Conv2d, operation.layer) for operation in tensor.readers if operation.kind == "Conv2d"]
    few = tensor.is_image and tensor.shape[0] <= PLANES
    return (
        few and len(layers) == len(tensor.readers) and all(one.groups == 1 and one.stride == (1, 1) for one in layers)
    )


def reads_half(tensor: Tensor) -> bool:
    """Whether all that read a tensor round it to bf16 anyway: dense layers on tiles."""
    return bool(tensor.readers) and all(
        operation.kind == "Dense" and _weights(operation) >= TILES_PAY for operation in tensor.readers
    )


def _weights(operation: Operation) -> int:
    layer = cast(Dense, operation.layer)
    return layer.in_features * layer.out_features


def conv_on_tiles(plan: Plan, operation: Operation, unit: Unit) -> Served:
    """The same with bf16 products."""
    spec, name, label = replace(conv_spec(plan, operation), unit=unit), operation.names[0], operation.label
    tiles, source, target = TileSpec(spec), operation.inputs[0], operation.output
    weight, bias, folding = filters(plan, operation)
    packed = plan.address(f"filters {name}", tiles.columns * tiles.depth, np.uint16)
    codes = plan.address(f"codes {name}", plan.capacity * spec.P * spec.Q * spec.K, np.uint8)
    arguments = (plan.value(source), packed, bias, plan.value(target), codes, plan.scratch(tiles.scratch // FLOAT))
    forward = [
        *folding,
        plan.whole(f"{label} pack", "tiles:pack", PackSpec(spec, turned=False), tiles.columns // BLOCK, weight, packed),
        plan.by_image(label, "tiles:conv_forward", tiles, *arguments),
    ]

    def backward() -> Tasks:
        back = backward_spec(_adding(plan, spec, source), plan.accumulate)
        kernels = BACKWARD[type(back)]
        chunks = plan.chunks
        if back.part > LARGE_PART:  # fewer parts: to write and add up sixteen of them would take longer than to compute
            chunks = min(plan.chunks, FEW_CHUNKS)
            operation.because(f"{chunks} parts of dw: one has {back.part:,} elements", "backward")
            back = replace(back, conv=replace(back.conv, images=-(-plan.capacity // chunks)))
        parted = replace(back, accumulate=True)  # what becomes of the parts is another kernel's business
        parts = plan.address("parts of dw", chunks * back.part)
        bias_parts = plan.address("parts of db", chunks * spec.K)
        dx: Argument = 0
        turned_filters: Argument = 0
        tasks = []
        if spec.wants_dx:
            dx, inputs = plan.slope(source), input_gradient(back.conv)
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
            tasks.append(plan.by_image(f"{label} backward", f"{kernels}:conv_backward", parted, *pieces))
        else:
            tasks.append(plan.whole(f"{label} backward", f"{kernels}:conv_backward", parted, chunks, *pieces))
        dw = plan.parameter(operation, "weight", gradient=True)
        db = plan.parameter(operation, "bias", gradient=True) if spec.bias else 0
        filters = -(-spec.K // FILTERS_AT_ONCE)
        tasks.append(plan.whole(f"{label} dw", REDUCE[kernels], back, filters, parts, dw, bias_parts, db))
        return tasks

    return forward, backward


def _adding(plan: Plan, spec: ConvSpec, source: Tensor) -> ConvSpec:
    return replace(spec, add=plan.begin_slope(source)) if spec.wants_dx else spec


def dense_on_tiles(plan: Plan, operation: Operation, unit: Unit) -> Served:
    """Dense layer with activation, bf16 products."""
    layer, source, target = cast(Dense, operation.layer), operation.inputs[0], operation.output
    label, name, N = operation.label, operation.names[0], plan.capacity
    run = round_up(-(-layer.in_features // DENSE_CHUNKS), BLOCK)
    wide_run = round_up(run, WIDE)
    chunks = -(-layer.in_features // run)
    columns, samples = round_up(layer.out_features, BLOCK), round_up(N, BLOCK)
    spec = replace(_dense_spec(plan, operation, run), unit=unit)
    weight = plan.parameter(operation, "weight")
    bias = plan.parameter(operation, "bias") if layer.bias else 0
    x, y = plan.value(source), plan.value(target)
    parts = plan.address(f"parts of {name}", chunks * N * columns)
    scratch = plan.scratch(dense_forward_scratch(spec) // FLOAT)
    peaks = plan.buffer(f"peaks {name}", chunks + 1)[: chunks + 1]
    largest = address_of(peaks)
    shadow = plan.address(f"bf16 weights {name}", layer.in_features * layer.out_features, np.uint16)
    forward = [
        plan.whole(f"{label} rounding", "dense_tiles:round_weights", spec, DENSE_CHUNKS, weight, shadow),
        plan.whole(label, "dense_tiles:forward", spec, chunks, x, shadow, parts, scratch, largest),
        plan.whole(f"{label} total", "dense_tiles:total", spec, 16, parts, bias, y),
    ]

    def backward() -> Tasks:
        back = replace(spec, run=wide_run, accumulate=plan.accumulate, add=spec.wants_dx and plan.begin_slope(source))
        rows = plan.address(f"bf16 slopes {name}", samples * columns, np.uint16)
        turned_rows = plan.address(f"bf16 slopes turned {name}", samples * columns, np.uint16)
        dw = plan.parameter(operation, "weight", gradient=True)
        db = plan.parameter(operation, "bias", gradient=True) if layer.bias else 0
        dx: Argument = plan.slope(source) if spec.wants_dx else 0
        own = plan.scratch(dense_backward_scratch(spec) // FLOAT)
        wide_chunks = -(-layer.in_features // wide_run)
        dy = plan.slope(target)
        slopes = [
            plan.whole(f"{label} slopes", "dense:dense_slopes", back, 1, y, dy, db),
            plan.whole(f"{label} turn", "dense_tiles:turn", back, 1, dy, rows, turned_rows, largest + FLOAT * chunks),
        ]

        def products(what: str, spec: DenseSpec) -> Task:
            arguments: tuple[Argument, ...] = (x, shadow, rows, turned_rows, dw, dx, own)
            return plan.whole(f"{label} {what}", "dense_tiles:backward", spec, wide_chunks, *arguments)

        if not plan.fuses_update:
            return [*slopes, products("backward", back)]

        def update(spec: UpdateSpec, state: tuple[int, ...], numbers: int) -> Task:
            own = plan.scratch(dense_update_scratch(back) // FLOAT)
            stripes = replace(back, run=round_up(run, STRIPE))
            arguments: tuple[Argument, ...] = (x, turned_rows, weight, *state, numbers, own, shadow)
            chunks = -(-back.inputs // stripes.run) * QUARTERS
            return plan.whole(
                f"{label} dw+update", "dense_tiles:update", DenseUpdateSpec(stripes, spec), chunks, *arguments
            )

        alone = products("dw", replace(back, wants_dx=False))
        plan.deferred.append(Deferred(f"{name}.weight", N, peaks, alone, update))
        return [*slopes, products("dx", replace(back, wants_dw=False))] if spec.wants_dx else slopes

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
        half=operation.inputs[0].half,
    )


def dense(plan: Plan, operation: Operation) -> Served:
    """Dense layer with activation."""
    layer, source, target = cast(Dense, operation.layer), operation.inputs[0], operation.output
    weights, N = _weights(operation), plan.capacity
    if plan.unit is not None and weights >= TILES_PAY:
        operation.because(f"{UNITS[plan.unit]}: bf16, {weights:,} weights")
        return dense_on_tiles(plan, operation, plan.unit)
    why = "fp32" if plan.unit is None else f"{weights:,} weights, bf16 pays from {TILES_PAY:,}"
    operation.because(f"{plan.isa.name} vectors: {why}")
    label = operation.label
    weight = plan.parameter(operation, "weight")
    bias = plan.parameter(operation, "bias") if layer.bias else 0
    x, y = plan.value(source), plan.value(target)
    chunks, defers = 0, False
    if N < FEW_SAMPLES:
        run = round_up(-(-layer.out_features // RUNS), 4)
        spec = _dense_spec(plan, operation, run)
        forward = [plan.whole(label, "dense:dense_dots", spec, -(-layer.out_features // run), x, weight, bias, y)]
    else:
        run = max(-(-layer.in_features // RUNS), SHORT_RUN)
        spec, chunks = _dense_spec(plan, operation, run), -(-layer.in_features // run)
        parts = plan.address(f"parts of {operation.names[0]}", chunks * N * round_up(layer.out_features, BLOCK))
        scratch = plan.scratch(dense_panel(spec))
        defers = plan.training and plan.unit is None and weights >= UPDATE_PAYS
        peaks = plan.buffer(f"peaks {operation.names[0]}", chunks + 1)[: chunks + 1] if defers else np.zeros(0)
        largest = address_of(peaks) if defers else 0
        forward = [
            plan.whole(label, "dense:dense_forward", spec, chunks, x, weight, parts, scratch, largest),
            plan.whole(f"{label} total", "dense_tiles:total", spec, RUNS, parts, bias, y),
        ]

    def backward() -> Tasks:
        columns = round_up(-(-layer.in_features // BACKWARD_CHUNKS), WIDE)
        back = replace(spec, run=columns, accumulate=plan.accumulate, add=spec.wants_dx and plan.begin_slope(source))
        dw = plan.parameter(operation, "weight", gradient=True)
        db = plan.parameter(operation, "bias", gradient=True) if layer.bias else 0
        dx: Argument = plan.slope(source) if spec.wants_dx else 0
        dy = plan.slope(target)
        slopes = plan.whole(f"{label} slopes", "dense:dense_slopes", back, 1, y, dy, db)

        def products(what: str, spec: DenseSpec) -> Task:
            arguments = (x, weight, dy, dw, dx, plan.scratch(dense_panel(spec)))
            chunks = -(-spec.inputs // spec.run)
            return plan.whole(f"{label} {what}", "dense:dense_backward", spec, chunks, *arguments)

        if not (plan.fuses_update and defers):
            return [slopes, products("backward", back)]

        def update(spec: UpdateSpec, state: tuple[int, ...], numbers: int) -> Task:
            moved = replace(back, run=max(layer.in_features // RUNS // SHORT_RUN * SHORT_RUN, WIDE))
            own = plan.scratch(dense_moving_scratch(moved))
            chunks = -(-moved.inputs // moved.run)
            arguments: tuple[Argument, ...] = (x, dy, weight, *state, numbers, own)
            return plan.whole(
                f"{label} dw+update", "dense_update:update", DenseUpdateSpec(moved, spec), chunks, *arguments
            )

        alone = products("dw", replace(back, wants_dx=False))
        plan.deferred.append(Deferred(f"{operation.names[0]}.weight", N, peaks, alone, update))
        tasks = [slopes, plan.whole(f"{label} peak", "dense:dense_peak", back, 1, dy, largest + FLOAT * chunks)]
        return [*tasks, products("dx", replace(back, wants_dw=False))] if spec.wants_dx else tasks

    return forward, backward
