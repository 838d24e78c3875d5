"""Dense layers of the jit engine that read pixels as they lie: nobody but the clock sees it."""

from dataclasses import replace

import pytest
from engine_cases import UNITS
from jit_cases import DEFERRED, FULL
from order_cases import (
    ENGINE,
    IN_BF16,
    LOOKS,
    MODELS,
    at_once,
    explained,
    gradients_that_are_looked_at_first,
    looking_changes_nothing,
    threads_leave_the_bits,
    weights_are_in_order_behind_the_end,
    whoever_interrupts_finds_them_in_order,
    whole_steps_are_steps,
    works,
)

from convolt.engines import JIT
from convolt.engines.jit.runtime import Team
from convolt.layers import Conv2d, Dense, Dropout, Flatten, GlobalAvgPool2d, ReLU
from convolt.model import Model
from convolt.optimizers import EMA, SGD, AdamW, Optimizer, RMSprop
from convolt.recipe import Recipe

precisions = pytest.mark.parametrize("precision", ["fp32", "bf16"])


@precisions
@pytest.mark.parametrize("name", MODELS)
def test_whole_steps_are_steps(name, precision):
    assert explained(MODELS[name], precision) == (precision == "fp32" or name in IN_BF16)
    whole_steps_are_steps(MODELS[name], precision)


@pytest.mark.skipif("dot" not in UNITS, reason="this CPU has no dot products of bf16 pairs (AVX512-BF16)")
def test_pairs_are_flattened():
    engine = JIT(threads=2, unit="dot")
    assert not any(explained(model, "bf16", engine) for model in MODELS.values())
    whole_steps_are_steps(DEFERRED, "bf16", engine)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["plain", "avx2"])
@pytest.mark.parametrize("name", MODELS)
def test_on_every_instruction_set(isa, name):
    whole_steps_are_steps(MODELS[name], "fp32", JIT(threads=2, isa=isa))


@pytest.mark.parametrize(
    "optimizer",
    [SGD(lr=0.05), SGD(lr=0.05, momentum=0.9, nesterov=True), AdamW(lr=1e-3, eps=0.1), RMSprop(lr=1e-3, eps=0.1)],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_arrays_of_every_optimizer_go_along(optimizer: Optimizer):
    whole_steps_are_steps(DEFERRED, "fp32", optimizer=optimizer)


@precisions
def test_gradients_that_are_looked_at_first(precision):
    gradients_that_are_looked_at_first(precision)


@precisions
@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.__name__)
def test_looking_changes_nothing(look, precision):
    looking_changes_nothing(look, precision)


def test_where_all_but_the_last_is_made_twice():
    for segments in (2, 3):
        whole_steps_are_steps(DEFERRED, "fp32", replace(ENGINE, checkpoint_segments=segments))


@precisions
def test_weights_are_in_order_behind_the_end(precision):
    weights_are_in_order_behind_the_end(precision)


@precisions
def test_whoever_interrupts_finds_them_in_order(precision):
    whoever_interrupts_finds_them_in_order(precision)


@precisions
def test_threads_leave_the_bits(precision):
    threads_leave_the_bits(precision)


FEATURES = (Conv2d(1, 8, 3, padding=1), ReLU())


@pytest.mark.parametrize(
    "layers",
    [
        (*FEATURES, Flatten(), Dropout(0.5), Dense(800, 100)),
        (*FEATURES, Flatten(), ReLU(), Dense(800, 100)),
        (*FEATURES, Flatten(), Dense(800, 10)),
        (Flatten(), Dense(100, 900)),
        (*FEATURES, GlobalAvgPool2d(), Flatten(), Dense(8, 8192)),
        (*FEATURES, Flatten(), Dropout(0.5), Flatten(), Dense(800, 100)),
        (*FEATURES, Flatten(), Dense(800, 70), Flatten(), Dense(70, 1000)),
    ],
    ids=["dropout", "a second activation", "a small matrix", "images", "averages", "twice", "features"],
)
def test_what_is_flattened_all_the_same(layers):
    model = Model((1, 10, 10), layers)
    assert not explained(model, "fp32")


def test_few_samples_are_flattened_all_the_same():
    assert any("Flatten" in stage.name for stage in ENGINE.explain(DEFERRED, "fp32", 5).stages)
    assert not any("Flatten" in stage.name for stage in ENGINE.explain(DEFERRED, "fp32", FULL).stages)


@pytest.mark.parametrize("ema", [None, EMA()], ids=["looked at now and then", "averaged"])
def test_weights_that_are_averaged_stay_in_their_order(ema, monkeypatch):
    names, run = [], Team.run

    def told(team, program, meanwhile=None):
        names.extend(phase.name for phase in program.phases)
        run(team, program, meanwhile)

    monkeypatch.setattr(Team, "run", told)
    executor = ENGINE.executor(DEFERRED, None, Recipe(ema=ema))
    for work in works(DEFERRED, SGD(lr=0.02, momentum=0.9)):
        at_once(executor, work)
    executor.close()
    assert any(name.endswith(" order") for name in names) == (ema is None)
    assert any("Flatten" in name for name in names) == (ema is not None)
