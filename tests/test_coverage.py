"""Every operation of every engine has its backward checked, and docs/coverage.md says so truly."""

import pytest
from engine_cases import CASES, ENGINES, Case
from engine_checks import CHECKS, adds_gradients, equals_finite_differences, equals_pytorch
from engine_coverage import FILE, checked, render

from convolt import engines
from convolt.layers import LAYERS


@pytest.mark.parametrize("entry", ENGINES, ids=lambda entry: entry.name)
@pytest.mark.parametrize("operation", LAYERS, ids=lambda operation: operation.__name__)
def test_backward_is_checked(entry, operation):
    assert checked(entry, operation, equals_pytorch) > 0
    assert checked(entry, operation, adds_gradients) > 0
    if entry.finest == "fp64":
        assert checked(entry, operation, equals_finite_differences) > 0


def test_every_engine_is_in_the_suites():
    assert {entry.make(1).NAME for entry in ENGINES} == set(engines.names())


def test_checks_are_those_that_the_table_speaks_of():
    assert CHECKS[0] is equals_pytorch
    assert CHECKS[-1] is equals_finite_differences


def test_an_operation_without_a_case_is_noticed(monkeypatch):
    kept = tuple(case for case in CASES if "Dropout" not in str(case))
    monkeypatch.setattr("engine_coverage.CASES", kept)
    dropout = next(operation for operation in LAYERS if operation.__name__ == "Dropout")
    assert checked(ENGINES[0], dropout, equals_pytorch) == 0


def test_names_of_cases_are_unique():
    names = [case.name for case in CASES if isinstance(case, Case)]
    assert len(set(names)) == len(names)


def test_the_written_table_is_true():
    assert FILE.read_text() == render(), "run: python tests/engine_coverage.py"
