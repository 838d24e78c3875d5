"""Cases and checks of the jit engine alone: bf16 in blocks, the optimizers' kernels, the choice of a unit.

They are functions for the reason that ``engine_checks`` gives: the mutants of the jit engine are judged by them too.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from engine_cases import UNITS, Case
from engine_checks import Step, assert_near, executor_of, oracle_of, step_on

from convolt.engine import Executor
from convolt.engines import JIT
from convolt.engines.jit import buffers, plan, units
from convolt.engines.jit.buffers import SLACK, Buffer
from convolt.engines.jit.isa import FP32, Units, detect
from convolt.engines.jit.update import Updater
from convolt.layers import BatchNorm2d, Conv2d, Dense, Flatten, Layer, LeakyReLU, MaxPool2d, ReLU, Residual, Shape
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop, init_state, step_flat
from convolt.params import Params, aligned_zeros
from convolt.recipe import Recipe

# --- bf16 ------------------------------------------------------------------------------------------------------------


def rounded(x):
    """The nearest bf16 numbers."""
    return torch.from_numpy(np.asarray(x)).to(torch.bfloat16).double().numpy()


@dataclass(frozen=True)
class Rounded(Case):
    """A case whose images, weights and gradients are bf16 numbers: nothing is lost before the products."""

    def params(self) -> Params:
        """Rounded."""
        params = Case.params(self)
        params.flat[...] = rounded(params.flat)
        return params

    def slopes(self):
        """Rounded."""
        return rounded(Case.slopes(self))

    @property
    def terms(self) -> int:
        """Of the longest sum, forward or backward."""
        layer = next(_products(self.layers))
        if isinstance(layer, Dense):
            return max(layer.in_features, layer.out_features, self.batch)
        _, P, Q = layer.output_shape(self.shape)
        return max(math.prod(layer.kernel_size) * max(self.shape[0], layer.out_channels), self.batch * P * Q)


def _products(layers: tuple[Layer, ...]) -> Iterator[Conv2d | Dense]:
    for layer in layers:
        if isinstance(layer, Conv2d | Dense):
            yield layer
        yield from _products(getattr(layer, "body", ()))


def on_tiles(
    shape: Shape,
    filters: int,
    kernel,
    *behind: Layer,
    batch: int = 3,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    bias=True,
) -> Rounded:
    layer = Conv2d(shape[0], filters, kernel, stride, padding, dilation, groups, bias)
    name = f"{layer} {shape} {batch} {behind}"
    return Rounded(name, shape, (layer, *behind), batch)


# Each way through the kernels: direct and gathered, groups of images of which the last has fewer, frames with an odd
# number of pixels, blocks that are not full on any side, gradients that are added to others.
TILES = {
    "whole tiles": on_tiles((32, 5, 16), 32, 3, ReLU(), MaxPool2d((1, 2)), padding=1),
    "an odd width, channels that fill no tile": on_tiles((24, 4, 11), 20, 3, padding=(2, 1), dilation=(2, 1)),
    "few channels, wide filter, stride 2": on_tiles((3, 9, 13), 33, 5, LeakyReLU(0.25), padding=2, stride=2),
    "dilation": on_tiles((17, 8, 9), 5, 2, dilation=3, batch=1, bias=False),
    "1x1, stride 2": on_tiles((32, 5, 7), 20, 1, stride=2),
    "100 channels of a pixel": on_tiles((100, 1, 1), 40, 1, batch=5),
    "padding beyond the filter": on_tiles((2, 4, 5), 3, 3, padding=(4, 3), stride=(2, 3), batch=2),
    "images with borders beyond the filter": on_tiles((20, 4, 5), 9, 3, padding=(4, 3), batch=37),
    "direct rows of two blocks, stride 2": on_tiles((24, 4, 38), 17, 3, ReLU(), padding=1, stride=2, batch=2),
    "direct rows in pairs, stride 2": on_tiles((16, 5, 21), 9, 3, ReLU(), MaxPool2d(3), padding=1, stride=2, batch=2),
    "some images at a time": on_tiles((5, 3, 3), 7, 3, ReLU(), padding=1, batch=37),
    "some images at a time, stride 2": on_tiles((5, 5, 5), 20, 3, ReLU(), MaxPool2d(3), padding=1, stride=2, batch=37),
    "groups as one": on_tiles((12, 9, 7), 20, 3, ReLU(), MaxPool2d(2), padding=1, groups=4, batch=5),
    "groups as one, stride 2": on_tiles((33, 8, 9), 66, (3, 2), padding=1, stride=2, groups=3, bias=False),
    "a residual branch": Rounded("conv in residual", (20, 4, 6), (Residual((Conv2d(20, 20, 3, padding=1),)),)),
    "dense": Rounded("dense on tiles", (150,), (Dense(150, 130), LeakyReLU(0.25)), 9),
    "dense of rounded features": Rounded("dense behind images", (4, 8, 8), (Flatten(), Dense(256, 70, bias=False)), 33),
    "dense in a residual branch": Rounded("dense in residual", (178,), (Residual((Dense(178, 178),)),), 5),
}
# First layers, of which nobody wants the gradient of the images. With few channels and stride 1 they read planes: pools
# of an even and an odd window, rows that are cut into groups of which the last has fewer.
FIRST = {
    "wide filter on planes": on_tiles((2, 8, 9), 33, 5, ReLU(), MaxPool2d(2), padding=2),
    "planes, several blocks and groups of rows": on_tiles((3, 24, 20), 48, 5, ReLU(), MaxPool2d(2), padding=2, batch=2),
    "planes in groups of rows, odd pool": on_tiles((3, 21, 19), 20, 3, ReLU(), MaxPool2d(3), padding=1, batch=2),
    "dilation on planes, odd width": on_tiles(
        (2, 7, 9), 3, (2, 3), LeakyReLU(0.25), dilation=(3, 1), batch=37, bias=False
    ),
    "8 planes": on_tiles((8, 3, 4), 40, 1, batch=1),
    "groups of rows, stride 2": on_tiles((3, 25, 27), 20, 3, ReLU(), padding=1, stride=2, batch=2),
    "two groups of images, the last with fewer": on_tiles((9, 22, 21), 4, 3, padding=1, batch=37),
}

# Convolutions by dot products of pairs: tap by tap, where a pair may be of two taps, and by Winograd's algorithm, where
# it is of two tiles in dw: an odd number of them in a row, blocks of images, filters of two panels, dx added.
PAIRS = {
    **{name: case for name, case in TILES.items() if isinstance(case.layers[0], Conv2d)},
    "odd groups": on_tiles((9, 6, 7), 12, (3, 2), ReLU(), padding=1, stride=(2, 1), groups=3, batch=4),
    "groups of odd filters": on_tiles((12, 5, 5), 9, 3, MaxPool2d(2), padding=1, groups=3, bias=False),
    "no tap meets the image": on_tiles((2, 2, 2), 4, 1, padding=1, stride=4),
    "tiles in pairs": on_tiles((18, 6, 10), 20, 3, ReLU(), MaxPool2d(2), padding=1, batch=5),
    "one tile a row": on_tiles((16, 4, 2), 24, 3, padding=1, batch=37, bias=False),
    "two panels, padding 2": on_tiles((16, 8, 6), 70, 3, padding=2, batch=2),
    "tiles of pieces, an odd number in a row": on_tiles((18, 7, 5), 20, (5, 4), padding=2, batch=7),
    "twins of rows and columns": on_tiles((18, 9, 6), 70, (7, 4), padding=3, batch=4),
    "tiles of a dilation": on_tiles((16, 10, 6), 18, 3, ReLU(), padding=2, dilation=2, batch=5),
    "an odd number of channels": on_tiles((17, 6, 6), 19, 3, padding=1),
    "tiles of a residual branch": Rounded(
        "tiles in residual", (16, 4, 8), (Residual((Conv2d(16, 16, 3, padding=1),)),), 9
    ),
}

# What every run of the tests meets, every kernel on every way; the rest is slow: a case takes seconds of compiling.
EVERY_RUN = frozenset(
    {
        "whole tiles",
        "an odd width, channels that fill no tile",
        "few channels, wide filter, stride 2",
        "dense",
        "dense of rounded features",
        "wide filter on planes",
        "planes in groups of rows, odd pool",
        "odd groups",
        "groups as one",
        "tiles in pairs",
        "two panels, padding 2",
    }
)


def equals_float64(case: Rounded, unit: str) -> None:
    """Outputs and gradients of the parameters to float32's sums; the gradient of the images to one bf16 rounding.

    So it is with all samples, then with one less in the buffers that are still full.
    """
    executor = executor_of(JIT(threads=2, unit=unit), "bf16", case.model, case.params())
    images = executor.params.slices["0.weight"]
    for count in dict.fromkeys((case.batch, max(1, case.batch - 1))):
        data = case.deltas[:count], case.slopes()[:count], case.rng[:count]
        got, want = step_on(executor, *data), oracle_of(case.model, case.params(), *data)
        _sums_are_near(case, got, want, images.stop, unit)
    executor.close()


def equals_float64_as_first_layer(case: Rounded, unit: str) -> None:
    """The same of a first layer."""
    params, full = Params(case.bare, np.float64), case.params().state_dict()
    params.load_state_dict({name: array for name, array in full.items() if name != "0.weight"})
    executor = executor_of(JIT(threads=2, unit=unit), "bf16", case.bare, params)
    for count in dict.fromkeys((case.batch, max(1, case.batch - 1))):
        x = rounded(case.images()[:count])
        data = x, case.slopes()[:count], case.rng[:count]
        _sums_are_near(case, step_on(executor, *data), oracle_of(case.bare, params, *data), 0, unit)
    executor.close()


def empty_batch_has_no_gradient(precision: str, case: Case, unit: str | None = None) -> None:
    """Though the memory is that of a batch that had one: a rank may be left without images."""
    case = replace(case, batch=3)  # a plan for more would not be used again
    executor = executor_of(JIT(threads=1, unit=unit), precision, case.model, case.params())
    step_on(executor, case.deltas, case.slopes(), case.rng)
    step = step_on(executor, case.deltas[:0], case.slopes()[:0], case.rng[:0])
    executor.close()
    assert not step.gradient.any()


def _sums_are_near(case: Rounded, got: Step, want: Step, first: int, unit: str) -> None:
    """Outputs, and gradients from the ``first`` parameter on, as near as float32's sums come.

    Winograd's algorithm rounds what it has transformed: each number by 2^-9 of itself at most. Outputs near zero then
    change their sign, and the slope of their activation with it.
    """
    stages = JIT(threads=1, unit=unit).explain(case.model, "bf16", case.batch).stages
    transformed = any("dot products: bf16; Winograd" in stage.reason for stage in stages)
    tolerance = 2**-7 if transformed else 2**-22 * math.sqrt(case.terms) + 1e-6
    assert_near(got.prediction, want.prediction, tolerance, "prediction")
    assert_near(got.outputs, want.outputs, tolerance, "outputs")
    tolerance *= 16 if transformed and len(case.layers) > 1 else 1
    assert_near(got.gradient[first:], want.gradient[first:], tolerance, "gradient of the parameters")
    tolerance = max(tolerance, 2**-8)
    assert_near(got.gradient[:first], want.gradient[:first], tolerance, "gradient of the images")


# --- memory ----------------------------------------------------------------------------------------------------------

UNWRITTEN = ("scratch", "parts of", "sums", "terms of dx", "slope ", "codes ")  # buffers that start without meaning
FENCE = 1 << 14  # elements


@contextmanager
def poisoned(names: tuple[str, ...] = UNWRITTEN) -> Iterator[None]:
    """Memory that a kernel must not read before something has written it is full of NaN: these, and what is shared.

    So is what lies before and behind these.
    """
    allocate, share = Buffer.allocate, buffers.share

    def allocated(buffer):
        if buffer.array is None and buffer.name.startswith(names):
            whole = aligned_zeros(FENCE + buffer.size + SLACK + FENCE, buffer.dtype)
            whole.view(np.uint8)[...] = 255
            buffer.array = whole[FENCE:-FENCE]
        return allocate(buffer)

    def sharing(orders):
        arena = share(orders)
        arena[...] = 255
        return arena

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Buffer, "allocate", allocated)
        patch.setattr(plan, "share", sharing)
        yield


# --- optimizers ------------------------------------------------------------------------------------------------------

TINY = Model((1, 4, 4), (Conv2d(1, 3, 3), BatchNorm2d(3), Flatten(), Dense(12, 5)))

OPTIMIZERS = (
    SGD(lr=0.1),
    SGD(lr=0.1, weight_decay=0.1),
    SGD(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, decoupled_weight_decay=True),
    SGD(lr=0.1, momentum=0.9, weight_decay=0.2, decay_norm_and_bias=False),
    Adam(lr=0.01),
    Adam(lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1),
    Adam(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, decay_norm_and_bias=False),
    AdamW(lr=0.01, weight_decay=0.3),
    AdamW(lr=0.01, weight_decay=0.3, decay_norm_and_bias=False),
    RMSprop(lr=0.01),
    RMSprop(lr=0.01, alpha=0.9, eps=1e-3, weight_decay=0.1),
    RMSprop(lr=0.01, momentum=0.7, weight_decay=0.1, decoupled_weight_decay=True),
    RMSprop(lr=0.01, centered=True),
    RMSprop(lr=0.01, centered=True, momentum=0.7, weight_decay=0.1, decay_norm_and_bias=False),
    Adam(lr=0.01, betas=(0.9, 0.0)),  # all of v is forgotten, however large it was
)


def updated(executor, optimizer: Optimizer, steps: int = 4):
    """Weights by the engine's kernel and by ``step_flat``, from the same gradients, and both states."""
    params, generator = executor.params, np.random.default_rng(0)
    w, state = params.flat.copy(), init_state(optimizer, params.flat.size, params.dtype)
    for step in range(1, steps + 1):
        executor.grads.flat[...] = generator.normal(size=w.size)
        executor.grads.flat[::5] = 0  # as of a weight behind a dead ReLU: its second moment stays zero
        scheduled = replace(optimizer, lr=optimizer.lr / step)
        step_flat(scheduled, w, executor.grads.flat, state, step, params.decays())
        executor.update(scheduled)
    return params.flat, w, executor.optimizer_state(), state


def update_is_that_of_the_optimizer(optimizer: Optimizer) -> None:
    """Weights and state after some steps of the kernel are those of ``convolt.optimizers``."""
    executor = JIT(threads=2).executor(TINY, None, Recipe())
    before = executor.params.flat.copy()
    got, want, state, wanted = updated(executor, optimizer)
    executor.close()
    assert_near(got, want, 1e-6, "weights")
    assert_near(got - before, want - before, 5e-6, "how far they moved")
    assert set(state) == {"step", *wanted}
    for name, array in wanted.items():
        assert_near(state[name], array, 1e-6, name)


# --- gradient and optimizer in one pass ------------------------------------------------------------------------------

# More inputs than one stripe and outputs that fill no block; a second matrix without gradient of its input's border.
DEFERRED = Model(
    (3, 20, 18),
    (Conv2d(3, 12, 3, padding=1), ReLU(), MaxPool2d(2), Flatten(), Dense(1080, 70), ReLU(), Dense(70, 256)),
)
MATRIX = Model((1, 4, 8), (Flatten(), Dense(32, 512, bias=False)))  # whose gradient is all that is learned from


WIDEST = JIT(threads=2, unit=UNITS[0])
FULL = 40  # samples of a batch: every size has kernels of its own to compile


def batch_for(model: Model, size: int = FULL, seed: int = 0):
    """Images of noise, and labels."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (size, *model.input_shape), np.uint8), generator.integers(0, 256, size)


def trained(executor: Executor, optimizer: Optimizer, scales):
    """Losses, weights, state and predictions after steps of which the last has fewer samples."""
    losses = []
    for step, (scale, size) in enumerate(zip(scales, (FULL, FULL, 29), strict=True)):
        x, y = batch_for(executor.model, size, step)
        losses.append(executor.train_step(x, y, CrossEntropy(), scale / size, optimizer).loss)
    state = [array.tobytes() for _, array in sorted(executor.optimizer_state().items())]
    predicted = executor.predict(batch_for(executor.model, 5)[0]).tobytes()
    executor.close()
    return losses, executor.params.flat.tobytes(), state, predicted


def one_pass_gives_the_bits_of_two(
    optimizer: Optimizer, precision: str, scales=(1.0, 1.0, 1.0), model: Model = DEFERRED, engine: JIT = WIDEST
) -> None:
    """The same as where gradients are written to memory, and looked at, before the optimizer reads them."""
    recipe = Recipe(precision=precision)
    together = trained(engine.executor(model, None, recipe), optimizer, scales)
    look, update, updates = Updater.look_task, Updater.update, []

    def doubtful(self, findings, squares, deferred):
        return look(self, findings, squares, [replace(one, samples=10**18) for one in deferred])

    def counted(self, *arguments):
        updates.append(arguments)
        update(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updater, "look_task", doubtful)
        patch.setattr(Updater, "update", counted)
        assert trained(engine.executor(model, None, recipe), optimizer, scales) == together
    assert len(updates) == len(scales), "of no step the gradient came first"


def overflow_leaves_the_weights(precision: str) -> None:
    """The operands of the one gradient there is are finite, and their products are not."""
    executor = JIT(threads=2, unit=UNITS[0]).executor(MATRIX, None, Recipe(precision=precision))
    before = executor.params.flat.copy()
    x, y = batch_for(MATRIX, 33)
    assert np.isnan(executor.train_step(x, np.zeros_like(y), CrossEntropy(), 2e38, SGD(lr=1.0)).loss)
    executor.close()
    np.testing.assert_array_equal(executor.params.flat, before)


# --- units -----------------------------------------------------------------------------------------------------------

#: Measured GFLOP/s of each unit, and of float32; what computes then.
MEASURED = (
    ({"dot": 200.0, "fma": 90.0}, 110.0, Units("dot", "dot")),
    ({"dot": 80.0, "fma": 120.0}, 110.0, Units(None, "fma")),
    ({"dot": 80.0, "fma": 90.0}, 110.0, FP32),
    ({"fma": 110.0}, 110.0, FP32),
)


@contextmanager
def measured(found: dict[str, float], fp32: float) -> Iterator[None]:
    """A CPU that has these units, with these rates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "units", lambda isa: tuple(found))
        patch.setattr(units, "rates", lambda isa, candidates: (found, fp32))
        yield


def unit_is_the_fastest() -> None:
    """The fastest unit where it beats float32, else float32 with a warning of both figures; tiles only where forced."""
    for found, fp32, want in MEASURED:
        with measured(found, fp32), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert units.bf16_units(detect(), None) == want
        figures = f"{fp32:.0f} GFLOP/s on one core, {units.UNITS[max(found, key=found.get)]} {max(found.values()):.0f}"
        assert [figures in str(one.message) for one in told] == ([True] if want == FP32 else [])


def forced_unit_is_taken() -> None:
    """Whatever was measured."""
    with measured({"dot": 80.0, "fma": 90.0}, 110.0):
        assert [units.bf16_units(detect(), unit) for unit in ("dot", "fma")] == [("dot", "dot"), ("fma", "fma")]
