"""The classic comparison: five trainings, invented ones here and real ones by the command line."""

import json
from dataclasses import dataclass, replace

import pytest
from small_runs import MODEL, dataset

from convolt import cli
from convolt.config import to_plain
from convolt.engines import Im2col
from convolt.errors import ConfigError, EngineError
from convolt.layers import Conv2d, Dense, Flatten, ReLU
from convolt.model import Model
from convolt.recipe import Recipe
from convolt.run import Run
from convolt.scaling import plots
from convolt.scaling.classic import CONFIGURATIONS, compare, trainer
from convolt.train import fit

SECONDS = {(1, 1): 8.0, (2, 1): 5.0, (4, 1): 6.0, (2, 2): 4.0, (2, 4): 16.0}


@dataclass
class Invented:
    """A finished run, but for how long it took and what it learned."""

    run: Run
    seconds: float
    shift: float = 0.0

    @property
    def history(self):
        return [replace(epoch, train_loss=epoch.train_loss * (1 + self.shift)) for epoch in self.run.history]

    @property
    def result(self):
        return {**self.run.result, "train_seconds": self.seconds, "images_per_second": 1000 / self.seconds}

    folder = property(lambda self: self.run.folder)
    test_accuracy = property(lambda self: self.run.test_accuracy)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("classic") / "run"
    return fit(MODEL, dataset(), Recipe(epochs=2, batch_size=32), engine=Im2col(threads=1), out=out)


def compared(run, tmp_path, rounds=3, cores=4, speeds=(1.0,), shifts=None):
    asked = []

    def train(ranks, threads, folder):
        asked.append((ranks, threads))
        slow = speeds[int(folder.parent.name.removeprefix("round-")) % len(speeds)]
        return Invented(run, slow * SECONDS[ranks, threads], (shifts or {}).get((ranks, threads), 0.0))

    return compare(train, tmp_path, rounds, cores), asked


def by_name(comparison):
    return {each.name: each for each in comparison.configurations}


def test_five_configurations_take_turns(run, tmp_path):
    comparison, asked = compared(run, tmp_path)
    assert [each.name for each in comparison.configurations] == [name for name, _, _ in CONFIGURATIONS]
    assert sorted(asked) == sorted([(ranks, threads) for _, ranks, threads in CONFIGURATIONS] * 3)
    assert len(set(comparison.rounds)) > 1
    assert comparison.epochs == 2


def test_speedups_are_ratios_within_rounds(run, tmp_path):
    comparison, _ = compared(run, tmp_path, speeds=(1.0, 7.0, 2.0))
    two = by_name(comparison)["mpi-2"]
    assert (two.speedup.low, two.speedup.high) == (pytest.approx(1.6), pytest.approx(1.6))
    assert two.efficiency.median == pytest.approx(0.8)
    assert two.seconds.high == pytest.approx(35)
    assert by_name(comparison)["serial"].speedup.median == 1


def test_beyond_the_cores_there_is_no_speedup(run, tmp_path):
    found = by_name(compared(run, tmp_path, cores=2)[0])
    assert [name for name, each in found.items() if each.oversubscribed] == ["mpi-4", "hybrid-2x2", "hybrid-2x4"]
    assert found["hybrid-2x2"].speedup is None
    assert found["hybrid-2x2"].seconds.median == 4
    assert found["mpi-2"].speedup is not None


def test_another_curve_is_no_speedup(run, tmp_path):
    comparison, _ = compared(run, tmp_path, shifts={(2, 1): 0.05, (4, 1): 1e-6})
    found = by_name(comparison)
    assert found["mpi-2"].difference == pytest.approx(0.05)
    assert not found["mpi-2"].same_curve
    assert found["mpi-2"].speedup is None
    assert found["mpi-4"].same_curve
    assert any("mpi-2: its losses are off by 0.05" in warning for warning in comparison.warnings())


def test_plot_shows_all_five(run, tmp_path):
    comparison, _ = compared(run, tmp_path, cores=2)
    times, losses = plots.classic_figure(comparison).axes
    assert times.get_yticklabels()[0].get_text() == "serial (1 x 1)"
    assert any("more than 2 cores" in text.get_text() for text in times.texts)
    assert len(losses.lines) == 5
    (path,) = plots.save_classic(comparison, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_rounds_are_checked(run, tmp_path):
    with pytest.raises(ConfigError, match="rounds must be at least 1"):
        compared(run, tmp_path, rounds=0)


def test_training_that_fails_is_told(tmp_path, capfd):
    with pytest.raises(EngineError, match="training on 1 ranks x 1 threads ended with code 1"):
        trainer(["--data", "nosuch"], timeout=60)(1, 1, tmp_path / "run")
    assert "convolt: error: " in capfd.readouterr().err


def test_five_real_trainings(tmp_path, capsys):
    pytest.importorskip("mpi4py")
    model = Model((1, 8, 8), (Conv2d(1, 4, 3), ReLU(), Flatten(), Dense(144, 10)))
    (tmp_path / "tiny.json").write_text(json.dumps(to_plain(model)))
    options = ["--data", "digits", "--model", str(tmp_path / "tiny.json"), "--engine", "im2col", "--precision", "fp64"]
    sizes = ["--epochs", "2", "--subset", "60", "--batch-size", "20", "--out", str(tmp_path / "out")]
    assert cli.main(["scale", "--classic", *options, *sizes]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "classic.json").read_text())
    assert [each["name"] for each in found["configurations"]] == [name for name, _, _ in CONFIGURATIONS]
    assert all(each["difference"] < 1e-10 and each["same_curve"] for each in found["configurations"])
    assert len({each["test_accuracy"] for each in found["configurations"]}) == 1
    assert (tmp_path / "out" / "classic.png").exists()
    assert all(name in out for name, _, _ in CONFIGURATIONS)
