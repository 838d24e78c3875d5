"""A run directory: made once, written by one process, resumed without doubles, read by anyone."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import convolt.run
from convolt.errors import CheckpointError, ConfigError, ConvoltError, RunError
from convolt.history import Epoch
from convolt.run import Run

CONFIG = {"model": {"type": "lenet5"}, "recipe": {"batch_size": 128, "optimizer": {"lr": 1e-3, "betas": (0.9, 0.999)}}}
SECONDS = 60


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


def test_default_name_tells_model_data_and_time(tmp_path: Path) -> None:
    with Run.create(CONFIG, "mnist-cnn-../data/träin.zip", root=tmp_path / "runs") as run:
        assert re.fullmatch(r"mnist-cnn-..-data-tr-in\.zip-\d{8}T\d{6}Z-[0-9a-f]{6}", run.folder.name)
        assert run.folder.parent == tmp_path / "runs"
        assert sorted(os.listdir(run.folder)) == ["metrics.jsonl", "run.json", "run.lock"]


def test_record_tells_what_replays_the_run(tmp_path: Path) -> None:
    with Run.create(CONFIG, out=tmp_path / "a", threads=2):
        record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["config"]["recipe"]["optimizer"] == {"lr": 1e-3, "betas": [0.9, 0.999]}
    assert record["command"] == sys.argv
    assert "gives the same bits" in record["reproducibility"]
    assert record["environment"]["packages"]["numpy"] == np.__version__
    assert record["environment"]["threads"] == 2
    assert record["environment"]["cpu"].keys() == {"model", "features"}


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    with Run.create(CONFIG, out=tmp_path) as run:
        assert run.folder == tmp_path


def test_folder_of_a_run_that_never_began_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run.lock").touch()
    (tmp_path / ".tmp-1-abcd-run.json").touch()
    Run.create(CONFIG, out=tmp_path).close()


def test_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match=r"is not empty and not a run \(it holds thesis.tex\)"):
        Run.create(CONFIG, out=tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(RunError, match="is not a folder"):
        Run.create(CONFIG, out=tmp_path / "thesis.tex")
    with pytest.raises(RunError, match="is not a folder"):
        Run.create(CONFIG, out=tmp_path / "thesis.tex" / "run")


@pytest.mark.parametrize("finished", [True, False])
def test_folder_of_another_run_is_refused_with_the_way_on(tmp_path: Path, finished: bool) -> None:
    with Run.create(CONFIG, out=tmp_path) as run:
        if finished:
            run.finish({})
    kind = "a finished run" if finished else "an unfinished run"
    with pytest.raises(RunError, match=f"holds {kind}; go on with it by --resume"):
        Run.create(CONFIG, out=tmp_path)


def test_failed_create_gives_the_lock_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RunError("no")

    with monkeypatch.context() as patch:
        patch.setattr(convolt.run, "MetricsLog", fail)
        with pytest.raises(RunError, match="no"):
            Run.create(CONFIG, out=tmp_path)
    run, checkpoint = Run.resume(tmp_path)
    assert checkpoint is None
    run.close()


# -------------------------------------------------------------------------------------------------- several processes


def start(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", f"import sys\nfrom convolt.run import Run\n{code}", *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def release(processes: list[subprocess.Popen]) -> None:
    """Let processes that wait for a line go on together, when all of them are there."""
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


HOLD = """
run = Run.create({}, out=sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
"""


def test_second_process_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(HOLD, folder) as holder:
        try:
            assert holder.stdout.readline() == "ready\n"
            for attempt in (lambda: Run.resume(folder), lambda: Run.create(CONFIG, out=folder)):
                with pytest.raises(RunError, match=rf"is in use by process {holder.pid} on "):
                    attempt()
            assert Run.load(folder).config == {}  # looking is free
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.communicate(timeout=SECONDS)
    run, _ = Run.resume(folder)  # the lock ended with its holder
    run.close()


def test_same_process_is_refused_too(tmp_path: Path) -> None:
    with Run.create(CONFIG, out=tmp_path), pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        Run.resume(tmp_path)


START_TOGETHER = """
print("ready", flush=True)
sys.stdin.readline()
run = Run.create({"name": sys.argv[2]}, "cnn-mnist", root=sys.argv[1])
run.log("mine", {"name": sys.argv[2]})
print(run.folder)
"""


def test_sixteen_processes_started_at_once_get_sixteen_folders(tmp_path: Path) -> None:
    processes = [start(START_TOGETHER, tmp_path / "runs", number) for number in range(16)]
    release(processes)
    outputs = [process.communicate(timeout=SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0] * 16, outputs
    folders = [Path(output.strip()) for output, _ in outputs]
    assert len(set(folders)) == 16
    for number, folder in enumerate(folders):
        assert Run.load(folder).config == {"name": str(number)}
        assert json.loads((folder / "metrics.jsonl").read_text()) == {"event": "mine", "name": str(number)}


RESUME_TOGETHER = """
from convolt.errors import RunError
print("ready", flush=True)
sys.stdin.readline()
try:
    run, _ = Run.resume(sys.argv[1])
    print("won", flush=True)
except RunError as error:
    print("refused", error, flush=True)
sys.stdin.read()
"""


def test_of_two_that_resume_one_wins(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, 1)
    processes = [start(RESUME_TOGETHER, folder) for _ in range(2)]
    release(processes)
    said = sorted(process.stdout.readline().split()[0] for process in processes)
    for process in processes:
        process.communicate(timeout=SECONDS)
    assert said == ["refused", "won"]


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
    os.truncate(folder / "metrics.jsonl", 0)
    run, checkpoint = Run.resume(folder)
    with run:
        assert checkpoint is not None
        assert "some epochs are missing" in checkpoint.warnings[0]
        assert run.history == ()


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
