import pytest
from hypothesis import given
from hypothesis import strategies as st

from convolt.errors import ConfigError
from convolt.scaling.laws import amdahl, efficiency, fit_amdahl, fit_gustafson, gustafson, karp_flatt, speedup

FRACTIONS = st.floats(0, 1)
WORKERS = st.integers(1, 10_000)


def test_speedup_and_efficiency():
    assert speedup(12.0, 4.0) == 3.0
    assert efficiency(3.0, 4) == 0.75


@pytest.mark.parametrize(("serial", "parallel"), [(0.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)])
def test_speedup_needs_times(serial, parallel):
    with pytest.raises(ConfigError, match="two positive times"):
        speedup(serial, parallel)


@pytest.mark.parametrize(
    ("f", "p", "bound", "scaled"),
    [
        (0.0, 8, 8.0, 8.0),
        (1.0, 8, 1.0, 1.0),
        (0.1, 10, 1 / 0.19, 9.1),
        (0.05, 1024, 1 / (0.05 + 0.95 / 1024), 1024 - 0.05 * 1023),  # Gustafson 1988 has 1023.6 for f = 0.0004
        (0.004, 1024, 1 / (0.004 + 0.996 / 1024), 1024 - 0.004 * 1023),
    ],
)
def test_laws_by_hand(f, p, bound, scaled):
    assert amdahl(f, p) == pytest.approx(bound)
    assert gustafson(f, p) == pytest.approx(scaled)


@given(FRACTIONS, WORKERS)
def test_laws_stay_between_one_and_p(f, p):
    for law in (amdahl, gustafson):
        assert 1 - 1e-9 <= law(f, p) <= p * (1 + 1e-9)
    assert amdahl(f, p) <= gustafson(f, p) * (1 + 1e-9)


@given(FRACTIONS, st.integers(2, 10_000))
def test_karp_flatt_undoes_amdahl(f, p):
    assert karp_flatt(amdahl(f, p), p) == pytest.approx(f, abs=1e-9)


def test_karp_flatt_beyond_p_is_negative():
    assert karp_flatt(2.2, 2) == pytest.approx((1 / 2.2 - 0.5) / 0.5)
    assert karp_flatt(2.2, 2) < 0


def test_karp_flatt_needs_two_workers():
    with pytest.raises(ConfigError, match="at least 2 workers; got 1"):
        karp_flatt(1.0, 1)


@given(st.floats(0, 1), st.lists(st.integers(2, 64), min_size=1, max_size=6))
def test_fits_find_the_fraction_again(f, workers):
    assert fit_amdahl([1, *workers], [1.0, *(amdahl(f, p) for p in workers)]) == pytest.approx(f, abs=1e-9)
    assert fit_gustafson([1, *workers], [1.0, *(gustafson(f, p) for p in workers)]) == pytest.approx(f, abs=1e-9)


def test_amdahl_fit_is_the_least_squares_one():
    workers, speedups = [2, 4, 8], [1.9, 3.1, 5.2]

    def squares(f):
        return sum((1 / s - f - (1 - f) / p) ** 2 for p, s in zip(workers, speedups, strict=True))

    best = fit_amdahl(workers, speedups)
    assert squares(best) < min(squares(best - 1e-4), squares(best + 1e-4))


def test_gustafson_fit_is_the_least_squares_one():
    workers, speedups = [2, 4, 8], [1.9, 3.6, 6.9]

    def squares(f):
        return sum((s - gustafson(f, p)) ** 2 for p, s in zip(workers, speedups, strict=True))

    best = fit_gustafson(workers, speedups)
    assert squares(best) < min(squares(best - 1e-4), squares(best + 1e-4))


@pytest.mark.parametrize("fit", [fit_amdahl, fit_gustafson])
def test_fit_needs_two_workers_somewhere(fit):
    with pytest.raises(ConfigError, match="at least 2 workers; none was measured"):
        fit([1, 1], [1.0, 1.0])
    with pytest.raises(ConfigError, match="one speedup for each"):
        fit([1, 2], [1.0])


@pytest.mark.parametrize("law", [amdahl, gustafson, efficiency])
def test_no_worker_is_refused(law):
    with pytest.raises(ConfigError, match="at least 1; got 0"):
        law(0.5, 0)
