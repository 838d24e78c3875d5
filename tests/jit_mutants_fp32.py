"""Mistakes in float32 kernels, in those of both precisions, and in the plan."""

from jit_cases import OPTIMIZERS
from jit_mutant import JitMutant

from convolt.layers import AvgPool2d, Dense, MaxPool2d, Normalize

CONV, CONV_ROWS = "kernels/conv.py", "kernels/conv_rows.py"
IMAGES, POOL = "kernels/images.py", "kernels/pooling.py"
NORM, WEIGHTS, DENSE = "kernels/normalization.py", "kernels/weights.py", "kernels/dense.py"
BATCHNORM, ADAM, DEPTHWISE, ROWS = "batchnorm.py", "adam.py", "kernels/depthwise.py", "depthwise.py"
STRIDED, GROUPED = "conv dilation 2, stride 2, padding 2", "conv groups 2, stride 2, dilation 2"
RAGGED, OBLONG, BY_CHANNEL = "conv channels that fill no vector", "conv stride 2x1", "conv depthwise, stride 2"
MANY_CHANNELS = "conv depthwise, many channels"
SUM, FEATURES = "residual identity", "flatten-dense-relu-dense"
POOLED, NORMED, POOLS = "conv-relu-pool", "conv-bn-relu", "pools in a row"
NORM_POOL, NESTED, LATE = "conv-bn-relu-pool", "residual of norms in residual", "conv-relu-bn"
TIES = f"{MaxPool2d(3, 2, 1)} of equals"
UNCOUNTED = f"{AvgPool2d(3, 2, 1, count_include_pad=False)}"
TILED_POOL, PANELS = "winograd, some channels of a vector, max-pool", "winograd, two panels, padding 2 and none"
FIRST_POOLED, WINOGRADED = "winners, one channel 5x5", "kernels/winograd.py"
TRANSFORMS, FILTERING, RESIDUES, WINNING = "winograd.py", "filtering.py", "kernels/residues.py", "winners.py"
ONE_PASS = "one pass in float32"
BATCHED = f"{Dense(200, 70)} of a batch"
SCALED = f"{Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 2.0))}"

FP32 = (
    # convolution
    JitMutant(
        "a pixel to the right", CONV, "def _forward_block", "window.left * x.C", "(window.left - 1) * x.C", RAGGED
    ),
    JitMutant(
        "stride of the other axis",
        CONV_ROWS,
        "def output_row",
        "a_row=window.stride_w",
        "a_row=window.stride_h",
        OBLONG,
    ),
    JitMutant("rows not dilated", CONV_ROWS, "def output_row", "number * window.dilation_h * ", "number * ", STRIDED),
    JitMutant("rows of a filter not summed", CONV_ROWS, "def output_row", 'start="load")', "start=start)", STRIDED),
    JitMutant(
        "bias of the first filters",
        CONV_ROWS,
        "def activated_rows",
        "arguments[3] + FLOAT * channel",
        "arguments[3]",
        GROUPED,
    ),
    JitMutant(
        "tail rows dropped", CONV_ROWS, "def register_rows", "        if rest:\n", "        if rest < 0:\n", BATCHED
    ),
    JitMutant(
        "code of a dead ReLU", CONV_ROWS, "def _pool_rows", "relu=spec.slope == 0", "relu=False", POOLED, quick=True
    ),
    JitMutant(
        "taps of the pool transposed",
        CONV_ROWS,
        "def _pool_rows",
        "i * line + j * columns",
        "j * line + i * columns",
        POOLED,
    ),
    JitMutant(
        "part of dw not cleared",
        CONV,
        "def conv_backward",
        "view(dw, (part,), np.float32)[:] = np.float32(0)",
        "pass",
        RAGGED,
    ),
    JitMutant(
        "part of db not cleared",
        CONV,
        "def conv_backward",
        "view(arguments[8] + FLOAT * chunk * K, (K,), np.float32)[:] = np.float32(0)",
        "pass",
        RAGGED,
    ),
    JitMutant(
        "stale frame of dy",
        CONV,
        "def conv_backward",
        "view(dy, (framed_size,), np.float32)[:] = np.float32(0)",
        "pass",
        RAGGED,
    ),
    JitMutant(
        "mask of the ReLU missing",
        CONV,
        "def spread_slopes",
        "Through(K, spec.slope,",
        "Through(K, 1.0,",
        SUM,
    ),
    JitMutant(
        "pixels of dw not strided",
        CONV,
        "def _weight_product",
        "spec.together * window.stride_w * x.C",
        "spec.together * x.C",
        STRIDED,
    ),
    JitMutant("dw of the first group", CONV, "def _weight_product", "C * K + group * filters)", "C * K)", GROUPED),
    JitMutant("dx of the first group", CONV, "def _input_part", "target_pitch + group * C", "target_pitch", GROUPED),
    JitMutant(
        "a row of dx too high", CONV, "def _input_part", "origin + h * pitch", "origin + (h - 1) * pitch", RAGGED
    ),
    # weights
    JitMutant(
        "filters not turned",
        WEIGHTS,
        "def pack",
        "packed[group, row, c, side] = number(w[group, k, c, tap])",
        "packed[group, row, c, side] = number(w[group, k, c, chunk])",
        RAGGED,
    ),
    JitMutant(
        "a part not added",
        WEIGHTS,
        "def reduce_parts",
        "for part in range(1, parts):",
        "for part in range(2, parts):",
        RAGGED,
        quick=True,
    ),
    JitMutant(
        "dw not added",
        WEIGHTS,
        "def reduce_parts",
        "dw[k, c, tap] + total[k] if accumulate else",
        "total[k] if accumulate else",
        RAGGED,
    ),
    JitMutant("db not added", WEIGHTS, "def bias_sum", "db[k] if accumulate", "np.float32(0) if accumulate", RAGGED),
    JitMutant(
        "not ahead", WEIGHTS, "def _sgd", "slope + mu * b[i] if nesterov", "b[i] if nesterov", repr(OPTIMIZERS[3])
    ),
    JitMutant(
        "eps inside the root",
        WEIGHTS,
        "def _adam",
        "np.sqrt(v[i]) + eps",
        "np.sqrt(v[i] + eps)",
        repr(OPTIMIZERS[6]),
        lanes=8,
    ),
    JitMutant(
        "norms decay",
        WEIGHTS,
        "def _move(",
        "np.float32(numbers[1]) if decays else np.float32(0)",
        "np.float32(numbers[1])",
        repr(OPTIMIZERS[9]),
    ),
    JitMutant("not centered", WEIGHTS, "def _rmsprop", "spread -= mean[i] * mean[i]", "pass", repr(OPTIMIZERS[13])),
    # images
    JitMutant("mean not subtracted", IMAGES, "def unpack", " * scale[c] + shift[c]", " * scale[c]", SCALED),
    JitMutant(
        "dx overwritten",
        IMAGES,
        "def _streamed_backward",
        "dx, spec.add)",
        "dx, False)",
        "residual in place on both sides",
    ),
    JitMutant(
        "no activation behind the sum",
        IMAGES,
        "def add(",
        "activated(floats, builder.fadd(*pair), spec.slope)",
        "builder.fadd(*pair)",
        "residual of nothing",
    ),
    JitMutant(
        "a branch overwritten",
        IMAGES,
        "def add_backward",
        "spec.adds_b",
        "False",
        "residual of nothing",
    ),
    JitMutant(
        "gate kept constant", IMAGES, "    def gelu(v", " + v * density * np.exp(-half * v * v)", "", "gelu-silu-leaky"
    ),
    JitMutant("a sum, not a mean", IMAGES, "def global_average_backward", "constant(1 / pixels)", "constant(1)", POOLS),
    # pooling
    JitMutant("padding read", POOL, "def _inside", "max(0, -start)", "0", POOLS),
    JitMutant("the last of equals", "pixels.py", "def beats(", 'ordered(">"', 'ordered(">="', TIES),
    JitMutant("dx not cleared", POOL, "def max_pool_backward", "not spec.add", "False", POOLS),
    JitMutant("padding counted", POOL, "    def share(", "if every:", "if True:", UNCOUNTED),
    # normalization
    JitMutant("mean square, not variance", NORM, "def fold(", " - mean * mean, 0.0", ", 0.0", NORMED, quick=True),
    JitMutant("biased variance", NORM, "def fold(", "var * M / (M - 1.0)", "var", NORMED),
    JitMutant("pivots taken for one", NORM, "def fold(", "sums[0, c] + n * apart\n", "sums[0, c]\n", NORMED),
    JitMutant(
        "weight not in dx", NORM, "def fold_slopes", "np.float32(-scale * total / M)", "np.float32(-total / M)", NORMED
    ),
    JitMutant(
        "variance kept constant",
        BATCHNORM,
        "def backward",
        "floats.multiply_add(builder.fsub(value, mean[i]), factors[i], offsets[i])",
        "offsets[i]",
        NORMED,
        quick=True,
    ),
    JitMutant("a tap too far", BATCHNORM, "def add_slopes", "taps[1:], start=1", "taps[1:], start=2", NORM_POOL),
    JitMutant("not the largest", "pixels.py", "def beats(", 'ordered(">"', 'ordered("<"', NORM_POOL),
    JitMutant("a branch overwritten", BATCHNORM, "def backward", "spec.adds_skip", "False", NESTED),
    JitMutant(
        "x under its gradient", "graph.py", "    def consumes", "maker.slope == 1", "maker is source.maker", LATE
    ),
    JitMutant("mean kept", WEIGHTS, "def fold_norm", "offset = -np.float64(mean[k])", "offset = 0.0", NORMED),
    # dense
    JitMutant(
        "a sample too many",
        DENSE,
        "def dense_slopes",
        "if n >= count:",
        "if n > count:",
        "residual of features",
        quick=True,
    ),
    JitMutant("last inputs dropped", DENSE, "def dense_backward", "if rest and", "if False and", FEATURES),
    JitMutant(
        "dx overwritten", DENSE, "def _columns", '"load" if spec.add else "zero"', '"zero"', "residual of features"
    ),
    # depthwise convolution
    JitMutant("pixels not strided", ROWS, "def _pixels", "m * spec.x_pixel", "m * spec.channels", BY_CHANNEL),
    JitMutant("images not strided", ROWS, "def _taps", "I64(spec.x_pixel)", "I64(spec.channels)", BY_CHANNEL),
    JitMutant(
        "rows of x not strided",
        DEPTHWISE,
        "def depthwise_weight_gradient",
        "window.stride_h * x.pitch",
        "x.pitch",
        BY_CHANNEL,
    ),
    JitMutant(
        "bias left out", DEPTHWISE, "def depthwise_forward", '"bias" if spec.bias else "zero"', '"zero"', BY_CHANNEL
    ),
    JitMutant("last channels dropped", ROWS, "def _in_blocks", "if rest:", "if rest < 0:", MANY_CHANNELS),
    JitMutant(
        "a row of dx too high",
        DEPTHWISE,
        "def _input_part",
        "origin + h * pitch",
        "origin + (h - 1) * pitch",
        BY_CHANNEL,
    ),
    # Adam in AVX-512
    JitMutant(
        "quotient as it is estimated",
        ADAM,
        "def _step",
        "builder.fneg(fma(move, rest, move))",
        "builder.fneg(move)",
        repr(OPTIMIZERS[5]),
        lanes=16,
    ),
    JitMutant(
        "weights behind the run",
        ADAM,
        "def adam_step",
        "builder.mul(whole, I64(LANES)), _up_to(builder, rest)",
        "builder.mul(whole, I64(LANES)), everything",
        repr(OPTIMIZERS[7]),
        lanes=16,
    ),
    JitMutant("one beta for both", ADAM, "def _step", "fma(beta1, m,", "fma(fresh2, m,", repr(OPTIMIZERS[5]), lanes=16),
    JitMutant(
        "moved by the row before",
        "kernels/dense_update.py",
        "def _moved_columns",
        "view(dw + FLOAT * row * columns,",
        "view(dw + FLOAT * max(row - 1, 0) * columns,",
        ONE_PASS,
    ),
    JitMutant(
        "last inputs not moved",
        "kernels/dense_update.py",
        "def update(",
        "tail(arguments, chunk * run, own)",
        "pass",
        ONE_PASS,
    ),
    # Winograd's algorithm, residues of the stride, winners of a pool
    JitMutant(
        "a sign of B", FILTERING, "class Three", "builder.fsub(x[2], x[1])", "builder.fsub(x[1], x[2])", TILED_POOL
    ),
    JitMutant("a sign of A", FILTERING, "class Three", "builder.fsub(a, b)", "builder.fsub(b, a)", TILED_POOL),
    JitMutant("dx overwritten", TRANSFORMS, "def output_tiles(", "if finish.add:", "if False:", "winograd, dx added"),
    JitMutant(
        "bands in the place of the first",
        WINOGRADED,
        "def _outputs(",
        "h = band * rows + i",
        "h = i",
        "winograd, dx added",
    ),
    JitMutant(
        "tiles of images that are not there",
        WINOGRADED,
        "def _weights(",
        "if present < together:",
        "if present > together:",
        "winograd, blocks of whole images",
    ),
    JitMutant(
        "the first panel for all",
        WINOGRADED,
        "def _products(",
        "((i * across + j) * panels + p) * panel",
        "(i * across + j) * panels * panel",
        PANELS,
    ),
    JitMutant(
        "filters not turned",
        TRANSFORMS,
        "def filter_tiles(",
        "range(R * S)[::-1] if turned",
        "range(R * S) if turned",
        TILED_POOL,
    ),
    JitMutant(
        "dw not added", TRANSFORMS, "def filter_taps(", "builder.fadd(builder.load(place), value)", "value", TILED_POOL
    ),
    JitMutant("one part of dw", WINOGRADED, "def reduce_parts(", "range(parts)", "range(1)", TILED_POOL),
    JitMutant(
        "every chunk one block",
        "kernels/winograd_specs.py",
        "def one_block(",
        "tiles.rows == tiles.high",
        "True",
        "winograd, dx added",
    ),
    JitMutant(
        "db left out",
        WINOGRADED,
        "def reduce_parts(",
        "if chunk == 0:",
        "if chunk < 0:",
        TILED_POOL,
    ),
    JitMutant(
        "taps of a residue not turned",
        RESIDUES,
        "def along(",
        "in reversed(range(kernel))",
        "in range(kernel)",
        STRIDED,
    ),
    JitMutant(
        "gaps of dx not cleared",
        CONV,
        "def conv_backward",
        "gaps = wants_dx and",
        "gaps = False and",
        "conv 1x1 stride 2",
    ),
    JitMutant(
        "a neighbor of the winner",
        "kernels/winners.py",
        "def _fours(",
        "x[h + 1, w, c]",
        "x[h, w + 1, c]",
        FIRST_POOLED,
    ),
    JitMutant(
        "what no ReLU let through", WINNING, "def winners(", 'icmp_unsigned("!="', 'icmp_unsigned("=="', FIRST_POOLED
    ),
    # the plan
    JitMutant(
        "barrier missing",
        "phases.py",
        "    def touches(",
        "return not self",
        "return False and self",
        NORMED,
        quick=True,
    ),
    JitMutant("first reader forgotten", "plan.py", "    def begin_slope(", "return before", "return False", SUM),
    JitMutant(
        "border of one side",
        "graph.py",
        "    def frame(",
        "max(self.border[1], bottom)",
        "self.border[1]",
        RAGGED,
        quick=True,
    ),
    JitMutant(
        "gradient of two readers",
        "serve.py",
        "def batch_norm(",
        "plan.begin_slope(source), False, False",
        "False, False, False",
        "residual that begins with a norm",
    ),
    JitMutant(
        "size of the last batch",
        "programs.py",
        "    def load(self, x",
        "= len(x), self._address",
        "= self.plan.capacity, self._address",
        NORMED,
    ),
)
