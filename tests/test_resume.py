"""A run that was ended, however and wherever, and resumed is the run that was not: the same bits."""

import multiprocessing
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_runs
from small_runs import CASES, MODEL, STEPS, STEPS_PER_EPOCH, SignalAt, dataset, fingerprint, start

from convolt.chain import TableExecutor
from convolt.data import Dataset
from convolt.engines.im2col import Im2col
from convolt.errors import CheckpointError, ConfigError, Interrupted, RunError
from convolt.recipe import Recipe
from convolt.run import Run
from convolt.train import fit

EVERYTHING = "adam-plateau-ema-early-stopping"
TIMEOUT = 60

# A fresh process for each run that is killed; forked from one that has imported everything and started no thread.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["small_runs", "convolt.engines.im2col", "torch._dynamo"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The fingerprint of a case's run that nothing interrupted."""
    known: dict[str, dict] = {}

    def of(name: str) -> dict:
        if name not in known:
            if CASES[name].engine == "torch":
                pytest.importorskip("torch")
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            start(name, folder)
            known[name] = fingerprint(folder)
        return known[name]

    return of


def killed(target, name: str, folder: Path, moment: int) -> bool:
    """Start or resume a run in another process; True when it was killed, False when it came to its end first."""
    process = processes.Process(target=target, args=(name, folder, moment))
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


# --------------------------------------------------------------------------------------------------------- kill -9


@pytest.mark.parametrize("name", CASES)
def test_killed_after_chosen_steps(name, undisturbed, tmp_path):
    """The first step; mid-epoch; the epoch's end; the step after a checkpoint; just after the best one was saved."""
    expected = undisturbed(name)
    folder = tmp_path / "run"
    just_after_best = expected["best"] + 1
    for step in sorted({1, 5, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 3, min(just_after_best, STEPS), STEPS}):
        assert killed(small_runs.start_and_die_after_step, name, folder, step) == (step <= expected["state"]["step"])
    start(name, folder)
    assert fingerprint(folder) == expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_killed_at_random_moments(name, seed, undisturbed, tmp_path):
    """Anywhere: in a step, in validation, while a checkpoint is written, renamed, or rotated out."""
    expected = undisturbed(name)
    folder, moments = tmp_path / "run", random.Random(seed)
    kills = sum(killed(small_runs.start_and_die_after_calls, name, folder, moments.randint(1, 25_000)) for _ in "1234")
    assert kills > 0
    start(name, folder)
    assert fingerprint(folder) == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 40))
@pytest.mark.parametrize("name", CASES)
def test_killed_at_many_random_moments(name, seed, undisturbed, tmp_path):
    test_killed_at_random_moments(name, seed, undisturbed, tmp_path)


def test_hash_notices_an_optimizer_that_was_not_restored(undisturbed, tmp_path):
    """The negative control: without the second moments the resumed run is another one."""
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        start(EVERYTHING, folder, SignalAt(8, signal.SIGTERM))
    checkpoints = Run.load(folder).checkpoints
    last = checkpoints.load("last")
    lost = {**last.optimizer, "exp_avg_sq": np.zeros_like(last.optimizer["exp_avg_sq"])}
    checkpoints.save(last.step, last.model, lost, last.state)
    start(EVERYTHING, folder)
    ours, expected = fingerprint(folder), undisturbed(EVERYTHING)
    assert ours["shipped"] != expected["shipped"]
    assert ours["optimizer"] != expected["optimizer"]


# --------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("name", ["momentum-cosine-augment-accumulate", EVERYTHING])
def test_stopped_by_a_signal_after_every_single_step(name, undisturbed, tmp_path):
    expected = undisturbed(name)
    folder, steps = tmp_path / "run", expected["state"]["step"]
    for step in range(1, steps + 1):
        with pytest.raises(
            Interrupted, match=f"SIGTERM after step {step} of {STEPS}, saved; go on with: fit.*resume=True"
        ):
            start(name, folder, SignalAt(step, signal.SIGTERM))
        assert Run.load(folder).checkpoints.steps[-1] == step
        assert not Run.load(folder).finished
    start(name, folder)
    assert fingerprint(folder) == expected


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_signal_in_validation_is_heeded_before_its_next_batch(batch, undisturbed, tmp_path, monkeypatch):
    """The epoch is closed by the run that goes on, exactly once."""
    monkeypatch.setattr("convolt.evaluation.BATCH", 15)  # 3 batches
    expected = undisturbed_in_small_batches(tmp_path)
    predicted = interrupt_prediction(monkeypatch, at=batch)
    folder = tmp_path / "run"
    with pytest.raises(Interrupted, match=f"SIGINT after step {STEPS_PER_EPOCH} of"):
        start(EVERYTHING, folder)
    assert len(predicted) == batch + 1 if batch < 2 else 3
    interrupted = Run.load(folder)
    assert interrupted.checkpoints.steps[-1] == STEPS_PER_EPOCH
    assert len(interrupted.history) == (1 if batch == 2 else 0)  # after the last batch the epoch is closed first
    start(EVERYTHING, folder)
    assert fingerprint(folder) == expected


def test_signal_in_the_test_is_heeded_and_the_test_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr("convolt.evaluation.BATCH", 15)
    expected = undisturbed_in_small_batches(tmp_path)
    validations = len(expected["history"]) * 3
    interrupt_prediction(monkeypatch, at=validations)
    folder = tmp_path / "run"
    with pytest.raises(Interrupted, match=f"after step {expected['state']['step']} of"):
        start(EVERYTHING, folder)
    assert Run.load(folder).result is None
    start(EVERYTHING, folder)
    assert fingerprint(folder) == expected


def undisturbed_in_small_batches(tmp_path: Path) -> dict:
    start(EVERYTHING, tmp_path / "undisturbed")
    return fingerprint(tmp_path / "undisturbed")


def interrupt_prediction(monkeypatch, at: int) -> list[int]:
    """Send SIGINT in the prediction of that number; the list grows with each prediction."""
    predicted: list[int] = []
    predict = TableExecutor.predict

    def counted(executor, images):
        if len(predicted) == at:
            os.kill(os.getpid(), signal.SIGINT)
        predicted.append(len(images))
        return predict(executor, images)

    monkeypatch.setattr(TableExecutor, "predict", counted)
    return predicted


# ------------------------------------------------------------------------------------------- what resuming refuses


def test_finished_run_resumed_gives_the_same_result(undisturbed, tmp_path):
    start(EVERYTHING, tmp_path / "run")
    assert start(EVERYTHING, tmp_path / "run").result is not None
    assert fingerprint(tmp_path / "run") == undisturbed(EVERYTHING)


def test_given_weights_survive_a_kill_before_the_first_checkpoint(tmp_path):
    """They cannot be made again from the seed, so they are saved at once."""
    case = CASES["momentum-cosine-augment-accumulate"]
    given = Im2col(threads=1).executor(MODEL, None, Recipe(seed=9)).params
    run = fit(
        MODEL,
        dataset(),
        case.recipe,
        engine=Im2col(threads=1),
        params=given,
        out=tmp_path / "run",
        checkpoint_every="3ep",
        keep_last=5,
    )
    first = run.checkpoints.load(0)
    np.testing.assert_array_equal(first.model["0.weight"], given["0.weight"])


def test_flipped_bit_is_noticed_and_the_checkpoint_before_it_taken(undisturbed, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        start(EVERYTHING, folder, SignalAt(10, signal.SIGTERM))
    path = folder / "checkpoints" / "step-000010" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"fell back to step-000008: .*model.safetensors has another sha256"):
        start(EVERYTHING, folder)
    assert fingerprint(folder) == undisturbed(EVERYTHING)


def test_other_recipe_data_or_order_is_refused(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        start(EVERYTHING, folder, SignalAt(2, signal.SIGTERM))
    data, case = dataset(), CASES[EVERYTHING]
    other_images = Dataset.from_arrays(data.train.images[::-1], data.train.labels[::-1], valid=None, name="bands")
    reordered = replace(data, train=other_images.train)
    for changed, recipe, words in (
        (data, replace(case.recipe, batch_size=8), r"recipe\.batch_size: the run in .* has 16, given was 8"),
        (reordered, case.recipe, r"data\.digests\.train: the run in"),
    ):
        with pytest.raises(ConfigError, match=words):
            fit(MODEL, changed, recipe, out=folder, resume=True)


def test_run_in_use_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        start(EVERYTHING, tmp_path / "run", SignalAt(2, signal.SIGTERM))
    holder, _ = Run.resume(tmp_path / "run")
    with holder, pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        start(EVERYTHING, tmp_path / "run")


# -------------------------------------------------------------------------------------------------------- full disk


def test_full_disk_ends_the_run_and_keeps_the_checkpoint_before(undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    saves = iter(range(100))
    monkeypatch.setattr("convolt.durable.free_bytes", lambda path: 0 if next(saves) == 2 else 10**9)
    with pytest.raises(CheckpointError, match=r"step-000008: .* is full .*older checkpoints are intact"):
        start(EVERYTHING, folder)
    assert Run.load(folder).checkpoints.load("last").step == 6
    start(EVERYTHING, folder)
    assert fingerprint(folder) == undisturbed(EVERYTHING)
