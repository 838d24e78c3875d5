"""Convolution by 3x3 filters with fewer multiplications, for predictions: Winograd's F(2x2, 3x3).

With d a tile of 4 x 4 pixels and g a filter, the 2 x 2 outputs of the tile are

    A^T [(G g G^T) * (B^T d B)] A       B^T = 1  0 -1  0     G = 1   0   0     A^T = 1  1  1  0
                                              0  1  1  0        1/2  1/2 1/2         0  1 -1 -1
                                              0 -1  1  0        1/2 -1/2 1/2
                                              0  1  0 -1         0   0   1

The product in the middle is element by element, so its sum over channels is 16 matrix products (tiles, C) (C, K): 16
multiplications where nine taps of four outputs are 36. Filters are transformed when weights have changed, in float32 as
everything here. A group of tiles is transformed into the L2 cache, multiplied, and brought back with bias, activation
and the 2x2 max-pool, which is what one tile gives. Additions come before the products, so the rounding is another one
than that of ``conv``, and a number that is not finite reaches all four outputs of its tile.

Cost: 2 K C P Q 4 FLOPs for an image instead of 9. Reference: Lavin and Gray 2016, "Fast algorithms for convolutional
neural networks".
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from convolt.engines.jit.gemm import Gemm, gemm
from convolt.engines.jit.kernels.specs import FLOAT, VECTORS, WINOGRAD, WinogradSpec
from convolt.engines.jit.memory import view
from convolt.engines.jit.pixels import Block, activated, for_blocks, on_pixels
from convolt.engines.jit.vectors import Floats


def pack(spec: WinogradSpec) -> Callable[..., None]:
    """``G g G^T`` of filters (K, C, 3, 3) to (panels, 16, C, columns); arguments: state, w, packed.

    A chunk is one vector's width of filters; columns behind the last filter stay zero.
    """
    K, C, columns, lanes = spec.conv.K, spec.conv.x.C, spec.columns, spec.conv.lanes
    half = np.float32(0.5)

    @njit
    def row(a: Any, b: Any, c: Any) -> Any:
        both = half * (a + c)
        return a, both + half * b, both - half * b, c

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        w = view(arguments[1], (K, C, 9), np.float32)
        for k in range(chunk * lanes, min((chunk + 1) * lanes, K)):
            panel = arguments[2] + FLOAT * (k // columns) * WINOGRAD * C * columns
            packed = view(panel, (4, 4, C, columns), np.float32)
            for c in range(C):
                left = row(w[k, c, 0], w[k, c, 3], w[k, c, 6])
                middle = row(w[k, c, 1], w[k, c, 4], w[k, c, 7])
                right = row(w[k, c, 2], w[k, c, 5], w[k, c, 8])
                for i in range(4):
                    taps = row(left[i], middle[i], right[i])
                    for j in range(4):
                        packed[i, j, c, k % columns] = taps[j]

    return kernel


def forward(spec: WinogradSpec) -> Callable[..., None]:
    """``y = pool(act(w * x + b))``; arguments: state, x, packed filters, bias, y, scratch. Chunks as in ``conv``."""
    conv, columns, group = spec.conv, spec.columns, spec.group
    whole, rest = divmod(conv.K, VECTORS * conv.lanes)
    panels = whole + (1 if rest else 0)
    height, width = -(-spec.tile_rows // conv.bands), -(-panels // conv.stripes)
    images, bands, stripes = conv.images, conv.bands, conv.stripes
    tiles_of_row, tiles_of_image = spec.tile_columns, spec.tile_rows * spec.tile_columns
    bring, multiply, multiply_rest = _input(spec), _products(spec, columns), _products(spec, rest or columns)
    give, give_rest = _output(spec, min(columns, conv.K)), _output(spec, rest or min(columns, conv.K))
    x, y, window = conv.x, conv.y, conv.window
    corner, x_size = x.origin - window.top * x.pitch - window.left * x.C, x.size
    x_down, x_right = 2 * x.pitch, 2 * x.C
    y_size, y_origin = y.size, y.origin
    reach = 1 if conv.pool != (1, 1) else 2  # pixels that a tile gives in each direction
    y_down, y_right = reach * y.pitch, reach * conv.K
    scratch, sums, panel_size = spec.scratch, WINOGRAD * group * x.C, WINOGRAD * x.C * columns

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        image = chunk // (bands * stripes) * images
        stripe, band = chunk % stripes, chunk // stripes % bands
        first = band * height * tiles_of_row
        last = min(images, count - image) * tiles_of_image
        if bands > 1:  # of one image
            last = min(first + height * tiles_of_row, last)
        v = arguments[5] + FLOAT * thread * scratch
        m = v + FLOAT * sums
        for start in range(first, last, group):
            tiles = min(group, last - start)
            for t in range(tiles):
                tile = start + t
                place = tile % tiles_of_image
                i, j = place // tiles_of_row, place % tiles_of_row
                offset = (image + tile // tiles_of_image) * x_size + corner + i * x_down + j * x_right
                bring((arguments[1] + FLOAT * offset, v + FLOAT * t * channels), 1)
            for panel in range(stripe * width, min((stripe + 1) * width, panels)):
                u = arguments[2] + FLOAT * panel * panel_size
                if panel < whole:
                    multiply(v, u, m, tiles)
                else:
                    multiply_rest(v, u, m, tiles)
                channel = panel * columns
                for t in range(tiles):
                    tile = start + t
                    place = tile % tiles_of_image
                    i, j = place // tiles_of_row, place % tiles_of_row
                    offset = (image + tile // tiles_of_image) * y_size + y_origin + i * y_down + j * y_right + channel
                    words = (m + FLOAT * t * columns, arguments[3] + FLOAT * channel, arguments[4] + FLOAT * offset)
                    if panel < whole:
                        give(words, 1)
                    else:
                        give_rest(words, 1)

    channels = x.C
    return kernel


def _products(spec: WinogradSpec, columns: int) -> Callable[[int, int, int, int], None]:
    """The 16 products of some tiles: ``multiply(v, u, m, tiles)``."""
    C, panel = spec.conv.x.C, spec.columns
    block = gemm(Gemm(spec.rows, columns, C, C, 1, 0, panel, 0, panel, spec.conv.lanes))
    rows, v_step, u_step, m_step = spec.rows, spec.group * C, C * panel, spec.group * panel

    @njit
    def multiply(v: int, u: int, m: int, tiles: int) -> None:
        for place in range(WINOGRAD):
            for t in range(0, tiles, rows):
                a, c = v + FLOAT * (place * v_step + t * C), m + FLOAT * (place * m_step + t * panel)
                block(a, u + FLOAT * place * u_step, c, 0, 1)

    found: Callable[[int, int, int, int], None] = multiply
    return found


def _input(spec: WinogradSpec) -> Any:
    """``B^T d B`` of one tile: ``bring((x, v), 1)``; v (16, group, C)."""
    x, step = spec.conv.x, spec.group * spec.conv.x.C

    def generate(builder: Any, words: list[Any], _: Any) -> None:
        floats = Floats(builder, spec.conv.lanes)
        source, target = floats.pointer(words[0]), floats.pointer(words[1])

        def line(d: list[Any]) -> list[Any]:
            add, sub = builder.fadd, builder.fsub
            return [sub(d[0], d[2]), add(d[1], d[2]), sub(d[2], d[1]), sub(d[1], d[3])]

        def block(b: Block) -> None:
            pixels = [[b.load(floats.at(source, i * x.pitch + j * x.C))[0] for j in range(4)] for i in range(4)]
            rows = list(zip(*(line([pixels[i][j] for i in range(4)]) for j in range(4)), strict=True))
            for i, row in enumerate(rows):
                for j, value in enumerate(line(list(row))):
                    b.store([value], floats.at(target, (4 * i + j) * step))

        for_blocks(floats, x.C, 1, block)

    return on_pixels(generate)


def _output(spec: WinogradSpec, channels: int) -> Any:
    """Bias, activation and pool of ``A^T m A``, one tile: ``give((m, bias, y), 1)``; m (16, group, columns)."""
    conv, step = spec.conv, spec.group * spec.columns

    def generate(builder: Any, words: list[Any], _: Any) -> None:
        floats = Floats(builder, conv.lanes)
        source, bias, target = (floats.pointer(word) for word in words)

        def line(m: list[Any]) -> list[Any]:
            add, sub = builder.fadd, builder.fsub
            return [add(add(m[0], m[1]), m[2]), sub(sub(m[1], m[2]), m[3])]

        def block(b: Block) -> None:
            sums = [[floats.load(floats.at(source, b.offset, (4 * i + j) * step)) for j in range(4)] for i in range(4)]
            rows = list(zip(*(line([sums[i][j] for i in range(4)]) for j in range(4)), strict=True))
            outputs = [line(list(row)) for row in rows]
            offset = b.load(bias)[0] if conv.bias else None
            if conv.pool != (1, 1):
                best, *others = outputs[0] + outputs[1]
                for value in others:
                    best = builder.select(builder.fcmp_ordered(">", value, best), value, best)
                outputs = [[best]]
            for i, row in enumerate(outputs):
                for j, value in enumerate(row):
                    whole = value if offset is None else builder.fadd(value, offset)
                    place = floats.at(target, i * conv.y.pitch + j * conv.K)
                    b.store([activated(floats, whole, conv.slope)], place)

        for_blocks(floats, channels, 1, block)

    return on_pixels(generate)
