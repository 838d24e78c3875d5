import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convolt.errors import ConfigError
from convolt.stats import estimate, paired_ratio

TIMES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("n", "low", "high", "coverage"),
    [  # tables of the sign test
        (1, 1, 1, 0.0),
        (5, 1, 5, 0.9375),
        (6, 1, 6, 0.96875),
        (9, 2, 8, 0.9609375),
        (15, 4, 12, 0.96484375),
        (25, 8, 18, 0.9567147),
    ],
)
def test_interval_of_the_median(n, low, high, coverage):
    found = estimate([float(value) for value in reversed(range(1, n + 1))])
    assert (found.median, found.low, found.high, found.n) == ((n + 1) / 2, low, high, n)
    assert found.coverage == pytest.approx(coverage)


@pytest.mark.parametrize("n", [2, 7, 12])
def test_coverage_is_the_share_of_all_samples(n):
    """Each value lies below the true median or not: 2^n equally likely samples of -1 and 1 around a median of 0."""
    held = 0
    for signs in itertools.product((-1.0, 1.0), repeat=n):
        found = estimate(signs)
        held += found.low < 0 < found.high
    assert held / 2**n == pytest.approx(estimate([1.0] * n).coverage)


def test_less_confidence_is_a_narrower_interval():
    values = [float(value) for value in range(20)]
    assert estimate(values, 0.5).high - estimate(values, 0.5).low < estimate(values).high - estimate(values).low


def test_one_wild_value_moves_nothing():
    values = [float(value) for value in range(15)]
    assert estimate([*values[:-1], 1e9]) == estimate(values)


@given(TIMES)
def test_interval_holds_the_median(values):
    found = estimate(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)
    assert 0 <= found.coverage < 1


@given(st.lists(st.tuples(st.floats(0.1, 10), st.integers(0, 10)), min_size=1, max_size=30))
def test_what_slows_a_round_down_cancels(rounds):
    a = [time * 2.0**slower for time, slower in rounds]
    b = [time * 2.0**slower / 4 for time, slower in rounds]
    found = paired_ratio(a, b)
    assert (found.low, found.median, found.high) == (4, 4, 4)


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ConfigError, match="at least one value"):
        estimate([])
    with pytest.raises(ConfigError, match="equally many values; got 2 and 1"):
        paired_ratio([1.0, 2.0], [1.0])


def test_estimate_prints_itself_with_its_interval():
    assert str(estimate([1.0, 2.0, 3.0])) == "2 [1, 3]"
