"""With an MPI that outlives its ranks, a run goes on without those that die: same samples, same curve, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from killed_ranks import STEPS
from ledger import Ledger, assert_same_samples

from convolt import launch
from convolt.errors import ConfigError, EngineError
from convolt.history import read_lines
from convolt.machine import mpi_runtime
from convolt.parallel import Parallel
from convolt.run import Run

PROGRAM, FAILING = (Path(__file__).with_name(name) for name in ("killed_ranks.py", "failing_ranks.py"))
HANGS = 100  # seconds for a whole run on a busy machine
SOON = 5  # seconds from a death to the next step of the others
TRAIN = (*("train", "--engine", "im2col", "--threads", "1", "--quiet", "--epochs", "3"), "--checkpoint-every", "5ba")


def ulfm() -> str | None:
    """Why there is none; None where there is."""
    try:
        launch.launcher(2, elastic=True)
    except EngineError as error:
        return str(error)
    return None


pytest.importorskip("mpi4py", reason="ranks need mpi4py")
MISSING = ulfm()
needs_ulfm = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
needs_none = pytest.mark.skipif(MISSING is None, reason="this MPI has ULFM")


def elastic(ranks: int, folder: Path, faults: str = "-", *settings: str) -> subprocess.CompletedProcess[str]:
    """A run of killed_ranks.py in a folder; what is killed does not end it."""
    words = [*launch.launcher(ranks, elastic=True), sys.executable, "-m", "mpi4py", str(PROGRAM), str(folder), "0"]
    words += [faults, "elastic=true", *settings]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANGS, check=False)
    print(done.stderr)  # whole, where a test fails
    return done


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = elastic(2, folder)
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_run(folder: Path, twin: Path, left: int) -> None:
    """The same samples in every step, each once an epoch, the same losses and weights; by so many ranks in the end."""
    assert (folder / "finished").read_text() == str(left)
    assert_same_samples(folder, twin)
    np.testing.assert_allclose(Ledger(folder).losses, Ledger(twin).losses, rtol=1e-10)
    ours, theirs = (Run.load(each / "run") for each in (folder, twin))
    for name in ("train_loss", "valid_loss", "valid_accuracy"):
        np.testing.assert_allclose(
            [getattr(epoch, name) for epoch in ours.history],
            [getattr(epoch, name) for epoch in theirs.history],
            rtol=1e-10,
        )
    np.testing.assert_allclose(ours.params.flat, theirs.params.flat, rtol=1e-7)
    assert ours.checkpoints.best_step == theirs.checkpoints.best_step
    ours.checkpoints.load(STEPS)
    np.testing.assert_allclose(ours.test_loss, theirs.test_loss, rtol=1e-10)


def drawn(seed: int, ranks: int, deaths: int) -> str:
    """Different ranks die, each at a random moment after the first step."""
    generator = np.random.default_rng(seed)
    victims = generator.permutation(ranks)[:deaths]
    return ",".join(f"{rank}:{generator.integers(1, 130_000)}:steps" for rank in victims)


@needs_ulfm
@pytest.mark.parametrize("fault", ["1:20000:steps", "0:40000:steps"])
def test_the_others_go_on_from_the_same_step(fault, undisturbed, tmp_path):
    done = elastic(3, tmp_path, fault)
    assert done.returncode == 0, done.stderr
    assert len(Ledger(tmp_path).deaths[0]) == 1
    assert max(Ledger(tmp_path).pauses) < SOON
    assert_same_run(tmp_path, undisturbed, 2)


@needs_ulfm
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_any_ranks_may_die_at_any_moment(seed, deaths, undisturbed, tmp_path):
    faults = drawn(seed, 4, deaths)
    done = elastic(4, tmp_path, faults, *[(), ("overlap=false",), ("through_memory=false",)][seed % 3])
    assert done.returncode == 0, (faults, done.stderr)
    died = len(Ledger(tmp_path).deaths[0])
    if (tmp_path / "finished").exists():
        assert_same_run(tmp_path, undisturbed, 4 - died)
    else:  # rank 0 died when all was done, before it could say so
        assert Run.load(tmp_path / "run").finished


@needs_ulfm
def test_on_the_command_line(tmp_path):
    """Rank 0 dies; the new rank 0 says so, and what comes of it."""
    folder = tmp_path / "run"
    words = [*launch.launcher(3, elastic=True), sys.executable, "-m", "mpi4py", str(FAILING), "kill@0:13"]
    done = subprocess.run(
        [*words, *TRAIN, "--elastic", "--json", "--out", str(folder)],
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "convolt: warning: 1 of 3 ranks died after step 12; 2 go on" in done.stderr
    assert json.loads(done.stdout)["ranks"] == 2
    assert Run.load(folder).finished


@needs_ulfm
def test_all_killed_is_told_and_resumable(tmp_path):
    """``convolt train --ranks 2 --elastic``, every rank killed from outside: mpiexec would say that all is well."""
    folder = tmp_path / "run"
    words = [sys.executable, "-m", "convolt", *TRAIN, "--epochs", "1000", "--ranks", "2", "--elastic"]
    process = subprocess.Popen(
        [*words, "--out", str(folder)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + HANGS
        while not (folder / "checkpoints" / "step-000005").exists() and time.monotonic() < deadline:
            assert process.poll() is None
        started = next(record for record in read_lines(folder / "metrics.jsonl") if record["event"] == "ranks")
        for rank in started["ranks"]:
            os.kill(rank["pid"], signal.SIGKILL)
        output, errors = process.communicate(timeout=HANGS)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGKILL, errors
    assert output == ""
    assert "every rank was killed (signal 9), so all have ended; go on from the last checkpoint" in errors
    assert Run.load(folder).checkpoints.load_latest() is not None
    assert not Run.load(folder).finished


@needs_ulfm
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_still_ends_all(rank, tmp_path):
    words = [*launch.launcher(3, elastic=True), sys.executable, "-m", "mpi4py", str(FAILING), f"error@{rank}:7"]
    done = subprocess.run(
        [*words, *TRAIN, "--elastic", "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 1
    said = [line for line in launch.spoken(done.stderr.splitlines()) if line.strip() and "warning" not in line]
    assert said == [f"convolt: error: rank {rank}: on purpose"]


@needs_ulfm
def test_an_error_after_a_death_ends_all(tmp_path):
    """Rank 0 dies, and then the next rank 0 fails. mpiexec itself would say that all is well."""
    words = [*launch.launcher(3, elastic=True), sys.executable, "-m", "mpi4py", str(FAILING), "kill@0:5,error@1:16"]
    ended = launch.run_command(
        [*words, *TRAIN, "--elastic", "--out", str(tmp_path / "run")], timeout=HANGS, must_answer=True
    )
    assert ended.code == 1
    assert Run.load(tmp_path / "run").checkpoints.load_latest() is not None


@needs_ulfm
def test_a_signal_after_a_death_saves_once(tmp_path):
    """Rank 0 dies, and then one of the others is asked to stop."""
    folder = tmp_path / "run"
    words = [*launch.launcher(3, elastic=True), sys.executable, "-m", "mpi4py", str(FAILING), "kill@0:5,term@2:16"]
    done = subprocess.run(
        [*words, *TRAIN, "--elastic", "--out", str(folder)], capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 75, done.stderr
    told = [line for line in done.stderr.splitlines() if "saved" in line]
    assert len(told) == 1
    assert told[0].endswith(f"saved; go on with: convolt train --resume {folder} --ranks 2")
    assert not Run.load(folder).finished


@needs_ulfm
def test_mpiexec_must_have_been_asked_for_it(tmp_path):
    words = [*launch.launcher(2), sys.executable, "-m", "mpi4py", "-m", "convolt", *TRAIN, "--elastic"]
    done = subprocess.run(
        [*words, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 1
    assert "mpiexec was started without --with-ft ulfm" in done.stderr
    assert not (tmp_path / "run").exists()


@needs_none
@pytest.mark.parametrize("by_hand", [False, True])
def test_an_mpi_without_it_is_told_in_one_line(by_hand, tmp_path):
    by = [*launch.launcher(2), sys.executable, "-m", "mpi4py", "-m", "convolt", *TRAIN]
    own = [sys.executable, "-m", "convolt", *TRAIN, "--ranks", "2"]
    words = [*(by if by_hand else own), "--elastic", "--out", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 1
    said = [line for line in launch.spoken(done.stderr.splitlines()) if line.startswith("convolt: error")]
    assert len(said) == 1
    assert "elastic needs Open MPI 5" in said[0]
    assert f"this is {mpi_runtime().vendor}" in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("other", [{"shard_optimizer": True}, {"local_steps": 2}])
def test_state_that_would_die_with_a_rank_is_refused(other):
    with pytest.raises(ConfigError, match="elastic needs the whole state on every rank"):
        Parallel(elastic=True, **other)
