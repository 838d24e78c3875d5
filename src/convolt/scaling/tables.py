"""A grid, or the classic comparison, as tables for a terminal. Predictions stand in a table that says so."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from convolt.scaling.classic import Comparison
from convolt.scaling.report import PREDICTED, Parts, PointResult, Predicted, ScalingReport
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
    for mode in dict.fromkeys(point.mode for point in report.predictions):
        yield _predictions([point for point in report.predictions if point.mode == mode], mode)
    for mode in dict.fromkeys(point.mode for point in report.points):
        yield _parts(report, mode)
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
            _percent(each.efficiency),
            style="dim" if each.oversubscribed else None,
        )
    return table


def _measured(points: list[PointResult], mode: str) -> Table:
    table = _table(f"{mode} scaling, measured", "ranks x threads")
    for column in ("batch", "ms/step", "images/s", "speedup", "efficiency", *(["Karp-Flatt"] * (mode == "strong"))):
        table.add_column(column, justify="right", min_width=len(CROWDED) if column == "speedup" else None)
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
            _percent(point.efficiency),
            *([_interval(point.karp_flatt, percent=True)] if mode == "strong" else []),
            style="dim" if point.oversubscribed else None,
        )
    return table


def _predictions(predictions: list[Predicted], mode: str) -> Table:
    table = _table(f"{mode} scaling, {PREDICTED}, not measured", "ranks x threads", "network")
    for column in ("batch", "ms/step", "images/s", f"speedup, {PREDICTED}", "efficiency"):
        table.add_column(column, justify="right")
    table.add_column("error where measured", justify="right", no_wrap=True)
    for point in predictions:
        table.add_row(
            f"{point.ranks} x {point.threads}",
            point.network,
            f"{point.batch_size:,}",
            f"{point.milliseconds.median:.3g}",
            f"{point.images_per_second.median:,.0f}",
            f"{point.speedup.median:.3g}",
            _percent(point.efficiency),
            "" if point.error is None else _interval(point.error, percent=True),
        )
    return table


def _parts(report: ScalingReport, mode: str) -> Table:
    """What the milliseconds of a step are, of everything that was measured or predicted."""
    table = _table(f"{mode} scaling, milliseconds of the mean rank's step", "ranks x threads", "")
    for column in Parts._fields:
        table.add_column(column, justify="right", no_wrap=True)
    points: tuple[PointResult | Predicted, ...] = (*report.points, *report.predictions)
    for point in points:
        if point.mode == mode and point.parts is not None:
            how = f"{PREDICTED}, {point.network}" if isinstance(point, Predicted) else "measured"
            name, parts = f"{point.ranks} x {point.threads}", (f"{value:.3g}" for value in point.parts)
            table.add_row(name, how, *parts)
    return table


def _table(title: str, *names: str) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _percent(value: Estimate | None) -> str:
    """The median alone, where the interval is that of another column divided by a number."""
    return "" if value is None else f"{value.median:.1%}"


def _interval(value: Estimate | None, percent: bool = False) -> str:
    if value is None:
        return ""
    numbers = (value.median, value.low, value.high)
    one, low, high = (f"{100 * x:.1f}" if percent else f"{x:.3g}" for x in numbers)
    return f"{one}{' %' * percent} [{low}, {high}]"
