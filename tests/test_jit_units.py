"""What multiplies in bf16, and what a user is told about it: in Python, on the command line, in a run's record."""

import json
import re

import numpy as np
import pytest
from engine_cases import UNITS
from jit_cases import TINY, forced_unit_is_taken, measured, unit_is_the_fastest

from convolt import engines
from convolt.cli import main
from convolt.config import to_plain
from convolt.engines import JIT
from convolt.engines.jit.isa import Isa, converts, detect
from convolt.engines.jit.isa import units as units_of
from convolt.engines.jit.peaks import Pace, rates
from convolt.engines.jit.units import UNITS as NAMES
from convolt.engines.jit.units import bf16_units
from convolt.errors import EngineError
from convolt.layers import Conv2d, Dense, Flatten, ReLU
from convolt.model import Model
from convolt.peaks import Peak, Peaks
from convolt.recipe import Recipe
from convolt.run import Run


def test_the_fastest_unit_computes_or_float32_does_with_a_warning():
    unit_is_the_fastest()


def test_a_forced_unit_is_taken_whatever_is_measured():
    forced_unit_is_taken()


def test_tiles_need_no_measurement():
    with measured({"amx": 0.0, "dot": 1e6, "fma": 1e6}, 1e6):
        assert bf16_units(detect(), None) == ("amx", "amx")


@pytest.mark.parametrize(
    ("isa", "expected"),
    [
        (Isa("avx512", 16, 32, bf16_convert=True), ("dot", "fma")),
        (Isa("avx512", 16, 32), ("fma",)),
        (Isa("avx2", 8, 16), ("fma",)),
        (Isa("neon", 4, 32, bf16_convert=True), ("fma",)),
    ],
)
def test_units_of_instruction_sets(isa, expected):
    assert units_of(isa) == expected


def test_rounding_by_an_instruction_goes_with_the_units_that_have_it():
    assert [converts(unit) for unit in ("amx", "dot", "fma")] == [True, True, False]


def test_dot_products_serve_dense_layers_and_convolutions():
    with measured({"dot": 200.0, "fma": 90.0}, 110.0):
        model = Model((1, 9, 9), (Conv2d(1, 4, 2), ReLU(), Flatten(), Dense(256, 64)))
        stages = JIT(threads=1).explain(model, "bf16").stages
    told = {stage.name: stage.reason for stage in stages if stage.direction == "forward"}
    assert "AVX512-BF16 dot products: bf16; tap by tap" in told["0-1 Conv2d+ReLU"]
    assert told["3 Dense"].startswith("AVX512-BF16 dot products: bf16")


def test_multiply_adds_serve_no_convolution_unless_they_are_forced_to():
    """They would take tiles, whose layout costs more than it gains."""
    with measured({"dot": 80.0, "fma": 120.0}, 110.0):
        told = {stage.name: stage.reason for stage in JIT(threads=1).explain(TINY, "bf16").stages}
    assert "vectors: fp32" in told["0 Conv2d"]


def test_rates_are_measured_for_each_unit_and_for_float32():
    found, fp32 = rates(detect(), UNITS, repeats=1)
    assert set(found) == set(UNITS)
    assert min(fp32, *found.values()) > 0


def test_a_run_that_asks_for_bf16_is_computed_in_float32_where_that_is_faster():
    """And gives float32's bits; the warning says how to have bf16 all the same."""
    x = np.random.default_rng(0).integers(0, 256, (5, *TINY.input_shape), np.uint8)
    with measured({"fma": 10.0}, 30.0):
        with pytest.warns(UserWarning, match=r"30 GFLOP/s on one core, .* 10; .*: engine\.unit=fma") as told:
            executor = JIT(threads=1).executor(TINY, None, Recipe(precision="bf16", seed=0))
        assert "\n" not in str(told[0].message)
        plain = JIT(threads=1).executor(TINY, None, Recipe(precision="fp32", seed=0))
        np.testing.assert_array_equal(executor.predict(x), plain.predict(x))
        with pytest.warns(UserWarning, match="computed in float32"):
            explanation = JIT(threads=1).explain(TINY, "bf16")
        assert not any(name in str(explanation) for name in NAMES.values())
    executor.close()
    plain.close()


def test_a_unit_that_the_cpu_lacks_is_refused_with_those_it_has():
    with measured({"fma": 10.0}, 30.0), pytest.raises(EngineError) as caught:
        JIT(threads=1, unit="amx").executor(TINY, None, Recipe(precision="bf16"))
    assert re.fullmatch(
        r"engine jit: unit='amx' multiplies by AMX tiles, which .* does not offer; use one of fma, or leave it out",
        str(caught.value),
    )


def test_an_unknown_unit_is_refused_with_the_nearest():
    with pytest.raises(EngineError, match="engine jit: unknown unit 'dots'; did you mean 'dot'"):
        JIT(unit="dots")


# --- the command line ------------------------------------------------------------------------------------------------

RECIPE = {"model": to_plain(Model((1, 8, 8), (Conv2d(1, 3, 3), ReLU(), Flatten(), Dense(108, 10)))), "epochs": 1}


@pytest.fixture
def recipe(tmp_path):
    """A recipe file for the embedded digits, with a model that is compiled in seconds."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(RECIPE))
    return str(path)


def test_a_run_is_trained_by_the_unit_that_it_names_and_tells_it(recipe, tmp_path, capsys):
    words = ["train", "--recipe", recipe, "--engine", "jit", "--threads", "1", "--precision", "bf16", "--subset", "64"]
    words += ["--set", "engine.unit=fma", "--quiet", "--json", "--out", str(tmp_path / "run")]
    assert main(words) == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    assert (told["engine"], told["precision"]) == ("jit", "bf16")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["engine"]["unit"] == "fma"
    assert Run.load(tmp_path / "run").config["engine"]["unit"] == "fma"


@pytest.mark.parametrize("unit", ["dot", "dots"])
def test_a_wrong_unit_is_one_line(recipe, tmp_path, capsys, unit):
    words = ["train", "--recipe", recipe, "--engine", "jit", "--precision", "bf16", "--subset", "64", "--quiet"]
    with measured({"fma": 10.0}, 30.0):
        code = main([*words, "--set", f"engine.unit={unit}", "--out", str(tmp_path / "run")])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert ("use one of fma" if unit == "dot" else "did you mean 'dot'") in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_is_explained_names_the_unit(recipe, capsys):
    words = ["train", "--recipe", recipe, "--engine", "jit", "--precision", "bf16", "--explain"]
    assert main([*words, "--set", "engine.unit=fma"]) == 0
    assert f"{NAMES['fma']}: bf16, groups 1" in capsys.readouterr().out


def test_units_take_part_in_a_benchmark(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engines, "measured_peaks", lambda threads: Peaks(1, Peak(100, 100), None, Peak(10, 10)))
    path = tmp_path / "model.json"
    path.write_text(json.dumps(RECIPE["model"]))
    words = ["bench", "--model", str(path), "--rounds", "1", "--seconds-per-slice", "0", "--threads", "1", "--json"]
    assert main([*words, "--batch-size", "4", "--contenders", "jit-bf16-unit=fma,im2col"]) == 0
    results = json.loads(capsys.readouterr().out)["benchmarks"][0]["results"]
    assert [(one["name"], one["status"]) for one in results] == [("jit-bf16-unit=fma", "timed"), ("im2col", "timed")]


def test_the_pace_of_the_cores_is_a_part_of_their_best():
    pace = Pace(2)
    assert all(0 < pace.read() <= 1 for _ in range(3))
    pace.close()
    with pytest.raises(EngineError, match="closed"):
        pace.read()
