"""Mistakes in the kernels of bf16, in what multiplies there, and in the choice of it."""

from jit_cases import OPTIMIZERS
from jit_mutant import JitMutant

TILED, SHIFTED, BACKWARD = "kernels/tiles.py", "kernels/tiles_shifted.py", "kernels/tiles_backward.py"
PLANE, DENSE, TILE_SPECS = "kernels/planes.py", "kernels/dense_tiles.py", "kernels/tile_specs.py"
BLOCKS, AMX, EPILOGUE, RUNS, UPDATE = "pair_products.py", "amx.py", "epilogue.py", "runs.py", "update.py"
ADAM, WEIGHTS = "adam.py", "kernels/weights.py"
WIDE, IN_PAIRS = "direct rows of two blocks, stride 2", "direct rows in pairs, stride 2"
ODD, SOME = "an odd width, channels that fill no tile", "some images at a time"
STRIDED, GROUPS = "few channels, wide filter, stride 2", "two groups of images, the last with fewer"
ON_PLANES, PLANE_ROWS = "wide filter on planes", "planes in groups of rows, odd pool"
ODD_PLANES = "dilation on planes, odd width"
PLAIN, KEEPS, DECAYS = (repr(OPTIMIZERS[number]) for number in (0, 5, 1))
ONE_PASS, OVERFLOW, FASTEST, FORCED = "one pass: ", "overflow", "the fastest unit", "the forced unit"
BLOCK_OF_C, CONVERSION = "a block from a bias", "conversion"

BF16 = (
    # bf16 tiles
    JitMutant(
        "filters not turned",
        "convolutions.py",
        "def conv_on_tiles",
        "tap_order(spec)",
        "tuple(range(taps))",
        "dilation",
    ),
    JitMutant(
        "columns not strided",
        TILED,
        "def gather_rows",
        " + q * stride_w) * channels",
        " + q) * channels",
        STRIDED,
    ),
    JitMutant(
        "code of a dead ReLU",
        TILED,
        "def finish_group",
        "DEAD, LANES, bias, relu",
        "DEAD, LANES, bias, False",
        "whole tiles",
        quick=True,
    ),
    JitMutant(
        "a part not added",
        "kernels/tiles_backward.py",
        "def reduce_parts",
        "range(1, parts)",
        "range(2, parts)",
        "an odd width, channels that fill no tile",
    ),
    # bf16: forward, and what both ways share
    JitMutant(
        "columns not cleared",
        TILED,
        "def conv_forward",
        "view(own, (together * image_bytes + gathered_bytes,), np.uint8)[:] = np.uint8(0)",
        "pass",
        "dilation",
    ),
    JitMutant(
        "direct pixels not strided",
        TILED,
        "def product(",
        "window.stride_w * spec.channels if",
        "spec.channels if",
        WIDE,
    ),
    JitMutant("rows of taps not dilated", TILED, "def product(", "window.dilation_h * conv.x", "conv.x", ODD),
    JitMutant(
        "second row of a block not strided", TILED, "def product(", "window.stride_h * conv.x", "conv.x", IN_PAIRS
    ),
    JitMutant(
        "output rows not strided", TILED, "def multiply_group", "(p + i) * stride_h * pitch", "(p + i) * pitch", WIDE
    ),
    JitMutant(
        "bias of the first filters",
        TILED,
        "def finish_group",
        "rows_of((values, arguments[3] + FLOAT * channel,",
        "rows_of((values, arguments[3],",
        STRIDED,
    ),
    JitMutant(
        "dx overwritten",
        TILED,
        "def finish_group",
        "bias, conv.slope, adds,",
        "bias, conv.slope, False,",
        "a residual branch",
    ),
    JitMutant(
        "images of a group in one place", TILED, "def gather_rows", "((place * rows + i) * Q + q)", "(i * Q + q)", SOME
    ),
    # bf16 backward, stride 1
    JitMutant("a pair of an odd frame left out", SHIFTED, "def conv_backward", " if even else 0", "", SOME),
    JitMutant(
        "images of the group before",
        SHIFTED,
        "def conv_backward",
        "if end - first < together:",
        "if end < first:",
        GROUPS,
    ),
    JitMutant("dw of the last group alone", SHIFTED, "def conv_backward", "first > chunk * images", "False", GROUPS),
    JitMutant(
        "slopes not cleared",
        SHIFTED,
        "def _cleared",
        "view(scratch, (slopes_bytes,), np.uint8)[:] = np.uint8(0)",
        "pass",
        SOME,
    ),
    JitMutant("odd taps of even pairs", SHIFTED, "def _tap_products", "pixel % 2 * copy_bytes + ", "", "whole tiles"),
    JitMutant(
        "rows of taps not dilated",
        SHIFTED,
        "def _tap_products",
        "tap // S * dilation_h * pitch",
        "tap // S * pitch",
        "dilation",
    ),
    JitMutant(
        "the last channels of the last filters",
        SHIFTED,
        "def _weight_gradient",
        "corner(slopes, x, place, adds, steps, one)",
        "pass",
        "100 channels of a pixel",
    ),
    JitMutant(
        "zeros before dy forgotten",
        TILE_SPECS,
        "    def lead(",
        "window.top * self.conv.x.columns + window.left",
        "window.left",
        "whole tiles",
    ),
    # bf16 backward, any stride
    JitMutant(
        "scratch not cleared",
        BACKWARD,
        "def conv_backward",
        "view(own, (scratch,), np.uint8)[:] = np.uint8(0)",
        "pass",
        STRIDED,
    ),
    JitMutant(
        "columns of rows to come",
        BACKWARD,
        "def _weight_gradient",
        "if (i + 1) * DEPTH > count:",
        "if count < 0:",
        "groups of rows, stride 2",
    ),
    JitMutant("dx not spread", TILED, "def finish_group", "spec.step[1] * K, BLOCK", "K, BLOCK", STRIDED),
    JitMutant(
        "taps of a pool transposed",
        BACKWARD,
        "def slope_rows",
        "(i * pitch + j) * wide",
        "(i + j * pitch) * wide",
        "whole tiles",
    ),
    JitMutant("db of the first part", "kernels/weights.py", "def bias_sum", "range(parts)", "range(1)", ODD),
    JitMutant("taps of whole tiles", BACKWARD, "def reduce_parts", "tap * channels + begin", "tap * C + begin", ODD),
    # planes
    JitMutant("no border on the left", PLANE, "def unpack", "BF16 * h * pitch", "BF16 * h * W", ON_PLANES),
    JitMutant("one plane", PLANE, "def taps", "c * x.rows * x.columns + ", "", ON_PLANES),
    JitMutant(
        "rows of taps not dilated", PLANE, "def taps", "r * window.dilation_h * x.columns", "r * x.columns", ODD_PLANES
    ),
    JitMutant(
        "images of a group in one place",
        PLANE,
        "def columns_of_planes",
        "((place * rows + i) * Q + q)",
        "(i * Q + q)",
        ODD_PLANES,
    ),
    JitMutant("last rows dropped", PLANE, "def conv_backward", "elif rest:", "elif count < 0:", PLANE_ROWS),
    JitMutant(
        "scratch not cleared",
        PLANE,
        "def conv_backward",
        "view(shifted, (scratch,), np.uint8)[:] = np.uint8(0)",
        "pass",
        ON_PLANES,
    ),
    JitMutant("last column dropped", PLANE, "def _slopes", "if Q % 2:", "if Q < 0:", ODD_PLANES),
    JitMutant("slopes of other rows", PLANE, "def _slopes", "p // pool_h + i", "p // pool_w // pool_h + i", PLANE_ROWS),
    JitMutant(
        "pixels behind the last",
        PLANE,
        "def _weight_gradient",
        "(rows - 1) * pitch + conv.Q,",
        "steps * DEPTH,",
        PLANE_ROWS,
    ),
    JitMutant(
        "parts overlap",
        "convolutions.py",
        "def conv_on_tiles",
        "back.wide, back.part",
        "back.wide, back.wide",
        ON_PLANES,
    ),
    JitMutant(
        "taps beyond a tile row", RUNS, "def columns(", "pixel * spec.depth + start", "pixel * spec.depth", ON_PLANES
    ),
    JitMutant(
        "the first pixel's numbers", RUNS, "def _picked(", "+ tap + pixel - begins", "+ tap + first - begins", ON_PLANES
    ),
    JitMutant("a run for a tap too many", RUNS, "def _served(", "> PIECE - pixels", "> PIECE - pixels + 1", ON_PLANES),
    JitMutant("two runs in one place", RUNS, "def _picked(", "runs[-PER_VECTOR:]", "runs[:PER_VECTOR]", ON_PLANES),
    JitMutant(
        "no zeros behind the last pixel",
        RUNS,
        "def runs(",
        "range(behind, spec.length, DEPTH)",
        "range(behind, 0, DEPTH)",
        PLANE_ROWS,
    ),
    JitMutant(
        "neighbors exchanged",
        EPILOGUE,
        "def pair_unpool",
        "select(won(tap), lower, builder.select(won(tap + 1)",
        "select(won(tap + 1), lower, builder.select(won(tap)",
        ON_PLANES,
    ),
    JitMutant(
        "db of the dead",
        EPILOGUE,
        "def _on_pooled",
        "won(spec.dead), floats.zero, slope",
        "won(spec.dead), slope, slope",
        "whole tiles",
    ),
    JitMutant(
        "db of one pixel", EPILOGUE, "def through", "builder.fadd(floats.load(sums, used), value)", "value", SOME
    ),
    # products of bf16 pairs
    JitMutant(
        "the wrong half",
        BLOCKS,
        "def _halves",
        "builder.shl(bits, ir.Constant(PAIRS, [I32(16)] * LANES))",
        "builder.and_(bits, ir.Constant(PAIRS, [I32(0xFFFF0000)] * LANES))",
        "whole tiles",
        unit="fma",
    ),
    JitMutant("last rows dropped", BLOCKS, "def multiply", "if rows % most:", "if rows < 0:", "dense", unit="fma"),
    JitMutant(
        "bias left out",
        BLOCKS,
        "def _strip",
        "return [row[j] for m, j in block]",
        "return [floats.zero] * len(block)",
        BLOCK_OF_C,
        unit="fma",
    ),
    JitMutant(
        "C not loaded",
        BLOCKS,
        "def _strip",
        "return [floats.load(places[m, j], used[j]) for m, j in block]",
        "return [floats.zero] * len(block)",
        "whole tiles",
        unit="fma",
    ),
    JitMutant(
        "second tile right behind the first",
        BLOCKS,
        "def multiply",
        "spec.a_tile_stride // 2",
        "spec.tile * spec.a_row // 2",
        "whole tiles",
        unit="fma",
    ),
    JitMutant(
        "columns of the first tile", BLOCKS, "def _pair(", "j * spec.b_tile // 2", "j * 0", "whole tiles", unit="fma"
    ),
    JitMutant(
        "one pair in four",
        BLOCKS,
        "def _strip",
        "for k in range(unrolled):",
        "for k in range(1):",
        "whole tiles",
        unit="fma",
    ),
    JitMutant(
        "operands in one place",
        BLOCKS,
        "def dot_product",
        "builder.bitcast(left, kind), builder.bitcast(right, kind)",
        "builder.bitcast(left, kind), builder.bitcast(left, kind)",
        "whole tiles",
        unit="dot",
    ),
    JitMutant("ties away from zero", "bf16.py", "    def rounded(", "constant(0x7FFF)", "constant(0x8000)", CONVERSION),
    # products of AMX tiles
    JitMutant(
        "rows of a full tile",
        AMX,
        "def configuration",
        "bytes_per_row[4 + m] = tile_rows, BF16",
        "bytes_per_row[4 + m] = TILE, BF16",
        BLOCK_OF_C,
        unit="amx",
    ),
    JitMutant("bias of the first tile", AMX, "def _multiply(", "TILE * (tile % 2)", "TILE * 0", BLOCK_OF_C, unit="amx"),
    JitMutant(
        "rows of the first tile",
        AMX,
        "def _multiply(",
        "BF16 * m * spec.a",
        "0 * m * spec.a",
        BLOCK_OF_C,
        unit="amx",
    ),
    JitMutant(
        "columns of the first tile", AMX, "def _multiply(", "BF16 * j * spec", "0 * j * spec", BLOCK_OF_C, unit="amx"
    ),
    JitMutant(
        "one segment", AMX, "def _multiply(", "builder.mul(s, I64", "builder.mul(I64(0), I64", BLOCK_OF_C, unit="amx"
    ),
    JitMutant("C not loaded", AMX, "def _multiply(", 'case "load":', 'case "none":', "dense", unit="amx"),
    # dense in bf16
    JitMutant(
        "panel not cleared",
        DENSE,
        "def _panel",
        "view(x, (panel_bytes + weights_bytes,), np.uint8)[:] = np.uint8(0)",
        "pass",
        "dense",
    ),
    JitMutant(
        "the first inputs",
        DENSE,
        "def _panel",
        "BF16 * (n * all_inputs + first)",
        "BF16 * n * all_inputs",
        "dense of rounded features",
    ),
    JitMutant(
        "weights not rounded",
        DENSE,
        "def round_weights",
        "if view(arguments[0], (3,), np.int64)[2]:",
        "if chunk < 0:",
        "dense",
    ),
    JitMutant("one part", DENSE, "def total", "for part in range(parts):", "for part in range(1):", "dense"),
    JitMutant("no activation", DENSE, "def total", "y[o] * slope", "y[o]", "dense"),
    JitMutant("paired rows not cleared", DENSE, "def backward(", "if partial:", "if rest < 0:", "dense"),
    JitMutant("last inputs dropped", DENSE, "def backward(", "elif rest:", "elif rest < 0:", "dense"),
    JitMutant("dw overwritten", DENSE, "def _columns", '"load" if spec.accumulate else "zero"', '"zero"', "dense"),
    JitMutant(
        "dx overwritten",
        DENSE,
        "def _columns",
        '"load" if spec.add else "zero"',
        '"zero"',
        "dense in a residual branch",
    ),
    JitMutant(
        "last columns of the first",
        DENSE,
        "def _product",
        "kernel_edge(a + block * a_step, b + across * b_step,",
        "kernel_edge(a + block * a_step, b,",
        "dense in a residual branch",
    ),
    JitMutant(
        "last rows at the top",
        DENSE,
        "def _product",
        "c + whole * c_step + FLOAT * BLOCK * j",
        "c + FLOAT * BLOCK * j",
        "dense",
    ),
    JitMutant("dense inputs said to be small", DENSE, "def _panel", "= float32_of_bf16(top)", "= 0.0", OVERFLOW),
    JitMutant(
        "slopes said to be small",
        DENSE,
        "def turn(",
        "float32_of_bf16(largest(arguments[2], N * columns))",
        "0.0",
        OVERFLOW,
    ),
    # gradient and optimizer in one pass
    JitMutant("moved, not rounded", ADAM, "def adam_step", "if copies:", "if False:", ONE_PASS + KEEPS, lanes=16),
    JitMutant("a step and no copy", WEIGHTS, "def copied_step", "if not copies:", "if False:", ONE_PASS + PLAIN),
    JitMutant(
        "slopes of the first outputs",
        DENSE,
        "def _stepped_columns",
        "arguments[2] + first // BLOCK * rows_bytes",
        "arguments[2]",
        ONE_PASS + PLAIN,
    ),
    JitMutant("no decay", WEIGHTS, "def copied_step", "numbers, 1, copy)", "numbers, 0, copy)", ONE_PASS + DECAYS),
    JitMutant(
        "every band the first one",
        DENSE,
        "def update(",
        "chunk % bands * rows",
        "0 * rows",
        ONE_PASS + PLAIN,
    ),
    JitMutant("last stripe dropped", DENSE, "def update(", "elif rest:", "elif rest < 0:", ONE_PASS + PLAIN),
    JitMutant(
        "state of the first parameters",
        UPDATE,
        "    def tasks(",
        "vector + self._offset(one.name)",
        "vector",
        ONE_PASS + KEEPS,
    ),
    JitMutant(
        "matrices moved twice",
        UPDATE,
        "    def tasks(",
        "self._around(tuple(one.name for one in deferred))",
        "self._around(())",
        ONE_PASS + KEEPS,
    ),
    JitMutant(
        "eps of another step", UPDATE, "def _numbers", "optimizer.eps * root", "optimizer.eps", repr(OPTIMIZERS[6])
    ),
    # the choice of a unit
    JitMutant("the slowest unit", "units.py", "def bf16_units", "best = max(", "best = min(", FASTEST, quick=True),
    JitMutant("never float32", "units.py", "def bf16_units", "if found[best] > fp32:", "if found[best] > 0:", FASTEST),
    JitMutant(
        "the widest, not the forced",
        "units.py",
        "def bf16_units",
        "return Units(unit, unit)",
        "return Units(possible[0], possible[0])",
        FORCED,
    ),
)
