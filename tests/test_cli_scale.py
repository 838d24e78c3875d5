import json

import pytest

from convolt import cli
from convolt.cli import scale as verb
from convolt.config import to_plain
from convolt.layers import Conv2d, Dense, Flatten, ReLU
from convolt.model import Model

MODEL = Model((1, 4, 4), (Conv2d(1, 2, 3), ReLU(), Flatten(), Dense(8, 3)))


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(to_plain(MODEL)))
    return str(path)


@pytest.fixture
def run(capsys, tiny):
    """Runs `convolt scale` on a tiny model; returns exit code, stdout and stderr."""

    def run(*options):
        quick = ("--engine", "im2col", "--batch-size", "8", "--rounds", "1", "--seconds-per-slice", "0")
        code = cli.main(["scale", "--model", tiny, *quick, *options])
        return code, *capsys.readouterr()

    return run


def test_two_real_ranks(run, tmp_path):
    pytest.importorskip("mpi4py")
    out = tmp_path / "new" / "folder"
    code, stdout, _ = run("--ranks", "1,2", "--weak", "--strong", "--predict-ranks", "4", "--json", "--out", str(out))
    assert code == 0
    found = json.loads(stdout)
    assert found == json.loads((out / "scale.json").read_text())
    assert [(p["mode"], p["ranks"], p["batch_size"], p["status"]) for p in found["points"]] == [
        ("strong", 1, 8, "timed"),
        ("strong", 2, 8, "timed"),
        ("weak", 1, 8, "timed"),
        ("weak", 2, 16, "timed"),
    ]
    assert {(p["label"], p["ranks"], p["network"]) for p in found["predictions"]} == {
        ("predicted", 2, "this-machine"),
        ("predicted", 4, "10gbe"),
    }
    assert found["model"].endswith("tiny.json")
    assert found["machine"]["cores"]["allowed"] >= 1
    assert sorted(path.name for path in out.glob("*.png")) == ["breakdown.png", "efficiency.png", "speedup.png"]


def test_threads_need_no_mpi_and_make_a_table(run):
    code, stdout, _ = run("--ranks", "1", "--threads", "1")
    assert code == 0
    assert "base: im2col-fp32, one process, one thread" in stdout
    assert "strong scaling, measured" in stdout
    assert "weak" not in stdout
    assert "other processes" in stdout


def test_shape_and_classes_of_a_data_set():
    model = verb.make_plan(
        {"model_name": "mnist-cnn", "data": "digits", "precision": "fp32", "seconds_per_slice": 0.0, "ranks": (1,)}
    ).model
    assert (model.input_shape, model.output_shape) == ((1, 8, 8), (10,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "two"], "must be numbers such as 1,2,4; got 'two'"),
        (["--ranks", "0"], "ranks must be different numbers from 1 on; got 0"),
        (["--ranks", "16"], "8 images cannot be shared by 16 ranks"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--network", "1gbe"], "--network is for predictions"),
        (["--predict-ranks", "2", "--network", "2gbe"], "network: unknown name '2gbe'; did you mean"),
        (["--epochs", "3"], "--epochs: is for --classic alone"),
        (["--subset", "100"], "--subset: is for --classic alone"),
        (["--classic", "--ranks", "2"], "--ranks: --classic trains five configurations of its own"),
        (["--classic", "--weak"], "--weak: --classic trains five"),
        (["--input-shape", "3x8x8"], "--input-shape and --classes are for networks of the zoo"),
        (["--data", "nosuch"], "nosuch"),
        (["--base", "im2col,nosuch"], "unknown name 'nosuch'"),
        (["--precision", "bf16", "--ranks", "1"], "no serial program to compare with: engine im2col: precision"),
    ],
)
def test_mistakes_end_in_one_line(run, options, message):
    code, stdout, err = run(*options)
    assert code in {1, 2}
    assert stdout == ""
    assert err.splitlines()[-1].startswith("convolt: error: ")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_out_that_is_a_file(run, tmp_path):
    (tmp_path / "taken").touch()
    code, _, err = run("--out", str(tmp_path / "taken"))
    assert code == 2
    assert "name a folder" in err


def test_no_ranks_in_ranks(run, monkeypatch):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    code, _, err = run("--ranks", "1,2")
    assert code == 2
    assert "scale starts its ranks itself" in err


@pytest.mark.parametrize(("most", "numbers"), [(1, (1,)), (2, (1, 2)), (3, (1, 2)), (8, (1, 2, 4, 8))])
def test_ranks_when_none_are_named(most, numbers):
    assert verb.powers_of_two(most) == numbers
