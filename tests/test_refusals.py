"""Steps that every engine must refuse: nothing moves, and the next one is as any."""

import numpy as np
import pytest
from engine_cases import ENGINES
from step_cases import NET, WRONG, refuses_gradients, refuses_statistics, refuses_what_is_no_label, step

from convolt.losses import MSE, CrossEntropy
from convolt.optimizers import SGD, Adam
from convolt.recipe import Recipe

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


@every_engine
@pytest.mark.parametrize("loss", [CrossEntropy(), MSE()], ids=["CrossEntropy", "MSE"])
def test_a_first_step_that_is_refused_leaves_no_state(entry, loss):
    """Another optimizer may begin then."""
    executor = entry.make(1).executor(NET, None, Recipe(precision=entry.finest))
    assert np.isnan(step(executor, scale=np.nan, optimizer=SGD(lr=0.1, momentum=0.9), loss=loss))
    assert set(executor.optimizer_state()) == {"step"}
    assert np.isfinite(step(executor, optimizer=Adam(lr=0.1)))
    assert set(executor.optimizer_state()) == {"step", "exp_avg", "exp_avg_sq"}
    executor.close()
