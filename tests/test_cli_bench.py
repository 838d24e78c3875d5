import json

import pytest

from convolt import cli, engines
from convolt.cli.bench import build_model
from convolt.config import to_plain
from convolt.contenders import TOLERANCES, Tolerance
from convolt.errors import ConfigError
from convolt.layers import Conv2d, Dense, Flatten, ReLU
from convolt.model import Model
from convolt.peaks import Peak, Peaks

MODEL = Model((1, 4, 4), (Conv2d(1, 2, 3), ReLU(), Flatten(), Dense(8, 3)))
PEAKS = Peaks(1, Peak(100, 100), Peak(1000, 1000), Peak(10, 10))
QUICK = ("--rounds", "3", "--seconds-per-slice", "0", "--threads", "1", "--batch-size", "4")


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(to_plain(MODEL)))
    return str(path)


@pytest.fixture
def run(monkeypatch, capsys, tiny):
    """Runs `convolt bench` on a tiny model, without measuring peaks; returns exit code, stdout and stderr."""

    def run(*options, peaks=PEAKS):
        monkeypatch.setattr(engines, "measured_peaks", lambda threads: peaks)
        code = cli.main(["bench", "--model", tiny, *QUICK, *options])
        return code, *capsys.readouterr()

    return run


def test_table_has_a_line_for_each_contender(run):
    code, out, _ = run("--contenders", "torch,im2col")
    assert code == 0
    lines = out.splitlines()
    assert "training, batch 4, 1 threads" in lines[0]
    assert "medians of 3 rounds, 75.0% intervals" in out
    assert "times torch" in out
    for name in ("torch", "im2col"):
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    assert "100 GFLOP/s on one core" in out
    assert "other processes:" in out
    assert "{" not in out


def test_json_is_all_there_is(run, tmp_path, tiny):
    file = tmp_path / "result.json"
    options = ("--contenders", "torch,im2col,loops", "--batch-size", "2", "--out", str(file), "--json")
    code, out, _ = run(*options)
    assert code == 0
    plain = json.loads(out)
    assert json.loads(file.read_text()) == plain
    assert plain.keys() == {"model", "input_shape", "classes", "machine", "versions", "absent", "benchmarks"}
    assert (plain["model"], plain["input_shape"], plain["classes"]) == (tiny, [1, 4, 4], 3)
    assert [report["batch_size"] for report in plain["benchmarks"]] == [4, 2]
    for report in plain["benchmarks"]:
        assert [result["name"] for result in report["results"]] == ["torch", "im2col", "loops"]
        assert {result["status"] for result in report["results"]} == {"timed"}
        assert all(len(result["seconds"]) == 3 for result in report["results"])
        assert report["peer"] == "torch"
        assert report["peaks"]["fp32"] == {"one_core": 100, "all_threads": 100}
        assert report["load"].keys() == {"seconds", "cores", "others", "load_average"}


def test_inference(run):
    code, out, _ = run("--contenders", "torch,im2col", "--inference", "--json")
    assert code == 0
    (report,) = json.loads(out)["benchmarks"]
    assert report["inference"]
    assert report["flops"] == 4 * MODEL.flops


def test_impossible_figure_is_flagged(run):
    code, out, _ = run("--contenders", "im2col", peaks=Peaks(1, Peak(1e-9, 1e-9), None, Peak(1, 1)))
    assert code == 0
    assert "IMPOSSIBLE" in out
    assert "warning: im2col is above the measured peak" in out
    assert "no instruction for it" in out
    assert "ratio" in out


def test_contender_that_cannot_take_part_has_its_line(run):
    code, out, _ = run("--contenders", "im2col,im2col-bf16")
    assert code == 0
    assert "im2col-bf16: unavailable: engine im2col: precision must be one of" in out


def test_a_benchmark_of_nobody_fails(run):
    code, out, _ = run("--contenders", "im2col-bf16")
    assert code == 1
    assert "im2col-bf16: unavailable" in out


def test_a_benchmark_of_what_is_wrong_fails(run, monkeypatch):
    monkeypatch.setitem(TOLERANCES, "fp32", Tolerance(0.0, 0.0, 0.0))
    code, out, _ = run("--contenders", "im2col")
    assert code == 1
    assert "im2col: wrong:" in out


def test_network_of_the_zoo_has_its_own_shape_unless_told():
    assert build_model("mnist-cnn", None, None).input_shape == (1, 28, 28)
    assert build_model("resnet18", None, None).input_shape == (3, 32, 32)
    other = build_model("cifar-cnn", (3, 16, 24), 100)
    assert (other.input_shape, other.output_shape) == ((3, 16, 24), (100,))


def test_described_network_has_no_other_shape(tiny):
    assert build_model(tiny, None, None) == MODEL
    with pytest.raises(ConfigError, match="are for networks of the zoo"):
        build_model(tiny, (1, 8, 8), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contenders", "troch"], "unknown name 'troch'; did you mean 'torch'"),
        (["--input-shape", "3x32"], "must be an input shape such as 3x32x32"),
        (["--batch-size", "0"], "batch size must be at least 1; got 0"),
        (["--contenders", "im2col", "--rounds", "0"], "rounds must be at least 1"),
        (["--threads", "-1"], "threads must be an integer >= 1"),
        (["--out", "/no/such/folder/x.json"], "--out /no/such/folder/x.json: its folder does not exist"),
    ],
)
def test_wrong_option_is_one_line(run, options, message):
    code, out, err = run(*options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_profile_ends_with_the_memory(run):
    code, out, _ = run("--contenders", "jit", "--profile")
    assert code == 0
    (line,) = (line for line in out.splitlines() if "MiB" in line)
    assert line.startswith("jit: ")
    assert "activations" in line
    assert "weights" in line
    code, out, _ = run("--contenders", "jit", "--json")
    assert json.loads(out)["benchmarks"][0]["results"][0]["memory"]["gradients"] > 0
