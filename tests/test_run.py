"""A run directory: made once, written by one process, resumed without doubles, read by anyone."""

import json
import math
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from convolt.engines.im2col import Im2col
from convolt.errors import CheckpointError, ConfigError, ConvoltError, RunError, ShapeError
from convolt.history import Epoch
from convolt.layers import BatchNorm2d, Conv2d, Dense, Flatten, ReLU
from convolt.model import Model
from convolt.params import Params
from convolt.recipe import Recipe, plain
from convolt.run import Run

CONFIG = {"model": {"type": "lenet5"}, "recipe": {"batch_size": 128, "optimizer": {"lr": 1e-3, "betas": (0.9, 0.999)}}}


def epoch(number: int, **changes: float | None) -> Epoch:
    record = Epoch(number, 1 / number, 0.9, 0.6, 0.8, 1e-3, 2.0, 1000.0)
    return replace(record, **changes)


def arrays(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(4, value, np.float32)}


def train(run: Run, *epochs: int, best: int | None = None) -> None:
    for number in epochs:
        run.log_epoch(epoch(number))
        run.save_checkpoint(number * 10, arrays(number), {"m": np.zeros(4)}, {"epoch": number}, best=number == best)


def interrupted(folder: Path, *epochs: int, best: int | None = None) -> Path:
    with Run.create(CONFIG, out=folder) as run:
        train(run, *epochs, best=best)
    return folder


# ------------------------------------------------------------------------------------------------------------ create


def test_record_tells_what_replays_the_run(tmp_path: Path) -> None:
    with Run.create(CONFIG, out=tmp_path / "a", threads=2):
        record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["config"]["recipe"]["optimizer"] == {"lr": 1e-3, "betas": [0.9, 0.999]}
    assert record["command"] == sys.argv
    assert "gives the same bits" in record["reproducibility"]
    assert record["environment"]["packages"]["numpy"] == np.__version__
    assert record["environment"]["threads"] == 2
    assert record["environment"]["cpu"].keys() == {"model", "features"}


# ----------------------------------------------------------------------------------------------- history and metrics


def test_history_is_what_was_logged_and_what_is_loaded(tmp_path: Path) -> None:
    records = (epoch(1), epoch(2, valid_loss=None, valid_accuracy=None), epoch(3, skipped_steps=2))
    with Run.create(CONFIG, out=tmp_path) as run:
        for record in records:
            run.log_epoch(record)
            run.log("note", {"step": 3})
            assert Run.load(tmp_path).history[-1] == record  # at once visible to a reader
        assert run.history == records
    assert run.history == Run.load(tmp_path).history == records
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["epoch", "note"] * 3
    assert lines[0].keys() == {"event"} | {field.name for field in fields(Epoch)}


def test_loss_that_is_not_finite_keeps_the_file_json(tmp_path: Path) -> None:
    with Run.create(CONFIG, out=tmp_path) as run:
        run.log_epoch(epoch(1, train_loss=math.nan, valid_loss=math.inf))
    assert '"train_loss": null' in (tmp_path / "metrics.jsonl").read_text()
    (record,) = Run.load(tmp_path).history
    assert math.isnan(record.train_loss)
    assert record.valid_loss is None


def test_save_metrics_has_one_array_per_field(tmp_path: Path) -> None:
    with Run.create(CONFIG, out=tmp_path / "run") as run:
        train(run, 1, 2)
        run.log_epoch(epoch(3, valid_loss=None, valid_accuracy=None))
        run.save_metrics(tmp_path / "metrics")  # exactly this name
    with np.load(tmp_path / "metrics") as saved:
        assert set(saved) == {field.name for field in fields(Epoch)}
        np.testing.assert_array_equal(saved["epoch"], [1, 2, 3])
        np.testing.assert_array_equal(saved["valid_loss"], [0.6, 0.6, np.nan])
    with pytest.raises(RunError, match="cannot save the metrics as"):
        run.save_metrics(tmp_path / "not" / "there.npz")


def test_torn_last_line_is_passed_over_and_then_repaired(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, 1, 2)
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(1, 100, 7):
        path.write_bytes(whole + whole[: len(whole) // 2 - cut])
        assert Run.load(folder).history == (epoch(1), epoch(2))
    run, checkpoint = Run.resume(folder)
    with run:
        assert checkpoint is not None
        assert checkpoint.warnings == ()
        assert path.read_bytes() == whole
        run.log_epoch(epoch(3))
    assert Run.load(folder).history == (epoch(1), epoch(2), epoch(3))


def test_damaged_line_is_named(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, 1)
    for text, words in (("nonsense", "line 1: not JSON"), ("[1]", "line 1: not a JSON object")):
        (folder / "metrics.jsonl").write_text(text + "\n")
        with pytest.raises(RunError, match=words):
            Run.load(folder)
    (folder / "metrics.jsonl").write_text('{"event": "epoch", "epoch": 1}\n')
    with pytest.raises(RunError, match="line 1: an epoch must have 'train_loss'"):
        Run.load(folder)


# ------------------------------------------------------------------------------------------------------------ resume


def test_resume_goes_on_without_doubles(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, 1, 2)
    run, checkpoint = Run.resume(folder)
    with run:
        assert checkpoint is not None
        assert checkpoint.step == 20
        assert checkpoint.state["epoch"] == 2
        run.log_epoch(epoch(3))  # killed here: no checkpoint covers it
        run.log("note", {})
    run, checkpoint = Run.resume(folder)
    with run:
        assert run.history == (epoch(1), epoch(2))
        train(run, 3, 4)
        run.finish({"test_accuracy": 0.5})
    assert [record.epoch for record in Run.load(folder).history] == [1, 2, 3, 4]
    assert "note" not in (folder / "metrics.jsonl").read_text()
    assert len(Run.load(folder).record["resumed"]) == 2


def test_resume_before_the_first_checkpoint_starts_afresh(tmp_path: Path) -> None:
    with Run.create(CONFIG, out=tmp_path) as run:
        run.log_epoch(epoch(1))
    run, checkpoint = Run.resume(tmp_path)
    with run:
        assert checkpoint is None
        assert run.history == ()


def test_resume_from_a_damaged_checkpoint_takes_back_its_epoch_and_says_so(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, 1, 2)
    os.truncate(folder / "checkpoints" / "step-000020" / "model.safetensors", 9)
    run, checkpoint = Run.resume(folder)
    with run:
        assert checkpoint is not None
        assert checkpoint.step == 10
        assert "fell back to step-000010" in checkpoint.warnings[0]
        assert run.history == (epoch(1),)


def test_resume_with_lost_metrics_says_so(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, 1, 2)
    path = folder / "metrics.jsonl"
    for lost, left in ((20, (epoch(1),)), (path.stat().st_size, ())):
        os.truncate(path, max(path.stat().st_size - lost, 0))
        run, checkpoint = Run.resume(folder)
        with run:
            assert checkpoint is not None
            assert "some epochs are missing" in checkpoint.warnings[0]
            run.log_epoch(epoch(3))  # begins on a line of its own
        assert Run.load(folder).history == (*left, epoch(3))


def test_resume_sweeps_what_a_kill_left(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, 1)
    (folder / ".tmp-1-abcd-run.json").touch()
    (folder / "checkpoints" / ".tmp-1-abcd").mkdir()
    run, _ = Run.resume(folder)
    run.close()
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_resume_completes_the_mark_of_the_best(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, 1, 2, best=2)
    for text in ('{\n "step": 10,\n "folder": "step-000010"\n}\n', "damaged"):  # killed before the mark was moved
        (folder / "checkpoints" / "best.json").write_text(text)
        run, _ = Run.resume(folder)
        run.close()
        assert run.checkpoints.best_step == 20


def test_resume_compares_the_configuration(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, 1)
    Run.resume(folder, CONFIG)[0].close()
    other = {**CONFIG, "recipe": {"batch_size": 64, "optimizer": {"lr": 1e-3, "betas": (0.9, 0.999)}}}
    with pytest.raises(ConfigError, match=r"recipe.batch_size: the run in .* has 128, given was 64"):
        Run.resume(folder, other)
    run, _ = Run.resume(folder, other, may_change=("recipe.batch_size",))
    run.close()
    assert Run.load(folder).config["recipe"]["batch_size"] == 64
    with pytest.raises(ConfigError, match=r"engine\.threads"):
        Run.resume(folder, {**other, "engine": {"threads": 2}})
    Run.resume(folder, {**other, "engine": {"threads": 2}}, may_change=("engine",))[0].close()


def test_resume_warns_of_another_machine(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, 1)
    record = json.loads((folder / "run.json").read_text())
    record["environment"]["packages"]["numpy"] = "1.0"
    (folder / "run.json").write_text(json.dumps(record))
    run, checkpoint = Run.resume(folder)
    run.close()
    assert checkpoint is not None
    assert f"packages.numpy 1.0 -> {np.__version__}" in checkpoint.warnings[0]


def test_resume_refuses_another_model(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"tensor 'w' is \(4,\), the model needs \(5,\)"):
        Run.resume(folder, expect={"w": (5,)})
    Run.resume(folder, expect={"w": (4,)})[0].close()  # the refusal gave the lock back


def test_finished_run_that_goes_on_is_unfinished(tmp_path: Path) -> None:
    with Run.create(CONFIG, out=tmp_path) as run:
        train(run, 1)
        run.finish({"test_accuracy": 0.5})
    run, _ = Run.resume(tmp_path)
    with run:
        assert run.finished
        run.log_epoch(epoch(2))
        assert not run.finished
    assert Run.load(tmp_path).result is None


def test_rewind_forgets_what_the_checkpoint_does_not_cover(tmp_path: Path) -> None:
    with Run.create(CONFIG, out=tmp_path) as run:
        train(run, 1, 2)
        run.log_epoch(epoch(3))
        run.rewind(run.checkpoints.load(10))
        assert run.history == (epoch(1),)
        run.log("non_finite", {"step": 30})
        train(run, 2, 3)
    assert run.history == Run.load(tmp_path).history == (epoch(1), epoch(2), epoch(3))


# ----------------------------------------------------------------------------------------------------- using a model

MODEL = Model((2, 4, 4), (Conv2d(2, 3, 3), BatchNorm2d(3), ReLU(), Flatten(), Dense(12, 5)))
IMAGES = np.random.default_rng(0).integers(0, 256, (300, 2, 4, 4), dtype=np.uint8)


@pytest.fixture
def trained(tmp_path: Path) -> Run:
    """A run with two checkpoints, of seeds 1 (the best) and 2 (the last)."""
    config = {"model": plain(MODEL), "recipe": plain(Recipe(precision="fp64")), "engine": plain(Im2col(threads=1))}
    with Run.create(config, out=tmp_path / "trained") as run:
        for seed in (1, 2):
            run.save_checkpoint(seed, weights(seed).state_dict(), {}, {}, best=seed == 1)
        return run


def weights(seed: int) -> Params:
    return Params.init(MODEL, seed, np.float64)


def test_model_recipe_and_weights_come_back(trained: Run) -> None:
    loaded = Run.load(trained.folder)
    assert loaded.model == MODEL
    assert loaded.recipe == Recipe(precision="fp64")
    assert loaded.params.dtype == np.float64
    np.testing.assert_array_equal(loaded.params.flat, weights(1).flat)


@pytest.mark.parametrize(("kept", "seed"), [("best", 1), ("last", 2)])
def test_weights_are_those_that_the_result_is_of(trained: Run, kept: str, seed: int) -> None:
    run, _ = Run.resume(trained.folder)
    with run:
        run.finish({"weights": kept})
    np.testing.assert_array_equal(Run.load(trained.folder).params.flat, weights(seed).flat)


def test_weights_of_another_checkpoint_are_not_taken_in_silence(trained: Run) -> None:
    os.truncate(trained.folder / "checkpoints" / "step-000001" / "model.safetensors", 9)
    with pytest.warns(UserWarning, match="fell back to step-000002"):
        taken = Run.load(trained.folder).params
    np.testing.assert_array_equal(taken.flat, weights(2).flat)


def test_predict_gives_probabilities(trained: Run) -> None:
    torch = pytest.importorskip("torch")
    logits = Im2col(threads=1).executor(MODEL, weights(1), Recipe(precision="fp64")).predict(IMAGES)
    expected = torch.softmax(torch.from_numpy(np.ascontiguousarray(logits)), dim=1).numpy()
    probabilities = Run.load(trained.folder).predict(IMAGES)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected, rtol=1e-6)
    np.testing.assert_allclose(trained.predict(IMAGES / 255, engine=Im2col(threads=1)), expected, rtol=1e-6)
    assert trained.predict(IMAGES[:0]).shape == (0, 5)


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 1, 4, 4), (3, 32), ()])
def test_predict_refuses_other_shapes(trained: Run, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"images must be \(N, 2, 4, 4\); got") as caught:
        trained.predict(np.zeros(shape, np.uint8))
    assert ("images[None]" in str(caught.value)) == (shape == (2, 4, 4))


# ------------------------------------------------------------------------------------------------------ load, result


def test_result(tmp_path: Path) -> None:
    with Run.create(CONFIG, out=tmp_path) as run:
        assert (run.result, run.test_accuracy, run.test_loss, run.finished) == (None, None, None, False)
        run.finish({"test_accuracy": np.float32(0.5), "test_loss": 0.25, "epochs": 3})
    for same in (run, Run.load(tmp_path)):
        assert (same.test_accuracy, same.test_loss, same.finished) == (0.5, 0.25, True)
        assert same.result == {"test_accuracy": 0.5, "test_loss": 0.25, "epochs": 3, "run": str(tmp_path)}


def test_loading_changes_nothing(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, 1)
    (folder / "checkpoints" / ".tmp-1-abcd").mkdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run = Run.load(folder)
    assert run.history == (epoch(1),)
    for write in (lambda: run.log_epoch(epoch(2)), lambda: run.finish({}), lambda: run.save_checkpoint(1, {}, {}, {})):
        with pytest.raises(RunError, match="is open for reading only"):
            write()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is not a run: it has no run.json"),
        ("", "is damaged: it is not JSON"),
        ("[]", "is damaged: it is not a JSON object"),
        ('{"format": 9}', "has format 9, this version of Convolt reads 1"),
        ('{"format": 1}', "must hold a config and an environment"),
    ],
)
def test_what_is_no_run_is_told(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    before = os.listdir(tmp_path)
    for attempt in (Run.load, Run.resume):
        with pytest.raises(ConvoltError, match=words) as caught:
            attempt(tmp_path)
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == before
