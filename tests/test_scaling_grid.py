"""A grid without times: an invented machine answers every job, so that what is made of the answers is known exactly."""

import io
import math
from dataclasses import dataclass, field, replace

import pytest
from rich.console import Console

from convolt import zoo
from convolt.durable import encode_json
from convolt.errors import ConfigError, EngineError
from convolt.scaling import plots, tables
from convolt.scaling.grid import THIS_MACHINE, Plan, Point, scale
from convolt.scaling.jobs import Samples, Slice
from convolt.scaling.laws import amdahl
from convolt.scaling.network import NETWORKS, Network, Sample, rabenseifner
from convolt.scaling.prediction import StepTrace, Timeline, Trace
from convolt.scaling.report import PREDICTED

MODEL = zoo.build("lenet5", (1, 28, 28), 10)
SIZE = MODEL.parameter_count
PLAN = Plan(MODEL, "im2col-fp32", ranks=(1, 2, 4), threads=(1, 2), batch_size=64, rounds=6)
MEMORY = Network("truth", 0.001, 1e-9, shared=True)
IMAGE, SERIAL = 0.01, 0.064  # seconds an image takes a worker, and those of a step that no worker can share


@dataclass
class Machine:
    """One second of serial work a step, images that workers share, rounds of different speed, and what goes wrong."""

    speed: tuple[float, ...] = (1.0,)
    failing: set = field(default_factory=set)
    losses: dict = field(default_factory=dict)
    programs: dict = field(default_factory=lambda: {"im2col-fp32": 1.0})
    asked: list = field(default_factory=list)

    def run(self, job):
        self.asked.append(job)
        if (job.kind, job.ranks, job.threads) in self.failing:
            raise EngineError(f"{job} fell over")
        turn = sum(other == job for other in self.asked) - 1
        slow = self.speed[turn % len(self.speed)] * self.programs[job.program]
        if job.kind == "network":
            sizes = (64, 1024, 4 * SIZE)
            return Samples(2, True, tuple(Sample(size, rabenseifner(size, 2, MEMORY)) for size in sizes))
        sharers = job.threads * (1 if job.kind == "trace" else job.ranks)  # in a trace each rank has so many images
        compute = slow * (SERIAL + IMAGE * job.batch_size / sharers)
        if job.kind == "trace":
            step = StepTrace((0.5 * compute, 0.7 * compute), 0.8 * compute, 0.2 * compute)
            return Trace(job.batch_size, job.threads, ((100, SIZE), (0, 100)), (step,))
        losses = self.losses.get((job.ranks, job.threads), (2.0 / job.batch_size, 1.0))
        return Slice(Timeline(compute, 0.0 if job.ranks == 1 else slow * 0.001, 0.0), 3, losses)


def measured(plan=PLAN, cores=4, **machine):
    return scale(plan, Machine(**machine).run, cores)


def at(report, ranks, threads, mode="strong"):
    return next(p for p in report.points if (p.ranks, p.threads, p.mode) == (ranks, threads, mode))


def test_grid_has_every_point_the_fewest_workers_first():
    assert [(p.ranks, p.threads) for p in PLAN.points()] == [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)]
    both = replace(PLAN, modes=("strong", "weak"), ranks=(1, 2), threads=(1,))
    assert both.points() == (
        Point("strong", 1, 1, 64),
        Point("strong", 2, 1, 64),
        Point("weak", 1, 1, 64),
        Point("weak", 2, 1, 128),
    )


def test_speedups_are_against_the_serial_program():
    report = measured()
    base, two = SERIAL + 64 * IMAGE, SERIAL + 32 * IMAGE
    assert report.base.milliseconds.median == pytest.approx(1e3 * base)
    assert at(report, 1, 1).speedup.median == pytest.approx(1)
    assert at(report, 2, 1).speedup.median == pytest.approx(base / (two + 0.001))
    assert at(report, 1, 2).speedup.median == pytest.approx(base / two)
    assert at(report, 1, 2).efficiency.median == pytest.approx(base / two / 2)
    assert at(report, 1, 2).images_per_second.median == pytest.approx(64 / two)
    assert at(report, 1, 2).karp_flatt.median == pytest.approx(SERIAL / base)
    assert at(report, 2, 1).parts.communication == pytest.approx(1)
    assert at(report, 1, 1).karp_flatt is None


def test_weak_speedups_are_scaled_ones():
    report = measured(replace(PLAN, modes=("weak",), threads=(1,)))
    base, grown = SERIAL + 64 * IMAGE, SERIAL + 64 * IMAGE + 0.001
    point = at(report, 4, 1, "weak")
    assert point.batch_size == 256
    assert point.speedup.median == pytest.approx(4 * base / grown)
    assert point.efficiency.median == pytest.approx(base / grown)
    assert point.karp_flatt is None


def test_rounds_that_are_slow_change_no_ratio():
    report = measured(speed=(1.0, 3.0, 1.7, 1.0, 9.0, 2.0))
    point = at(report, 1, 2)
    assert point.milliseconds.high > 2 * point.milliseconds.low
    expected = (SERIAL + 64 * IMAGE) / (SERIAL + 32 * IMAGE)
    assert (point.speedup.low, point.speedup.high) == (pytest.approx(expected), pytest.approx(expected))


def test_every_round_asks_everything_once_in_an_order_of_its_own():
    machine = Machine()
    report = scale(PLAN, machine.run, 4)
    assert {tuple(sorted(order)) for order in report.rounds} == {tuple(sorted(str(job) for job in PLAN.jobs(cores=4)))}
    assert len(set(report.rounds)) > 1
    assert [str(job) for job in machine.asked] == [name for order in report.rounds for name in order]


def test_oversubscribed_points_have_times_and_no_speedup():
    report = measured(cores=2)
    for ranks, threads in ((2, 2), (4, 1), (4, 2)):
        point = at(report, ranks, threads)
        assert point.oversubscribed
        assert point.milliseconds is not None
        assert (point.speedup, point.efficiency, point.karp_flatt) == (None, None, None)
    assert not at(report, 2, 1).oversubscribed
    assert all(max(fit.workers) <= 2 for fit in report.fits)
    assert "2x2, 4x1, 4x2: more workers than the 2 cores" in report.warnings()[0]
    assert {(p.ranks, p.threads) for p in report.predictions} == {(2, 1)}  # more is no test of a prediction


def test_ranks_are_traced_side_by_side_where_they_have_room():
    machine = Machine()
    scale(replace(PLAN, predict_ranks=(8,), networks=(NETWORKS["10gbe"], None)), machine.run, 4)
    traces = {(job.sharers, job.threads, job.ranks, job.early) for job in machine.asked if job.kind == "trace"}
    measured_here = {(2, 1, 2, False), (4, 1, 4, False), (2, 2, 2, False)}
    beyond_the_cores = {(8, 1, 1, False), (8, 2, 1, False)}
    between_machines = {(8, 1, 1, True), (8, 2, 1, True)}
    assert traces == measured_here | beyond_the_cores | between_machines


def test_fits_find_the_serial_fraction():
    report = measured(replace(PLAN, ranks=(1,), threads=(1, 2, 4)))
    (fit,) = report.fits
    assert (fit.law, fit.over, fit.workers) == ("Amdahl", "threads", (1, 2, 4))
    fraction = SERIAL / (SERIAL + 64 * IMAGE)
    assert fit.serial_fraction.median == pytest.approx(fraction)
    assert at(report, 1, 4).speedup.median == pytest.approx(amdahl(fraction, 4))
    kinds = {(fit.law, fit.over) for fit in measured(replace(PLAN, modes=("strong", "weak"))).fits}
    assert kinds == {(law, over) for law in ("Amdahl", "Gustafson") for over in ("ranks", "threads", "ranks x threads")}


def test_a_point_that_fails_takes_nothing_with_it():
    report = measured(failing={("step", 2, 1), ("trace", 2, 2)})
    point = at(report, 2, 1)
    assert (point.status, point.speedup) == ("failed", None)
    assert "step im2col-fp32 2x1, 64 images fell over" in point.reason
    assert at(report, 4, 1).status == "timed"
    assert all(prediction.threads == 1 for prediction in report.predictions)
    assert any("trace" in warning and "fell over" in warning for warning in report.warnings())


def test_without_a_serial_program_there_is_nothing_to_compare_with():
    with pytest.raises(EngineError, match=r"no serial program to compare with: .* fell over"):
        measured(failing={("step", 1, 1)})


@pytest.mark.parametrize("losses", [(2.1 / 64, 1.0), (math.nan, 1.0)])
def test_a_point_that_computes_something_else_is_not_timed(losses):
    report = measured(losses={(2, 2): losses})
    assert at(report, 2, 2).status == "wrong"
    assert at(report, 2, 2).speedup is None
    assert "losses of its first steps are off" in at(report, 2, 2).reason
    assert all(4 not in fit.workers for fit in report.fits if fit.over == "threads")


def test_the_fastest_serial_program_is_the_base():
    plan = replace(PLAN, base=("im2col-fp32", "jit-fp32", "loops-fp32"))
    report = measured(plan, programs={"im2col-fp32": 1.0, "jit-fp32": 0.25, "loops-fp32": 40.0})
    assert report.base.program == "jit-fp32"
    assert at(report, 1, 1).speedup.median == pytest.approx(0.25)
    assert report.base.others == {"im2col-fp32": "4.00 times as long", "loops-fp32": "160.00 times as long"}


def test_predictions_are_held_against_what_was_measured():
    report = measured(replace(PLAN, predict_ranks=(4, 16), networks=(NETWORKS["10gbe"], None)))
    (network,) = [network for network in report.networks if network.name == THIS_MACHINE]
    assert (network.alpha, network.beta) == (pytest.approx(MEMORY.alpha), pytest.approx(MEMORY.beta))
    assert network.shared
    assert [network.name for network in report.networks] == [THIS_MACHINE, "10gbe"]
    held = next(p for p in report.predictions if (p.ranks, p.threads, p.network) == (2, 1, THIS_MACHINE))
    step = SERIAL + 32 * IMAGE
    small = rabenseifner(4 * SIZE, 2, MEMORY)
    assert step + small < 1e-3 * held.milliseconds.median < step + small + 3 * MEMORY.alpha
    assert held.error.median == pytest.approx(1e-3 * held.milliseconds.median / (step + 0.001) - 1)
    many = [p for p in report.predictions if p.ranks == 16]
    assert {(p.network, p.threads) for p in many} == {(n, t) for n in (THIS_MACHINE, "10gbe") for t in (1, 2)}
    assert all(p.error is None and p.label == PREDICTED for p in many)
    assert all(sum(p.parts) == pytest.approx(p.milliseconds.median) for p in many)
    plain = encode_json(report.to_plain())
    assert plain.count(f'"label": "{PREDICTED}"') == len(report.predictions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": ()}, "must each name one at least"),
        ({"ranks": (0, 2)}, "ranks must be different numbers from 1 on; got 0,2"),
        ({"threads": (2, 2)}, "threads must be different numbers"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"seconds": -1.0}, "seconds of a slice >= 0"),
        ({"batch_size": 3}, "3 images cannot be shared by 4 ranks"),
        ({"predict_ranks": (128,)}, "64 images cannot be shared by 128 ranks"),
        ({"batch_size": 0}, "0 images cannot be shared by 1 ranks"),
    ],
)
def test_plan_is_checked(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(PLAN, **changes)


# ----------------------------------------------------------------------------------------------- tables and plots


@pytest.fixture(scope="module")
def report():
    plan = replace(PLAN, modes=("strong", "weak"), predict_ranks=(8, 16), networks=(NETWORKS["1gbe"],))
    return scale(plan, Machine(failing={("step", 4, 2)}).run, 2)


def texts(report):
    console = Console(width=200, record=True, file=io.StringIO())
    for part in tables.of_report(report):
        console.print(part)
    return console.export_text()


def test_tables_tell_measured_from_predicted(report):
    text = texts(report)
    assert "strong scaling, measured" in text
    assert "weak scaling, measured" in text
    assert "predicted, not measured" in text
    crowded = [line for line in text.splitlines() if "oversubscribed" in line]
    assert len(crowded) == 2 * 2  # 2x2 and 4x1; 4x2 failed
    assert text.count("failed: step im2col-fp32 4x2") == 2
    assert "Amdahl's law over ranks" in text
    assert "Gustafson's law over ranks" in text
    assert "1gbe (alpha 50 us, 0.941 Gb/s): stated: 1 Gb/s on the wire" in text


def test_plots_draw_no_speedup_for_the_oversubscribed(report, tmp_path):
    figure = plots.speedup_figure(report)
    for axes in figure.axes:
        labels = axes.get_legend_handles_labels()[1]
        measured_series = [c for c in axes.containers if "measured" in c.get_label()]
        assert max(max(series.lines[0].get_xdata()) for series in measured_series) == 2
        assert any(label.startswith("predicted, 1gbe") for label in labels)
    bars = [label.get_text() for label in plots.breakdown_figure(report).axes[0].get_yticklabels()]
    assert "2 x 2 (more than 2 cores)" in bars
    assert "16 x 1 predicted, 1gbe" in bars
    saved = plots.save_all(report, tmp_path)
    assert [path.name for path in saved] == ["speedup.png", "efficiency.png", "breakdown.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in saved)


def test_breakdown_adds_up_to_the_step(report):
    axes = plots.breakdown_figure(report).axes[0]
    point = next(p for p in report.points if (p.ranks, p.threads, p.mode) == (2, 1, "strong"))
    place = [label.get_text() for label in axes.get_yticklabels()].index("2 x 1")
    widths = [container[place].get_width() for container in axes.containers]
    assert sum(widths) == pytest.approx(point.milliseconds.median)
