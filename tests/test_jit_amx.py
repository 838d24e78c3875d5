"""AMX on CPUs that have none: the tests of bf16 again, in processes in which tile instructions are emulated."""

import json
import os
import subprocess
import sys
from pathlib import Path

import emulated_amx
import pytest
from test_jit_mutants import assert_all_are_caught

TESTS = Path(__file__).parent
WHY_NOT = emulated_amx.missing()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


def run(*arguments: str, timeout: int) -> str:
    """Standard output of a Python that finds the tests' modules."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def pytest_passes(*arguments: str, timeout: int) -> None:
    run("-m", "pytest", "-q", "-p", "emulated_amx", "-p", "no:xdist", *arguments, timeout=timeout)


def test_products_of_tiles():
    pytest_passes("tests/test_jit_bf16.py", "-k", "amx", timeout=110)


def test_layers_on_tiles():
    names = ("an odd width, channels that fill no tile", "whole tiles")
    test = "tests/test_jit_engine.py::test_bf16_equals_float64_of_the_same_operands"
    pytest_passes(*(f"{test}[{name}-amx]" for name in names), timeout=110)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "chosen"),
    [("engine", "amx"), ("engine", "bits"), ("half", "float32 or written"), ("memory", "bf16"), ("update", "bf16")],
)
def test_everything_in_bf16(file, chosen):
    options = ("-m", "slow or not slow", "-k", chosen, "--timeout=1700")
    pytest_passes(f"tests/test_jit_{file}.py", *options, timeout=1700)


@pytest.mark.slow
def test_mutants_of_tiles_are_caught():
    script = (
        "import emulated_amx; emulated_amx.emulate(); import json, jit_mutants as all\n"
        "chosen = (*all.BF16, *all.HALF)\n"
        "tiles = [n for n, one in enumerate(all.MUTANTS) if one.unit == 'amx' and one in chosen]\n"
        "print(json.dumps(all.judged(tiles)))"
    )
    assert_all_are_caught(json.loads(run("-c", script, timeout=1700).splitlines()[-1]))
