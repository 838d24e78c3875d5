"""Whole trajectories: every engine takes the torch engine's steps, and the recipe's promises hold in whole runs.

A gradient that is right once can still be stale, summed twice or used with last step's statistics in the next; twenty
steps with every optimizer show it.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from engine_cases import ENGINES, Entry
from engine_checks import relative_error

from convolt import engines
from convolt.augment import AlternatingFlip, Crop, Cutout, Flip, Mixup
from convolt.comms import Serial
from convolt.data import Dataset
from convolt.datasets import load_dataset
from convolt.duration import Time
from convolt.early_stopping import EarlyStopping
from convolt.engines.im2col import Im2col
from convolt.evaluation import evaluate
from convolt.layers import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dense,
    Dropout,
    Flatten,
    Layer,
    MaxPool2d,
    Normalize,
    ReLU,
    Residual,
    SiLU,
)
from convolt.loader import Loader
from convolt.losses import MSE, CrossEntropy
from convolt.model import Model
from convolt.optimizers import EMA, SGD, Adam, AdamW, RMSprop
from convolt.recipe import Recipe
from convolt.rng import SampleRng
from convolt.schedules import Constant, Cosine, Linear, MultiStep, OneCycle, Piecewise, Triangular, WarmRestarts, Warmup
from convolt.train import fit

STEPS = 20


def network(*norms: Layer, dropout: float = 0.2) -> Model:
    """Convolution, norm, activation, both poolings, a residual block and two dense layers, for digits."""
    return Model(
        (1, 8, 8),
        (
            *(Normalize((0.3,), (0.4,)), Conv2d(1, 6, 3, padding=1), *norms, ReLU(), MaxPool2d(3, 2, 1)),
            Residual((Conv2d(6, 6, 3, padding=1, groups=2), *norms, SiLU()), (Conv2d(6, 6, 1),)),
            *(AvgPool2d(2), Flatten(), Dropout(dropout), Dense(24, 12), ReLU(), Dense(12, 10)),
        ),
    )


WITH_NORMS, WITHOUT_NORMS = network(BatchNorm2d(6)), network()
DATA = load_dataset("digits", subset=120)

RECIPES = {
    "sgd": Recipe(optimizer=SGD(lr=0.05)),
    "sgd-momentum-onecycle": Recipe(optimizer=SGD(lr=0.05, momentum=0.9), schedule=OneCycle(max_lr=0.1)),
    "sgd-nesterov-decay-warmup": Recipe(
        optimizer=SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2), schedule=Warmup("1ep", then=Cosine())
    ),
    "sgd-decoupled-scheduled-momentum": Recipe(
        optimizer=SGD(lr=0.05, momentum=0.8, dampening=0.1, weight_decay=0.1, decoupled_weight_decay=True),
        schedules={"momentum": Linear(1.0, 0.5), "weight_decay": Cosine()},
    ),
    "adam-cosine": Recipe(optimizer=Adam(lr=1e-2), schedule=Cosine(eta_min=1e-4)),
    "adam-l2-weights-only": Recipe(
        optimizer=Adam(lr=1e-2, weight_decay=0.1, decay_norm_and_bias=False), schedule=MultiStep(("1ep", "2ep"))
    ),
    "adamw-restarts": Recipe(optimizer=AdamW(lr=1e-2, weight_decay=0.1), schedule=WarmRestarts("1ep")),
    "adamw-mse-triangular": Recipe(
        optimizer=AdamW(lr=1e-2, decay_norm_and_bias=False), loss=MSE(), schedule=Triangular(step_size_up="1ep")
    ),
    "rmsprop": Recipe(optimizer=RMSprop(lr=1e-3), schedule=Linear()),
    "rmsprop-centered-momentum": Recipe(
        optimizer=RMSprop(lr=1e-3, centered=True, momentum=0.5, weight_decay=1e-2), schedule=Constant()
    ),
}
RECIPES = {name: replace(recipe, batch_size=24, epochs=4, precision="fp64") for name, recipe in RECIPES.items()}
RECIPES = {
    name: recipe if isinstance(recipe.loss, MSE) else replace(recipe, loss=CrossEntropy(label_smoothing=0.1))
    for name, recipe in RECIPES.items()
}

# In float32 the losses of twenty steps keep seven digits, and with SGD so do the weights. Adam and RMSprop divide a
# gradient by its own size: where it is all rounding, as for every bias before a BatchNorm, the weight moves by lr in
# the direction of the error. Their tolerance is how far those few can go: twenty steps of lr beside weights of 0.2.
TOLERANCE_LOSS_FP32 = 1e-5
TOLERANCE_FP32 = {SGD: 1e-5, Adam: 0.1, AdamW: 0.1, RMSprop: 0.02}


def trajectory(entry: Entry, recipe: Recipe, model: Model = WITH_NORMS) -> tuple[np.ndarray, np.ndarray]:
    """The losses of twenty steps, and the weights and statistics after them."""
    executor = entry.make(1).executor(model, None, recipe)
    loader = Loader(DATA.train, recipe, 10, Serial())
    losses = []
    for step in range(STEPS):
        batch, time = loader.batch(step), Time(step, loader.steps_per_epoch, STEPS)
        optimizer = recipe.optimizer_at(time)
        executor.dropout = step >= 3
        result = executor.train_step(batch.images, batch.targets, recipe.loss, 1 / batch.size, optimizer, batch.rng)
        losses.append(result.loss / batch.size)
    executor.close()
    return np.array(losses), np.concatenate([executor.params.flat, executor.params.buffers_flat])


TORCH = next(entry for entry in ENGINES if entry.name == "torch")


@cache
def expected(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The torch engine's trajectory in float64."""
    return trajectory(TORCH, RECIPES[name])


@pytest.mark.parametrize("entry", [entry for entry in ENGINES if entry.finest == "fp64"], ids=lambda entry: entry.name)
@pytest.mark.parametrize("name", RECIPES)
def test_trajectory_equals_that_of_torch(entry, name):
    losses, weights = trajectory(entry, RECIPES[name])
    assert losses[-5:].mean() < losses[:5].mean(), "nothing was learned"
    np.testing.assert_allclose(losses, expected(name)[0], rtol=1e-9)
    assert relative_error(weights, expected(name)[1]) < 1e-9


@pytest.mark.parametrize(
    "entry",
    [pytest.param(entry, marks=[pytest.mark.slow] if entry.compiles else [], id=entry.name) for entry in ENGINES],
)
@pytest.mark.parametrize("name", ["sgd-momentum-onecycle", "adam-cosine", "adamw-restarts", "rmsprop"])
def test_trajectory_in_float32(entry, name):
    losses, weights = trajectory(entry, replace(RECIPES[name], precision="fp32"))
    np.testing.assert_allclose(losses, expected(name)[0], rtol=TOLERANCE_LOSS_FP32)
    assert relative_error(weights, expected(name)[1]) < TOLERANCE_FP32[type(RECIPES[name].optimizer)]


def test_master_weights_in_float64_stay_nearer_to_the_true_path():
    """Twenty steps at a rate where float32 weights round most of each update away."""
    recipe = replace(RECIPES["sgd"], optimizer=SGD(lr=1e-6))
    entry = Entry("im2col", lambda threads: Im2col(threads=threads))
    _, true = trajectory(entry, recipe)
    errors = {
        precision: relative_error(trajectory(entry, replace(recipe, precision=precision))[1], true)
        for precision in ("fp32", "fp32-master64")
    }
    assert errors["fp32-master64"] < errors["fp32"] / 3


# --- whole runs ------------------------------------------------------------------------------------------------------


def run(tmp_path, recipe: Recipe, name: str = "run", model: Model = WITHOUT_NORMS, data: Dataset = DATA):
    return fit(model, data, recipe, engine=Im2col(threads=2), out=tmp_path / name)


def weights_of(finished) -> np.ndarray:
    return finished.params.flat.copy()


BASE = Recipe(epochs=2, batch_size=25, optimizer=Adam(lr=5e-3), precision="fp64")


def test_two_runs_have_the_same_bits(tmp_path):
    recipe = replace(BASE, precision="fp32", augment=(Crop(1), Cutout(2)))
    first, second = (run(tmp_path, recipe, name, WITH_NORMS) for name in ("a", "b"))
    assert first.params.state_dict().keys() == second.params.state_dict().keys()
    for name, array in first.params.state_dict().items():
        assert array.tobytes() == second.params.state_dict()[name].tobytes()
    assert [epoch.valid_loss for epoch in first.history] == [epoch.valid_loss for epoch in second.history]
    other_seed = run(tmp_path, replace(recipe, seed=1), "c", WITH_NORMS)
    assert (weights_of(other_seed) != weights_of(first)).any()


@pytest.mark.parametrize("micro_batch_size", [1, 7, 25])
def test_accumulation_equals_the_big_batch(tmp_path, micro_batch_size):
    """Without BatchNorm, whose statistics are those of the micro-batch: there accumulation is another network."""
    whole = run(tmp_path, BASE, "whole")
    parts = run(tmp_path, replace(BASE, micro_batch_size=micro_batch_size), "parts")
    assert relative_error(weights_of(parts), weights_of(whole)) < 1e-12
    for one, other in zip(parts.history, whole.history, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-12)
        assert one.train_accuracy == other.train_accuracy


def test_average_of_weights_is_what_is_kept(tmp_path):
    """By hand: the same steps, and the average after each of them."""
    recipe = replace(BASE, ema=EMA(decay=0.8, every="2ba"))
    executor = Im2col(threads=2).executor(WITHOUT_NORMS, None, recipe)
    shadow, loader = executor.params.flat.copy(), Loader(DATA.train, recipe, 10, Serial())
    for step in range(recipe.epochs * loader.steps_per_epoch):
        batch = loader.batch(step)
        executor.train_step(batch.images, batch.targets, recipe.loss, 1 / batch.size, recipe.optimizer, batch.rng)
        if (step + 1) % 2 == 0:
            shadow = 0.8 * shadow + 0.2 * executor.params.flat
    assert relative_error(weights_of(run(tmp_path, recipe)), shadow) < 1e-12
    assert relative_error(executor.params.flat, shadow) > 1e-3


# Learns for two epochs and then jumps away from what it learned.
SPOILED = replace(BASE, epochs=6, schedule=Piecewise((("0ep", 1.0), ("2ep", 400.0)), interpolate=False))


@pytest.mark.parametrize(
    ("patience", "epochs"), [(1, 3), (2, 4), (50, 6)], ids=["stopped", "stopped later", "to the end"]
)
def test_best_weights_are_kept_whatever_ended_the_run(tmp_path, patience, epochs):
    finished = run(tmp_path, replace(SPOILED, early_stopping=EarlyStopping(patience=patience)))
    losses = [epoch.valid_loss for epoch in finished.history]
    assert len(losses) == epochs
    assert np.argmin(losses) == 1
    assert finished.result["weights"] == "best"
    executor = Im2col(threads=1).executor(WITHOUT_NORMS, finished.params, SPOILED)
    assert evaluate(executor, DATA.valid, CrossEntropy()).loss == pytest.approx(min(losses), rel=1e-9)


def test_dropout_may_begin_later(tmp_path):
    def losses(recipe, model, name):
        return [epoch.train_loss for epoch in run(tmp_path, recipe, name, model).history]

    always = losses(BASE, WITHOUT_NORMS, "always")
    later = losses(replace(BASE, dropout_from="1ep"), WITHOUT_NORMS, "later")
    never = losses(BASE, network(dropout=0.0), "never")
    assert later[0] == pytest.approx(never[0], rel=1e-12)
    assert later[0] != pytest.approx(always[0], rel=1e-6)
    assert later[1] != pytest.approx(never[1], rel=1e-6)


@pytest.mark.parametrize(
    ("limits", "measure"),
    [({"clip_norm": 1e-3}, np.linalg.norm), ({"clip_value": 1e-4}, lambda c: np.abs(c).max())],
    ids=["norm", "value"],
)
def test_clipping_bounds_a_step(tmp_path, limits, measure):
    one_step = replace(BASE, epochs=1, batch_size=1000, optimizer=SGD(lr=1.0))
    start = Im2col().executor(WITHOUT_NORMS, None, BASE).params.flat
    (limit,) = limits.values()
    free = measure(weights_of(run(tmp_path, one_step, "free")) - start)
    clipped = measure(weights_of(run(tmp_path, replace(one_step, **limits), "clipped")) - start)
    assert free > 2 * limit
    assert clipped == pytest.approx(limit, rel=1e-2)


@pytest.mark.parametrize(
    "augment", [Flip(), AlternatingFlip(), Crop(1), Cutout(3), Mixup(0.4)], ids=lambda a: type(a).__name__
)
def test_augmentation_changes_a_run_and_repeats(tmp_path, augment):
    plain, first, second = (
        weights_of(run(tmp_path, replace(BASE, epochs=1, augment=augments), name))
        for name, augments in (("plain", ()), ("first", (augment,)), ("second", (augment,)))
    )
    assert first.tobytes() == second.tobytes()
    assert (first != plain).any()


def test_engines_draw_the_same_dropout():
    """Masks belong to samples: a shard, a micro-batch or another engine drops the same elements."""
    rng = SampleRng(0, 2, np.arange(6))
    images, labels = DATA.train.images[:6], DATA.train.labels[:6]
    logits = []
    for engine, part in (
        (engines.Loops(), slice(0, 6)),
        (Im2col(), slice(2, 4)),
        (engines.Torch(threads=1), slice(2, 4)),
    ):
        executor = engine.executor(WITHOUT_NORMS, None, BASE)
        result = executor.loss_and_grads(images[part], labels[part], CrossEntropy(), 1.0, rng[part])
        logits.append(result.logits)
    np.testing.assert_allclose(logits[1], logits[0][2:4], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(logits[2], logits[0][2:4], rtol=1e-9, atol=1e-12)
