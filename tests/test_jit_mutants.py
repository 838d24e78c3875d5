"""The suites of the jit engine notice mistakes in its kernels and plans: every mutant fails, the engine does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jit_mutants import MUTANTS, REPRESENTATIVE, JitMutant

MANY = 20  # mutants for one process
SCRIPT = Path(__file__).with_name("jit_mutants.py")


def outcomes(numbers, timeout: int) -> dict:
    """In a process without threads, which can be forked."""
    command = [sys.executable, str(SCRIPT), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def assert_all_are_caught(found: dict) -> None:
    assert {by: message for by, message in found["innocent"].items() if message} == {}
    survivors = [MUTANTS[int(number)] for number, message in found["mutants"].items() if message is None]
    assert survivors == []


def test_some_mutants_are_caught():
    assert_all_are_caught(outcomes(REPRESENTATIVE, timeout=110))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(MUTANTS), MANY))
def test_every_mutant_is_caught(first):
    assert_all_are_caught(outcomes(range(first, min(first + MANY, len(MUTANTS))), timeout=1700))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}-{mutant.inside}-{mutant.mistake}")
def test_mutant_is_python(mutant: JitMutant):
    compile(mutant.text(), mutant.file, "exec")


def test_mutants_are_many_and_different():
    assert len({(mutant.file, mutant.inside, mutant.right, mutant.wrong) for mutant in MUTANTS}) == len(MUTANTS) >= 20
    assert len({MUTANTS[number].file for number in REPRESENTATIVE}) == len(REPRESENTATIVE) >= 6
