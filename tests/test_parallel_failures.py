"""What becomes of ranks when one of them fails, is killed or is told to stop: all end, soon, and the run can go on."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from convolt import launch
from convolt.machine import mpi_runtime
from convolt.run import Run

pytest.importorskip("mpi4py", reason="ranks need mpi4py")
PROGRAM = Path(__file__).with_name("failing_ranks.py")
HANGS = 60  # seconds for a start on a busy machine, three steps and the end; a hang would take for ever
SOON = 5  # seconds from a failure to the end of all ranks
TRAIN = (*("train", "--engine", "im2col", "--threads", "1", "--quiet", "--epochs", "3"), "--checkpoint-every", "5ba")


def slow(place: str):
    return pytest.param(place, marks=pytest.mark.slow)


def start(ranks: int, *arguments: str, fault: str = "none@0:0") -> subprocess.CompletedProcess[str]:
    """``convolt ARGUMENTS`` by an mpiexec of one's own, with a fault ``what@rank:step``."""
    words = [*launch.launcher(ranks), sys.executable, "-m", "mpi4py", str(PROGRAM), fault, *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=HANGS, check=False)


def failing(ranks: int, fault: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A training in ``folder``/run with a fault, after which all ranks have ended soon."""
    moment = folder / "moment"
    done = start(ranks, *options, *TRAIN, "--out", str(folder / "run"), fault=f"{fault}@{moment}")
    assert time.monotonic() - float(moment.read_text()) < SOON
    return done


def weights(folder: Path) -> np.ndarray:
    return Run.load(folder).params.flat


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert start(2, *TRAIN, "--out", str(folder)).returncode == 0
    return folder


def lines(text: str) -> list[str]:
    return [line for line in launch.spoken(text.splitlines()) if line.strip()]


@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_on_one_rank_ends_all_with_one_line(rank, tmp_path):
    done = failing(3, f"error@{rank}:7", tmp_path)
    assert done.returncode == 1
    said = [line for line in lines(done.stderr) if "warning" not in line]
    assert said == [f"convolt: error: rank {rank}: on purpose"]
    assert done.stdout == ""


def test_an_error_on_every_rank_is_told_once(tmp_path):
    done = failing(3, "error@-1:7", tmp_path)
    assert done.returncode == 1
    said = [line for line in lines(done.stderr) if "warning" not in line]
    assert len(said) == 1
    assert re.fullmatch(r"convolt: error: rank \d: on purpose", said[0])


def test_debug_shows_the_traceback_of_the_rank_that_failed(tmp_path):
    done = failing(2, "error@1:3", tmp_path, "--debug")
    assert done.returncode == 1
    assert lines(done.stderr)[0].startswith("Traceback")
    assert "convolt: error: rank 1: on purpose" in lines(done.stderr)


def test_a_defect_shows_its_traceback(tmp_path):
    done = failing(2, "defect@0:3", tmp_path)
    assert done.returncode == 1
    assert lines(done.stderr)[0].startswith("Traceback")


@pytest.mark.parametrize("place", [slow("0:7"), "1:7", slow("1:1"), slow("1:22"), slow("0:33")])
def test_a_killed_rank_ends_all_and_the_run_goes_on_with_the_same_bits(place, undisturbed, tmp_path):
    folder = tmp_path / "run"
    assert failing(2, f"kill@{place}", tmp_path).returncode != 0
    assert not Run.load(folder).finished
    goes_on = start(2, "train", "--resume", str(folder), "--quiet")
    assert goes_on.returncode == 0, goes_on.stderr
    np.testing.assert_array_equal(weights(folder), weights(undisturbed))
    ours, theirs = (Run.load(each).history for each in (folder, undisturbed))
    assert [epoch.train_loss for epoch in ours] == [epoch.train_loss for epoch in theirs]
    assert [epoch.train_accuracy for epoch in ours] == [epoch.train_accuracy for epoch in theirs]


@pytest.mark.parametrize("ranks", [1, 3])
def test_it_goes_on_with_another_number_of_ranks(ranks, undisturbed, tmp_path):
    folder = tmp_path / "run"
    assert failing(2, "kill@1:13", tmp_path).returncode != 0
    assert start(ranks, "train", "--resume", str(folder), "--quiet").returncode == 0
    np.testing.assert_allclose(weights(folder), weights(undisturbed), atol=1e-4)


@pytest.mark.parametrize("optimizer", ["plain", "sharded"])
def test_a_signal_to_one_rank_saves_once_and_ends_all(optimizer, undisturbed, tmp_path):
    folder, sharded = tmp_path / "run", optimizer == "sharded"
    own = ("--set", f"parallel.shard_optimizer={sharded}")
    done = start(2, *TRAIN, *own, "--out", str(folder), fault="term@1:7")
    assert done.returncode == 75
    told = [line for line in lines(done.stderr) if "saved" in line]
    assert told == [
        f"convolt: SIGTERM after step 7 of 33, saved; go on with: convolt train --resume {folder} --ranks 2"
    ]
    assert Run.load(folder).checkpoints.steps[-1] == 7
    assert start(2, "train", "--resume", str(folder), "--quiet").returncode == 0
    np.testing.assert_array_equal(weights(folder), weights(undisturbed))


OURS, MPIEXEC = "convolt", "mpiexec"
TO_MPIEXEC = pytest.param(
    MPIEXEC,
    signal.SIGTERM,
    marks=pytest.mark.skipif(mpi_runtime().vendor == "Open MPI", reason="Open MPI's mpiexec kills its ranks"),
)


@pytest.mark.parametrize(("who", "number"), [(OURS, signal.SIGTERM), (OURS, signal.SIGINT), TO_MPIEXEC])
def test_a_signal_to_the_launcher_saves_once_and_ends_all(who, number, tmp_path):
    """To ``convolt train --ranks 2``, or to ``mpiexec``, once the first checkpoint shows that it trains."""
    folder = tmp_path / "run"
    own = [sys.executable, "-m", "convolt", *TRAIN, "--ranks", "2"]
    by_hand = [*launch.launcher(2), sys.executable, "-m", "mpi4py", "-m", "convolt", *TRAIN]
    words = [*(own if who == OURS else by_hand), "--epochs", "1000", "--out", str(folder)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(HANGS, process.kill)
    watchdog.start()
    try:
        while process.poll() is None and not (folder / "checkpoints" / "step-000005").exists():
            os.sched_yield()
        asked = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=HANGS)
    finally:
        watchdog.cancel()
        process.kill()
    assert time.monotonic() - asked < SOON
    assert process.returncode == 75, errors
    assert errors.count("saved") == 1
    assert re.search(rf"convolt: {signal.Signals(number).name} after step \d+ of 11000, saved", errors)


def test_a_killed_rank_under_our_launcher_is_told_in_one_line(tmp_path):
    words = [*launch.launcher(2), sys.executable, "-m", "mpi4py", str(PROGRAM), "kill@1:7", *TRAIN]
    ended = launch.run_command([*words, "--out", str(tmp_path / "run")], timeout=HANGS)
    assert ended.code == 128 + signal.SIGKILL


@pytest.mark.skipif(mpi_runtime().vendor != "MPICH", reason="only MPICH's mpiexec can be told to leave ranks alone")
def test_a_killed_rank_ends_all_where_the_launcher_does_not_care(tmp_path):
    """As under Slurm's srun: the survivors notice by themselves."""
    words = [*launch.launcher(2), "-disable-auto-cleanup", sys.executable, "-m", "mpi4py", str(PROGRAM)]
    words += ["kill@1:7@" + str(tmp_path / "moment"), *TRAIN, "--out", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANGS, check=False)
    assert time.monotonic() - float((tmp_path / "moment").read_text()) < SOON
    assert done.returncode != 0
    if done.stderr:  # now and then MPICH's mpiexec cares after all
        assert "another rank on this machine, is gone" in done.stderr
    assert not Run.load(tmp_path / "run").finished


def test_a_launcher_that_the_library_does_not_know_is_refused(tmp_path):
    """As by srun --mpi=none, which starts two programs that know nothing of one another."""
    environment = {**os.environ, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    words = [sys.executable, "-m", "convolt", *TRAIN, "--out", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANGS, check=False, env=environment)
    assert done.returncode == 1
    (said,) = lines(done.stderr)
    assert "the launcher started 2, and the MPI library knows of 1" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_ranks_decide_alike_about_a_loss_that_is_not_finite(policy, tmp_path):
    folder = tmp_path / "run"
    done = start(3, *TRAIN, "--set", f"non_finite.policy={policy}", "--out", str(folder), fault="nan@2:7")
    assert done.returncode == 0, done.stderr
    run = Run.load(folder)
    assert sum(epoch.skipped_steps for epoch in run.history) == 1
    assert np.isfinite(run.params.flat).all()


def test_a_rank_that_is_not_finite_ends_all_with_one_line(tmp_path):
    done = start(2, *TRAIN, "--out", str(tmp_path / "run"), fault="nan@1:7")
    assert done.returncode == 1
    assert len([line for line in lines(done.stderr) if "is not finite" in line]) == 1


def test_wrong_settings_are_told_once(tmp_path):
    words = [sys.executable, "-m", "convolt", *TRAIN, "--ranks", "2", "--set", "parallel.wire=fp7"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "bf16" in done.stderr


def test_ranks_of_a_launcher_are_not_started_again(tmp_path):
    done = start(2, *TRAIN, "--ranks", "3", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "one of 2 ranks already" in done.stderr
