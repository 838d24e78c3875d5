"""Ranks killed at random moments: a run ends soon, goes on, and no sample is taken twice or left out."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ledger import Ledger, assert_same_samples

from convolt import launch
from convolt.run import Run

pytest.importorskip("mpi4py", reason="ranks need mpi4py")
PROGRAM = Path(__file__).with_name("killed_ranks.py")
HANGS = 60  # seconds for a whole attempt on a busy machine
SOON = 5  # seconds from a rank's death to the end of all

# Calls of functions until a rank is dead: from its first import to the middle of a run, which has some 300,000.
EARLIEST, LATEST = 2_000, 200_000


def attempt(folder: Path, number: int, ranks: int, fault: str = "-") -> int:
    """One start of the run in a folder; returns the exit code."""
    words = [*launch.launcher(ranks), sys.executable, "-m", "mpi4py", str(PROGRAM), str(folder), str(number), fault]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANGS, check=False)
    ended = time.monotonic()
    died = Ledger(folder).deaths[number]
    if died:
        assert done.returncode != 0
        assert ended - min(died) < SOON
    else:
        assert done.returncode == 0, done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Runs that nobody kills, by their number of ranks, made once."""
    made: dict[int, Path] = {}

    def of(ranks: int) -> Path:
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp(f"undisturbed-{ranks}")
            assert attempt(made[ranks], 0, ranks) == 0
        return made[ranks]

    return of


def killed(folder: Path, kills: int, seed: int, choices: tuple[int, ...]) -> int:
    """A run that goes on after each of so many kills, on a number of ranks drawn from the choices; how many came."""
    generator = np.random.default_rng(seed)
    deaths = 0
    for number in range(kills):
        ranks = int(generator.choice(choices))
        fault = f"{generator.integers(ranks)}:{generator.integers(EARLIEST, LATEST)}"
        deaths += attempt(folder, number, ranks, fault) != 0
    assert attempt(folder, kills, choices[0]) == 0
    return deaths


@pytest.mark.parametrize(
    ("ranks", "kills", "seed"),
    [(2, 2, 1), *(pytest.param(ranks, 5, seed, marks=pytest.mark.slow) for ranks, seed in ((2, 2), (3, 3)))],
)
def test_killed_ranks_change_no_bit(ranks, kills, seed, undisturbed, tmp_path):
    assert killed(tmp_path, kills, seed, (ranks,)) > 0
    twin = undisturbed(ranks)
    assert_same_samples(tmp_path, twin)
    assert Ledger(tmp_path).losses == Ledger(twin).losses
    ours, theirs = (Run.load(folder / "run") for folder in (tmp_path, twin))
    np.testing.assert_array_equal(ours.params.flat, theirs.params.flat)
    measured = [[(epoch.train_loss, epoch.valid_loss) for epoch in run.history] for run in (ours, theirs)]
    assert measured[0] == measured[1]
    assert ours.test_loss == theirs.test_loss


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 5])
def test_killed_runs_go_on_with_any_number_of_ranks(seed, undisturbed, tmp_path):
    assert killed(tmp_path, 5, seed, (1, 2, 3, 4)) > 0
    twin = undisturbed(2)
    assert_same_samples(tmp_path, twin)
    np.testing.assert_allclose(Ledger(tmp_path).losses, Ledger(twin).losses, rtol=1e-10)
    np.testing.assert_allclose(Run.load(tmp_path / "run").params.flat, Run.load(twin / "run").params.flat, rtol=1e-7)
