import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convolt import engines
from convolt.cli import main
from convolt.cli.settings import defaults, merge, put, resolve
from convolt.config import to_plain
from convolt.optimizers import SGD, Adam
from convolt.run import Run
from convolt.schedules import Cosine

# im2col compiles nothing: what is tested here is the command line.
FAST = ["--engine", "im2col", "--epochs", "1", "--subset", "100", "--threads", "1", "--quiet"]
KEYS = (
    *("test_accuracy", "test_loss", "epochs", "train_seconds", "images_per_second"),
    *("engine", "precision", "threads", "ranks", "seed", "run"),
)


@pytest.fixture
def train(tmp_path, capsys):
    """Train on a hundred digits; returns the run."""

    def go(*args) -> Run:
        code = main(["train", "--runs-dir", str(tmp_path / "runs"), *FAST, "--json", *args])
        out, err = capsys.readouterr()
        assert code == 0, err
        return Run.load(json.loads(out)["run"])

    return go


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def settings(*sources) -> dict:
    """Defaults, then each source: a mapping, or (key, value)."""
    plain = defaults()
    for source in sources:
        if isinstance(source, dict):
            merge(plain, source, "file")
        else:
            put(plain, *source, "--set")
    return plain


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_json_is_one_object_and_nothing_else(tmp_path, capsys):
    assert main(["train", *FAST, "--json", "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert out.count("\n") == 1
    assert err == ""
    assert tuple(result) == KEYS
    assert (result["run"], result["epochs"], result["threads"], result["seed"]) == (str(tmp_path / "run"), 1, 1, 0)
    assert 0 <= result["test_accuracy"] <= 1


def test_summary_names_the_run_and_progress_is_on_stderr(tmp_path, capsys):
    assert main(["train", *FAST[:-1], "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("test accuracy")
    assert str(tmp_path / "run") in out
    assert "epoch 1/1" in err
    assert "100 train, 144 valid, 359 test" in err


def test_run_has_curves_and_metrics(train, tmp_path):
    run = train("--save-metrics", str(tmp_path / "metrics.npz"))
    assert {path.name for path in (run.folder / "plots").iterdir()} == {"learning-curves.png", "learning-curves.svg"}
    with np.load(tmp_path / "metrics.npz") as metrics:
        assert metrics["train_loss"].tolist() == [run.history[0].train_loss]


def test_engine_is_the_one_asked_for(train):
    for name in engines.names():
        assert train("--engine", name, "--subset", "20").result["engine"] == name


def test_network_of_the_zoo_begins_with_the_constants_of_the_data(train):
    first, *rest = train().config["model"]["layers"]
    assert first["type"] == "normalize"
    assert train("--no-normalize").config["model"]["layers"] == rest


def test_described_model(train, tmp_path):
    layers = [{"type": "flatten"}, {"type": "dense", "in_features": 64, "out_features": 10}]
    path = tmp_path / "linear.json"
    path.write_text(json.dumps({"input_shape": [1, 8, 8], "layers": layers}))
    assert [layer["type"] for layer in train("--model", str(path)).config["model"]["layers"]] == ["flatten", "dense"]


# -- where a value comes from -----------------------------------------------------------------------------------------


def test_later_sources_win(train, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('batch_size = 50\nseed = 4\n[optimizer]\ntype = "sgd"\nlr = 0.5\nmomentum = 0.5\n')
    args = ["--recipe", str(path), "--lr", "0.25", "--batch-size", "25", "--set", "batch_size=20"]
    recipe = train(*args).recipe
    assert recipe.optimizer == SGD(lr=0.25, momentum=0.5)
    assert (recipe.batch_size, recipe.seed, recipe.precision) == (20, 4, "fp32")


def test_the_order_of_options_does_not_matter(train):
    config = train(
        "--lr", "0.25", "--threads", "3", "--engine", "im2col", "--optimizer", "sgd", "--subset", "20"
    ).config
    assert (config["engine"]["type"], config["engine"]["threads"]) == ("im2col", 3)
    assert (config["recipe"]["optimizer"]["type"], config["recipe"]["optimizer"]["lr"]) == ("sgd", 0.25)


def test_another_type_drops_the_fields_of_the_first():
    plain = settings({"optimizer": {"type": "sgd", "lr": 0.5, "momentum": 0.9}}, ("optimizer", "adam"))
    assert resolve(plain).recipe.optimizer == Adam()


def test_the_same_type_keeps_them():
    plain = settings({"optimizer": {"type": "sgd", "lr": 0.5}}, ("optimizer", "sgd"), ("optimizer.momentum", 0.9))
    assert resolve(plain).recipe.optimizer == SGD(lr=0.5, momentum=0.9)


def test_set_reaches_every_part(train):
    assignments = (
        *("optimizer.betas=(0.9,0.95)", "schedule=cosine", "schedule.eta_min=1e-5", "ema.decay=0.5"),
        *("data.valid=0.2", "engine.threads=1", "augment=[{'type': 'crop', 'padding': 1}]", "normalize=false"),
    )
    run = train(*(word for text in assignments for word in ("--set", text)))
    assert run.recipe.optimizer == Adam(betas=(0.9, 0.95))
    assert run.recipe.schedule == Cosine(eta_min=1e-5)
    assert run.recipe.ema.decay == 0.5
    assert run.recipe.augment[0].padding == 1
    assert run.config["data"]["splits"]["valid"] == 288
    assert run.config["model"]["layers"][0]["type"] != "normalize"


def test_augmentations_add_up_and_replace_those_of_the_file():
    plain = settings({"augment": ["mixup"]}, ("augment", ("flip", "crop")))
    assert [type(step).__name__ for step in resolve(plain).recipe.augment] == ["Flip", "Crop"]


def test_engine_has_fields():
    for name in engines.names():
        plain = settings(("engine", name), ("engine.threads", 1))
        assert resolve(plain).engine == engines.engine_class(name)(threads=1)


def test_splits_follow_the_seed_unless_they_have_their_own():
    assert resolve(settings(("seed", 3))).data.seed == 3
    assert resolve(settings(("seed", 3), ("data.seed", 5))).data.seed == 5


def test_data_is_recorded_with_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    data = resolve(settings({"data": {"name": "photos", "root": "files"}})).data
    assert (data.name, data.root) == (str(tmp_path / "photos"), str(tmp_path / "files"))
    assert resolve(settings(("data", "digits"))).data.name == "digits"


# -- replay and resume ------------------------------------------------------------------------------------------------


def test_run_json_replays(train):
    args = ["--optimizer", "sgd", "--lr", "0.1", "--augment", "crop", "--batch-size", "30", "--valid", "0.3"]
    first = train(*args, "--seed", "7", "--subset", "90")
    again = train("--recipe", str(first.folder / "run.json"), "--subset", "90")
    assert again.config == first.config
    assert again.history[0].train_loss == first.history[0].train_loss
    assert np.array_equal(again.params.flat, first.params.flat)


def test_replay_with_another_seed_moves_the_splits_too(train):
    config = train("--recipe", str(train().folder / "run.json"), "--seed", "1").config
    assert (config["recipe"]["seed"], config["data"]["source"]["seed"]) == (1, 1)


SLOW = [
    "train",
    "--engine",
    "im2col",
    "--data",
    "digits",
    "--epochs",
    "100000",
    "--batch-size",
    "8",
    "--subset",
    "64",
    "--threads",
    "1",
]


def stop(folder: Path, number: signal.Signals) -> tuple[int, str, str]:
    """Start a run that would take hours and send it a signal after its first epoch: code, stdout, stderr."""
    command = [sys.executable, "-m", "convolt", *SLOW, "--out", str(folder), "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("epoch"):
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    return process.returncode, out, "".join([*lines, err])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(number, tmp_path):
    code, out, err = stop(tmp_path / "run", number)
    assert code == 75
    assert out == ""
    assert err.splitlines()[-1].startswith(f"convolt: {number.name} after step ")
    assert err.splitlines()[-1].endswith(f"convolt train --resume {tmp_path / 'run'}")
    assert not Run.load(tmp_path / "run").finished


def test_resume_goes_on_with_the_runs_own_settings(train, tmp_path, capsys):
    whole = train("--epochs", "3", "--lr", "0.01")
    folder = tmp_path / "copy"
    interrupt_after(1, folder, ["--epochs", "3", "--lr", "0.01"])
    capsys.readouterr()
    assert main(["train", "--resume", str(folder), "--quiet", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["epochs"], result["run"]) == (3, str(folder))
    assert np.array_equal(Run.load(folder).params.flat, whole.params.flat)


def interrupt_after(epochs: int, folder: Path, args: list[str]) -> None:
    """A run that raises SIGINT in its own process when the epoch is over."""
    script = f"""
import os, signal, sys
from convolt.callbacks import ProgressBar
from convolt.cli import main
ProgressBar.on_epoch = lambda self, epoch: epoch.epoch == {epochs} and os.kill(os.getpid(), signal.SIGINT)
sys.exit(main({["train", *FAST[:-1], *args, "--out", str(folder)]!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False, env=environment()
    )
    assert done.returncode == 75, done.stderr


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--lr", "0.5"], ["recipe.optimizer.lr", "0.001", "0.5"]),
        (["--seed", "1"], ["seed", "0", "1", "new run"]),
        (["--data", "mnist"], ["data.name", "'digits'", "'mnist'"]),
        (["--set", "data.seed=9"], ["data.seed", "9"]),
        (["--valid", "0.3"], ["data.valid", "0.1", "0.3"]),
        (["--model", "cifar-cnn"], ["model.layers"]),
        (["--out", "elsewhere"], ["--resume", "--out"]),
        (["--runs-dir", "elsewhere"], ["--resume", "--runs-dir"]),
    ],
)
def test_resume_refuses_what_contradicts_the_run(args, parts, train, capsys):
    run = train()
    assert main(["train", "--resume", str(run.folder), "--quiet", *args]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_resume_accepts_what_repeats_the_run_and_another_engine(train):
    run = train()
    for name in engines.names():
        args = ["--resume", str(run.folder), "--quiet", "--data", "digits", "--model", "mnist-cnn", "--lr", "0.001"]
        assert main(["train", *args, "--engine", name, "--threads", "1"]) == 0


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train", "predict", "evaluate", "data"])
def test_help_imports_no_engine_and_no_heavy_library(verb):
    script = (
        f"import sys, json; from convolt.cli import main; main(['{verb}', '--help']); print(json.dumps([*sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    loaded = json.loads(done.stdout.splitlines()[-1])
    heavy = {"torch", "numba", "llvmlite", "matplotlib", "PIL", "onnx"}
    assert [name for name in loaded if name in heavy or name.startswith("convolt.engines.")] == []


def test_help_is_complete_and_shows_examples(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{title}:\n" in out for title in ("Data", "Model", "Training", "Engine", "Run", "Output"))
    assert all(name in out for name in (*engines.names(), "mnist-cnn", "resnet18", "onecycle", "alternatingflip"))
    assert "Examples:" in out


# -- what a user can do wrong -----------------------------------------------------------------------------------------

FILES = {
    "empty.toml": "",
    "broken.toml": "epochs = \n",
    "key.toml": "epoch = 3\n",
    "inner.toml": '[optimizer]\ntype = "sgd"\nmomentun = 0.9\n',
    "type.toml": '[schedule]\ntype = "cosin"\n',
    "broken.json": "{",
    "list.json": "[]",
    "record.json": '{"config": {"data": {}}}',
    "layer.toml": 'input_shape = [1, 8, 8]\n[[layers]]\ntype = "flaten"\n',
    "shape.toml": (
        'input_shape = [1, 8, 8]\n[[layers]]\ntype = "flatten"\n'
        '[[layers]]\ntype = "dense"\nin_features = 6\nout_features = 2\n'
    ),
    "classes.json": '{"input_shape": [1, 8, 8], "layers": ["flatten"]}',
}

MISTAKES = [
    (["--data", "mnits"], 1, ["'mnits'", "'mnist'"]),
    (["--data", "key.toml"], 1, ["key.toml", ".zip"]),
    (["--data", "mnist", "--data-dir", "nowhere"], 1, ["nowhere", "--data-dir"]),
    (["--data", "mnist", "--data-dir", "."], 1, ["mnist", "convolt data fetch mnist"]),
    (["--valid", "2"], 2, ["valid", "2", "[0, 1)"]),
    (["--valid", "x"], 2, ["--valid", "'x'"]),
    (["--valid", "0", "--set", "early_stopping.patience=3"], 2, ["early_stopping", "--valid 0.1"]),
    (["--subset", "9999"], 2, ["subset=9999", "1294"]),
    (["--image-size", "axb"], 2, ["--image-size", "'axb'", "32x48"]),
    (["--channels", "2"], 2, ["channels"]),
    (["--model", "mnist-cn"], 2, ["'mnist-cn'", "'mnist-cnn'"]),
    (["--model", "absent.toml"], 2, ["absent.toml", "No such file"]),
    (["--model", "layer.toml"], 2, ["layer.toml", "'flaten'", "'flatten'"]),
    (["--model", "shape.toml"], 2, ["shape.toml", "layer 1", "in_features=64"]),
    (["--model", "classes.json"], 2, ["(64,)", "10 classes"]),
    (["--model", "layer.toml", "--normalize"], 2, ["layer.toml"]),
    (["--engine", "im2co"], 2, ["--engine", "'im2co'", "'im2col'"]),
    (["--precision", "fp31"], 2, ["--precision", "'fp31'", "'fp32'"]),
    (["--engine", "loops", "--precision", "bf16"], 1, ["loops", "bf16", "fp32"]),
    (["--threads", "two"], 2, ["--threads", "'two'"]),
    (["--threads", "-1"], 2, ["threads", "-1"]),
    (["--ranks", "0"], 2, ["ranks", "at least 1", "0"]),
    (["--epochs", "-1"], 2, ["epochs", "-1", ">= 0"]),
    (["--epochs", "ten"], 2, ["--epochs", "'ten'"]),
    (["--batch-size", "0"], 2, ["batch_size", "0", ">= 1"]),
    (["--micro-batch-size", "0"], 2, ["micro_batch_size", "0"]),
    (["--optimizer", "adm"], 2, ["--optimizer", "'adm'", "'adam'"]),
    (["--lr", "-1"], 2, ["lr", "-1", ">= 0"]),
    (["--lr", "nan"], 2, ["lr", "nan"]),
    (["--momentum", "0.9"], 2, ["momentum", "betas"]),
    (["--schedule", "cosin"], 2, ["--schedule", "'cosin'", "'cosine'"]),
    (["--loss", "mce"], 2, ["--loss", "'mce'", "'mse'"]),
    (["--augment", "flp"], 2, ["--augment", "'flp'", "'flip'"]),
    (["--seed", "-1"], 2, ["seed", "-1"]),
    (["--recipe", "absent.toml"], 2, ["absent.toml", "No such file"]),
    (["--recipe", "broken.toml"], 2, ["broken.toml", "line 1"]),
    (["--recipe", "key.toml"], 2, ["key.toml", "'epoch'", "'epochs'"]),
    (["--recipe", "inner.toml"], 2, ["optimizer", "'momentun'", "'momentum'"]),
    (["--recipe", "type.toml"], 2, ["schedule", "'cosin'", "'cosine'"]),
    (["--recipe", "broken.json"], 2, ["broken.json", "JSON"]),
    (["--recipe", "list.json"], 2, ["list.json", "object", "list"]),
    (["--recipe", "record.json"], 2, ["record.json", "'source'"]),
    (["--set", "epochs"], 2, ["key=value", "'epochs'"]),
    (["--set", "lr=0.1"], 2, ["'lr'", "optimizer.lr"]),
    (["--set", "epoch=3"], 2, ["'epoch'", "'epochs'"]),
    (["--set", "epochs=1.5"], 2, ["epochs", "1.5"]),
    (["--set", "optimizer.beta=(0.9,0.95)"], 2, ["'beta'", "'betas'"]),
    (["--set", "optimizer.betas=0.9"], 2, ["betas", "0.9"]),
    (["--set", "data.sub=3"], 2, ["data", "'sub'", "'subset'"]),
    (["--set", "engine.thread=3"], 2, ["engine", "'thread'", "'threads'"]),
    (["--set", "engine=3"], 2, ["engine", "3"]),
    (["--set", "model=3"], 2, ["model", "3"]),
    (["--set", "normalize=maybe"], 2, ["normalize", "'maybe'"]),
    (["--set", "non_finite.policy=skp"], 2, ["policy", "'skp'", "'skip'"]),
    (["--set", "schedules.momentum=cosine"], 2, ["'momentum'", "weight_decay"]),
    (["--checkpoint-every", "5"], 2, ["checkpoint_every", "'5'", "'10ep'"]),
    (["--keep-last", "0"], 2, ["--keep-last", "0"]),
    (["--save-metrics", "absent/metrics.npz"], 2, ["--save-metrics", "absent"]),
    (["--save-metrics", "."], 2, ["--save-metrics", "folder"]),
    (["--out", "key.toml"], 1, ["key.toml", "not a folder"]),
    (["--out", "."], 1, ["not empty"]),
    (["--resume", "absent"], 1, ["absent", "run.json"]),
    (["--epoch", "3"], 2, ["--epoch", "'--epochs'"]),
    (["surplus"], 2, ["surplus"]),
]


@pytest.mark.parametrize(
    ("args", "code", "parts"), MISTAKES, ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else ""
)
def test_mistake_ends_in_one_line(args, code, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    assert main(["train", *FAST, "--subset", "50", *args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("convolt: error: ")
    assert err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert not Path("runs").exists()


def test_run_on_arrays_cannot_be_repeated_without_data(train, tmp_path, capsys):
    run = train()
    record = json.loads((run.folder / "run.json").read_text())
    record["config"]["data"]["source"] = None
    (tmp_path / "arrays.json").write_text(json.dumps(record))
    assert main(["train", *FAST, "--recipe", str(tmp_path / "arrays.json")]) == 2
    assert "--data" in capsys.readouterr().err


def test_defaults_are_those_of_python():
    assert to_plain(resolve(defaults()).engine) == to_plain(engines.default_engine())
