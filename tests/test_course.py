"""How many steps are taken in one call, and that it changes nothing but the time."""

import itertools
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from engine_cases import ENGINES
from hypothesis import given
from hypothesis import strategies as st
from small_runs import BATCH, MODEL, PLAIN, STEPS, STEPS_PER_EPOCH, SignalAt, dataset, fingerprint, spoil_images

from convolt import course, train
from convolt.augment import Mixup
from convolt.callbacks import Callback, StepEvent
from convolt.comms import Serial
from convolt.course import LONGEST, MOST_STEPS, Course
from convolt.duration import Time, due, length
from convolt.engine import Executor, StepInput
from convolt.engines.im2col import Im2col
from convolt.engines.jit import JIT
from convolt.engines.jit.executor import JitExecutor
from convolt.errors import ConfigError, DataError, Interrupted, TrainingError
from convolt.loader import Loader
from convolt.losses import MSE, CrossEntropy
from convolt.optimizers import EMA, SGD, Adam
from convolt.parallel import Parallel
from convolt.progress import Progress
from convolt.recipe import NonFinite, Recipe
from convolt.run import Run
from convolt.schedules import Cosine, Piecewise, Plateau
from convolt.signals import StopRequest
from convolt.step import Stepper
from convolt.train import fit

ENGINE = JIT(threads=2)
FLOATS = dataset(np.float32)
LOSS = CrossEntropy()


def recipe(**changes) -> Recipe:
    common = {"epochs": 3, "batch_size": BATCH, "seed": 3, "optimizer": Adam(lr=3e-3), "schedule": Cosine()}
    return Recipe(**{**common, **changes})


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many steps each call of the engine was asked for."""
    asked: list[int] = []
    train_steps = JitExecutor.train_steps

    def told(executor, steps, loss, meanwhile=None):
        asked.append(len(steps))
        return train_steps(executor, steps, loss, meanwhile)

    monkeypatch.setattr(JitExecutor, "train_steps", told)
    return asked


@pytest.fixture
def made(monkeypatch) -> list[tuple[int, int]]:
    """Of which steps batches were made: the first, and how many."""
    asked: list[tuple[int, int]] = []
    batches = Loader.batches
    monkeypatch.setattr(Loader, "batches", lambda loader, *what: asked.append(what) or batches(loader, *what))
    return asked


@pytest.fixture
def patient(monkeypatch) -> None:
    """However slow this machine is."""
    monkeypatch.setattr(course, "LONGEST", 1e9)


def singly(monkeypatch) -> None:
    monkeypatch.setattr(course, "MOST_STEPS", 1)


# --------------------------------------------------------------------------------------------------- how many they are


@given(
    steps_per_epoch=st.integers(1, 30),
    epochs=st.integers(1, 4),
    checkpoint_every=st.sampled_from(["1ep", "1ba", "3ba", "7ba", "0.3dur", "0.5ep", "100ep"]),
    dropout_from=st.sampled_from(["0ba", "5ba", "1ep", "0.4dur", "9ep"]),
    left_out=st.lists(st.integers(0, 120), max_size=4),
    pace=st.none() | st.sampled_from([0.0, 1e-4, LONGEST / 3, LONGEST, 1.0]),
)
def test_nothing_is_due_within_a_stretch(steps_per_epoch, epochs, checkpoint_every, dropout_from, left_out, pace):
    given = recipe(epochs=epochs, dropout_from=dropout_from)
    state = SimpleNamespace(progress=Progress(left_out=left_out))
    loader, stepper = SimpleNamespace(steps_per_epoch=steps_per_epoch), SimpleNamespace(fuses=True)
    planned = Course(given, loader, stepper, state, checkpoint_every, None)
    planned.pace = pace
    step = 0
    while step < planned.total_steps:
        count = planned.stretch(step)
        assert 1 <= count <= min(MOST_STEPS, max(1, LONGEST / pace) if pace else MOST_STEPS)
        assert pace is not None or count == 1
        for inside in range(step + 1, step + count):
            assert inside % steps_per_epoch
            assert not due(checkpoint_every, Time(inside, steps_per_epoch, planned.total_steps))
        within = range(step, step + count)
        assert count == 1 or not set(within) & set(left_out)
        assert len({one >= length(dropout_from, planned.time(one)) for one in within}) == 1
        assert {planned.dropout(one) for one in within} == {planned.dropout(step)}
        step += count
    assert step == planned.total_steps


@pytest.mark.usefixtures("patient")
def test_a_fast_step_is_one_of_many_in_a_call(calls, made, tmp_path):
    """The second one was made ahead when nobody knew how fast they are. No batch is made twice."""
    fit(PLAIN, dataset(), recipe(), engine=ENGINE, out=tmp_path / "run")
    assert calls == [1, 1, STEPS_PER_EPOCH - 2, STEPS_PER_EPOCH, STEPS_PER_EPOCH]
    assert made[:2] == [(0, 1)] * 2, "before the first step"
    assert made[2:] == list(zip([0, 1, 2, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH], calls, strict=True))


@pytest.mark.usefixtures("patient")
def test_a_step_takes_its_part_of_a_calls_time(tmp_path, monkeypatch):
    """By a clock that a second passes on with each look: three calls in the first epoch, and one in the others."""
    monkeypatch.setattr(train, "clock", SimpleNamespace(perf_counter=itertools.count(0.0).__next__))
    monkeypatch.setattr(JitExecutor, "compile_seconds", 0.0)
    run = fit(PLAIN, dataset(), recipe(), engine=ENGINE, out=tmp_path / "run")
    np.testing.assert_allclose([epoch.train_seconds for epoch in run.history], [3, 1, 1])


def test_a_slow_step_is_a_call(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "LONGEST", 1e-6)
    fit(PLAIN, dataset(), recipe(), engine=ENGINE, out=tmp_path / "run")
    assert calls == [1] * STEPS


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    "changes",
    [
        *({"ema": EMA(0.9)}, {"clip_norm": 1.0}, {"clip_value": 0.1}, {"micro_batch_size": 5}),
        *({"loss": MSE()}, {"augment": (Mixup(),)}),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_the_host_does_between_two_steps_is_done_there(changes, calls, made, tmp_path, monkeypatch):
    fit(PLAIN, dataset(), recipe(**changes), engine=ENGINE, out=tmp_path / "run")
    assert set(calls) <= {1}
    assert {count for _, count in made} == {1}
    singly(monkeypatch)
    fit(PLAIN, dataset(), recipe(**changes), engine=ENGINE, out=tmp_path / "singly")
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "singly")


# ----------------------------------------------------------------------------------------------- the same, only faster


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": SGD(lr=0.05, momentum=0.9, dampening=0.5), "precision": "bf16"},
        {"schedule": Plateau(patience=0, threshold=0.5)},
        {"batch_size": 90},
    ],
    ids=["adam", "momentum-bf16", "plateau", "a last batch that is small"],
)
@pytest.mark.parametrize("checkpoint_every", ["1ep", "4ba"])
@pytest.mark.usefixtures("patient")
def test_calls_of_several_steps_give_the_same_run(changes, checkpoint_every, calls, tmp_path, monkeypatch):
    options = {"engine": ENGINE, "checkpoint_every": checkpoint_every}
    fit(PLAIN, dataset(), recipe(**changes), out=tmp_path / "together", **options)
    together = list(calls)
    calls.clear()
    singly(monkeypatch)
    fit(PLAIN, dataset(), recipe(**changes), out=tmp_path / "singly", **options)
    assert max(together) > 1
    assert set(calls) == {1}
    assert fingerprint(tmp_path / "together") == fingerprint(tmp_path / "singly")


class Told(Callback):
    """What was told of each step."""

    def __init__(self) -> None:
        self.steps: list[StepEvent] = []

    def on_step(self, step: StepEvent) -> None:
        self.steps.append(step)


@pytest.mark.usefixtures("patient")
def test_every_step_is_told_in_its_turn(tmp_path, monkeypatch):
    told = [Told(), Told()]
    fit(PLAIN, dataset(), recipe(), engine=ENGINE, out=tmp_path / "together", callbacks=told[:1])
    singly(monkeypatch)
    fit(PLAIN, dataset(), recipe(), engine=ENGINE, out=tmp_path / "singly", callbacks=told[1:])
    assert [event.step for event in told[0].steps] == list(range(1, STEPS + 1))
    assert told[0].steps == told[1].steps


# -------------------------------------------------------------------------------------------- steps that are not finite


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize(
    "steps",
    [(0,), (STEPS_PER_EPOCH + 2,), (STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH), (STEPS - 1,), (STEPS - 4, STEPS - 2)],
    ids=lambda steps: "-".join(map(str, steps)),
)
def test_a_step_that_is_not_finite_is_met_as_one_by_one(policy, steps, tmp_path, monkeypatch):
    given = recipe(non_finite=NonFinite(policy, limit=4))
    spoil_images(monkeypatch, steps, math.nan)
    told = [Told(), Told()]
    fit(PLAIN, FLOATS, given, engine=ENGINE, out=tmp_path / "together", callbacks=told[:1])
    singly(monkeypatch)
    fit(PLAIN, FLOATS, given, engine=ENGINE, out=tmp_path / "singly", callbacks=told[1:])
    assert fingerprint(tmp_path / "together") == fingerprint(tmp_path / "singly")
    losses = [[(event.step, repr(event.loss), event.lr) for event in one.steps] for one in told]
    assert losses[0] == losses[1]
    assert [epoch.skipped_steps for epoch in Run.load(tmp_path / "together").history] == [
        sum(step // STEPS_PER_EPOCH == epoch for step in steps) for epoch in range(3)
    ]


@pytest.mark.usefixtures("patient")
def test_a_step_that_is_not_finite_ends_the_run_if_it_shall(tmp_path, monkeypatch):
    spoil_images(monkeypatch, (STEPS_PER_EPOCH + 2,), math.nan)
    told = Told()
    with pytest.raises(TrainingError, match=f"^step {STEPS_PER_EPOCH + 3}: the loss, the gradient"):
        fit(PLAIN, FLOATS, recipe(), engine=ENGINE, out=tmp_path / "run", callbacks=(told,))
    assert [event.step for event in told.steps] == list(range(1, STEPS_PER_EPOCH + 3))
    assert Run.load(tmp_path / "run").checkpoints.steps[-1] == STEPS_PER_EPOCH


@pytest.mark.parametrize("what", ["schedule", "augment"])
@pytest.mark.usefixtures("patient")
def test_what_cannot_be_made_is_told_when_its_step_comes(what, tmp_path, monkeypatch):
    """Steps before it are taken, one by one, and told."""
    sick = 2 * STEPS_PER_EPOCH + 3
    if what == "schedule":
        given = recipe(schedule=Piecewise((("0ep", 1.0), (f"{sick}ba", -1.0)), interpolate=False))
    else:
        given, made = recipe(), Loader._made

        def limited(loader, step, buffer):
            if step == sick:
                raise DataError("no such picture")
            return made(loader, step, buffer)

        monkeypatch.setattr(Loader, "_made", limited)
    told = Told()
    with pytest.raises((ConfigError, DataError), match=r"lr must be >= 0|no such picture"):
        fit(PLAIN, FLOATS, given, engine=ENGINE, out=tmp_path / "run", callbacks=(told,))
    assert [event.step for event in told.steps] == list(range(1, sick + 1))


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.usefixtures("patient")
def test_a_signal_is_heeded_behind_the_call_and_what_was_done_is_saved(tmp_path):
    fit(PLAIN, dataset(), recipe(), engine=ENGINE, out=tmp_path / "undisturbed")
    ends = [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH, STEPS]
    for end, options in zip(ends, [{}, {"resume": True}, {"resume": True}], strict=True):
        stop = SignalAt(end - 2, signal.SIGTERM)
        with pytest.raises(Interrupted, match=f"SIGTERM after step {end} of {STEPS}, saved"):
            fit(PLAIN, dataset(), recipe(), engine=ENGINE, out=tmp_path / "run", callbacks=(stop,), **options)
    fit(PLAIN, dataset(), recipe(), engine=ENGINE, out=tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "undisturbed")


# ------------------------------------------------------------------------------------------------------- other engines


def test_an_engine_that_gains_nothing_takes_one_step_at_a_time(tmp_path, monkeypatch):
    asked = []
    train_steps = Executor.train_steps

    def told(executor, steps, loss, meanwhile=None):
        asked.append(len(steps))
        return train_steps(executor, steps, loss, meanwhile)

    monkeypatch.setattr(Executor, "train_steps", told)
    fit(PLAIN, dataset(), recipe(), engine=Im2col(threads=1), out=tmp_path / "run")
    assert asked == [1] * STEPS


@pytest.mark.parametrize(("model", "fuses"), [(PLAIN, True), (MODEL, False)], ids=["plain", "norms and dropout"])
def test_statistics_are_put_back_one_step_at_a_time_whatever_an_engine_gains(model, fuses):
    """Those of before a call of several steps would be too old."""
    executor = Im2col(threads=1).executor(model, None, recipe())
    executor.fuses_steps = True
    assert Stepper(executor, recipe(), Serial(), Parallel(), StopRequest()).fuses == fuses
    executor.close()


@pytest.mark.parametrize("entry", ENGINES, ids=lambda entry: entry.name)
@pytest.mark.parametrize("model", [PLAIN, MODEL], ids=["plain", "norms and dropout"])
def test_steps_are_one_behind_another_up_to_one_that_is_not_finite(entry, model):
    executor, other = (entry.make(1).executor(model, None, Recipe(precision=entry.finest)) for _ in range(2))
    loader, optimizer, done = Loader(FLOATS.train, recipe(), FLOATS.num_classes, Serial()), SGD(lr=0.1), []
    steps = [
        StepInput(batch.images, batch.targets, 1 / batch.size, optimizer, batch.rng) for batch in loader.batches(0, 4)
    ]
    results = executor.train_steps(
        [*steps[:2], steps[2]._replace(scale=np.nan), steps[3]], LOSS, lambda: done.append(1)
    )
    assert [math.isfinite(result.loss) for result in results] == [True, True, False]
    assert done in ([], [1])
    for step, result in zip(steps[:2], results, strict=False):
        alone = other.train_step(step.x, step.y, LOSS, step.scale, optimizer, step.rng)
        assert result.loss == alone.loss
        np.testing.assert_array_equal(result.logits, alone.logits)
    np.testing.assert_array_equal(executor.params.flat, other.params.flat)
    assert int(executor.optimizer_state()["step"]) == 2
    for one in (executor, other):
        one.close()


def test_what_is_ahead_is_for_the_steps_that_it_was_made_for(monkeypatch):
    """Not for what comes behind a rollback; a batch that fits is not made again, an optimizer is by another factor."""
    state = SimpleNamespace(progress=Progress())
    given, taken, asked = recipe(epochs=1), [], Loader.batches
    monkeypatch.setattr(Loader, "batches", lambda loader, *what: taken.append(what) or asked(loader, *what))
    loader = Loader(FLOATS.train, given, FLOATS.num_classes, Serial())
    planned = Course(given, loader, SimpleNamespace(fuses=True), state, "100ep", None)
    planned.pace = 1e-3
    planned.ahead(2)
    batches, optimizers = planned.parts(2)
    assert len(batches) == len(optimizers) == planned.stretch(2) == STEPS_PER_EPOCH - 2
    assert taken == [(2, STEPS_PER_EPOCH - 2)]
    fresh = Loader(FLOATS.train, given, FLOATS.num_classes, Serial())
    for step, batch in enumerate(batches, 2):
        np.testing.assert_array_equal(batch.images, fresh.batch(step).images)
    assert [len(part) for part in planned.parts(2)] == [1, 1], "they are given once"
    planned.ahead(2)
    assert [len(part) for part in planned.parts(1)] == [1, 1], "it is another step"
    before = len(taken)
    planned.ahead(STEPS_PER_EPOCH)
    assert len(taken) == before, "nothing is behind the last one"
    state.progress.left_out = [4]
    assert [planned.stretch(step) for step in (2, 4, 5)] == [2, 1, 1]
    planned.ahead(2)
    state.progress.lr_factor = 0.5
    assert [optimizer.lr for optimizer in planned.parts(2)[1]] == [optimizer.lr / 2 for optimizer in optimizers[:2]]
    assert all(one.lr > other.lr for one, other in itertools.pairwise(optimizers))
