"""The training loop: what it computes, what it tells, what it keeps, what it refuses before it begins."""

import itertools
import json
import math
import threading
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import BATCH, CLASSES, EPOCHS, MODEL, PLAIN, STEPS, STEPS_PER_EPOCH, dataset

from convolt import train
from convolt.augment import Crop
from convolt.callbacks import Callback
from convolt.comms import BlockingSum, Serial
from convolt.data import Dataset, Split
from convolt.duration import Time
from convolt.early_stopping import EarlyStopping
from convolt.engine import Executor
from convolt.engines.im2col import Im2col
from convolt.engines.jit import JIT
from convolt.errors import ConfigError, ConvoltError, EngineError, RunError
from convolt.evaluation import evaluate
from convolt.history import Epoch
from convolt.layers import BatchNorm2d, Conv2d, Dense, Dropout, Flatten, ReLU
from convolt.loader import Loader
from convolt.losses import CrossEntropy, Distillation
from convolt.model import Model
from convolt.optimizers import EMA, SGD, Adam
from convolt.recipe import Recipe
from convolt.run import Run
from convolt.schedules import Cosine, Piecewise, Plateau
from convolt.train import fit

DATA = dataset()
ENGINE = Im2col(threads=1)
RECIPE = Recipe(epochs=EPOCHS, batch_size=BATCH, seed=3, optimizer=SGD(lr=0.05, momentum=0.9), schedule=Cosine())


def trained(folder: Path, recipe: Recipe = RECIPE, model: Model = MODEL, data: Dataset = DATA, **options) -> Run:
    return fit(model, data, recipe, **{"engine": ENGINE, "out": folder / "run", **options})


# ---------------------------------------------------------------------------------------------------- what it learns


@pytest.mark.parametrize("engine", [ENGINE, JIT(threads=2)], ids=["im2col", "jit"])
def test_fit_is_the_loop_written_out(engine, tmp_path):
    executor = engine.executor(MODEL, None, RECIPE)
    loader = Loader(DATA.train, RECIPE, DATA.num_classes, Serial())
    losses = np.zeros(EPOCHS)
    for step in range(STEPS):
        batch = loader.batch(step)
        optimizer = RECIPE.optimizer_at(Time(step, STEPS_PER_EPOCH, STEPS))
        result = executor.train_step(batch.images, batch.targets, RECIPE.loss, 1 / batch.size, optimizer, batch.rng)
        losses[step // STEPS_PER_EPOCH] += result.loss
    run = trained(tmp_path, engine=engine)
    np.testing.assert_array_equal(run.params.flat, executor.params.flat)
    assert [epoch.train_loss for epoch in run.history] == list(losses / len(DATA.train))
    assert run.test_accuracy == evaluate(executor, DATA.test, CrossEntropy()).accuracy


def test_the_next_batch_is_made_while_threads_compute(tmp_path, monkeypatch):
    made = []
    batches = Loader.batches
    monkeypatch.setattr(Loader, "batches", lambda loader, *what: made.append(what) or batches(loader, *what))
    trained(tmp_path, engine=JIT(threads=2))
    assert made == [(0, 1)] * 2 + [(step, 1) for step in range(STEPS)], "twice before the first step"


def test_a_batch_made_ahead_leaves_the_images_that_a_step_reads(tmp_path):
    """They are more than an engine copies before it begins."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (480, 3, 16, 16), np.uint8)
    data = Dataset.from_arrays(images, np.arange(480) % CLASSES, valid=None)
    model = Model((3, 16, 16), (Conv2d(3, 8, 3, padding=1), BatchNorm2d(8), ReLU(), Flatten(), Dense(2048, CLASSES)))
    recipe = Recipe(epochs=4, batch_size=96, seed=3)
    alone = JIT(threads=2).executor(model, None, recipe)
    loader = Loader(data.train, recipe, data.num_classes, Serial())
    for step in range(20):
        batch = loader.batch(step)
        optimizer = recipe.optimizer_at(Time(step, 5, 20))
        alone.train_step(batch.images, batch.targets, recipe.loss, 1 / batch.size, optimizer, batch.rng)
    run = trained(tmp_path, recipe, model, data, engine=JIT(threads=2))
    np.testing.assert_array_equal(run.params.flat, alone.params.flat)


def test_what_cannot_be_made_ahead_fails_in_its_own_step(tmp_path):
    """The third epoch has no rate; two epochs are recorded and saved before that is told."""
    recipe = replace(RECIPE, schedule=Piecewise((("0ep", 1.0), ("2ep", -1.0)), interpolate=False))
    with pytest.raises(ConfigError, match="lr must be >= 0"):
        trained(tmp_path, recipe, engine=JIT(threads=2))
    assert [epoch.epoch for epoch in Run.load(tmp_path / "run").history] == [1, 2]
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())][-1].startswith(
        f"step-{2 * STEPS_PER_EPOCH:06d}"
    )


def test_it_learns(tmp_path):
    run = trained(tmp_path, replace(RECIPE, epochs=15))
    assert run.test_accuracy > 0.9
    assert (run.predict(DATA.test.images).argmax(axis=1) == DATA.test.labels).mean() == run.test_accuracy


def test_micro_batches_are_the_big_batch(tmp_path):
    exact = replace(RECIPE, precision="fp64")
    whole = trained(tmp_path / "whole", exact, PLAIN)
    pieces = trained(tmp_path / "pieces", replace(exact, micro_batch_size=5), PLAIN)
    np.testing.assert_allclose(pieces.params.flat, whole.params.flat, rtol=0, atol=1e-13)
    assert pieces.history[-1].train_accuracy == whole.history[-1].train_accuracy


def test_dropout_begins_when_the_recipe_says(tmp_path):
    def losses(name: str, model: Model, dropout_from: str) -> list[float]:
        run = trained(tmp_path / name, replace(RECIPE, dropout_from=dropout_from), model)
        return [epoch.train_loss for epoch in run.history]

    without = Model(MODEL.input_shape, tuple(Dropout(0) if isinstance(x, Dropout) else x for x in MODEL.layers))
    plain, late, always = losses("a", without, "0ep"), losses("b", MODEL, "2ep"), losses("c", MODEL, "0ep")
    assert late[:2] == plain[:2]
    assert late[2] != plain[2]
    assert always[0] != plain[0]


class Ranks:
    """Threads that stand for processes: an allreduce adds what all of them bring, in the order of the ranks."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.brought: list = [None] * size

    def rank(self, rank: int) -> "Rank":
        return Rank(self, rank)


class Rank:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank, self.size = ranks, rank, len(ranks.brought)
        self.node_rank, self.node_size = rank, self.size

    def allreduce(self, array) -> None:
        self.ranks.brought[self.rank] = array.copy()
        self.ranks.barrier.wait()
        array[...] = sum(self.ranks.brought)
        self.ranks.barrier.wait()

    def home(self, gradient, weights) -> None:
        return None

    def summation(self, array, scattered=False, wire="fp32", home=None) -> BlockingSum:
        return BlockingSum(self, array)

    def broadcast(self, array) -> None:
        array *= self.rank == 0
        self.allreduce(array)

    def barrier(self) -> None:
        self.ranks.barrier.wait()


def test_two_and_three_ranks_give_the_serial_loss_curve(tmp_path):
    """Shards are uneven: 16 samples among 3, and 12 in the last batch of an epoch."""
    exact = replace(RECIPE, precision="fp64")
    serial = trained(tmp_path / "serial", exact, PLAIN)
    for size in (2, 3):
        runs, ranks = {}, Ranks(size)

        def work(rank: Rank, runs: dict = runs, size: int = size) -> None:
            runs[rank.rank] = trained(tmp_path / f"{size}-{rank.rank}", exact, PLAIN, comm=rank)

        threads = [threading.Thread(target=work, args=(ranks.rank(r),)) for r in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for run in runs.values():
            np.testing.assert_allclose(run.params.flat, serial.params.flat, rtol=0, atol=1e-13)
            for ours, theirs in zip(run.history, serial.history, strict=True):
                assert (ours.train_accuracy, ours.valid_accuracy) == (theirs.train_accuracy, theirs.valid_accuracy)
                assert ours.train_loss == pytest.approx(theirs.train_loss, abs=1e-12)
                assert ours.valid_loss == pytest.approx(theirs.valid_loss, abs=1e-12)
            assert run.result["ranks"] == size


def test_given_weights_are_where_it_starts(tmp_path):
    given = ENGINE.executor(MODEL, None, Recipe(seed=99)).params
    before = given.flat.copy()
    first = trained(tmp_path / "a", params=given)
    assert not np.array_equal(first.params.flat, trained(tmp_path / "b").params.flat)
    np.testing.assert_array_equal(given.flat, before)  # they are copied


def test_plateau_lowers_the_rate_of_the_epochs_after(tmp_path):
    run = trained(tmp_path, replace(RECIPE, schedule=Plateau(factor=0.5, patience=0, threshold=0.99)))
    assert [epoch.lr for epoch in run.history] == [0.05, 0.05, 0.025]


def test_distillation_learns_from_a_run(tmp_path):
    teacher = trained(tmp_path / "teacher", replace(RECIPE, epochs=12))
    loss = Distillation(temperature=2.0, alpha=1.0, teacher=str(teacher.folder))
    for name, micro in (("whole", None), ("pieces", 7)):
        student = trained(tmp_path / name, replace(RECIPE, loss=loss, epochs=10, micro_batch_size=micro), PLAIN)
        assert student.test_accuracy > 0.7  # alpha = 1: it never saw a label


# ------------------------------------------------------------------------------------------------- average, best


def test_average_of_the_weights_is_what_is_measured_and_shipped(tmp_path):
    averaged = replace(RECIPE, ema=EMA(0.8, every="2ba"))
    run, without = trained(tmp_path / "a", averaged), trained(tmp_path / "b")
    trained_weights = run.checkpoints.load("last").optimizer["weights"]
    np.testing.assert_array_equal(trained_weights, without.params.flat)  # it does not act on training
    assert not np.array_equal(run.params.flat, trained_weights)
    executor = ENGINE.executor(MODEL, Run.load(run.folder).params, averaged)
    assert evaluate(executor, DATA.valid, CrossEntropy()).loss == pytest.approx(run.history[-1].valid_loss, rel=1e-6)
    assert evaluate(executor, DATA.test, CrossEntropy()).loss == pytest.approx(run.result["test_loss"], rel=1e-6)


# A third of the validation labels are wrong, so its loss rises again as soon as the network is sure of itself.
WRONG = DATA.valid.labels + (np.arange(len(DATA.valid)) % 3 == 0)
DOUBTFUL = replace(DATA, valid=Split(DATA.valid.images, WRONG % CLASSES))
WORSE = replace(RECIPE, epochs=8, optimizer=SGD(lr=0.1, momentum=0.9), early_stopping=EarlyStopping(patience=2))


@pytest.mark.parametrize("ema", [None, EMA(0.5)], ids=["plain", "average"])
def test_early_stopping_restores_the_best_when_patience_ends_the_run(ema, tmp_path):
    run = trained(tmp_path, replace(WORSE, ema=ema), data=DOUBTFUL)
    losses = [epoch.valid_loss for epoch in run.history]
    best = min(losses)
    assert len(losses) == losses.index(best) + 1 + 2 < 8
    assert run.checkpoints.best_step == (losses.index(best) + 1) * STEPS_PER_EPOCH
    assert run.result["weights"] == "best"
    for weights in (run.params, Run.load(run.folder).params):
        executor = ENGINE.executor(MODEL, weights, WORSE)
        assert evaluate(executor, DOUBTFUL.valid, CrossEntropy()).loss == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("monitor", ["valid_loss", "valid_accuracy"])
def test_early_stopping_restores_the_best_when_the_epochs_end_the_run(monitor, tmp_path):
    run = trained(tmp_path, replace(WORSE, early_stopping=EarlyStopping(patience=20, monitor=monitor)), data=DOUBTFUL)
    values = [getattr(epoch, monitor) for epoch in run.history]
    best = min(values) if monitor == "valid_loss" else max(values)
    assert len(values) == 8
    assert run.checkpoints.best_step == (values.index(best) + 1) * STEPS_PER_EPOCH
    executor = ENGINE.executor(MODEL, run.params, WORSE)
    measured = evaluate(executor, DOUBTFUL.valid, CrossEntropy())
    assert getattr(measured, monitor.removeprefix("valid_")) == pytest.approx(best, rel=1e-6)


def test_without_early_stopping_the_last_weights_are_kept_and_the_best_can_be_had(tmp_path):
    run = trained(tmp_path, replace(WORSE, early_stopping=None), data=DOUBTFUL)
    assert run.result["weights"] == "last"
    accuracies = [epoch.valid_accuracy for epoch in run.history]
    assert run.checkpoints.best_step == (accuracies.index(max(accuracies)) + 1) * STEPS_PER_EPOCH
    np.testing.assert_array_equal(run.params["0.weight"], run.checkpoints.load("last").model["0.weight"])


# ------------------------------------------------------------------------------------------------ what is recorded


def test_history_and_result_hold_what_is_promised(tmp_path):
    run = trained(tmp_path)
    assert {field.name for field in fields(Epoch)} >= {
        *("epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"),
        *("lr", "train_seconds", "images_per_second"),
    }
    for number, epoch in enumerate(run.history, 1):
        assert epoch.epoch == number
        assert epoch.images_per_second * epoch.train_seconds == pytest.approx(len(DATA.train))
    assert run.result == json.loads((run.folder / "result.json").read_text())
    expected = {"epochs": EPOCHS, "engine": "im2col", "precision": "fp32", "threads": 1, "ranks": 1, "seed": 3}
    assert run.result.items() >= {**expected, "run": str(run.folder)}.items()
    assert run.result["train_seconds"] == pytest.approx(sum(epoch.train_seconds for epoch in run.history))


def test_compiling_is_no_part_of_a_step(tmp_path, monkeypatch):
    """An engine that says it compiled for an hour in every step has trained for an hour a step less."""
    hours = (3600.0 * n for n in itertools.count())
    monkeypatch.setattr(Executor, "compile_seconds", property(lambda _: next(hours)))
    run = trained(tmp_path)
    assert run.result["train_seconds"] / (EPOCHS * STEPS_PER_EPOCH) == pytest.approx(-3600, abs=60)
    assert run.result["compile_seconds"] > 0


def test_without_validation_and_test_their_metrics_are_absent(tmp_path):
    bare = replace(DATA, valid=None, test=None)
    run = trained(tmp_path, data=bare)
    assert run.history[0].valid_loss is run.history[0].valid_accuracy is None
    assert "valid_loss" not in (run.folder / "metrics.jsonl").read_text()
    assert run.test_accuracy is None
    assert not {"test_accuracy", "test_loss"} & run.result.keys()
    assert run.checkpoints.best_step is None


def test_test_images_are_looked_at_once(tmp_path, monkeypatch):
    seen = []

    def counted(executor, split, *rest):
        seen.append(split)
        return evaluate(executor, split, *rest)

    monkeypatch.setattr(train, "evaluate", counted)
    trained(tmp_path)
    assert seen == [DATA.valid] * EPOCHS + [DATA.test]


def test_checkpoints_come_when_they_are_due(tmp_path):
    steps = trained(
        tmp_path / "a", checkpoint_every="5ba", keep_last=99, data=replace(DATA, valid=None)
    ).checkpoints.steps
    assert steps == (5, 10, 15, STEPS)
    few = trained(tmp_path / "b", checkpoint_every="5ba", keep_last=2, data=replace(DATA, valid=None)).checkpoints.steps
    assert few == (15, STEPS)


def test_no_epochs_are_a_run_too(tmp_path):
    run = trained(tmp_path, replace(RECIPE, epochs=0))
    assert (run.history, run.result["epochs"]) == ((), 0)
    first = ENGINE.executor(MODEL, None, RECIPE).params
    np.testing.assert_array_equal(Run.load(run.folder).params.flat, first.flat)


class Diary(Callback):
    def __init__(self) -> None:
        self.lines: list = []

    def on_start(self, run) -> None:
        self.lines.append("start")

    def on_step(self, step) -> None:
        self.lines.append(step)

    def on_epoch(self, epoch) -> None:
        self.lines.append(epoch)

    def on_end(self, result) -> None:
        self.lines.append(result)


def test_callbacks_are_told_everything_in_order(tmp_path):
    diary = Diary()
    run = trained(tmp_path, callbacks=(diary,))
    start, *middle, end = diary.lines
    assert (start, end) == ("start", run.result)
    assert [line for line in middle if isinstance(line, Epoch)] == list(run.history)
    steps = [line for line in middle if not isinstance(line, Epoch)]
    assert [(step.step, step.epoch) for step in steps] == [(s + 1, s // STEPS_PER_EPOCH + 1) for s in range(STEPS)]
    assert {step.images for step in steps} == {BATCH, len(DATA.train) % BATCH}
    total = sum(step.loss * step.images for step in steps[:STEPS_PER_EPOCH])
    assert total / len(DATA.train) == pytest.approx(run.history[0].train_loss)
    assert middle[STEPS_PER_EPOCH] == run.history[0]


def test_exception_of_a_callback_ends_the_run_and_is_told_to_all(tmp_path):
    class Fails(Callback):
        def on_epoch(self, epoch) -> None:
            raise ZeroDivisionError

    diary = Diary()
    with pytest.raises(ZeroDivisionError):
        trained(tmp_path, callbacks=(diary, Fails()))
    assert diary.lines[-1] is None
    run, _ = Run.resume(tmp_path / "run")  # the lock was given back
    run.close()


# ------------------------------------------------------------------------------------------------------ what is refused

NO_VALID = replace(DATA, valid=None)
OTHER_CLASSES = Model((1, 8, 8), (Flatten(), Dense(64, 4)))
COLOR = Model((3, 8, 8), (Flatten(), Dense(192, CLASSES)))


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"model": COLOR}, r"the model takes images \(3, 8, 8\), bands has \(1, 8, 8\); build the model with"),
        ({}, {"model": OTHER_CLASSES}, r"the model has outputs \(4,\), bands has 3 classes; end it with Dense"),
        ({"early_stopping": EarlyStopping()}, {"data": NO_VALID}, "early_stopping needs a validation split; .*--valid"),
        ({"schedule": Plateau()}, {"data": NO_VALID}, "Plateau needs a validation split"),
        ({}, {"checkpoint_every": "5"}, "checkpoint_every must be a length with a unit, .*; got '5'"),
        ({"loss": Distillation()}, {}, "Distillation: teacher must be the folder of a run; got ''"),
        ({"loss": Distillation(teacher="no/such")}, {}, "no/such is not a run"),
        ({"augment": (Crop(8),)}, {}, "Crop: padding must be < 8 to mirror images of 8x8; got 8"),
        ({"precision": "bf16"}, {}, "engine im2col: precision must be one of"),
    ],
)
def test_what_cannot_be_is_told_before_there_is_a_folder(changes, options, words, tmp_path):
    with pytest.raises(ConvoltError, match=words) as caught:
        trained(tmp_path, replace(RECIPE, **changes), **options)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError | EngineError | RunError)
    assert not (tmp_path / "run").exists()


def test_teacher_of_other_classes_is_refused(tmp_path):
    generator = np.random.default_rng(0)
    data = Dataset.from_arrays(generator.integers(0, 255, (40, 1, 8, 8), np.uint8), np.arange(40) % 4, valid=None)
    teacher = trained(tmp_path / "teacher", replace(RECIPE, epochs=1), OTHER_CLASSES, data)
    student = replace(RECIPE, loss=Distillation(teacher=str(teacher.folder)))
    with pytest.raises(ConfigError, match=r"teacher must have the student's output_shape \(3,\); .* has \(4,\)"):
        trained(tmp_path / "student", student)


def test_seed_must_fit_the_generator():
    with pytest.raises(ConfigError, match=r"Recipe: seed must be < 2\^64"):
        Recipe(seed=2**64)
    assert Recipe(seed=2**64 - 1).seed == 2**64 - 1


def test_resume_needs_a_folder():
    with pytest.raises(ConfigError, match="resume needs the folder of the run"):
        fit(MODEL, DATA, RECIPE, resume=True)


def test_adam_default_recipe_has_finite_numbers(tmp_path):
    run = trained(tmp_path, Recipe(epochs=1, batch_size=BATCH, optimizer=Adam()))
    assert all(math.isfinite(value) for value in (run.result["test_loss"], run.history[0].valid_loss))
