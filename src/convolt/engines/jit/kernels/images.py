"""Kernels that change images one by one: unpacking, elementwise layers, sums, flattening and averages.

Backward kernels either write a gradient or, where a tensor has several readers, add to it (``spec.add``). Gradients
have no border. Cost: one read and one write of each element; the input and output of an image are in the L2 cache when
the kernels around run on the same chunk.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from convolt.engines.jit.bf16 import source_of, to_bf16
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.kernels.specs import BF16, FLOAT, AddSpec, InputSpec, MapSpec, number_bytes
from convolt.engines.jit.memory import LINE, claim, view
from convolt.engines.jit.pixels import Block, activated, for_blocks, let_through, on_pixels
from convolt.engines.jit.transpose import Transpose, transpose
from convolt.engines.jit.vectors import I64, Floats, carried_loop

VECTORS = 4  # of a block
AHEAD = 1 << 14  # bytes of the next image's features that are asked for while this one's are written: in the L1 cache
STREAMED = ("relu", "leaky", "dropout")  # what is written out as vectors


def unpack(spec: InputSpec) -> Callable[..., None]:
    """Images (N, C, H, W) into the frame, NHWC, normalized; arguments: state, y, scale, shift.

    y = x scale + shift for each channel, where scale holds 1/255 for bytes and 1/std.
    """
    y, images = spec.y, spec.images
    C, H, W, columns, origin, size = y.C, y.H, y.W, y.columns, y.origin, y.size
    dtype = np.uint8 if spec.bytes else np.float32
    width = 1 if spec.bytes else FLOAT

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        state = view(arguments[0], (2,), np.int64)
        count, pixels = state[0], state[1]
        scale, shift = view(arguments[2], (C,), np.float32), view(arguments[3], (C,), np.float32)
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            source = view(pixels + width * image * C * H * W, (C, H, W), dtype)
            for h in range(H):
                target = view(arguments[1] + FLOAT * (image * size + origin + h * columns * C), (W, C), np.float32)
                for c in range(C):
                    for w in range(W):
                        target[w, c] = np.float32(source[c, h, w]) * scale[c] + shift[c]

    return kernel


def elementwise(spec: MapSpec) -> Callable[..., None]:
    """``y = f(x)``; arguments: state, x, y, mask. ``mask`` (N, H, W, C) is Dropout's."""
    x, y, images = spec.x, spec.y, spec.images
    H, row = x.H, x.W * x.C
    run = _streamed(spec, row) if spec.kind in STREAMED else _computed(spec, row)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for h in range(H):
                source = arguments[1] + FLOAT * (image * x_size + x_origin + h * x_pitch)
                target = arguments[2] + FLOAT * (image * y_size + y_origin + h * y_pitch)
                run((source, target, arguments[3] + FLOAT * (image * H + h) * row), 1)

    x_size, x_origin, x_pitch = x.size, x.origin, x.pitch
    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch
    return kernel


def elementwise_backward(spec: MapSpec) -> Callable[..., None]:
    """``dx (+)= dy f'(x)``; arguments: state, x, dy, mask, dx. x is a frame, dy and dx (N, H, W, C)."""
    x, images = spec.x, spec.images
    H, row = x.H, x.W * x.C
    run = _streamed_backward(spec, row) if spec.kind in STREAMED else _computed_backward(spec, row)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for h in range(H):
                source = arguments[1] + FLOAT * (image * x_size + x_origin + h * x_pitch)
                place = FLOAT * (image * H + h) * row
                run((source, arguments[2] + place, arguments[3] + place, arguments[4] + place), 1)

    x_size, x_origin, x_pitch = x.size, x.origin, x.pitch
    return kernel


def _streamed(spec: MapSpec, row: int) -> Any:
    """``run((x, y, mask), 1)`` of a row of numbers, as vectors."""

    def number(floats: Floats, x: Any, mask: Any) -> Any:
        return floats.builder.fmul(x, mask) if spec.kind == "dropout" else activated(floats, x, spec.number)

    def generate(builder: Any, words: list[Any], pixels: Any) -> None:
        floats = Floats(builder, spec.lanes)
        x, y, mask = (floats.pointer(word) for word in words)

        def block(b: Block) -> None:
            values = b.load(x)
            masks = b.load(mask) if spec.kind == "dropout" else values
            b.store([number(floats, *pair) for pair in zip(values, masks, strict=True)], y)

        for_blocks(floats, row, VECTORS, block)

    return on_pixels(generate)


def _streamed_backward(spec: MapSpec, row: int) -> Any:
    """``run((x, dy, mask, dx), 1)`` of a row of numbers, as vectors."""

    def number(floats: Floats, seen: Any, dy: Any) -> Any:
        return floats.builder.fmul(dy, seen) if spec.kind == "dropout" else let_through(floats, dy, seen, spec.number)

    def generate(builder: Any, words: list[Any], pixels: Any) -> None:
        floats = Floats(builder, spec.lanes)
        x, dy, mask, dx = (floats.pointer(word) for word in words)

        def block(b: Block) -> None:
            pairs = zip(b.load(mask if spec.kind == "dropout" else x), b.load(dy), strict=True)
            b.put([number(floats, *pair) for pair in pairs], dx, spec.add)

        for_blocks(floats, row, VECTORS, block)

    return on_pixels(generate)


def _computed(spec: MapSpec, row: int) -> Callable[[tuple[int, ...], int], None]:
    """The same for functions that a C library computes, number by number."""
    f = _function(spec)

    @inlined
    def run(words: tuple[int, ...], _: int) -> None:
        source, target = view(words[0], (row,), np.float32), view(words[1], (row,), np.float32)
        for i in range(row):
            target[i] = f(source[i])

    found: Callable[[tuple[int, ...], int], None] = run
    return found


def _computed_backward(spec: MapSpec, row: int) -> Callable[[tuple[int, ...], int], None]:
    slope, add = _slope(spec), spec.add

    @inlined
    def run(words: tuple[int, ...], _: int) -> None:
        source, dy = view(words[0], (row,), np.float32), view(words[1], (row,), np.float32)
        dx = view(words[3], (row,), np.float32)
        for i in range(row):
            value = dy[i] * slope(source[i])
            dx[i] = dx[i] + value if add else value

    found: Callable[[tuple[int, ...], int], None] = run
    return found


def _function(spec: MapSpec) -> Callable[[float], float]:
    half, one = np.float32(0.5), np.float32(1)
    root, cube, scale = np.float32(math.sqrt(0.5)), np.float32(0.044715), np.float32(math.sqrt(2 / math.pi))
    functions = {
        "silu": lambda v: v / (one + np.exp(-v)),
        "gelu": lambda v: half * v * (one + np.float32(math.erf(v * root))),
        "gelu_tanh": lambda v: half * v * (one + np.tanh(scale * (v + cube * v * v * v))),
    }
    return inlined(functions[spec.kind])


def _slope(spec: MapSpec) -> Callable[[float], float]:
    half, one = np.float32(0.5), np.float32(1)
    root, cube, scale = np.float32(math.sqrt(0.5)), np.float32(0.044715), np.float32(math.sqrt(2 / math.pi))
    density, three = np.float32(1 / math.sqrt(2 * math.pi)), np.float32(3)

    def silu(v: float) -> Any:
        gate = one / (one + np.exp(-v))
        return gate * (one + v * (one - gate))

    def gelu(v: float) -> Any:
        return half * (one + np.float32(math.erf(v * root))) + v * density * np.exp(-half * v * v)

    def gelu_tanh(v: float) -> Any:
        t = np.tanh(scale * (v + cube * v * v * v))
        return half * (one + t) + half * v * (one - t * t) * scale * (one + three * cube * v * v)

    functions = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}
    return inlined(functions[spec.kind])


def add(spec: AddSpec) -> Callable[..., None]:
    """``y = act(a + b)``; arguments: state, a, b, y."""
    a, b, y, images = spec.a, spec.b, spec.y, spec.images
    H, row = y.H, y.W * y.C

    def generate(builder: Any, words: list[Any], pixels: Any) -> None:
        floats = Floats(builder, spec.lanes)
        left, right, target = (floats.pointer(word) for word in words)

        def block(part: Block) -> None:
            pairs = zip(part.load(left), part.load(right), strict=True)
            part.store([activated(floats, builder.fadd(*pair), spec.slope) for pair in pairs], target)

        for_blocks(floats, row, VECTORS, block)

    run = on_pixels(generate)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for h in range(H):
                left = arguments[1] + FLOAT * (image * a_size + a_origin + h * a_pitch)
                right = arguments[2] + FLOAT * (image * b_size + b_origin + h * b_pitch)
                run((left, right, arguments[3] + FLOAT * (image * y_size + y_origin + h * y_pitch)), 1)

    a_size, a_origin, a_pitch = a.size, a.origin, a.pitch
    b_size, b_origin, b_pitch = b.size, b.origin, b.pitch
    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch
    return kernel


def add_backward(spec: AddSpec) -> Callable[..., None]:
    """``da (+)= dy act'(y)`` and the same for db; arguments: state, y, dy, da, db."""
    y, images = spec.y, spec.images
    H, row = y.H, y.W * y.C

    def generate(builder: Any, words: list[Any], pixels: Any) -> None:
        floats = Floats(builder, spec.lanes)
        output, dy, da, db = (floats.pointer(word) for word in words)

        def block(part: Block) -> None:
            pairs = zip(part.load(dy), part.load(output), strict=True)
            slopes = [let_through(floats, *pair, spec.slope) for pair in pairs]
            part.put(slopes, da, spec.adds_a)
            part.put(slopes, db, spec.adds_b)

        for_blocks(floats, row, VECTORS, block)

    run = on_pixels(generate)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            for h in range(H):
                output = arguments[1] + FLOAT * (image * y_size + y_origin + h * y_pitch)
                place = FLOAT * (image * H + h) * row
                run((output, arguments[2] + place, arguments[3] + place, arguments[4] + place), 1)

    y_size, y_origin, y_pitch = y.size, y.origin, y.pitch
    return kernel


def flatten(spec: MapSpec) -> Callable[..., None]:
    """(H, W, C) to features in PyTorch's order (C, H, W); arguments: state, x, y, scratch.

    y may be bf16, and then x too, without a border and of even sizes.
    """
    x, images, rounds = spec.x, spec.images, spec.half and not spec.x.half
    C, H, W = x.C, x.H, x.W
    rows, at_once = (1, H * W) if x.columns == W else (H, W)
    number, kind = x.number, source_of(x.half)
    turn = transpose(Transpose(at_once, C, C, H * W, spec.lanes, kind, kind))
    features = C * H * W
    # A channel of an image that ends in the middle of a cache line is written in parts of lines.
    coming, partial = claim(min(number * features, AHEAD)), not rounds and H * W * number % LINE > 0
    narrow = to_bf16(features, spec.lanes, spec.native)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        last = min((chunk + 1) * images, count)
        for image in range(chunk * images, last):
            target = arguments[3] + FLOAT * thread * features if rounds else arguments[2] + number * image * features
            if partial and image + 1 < last:
                coming(target + number * features)
            for h in range(rows):
                turn(arguments[1] + number * (image * size + origin + h * pitch), target + number * h * W)
            if rounds:
                narrow(target, arguments[2] + BF16 * image * features)

    size, origin, pitch = x.size, x.origin, x.pitch
    return kernel


def flatten_backward(spec: MapSpec) -> Callable[..., None]:
    """Features to (H, W, C); arguments: state, dy, dx."""
    x, images, adds = spec.x, spec.images, spec.add
    C, H, W = x.C, x.H, x.W
    number, kind = number_bytes(spec.half_slope), source_of(spec.half_slope)
    turn = transpose(Transpose(C, H * W, H * W, C, spec.lanes, kind, kind))

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            offset = number * image * C * H * W
            if adds:
                dy = view(arguments[1] + offset, (C, H * W), np.float32)
                dx = view(arguments[2] + offset, (H * W, C), np.float32)
                for pixel in range(H * W):
                    for c in range(C):
                        dx[pixel, c] += dy[c, pixel]
            else:
                turn(arguments[1] + offset, arguments[2] + offset)

    return kernel


def global_average(spec: MapSpec) -> Callable[..., None]:
    """``y[c] = mean over H, W``; arguments: state, x, y."""
    x, images = spec.x, spec.images
    C = x.C

    def generate(builder: Any, words: list[Any], pixels: Any) -> None:
        floats = Floats(builder, spec.lanes)
        source, target = floats.pointer(words[0]), floats.pointer(words[1])
        part = floats.constant(1 / (x.H * x.W))

        def block(b: Block) -> None:
            def line(h: Any, held: list[Any]) -> list[Any]:
                def pixel(w: Any, totals: list[Any]) -> list[Any]:
                    place = builder.add(builder.mul(h, I64(x.pitch)), builder.mul(w, I64(C)))
                    values = b.load(floats.at(source, place))
                    return [builder.fadd(total, value) for total, value in zip(totals, values, strict=True)]

                return carried_loop(builder, I64(x.W), held, pixel)

            totals = carried_loop(builder, I64(x.H), [floats.zero] * len(b.used), line)
            b.store([builder.fmul(total, part) for total in totals], target)

        for_blocks(floats, C, VECTORS, block)

    run = on_pixels(generate)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            run((arguments[1] + FLOAT * (image * size + origin), arguments[2] + FLOAT * image * C), 1)

    size, origin = x.size, x.origin
    return kernel


def global_average_backward(spec: MapSpec) -> Callable[..., None]:
    """Every pixel gets ``dy / (H W)``; arguments: state, dy, dx."""
    C, pixels, images = spec.x.C, spec.x.H * spec.x.W, spec.images

    def generate(builder: Any, words: list[Any], count: Any) -> None:
        floats = Floats(builder, spec.lanes)
        dy, dx = floats.pointer(words[0]), floats.pointer(words[1])

        def block(b: Block) -> None:
            slopes = [builder.fmul(slope, floats.constant(1 / pixels)) for slope in b.load(dy)]

            def pixel(i: Any, nothing: list[Any]) -> list[Any]:
                b.put(slopes, floats.at(dx, builder.mul(i, I64(C))), spec.add)
                return []

            carried_loop(builder, count, [], pixel)

        for_blocks(floats, C, VECTORS, block)

    run = on_pixels(generate)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        for image in range(chunk * images, min((chunk + 1) * images, count)):
            run((arguments[1] + FLOAT * image * C, arguments[2] + FLOAT * image * C * pixels), pixels)

    return kernel
