"""Kernels and plans of the jit engine with one mistake each, which its suites must notice.

A mutant is a replacement of text, as in ``mutants``. A changed file of kernels gets a module name of its own, made of
its text: the cache of kernels keeps both apart, and nothing but the changed kernels is compiled anew. A changed file of
the planner takes the place of the real one in every module that had imported from it.

Wrong addresses may end a process, so each mutant lives in one of its own:

    python tests/jit_mutants.py 0 7 12      # prints as JSON how each was noticed, null where it was not
"""

import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from engine_cases import CASES, UNITS, Case
from engine_checks import adds_gradients, equals_pytorch, needs_no_input_gradient, reuses_buffers
from jit_cases import OPTIMIZERS, TILES, equals_float64, poisoned, update_is_that_of_the_optimizer

from convolt.engines import JIT
from convolt.engines.jit import compiler
from convolt.engines.jit.compiler import FOLDER, Compiler
from convolt.errors import ConvoltError
from convolt.layers import AvgPool2d, MaxPool2d, Normalize

PACKAGE = "convolt.engines.jit"
BATCHNORM = "batchnorm.py"
# What a broken plan may raise besides a check's own AssertionError.
BREAKDOWNS = (AssertionError, ValueError, IndexError, TypeError, KeyError, OverflowError, ConvoltError, RuntimeWarning)


@dataclass(frozen=True)
class JitMutant:
    """``wrong`` in place of ``right``, at its one occurrence after ``inside``, in a file; ``by``: who notices.

    quick: one of the few that every run of the tests meets.
    """

    mistake: str
    file: str
    inside: str
    right: str
    wrong: str
    by: str
    quick: bool = False

    def text(self) -> str:
        """The file with the mistake."""
        before, place, rest = (FOLDER / self.file).read_text().partition(self.inside)
        body, end, after = rest.partition("\n\n\n")
        assert place, f"{self.inside} is gone from {self.file}"
        assert body.count(self.right) == 1, f"{self.right!r} is there {body.count(self.right)} times in {self.inside}"
        return before + place + body.replace(self.right, self.wrong) + end + after

    def apply(self) -> None:
        """Make this process use the file with the mistake."""
        if self.file == BATCHNORM:  # kernels made of it are neither found in the cache nor left there
            os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
            compiler.MANY = sys.maxsize
        name = f"{PACKAGE}.{self.file.removesuffix('.py').replace('/', '.')}"
        changed = _load(self.text())
        _put_in_place(sys.modules[name] if name in sys.modules else _imported(name), changed)
        if self.file.startswith("kernels/"):
            _rename(name, changed.__name__)

    def check(self) -> None:
        """Raises AssertionError where it is noticed."""
        if self.by in TILES:
            case = TILES[self.by]
            equals_float64(case, UNITS[0])
            adds_gradients(JIT(threads=2, unit=UNITS[0]), "bf16", case)
        elif self.by in UPDATES:
            update_is_that_of_the_optimizer(UPDATES[self.by])
        else:
            case = _CASES[self.by]
            for one in (equals_pytorch, adds_gradients, reuses_buffers, needs_no_input_gradient):
                one(JIT(threads=2), "fp32", case)
            with poisoned():
                equals_pytorch(JIT(threads=2), "fp32", case)


_CASES: dict[str, Case] = {case.name: case for case in CASES}
UPDATES = {repr(optimizer): optimizer for optimizer in OPTIMIZERS}


def _imported(name: str) -> ModuleType:
    __import__(name)
    return sys.modules[name]


def _load(text: str) -> ModuleType:
    name = f"mutant_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    file = Path(tempfile.mkdtemp()) / f"{name}.py"
    file.write_text(text)
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _put_in_place(real: ModuleType, changed: ModuleType) -> None:
    """Whoever imported a name from the real module has the changed one's."""
    for name, value in list(vars(real).items()):
        if name.startswith("__") or name not in vars(changed):
            continue
        for user in [module for key, module in sys.modules.items() if key.startswith(PACKAGE)]:
            if vars(user).get(name) is value:
                setattr(user, name, vars(changed)[name])


def _rename(real: str, changed: str) -> None:
    """Kernels of a module are those of another from now on."""
    kernel: Callable[..., Any] = Compiler.kernel

    def renamed(self: Compiler, factory: Any, spec: Any) -> Any:
        if isinstance(factory, str) and factory.partition(":")[0] == real:
            factory = f"{changed}:{factory.partition(':')[2]}"
        return kernel(self, factory, spec)

    Compiler.kernel = renamed  # type: ignore[method-assign]


CONV, IMAGES, POOL = "kernels/conv.py", "kernels/images.py", "kernels/pooling.py"
NORM, WEIGHTS, DENSE, TILED = "kernels/normalization.py", "kernels/weights.py", "kernels/dense.py", "kernels/tiles.py"
STRIDED, GROUPED = "conv dilation 2, stride 2, padding 2", "conv groups 2, stride 2, dilation 2"
RAGGED, OBLONG = "conv channels that fill no vector", "conv stride 2x1"
SUM, FEATURES = "residual identity", "flatten-dense-relu-dense"
POOLED, NORMED, POOLS = "conv-relu-pool", "conv-bn-relu", "pools in a row"
NORM_POOL, NESTED, LATE = "conv-bn-relu-pool", "residual of norms in residual", "conv-relu-bn"
TIES = f"{MaxPool2d(3, 2, 1)} of equals"
UNCOUNTED = f"{AvgPool2d(3, 2, 1, count_include_pad=False)}"
FIRST = f"{Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 2.0))}"

MUTANTS = (
    # convolution
    JitMutant(
        "a pixel to the right", CONV, "def _forward_block", "window.left * x.C", "(window.left - 1) * x.C", RAGGED
    ),
    JitMutant(
        "stride of the other axis", CONV, "def _output_row", "a_row=window.stride_w", "a_row=window.stride_h", OBLONG
    ),
    JitMutant("rows not dilated", CONV, "def _output_row", "FLOAT * window.dilation_h * ", "FLOAT * ", STRIDED),
    JitMutant("rows of a filter not summed", CONV, "def _output_row", 'start="load")', "start=start)", STRIDED),
    JitMutant(
        "bias of the first filters", CONV, "def _forward_block", "FLOAT * channel\n", "FLOAT * column\n", GROUPED
    ),
    JitMutant("tail rows dropped", CONV, "def register_rows", "        if rest:\n", "        if rest < 0:\n", RAGGED),
    JitMutant("code of a dead ReLU", CONV, "def _pool_rows", "relu=spec.slope == 0", "relu=False", POOLED, quick=True),
    JitMutant(
        "taps of the pool transposed",
        CONV,
        "def _pool_rows",
        "(i * Q + j) * columns",
        "(j * Q + i) * columns",
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
        "residual projection",
    ),
    JitMutant(
        "mask of the ReLU missing",
        CONV,
        "def _spread",
        "Through(K, spec.slope,",
        "Through(K, 1.0,",
        SUM,
    ),
    JitMutant(
        "pixels of dw not strided",
        CONV,
        "def _weight_gradient",
        "a_depth=window.stride_w * x.C",
        "a_depth=x.C",
        STRIDED,
    ),
    JitMutant("dw of the first group", CONV, "def _weight_gradient", "C * K + group * filters)", "C * K)", GROUPED),
    JitMutant(
        "dx of the first group", CONV, "def _input_gradient", "target_pitch + group * C", "target_pitch", GROUPED
    ),
    JitMutant(
        "a row of dx too high", CONV, "def _input_gradient", "origin + h * pitch", "origin + (h - 1) * pitch", RAGGED
    ),
    # weights
    JitMutant(
        "filters not turned",
        WEIGHTS,
        "def pack",
        "w[group, k, c, R - 1 - r, S - 1 - s]",
        "w[group, k, c, r, s]",
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
        "total[r, s, c, k] if accumulate else",
        "0 * dw[k, c, r, s] if accumulate else",
        RAGGED,
    ),
    JitMutant(
        "db not added", WEIGHTS, "def reduce_parts", "db[k] if accumulate", "np.float32(0) if accumulate", RAGGED
    ),
    JitMutant(
        "not ahead", WEIGHTS, "def _sgd", "slope + mu * b[i] if nesterov", "b[i] if nesterov", repr(OPTIMIZERS[3])
    ),
    JitMutant(
        "eps inside the root", WEIGHTS, "def _adam", "np.sqrt(v[i]) + eps", "np.sqrt(v[i] + eps)", repr(OPTIMIZERS[6])
    ),
    JitMutant(
        "norms decay",
        WEIGHTS,
        "def optimizer_step",
        "np.float32(numbers[1]) if decays else np.float32(0)",
        "np.float32(numbers[1])",
        repr(OPTIMIZERS[9]),
    ),
    JitMutant("not centered", WEIGHTS, "def _rmsprop", "spread -= mean[i] * mean[i]", "pass", repr(OPTIMIZERS[13])),
    # images
    JitMutant("mean not subtracted", IMAGES, "def unpack", " * scale[c] + shift[c]", " * scale[c]", FIRST),
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
    JitMutant("the last of equals", POOL, "def max_pool(", 'ordered(">"', 'ordered(">="', TIES),
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
    JitMutant("not the largest", BATCHNORM, "def _largest", 'ordered(">"', 'ordered("<"', NORM_POOL),
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
    # bf16 tiles
    JitMutant(
        "filters not turned",
        TILED,
        "def pack",
        "reverse[c, k, R - 1 - r, S - 1 - s]",
        "reverse[c, k, r, s]",
        "dilation",
    ),
    JitMutant(
        "columns not strided",
        TILED,
        "def gather_rows",
        " + q * stride_w) * channels",
        " + q) * channels",
        "few channels, wide filter, stride 2",
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
        "state[:3] = len(x),",
        "state[:3] = self.plan.capacity,",
        NORMED,
    ),
)
REPRESENTATIVE = tuple(number for number, mutant in enumerate(MUTANTS) if mutant.quick)


def caught(mutant: JitMutant | None, judge: JitMutant) -> str | None:
    """How a process with the mistake failed; None if it did not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(600)
        os.write(writer, (_outcome(mutant, judge) or "").encode()[:60_000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        message = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return f"ended with status {status}" if status else message or None


def _outcome(mutant: JitMutant | None, judge: JitMutant) -> str | None:
    torch.set_num_threads(1)
    if mutant is not None:
        mutant.apply()
    try:
        judge.check()
    except BREAKDOWNS as error:
        return f"{type(error).__name__}: {error}"
    return None


def judged(numbers: Iterable[int]) -> dict[str, Any]:
    """How each mutant was caught, and what the same judges say of the engine as it is."""
    chosen = list(numbers)
    innocent = {MUTANTS[number].by: MUTANTS[number] for number in chosen}
    return {
        "innocent": {by: caught(None, judge) for by, judge in innocent.items()},
        "mutants": {number: caught(MUTANTS[number], MUTANTS[number]) for number in chosen},
    }


if __name__ == "__main__":
    print(json.dumps(judged(map(int, sys.argv[1:]))))
