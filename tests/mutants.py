"""Kernels with one mistake each, which the checks of the engine suites must notice.

A mutant is a replacement of text in a kernel's module: what a tired author would have written. The changed text is
loaded as a module of its own, beside the real one, and its table takes the place of the real entries.
"""

import sys
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from convolt.chain import Table, TableExecutor
from convolt.engine import Engine, EngineRecipe, Executor
from convolt.engines import loops
from convolt.engines.im2col import IM2COL, conv, elementwise, fft, normalization, pooling, windows
from convolt.layers import (
    GELU,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dense,
    Dropout,
    GlobalAvgPool2d,
    Layer,
    LeakyReLU,
    MaxPool2d,
    Normalize,
    ReLU,
    Residual,
    SiLU,
)
from convolt.model import Model
from convolt.params import Params


@dataclass(frozen=True)
class Mutant:
    """``wrong`` in place of ``right``, at its one occurrence after ``inside``, in a module that serves ``layer``."""

    mistake: str
    module: ModuleType
    layer: type[Layer]
    inside: str
    right: str
    wrong: str

    def engine(self, folder: Path) -> "Mutated":
        """The module's engine with the mistake."""
        assert self.module.__file__ is not None
        before, function, rest = Path(self.module.__file__).read_text().partition(f"def {self.inside}(")
        body, end, after = rest.partition("\n\n\n")
        assert function, f"{self.inside} is gone from {self.module.__name__}"
        assert body.count(self.right) == 1, f"{self.right!r} is there {body.count(self.right)} times in {self.inside}"
        text = before + function + body.replace(self.right, self.wrong) + end + after
        changed = load(text, folder, self.module.__name__)
        if self.module is loops:
            return Mutated(changed.LOOPS, "NCHW")
        if self.module is windows:
            return Mutated(_with_windows(changed, folder), "CHWN")
        return Mutated({**IM2COL, **getattr(changed, TABLES[self.module])}, "CHWN")


TABLES = {conv: "GEMM", fft: "FFT", pooling: "POOLING", normalization: "NORMALIZATION", elementwise: "ELEMENTWISE"}


def _with_windows(changed: ModuleType, folder: Path) -> Table:
    """im2col with convolution and pooling on other windows."""
    tables: dict[tuple[type[Layer], ...], object] = dict(IM2COL)
    for module in (conv, pooling):
        assert module.__file__ is not None
        user = load(Path(module.__file__).read_text(), folder, module.__name__)
        user.taps = changed.taps  # type: ignore[attr-defined]
        tables |= getattr(user, TABLES[module])
    return tables  # type: ignore[return-value]


def load(text: str, folder: Path, name: str) -> ModuleType:
    """A module of this text, apart from the real one of that name."""
    file = folder / f"{name.rpartition('.')[2]}_{len(list(folder.iterdir()))}.py"
    file.write_text(text)
    spec = spec_from_file_location(f"mutant_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    del sys.modules[spec.name]
    return module


@dataclass(frozen=True)
class Mutated(Engine):
    """An engine of a given table."""

    table: Table
    layout: str
    threads: int = 1
    NAME: ClassVar[str] = "mutated"
    PRECISIONS: ClassVar[tuple[str, ...]] = ("fp64",)

    def executor(self, model: Model, params: Params | None, recipe: EngineRecipe) -> Executor:
        """As the real engines do it."""
        own = self.initial_params(model, params, recipe)
        return TableExecutor(model, own, recipe, self.table, self.layout)  # type: ignore[arg-type]


CONV = "conv2d_backward"
MAX = "max_pool_backward"
NORM = "batch_norm_backward"

LOOPS_MUTANTS = (
    Mutant("left off by one", loops, Conv2d, "_positions", "q * window.stride[1]", "q * window.stride[1] + 1"),
    Mutant("wrong stride", loops, Conv2d, "_positions", "p * window.stride[0]", "p * window.stride[1]"),
    Mutant("no dilation", loops, Conv2d, "_positions", ", window.dilation[1])", ", 1)"),
    Mutant(
        "padding cut at one side", loops, Conv2d, "_unpadded", "top : x.shape[2] - bottom", "bottom : x.shape[2] - top"
    ),
    Mutant("one group for all", loops, Conv2d, "_groups", "slice(g * c, (g + 1) * c)", "slice(0, c)"),
    Mutant("no bias", loops, Conv2d, "conv2d_forward", 'y + params["bias"][:, None, None]', "y"),
    Mutant(
        "bias at the wrong axis",
        loops,
        Conv2d,
        CONV,
        "axis=(0, 2, 3)",
        "axis=(0, 2, 3))[::-1].copy(",
    ),
    Mutant("dw not added", loops, Conv2d, CONV, "dw[k] += ", "dw[k] = "),
    Mutant("dx not added", loops, Conv2d, CONV, "dx[:, c, rows, columns] += ", "dx[:, c, rows, columns] = "),
    Mutant("db not added", loops, Conv2d, CONV, 'grads["bias"][...] += ', 'grads["bias"][...] = '),
    Mutant(
        "padding kept",
        loops,
        Conv2d,
        CONV,
        "_unpadded(dx, layer.geometry)",
        "dx[:, :, : -sum(layer.geometry.pads[0]) or None, : -sum(layer.geometry.pads[1]) or None]",
    ),
    Mutant("dW not added", loops, Dense, "dense_backward", 'grads["weight"][...] += ', 'grads["weight"][...] = '),
    Mutant("db of one sample", loops, Dense, "dense_backward", "dy.sum(axis=0)", "dy[0]"),
    Mutant("padding of zeros", loops, MaxPool2d, "max_pool_forward", ", -np.inf", ", 0.0"),
    Mutant(
        "the last of equals",
        loops,
        MaxPool2d,
        "max_pool_forward",
        "values.argmax(axis=2)",
        "values.shape[2] - 1 - values[..., ::-1].argmax(axis=2)",
    ),
    Mutant("every equal wins", loops, MaxPool2d, MAX, "] == taps", "] >= taps"),
    Mutant("overlap overwritten", loops, MaxPool2d, MAX, "dx[:, :, rows, columns] += ", "dx[:, :, rows, columns] = "),
    Mutant(
        "padding kept",
        loops,
        MaxPool2d,
        MAX,
        "_unpadded(dx, layer.geometry)",
        "dx[:, :, : -2 * layer.geometry.pads[0][0] or None, : -2 * layer.geometry.pads[1][0] or None]",
    ),
    Mutant("padding not counted", loops, AvgPool2d, "window_counts", "float(layer.count_include_pad)", "0.0"),
    Mutant("share of forward's size", loops, AvgPool2d, "avg_pool_backward", ' / ctx.saved["counts"][p, q]', ""),
    Mutant("divided by rows only", loops, GlobalAvgPool2d, "global_avg_pool_backward", "(H * W)", "(H * H)"),
    Mutant("biased variance", loops, BatchNorm2d, "track_statistics", "var * (count / (count - 1))", "var"),
    Mutant(
        "momentum of the old", loops, BatchNorm2d, "track_statistics", "layer.momentum * (", "(1 - layer.momentum) * ("
    ),
    Mutant("batch not counted", loops, BatchNorm2d, "track_statistics", "[...] += 1", "[...] += 0"),
    Mutant(
        "eps outside the root",
        loops,
        BatchNorm2d,
        "batch_norm_forward",
        "np.sqrt(var + x.dtype.type(layer.eps))",
        "(np.sqrt(var) + layer.eps)",
    ),
    Mutant(
        "statistics of the batch in prediction",
        loops,
        BatchNorm2d,
        "batch_norm_forward",
        "if ctx.training:",
        "if True:",
    ),
    Mutant("mean kept constant", loops, BatchNorm2d, NORM, "dy - _channels(mean_dy) - ", "dy - "),
    Mutant("variance kept constant", loops, BatchNorm2d, NORM, " - normalized * _channels(mean_dy_normalized)", ""),
    Mutant("weight not in dx", loops, BatchNorm2d, NORM, 'dy = dy * _channels(params["weight"])', "pass"),
    Mutant(
        "std forgotten", loops, Normalize, "normalize_backward", "dy / _channels(np.array(layer.std, dy.dtype))", "dy"
    ),
    Mutant("slope at zero", loops, ReLU, "relu_backward", '["x"] > 0', '["x"] >= 0'),
    Mutant("slope at zero", loops, LeakyReLU, "leaky_relu_backward", '["x"] > 0', '["x"] >= 0'),
    Mutant("slope forgotten", loops, LeakyReLU, "leaky_relu_backward", "dy.dtype.type(layer.negative_slope)", "0"),
    Mutant("gate kept constant", loops, GELU, "gelu_backward", " + x * gelu_gate_slope(layer, x)", ""),
    Mutant("wrong constant", loops, GELU, "gelu_gate_slope", "1 + 3 * _TANH_CUBE", "1 + 2 * _TANH_CUBE"),
    Mutant("sign", loops, SiLU, "silu_backward", "1 + x * (1 - gate)", "1 - x * (1 - gate)"),
    Mutant("no rescaling", loops, Dropout, "dropout_mask", "1 / (1 - layer.p)", "1"),
    Mutant("p kept instead of dropped", loops, Dropout, "dropout_mask", ">= layer.p", "< layer.p"),
    Mutant("acts in prediction", loops, Dropout, "dropout_mask", "ctx.training and ", "ctx.phase.rng and "),
    Mutant("mask of another layer", loops, Dropout, "dropout_mask", "dropout:{ctx.name}", "dropout:0"),
    Mutant("mask not in backward", loops, Dropout, "dropout_backward", "dy * mask", "dy"),
    Mutant("shortcut sends nothing back", loops, Residual, "residual_backward", "return body + ", "return body + 0 * "),
)
IM2COL_MUTANTS = (
    Mutant(
        "one position too few",
        windows,
        Conv2d,
        "_meeting",
        "(size - 1 - offset) // stride + 1",
        "(size - 1 - offset) // stride",
    ),
    Mutant("first position too late", windows, Conv2d, "_meeting", "-(offset // stride)", "1 - offset // stride"),
    Mutant(
        "padding of the other axis",
        windows,
        Conv2d,
        "_taps",
        "* window.dilation[1] - left",
        "* window.dilation[1] - top",
    ),
    Mutant("no dilation", windows, Conv2d, "_taps", "r * window.dilation[0]", "r"),
    Mutant("stride of the other axis", windows, MaxPool2d, "_taps", "0, Q, window.stride[1]", "0, Q, window.stride[0]"),
    Mutant("padding not cleared", conv, Conv2d, "gather", "target[...] = 0", "pass"),
    Mutant("taps transposed", conv, Conv2d, "gather", "columns[:, tap.r, tap.s]", "columns[:, tap.r, -1 - tap.s]"),
    Mutant("dx not cleared", conv, Conv2d, "scatter", "image[...] = 0", "pass"),
    Mutant("first channel of the run", conv, Conv2d, "scatter", " + channels.start\n", "\n"),
    Mutant("dw not added", conv, Conv2d, CONV, 'grads["weight"][...] += ', 'grads["weight"][...] = '),
    Mutant("db not added", conv, Conv2d, CONV, 'grads["bias"][...] += ', 'grads["bias"][...] = '),
    Mutant(
        "columns not transposed", conv, Conv2d, CONV, "columns.transpose(0, 2, 1)", "columns.reshape(G, -1, depth // G)"
    ),
    Mutant(
        "bias on the wrong rows",
        conv,
        Conv2d,
        "conv2d_forward",
        "y[:, rows.start : rows.stop] += ",
        "y[:, : rows.stop] += ",
    ),
    Mutant(
        "dW not added", conv, Dense, "dense_backward", 'grads["weight"][:, inputs] += ', 'grads["weight"][:, inputs] = '
    ),
    Mutant(
        "bias of the first outputs",
        conv,
        Dense,
        "dense_forward",
        'params["bias"][outputs, None]',
        'params["bias"][: outputs.stop - outputs.start, None]',
    ),
    Mutant("spectrum not conjugate", fft, Conv2d, "conv2d_forward", "filters.conj()", "filters"),
    Mutant("padding kept", fft, Conv2d, CONV, "top : top + H", ":H"),
    Mutant("dw not added", fft, Conv2d, CONV, 'grads["weight"][...] += ', 'grads["weight"][...] = '),
    Mutant("the last of equals", pooling, MaxPool2d, "max_pool_forward", "np.greater(", "np.greater_equal("),
    Mutant(
        "code of another width",
        pooling,
        MaxPool2d,
        MAX,
        "tap.r * S",
        "tap.r * R",
    ),
    Mutant("windows never overlap", pooling, MaxPool2d, MAX, "apart = layer.geometry.stride == (R, S) and", "apart ="),
    Mutant("windows cover the image", pooling, MaxPool2d, MAX, "(P * R, Q * S) == (H, W)", "True"),
    Mutant("windows begin in the image", pooling, MaxPool2d, MAX, "layer.geometry.pads == ((0, 0), (0, 0))", "True"),
    Mutant(
        "gradient where nothing passed",
        pooling,
        ReLU,
        "relu_max_pool_backward",
        "relu_backward(ctx, layers[0], params[0], grads[0], dy)",
        "dy",
    ),
    Mutant("starts from zero", pooling, MaxPool2d, "max_pool_forward", "best[...] = -np.inf", "best[...] = 0"),
    Mutant("code of the last step", pooling, MaxPool2d, "max_pool_forward", "code[...] = 0", "pass"),
    Mutant("dx not cleared", pooling, MaxPool2d, MAX, "image[...] = 0", "pass"),
    Mutant("codes of a byte", pooling, MaxPool2d, "_taps", "layer.geometry.kernel[0] * layer.geometry.kernel[1]", "1"),
    Mutant("sum not cleared", pooling, AvgPool2d, "avg_pool_forward", "total[...] = 0", "pass"),
    Mutant(
        "share forgotten",
        pooling,
        AvgPool2d,
        "avg_pool_backward",
        'np.multiply(dy[channels], ctx.saved["inverse"], out=share)',
        "share[...] = dy[channels]",
    ),
    Mutant("share of rows", pooling, GlobalAvgPool2d, "global_avg_pool_backward", "1 / (H * W)", "1 / H"),
    Mutant(
        "not centered",
        normalization,
        BatchNorm2d,
        "batch_norm_forward",
        "np.multiply(centered, centered, out=centered)",
        "np.multiply(part, part, out=centered)",
    ),
    Mutant(
        "mean not folded in",
        normalization,
        BatchNorm2d,
        "batch_norm_forward",
        'params["bias"] - mean * scale if',
        'params["bias"] if',
    ),
    Mutant(
        "dweight and dbias exchanged",
        normalization,
        BatchNorm2d,
        NORM,
        "(slope_sums[channels] / count)",
        "(products[channels] / count)",
    ),
    Mutant(
        "weight not in dx",
        normalization,
        BatchNorm2d,
        "_scale",
        'inverse * params["weight"] if layer.affine else inverse',
        "inverse",
    ),
    Mutant("in place", normalization, Normalize, "normalize_forward", 'ctx.buffer("y", x.shape, x.dtype)', "x"),
    Mutant("slope at zero", elementwise, ReLU, "relu_backward", "np.greater(", "np.greater_equal("),
    Mutant("slope of forward forgotten", elementwise, LeakyReLU, "_scale_negative", "factor += slope", "pass"),
    Mutant("slope at zero", elementwise, LeakyReLU, "leaky_relu_forward", "np.greater(", "np.greater_equal("),
    Mutant("gate kept constant", elementwise, GELU, "gelu_backward", " + x * gelu_gate_slope(layer, x)", ""),
    Mutant("sign", elementwise, SiLU, "_silu_slope", "(1 - gate)", "(gate - 1)"),
    Mutant("mask not in backward", elementwise, Dropout, "dropout_backward", "np.multiply(dy, mask, out=dy)", "dy"),
    Mutant(
        "branches share their input",
        elementwise,
        Residual,
        "residual_forward",
        'f"{branch}.x", chain.stages[:1]',
        'f"{branch}.x", chain.stages[:0]',
    ),
    Mutant(
        "branches share their gradient",
        elementwise,
        Residual,
        "residual_backward",
        "chain.stages[-1:]",
        "chain.stages[:0]",
    ),
)
MUTANTS = LOOPS_MUTANTS + IM2COL_MUTANTS
