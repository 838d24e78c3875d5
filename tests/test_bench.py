"""Benchmarks without times: who may take part, in which order, on what, and what is made of the seconds."""

import itertools
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from convolt import bench as benchmark
from convolt import course, engines
from convolt.bench import Workload, bench, to_plain
from convolt.contenders import Contender, assemble, contender
from convolt.durable import encode_json
from convolt.engine import Engine, StageTime, StepResult
from convolt.engines import Im2col
from convolt.errors import ConfigError, EngineError, MissingDependency
from convolt.flops import layer_work
from convolt.layers import BatchNorm2d, Conv2d, Dense, Flatten, ReLU
from convolt.load import Load, LoadMeter
from convolt.model import Model
from convolt.optimizers import SGD, Adam
from convolt.peaks import Peak, Peaks
from convolt.profile import profile

MODEL = Model((1, 4, 4), (Conv2d(1, 2, 3), ReLU(), Flatten(), Dense(8, 3)))
WORKLOAD = Workload(MODEL, batch_size=6)
QUIET = Load(1.0, 4, 0.0, (0.0, 0.0))


@dataclass(frozen=True)
class Altered(Engine):
    """The im2col engine, but for what a test replaces in its executors; ``log`` gets a line for each call."""

    name: str = ""
    replaced: tuple = ()
    log: list | None = None
    threads: int = 1
    NAME: ClassVar[str] = "altered"
    PRECISIONS: ClassVar[tuple[str, ...]] = ("fp32",)

    def executor(self, model, params, recipe):
        executor = Im2col(threads=1).executor(model, params, recipe)
        for method, change in self.replaced:
            setattr(executor, method, change(executor, getattr(executor, method)))
        if self.log is not None:
            step = executor.train_step

            def logged(x, *rest):
                self.log.append((self.name, x[0, 0, 0, 0], float(executor.params.flat.sum())))
                return step(x, *rest)

            executor.train_step = logged
        return executor


def altered(name, log=None, **replaced):
    return Contender(name, Altered(name, tuple(replaced.items()), log))


def result_of(each, workload=WORKLOAD):
    (result,) = bench(workload, [each], rounds=1, slice_seconds=0).results
    return result


@pytest.fixture
def clock(monkeypatch):
    """A clock that ticks once a look, or as told: seconds then are counts."""
    ticks = itertools.count()
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


# -- who may take part ------------------------------------------------------------------------------------------------


def raises(error):
    def change(executor, method):
        def fail(*arguments):
            raise error

        return fail

    return change


def zero_gradient(executor, method):
    def lie(*arguments):
        result = method(*arguments)
        executor.grads.flat[...] = 0
        return result

    return lie


def gives(change_result):
    return lambda executor, method: lambda *arguments: change_result(method(*arguments))


@pytest.mark.parametrize(
    ("method", "change", "reason"),
    [
        ("loss_and_grads", gives(lambda r: StepResult(r.loss * 1.01, r.logits)), "loss is off"),
        ("loss_and_grads", gives(lambda r: StepResult(math.nan, r.logits)), "loss is off by inf"),
        ("loss_and_grads", gives(lambda r: StepResult(r.loss, r.logits * 1.1)), "logits is off by 0.1, allowed 0.001"),
        ("loss_and_grads", gives(lambda r: StepResult(r.loss, r.logits[:3])), "logits is off by inf"),
        ("loss_and_grads", zero_gradient, "gradient is off by 1"),
        ("train_step", gives(lambda r: StepResult(r.loss + 1, r.logits)), "loss of the first step is off"),
    ],
)
def test_contender_that_lies_is_not_timed(method, change, reason):
    result = result_of(altered("liar", **{method: change}))
    assert (result.status, result.seconds, result.milliseconds) == ("wrong", (), None)
    assert reason in result.reason


def test_wrong_predictions_are_not_timed():
    workload = replace(WORKLOAD, inference=True)
    result = result_of(altered("liar", predict=gives(lambda logits: -logits)), workload)
    assert result.status == "wrong"
    honest = result_of(altered("honest"), workload)
    assert honest.status == "timed"
    assert honest.errors.gradient is None


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (EngineError("no tiles"), "unavailable", "no tiles"),
        (RuntimeError("compiler\ntrace"), "failed", "RuntimeError: compiler"),
    ],
)
def test_contender_that_cannot_run_is_named_and_the_others_go_on(error, status, reason):
    report = bench(WORKLOAD, [altered("bad", train_step=raises(error)), altered("good")], rounds=1, slice_seconds=0)
    assert [(r.name, r.status) for r in report.results] == [("bad", status), ("good", "timed")]
    assert report.results[0].reason == reason
    assert report.rounds == (("good",),)


def test_every_engine_agrees_with_the_reference():
    contenders = [
        contender(name, 1) for name in ("loops", "im2col", "torch", "torch-bf16", "torch-fp32_precision=bf16")
    ]
    report = bench(WORKLOAD, contenders, rounds=1, slice_seconds=0)
    assert {r.name: (r.status, r.reason) for r in report.results} == {c.name: ("timed", "") for c in contenders}
    assert report.results[0].errors.gradient < 1e-5
    assert report.results[3].errors.logits > 1e-4  # bf16 is what it says


def test_reference_is_found_without_pytorch(monkeypatch):
    found = engines.engine_class

    def without_torch(name):
        if name == "torch":
            raise MissingDependency("torch", "engine torch", "torch")
        return found(name)

    monkeypatch.setattr(engines, "engine_class", without_torch)
    report = bench(WORKLOAD, [altered("a")], rounds=1, slice_seconds=0)
    assert report.results[0].status == "timed"
    assert any("none of torch, onnxruntime was timed" in warning for warning in report.warnings())
    contenders, absent = assemble(["torch-bf16", "im2col"], 1)
    assert [c.name for c in contenders] == ["im2col"]
    assert "needs torch, which is not installed" in absent["torch-bf16"]


# -- turns ------------------------------------------------------------------------------------------------------------


def test_every_round_gives_each_contender_one_slice_in_a_new_order():
    log = []
    report = bench(WORKLOAD, [altered(name, log) for name in "abc"], rounds=8, slice_seconds=0)
    assert len(report.rounds) == 8
    assert {tuple(sorted(order)) for order in report.rounds} == {("a", "b", "c")}
    assert len(set(report.rounds)) > 2
    assert len({order[0] for order in report.rounds}) > 1
    assert [len(r.seconds) for r in report.results] == [8, 8, 8]
    # After one first step each: a slice is the step that does not count, and one that does.
    turns = [name for name, _, _ in log[3:]]
    assert turns == [name for order in report.rounds for name in order for _ in range(2)]


def test_a_slice_begins_with_the_first_weights():
    log = []
    bench(WORKLOAD, [altered("a", log)], rounds=4, slice_seconds=0)
    first, *slices = [weights for _, _, weights in log]
    assert set(slices[0::2]) == {first}
    assert first not in slices[1::2]


def test_steps_take_turns_with_the_batches(clock):
    log = []
    bench(WORKLOAD, [altered("a", log)], rounds=1, slice_seconds=9)
    pixels = [pixel for _, pixel, _ in log[1:]]
    assert pixels == [WORKLOAD.batches[i % benchmark.BATCHES][0][0, 0, 0, 0] for i in range(10)]


def fusing(log, most=math.inf):
    """Calls of several steps, of which no more than ``most`` are finite; ``log`` gets the first pixel of each step."""

    def change(executor, method):
        def logged(steps, loss):
            log.append([step.x[0, 0, 0, 0] for step in steps])
            return method(steps, loss)[: int(min(most, len(steps)))]

        return logged

    return {"fuses_steps": lambda executor, method: True, "train_steps": change}


@pytest.fixture
def fine_clock(monkeypatch):
    """A clock that ticks 128 times a second, once a look."""
    ticks = itertools.count()
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 128))


def test_steps_that_training_would_take_in_one_call_are_timed_in_one(fine_clock):
    calls = []
    report = bench(WORKLOAD, [altered("a", **fusing(calls))], rounds=2, slice_seconds=2 / 128)
    (result,) = report.results
    together = int(course.LONGEST * 128)
    assert 1 < together == result.at_once < course.MOST_STEPS
    steps = [1] * (1 + benchmark.BATCHES) + [together] * 6  # two slices: a call that does not count, and two that do
    assert list(map(len, calls)) == steps
    pixels = [x[0, 0, 0, 0] for x, _ in WORKLOAD.batches]
    for first in (-6, -3):
        taken = list(itertools.chain(*calls[first : first + 3 or None]))
        assert taken == [pixels[i % benchmark.BATCHES] for i in range(len(taken))]
    assert result.seconds == (1 / 128 / together,) * 2
    assert report.remarks() == (f"a: {together} steps are one call, as in training",)


def test_steps_behind_one_that_is_not_finite_do_not_count(fine_clock):
    result = result_of(altered("a", **fusing([], most=2)))
    assert result.seconds == (1 / 128 / 2,)


def test_predictions_are_timed_one_by_one(fine_clock):
    calls = []
    result = result_of(altered("a", **fusing(calls)), replace(WORKLOAD, inference=True))
    assert (result.at_once, calls) == (1, [])


def test_jit_is_timed_as_it_trains():
    result = result_of(contender("jit-fp32", 1))
    assert (result.status, result.at_once) == ("timed", course.MOST_STEPS)
    normalized = Workload(replace(MODEL, layers=(BatchNorm2d(1), *MODEL.layers)), batch_size=6)
    assert result_of(contender("jit-fp32", 1), normalized).at_once == 1


def test_every_contender_gets_the_same_images_and_weights():
    again = Workload(MODEL, batch_size=6)
    np.testing.assert_array_equal(again.batches[3][0], WORKLOAD.batches[3][0])
    np.testing.assert_array_equal(again.weights.flat, WORKLOAD.weights.flat)
    assert (Workload(MODEL, 6, seed=1).batches[0][0] != WORKLOAD.batches[0][0]).any()


# -- figures ----------------------------------------------------------------------------------------------------------


def test_figures_follow_from_seconds(clock):
    """A slice of one step takes one tick: a second."""
    contenders = [contender("torch", 1), contender("im2col", 1)]
    report = bench(WORKLOAD, contenders, rounds=3, slice_seconds=0)
    assert report.peer == "torch"
    for result in report.results:
        assert (result.seconds, result.milliseconds.median) == ((1.0, 1.0, 1.0), 1000)
        assert result.images_per_second.median == WORKLOAD.batch_size
        assert (result.ratio.low, result.ratio.median, result.ratio.n) == (1, 1, 3)
        assert result.gflops == WORKLOAD.flops / 1e9
        assert (result.peak_part, result.impossible) == (None, False)


def test_ratios_are_to_the_fastest_and_to_the_fastest_alike(monkeypatch):
    """Seconds of a slice by engine: PyTorch 4 in float32, 2 in bf16; im2col 8."""
    seconds = {"im2col": 8.0, "torch": 4.0, "torch-channels_last": 5.0, "torch-bf16": 2.0}
    slow = iter(seconds.values())
    times = {}

    def slice_of(executor, workload, length):
        return times.setdefault(id(executor), next(slow, None))

    monkeypatch.setattr(benchmark, "_slice", slice_of)
    monkeypatch.setattr(benchmark, "permutation", lambda seed, number, n: range(n))
    report = bench(WORKLOAD, [contender(name, 1) for name in seconds], rounds=2)
    found = {r.name: (r.ratio.median, r.ratio_alike.median, r.peer_alike) for r in report.results}
    assert report.peer == "torch-bf16"
    assert found == {
        "im2col": (0.25, 0.5, "torch"),
        "torch": (0.5, 1.0, "torch"),
        "torch-channels_last": (0.4, 0.8, "torch"),
        "torch-bf16": (1.0, 1.0, "torch-bf16"),
    }


@pytest.mark.parametrize(
    ("peak", "impossible", "remarks"), [(1.01 / WORKLOAD.needed_part, False, 0), (1.01, False, 1), (0.99, True, 0)]
)
def test_figure_above_the_peak_is_flagged(clock, peak, impossible, remarks):
    ceiling = Peak(peak * WORKLOAD.needed_part * WORKLOAD.flops / 1e9, 0.0)
    peaks = Peaks(1, ceiling, None, Peak(1, 1))
    report = bench(WORKLOAD, [contender("im2col", 1), contender("torch-bf16", 1)], 1, 0, peaks)
    fp32, bf16 = report.results
    assert fp32.impossible is impossible
    assert fp32.peak_part == pytest.approx(1 / peak / WORKLOAD.needed_part)
    assert (bf16.peak_part, bf16.impossible) == (None, False)
    assert any("im2col is above the measured peak" in line for line in report.warnings()) is impossible
    assert len(report.remarks()) == remarks
    assert all(f"needs {WORKLOAD.needed_part:.0%} of them" in line for line in report.remarks())


def test_peak_of_threads_is_not_less_than_that_of_one_core_times_their_number():
    peaks = Peaks(2, Peak(200, 150), Peak(3000, 7000), Peak(10, 15))
    assert [peaks.gflops(name) for name in ("fp32", "bf16", "fp64")] == [400, 7000, None]


def test_report_becomes_json():
    plain = to_plain(bench(WORKLOAD, [altered("a"), altered("b", predict=raises(ValueError()))], 2, 0))
    assert plain.keys() >= {"batch_size", "inference", "threads", "flops", "peer", "results", "rounds", "load", "peaks"}
    assert plain["results"][0].keys() >= {"name", "status", "seconds", "milliseconds", "ratio", "gflops", "errors"}
    assert plain["results"][0]["milliseconds"].keys() == {"median", "low", "high", "coverage", "n"}
    assert encode_json(plain)


@pytest.mark.parametrize("arguments", [{"rounds": 0}, {"slice_seconds": -1}])
def test_wrong_numbers_are_refused(arguments):
    with pytest.raises(ConfigError, match="rounds must be at least 1"):
        bench(WORKLOAD, [altered("a")], **arguments)
    with pytest.raises(ConfigError, match="batch size must be at least 1; got 0"):
        Workload(MODEL, 0)


# -- work and stages --------------------------------------------------------------------------------------------------


def test_rates_of_stages():
    times = (
        StageTime("0-1 Conv2d+ReLU", "forward", "", 0.001),
        StageTime("0-1 Conv2d+ReLU", "forward", "pack", 0.001),
        StageTime("3 Dense", "backward", "", 0.004),
        StageTime("input", "forward", "", 0.001),
        StageTime("update", "update", "", 0.001),
    )
    executor = SimpleNamespace(profile=lambda x, training: times)
    x = np.zeros((10, 1, 4, 4), np.uint8)
    conv, dense, unpack, update = profile(executor, MODEL, x, Adam())
    works = {work.name: work for work in layer_work(MODEL)}
    flops = works["0"].forward_flops + works["1"].forward_flops
    assert conv.kernels == {"": pytest.approx(1), "pack": pytest.approx(1)}
    assert conv.gflops == pytest.approx(10 * flops / 0.002 / 1e9)
    assert conv.gigabytes == pytest.approx(4 * (10 * (16 + 8) + 20) / 0.002 / 1e9)
    assert dense.gflops == pytest.approx(10 * 2 * works["3"].forward_flops / 0.004 / 1e9)
    assert dense.gigabytes == pytest.approx(4 * (10 * (8 + 3 + 8) + 2 * 27) / 0.004 / 1e9)
    assert (unpack.gflops, unpack.gigabytes) == (None, None)
    assert update.gigabytes == pytest.approx(4 * 7 * 47 / 0.001 / 1e9)
    assert profile(executor, MODEL, x, SGD())[-1].gigabytes < update.gigabytes


def test_rates_of_a_gradient_that_the_optimizer_makes():
    times = (
        StageTime("3 Dense", "backward", "", 0.004),
        StageTime("update", "update", "", 0.001),
        StageTime("3 Dense", "update", "dw+update", 0.002),
    )
    executor = SimpleNamespace(profile=lambda x, training: times)
    backward, update, dense = profile(executor, MODEL, np.zeros((10, 1, 4, 4), np.uint8), Adam())
    flops = {work.name: work for work in layer_work(MODEL)}["3"].forward_flops
    assert backward.gflops == pytest.approx(10 * flops / 0.004 / 1e9)
    assert dense.gflops == pytest.approx(10 * flops / 0.002 / 1e9)
    assert backward.gigabytes == pytest.approx(4 * (10 * (8 + 3) + 27) / 0.004 / 1e9)
    assert dense.gigabytes == pytest.approx(4 * (10 * (8 + 3) + 6 * 27) / 0.002 / 1e9)
    assert update.gigabytes == pytest.approx(4 * 7 * (47 - 27) / 0.001 / 1e9)


def test_engine_that_cannot_time_its_kernels_has_no_stages():
    report = bench(WORKLOAD, [altered("a")], rounds=1, slice_seconds=0, profiled=True)
    assert report.results[0].stages == ()


def test_compiled_kernels_are_timed_and_peaks_measured():
    """The seams to the compiled engine: every layer has its stage, every peak is a number."""
    report = bench(WORKLOAD, [contender("jit", 2)], 1, 0, engines.measured_peaks(2), profiled=True)
    (result,) = report.results
    assert result.status == "timed"
    assert {stage.direction for stage in result.stages} == {"forward", "backward", "update"}
    assert any(stage.stage.startswith("0") and stage.gflops for stage in result.stages)
    assert all(stage.milliseconds >= 0 for stage in result.stages)
    assert 0 < result.peak_part < 1
    assert all(peak is None or 0 < peak.one_core < math.inf for peak in (report.peaks.fp32, report.peaks.bf16))


# -- load -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "others", "disturbed"),
    [(4, 0.05, False), (4, 0.5, True), (2, 1.9, False), (2, 2.5, True), (4, None, False)],
)
def test_cores_that_others_used_are_told(threads, others, disturbed):
    load = replace(QUIET, others=others)
    assert load.disturbed(threads) is disturbed
    report = replace(bench(WORKLOAD, [altered("a")], 1, 0), threads=threads, load=load)
    assert any("the cores were not free" in warning for warning in report.warnings()) is disturbed


def test_load_is_what_is_busy_and_not_this_process(tmp_path, monkeypatch):
    clocks = SimpleNamespace(perf_counter=iter([100.0, 110.0]).__next__, process_time=iter([50.0, 54.0]).__next__)
    monkeypatch.setattr("convolt.load.time", clocks)
    monkeypatch.setattr("convolt.load.os.sched_getaffinity", lambda pid: {0, 2})
    monkeypatch.setattr("convolt.load.os.sysconf", lambda name: 100)
    (tmp_path / "proc").mkdir()
    stat, average = tmp_path / "proc" / "stat", tmp_path / "proc" / "loadavg"
    stat.write_text("cpu 9 9\ncpu0 100 0 0 500 7 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0 0 0\n")
    average.write_text("0.50 0.4 0.3 1/100 12345\n")
    meter = LoadMeter(tmp_path)
    stat.write_text(
        "cpu 9 9\ncpu0 700 10 90 900 7 0 0 0 0 0\ncpu1 999 0 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0 0 20 30 50 0 0\n"
    )
    average.write_text("1.50 0.4 0.3 1/100 12345\n")
    assert meter.read() == Load(10.0, 2, pytest.approx(0.4), (0.5, 1.5))  # busy 8 s, of which 4 are ours


def test_load_is_unknown_where_the_system_does_not_tell(tmp_path):
    load = LoadMeter(tmp_path).read()
    assert (load.others, load.load_average) == (None, None)
    assert not load.disturbed(64)
