"""Ranks give the curve of one process: every optimizer, every engine, uneven shards, accumulation, BatchNorm."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from parallel_runs import SUITES, curves

from convolt import launch
from convolt.comms import Serial
from convolt.parallel import Parallel

pytest.importorskip("mpi4py", reason="ranks need mpi4py")
PROGRAM = Path(__file__).with_name("parallel_runs.py")
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5, "fp32-master64": 1e-5}  # of the loss
# A loss of 1e-4 is a difference of logits near 10, of which float32 does not have more digits than this.
SMALL = 1e-2
ROUNDING = {"fp64": 0.0, "fp32": float(np.spacing(np.float32(8))), "fp32-master64": float(np.spacing(np.float32(8)))}

SLOWLY_3, SLOWLY_4 = (pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 4))


def on_ranks(ranks: int, suite: str, folder: Path, limit: float = 100) -> dict:
    """The curves of a suite, from rank 0; the program itself checks that all ranks agree."""
    folder.mkdir()
    words = [*launch.launcher(ranks), sys.executable, "-m", "mpi4py", str(PROGRAM), str(folder), suite]
    ended = launch.run_command(words, timeout=limit)
    assert ended.code == 0
    return json.loads((folder / "curves.json").read_text())


def assert_same(ours: dict, serial: dict, suite: str) -> None:
    assert ours.keys() == serial.keys() == SUITES[suite].keys()
    for name, case in SUITES[suite].items():
        precision = case.recipe.precision
        for what in ("losses", "valid", "test"):
            found, wanted = (np.array(each[name][what]) for each in (ours, serial))
            rounding = np.where(wanted < SMALL, ROUNDING[precision], 0)
            assert (abs(found - wanted) <= TOLERANCE[precision] * wanted + rounding).all(), f"{name}: {what}"
        assert ours[name]["accuracy"] == pytest.approx(serial[name]["accuracy"], abs=0.03), name


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """The curves of one process, made once."""
    made: dict[str, dict] = {}

    def of(suite: str) -> dict:
        if suite not in made:
            made[suite] = curves(suite, tmp_path_factory.mktemp(suite), Serial(), Serial())
        return made[suite]

    return of


def test_the_optimizer_is_sharded_where_that_sends_no_more():
    assert Parallel().shards
    assert not Parallel(wire="bf16").shards
    assert not Parallel(local_steps=4).shards
    assert Parallel(wire="bf16", shard_optimizer=True).shards
    assert not Parallel(shard_optimizer=False).shards


@pytest.mark.parametrize("ranks", [2, SLOWLY_3, SLOWLY_4])
def test_ranks_give_the_serial_curve(ranks, serial, tmp_path):
    assert_same(on_ranks(ranks, "quick", tmp_path / "ranks"), serial("quick"), "quick")


@pytest.mark.parametrize("ranks", [2, SLOWLY_3])
def test_ranks_give_the_serial_curve_on_torch(ranks, serial, tmp_path):
    pytest.importorskip("torch")
    assert_same(on_ranks(ranks, "torch", tmp_path / "ranks"), serial("torch"), "torch")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_optimizer_on_every_engine(ranks, serial, tmp_path):
    assert_same(on_ranks(ranks, "every", tmp_path / "ranks", limit=900), serial("every"), "every")


@pytest.mark.parametrize("ranks", [2, SLOWLY_3])
def test_ranks_agree_where_their_curve_is_their_own(ranks, serial, tmp_path):
    found, alone = on_ranks(ranks, "own", tmp_path / "ranks"), serial("own")
    for name, ours in found.items():
        assert np.isfinite(ours["losses"]).all(), name
        assert ours["losses"] != alone[name]["losses"], f"{name}: it made no difference"
        tail = np.mean(ours["losses"][-6:]), np.mean(alone[name]["losses"][-6:])
        assert tail[0] < tail[1] + 0.35, f"{name}: it learns like one process"
