"""The torch engine's options, and what it says when the machine lacks something."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from convolt.engines.torch import Torch
from convolt.errors import ConfigError, EngineError
from convolt.layers import Dense
from convolt.model import Model

MODEL = Model((4,), (Dense(4, 3),))


@dataclass(frozen=True)
class Wanted:
    precision: str = "fp64"
    seed: int = 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": -1}, "threads must be an integer >= 1, or 0 for every allowed core; got -1"),
        ({"threads": 1, "device": "gpu"}, "Torch: device got 'gpu'; "),
        ({"threads": 1, "compile": "yes"}, "Torch: compile must be true or false; got 'yes'"),
        ({"threads": 1, "fp32_precision": "tf32"}, "Torch: fp32_precision got 'tf32'; "),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Torch(**options)


def test_what_the_machine_cannot_do_is_named(monkeypatch):
    with pytest.raises(EngineError, match="precision must be one of fp64, fp32, bf16, fp16; got 'fp32-master64'"):
        Torch(threads=1).executor(MODEL, None, Wanted("fp32-master64"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="device='cuda' needs a GPU and a CUDA build of torch; use device='cpu'"):
        Torch(threads=1, device="cuda").executor(MODEL, None, Wanted())
    automatic = Torch(threads=1, device="auto").executor(MODEL, None, Wanted())
    assert automatic.predict(np.zeros((1, 4))).shape == (1, 3)


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_missing_torch_is_one_line():
    script = """
import sys
sys.modules["torch"] = None
from convolt import engines
from convolt.errors import MissingDependency
import importlib
for ask in (lambda: engines.engine_class("torch"), lambda: importlib.import_module("convolt.convert")):
    try:
        ask()
    except MissingDependency as error:
        print(error)
"""
    engine, conversion = run(script).splitlines()
    assert engine.startswith("engine torch needs torch, which is not installed; run: pip install torch==")
    assert conversion.startswith("conversion from and to PyTorch needs torch, which is not installed; run: ")


def test_missing_compiler_is_one_line(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none_found():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    with pytest.raises(EngineError, match=r"compile=True needs a C\+\+ compiler; install g\+\+"):
        Torch(threads=1, compile=True).executor(MODEL, None, Wanted())


def test_products_of_float32_are_in_bf16_during_calls_alone(monkeypatch):
    kinds = torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul
    seen = []
    linear = torch.nn.Linear.forward

    def watched(module, x):
        seen.extend(kind.fp32_precision for kind in kinds)
        return linear(module, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    before = [kind.fp32_precision for kind in kinds]
    executor = Torch(threads=1, fp32_precision="bf16").executor(MODEL, None, Wanted("fp32"))
    executor.predict(np.ones((2, 4), np.float32))
    assert seen == ["bf16", "bf16"]
    assert [kind.fp32_precision for kind in kinds] == before
