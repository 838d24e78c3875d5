"""Mistakes that a first user makes in Python: each is told in one line, before anything is made or trained."""

from pathlib import Path

import numpy as np
import pytest

import convolt as cv
from convolt.datasets.check import check_dataset
from convolt.datasets.spec import DataSpec
from convolt.errors import ConfigError, ConvoltError, DataError, RunError
from convolt.run import Run

PIXELS, LABELS = np.zeros((12, 1, 8, 8), np.uint8), np.arange(12) % 3


def one_line(error: pytest.ExceptionInfo[ConvoltError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": "cosine"},
        {"schedule": cv.Cosine},
        {"loss": cv.CrossEntropy},
        {"optimizer": "adam"},
        {"augment": "flip"},
        {"augment": cv.Flip()},
        {"ema": 0.9},
        {"early_stopping": 3},
        {"non_finite": "skip"},
        {"precision": 5},
    ],
    ids=str,
)
def test_recipe_names_the_field_of_the_wrong_kind(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))) as error:
        cv.Recipe(**wrong)
    one_line(error)


def test_whole_numbers_can_be_scheduled_and_lr_has_a_field_of_its_own():
    assert cv.Recipe(optimizer=cv.SGD(lr=1, momentum=0), schedules={"momentum": cv.Linear()}).schedules
    with pytest.raises(ConfigError, match="the field schedule"):
        cv.Recipe(schedules={"lr": cv.Linear()})


@pytest.mark.parametrize("wrong", [{"engine": "im2col"}, {"engine": cv.engines.Im2col}, {"params": {}}], ids=str)
def test_fit_makes_no_folder_for_the_wrong_kind_of_object(wrong, tmp_path):
    data = cv.load_dataset("digits", subset=50)
    with pytest.raises(ConfigError, match=r"fit: \w+ must be a") as error:
        cv.fit(cv.zoo.mnist_cnn(data.input_shape), data, root=tmp_path, **wrong)
    one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_runs_cannot_lie_in_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is not a folder") as error:
        Run.create({}, root=tmp_path / "file")
    one_line(error)


def test_a_thread_count_without_sense_is_refused():
    with pytest.raises(ConfigError, match="usable cores") as error:
        cv.engines.Im2col(threads=100_000)
    one_line(error)


@pytest.mark.parametrize("wrong", [{"name": 5}, {"root": 2024}, {"name": ""}], ids=str)
def test_a_data_set_is_named_by_text(wrong):
    with pytest.raises(ConfigError, match=rf"data\.{next(iter(wrong))} must be") as error:
        DataSpec(**wrong)
    one_line(error)


def test_labels_that_training_never_sees_are_refused():
    with pytest.raises(DataError, match="label 5 of the test split never occurs") as error:
        cv.Dataset.from_arrays(PIXELS, LABELS, test=(PIXELS, LABELS + 5))
    one_line(error)
    named = cv.Dataset.from_arrays(PIXELS, LABELS, test=(PIXELS, LABELS + 1), classes=("a", "b", "c", "d"))
    assert named.num_classes == 4


def test_check_finds_what_training_would_refuse(tmp_path):
    (tmp_path / "nothing").mkdir()
    assert not check_dataset(tmp_path / "nothing").ok


def test_a_run_knows_the_data_that_load_dataset_gave(tmp_path):
    data = cv.load_dataset("digits", subset=60, valid=0.2, seed=3)
    engine = cv.engines.Im2col(threads=1)
    run = cv.fit(cv.zoo.mnist_cnn(data.input_shape), data, cv.Recipe(epochs=1), engine=engine, out=tmp_path / "run")
    source = run.config["data"]["source"]
    assert (source["name"], source["subset"], source["valid"], source["seed"]) == ("digits", 60, 0.2, 3)
    assert data.subset(30).origin is None
    with pytest.raises(DataError, match="uint8, float32 or float64") as error:
        run.predict(data.train.images[:2].astype(np.int64))
    one_line(error)


def test_a_path_is_recorded_absolute(tmp_path, monkeypatch):
    np.savez(tmp_path / "own.npz", images=np.repeat(PIXELS, 2, axis=0), labels=np.repeat(LABELS, 2))
    monkeypatch.chdir(tmp_path)
    origin = cv.load_dataset("own.npz").origin
    assert origin is not None
    assert Path(origin["name"]) == tmp_path / "own.npz"


def test_from_torch_refuses_hooks():
    nn = pytest.importorskip("torch.nn", reason="torch is not installed")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    net[0].register_forward_hook(lambda module, inputs, output: output * 3)
    with pytest.raises(ConfigError, match="forward hook") as error:
        cv.from_torch(net, input_shape=(1, 8, 8))
    one_line(error)
