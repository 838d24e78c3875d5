"""Steps that every engine must refuse: nothing moves, and the next one is as any."""

import numpy as np
import pytest
from engine_cases import ENGINES
from step_cases import WRONG, refuses_gradients, refuses_statistics, refuses_what_is_no_label

every_engine = pytest.mark.parametrize("entry", ENGINES, ids=lambda entry: entry.name)


@every_engine
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{np.asarray(wrong).dtype.name} {int(wrong)}")
def test_numbers_that_are_no_labels(entry, wrong):
    refuses_what_is_no_label(entry, wrong)


@every_engine
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_are_not_finite(entry, name):
    refuses_statistics(entry, name)


@every_engine
def test_gradients_that_are_not_finite(entry):
    refuses_gradients(entry)
