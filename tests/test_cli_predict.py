import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convolt import engines, load_dataset, metrics
from convolt.cli import main
from convolt.run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run that knows its digits tolerably."""
    run = tmp_path_factory.mktemp("runs") / "digits"
    assert (
        main(
            [
                "train",
                "--engine",
                "im2col",
                "--epochs",
                "3",
                "--lr",
                "0.003",
                "--threads",
                "1",
                "--quiet",
                "--out",
                str(run),
            ]
        )
        == 0
    )
    return run


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture
def image(tmp_path, digits):
    """A test image in a file."""

    def write(name="digit.png", number=1, mode="L", size=(8, 8)) -> str:
        picture = Image.fromarray(digits.test.images[number, 0]).resize(size).convert(mode)
        picture.save(tmp_path / name)
        return str(tmp_path / name)

    return write


def answer(capsys, *args) -> dict:
    """What a verb prints with --json."""
    capsys.readouterr()
    code = main([*args, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


# -- predict ----------------------------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_run(folder, digits, image, capsys):
    paths = [image(f"{number}.png", number) for number in range(3)]
    given = answer(capsys, "predict", str(folder), *paths, "--top", "10")
    expected = Run.load(folder).predict(digits.test.images[:3])
    assert given["run"] == str(folder)
    for path, entry, row in zip(paths, given["predictions"], expected, strict=True):
        found = {item["class"]: item["probability"] for item in entry["classes"]}
        assert entry["image"] == path
        assert [item["class"] for item in entry["classes"]] == [str(k) for k in np.argsort(-row)]
        assert np.allclose([found[str(k)] for k in range(10)], row)


def test_table_shows_the_top_classes(folder, image, capsys):
    path = image()
    assert main(["predict", str(folder), path, "--top", "2"]) == 0
    out, err = capsys.readouterr()
    assert path in out
    assert out.count("%") == 2
    assert err == ""


@pytest.mark.parametrize(
    ("name", "mode", "size", "note"),
    [
        ("color.png", "RGB", (8, 8), "color converted to grayscale"),
        ("alpha.png", "RGBA", (8, 8), "color converted to grayscale"),
        ("palette.png", "P", (8, 8), "color converted to grayscale"),
        ("photo.jpg", "L", (40, 20), "40x20 resized to 8x8"),
        ("both.webp", "RGB", (9, 8), "color converted to grayscale, 9x8 resized to 8x8"),
        ("bits.bmp", "1", (8, 8), None),
    ],
)
def test_image_is_made_what_the_network_takes(name, mode, size, note, folder, image, capsys):
    path = image(name, mode=mode, size=size)
    assert main(["predict", str(folder), path, "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["predictions"]) == 1
    assert err == ("" if note is None else f"{path}: {note}\n")


def test_every_engine_predicts_the_same(folder, image, capsys):
    path = image()
    ranked = [
        answer(capsys, "predict", str(folder), path, "--engine", name, "--threads", "1") for name in engines.names()
    ]
    best = [entry["predictions"][0]["classes"][0] for entry in ranked]
    assert len({entry["class"] for entry in best}) == 1
    assert np.ptp([entry["probability"] for entry in best]) < 1e-4


# -- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["test", "valid", "train"])
def test_evaluation_is_that_of_the_metrics(split, folder, digits, capsys):
    found = answer(capsys, "evaluate", str(folder), "--split", split, "--top", "3")
    images = dict(digits.splits())[split]
    p = Run.load(folder).predict(images.images)
    confusion = metrics.confusion_matrix(p, images.labels, 10)
    assert found["images"] == len(images)
    assert found["accuracy"] == pytest.approx(metrics.accuracy(p, images.labels))
    assert found["loss"] == pytest.approx(-np.log(p[np.arange(len(p)), images.labels]).mean(), rel=1e-4)
    assert found["top_k"] == {"k": 3, "accuracy": pytest.approx(metrics.top_k(p, images.labels, 3))}
    assert found["confusion_matrix"] == confusion.tolist()
    for name, column in metrics.per_class(confusion)._asdict().items():
        assert [entry[name] for entry in found["classes"]] == pytest.approx(column.tolist())


def test_evaluation_repeats_the_result_of_the_run(folder, capsys):
    found, result = answer(capsys, "evaluate", str(folder)), Run.load(folder).result
    assert (found["accuracy"], found["loss"]) == pytest.approx((result["test_accuracy"], result["test_loss"]))


def test_tables_show_every_class(folder, capsys):
    assert main(["evaluate", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "digits test: 359 images" in out
    assert "top-5" in out
    assert all(word in out for word in ("precision", "recall", "F1", "support"))


def test_plot_goes_to_the_run(folder, capsys):
    plots = answer(capsys, "evaluate", str(folder), "--plot")["plots"]
    assert plots == [str(folder / "plots" / f"confusion-matrix-test.{form}") for form in ("png", "svg")]
    assert all(Path(path).stat().st_size for path in plots)


def test_other_data_with_the_same_classes(folder, digits, tmp_path, capsys):
    np.savez(tmp_path / "own.npz", images=digits.test.images, labels=digits.test.labels)
    found = answer(capsys, "evaluate", str(folder), "--data", str(tmp_path / "own.npz"), "--split", "train")
    assert found["data"] == "own"
    assert found["accuracy"] > 0.5


def test_data_is_found_from_any_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert answer(capsys, "evaluate", str(folder))["images"] == 359


def test_many_classes_have_no_matrix_on_the_screen(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 255, (63, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "many.npz", images=images, labels=np.arange(63) % 21)
    run = str(tmp_path / "run")
    args = ["--data", str(tmp_path / "many.npz"), "--epochs", "1", "--threads", "1", "--valid", "0", "--quiet"]
    assert main(["train", "--engine", "im2col", *args, "--out", run]) == 0
    assert main(["evaluate", run, "--split", "train"]) == 0
    assert "confusion matrix of 21 classes: see --plot or --json" in capsys.readouterr().out


def test_changed_data_is_noted(folder, tmp_path, capsys):
    record = json.loads((folder / "run.json").read_text())
    record["config"]["data"]["splits"]["test"] = 360
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "run.json").write_text(json.dumps(record))
    (copy / "checkpoints").symlink_to(folder / "checkpoints")
    assert main(["evaluate", str(copy), "--json"]) == 0
    assert "has changed since the run" in capsys.readouterr().err


# -- what a user can do wrong -----------------------------------------------------------------------------------------

MISTAKES = [
    (["predict", "RUN", "absent.png"], 1, ["absent.png", "missing"]),
    (["predict", "RUN", "."], 1, ["regular file"]),
    (["predict", "RUN", "text.png"], 1, ["text.png", "unreadable"]),
    (["predict", "RUN", "good.png", "cut.png"], 1, ["cut.png", "unreadable"]),
    (["predict", "RUN", "deep.png"], 1, ["deep.png", "mode"]),
    (["predict", "RUN"], 2, ["IMAGE"]),
    (["predict"], 2, ["RUN"]),
    (["predict", "absent", "good.png"], 1, ["absent", "run.json"]),
    (["predict", ".", "good.png"], 1, ["run.json"]),
    (["predict", "RUN", "good.png", "--top", "0"], 2, ["--top", "0"]),
    (["predict", "RUN", "good.png", "--top", "two"], 2, ["--top", "'two'"]),
    (["predict", "RUN", "good.png", "--engine", "tprch"], 2, ["'tprch'", "'torch'"]),
    (["predict", "RUN", "good.png", "--threads", "-1"], 2, ["threads", "-1"]),
    (["evaluate", "absent"], 1, ["absent", "run.json"]),
    (["evaluate", "RUN", "--split", "tset"], 2, ["--split", "'tset'", "'test'"]),
    (["evaluate", "RUN", "--top", "11"], 2, ["--top", "10 classes", "11"]),
    (["evaluate", "RUN", "--data", "mnits"], 1, ["'mnits'", "'mnist'"]),
    (["evaluate", "RUN", "--data", "wide.npz"], 2, ["(1, 9, 9)", "(1, 8, 8)"]),
    (["evaluate", "RUN", "--data", "two.npz"], 2, ["other classes"]),
    (["evaluate", "RUN", "--data-dir", "nowhere", "--data", "mnist"], 1, ["nowhere"]),
    (["evaluate", "RUN", "--enigne", "x"], 2, ["--enigne", "'--engine'"]),
]


@pytest.mark.parametrize(
    ("args", "code", "parts"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_mistake_ends_in_one_line(args, code, parts, folder, image, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("not an image")
    Path("cut.png").write_bytes(Path(image("good.png")).read_bytes()[:-30])
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save("deep.png")
    for name, side in (("wide.npz", 9), ("two.npz", 8)):
        np.savez(name, images=np.arange(20 * side**2, dtype=np.uint8).reshape(20, side, side), labels=np.arange(20) % 2)
    assert main([str(folder) if word == "RUN" else word for word in args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("convolt: error: ")
    assert err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_split_that_is_not_there(folder, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert (
        main(
            ["train", "--engine", "im2col", "--epochs", "1", "--subset", "50", "--valid", "0", "--quiet", "--out", run]
        )
        == 0
    )
    assert main(["evaluate", run, "--split", "valid"]) == 1
    assert "no valid split; choose --split from: train, test" in capsys.readouterr().err


def test_damaged_weights_are_refused_as_a_process(folder, tmp_path, image):
    copy = tmp_path / "run"
    for path in sorted(folder.rglob("*")):
        target = copy / path.relative_to(folder)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            content = bytearray(path.read_bytes())
            if path.name == "model.safetensors":
                content[-1] ^= 1
            target.write_bytes(content)
    command = [sys.executable, "-m", "convolt", "predict", str(copy), image()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("convolt: error: ")
    assert done.stderr.count("\n") == 1
