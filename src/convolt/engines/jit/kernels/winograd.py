"""Convolution with stride 1 by Winograd's algorithm: for 3x3 taps, 16 products of small matrices instead of nine.

    forward    v = B^T x B,   m = v u,   y = A^T m A               for each plane, u = G w G^T
    dx         the same on the framed dy, with filters turned around and transposed
    dw         du = v^T d over the tiles,  d = A dy A^T,  at the end  dw = G^T du G

The transforms are ``engines.jit.winograd``, longer filters are cut into pieces (``filtering``). A block of tiles (some
64 of 16 planes) passes through all of them while it lies in the L2 cache. Parts of du are added up in chunk order
before they are transformed back. With a dilation the pixels that one tap meets are an image of their own, of every
dilation-th row and column. Error: a few times that of the sum over taps, since all factors are 1 or halves and sums
short.

Cost: 2 products K C P Q / 4 FLOPs for each image and each of the three, for 3x3 taps (16 products) 4/9 of what they
take, for 5x5 (49) and 7x7 (100) half; bytes: as many numbers of C and K for 4 pixels as a tile has planes (16, 49 and
49), written and read within the cache.

With bf16 dot products v, u and d are rounded, once, after they are transformed in float32; m, du and all else stay in
float32. A product's operands are sums of four terms or two: along each axis the variance of the error is 5/3 of that of
the rounded taps in a piece of three taps, and 2 of it in a piece of two. Pairs lie along the sum: of channels in v and
u, of tiles in v and d for dw.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from convolt.engines.jit.gemm import Gemm
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.kernels.conv import spread_slopes
from convolt.engines.jit.kernels.dense import deep_segments
from convolt.engines.jit.kernels.pooling import pool_behind
from convolt.engines.jit.kernels.residues import slope_frame
from convolt.engines.jit.kernels.specs import DEAD, FLOAT, VECTORS, Frame
from convolt.engines.jit.kernels.weights import bias_sum
from convolt.engines.jit.kernels.winograd_specs import (
    TWIN,
    Planes,
    Tiling,
    WinogradPack,
    WinogradReduce,
    WinogradSpec,
    lone_planes,
    planes_along,
    products_along,
    twins,
)
from convolt.engines.jit.memory import hidden, view
from convolt.engines.jit.winograd import (
    Finish,
    TileRow,
    filter_taps,
    filter_tiles,
    input_tiles,
    output_tiles,
    slope_tiles,
)

# --- forward ---------------------------------------------------------------------------------------------------------


def forward(spec: WinogradSpec) -> Callable[..., None]:
    """``y = pool(act(w * x + b))``; arguments: state, x, packed filters, bias, y, codes, scratch.

    A chunk is a run of images.
    """
    conv, tiles, scratch, chunk_images = spec.conv, spec.forward, spec.scratch, spec.conv.images
    together, bands = tiles.images, tiles.high // tiles.rows
    transformed = spec.planes(tiles)
    inputs, products = _inputs(spec, tiles, transformed), _products(spec, tiles)
    before_pool, x_size, products_at = WinogradSpec(conv.before_pool), conv.x.size, transformed.size
    outputs, pool, windows = _outputs(before_pool, tiles), pool_behind(conv), conv.windows is not None
    residues, place_x, place_y = spec.residues, _residue(spec, conv.x), _residue(spec, before_pool.conv.y)
    unpooled_at, unpooled_size = scratch - together * conv.unpooled_size, conv.unpooled.size

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        v = arguments[6] + FLOAT * thread * scratch
        m = v + FLOAT * products_at
        unpooled = v + FLOAT * unpooled_at
        last = min((chunk + 1) * chunk_images, count)
        for first in range(chunk * chunk_images, last, together):
            present = min(together, last - first)
            for residue in range(residues):
                x = arguments[1] + FLOAT * (first * x_size + place_x(residue))
                y = (unpooled if windows else arguments[4]) + FLOAT * place_y(residue)
                for band in range(bands):
                    inputs(x, present, band, v)
                    products(v, arguments[2], m)
                    outputs(m, arguments[3], y, arguments[5], 0 if windows else first, present, band)
            if windows:
                for image in range(present):
                    pool(unpooled + FLOAT * image * unpooled_size, arguments[4], arguments[5], first + image)

    return kernel


def _residue(spec: WinogradSpec, frame: Frame) -> Callable[[int], int]:
    """``place(residue)``: elements from the first pixel to the first one of these pixels by the dilation."""
    wide, pitch, C = spec.conv.window.dilation_w, frame.pitch, frame.C

    @inlined
    def place(residue: int) -> int:
        return residue // wide * pitch + residue % wide * C

    found: Callable[[int], int] = place
    return found


def _row(spec: WinogradSpec, tiles: Tiling, frame: Frame, planes: Planes) -> TileRow:
    """A row of a block's tiles, in this frame and in these planes."""
    lanes, window, C = spec.conv.lanes, spec.conv.window, frame.C
    pixel, pitch = window.dilation_w * C, window.dilation_h * frame.pitch
    further = planes.entries > tiles.wide
    return TileRow(window.R, window.S, tiles.width, 2, C, pixel, pitch, planes.plane, lanes, planes.written, further)


def _inputs(
    spec: WinogradSpec, tiles: Tiling, planes: Planes, bundle: int | None = None
) -> Callable[[int, int, int, int], None]:
    """The transformed inputs of a block: ``inputs(first image, images present, band, v)``."""
    window, x = spec.conv.window, spec.conv.x
    corner = x.origin - window.top * x.pitch - window.left * x.C
    tile_row = replace(_row(spec, tiles, x, planes), bundle=bundle)
    return _each_row(tiles, input_tiles, tile_row, (x.size, corner), planes)


def _slopes(spec: WinogradSpec, bundle: int) -> Callable[[int, int, int, int], None]:
    """The transformed dy of a block: ``slopes(first frame, images present, band, d)``."""
    tiles, frame, planes = spec.gradient, slope_frame(spec.conv), spec.slopes(bundle)
    tile_row = replace(_row(spec, tiles, frame, planes), bundle=bundle)
    return _each_row(tiles, slope_tiles, tile_row, (frame.size, frame.origin), planes)


def _each_row(
    tiles: Tiling,
    transform: Callable[[TileRow], Any],
    tile_row: TileRow,
    image_and_origin: tuple[int, int],
    target: Planes,
) -> Callable[[int, int, int, int], None]:
    """Every row of tiles of a band transformed: ``rows(images, images present, band, planes)``.

    image_and_origin: elements from an image to the next, and to its first pixel.
    """
    odd, last, rows, step = tiles.height % 2, tiles.high - 1, tiles.rows, target.step
    row, last_row, row_further = (transform(replace(tile_row, high=high)) for high in (2, 1, -odd))  # as TileRow has it
    size, origin = image_and_origin
    all_rows, pitch = target.rows, tile_row.pitch

    @inlined
    def each(images: int, present: int, band: int, planes: int) -> None:
        for image in range(present):
            for i in range(all_rows):
                h = band * rows + i
                pixels = images + FLOAT * (image * size + origin + 2 * h * pitch)
                place = planes + FLOAT * (image * all_rows + i) * step
                if all_rows > rows and h > last:
                    row_further(pixels, place)
                elif odd and h == last:
                    last_row(pixels, place)
                else:
                    row(pixels, place)

    found: Callable[[int, int, int, int], None] = each
    return found


def _products(spec: WinogradSpec, tiles: Tiling) -> Callable[[int, int, int], None]:
    """``m = v u`` in each plane, those of twins added up: ``products(v, packed filters, m)``.

    The other twin's filters are ``TWIN`` planes behind, its pixels a row of tiles or a tile. Of rows, twins are two
    segments of one product; of columns another product on top.
    """
    conv, window, block = spec.conv, spec.conv.window, spec.block
    panels, depth, K = spec.panels, spec.depth, spec.conv.K
    source, target, across = spec.planes(tiles), spec.products(tiles), products_along(window.S)
    panel, other_row = depth * block, TWIN * across * panels * depth * block
    words, step = conv.x.C, conv.together * source.step
    shape = Gemm(0, min(block, K), depth, words, conv.together, step, block, other_row, K, conv.lanes, pairs=conv.pairs)
    length, images, rows = (tiles.wide, tiles.images, tiles.rows) if spec.rows_apart else (tiles.tiles, 1, 1)
    rest = K % block

    def multiply(shape: Gemm) -> tuple[Callable[[int, int, int, int], None], ...]:
        full = deep_segments(shape, length, depth, conv.registers)
        if not rest or block > K:
            return full, full
        return full, deep_segments(replace(shape, columns=rest), length, depth, conv.registers)

    full, tail = multiply(shape)
    other_full, other_tail = multiply(replace(shape, start="load")) if twins(window.S) else (full, tail)
    v_plane, m_plane, v_image, v_row, m_row = source.plane, target.plane, source.image, source.step, target.step
    planes, columns, whole = spec.tile_planes, planes_along(window.S), panels - (1 if rest else 0)
    lone_rows, lone, tile, other = lone_planes(window.R), lone_planes(window.S), source.words, TWIN * panels * panel

    @inlined
    def products(v: int, filters: int, m: int) -> None:
        for plane in range(hidden(planes)):
            i, j = plane // columns, plane % columns
            segments, twin = 1 if i < lone_rows else 2, j >= lone
            for p in range(panels):
                b = filters + FLOAT * ((i * across + j) * panels + p) * panel
                for image in range(images):
                    for row in range(rows):
                        a = v + FLOAT * (plane * v_plane + image * v_image + row * v_row)
                        c = m + FLOAT * (plane * m_plane + (image * rows + row) * m_row + p * block)
                        if p < whole:
                            full(a, b, c, segments)
                            if twin:
                                other_full(a + FLOAT * tile, b + FLOAT * other, c, segments)
                        else:
                            tail(a, b, c, segments)
                            if twin:
                                other_tail(a + FLOAT * tile, b + FLOAT * other, c, segments)

    found: Callable[[int, int, int], None] = products
    return found


def _outputs(spec: WinogradSpec, tiles: Tiling) -> Callable[..., None]:
    """Outputs of a block: ``outputs(m, bias, y, codes, first image, images present, band)``."""
    conv, y, K = spec.conv, spec.conv.y, spec.conv.K
    pooled = conv.pool != (1, 1)
    tile_row = _row(spec, tiles, y, spec.products(tiles))
    finish = Finish(conv.bias, conv.slope, pooled, DEAD, conv.add)
    row, last_row = output_tiles(tile_row, finish), output_tiles(replace(tile_row, high=1), finish)
    odd, last = tiles.height % 2, tiles.high - 1
    rows, step, height, image_codes = tiles.rows, tiles.wide * K, 1 if pooled else 2, tiles.high * tiles.wide * K
    size, origin, pitch = y.size, y.origin, tile_row.pitch

    @inlined
    def outputs(m: int, bias: int, y: int, codes: int, first: int, present: int, band: int) -> None:
        for image in range(present):
            for i in range(rows):
                h = band * rows + i
                target = y + FLOAT * ((first + image) * size + origin + height * h * pitch)
                code = codes + (first + image) * image_codes + h * step
                if odd and h == last:
                    last_row(m + FLOAT * (image * rows + i) * step, bias, target, code)
                else:
                    row(m + FLOAT * (image * rows + i) * step, bias, target, code)

    found: Callable[..., None] = outputs
    return found


# --- backward --------------------------------------------------------------------------------------------------------


def backward(spec: WinogradSpec) -> Callable[..., None]:
    """dx, and this chunk's part of du and db.

    Arguments: state, x, turned filters, dy, y, codes, dx, du parts (chunks, planes, C, K), db parts, scratch.
    """
    conv, tiles, scratch = spec.conv, spec.gradient, spec.back_scratch
    together, bands, chunk_images = tiles.images, tiles.high // tiles.rows, conv.images
    weights, other_weights = _weights(spec, 0), _weights(spec, 1) if spec.bundles == 2 else _no_weights
    spread = spread_slopes(conv)
    input_gradient = _input_gradient(spec) if conv.wants_dx else _no_gradient
    x_size, part, frame, frames = conv.x.size, spec.part, slope_frame(conv), spec.frames
    residues, place_x, place_dy = spec.residues, _residue(spec, conv.x), _residue(spec, frame)
    K, bias, stores, frame_size = conv.K, conv.bias, spec.stores_part, frame.size

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        du, db = arguments[7] + FLOAT * chunk * part, arguments[8] + FLOAT * chunk * K
        if not stores:
            view(du, (part,), np.float32)[:] = np.float32(0)
        if bias:
            view(db, (K,), np.float32)[:] = np.float32(0)
        dy = arguments[9] + FLOAT * thread * scratch
        view(dy, (frames,), np.float32)[:] = np.float32(0)
        own = dy + FLOAT * frames
        last = min((chunk + 1) * chunk_images, count)
        for first in range(chunk * chunk_images, last, together):
            present = min(together, last - first)
            for image in range(present):
                spread(arguments, first + image, dy + FLOAT * image * frame_size, db)
            for residue in range(residues):
                x, slopes = arguments[1] + FLOAT * (first * x_size + place_x(residue)), dy + FLOAT * place_dy(residue)
                for band in range(bands):
                    weights(x, slopes, present, band, own, du)
                    other_weights(x, slopes, present, band, own, du)
            input_gradient(dy, arguments[2], arguments[6], first, present, own)

    return kernel


def _input_gradient(spec: WinogradSpec) -> Callable[[int, int, int, int, int, int], None]:
    """The dx of a block's images: ``gradient(frames, turned filters, dx, first image, images present, v)``."""
    back, tiles = spec.back, spec.inputs
    transformed = back.planes(tiles)
    inputs, products, outputs = _inputs(back, tiles, transformed), _products(back, tiles), _outputs(back, tiles)
    bands, products_at = tiles.high // tiles.rows, transformed.size
    residues, place_dy, place_dx = spec.residues, _residue(back, back.conv.x), _residue(back, back.conv.y)

    @inlined
    def gradient(dy: int, filters: int, dx: int, first: int, present: int, v: int) -> None:
        m = v + FLOAT * products_at
        for residue in range(residues):
            source, target = dy + FLOAT * place_dy(residue), dx + FLOAT * place_dx(residue)
            for band in range(bands):
                inputs(source, present, band, v)
                products(v, filters, m)
                outputs(m, 0, target, 0, first, present, band)

    found: Callable[[int, int, int, int, int, int], None] = gradient
    return found


@inlined
def _no_gradient(dy: int, filters: int, dx: int, first: int, present: int, v: int) -> None:
    """Of images that nobody needs a gradient of."""


def _weights(spec: WinogradSpec, bundle: int) -> Callable[[int, int, int, int, int, int], None]:
    """``du += v^T d`` in each plane of a bundle: ``weights(x, dy, images present, band, v, du)``.

    Where one product is all of du it is stored. x, dy: the first images; behind v is d.
    """
    product, v, d = _weight_products(spec, bundle), spec.summed(bundle), spec.slopes(bundle)
    inputs, slopes = _inputs(spec, spec.gradient, v, bundle), _slopes(spec, bundle)
    together, slopes_at, size = spec.gradient.images, v.size, v.size + d.size
    part = spec.part_before(bundle)

    @inlined
    def weights(x: int, dy: int, present: int, band: int, v: int, du: int) -> None:
        if present < together:  # tiles of images that are not there take part in the products
            view(v, (size,), np.float32)[:] = np.float32(0)
        d = v + FLOAT * slopes_at
        inputs(x, present, band, v)
        slopes(dy, present, band, d)
        product(v, d, du + FLOAT * part)

    found: Callable[[int, int, int, int, int, int], None] = weights
    return found


@inlined
def _no_weights(x: int, dy: int, present: int, band: int, v: int, du: int) -> None:
    """Of a filter whose pieces are one bundle."""


def _weight_products(spec: WinogradSpec, bundle: int) -> Callable[[int, int, int], None]:
    """``du (+)= v^T d`` in each plane of a bundle: ``products(v, d, du)``."""
    conv, block, window = spec.conv, VECTORS * spec.conv.lanes, spec.conv.window
    C, K, inputs, slopes = conv.x.C, conv.K, spec.summed(bundle), spec.slopes(bundle)
    apart = inputs.entries * inputs.rows > slopes.entries * slopes.rows
    depth, images, segments = (slopes.entries, slopes.images, slopes.rows) if apart else (slopes.count, 1, 1)
    whole, rest = divmod(K, block)
    word, tile = conv.together, conv.together * C
    start: Literal["zero", "load"] = "zero" if spec.stores_part else "load"
    columns, steps = block if whole else rest, (inputs.step, slopes.step)
    shape = Gemm(0, columns, depth, word, tile, steps[0], K, steps[1], K, conv.lanes, start, pairs=conv.pairs)
    full = deep_segments(shape, C, depth, conv.registers)
    tail = deep_segments(replace(shape, columns=rest), C, depth, conv.registers) if rest and whole else full
    rows, across = products_along(window.R, bundle), products_along(window.S)
    tile_rows, tile_columns = planes_along(window.R, bundle), planes_along(window.S)
    planes, v_plane, d_plane, pairs = rows * across, inputs.plane, slopes.plane, conv.pairs
    v_image, d_image, v_row, v_tile = inputs.image, slopes.image, inputs.step, inputs.words

    @inlined
    def products(v: int, d: int, du: int) -> None:
        for plane in range(hidden(planes)):
            i, j = plane // across, plane % across
            below, right = (1 if i >= tile_rows else 0), (1 if j >= tile_columns else 0)
            own = (i - below * TWIN) * tile_columns + j - right * TWIN
            b, c = d + FLOAT * own * d_plane, du + FLOAT * plane * C * K
            a = v + FLOAT * (plane * v_plane if pairs else own * v_plane + below * v_row + right * v_tile)
            for _ in range(images):
                for p in range(whole):
                    full(a, b + FLOAT * p * block, c + FLOAT * p * block, segments)
                if rest:
                    tail(a, b + FLOAT * whole * block, c + FLOAT * whole * block, segments)
                a += FLOAT * v_image
                b += FLOAT * d_image

    found: Callable[[int, int, int], None] = products
    return found


# --- weights ---------------------------------------------------------------------------------------------------------


def pack(spec: WinogradPack) -> Callable[..., None]:
    """Transformed filters u = G w G^T of (K, C, R, S), packed (planes, panels, depth, block); arguments: state, w, u.

    Forward: depth = C, columns = K. Turned: depth = K, columns = C, taps in reverse. Of any size: the other arguments
    are depth, columns, and how many words of depth a chunk is. In pairs: (planes, panels, depth / 2, block, 2) of bf16.
    """
    back, block, together = spec.turned, spec.block, 2 if spec.pairs else 1
    lanes, taps = block // VECTORS, spec.R * spec.S
    transform = filter_tiles(spec.R, spec.S, lanes, back, spec.pairs)

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        depth, columns, run = arguments[3], arguments[4], arguments[5]
        words, panels = depth // together, (columns + block - 1) // block
        column_step, depth_step = (taps, taps * columns) if back else (taps * depth, taps)
        for first in range(0, columns, lanes):
            last, panel = min(lanes, columns - first) - 1, first // block
            for word in range(chunk * run, min((chunk + 1) * run, words)):
                w = arguments[1] + FLOAT * (first * column_step + together * word * depth_step)
                u = arguments[2] + FLOAT * ((panel * words + word) * block + first - panel * block)
                transform(w, w + FLOAT * depth_step, column_step, last, u, panels * words * block)

    return kernel


def reduce_parts(spec: WinogradReduce) -> Callable[..., None]:
    """``dw (+)= G^T (sum of parts) G``, of any size. A chunk is some channels; the first one adds up db.

    Arguments: state, parts (chunks, planes, C, K), dw (K, C, R, S), db parts, db, scratch, K, C, images of a part,
    channels of a chunk. A plane of each part is read in one run: pieces of all would defeat the hardware's fetching.
    """
    add_bias, lanes, planes, taps = bias_sum(spec), spec.lanes, spec.planes, spec.R * spec.S
    transform, transform_one = (filter_taps(spec.R, spec.S, width, spec.accumulate) for width in (lanes, 1))

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        K, C, images, run = arguments[6], arguments[7], arguments[8], arguments[9]
        count = view(arguments[0], (1,), np.int64)[0]
        parts, step = (count + images - 1) // images, taps * C
        first = chunk * run
        size, whole = (min(first + run, C) - first) * K, K - K % lanes
        sums = arguments[5] + FLOAT * thread * (planes * run * K + lanes)
        for plane in range(planes):
            total = view(sums + FLOAT * plane * size, (size,), np.float32)
            for i in range(size):
                total[i] = np.float32(0)
            for part in range(parts):  # of an empty batch there is none
                place = arguments[1] + FLOAT * (((part * planes + plane) * C + first) * K)
                other = view(place, (size,), np.float32)
                for i in range(size):
                    total[i] += other[i]
        for c in range(size // K):
            du, dw = sums + FLOAT * c * K, arguments[2] + FLOAT * taps * (first + c)
            for k in range(0, whole, lanes):
                transform(du + FLOAT * k, size, dw + FLOAT * k * step, step)
            for k in range(whole, K):
                transform_one(du + FLOAT * k, size, dw + FLOAT * k * step, step)
        if chunk == 0:
            add_bias(arguments[3], arguments[4], parts, K, 0, K)

    return kernel
