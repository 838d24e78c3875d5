"""Which kernels serve convolutions, tap by tap, by Winograd's algorithm, and in bf16.

The contract is that of ``serve``, whose table leads here.
"""

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np

from convolt.engines.jit.buffers import Address
from convolt.engines.jit.graph import Operation, Tensor, is_depthwise
from convolt.engines.jit.isa import Unit, converts
from convolt.engines.jit.kernels.residues import packed_depth, packed_taps, tap_order
from convolt.engines.jit.kernels.specs import (
    BF16,
    BLOCK,
    FLOAT,
    VECTORS,
    ConvSpec,
    FoldSpec,
    Frame,
    PackSpec,
    ReduceSpec,
    SpreadSpec,
    Windowing,
)
from convolt.engines.jit.kernels.tile_specs import (
    PlaneBackSpec,
    ShiftedBackSpec,
    TileBackSpec,
    TileSpec,
    backward_spec,
    input_gradients,
)
from convolt.engines.jit.kernels.winograd_specs import (
    CHANNELS_AT_ONCE,
    WinogradPack,
    WinogradReduce,
    WinogradSpec,
    fits_tiles,
    obstacle,
)
from convolt.engines.jit.phases import Argument, Served, Task, Tasks
from convolt.engines.jit.plan import Plan
from convolt.engines.jit.units import UNITS
from convolt.layers import Conv2d

FEW_IMAGES = 8  # below this number Winograd's algorithm, which cuts no image, predicts nothing
SHORT_PART = 1 << 16  # FLOPs of a part of an image, at least: about a microsecond
LARGE_PART = 1 << 17  # elements of a part of dw, half a megabyte, above which a batch is cut into fewer chunks
FEW_CHUNKS = 4
FORWARD_CHUNKS = 8  # of a convolution by Winograd's algorithm whose filters are large
BACKWARD = {PlaneBackSpec: "planes", ShiftedBackSpec: "tiles_shifted", TileBackSpec: "tiles_backward"}
PLANES = 8  # channels up to which images are kept in planes
PACKED_RUNS = 16  # of channels, in which filters are transformed
FILTERS_AT_ONCE = 16  # filters whose gradient parts one chunk adds up
MOST_GROUPS = 8  # as one on tiles, with so many times the products: tiles are ten times as fast as vectors


def conv_spec(plan: Plan, operation: Operation) -> ConvSpec:
    """What a convolution's kernels are compiled for."""
    layer, source = cast(Conv2d, operation.layer), operation.inputs[0]
    _, P, Q = layer.output_shape(source.shape)
    kernel = (1, 1) if operation.pool is None else operation.pool.geometry.kernel
    windows = Windowing.side_by_side(kernel) if operation.pool is None else Windowing.of(operation.pool)
    aligned = windows == Windowing.side_by_side(kernel)
    return ConvSpec(
        x=Frame.of(source),
        y=Frame.of(operation.output),
        window=Windowing.of(layer),
        groups=1 if on_tiles(plan, operation) else layer.groups,
        K=layer.out_channels,
        P=P,
        Q=Q,
        bias=layer.bias or operation.norm is not None,
        slope=operation.slope,
        pool=kernel if aligned else (1, 1),
        images=plan.images,
        lanes=plan.isa.lanes,
        registers=plan.isa.registers,
        wants_dx=source in plan.learning,
        half_dy=operation.output.half_slope,
        half_dx=source.half_slope,
        windows=None if aligned else windows,
    )


def filters(plan: Plan, operation: Operation) -> tuple[Argument, Argument, Tasks]:
    """Where a convolution's filters and bias are (0 for none); with a BatchNorm taken in, what puts them there."""
    layer, norm = cast(Conv2d, operation.layer), operation.norm
    weight = plan.parameter(operation, "weight")
    bias = plan.parameter(operation, "bias") if layer.bias else 0
    if norm is None:
        return weight, bias, []
    K, row = layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.geometry.kernel)
    folded = plan.address(f"folded weight {operation.names[0]}", K * row)
    offset = plan.address(f"folded bias {operation.names[0]}", K)
    affine = (plan.parameter(operation, key, layer=1) if norm.affine else 0 for key in ("weight", "bias"))
    running = (plan.statistic(operation, f"running_{key}", layer=1) for key in ("mean", "var"))
    spec, chunks = FoldSpec(layer.bias, norm.affine, norm.eps), -(-K // FILTERS_AT_ONCE)
    arguments: tuple[Argument, ...] = (weight, bias, *affine, *running, folded, offset)
    sizes = K, row, FILTERS_AT_ONCE
    task = plan.whole(f"{operation.label} fold", "weights:fold_norm", spec, chunks, *arguments, sizes=sizes)
    return folded, offset, [task]


def conv(plan: Plan, operation: Operation) -> Served:
    """Convolution with activation and max-pool: pack, forward; pack turned, backward in parts, sum of parts."""
    groups, conv_unit = cast(Conv2d, operation.layer).groups, plan.units.conv
    spec, name, label = conv_spec(plan, operation), operation.names[0], operation.label
    if plan.units.tiles is not None and on_tiles(plan, operation):
        operation.because(f"{UNITS[plan.units.tiles]}: bf16, groups {groups}{' as one' if groups > 1 else ''}")
        return conv_on_tiles(plan, operation, plan.units.tiles)
    few, pairs = _few_images(plan), conv_unit == "dot" and spec.x.C % 2 == spec.K % 2 == 0
    slow = obstacle(replace(spec, pairs=pairs)) or few
    why = few or _unpaired(spec, slow) if conv_unit == "dot" else _ungrouped(spec)
    if conv_unit == "dot" and not why:
        operation.because(f"{UNITS[conv_unit]}: bf16")
        spec = replace(spec, pairs=True)
    else:
        operation.because(f"{plan.isa.name} vectors: fp32{f', {why}' if conv_unit is not None else ''}")
    if not slow:
        operation.because(f"Winograd F(2x2, {spec.window.R}x{spec.window.S})")
        return conv_by_winograd(plan, operation, spec)
    operation.because(f"tap by tap: {slow}")
    if not plan.training:
        return conv_prediction(plan, operation, spec), list
    window, source, target = spec.window, operation.inputs[0], operation.output
    taps = window.R * window.S
    weight, bias, folding = filters(plan, operation)
    packed, pack = packed_filters(plan, operation, spec, weight)
    codes = _codes(plan, operation, spec)
    arguments = (plan.value(source), packed, bias, plan.value(target), codes, plan.scratch(spec.scratch))
    forward = [*folding, pack, plan.by_image(label, "conv:conv_forward", spec, *arguments)]

    def backward() -> Tasks:
        back = _adding(plan, replace(spec, pairs=spec.pairs and not spec.sparse), source)
        if spec.sparse:
            operation.because("dw from the pixels that won the pool, in fp32", "backward")
        reverse_size = spec.groups * packed_depth(back, turned=True) * back.turned_columns
        reverse = plan.address(f"turned filters {name}", reverse_size)
        part = taps * spec.channels * spec.K
        chunks, images = _parts_of_gradient(plan, operation, part)
        back = replace(back, images=images)
        parts = plan.address("parts of dw", chunks * part)
        bias_parts = plan.address("parts of db", chunks * spec.K)
        dx = plan.slope(source) if back.wants_dx else 0
        tasks = []
        if back.wants_dx and reverse_size:  # else no tap meets an input
            tasks.append(_pack(plan, f"{label} pack turned", back, weight, reverse, turned=True))
        arguments = (plan.value(source), reverse, plan.slope(target), plan.value(target), codes, dx)
        pieces = parts, bias_parts, plan.scratch(back.scratch)
        tasks.append(_in_chunks(plan, f"{label} backward", "conv:conv_backward", back, chunks, *arguments, *pieces))
        sizes, runs = (spec.K, spec.channels, taps, spec.K, part, images), (spec.channels, CHANNELS_AT_ONCE)
        tasks.append(_sum_of_parts(plan, operation, "weights", (parts, bias_parts), runs, sizes))
        return tasks

    return forward, backward


def _unpaired(spec: ConvSpec, slow: str) -> str:
    """Why numbers are not multiplied in pairs; empty if they are. slow: why not by Winograd's algorithm."""
    if spec.depthwise:
        return "depthwise"
    if not slow and (spec.x.C % 2 or spec.K % 2):
        return "an odd number of channels"
    return ""


def _ungrouped(spec: ConvSpec) -> str:
    """Why numbers are not multiplied on tiles."""
    return "depthwise" if spec.depthwise else f"groups {spec.groups}, bf16 takes {MOST_GROUPS} at most"


def conv_prediction(plan: Plan, operation: Operation, spec: ConvSpec) -> Tasks:
    """A convolution's forward pass without codes; that of few images is cut into parts."""
    label = operation.label
    weight, bias, folding = filters(plan, operation)
    x, y = plan.value(operation.inputs[0]), plan.value(operation.output)
    bands, stripes = (1, 1) if spec.pairs else parts_of_images(plan, spec)
    spec = replace(spec, wants_dx=False, codes=False, bands=bands, stripes=stripes)
    packed, pack = packed_filters(plan, operation, spec, weight)
    tasks = [*folding, pack]
    arguments = (x, packed, bias, y, 0, plan.scratch(spec.scratch))
    if bands * stripes == 1:
        return [*tasks, plan.by_image(label, "conv:conv_forward", spec, *arguments)]
    return [*tasks, plan.whole(label, "conv:conv_forward", spec, plan.chunks * bands * stripes, *arguments)]


def packed_filters(plan: Plan, operation: Operation, spec: ConvSpec, weight: Argument) -> tuple[Address, Task]:
    """Where filters are packed for a forward pass, and what does it."""
    size = spec.groups * packed_depth(spec, turned=False) * spec.packed_columns
    packed = plan.address(f"filters {operation.names[0]}", size)
    return packed, _pack(plan, f"{operation.label} pack", spec, weight, packed, turned=False)


def _codes(plan: Plan, operation: Operation, spec: ConvSpec) -> Argument:
    """Where a fused pool keeps which tap won; 0 without one."""
    size = plan.capacity * math.prod(operation.output.shape)
    return plan.address(f"codes {operation.names[0]}", size, np.uint8) if spec.pooled and spec.codes else 0


def _pack(plan: Plan, label: str, spec: ConvSpec, weight: Argument, packed: Address, turned: bool) -> Task:
    """Filters packed in the order of their taps, or as dx wants them; depthwise, they are one matrix (taps, K)."""
    taps, depth = packed_taps(spec, turned), packed_depth(spec, turned)
    shape, columns = (spec.groups, spec.filters, spec.channels), spec.packed_columns
    if turned:
        columns = spec.turned_columns
    if spec.depthwise:
        shape, columns, rows = (1, spec.K, 1), 1 if turned else spec.K, spec.K if turned else 1
        taps, depth = tuple((tap, begin * rows) for tap, begin in taps), depth * rows
    places = (number for place in taps for number in place)
    sizes = *shape, spec.window.R * spec.window.S, columns, depth, *places
    return plan.whole(label, "weights:pack", PackSpec(turned, spec.pairs), len(taps), weight, packed, sizes=sizes)


def _parts_of_gradient(plan: Plan, operation: Operation, size: int) -> tuple[int, int]:
    """How many parts dw is computed in, of so many elements, and the images of each.

    Fewer where they are large: to write and add up sixteen of them would take longer than to compute them.
    """
    if size <= LARGE_PART:
        return plan.chunks, plan.images
    chunks = min(plan.chunks, FEW_CHUNKS)
    operation.because(f"{chunks} parts of dw: one has {size:,} elements", "backward")
    images = -(-plan.capacity // chunks)
    return -(-plan.capacity // images), images


def _in_chunks(plan: Plan, label: str, factory: str, spec: Any, chunks: int, *arguments: Argument) -> Task:
    """A task on images in so many chunks; with as many as the plan has it shares a phase with others."""
    if chunks == plan.chunks:
        return plan.by_image(label, factory, spec, *arguments)
    return plan.whole(label, factory, spec, chunks, *arguments)


def _sum_of_parts(
    plan: Plan,
    operation: Operation,
    module: str,
    parts: tuple[Address, ...],
    runs: tuple[int, int],
    sizes: tuple[int, ...],
    transformed: tuple[int, int] | None = None,
) -> Task:
    """The parts of dw and db added up, perhaps in scratch memory.

    runs: filters or channels in all, and in a chunk. transformed: R and S of filters whose gradient is transformed.
    """
    bias = cast(Conv2d, operation.layer).bias
    dw = plan.parameter(operation, "weight", gradient=True)
    db = plan.parameter(operation, "bias", gradient=True) if bias else 0
    (count, run), (dw_parts, db_parts, *scratch) = runs, parts
    how, label = (plan.accumulate, bias, plan.isa.lanes), f"{operation.label} dw"
    spec = ReduceSpec(*how) if transformed is None else WinogradReduce(*how, *transformed)
    arguments: tuple[Argument, ...] = (dw_parts, dw, db_parts, db, *scratch)
    return plan.whole(label, f"{module}:reduce_parts", spec, -(-count // run), *arguments, sizes=(*sizes, run))


def _few_images(plan: Plan) -> str:
    """Why few images are not predicted by Winograd's algorithm: threads share them, and their number moves no bit."""
    return "" if plan.training or plan.chunks >= FEW_IMAGES else "images that are cut into parts"


def parts_of_images(plan: Plan, spec: ConvSpec) -> tuple[int, int]:
    """Bands of rows and stripes of filters; these where filters are more to read than an image."""
    weights = spec.K * spec.channels * spec.window.R * spec.window.S
    rows = spec.y.H
    parts = min(plan.parts, 2 * weights * spec.P * spec.Q // SHORT_PART)
    if parts <= 1 or spec.depthwise:
        return 1, 1
    blocks = -(-spec.filters // (VECTORS * spec.lanes))
    stripes = _even(blocks, parts) if weights > spec.x.size else 1
    return _even(rows, -(-parts // stripes)), stripes


def _even(size: int, parts: int) -> int:
    """At most so many parts, none of them empty when each takes as much as the first."""
    return -(-size // -(-size // min(size, parts)))


def conv_by_winograd(plan: Plan, operation: Operation, spec: ConvSpec) -> Served:
    """The same by Winograd's algorithm: filters and tiles of pixels are transformed, then multiplied."""
    name, label, source, target = operation.names[0], operation.label, operation.inputs[0], operation.output
    if not fits_tiles(spec):
        spec = replace(spec, pool=(1, 1), windows=spec.pooling)
    winograd, forward_chunks = WinogradSpec(spec), plan.chunks
    if winograd.large and plan.chunks > FORWARD_CHUNKS:  # more images for each time that the filters are read
        images = -(-plan.capacity // FORWARD_CHUNKS)
        winograd, forward_chunks = WinogradSpec(replace(spec, images=images)), -(-plan.capacity // images)
    weight, bias, folding = filters(plan, operation)
    packed = plan.address(f"filters {name}", winograd.packed)
    codes = _codes(plan, operation, spec)
    arguments = (plan.value(source), packed, bias, plan.value(target), codes, plan.scratch(winograd.scratch))

    def transformed(what: str, spec: WinogradSpec, turned: bool, to: Address) -> Task:
        window, run = spec.conv.window, -(-spec.depth // PACKED_RUNS)
        pack = WinogradPack(window.R, window.S, spec.block, turned, spec.conv.pairs)
        sizes = spec.conv.x.C, spec.conv.K, run
        return plan.whole(f"{label} {what}", "winograd:pack", pack, -(-spec.depth // run), weight, to, sizes=sizes)

    forward = [
        *folding,
        transformed("pack", winograd, False, packed),
        _in_chunks(plan, label, "winograd:forward", winograd, forward_chunks, *arguments),
    ]

    def backward() -> Tasks:
        tasks, (chunks, images) = [], _parts_of_gradient(plan, operation, winograd.part)
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
        tasks.append(_in_chunks(plan, f"{label} backward", "winograd:backward", back, chunks, *pieces))
        sizes, runs = (spec.K, spec.x.C, images), (spec.x.C, CHANNELS_AT_ONCE)
        sums = plan.scratch(back.part_run(CHANNELS_AT_ONCE))
        window = spec.window.R, spec.window.S
        tasks.append(_sum_of_parts(plan, operation, "winograd", (parts, bias_parts, sums), runs, sizes, window))
        return tasks

    return forward, backward


def reads_planes(tensor: Tensor) -> bool:
    """Whether the convolutions on tiles that read the images would rather have planes: few channels, stride 1."""
    layers = [cast(Conv2d, operation.layer) for operation in tensor.readers if operation.kind == "Conv2d"]
    few = tensor.is_image and tensor.shape[0] <= PLANES
    return (
        few and len(layers) == len(tensor.readers) and all(one.groups == 1 and one.stride == (1, 1) for one in layers)
    )


def on_tiles(plan: Plan, operation: Operation) -> bool:
    """Whether it is a convolution that multiplies blocks of bf16: few groups are one, with zeros between them."""
    if operation.kind != "Conv2d" or plan.units.tiles is None:
        return False
    layer = cast(Conv2d, operation.layer)
    return layer.groups <= MOST_GROUPS and not is_depthwise(layer)


def conv_on_tiles(plan: Plan, operation: Operation, unit: Unit) -> Served:
    """The same with bf16 products."""
    spec = replace(conv_spec(plan, operation), unit=unit, codes=plan.training)
    name, label = operation.names[0], operation.label
    tiles, source, target = TileSpec(spec), operation.inputs[0], operation.output
    taps, groups = spec.window.R * spec.window.S, cast(Conv2d, operation.layer).groups
    weight, bias, folding = filters(plan, operation)
    weight, spreading = _as_one(plan, operation, weight)
    packed = plan.address(f"filters {name}", tiles.columns * tiles.depth, np.uint16)
    codes = _codes(plan, operation, spec)
    if tiles.pools_halves:
        operation.because("pooled when rounded, 32 channels at a time")
    arguments = (plan.value(source), packed, bias, plan.value(target), codes, plan.scratch(tiles.scratch // FLOAT))
    forward = [
        *folding,
        *spreading,
        _pack_tiles(plan, f"{label} pack", tiles, weight, packed, bias, taps),
        plan.by_image(label, "tiles:conv_forward", tiles, *arguments),
    ]

    def backward() -> Tasks:
        back = backward_spec(_adding(plan, spec, source))
        kernels, (chunks, images) = BACKWARD[type(back)], _parts_of_gradient(plan, operation, back.part)
        back = replace(back, conv=replace(back.conv, images=images))
        parts = plan.address("parts of dw", chunks * back.part)
        bias_parts = plan.address("parts of db", chunks * spec.K)
        dx: Argument = 0
        turned_filters: Argument = 0
        tasks = []
        if spec.wants_dx:
            dx, inputs, order = plan.slope(source), input_gradients(back.conv), tap_order(spec)
            size = sum(one.columns * one.depth for one in inputs)
            place = turned_filters = plan.address(f"turned filters {name}", size, np.uint16)
            for one in inputs:
                count = one.conv.window.R * one.conv.window.S
                tasks.append(_pack_tiles(plan, f"{label} pack turned", one, weight, place, 0, taps, order[:count]))
                order, place = order[count:], place + BF16 * one.columns * one.depth
        arguments = (plan.value(source), turned_filters, plan.slope(target), plan.value(target), codes, dx)
        scratch = plan.scratch(back.scratch // FLOAT)
        pieces = (*arguments, parts, bias_parts, scratch)
        tasks.append(_in_chunks(plan, f"{label} backward", f"{kernels}:conv_backward", back, chunks, *pieces))
        if isinstance(back, PlaneBackSpec):
            sizes: tuple[int, ...] = (spec.K, spec.x.C, taps, back.wide, back.part, images)
            runs = spec.x.C, CHANNELS_AT_ONCE
            tasks.append(_sum_of_parts(plan, operation, "weights", (parts, bias_parts), runs, sizes))
        else:
            of_group = spec.K // groups, spec.x.C // groups
            sizes = (spec.K, *of_group, taps, back.channels, back.depth, back.part, images)
            runs = spec.K, FILTERS_AT_ONCE
            tasks.append(_sum_of_parts(plan, operation, "tiles_backward", (parts, bias_parts), runs, sizes))
        return tasks

    return forward, backward


def _as_one(plan: Plan, operation: Operation, weight: Argument) -> tuple[Argument, Tasks]:
    """Filters with groups as filters without, and what makes them; none where they are."""
    layer = cast(Conv2d, operation.layer)
    if layer.groups == 1:
        return weight, []
    K, row = layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.geometry.kernel)
    spread, chunks = plan.address(f"spread {operation.names[0]}", K * layer.groups * row), -(-K // FILTERS_AT_ONCE)
    kernel, sizes = "weights:spread_groups", (K, row, layer.groups, FILTERS_AT_ONCE)
    task = plan.whole(f"{operation.label} spread", kernel, SpreadSpec(), chunks, weight, spread, sizes=sizes)
    return spread, [task]


def _pack_tiles(
    plan: Plan,
    label: str,
    tiles: TileSpec,
    weight: Argument,
    packed: Address,
    bias: Argument,
    taps: int,
    turned: tuple[int, ...] | None = None,
) -> Task:
    """Filters of so many taps packed as blocks of bf16 pairs for these tiles; turned: those taps alone, for dx."""
    conv, chosen = tiles.conv, range(taps) if turned is None else turned
    parts = tiles.bias_taps if turned is None else 0
    sizes = taps, conv.K, conv.x.C, tiles.channels, tiles.depth, parts, len(chosen), *chosen
    spec = PackSpec(turned is not None, native=converts(conv.unit))
    return plan.whole(label, "tiles:pack", spec, tiles.columns // BLOCK, weight, packed, bias, sizes=sizes)


def _adding(plan: Plan, spec: ConvSpec, source: Tensor) -> ConvSpec:
    return replace(spec, add=plan.begin_slope(source)) if spec.wants_dx else spec
