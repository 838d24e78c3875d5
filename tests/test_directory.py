"""The directory of a run: one for each, and one process writes in it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import convolt.run
from convolt.errors import RunError
from convolt.run import Run

CONFIG = {"recipe": {"batch_size": 128}}
SECONDS = 60


def test_default_name_tells_model_data_and_time(tmp_path: Path) -> None:
    with Run.create(CONFIG, "mnist-cnn-../data/träin.zip", root=tmp_path / "runs") as run:
        assert re.fullmatch(r"mnist-cnn-..-data-tr-in\.zip-\d{8}T\d{6}Z-[0-9a-f]{6}", run.folder.name)
        assert run.folder.parent == tmp_path / "runs"
        assert sorted(os.listdir(run.folder)) == ["metrics.jsonl", "run.json", "run.lock"]


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
    Run.create(CONFIG, out=tmp_path).close()
    processes = [start(RESUME_TOGETHER, tmp_path) for _ in range(2)]
    release(processes)
    said = sorted(process.stdout.readline().split()[0] for process in processes)
    for process in processes:
        process.communicate(timeout=SECONDS)
    assert said == ["refused", "won"]
