"""A grid, or the classic comparison, as tables for a terminal. Predictions stand in a table that says so."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from convolt.scaling.classic import Comparison
from convolt.scaling.report import PREDICTED, PointResult, Predicted, ScalingReport
from convolt.stats import Estimate

CROWDED = "oversubscribed"


def of_report(report: ScalingReport) -> Iterator[RenderableType]:
    """The base, a table for each kind of scaling, the fits, the predictions, the networks."""
    base = report.base
    yield Text(
        f"base: {base.program}, one process, one thread: {_interval(base.milliseconds)} ms/step; "
        f"medians of {base.milliseconds.n} rounds, {base.milliseconds.coverage:.1%} intervals"
    )
    for program, reason in base.others.items():
        yield Text(f"  {program}: {reason}")
    for mode in dict.fromkeys(point.mode for point in report.points):
        yield _measured([point for point in report.points if point.mode == mode], mode)
    for fit in report.fits:
        law = "the serial part of the time" if fit.mode == "strong" else "the serial part of the parallel time"
        fraction = _interval(fit.serial_fraction, percent=True)
        yield Text(f"{fit.law}'s law over {fit.over}, {fit.mode} scaling: {law} is {fraction}")
    if report.predictions:
        yield _predictions(report.predictions)
        for network in report.networks:
            yield Text(f"  {network}: {network.source}")


def of_comparison(comparison: Comparison, model: str) -> Table:
    """The five configurations."""
    title = f"{model}, {comparison.epochs} epochs, {comparison.precision}: the classic comparison"
    table = _table(title, "configuration", "ranks x threads")
    for column in ("train s", "images/s", "test accuracy", "final loss", "off by", "speedup", "efficiency"):
        table.add_column(column, justify="right")
    for each in comparison.configurations:
        accuracy = "" if each.test_accuracy is None else f"{each.test_accuracy:.2%}"
        curve = f"{each.difference:.1e}" + ("" if each.same_curve else " NOT THE SAME")
        speedup = CROWDED if each.oversubscribed else _interval(each.speedup)
        table.add_row(
            each.name,
            f"{each.ranks} x {each.threads}",
            _interval(each.seconds),
            f"{each.images_per_second.median:,.0f}",
            accuracy,
            f"{each.losses[-1]:.5f}" if each.losses else "",
            curve,
            speedup,
            _interval(each.efficiency, percent=True),
            style="dim" if each.oversubscribed else None,
        )
    return table


def _measured(points: list[PointResult], mode: str) -> Table:
    table = _table(f"{mode} scaling, measured", "ranks x threads")
    for column in ("batch", "ms/step", "images/s", "speedup", "efficiency", "Karp-Flatt"):
        table.add_column(column, justify="right")
    for column in ("compute", "communication", "waiting"):
        table.add_column(column, justify="right")
    for point in points:
        name, batch = f"{point.ranks} x {point.threads}", f"{point.batch_size:,}"
        if point.milliseconds is None:
            table.add_row(name, batch, Text(f"{point.status}: {point.reason}", style="red"))
            continue
        table.add_row(
            name,
            batch,
            _interval(point.milliseconds),
            "" if point.images_per_second is None else f"{point.images_per_second.median:,.0f}",
            CROWDED if point.oversubscribed else _interval(point.speedup),
            _interval(point.efficiency, percent=True),
            _interval(point.karp_flatt, percent=True),
            *_parts(point),
            style="dim" if point.oversubscribed else None,
        )
    return table


def _predictions(predictions: tuple[Predicted, ...]) -> Table:
    table = _table(f"{PREDICTED}, not measured", "ranks x threads", "scaling", "network")
    for column in ("batch", "ms/step", "images/s", "speedup", "efficiency"):
        table.add_column(f"{column} ({PREDICTED})" if column == "speedup" else column, justify="right")
    for column in ("compute", "communication", "waiting", "error where measured"):
        table.add_column(column, justify="right")
    for point in predictions:
        table.add_row(
            f"{point.ranks} x {point.threads}",
            point.mode,
            point.network,
            f"{point.batch_size:,}",
            _interval(point.milliseconds),
            f"{point.images_per_second.median:,.0f}",
            _interval(point.speedup),
            _interval(point.efficiency, percent=True),
            *_parts(point),
            "" if point.error is None else f"{point.error.median:+.1%}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")


def _parts(point: PointResult | Predicted) -> Iterator[str]:
    for value in point.parts or ():
        yield f"{value:.3g}"


def _interval(value: Estimate | None, percent: bool = False) -> str:
    if value is None:
        return ""
    numbers = (value.median, value.low, value.high)
    one, low, high = (f"{100 * x:.1f}" if percent else f"{x:.3g}" for x in numbers)
    return f"{one}{' %' * percent} [{low}, {high}]"
