from types import SimpleNamespace

import pytest

from convolt.load import LoadMeter


@pytest.mark.parametrize(("children", "others"), [(False, 0.6), (True, 0.1)])
def test_what_ended_children_computed_is_not_others(tmp_path, monkeypatch, children, others):
    clocks = SimpleNamespace(perf_counter=iter([0.0, 10.0]).__next__, process_time=iter([1.0, 3.0]).__next__)
    times = iter([(0.5, 0.5), (5.0, 1.0)])
    monkeypatch.setattr("convolt.load.time", clocks)
    monkeypatch.setattr("convolt.load.os.sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr("convolt.load.os.sysconf", lambda name: 100)
    monkeypatch.setattr(
        "convolt.load.os.times",
        lambda: SimpleNamespace(**dict(zip(("children_user", "children_system"), next(times), strict=True))),
    )
    (tmp_path / "proc").mkdir()
    stat = tmp_path / "proc" / "stat"
    stat.write_text("cpu0 100 0 0 500 0 0 0 0 0 0\n")
    meter = LoadMeter(tmp_path, children)
    stat.write_text("cpu0 900 0 0 700 0 0 0 0 0 0\n")  # busy for 8 s of 10: 2 of this process, 5 of its children
    assert meter.read().others == pytest.approx(others)
