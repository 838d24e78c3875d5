"""Early stopping as a pure function of the metrics seen."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convolt.early_stopping import EarlyStopping
from convolt.errors import ConfigError


def observe_all(stopping, metrics):
    state = stopping.init()
    for epoch, metric in enumerate(metrics):
        state = stopping.observe(state, metric, epoch)
    return state


def stop_epoch(stopping, metrics):
    """The epoch after which the run ends, or None."""
    epochs = range(1, len(metrics) + 1)
    return next((n - 1 for n in epochs if stopping.should_stop(observe_all(stopping, metrics[:n]))), None)


def test_a_run_stops_after_patience_epochs_without_improvement():
    losses = [1.0, 0.8, 0.9, 0.85, 0.7, 0.71, 0.72, 0.73, 0.5]
    assert stop_epoch(EarlyStopping(patience=3), losses) == 7
    assert stop_epoch(EarlyStopping(patience=2), losses) == 3
    assert stop_epoch(EarlyStopping(patience=5), losses) is None
    assert observe_all(EarlyStopping(), losses[:8]) == {"best": 0.7, "best_epoch": 4, "bad_epochs": 3}


def test_accuracy_improves_upwards():
    rising = [0.1, 0.2, 0.3, 0.4]
    assert stop_epoch(EarlyStopping(patience=1, monitor="valid_accuracy"), rising) is None
    assert stop_epoch(EarlyStopping(patience=1, monitor="valid_loss"), rising) == 1


def test_an_improvement_must_exceed_min_delta():
    assert stop_epoch(EarlyStopping(patience=2, min_delta=0.25), [1.0, 0.75, 0.5, 0.25]) is None
    assert stop_epoch(EarlyStopping(patience=1, min_delta=0.25), [1.0, 0.75]) == 1
    assert stop_epoch(EarlyStopping(patience=1), [1.0, 1.0]) == 1


@pytest.mark.parametrize("monitor", ["valid_loss", "valid_accuracy"])
def test_what_is_not_a_number_is_no_improvement(monitor):
    stopping = EarlyStopping(patience=2, monitor=monitor)
    assert stop_epoch(stopping, [math.nan, math.nan]) == 1
    state = observe_all(stopping, [math.nan, 0.5, math.nan])
    assert state == {"best": 0.5, "best_epoch": 1, "bad_epochs": 1}


metrics = st.lists(st.floats(0, 10), max_size=30)


@given(metrics=metrics, patience=st.integers(1, 5), monitor=st.sampled_from(["valid_loss", "valid_accuracy"]))
def test_the_best_epoch_is_the_first_of_the_best_metrics(metrics, patience, monitor):
    best = min if monitor == "valid_loss" else max
    state = observe_all(EarlyStopping(patience=patience, monitor=monitor), metrics)
    assert state["best"] == (best(metrics) if metrics else None)
    assert state["best_epoch"] == (metrics.index(best(metrics)) if metrics else None)
    assert state["bad_epochs"] == (len(metrics) - 1 - state["best_epoch"] if metrics else 0)


@given(metrics=metrics, cut=st.integers(0, 30))
def test_the_state_survives_a_resume(metrics, cut):
    stopping = EarlyStopping()
    state = json.loads(json.dumps(observe_all(stopping, metrics[:cut]), allow_nan=False))
    for epoch, metric in enumerate(metrics[cut:], start=min(cut, len(metrics))):
        before = dict(state)
        following = stopping.observe(state, metric, epoch)
        assert state == before
        state = following
    assert state == observe_all(stopping, metrics)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EarlyStopping(patience=0), "EarlyStopping: patience must be an integer >= 1; got 0"),
        (lambda: EarlyStopping(patience=True), "EarlyStopping: patience must be an integer >= 1; got True"),
        (lambda: EarlyStopping(min_delta=-1), "EarlyStopping: min_delta must be >= 0; got -1"),
        (
            lambda: EarlyStopping(monitor="test_accuracy"),
            "EarlyStopping: monitor got 'test_accuracy'; did you mean 'valid_accuracy'? "
            "valid: valid_accuracy, valid_loss",
        ),
    ],
)
def test_a_field_that_cannot_be_is_refused(build, message):
    with pytest.raises(ConfigError) as caught:
        build()
    assert str(caught.value) == message
