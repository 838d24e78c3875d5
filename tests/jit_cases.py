"""Cases and checks of the jit engine alone: bf16 on matrix tiles, and the optimizers' kernels.

They are functions for the reason that ``engine_checks`` gives: the mutants of the jit engine are judged by them too.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from engine_cases import Case
from engine_checks import assert_near, executor_of, oracle_step, step_on

from convolt.engines import JIT
from convolt.engines.jit import buffers, plan
from convolt.engines.jit.buffers import Buffer
from convolt.layers import BatchNorm2d, Conv2d, Dense, Flatten, Layer, LeakyReLU, MaxPool2d, ReLU, Shape
from convolt.model import Model
from convolt.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop, init_state, step_flat
from convolt.params import Params
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
        layer = self.layers[0]
        if isinstance(layer, Dense):
            return max(layer.in_features, layer.out_features, self.batch)
        _, P, Q = layer.output_shape(self.shape)
        return max(math.prod(layer.kernel_size) * max(self.shape[0], layer.out_channels), self.batch * P * Q)


def on_tiles(
    shape: Shape, filters: int, kernel, *behind: Layer, batch: int = 3, stride=1, padding=0, dilation=1, bias=True
) -> Rounded:
    layer = Conv2d(shape[0], filters, kernel, stride, padding, dilation, bias=bias)
    name = f"{layer} {shape} {batch} {behind}"
    return Rounded(name, shape, (layer, *behind), batch)


TILES = {
    "whole tiles": on_tiles((32, 5, 16), 32, 3, ReLU(), MaxPool2d((1, 2)), padding=1),
    "an odd width, channels that fill no tile": on_tiles((24, 4, 11), 20, 3, padding=1),
    "few channels, wide filter, stride 2": on_tiles((3, 9, 13), 33, 5, LeakyReLU(0.25), padding=2, stride=2),
    "dilation": on_tiles((17, 8, 9), 5, 2, dilation=3, batch=1, bias=False),
    "100 channels of a pixel": on_tiles((100, 1, 1), 40, 1, batch=5),
    "dense": Rounded("dense on tiles", (70,), (Dense(70, 37),), 9),
}


def equals_float64(case: Rounded, unit: str) -> None:
    """Outputs and gradients of the parameters to float32's sums; the gradient of the images to one bf16 rounding."""
    executor = executor_of(JIT(threads=2, unit=unit), "bf16", case.model, case.params())
    got, want = step_on(executor, case.deltas, case.slopes(), case.rng), oracle_step(case)
    executor.close()
    tolerance = 2**-22 * math.sqrt(case.terms) + 1e-6
    assert_near(got.prediction, want.prediction, tolerance, "prediction")
    assert_near(got.outputs, want.outputs, tolerance, "outputs")
    images = executor.params.slices["0.weight"]
    assert_near(got.gradient[images.stop :], want.gradient[images.stop :], tolerance, "gradient of the parameters")
    assert_near(got.gradient[images], want.gradient[images], 2**-8, "gradient of the images")


# --- memory ----------------------------------------------------------------------------------------------------------

UNWRITTEN = ("scratch", "parts of", "sums", "terms of dx", "slope ", "codes ")  # buffers that start without meaning


@contextmanager
def poisoned(names: tuple[str, ...] = UNWRITTEN) -> Iterator[None]:
    """Memory that a kernel must not read before something has written it is full of NaN: these, and what is shared."""
    allocate, share = Buffer.allocate, buffers.share

    def poison(buffer, array):
        if buffer.name.startswith(names):
            array.view(np.uint8)[...] = 255
        return array

    def sharing(orders):
        arena = share(orders)
        arena[...] = 255
        return arena

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Buffer,
            "allocate",
            lambda buffer: poison(buffer, allocate(buffer)) if buffer.array is None else buffer.array,
        )
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
)


def updated(executor, optimizer: Optimizer, steps: int = 4):
    """Weights by the engine's kernel and by ``step_flat``, from the same gradients, and both states."""
    params, generator = executor.params, np.random.default_rng(0)
    w, state = params.flat.copy(), init_state(optimizer, params.flat.size, params.dtype)
    for step in range(1, steps + 1):
        executor.grads.flat[...] = generator.normal(size=w.size)
        scheduled = replace(optimizer, lr=optimizer.lr / step)
        step_flat(scheduled, w, executor.grads.flat, state, step, params.decays())
        executor.update(scheduled)
    return params.flat, w, executor.optimizer_state(), state


def update_is_that_of_the_optimizer(optimizer: Optimizer) -> None:
    """Weights and state after some steps of the kernel are those of ``convolt.optimizers``."""
    executor = JIT(threads=2).executor(TINY, None, Recipe())
    got, want, state, wanted = updated(executor, optimizer)
    executor.close()
    assert_near(got, want, 1e-6, "weights")
    assert set(state) == {"step", *wanted}
    for name, array in wanted.items():
        assert_near(state[name], array, 1e-6, name)
