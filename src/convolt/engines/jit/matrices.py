"""Which kernels serve dense layers, in float32 and in bf16.

The contract is that of ``serve``, whose table leads here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from convolt.engines.jit.graph import Operation, Tensor
from convolt.engines.jit.isa import Unit
from convolt.engines.jit.kernels.dense_specs import (
    DensePackSpec,
    DenseSpec,
    DenseUpdateSpec,
    dense_backward_scratch,
    dense_forward_scratch,
    dense_moving_scratch,
    dense_panel,
    dense_update_scratch,
)
from convolt.engines.jit.kernels.specs import BLOCK, FLOAT, STRIPE, WIDE, UpdateSpec, round_up
from convolt.engines.jit.phases import Argument, Served, Task, Tasks
from convolt.engines.jit.plan import Deferred, Plan, address_of
from convolt.engines.jit.units import UNITS
from convolt.layers import Dense

DENSE_CHUNKS = 8
RUNS = 16  # of inputs or outputs, into which a dense layer in float32 is cut
FEW_SAMPLES = 8  # below this number a dense layer's W is not worth transposing
SHORT_RUN = 64  # inputs of a chunk, at least
BACKWARD_CHUNKS = 64  # of inputs, into which its backward pass is cut: fine enough to be even among threads
MOVING_CHUNKS = 4  # for each thread, about, of the pass that makes its gradient and moves W
UPDATE_PAYS = 1 << 16  # weights of a dense layer from which its gradient is made in the optimizer's pass
MOST_PACKED = 1 << 24  # weights of a dense layer that are kept a second time for predictions
TILES_PAY = 1 << 14  # weights of a dense layer from which rounding and packing pay
BLOCKS_PAY: Mapping[Unit, int] = {"amx": 4, "dot": 8, "fma": 8}
"""Predicted samples from which blocks of 32 rows beat rows of bf16 weights."""


def reads_half(plan: Plan, tensor: Tensor) -> bool:
    """Whether all that read a tensor round it to bf16 anyway: dense layers on tiles."""
    return bool(tensor.readers) and all(
        operation.kind == "Dense" and not _obstacle(plan, operation) for operation in tensor.readers
    )


def reads_pixels(plan: Plan, image: Tensor, features: Tensor) -> bool:
    """Whether flattening is left to weights that are packed for predictions: they may have any order of inputs."""
    bare = not (plan.training or any(image.border) or image.planar)
    return (
        bare
        and bool(features.readers)
        and all(_is_packed(operation) and bool(_obstacle(plan, operation)) for operation in features.readers)
    )


def readers_of_pixels(plan: Plan, operations: Sequence[Operation]) -> dict[Operation, Operation]:
    """Dense layers that can take the pixels of an image as they lie, each with its stand-in that does.

    Where nobody else reads the image, in the same format, and the gradient is not wanted but to move the matrix.
    """
    found = {}
    for operation in operations:
        source, features = operation.inputs[0], operation.output
        flattens = operation.kind == "Flatten" and source.is_image
        alone = flattens and len(source.readers) == len(features.readers) == 1
        bare = alone and not any(source.border) and not source.planar and source in plan.learning
        alike = (source.half, source.half_slope) == (features.half, features.half_slope)
        if bare and alike and features.readers[0] in operations and defers(plan, features.readers[0]):
            (reader,), pixels = features.readers, replace(features, image=source)
            plan.learning.add(pixels)
            reader.because("in whole steps it reads pixels as they lie, not flattened")
            found[reader] = replace(reader, inputs=(pixels,))
    return found


def matrices_of(stand_ins: Mapping[Operation, Operation]) -> dict[str, int]:
    """Their matrices, but those whose columns are in order either way."""
    images = {f"{each.names[0]}.weight": each.inputs[0].image for each in stand_ins.values()}
    shapes = {name: image.shape for name, image in images.items() if image is not None}
    return {name: C for name, (C, H, W) in shapes.items() if C > 1 and H * W > 1}


def defers(plan: Plan, operation: Operation) -> bool:
    """Whether a dense layer leaves its gradient to the optimizer's pass, where a step has one."""
    if operation.kind != "Dense" or not plan.training:
        return False
    large = _weights(operation) >= UPDATE_PAYS and plan.capacity >= FEW_SAMPLES
    return not _obstacle(plan, operation) or (plan.units.dense is None and large)


def _obstacle(plan: Plan, operation: Operation) -> str:
    """Why a dense layer does not multiply in blocks of bf16; empty where it does."""
    weights = _weights(operation)
    if plan.units.dense is None:
        return "fp32"
    if weights < TILES_PAY:
        return f"{weights:,} weights, bf16 pays from {TILES_PAY:,}"
    few = not plan.training and plan.capacity < BLOCKS_PAY[plan.units.dense] and _is_packed(operation)
    return "weights in bf16, for blocks too few samples" if few else ""


def _is_packed(operation: Operation) -> bool:
    return operation.kind == "Dense" and _weights(operation) <= MOST_PACKED


def _backward_run(layer: Dense) -> int:
    """Inputs of a chunk of the backward pass."""
    return round_up(-(-layer.in_features // BACKWARD_CHUNKS), WIDE)


def _weights(operation: Operation) -> int:
    layer = cast(Dense, operation.layer)
    return layer.in_features * layer.out_features


def dense_on_tiles(plan: Plan, operation: Operation, unit: Unit) -> Served:
    """Dense layer with activation, bf16 products."""
    layer, source, target = cast(Dense, operation.layer), operation.inputs[0], operation.output
    label, name, N = operation.label, operation.names[0], plan.capacity
    run = round_up(-(-layer.in_features // DENSE_CHUNKS), BLOCK)
    wide_run = _backward_run(layer)
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
        back = _backward(plan, replace(spec, run=wide_run), source)
        rows = plan.address(f"bf16 slopes {name}", samples * columns, np.uint16)
        turned_rows = plan.address(f"bf16 slopes turned {name}", samples * columns, np.uint16)
        dw = plan.parameter(operation, "weight", gradient=True)
        db = plan.parameter(operation, "bias", gradient=True) if layer.bias else 0
        dx: Argument = plan.slope(source) if back.wants_dx else 0
        own = plan.scratch(dense_backward_scratch(back) // FLOAT)
        wide_chunks = -(-layer.in_features // wide_run)
        dy = plan.slope(target)
        slopes = [
            plan.whole(f"{label} slopes", "dense:dense_slopes", back, 1, y, dy, db, x),
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
            count = -(-back.inputs // stripes.run)
            rows = round_up(-(-layer.out_features // -(-MOVING_CHUNKS * plan.threads // count)), BLOCK)
            bands = -(-layer.out_features // rows)
            moving = DenseUpdateSpec(stripes, spec, rows)
            return plan.whole(f"{label} dw+update", "dense_tiles:update", moving, count * bands, *arguments)

        alone = products("dw", replace(back, wants_dx=False))
        plan.deferred.append(Deferred(f"{name}.weight", N, peaks, alone, update))
        return [*slopes, products("dx", replace(back, wants_dw=False))] if back.wants_dx else slopes

    return forward, backward


def dense_prediction(plan: Plan, operation: Operation) -> list[Task]:
    """A dense layer's forward pass on weights that are packed when they have changed."""
    layer, source = cast(Dense, operation.layer), operation.inputs[0]
    label, N, outputs, inputs = operation.label, plan.capacity, layer.out_features, layer.in_features
    weight = plan.parameter(operation, "weight")
    bias = plan.parameter(operation, "bias") if layer.bias else 0
    x, y = plan.value(source), plan.value(operation.output)
    few = N < FEW_SAMPLES
    unit = plan.units.dense if _weights(operation) >= TILES_PAY else None  # then few, or blocks would serve it
    channels = 1 if source.image is None else source.image.shape[0]
    spec = DensePackSpec(inputs, outputs, channels, plan.isa.lanes, panels=not few, unit=unit)
    tasks: list[Task] = []
    packed: Argument = weight
    if not few or unit is not None or channels not in (1, inputs):
        packed = plan.address(f"filters {operation.names[0]}", spec.size, np.float32 if unit is None else np.uint16)
        chunks = -(-outputs // plan.isa.lanes)
        own = plan.scratch(plan.isa.lanes * inputs)
        tasks.append(plan.whole(f"{label} pack", "dense:pack", spec, chunks, weight, packed, own))
    if few:
        run = round_up(-(-outputs // RUNS), 4)
        dots = replace(_dense_spec(plan, operation, run), rounded=unit is not None)
        return [*tasks, plan.whole(label, "dense:dense_dots", dots, -(-outputs // run), x, packed, bias, y)]
    run = max(-(-inputs // RUNS), SHORT_RUN)
    products, chunks = replace(_dense_spec(plan, operation, run), packed=True), -(-inputs // run)
    parts = plan.address(f"parts of {operation.names[0]}", chunks * N * round_up(outputs, BLOCK))
    return [
        *tasks,
        plan.whole(label, "dense:dense_forward", products, chunks, x, packed, parts, 0, 0),
        plan.whole(f"{label} total", "dense_tiles:total", products, RUNS, parts, bias, y),
    ]


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
        half=operation.inputs[0].half,
    )


def _backward(plan: Plan, spec: DenseSpec, source: Tensor) -> DenseSpec:
    """What a backward pass is compiled for besides: forward kernels do not depend on it."""
    wants_dx = source in plan.learning
    add = wants_dx and plan.begin_slope(source)
    return replace(spec, wants_dx=wants_dx, accumulate=plan.accumulate, add=add, half_dx=source.half_slope)


def dense(plan: Plan, operation: Operation) -> Served:
    """Dense layer with activation."""
    layer, source, target = cast(Dense, operation.layer), operation.inputs[0], operation.output
    weights, N = _weights(operation), plan.capacity
    unit = plan.units.dense
    obstacle = _obstacle(plan, operation)
    if unit is not None and not obstacle:
        operation.because(f"{UNITS[unit]}: bf16, {weights:,} weights")
        return dense_on_tiles(plan, operation, unit)
    operation.because(f"{plan.isa.name} vectors: {obstacle}")
    label = operation.label
    weight = plan.parameter(operation, "weight")
    bias = plan.parameter(operation, "bias") if layer.bias else 0
    x, y = plan.value(source), plan.value(target)
    if not plan.training and _is_packed(operation):
        return dense_prediction(plan, operation), list
    chunks, left = 0, defers(plan, operation)
    if N < FEW_SAMPLES:
        run = round_up(-(-layer.out_features // RUNS), 4)
        spec = _dense_spec(plan, operation, run)
        forward = [plan.whole(label, "dense:dense_dots", spec, -(-layer.out_features // run), x, weight, bias, y)]
    else:
        run = max(-(-layer.in_features // RUNS), SHORT_RUN)
        spec, chunks = _dense_spec(plan, operation, run), -(-layer.in_features // run)
        parts = plan.address(f"parts of {operation.names[0]}", chunks * N * round_up(layer.out_features, BLOCK))
        scratch = plan.scratch(dense_panel(spec))
        peaks = plan.buffer(f"peaks {operation.names[0]}", chunks + 1)[: chunks + 1] if left else np.zeros(0)
        largest = address_of(peaks) if left else 0
        forward = [
            plan.whole(label, "dense:dense_forward", spec, chunks, x, weight, parts, scratch, largest),
            plan.whole(f"{label} total", "dense_tiles:total", spec, RUNS, parts, bias, y),
        ]

    def backward() -> Tasks:
        columns = _backward_run(layer)
        back = _backward(plan, replace(spec, run=columns), source)
        dw = plan.parameter(operation, "weight", gradient=True)
        db = plan.parameter(operation, "bias", gradient=True) if layer.bias else 0
        dx: Argument = plan.slope(source) if back.wants_dx else 0
        dy = plan.slope(target)
        slopes = plan.whole(f"{label} slopes", "dense:dense_slopes", back, 1, y, dy, db, x)

        def products(what: str, spec: DenseSpec) -> Task:
            arguments = (x, weight, dy, dw, dx, plan.scratch(dense_panel(spec)))
            chunks = -(-spec.inputs // spec.run)
            return plan.whole(f"{label} {what}", "dense:dense_backward", spec, chunks, *arguments)

        if not (plan.fuses_update and left):
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
        return [*tasks, products("dx", replace(back, wants_dw=False))] if back.wants_dx else tasks

    return forward, backward
