"""``convolt bench``: engines side by side on one network, with intervals, and told what the machine could do at most.

What is measured, and how, is in bench.py; here names become a model and contenders, and results a table.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from convolt import durable, engines, zoo
from convolt.bench import Report, Result, Workload, to_plain
from convolt.bench import bench as run_bench
from convolt.cli import FAILURE
from convolt.cli.options import (
    EngineOption,
    ModelOption,
    Sectioned,
    json_option,
    listed,
    notes,
    print_json,
    results,
    telling_of_compilation,
    threads_option,
    writable,
)
from convolt.cli.settings import DEFAULT_MODEL, resolve_model
from convolt.contenders import assemble, standard
from convolt.engine import resolve_threads
from convolt.errors import ConfigError
from convolt.layers import Shape
from convolt.load import Load
from convolt.machine import Machine
from convolt.model import Model
from convolt.peaks import Peak, Peaks

ROUNDS, SLICE_SECONDS, BATCH_SIZE = 15, 0.3, 128

EPILOG = """\b
Examples:
  convolt bench
  convolt bench --model resnet9 --batch-size 128 --rounds 25 --out result.json
  convolt bench --contenders jit-bf16,torch,torch-channels_last-bf16 --profile
  convolt bench --inference --batch-size 1 --batch-size 256

A contender is ENGINE[-PRECISION][-OPTION[=VALUE]]...: an engine, a precision and any option of that engine.
"""


class MeasuringOption(click.Option):
    """What is measured, and for how long."""

    section = "Measuring"


class ShapeType(click.ParamType[Shape]):
    """``3x32x32``: channels, height, width; or ``784``."""

    name = "CxHxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Shape:
        """The sizes."""
        sizes = str(value).lower().split("x")
        if len(sizes) not in {1, 3} or not all(size.isdecimal() and int(size) for size in sizes):
            self.fail(f"must be an input shape such as 3x32x32 (channels, height, width); got {value!r}", param, ctx)
        return tuple(int(size) for size in sizes)


@click.command(cls=Sectioned, epilog=EPILOG, short_help="Compare engines side by side.")
@click.option(
    "--model",
    "model_name",
    cls=ModelOption,
    default=DEFAULT_MODEL,
    metavar="NAME|FILE",
    help=f"{listed([*zoo.MODELS])}; or a file with input_shape and layers. [default: {DEFAULT_MODEL}]",
)
@click.option("--input-shape", cls=ModelOption, type=ShapeType(), metavar="CxHxW", help="[default: the network's own]")
@click.option("--classes", cls=ModelOption, type=int, metavar="N", help="Classes to tell apart. [default: 10]")
@click.option(
    "--contenders",
    "names",
    cls=EngineOption,
    metavar="NAME,NAME...",
    help=f"Who takes part. [default: {', '.join(standard(False))}; with --inference also {standard(True)[-1]}]",
)
@threads_option
@click.option("--inference", cls=MeasuringOption, is_flag=True, help="Predictions instead of training steps.")
@click.option(
    "--batch-size",
    "batch_sizes",
    cls=MeasuringOption,
    type=int,
    multiple=True,
    metavar="N",
    help=f"Images in a step; may be given more than once. [default: {BATCH_SIZE}]",
)
@click.option(
    "--rounds", cls=MeasuringOption, type=int, default=ROUNDS, metavar="N", help=f"Slices each. [default: {ROUNDS}]"
)
@click.option(
    "--seconds-per-slice",
    cls=MeasuringOption,
    type=float,
    default=SLICE_SECONDS,
    metavar="X",
    help=f"Length of a slice, of one step at least. [default: {SLICE_SECONDS}]",
)
@click.option(
    "--profile", "profiled", cls=MeasuringOption, is_flag=True, help="Also time every stage, where an engine can."
)
@click.option("--seed", cls=MeasuringOption, type=int, default=0, metavar="N", help="Of weights, images and turns.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Also write everything as JSON.")
@json_option
def bench(
    model_name: str,
    input_shape: Shape | None,
    classes: int | None,
    names: str | None,
    threads: int | None,
    inference: bool,
    batch_sizes: tuple[int, ...],
    rounds: int,
    seconds_per_slice: float,
    profiled: bool,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Compare engines side by side: speed, ratio to the fastest peer with its interval, part of the peak."""
    if out is not None:
        writable(out, "--out")
    model = build_model(model_name, input_shape, classes)
    workloads = [Workload(model, size, inference, seed) for size in batch_sizes or (BATCH_SIZE,)]
    count = resolve_threads(0 if threads is None else threads)
    contenders, absent = assemble(standard(inference) if names is None else names.split(","), count)
    click.get_current_context().with_resource(telling_of_compilation())
    console = notes()
    with console.status("measuring the peaks of this machine") as status:

        def tell(name: str, done: int, total: int) -> None:
            status.update(f"{name} ({done}/{total})")

        peaks = engines.measured_peaks(count)
        reports = [
            run_bench(workload, contenders, rounds, seconds_per_slice, peaks, profiled, tell) for workload in workloads
        ]
    plain = describe(model_name, model, absent, reports)
    if out is not None:
        durable.write_json(out, plain)
    if as_json:
        print_json(plain)
    else:
        for report in reports:
            show(model_name, report, absent, results())
        show_peaks(peaks, results())
    if not all(report.stands for report in reports):
        click.get_current_context().exit(FAILURE)


def build_model(name: str, input_shape: Shape | None, classes: int | None) -> Model:
    """A network of the zoo for this input, or the one that a file describes. Raises ConfigError."""
    found = resolve_model(name)
    if isinstance(found, Model):
        if input_shape is not None or classes is not None:
            raise ConfigError(f"--input-shape and --classes are for networks of the zoo; {name} describes its own")
        return found
    own = inspect.signature(zoo.MODELS[found].build).parameters
    shape = own["input_shape"].default if input_shape is None else input_shape
    return zoo.build(found, shape, own["num_classes"].default if classes is None else classes)


def describe(name: str, model: Model, absent: dict[str, str], reports: list[Report]) -> dict[str, Any]:
    """Everything as plain values: where, on what, and one report for each batch size."""
    return {**setting(name, model), "absent": absent, "benchmarks": [to_plain(report) for report in reports]}


def setting(name: str, model: Model) -> dict[str, Any]:
    """Which network was measured, where, and with which libraries, as plain values."""
    machine = Machine.detect()
    facts = machine.to_plain()
    return {
        "model": name,
        "input_shape": model.input_shape,
        "classes": model.output_shape[0],
        "machine": {key: facts[key] for key in ("platform", "python", "cpu", "cores", "memory")},
        "versions": {package.name: package.version for package in (*machine.required, *machine.optional)},
    }


def show(name: str, report: Report, absent: dict[str, str], console: Console) -> None:
    """The table of one workload, who is not in it and why, the stages, what to beware of."""
    timed = [result for result in report.results if result.status == "timed"]
    rounds, coverage = (timed[0].milliseconds.n, timed[0].milliseconds.coverage) if timed else (0, 0.0)  # type: ignore[union-attr]  # timed
    kind = "inference" if report.inference else "training"
    console.print(Text(f"{name}, {kind}, batch {report.batch_size}, {report.threads} threads", style="bold"))
    console.print(Text(f"{report.flops / 1e9:.3g} GFLOP a step, {report.parameters:,} parameters"))
    console.print(Text(f"medians of {rounds} rounds, {coverage:.1%} intervals"))
    console.print(contender_table(timed, report.peer))
    for remark in report.remarks():
        console.print(Text(remark))
    for result in report.results:
        if result.status != "timed":
            console.print(Text(f"{result.name}: {result.status}: {result.reason}", style="red"))
    for missing, reason in absent.items():
        console.print(Text(f"{missing}: unavailable: {reason}", style="red"))
    for result in timed:
        if result.stages:
            console.print(stage_table(result))
            if result.memory:
                console.print(Text(memory_line(result)))
    console.print(Text(load_line(report.load)))
    for warning in report.warnings():
        console.print(Text(f"warning: {warning}", style="yellow"))


def contender_table(timed: list[Result], peer: str | None) -> Table:
    """One line for each contender, the fastest first."""
    table = Table("contender", box=SIMPLE_HEAD)
    against = "ratio" if peer is None else f"times {peer}"
    for column in ("ms/step", "images/s", against, "like for like", "GFLOP/s", "of peak", "first step"):
        table.add_column(column, justify="right")
    for result in sorted(timed, key=lambda result: result.milliseconds.median if result.milliseconds else 0.0):
        table.add_row(Text(result.name), *cells(result))
    return table


def cells(result: Result) -> Iterator[str]:
    """The figures of a contender that was timed."""
    time, speed = result.milliseconds, result.images_per_second
    yield "" if time is None else f"{time.median:.3f} [{time.low:.3f}, {time.high:.3f}]"
    yield "" if speed is None else f"{speed.median:,.0f}"
    for ratio in (result.ratio, result.ratio_alike):
        yield "" if ratio is None else f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
    yield "" if result.gflops is None else f"{result.gflops:,.1f}"
    part = "" if result.peak_part is None else f"{result.peak_part:.1%}"
    yield f"{part} IMPOSSIBLE" if result.impossible else part
    yield "" if result.first_step is None else f"{result.first_step:.2f} s"


def stage_table(result: Result) -> Table:
    """Where a contender's step spends its time."""
    title = f"{result.name}: a step by stage"
    table = Table("stage", "direction", box=SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("ms", "part", "GFLOP/s", "GB/s"):
        table.add_column(column, justify="right")
    total = sum(stage.milliseconds for stage in result.stages)
    for stage in result.stages:
        rates = ("" if rate is None else f"{rate:,.1f}" for rate in (stage.gflops, stage.gigabytes))
        part = f"{stage.milliseconds / total:.1%}" if total else ""
        table.add_row(Text(stage.stage), stage.direction, f"{stage.milliseconds:.3f}", part, *rates)
    table.add_row("all", "", f"{total:.3f}", "", "", "")
    return table


def memory_line(result: Result) -> str:
    """What a contender holds, the largest first."""
    parts = sorted(result.memory.items(), key=lambda part: -part[1])
    kinds = ", ".join(f"{kind} {size / 2**20:.1f}" for kind, size in parts)
    return f"{result.name}: {sum(result.memory.values()) / 2**20:.1f} MiB: {kinds}\n"


def load_line(load: Load) -> str:
    """What else the machine did."""
    others = "unknown" if load.others is None else f"{load.others:.2f} of {load.cores} cores"
    average = "unknown" if load.load_average is None else "{:.2f} -> {:.2f}".format(*load.load_average)
    return f"other processes: {others} over {load.seconds:.0f} s; load average {average}"


def show_peaks(peaks: Peaks, console: Console) -> None:
    """What the parts of the peak are parts of."""

    def rates(peak: Peak, unit: str) -> str:
        return f"{peak.one_core:,.0f} {unit} on one core, {peak.all_threads:,.0f} on {peaks.threads} threads"

    half = "no instruction for it" if peaks.bf16 is None else rates(peaks.bf16, "GFLOP/s")
    console.print(Text("measured peaks of this machine", style="bold"))
    for label, text in (
        ("fp32", rates(peaks.fp32, "GFLOP/s")),
        ("bf16", half),
        ("memory", rates(peaks.memory, "GB/s, read")),
    ):
        console.print(Text(f"  {label:<8}{text}"))
