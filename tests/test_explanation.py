import json

import numpy as np
import pytest
from engine_cases import CASES, ENGINES, ON_TILES, UNITS

from convolt import zoo
from convolt.cli import main
from convolt.engines import JIT, Im2col
from convolt.engines.jit.isa import detect
from convolt.engines.jit.units import UNITS as UNIT_NAMES
from convolt.errors import EngineError
from convolt.flops import layer_work, training_flops
from convolt.layers import BatchNorm2d, Conv2d, Dense, Flatten, LeakyReLU, MaxPool2d, ReLU
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import SGD
from convolt.recipe import Recipe

NET = Model(
    (8, 12, 12),
    (
        *(Conv2d(8, 16, 3, padding=1), ReLU(), MaxPool2d(2)),
        *(Conv2d(16, 16, 3, padding=1, groups=4), BatchNorm2d(16), LeakyReLU(0.1), MaxPool2d(3, 2)),
        *(Flatten(), Dense(64, 512), ReLU(), Dense(512, 5)),
    ),
)
VECTORS = f"{detect().name} vectors"


def why(explanation, direction="forward"):
    return {stage.name.split()[0]: stage.reason for stage in explanation.stages if stage.direction == direction}


@pytest.mark.parametrize("entry", ENGINES, ids=lambda entry: entry.name)
def test_stages_hold_all_the_work_once(entry):
    explanation = entry.make(1).explain(zoo.mnist_cnn(), entry.finest)
    assert sum(stage.flops for stage in explanation.stages) == training_flops(zoo.mnist_cnn())
    assert all(stage.kernels and stage.reason for stage in explanation.stages)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_stage_of_a_plan_has_a_reason(case):
    explanation = JIT(threads=1).explain(case.model, batch_size=case.batch)
    assert all(stage.kernels and stage.reason for stage in explanation.stages)
    assert sum(stage.flops for stage in explanation.stages) == training_flops(case.model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_explained_is_what_runs(precision):
    engine = JIT(threads=1, unit=UNITS[0])
    executor = engine.executor(NET, None, Recipe(precision=precision))
    x = np.zeros((6, *NET.input_shape), np.uint8)
    executor.train_step(x, np.zeros(6, np.int64), CrossEntropy(), 1 / 6, SGD(lr=0.1))
    ran = [(time.stage, time.direction) for time in executor.profile(x, training=True)]
    executor.close()
    stages = engine.explain(NET, precision, 6).stages
    assert set(ran) == {(stage.name, stage.direction) for stage in stages}


def test_a_gradient_that_the_optimizer_makes_is_explained():
    stages = JIT(threads=1).explain(zoo.mnist_cnn()).stages
    found = {(stage.name, stage.direction): stage for stage in stages}
    dense, norm = found["4-5 Dense+ReLU", "update"], found["gradient norm", "update"]
    assert (dense.kernels, norm.kernels) == (("dense_update:update",), ("loss:square_sum", "loss:look"))
    works = {work.name: work for work in layer_work(zoo.mnist_cnn())}
    assert dense.flops == works["4"].forward_flops
    assert found["4-5 Dense+ReLU", "backward"].flops == works["4"].forward_flops + works["5"].backward_flops
    assert found["loss", "backward"].kernels == ("loss:cross_entropy",)
    assert ("6 Dense", "update") not in found


def test_reasons_of_float32():
    reasons = why(JIT(threads=1).explain(NET))
    fused = "ReLU fused into it; MaxPool2d 2x2 fused into it"
    assert reasons["0-2"] == f"{fused}; {VECTORS}: fp32; tap by tap: fewer than 16 channels"
    assert reasons["6"] == "not fused: its windows overlap or are padded"
    assert reasons["8-9"] == f"ReLU fused into it; {VECTORS}: fp32"


@pytest.mark.parametrize("unit", UNITS)
def test_reasons_of_bf16(unit):
    explanation = JIT(threads=1, unit=unit).explain(NET, "bf16")
    reasons = why(explanation)
    if unit == "dot":
        assert reasons["0-2"].endswith(f"{UNIT_NAMES[unit]}: bf16; tap by tap: fewer than 16 channels")
        assert reasons["3"] == f"{UNIT_NAMES[unit]}: bf16; tap by tap: groups"
    else:
        assert reasons["0-2"].endswith(f"{UNIT_NAMES[unit]}: bf16, groups 1")
        assert reasons["3"].endswith(f"{UNIT_NAMES[unit]}: bf16, groups 4 as one")
    assert reasons["8-9"].endswith(f"{UNIT_NAMES[unit]}: bf16, 32,768 weights")
    assert reasons["10"] == f"{VECTORS}: 2,560 weights, bf16 pays from 16,384"
    assert why(explanation, "backward")["0-2"].endswith("no dx: nothing before it learns")


@pytest.mark.parametrize(
    ("layer", "why_not"),
    [
        (Conv2d(8, 8, 3, groups=8), "depthwise"),
        (Conv2d(36, 36, 3, groups=9), "groups 9, bf16 takes 8 at most"),
    ],
    ids=["depthwise", "many groups"],
)
def test_why_not_on_tiles(layer, why_not):
    model = Model((layer.in_channels, 6, 6), (layer, Flatten()))
    reasons = why(JIT(threads=1, unit=ON_TILES).explain(model, "bf16", 4))
    assert reasons["0"] == f"{VECTORS}: fp32, {why_not}; tap by tap: groups"


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((Conv2d(8, 4, 3), BatchNorm2d(4), MaxPool2d(3, 2)), "not fused: its windows overlap or are padded"),
        ((Conv2d(8, 8, 3, groups=8), MaxPool2d(2)), "not fused: depthwise kernels pool nothing"),
        ((Conv2d(8, 4, 3, groups=4), LeakyReLU(0.1), MaxPool2d(2)), "not fused: the activation before it is no ReLU"),
        ((Conv2d(8, 4, 3), LeakyReLU(0.1), MaxPool2d(2)), "not fused: the activation before it is no ReLU"),
        ((Conv2d(8, 4, 3), ReLU(), LeakyReLU(0.1)), "not fused: an activation is there already"),
        ((Conv2d(8, 4, 3), LeakyReLU(-1.0)), "not fused: the sign of its output does not tell that of its input"),
        ((Conv2d(8, 4, 3), MaxPool2d(2), ReLU()), "not fused: a max-pool, or the activation of a sum, ends a fusion"),
        ((Flatten(), ReLU()), "not fused: Flatten takes no activation"),
    ],
)
def test_what_is_not_fused_says_why(layers, reason):
    reasons = why(JIT(threads=1).explain(Model((8, 12, 12), layers)))
    assert list(reasons.values())[-1] == reason


def test_an_explanation_is_a_table():
    lines = str(Im2col(threads=1).explain(zoo.mnist_cnn(), "fp64", 32)).splitlines()
    assert lines[0] == "im2col, fp64, batch 32"
    assert lines[1].split() == ["stage", "direction", "MFLOP", "kernels", "why"]
    assert lines[2].startswith("0 Conv2d")


def test_a_precision_that_an_engine_lacks_is_refused():
    with pytest.raises(EngineError, match="engine im2col: precision must be one of"):
        Im2col(threads=1).explain(NET, "bf16")


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(batch_size):
    with pytest.raises(EngineError, match=f"batch size must be at least 1; got {batch_size}"):
        JIT(threads=1).explain(NET, batch_size=batch_size)


def test_the_command_line_explains_instead_of_training(tmp_path, capsys):
    options = ["train", "--explain", "--engine", "jit", "--batch-size", "32", "--runs-dir", str(tmp_path / "runs")]
    assert main(options) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("jit, fp32, batch 32\n")
    assert "ReLU fused into it" in out
    assert main([*options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["engine"], told["batch_size"], told["stages"][0]["name"]) == ("jit", 32, "input")
    assert not (tmp_path / "runs").exists()
