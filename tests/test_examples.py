"""The examples run, and do what they say."""

import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from convolt import launch
from convolt.cli.settings import defaults, merge, read_recipe, resolve
from convolt.optimizers import Adam
from convolt.schedules import Cosine

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_loop_learns(capsys):
    spec = spec_from_file_location("own_loop", EXAMPLES / "own_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.train(epochs=3) > 0.9
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3


def test_ranks_learn_alike():
    pytest.importorskip("mpi4py")
    found = set()
    for ranks in (1, 2):
        words = [*launch.launcher(ranks), sys.executable, "-m", "mpi4py", str(EXAMPLES / "ranks.py")]
        ended = launch.run_command(words, catch_output=True, timeout=60)
        assert ended.code == 0
        found.add(ended.output)
    assert len(found) == 1
    assert float(found.pop().split()[-1]) > 0.9


def test_every_recipe_file_can_be_resolved():
    for path in sorted(EXAMPLES.glob("*.toml")):
        settings = defaults()
        merge(settings, read_recipe(path), str(path))
        recipe = resolve(settings).recipe
        assert recipe.epochs == tomllib.loads(path.read_text())["epochs"]


def test_mnist_recipe_is_the_configuration_of_the_readme():
    settings = defaults()
    merge(settings, read_recipe(EXAMPLES / "mnist.toml"), "mnist.toml")
    resolved = resolve(settings)
    assert resolved.recipe.optimizer == Adam(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    assert resolved.recipe.schedule == Cosine(eta_min=1e-5)
    assert (resolved.recipe.epochs, resolved.recipe.batch_size, resolved.data.valid) == (10, 128, 0)
