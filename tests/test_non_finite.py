"""A step that is not finite: it is told, or left out, or rolled back from, and nothing that is kept ever sees it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import BATCH, MODEL, STEPS, STEPS_PER_EPOCH, dataset, spoil_images

from convolt import train
from convolt.callbacks import Callback, StepEvent
from convolt.chain import TableExecutor
from convolt.comms import Serial
from convolt.duration import Time
from convolt.early_stopping import EarlyStopping
from convolt.engine import Executor, StepResult
from convolt.engines.im2col import Im2col
from convolt.errors import TrainingError
from convolt.loader import Loader
from convolt.optimizers import EMA, SGD, Adam, clip_by_norm, clip_by_value
from convolt.recipe import NonFinite, Recipe
from convolt.run import Run
from convolt.schedules import Cosine
from convolt.train import fit

DATA = dataset(np.float32)
ENGINE = Im2col(threads=1)
SICK = 8  # the step that is not finite, counted from 0; in the second epoch


def recipe(policy: str, **changes) -> Recipe:
    common = {
        "epochs": 3,
        "batch_size": BATCH,
        "seed": 3,
        "optimizer": SGD(lr=0.05, momentum=0.9),
        "schedule": Cosine(),
    }
    return Recipe(**{**common, "non_finite": NonFinite(policy), **changes})


@pytest.fixture(params=["image", "inf image", "gradient"])
def sick(request, monkeypatch):
    """Makes the steps of these numbers not finite, by a pixel or by one element of the gradient alone."""

    def make(*steps: int) -> None:
        if request.param == "gradient":
            spoil_gradients(monkeypatch, steps)
        else:
            spoil_images(monkeypatch, steps, math.nan if request.param == "image" else math.inf)

    return make


def spoil_gradients(monkeypatch, steps: tuple[int, ...]) -> None:
    """The loss stays finite; which step it is, the loader knows."""
    batches, loss_and_grads = Loader.batches, TableExecutor.loss_and_grads
    current = [0]

    def counted(loader: Loader, first: int, count: int):
        current[0] = first
        return batches(loader, first, count)

    def spoiled(executor: Executor, *args, **options) -> StepResult:
        result = loss_and_grads(executor, *args, **options)
        if current[0] in steps:
            executor.grads.flat[7] = math.nan
        return result

    monkeypatch.setattr(Loader, "batches", counted)
    monkeypatch.setattr(TableExecutor, "loss_and_grads", spoiled)


class Losses(Callback):
    """The loss of each step as it was told; a step that is done again replaces the first time."""

    def __init__(self) -> None:
        self.of: dict[int, float] = {}
        self.lr: dict[int, float] = {}

    def on_step(self, step: StepEvent) -> None:
        self.of[step.step], self.lr[step.step] = step.loss, step.lr


def trained_without(recipe: Recipe, *left_out: int) -> Executor:
    """The same run written out as a loop that never meets these batches."""
    from_scratch = ENGINE.executor(MODEL, None, recipe)
    loader = Loader(DATA.train, recipe, DATA.num_classes, Serial())
    for step in range(STEPS):
        if step not in left_out:
            batch = loader.batch(step)
            optimizer = recipe.optimizer_at(Time(step, STEPS_PER_EPOCH, STEPS))
            from_scratch.train_step(batch.images, batch.targets, recipe.loss, 1 / batch.size, optimizer, batch.rng)
    return from_scratch


def events(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "non_finite"]


# ---------------------------------------------------------------------------------------------------------- policies


def test_raise_ends_the_run_in_one_line_and_keeps_sound_checkpoints(sick, tmp_path):
    sick(SICK)
    with pytest.raises(
        TrainingError, match=f"^step {SICK + 1}: the loss, the gradient or a statistic is not finite; .*"
    ) as caught:
        fit(MODEL, DATA, recipe("raise"), engine=ENGINE, out=tmp_path / "run", checkpoint_every="1ba")
    assert "\n" not in str(caught.value)
    run = Run.load(tmp_path / "run")
    assert not run.finished
    assert run.checkpoints.steps[-1] == SICK
    assert run.checkpoints.best_step == STEPS_PER_EPOCH
    assert_sound(run)


@pytest.mark.parametrize("optimizer", [SGD(lr=0.05, momentum=0.9), Adam()], ids=["sgd", "adam"])
def test_skip_is_a_run_that_never_met_the_batch(optimizer, sick, tmp_path):
    healthy = trained_without(recipe("skip", optimizer=optimizer), SICK, SICK + 3)
    sick(SICK, SICK + 3)
    losses = Losses()
    run = fit(
        MODEL,
        DATA,
        recipe("skip", optimizer=optimizer),
        engine=ENGINE,
        out=tmp_path / "run",
        checkpoint_every="1ba",
        callbacks=(losses,),
    )
    last = run.checkpoints.load("last")
    for name, array in healthy.params.state_dict().items():
        np.testing.assert_array_equal(last.model[name], array, err_msg=name)
    for name, array in healthy.optimizer_state().items():
        np.testing.assert_array_equal(last.optimizer[name], array, err_msg=name)
    assert [step for step, loss in losses.of.items() if math.isnan(loss)] == [SICK + 1, SICK + 4]
    assert [epoch.skipped_steps for epoch in run.history] == [0, 2, 0]
    assert all(math.isfinite(epoch.train_loss) for epoch in run.history)
    assert [event["step"] for event in events(run.folder)] == [SICK + 1, SICK + 4]
    assert_sound(run)


def test_skip_with_accumulation_clipping_and_average(sick, tmp_path):
    """The other path of a step: a spoiled micro-batch spoils its batch, and no more."""
    accumulated = recipe("skip", micro_batch_size=5, clip_norm=1.0, clip_value=0.5, ema=EMA(0.9))
    healthy = ENGINE.executor(MODEL, None, accumulated)
    loader = Loader(DATA.train, accumulated, DATA.num_classes, Serial())
    shadow = healthy.params.flat.copy()
    for step in range(STEPS):
        if step == SICK:
            continue
        batch = loader.batch(step)
        healthy.zero_grads()
        for piece in batch.pieces(5):
            healthy.loss_and_grads(piece.images, piece.targets, accumulated.loss, 1 / batch.size, piece.rng)
        clip_by_value(healthy.grads.flat, 0.5)
        clip_by_norm(healthy.grads.flat, 1.0)
        healthy.update(accumulated.optimizer_at(Time(step, STEPS_PER_EPOCH, STEPS)))
        EMA(0.9).update(shadow, healthy.params.flat)
    sick(SICK)
    run = fit(MODEL, DATA, accumulated, engine=ENGINE, out=tmp_path / "run", checkpoint_every="1ba")
    np.testing.assert_array_equal(run.checkpoints.load("last").optimizer["weights"], healthy.params.flat)
    np.testing.assert_array_equal(run.params.flat, shadow)
    assert [epoch.skipped_steps for epoch in run.history] == [0, 1, 0]
    assert_sound(run)


def test_rollback_returns_to_the_checkpoint_leaves_the_step_out_and_lowers_lr(sick, tmp_path):
    sick(SICK)
    losses = Losses()
    run = fit(
        MODEL,
        DATA,
        recipe("rollback"),
        engine=ENGINE,
        out=tmp_path / "run",
        checkpoint_every="4ba",
        callbacks=(losses,),
    )
    (event,) = events(run.folder)
    assert (event["step"], event["back_to"], event["left_out"]) == (SICK + 1, 8, [SICK + 1])
    schedule = recipe("rollback")
    for step, lr in losses.lr.items():
        factor = 1.0 if step <= 8 else 0.5
        assert lr == schedule.optimizer_at(Time(step - 1, STEPS_PER_EPOCH, STEPS)).lr * factor
    assert [step for step, loss in losses.of.items() if math.isnan(loss)] == [SICK + 1]
    assert [epoch.epoch for epoch in run.history] == [1, 2, 3]
    assert run.history[1].skipped_steps == 1
    assert_sound(run)


def test_rollback_before_the_first_epoch_returns_to_the_start(sick, tmp_path):
    sick(2, 4)
    run = fit(MODEL, DATA, recipe("rollback"), engine=ENGINE, out=tmp_path / "run")
    event = events(run.folder)[-1]
    assert (event["back_to"], event["left_out"]) == (0, [3, 5])
    assert run.checkpoints.load("last").state["lr_factor"] == 0.25
    assert run.history[0].skipped_steps == 2
    assert_sound(run)


def test_rollback_over_an_epoch_takes_its_record_back(sick, tmp_path):
    sick(SICK)
    without = replace(DATA, valid=None)  # no best checkpoint at the end of the first epoch
    run = fit(MODEL, without, recipe("rollback"), engine=ENGINE, out=tmp_path / "run", checkpoint_every="3ep")
    assert events(run.folder)[0]["back_to"] == 0
    assert [epoch.epoch for epoch in run.history] == [1, 2, 3]


def test_statistic_that_overflows_is_not_finite(tmp_path, monkeypatch):
    """The variance is infinite, so the normalized values are 0, and loss and gradient are finite."""
    batches = Loader.batches

    def bright(loader: Loader, first: int, count: int):
        made = batches(loader, first, count)
        if first == SICK:
            made[0].images[...] *= 1e25
        return made

    monkeypatch.setattr(Loader, "batches", bright)
    run = fit(MODEL, DATA, recipe("skip"), engine=ENGINE, out=tmp_path / "run", checkpoint_every="1ba")
    assert [event["step"] for event in events(run.folder)] == [SICK + 1]
    assert_sound(run)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_run_that_is_never_finite_ends(policy, sick, tmp_path):
    sick(*range(STEPS))
    given = recipe(policy, non_finite=NonFinite(policy, limit=3))
    with pytest.raises(TrainingError, match=r"step 4: .* not finite for the 4th time"):
        fit(MODEL, DATA, given, engine=ENGINE, out=tmp_path / "run")


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_policies_resume(policy, sick, tmp_path):
    """What was left out, and the lowered lr, are part of the state."""
    sick(SICK)
    undisturbed = fit(MODEL, DATA, recipe(policy), engine=ENGINE, out=tmp_path / "a", checkpoint_every="1ba")

    class Stop(Callback):
        def on_step(self, step: StepEvent) -> None:
            if step.step == SICK + 2:
                raise KeyboardInterrupt

    options = {"engine": ENGINE, "out": tmp_path / "b", "checkpoint_every": "1ba"}
    with pytest.raises(KeyboardInterrupt):
        fit(MODEL, DATA, recipe(policy), callbacks=(Stop(),), **options)
    resumed = fit(MODEL, DATA, recipe(policy), resume=True, **options)
    np.testing.assert_array_equal(resumed.params.flat, undisturbed.params.flat)
    assert resumed.history[1].skipped_steps == 1


# ---------------------------------------------------------------------------------------------------- sick weights


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    given = ENGINE.executor(MODEL, None, recipe("raise")).params
    given["0.weight"][0, 0, 1, 1] = math.nan
    with pytest.raises(TrainingError, match=r"step 0: 0\.weight is not finite, so it is not saved"):
        fit(MODEL, DATA, recipe("raise"), engine=ENGINE, params=given, out=tmp_path / "run")
    assert Run.load(tmp_path / "run").checkpoints.steps == ()


def test_validation_that_is_not_finite_is_never_the_best(tmp_path, monkeypatch):
    """The first epoch's loss is NaN and its accuracy perfect by accident; early stopping looks at the loss."""
    measure, calls = train.evaluate, []

    def sick_at_first(*args):
        calls.append(1)
        measured = measure(*args)
        return measured._replace(loss=math.nan) if len(calls) == 1 else measured

    monkeypatch.setattr(train, "evaluate", sick_at_first)
    run = fit(
        MODEL, DATA, recipe("raise", early_stopping=EarlyStopping(patience=3)), engine=ENGINE, out=tmp_path / "run"
    )
    assert run.checkpoints.best_step is not None
    assert run.checkpoints.best_step > STEPS_PER_EPOCH


def assert_sound(run: Run) -> None:
    """Every checkpoint that is there holds finite numbers."""
    for step in run.checkpoints.steps:
        checkpoint = run.checkpoints.load(step)
        for name, array in {**checkpoint.model, **checkpoint.optimizer}.items():
            assert np.isfinite(array).all(), (step, name)
