"""Plots of a grid: speedup, efficiency, and where the time of a step goes.

What was measured is drawn in full color with its interval; what was predicted is drawn hollow and dashed, and says so;
what was oversubscribed stands in the breakdown, hatched and named, and in no plot of speedup. Matplotlib's object
interface, and the colors, as in ``convolt.plots``.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convolt import plots
from convolt.scaling.classic import Comparison
from convolt.scaling.laws import amdahl, efficiency, gustafson
from convolt.scaling.report import Fit, PointResult, Predicted, ScalingReport
from convolt.stats import Estimate

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#595959"
STYLES = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"))
PARTS = (("compute", BLUE), ("communication", VERMILION), ("waiting", ORANGE))
Value = Callable[[PointResult | Predicted], Estimate | None]


def save_all(report: ScalingReport, folder: Path) -> tuple[Path, ...]:
    """``speedup.png``, ``efficiency.png`` and ``breakdown.png``, as far as there is something to draw."""
    figures = {
        "speedup": speedup_figure(report),
        "efficiency": efficiency_figure(report),
        "breakdown": breakdown_figure(report),
    }
    return tuple(path for name, figure in figures.items() for path in plots.save(figure, folder / name, ("png",)))


def speedup_figure(report: ScalingReport) -> "Figure":
    """Speedup against workers, the ideal line, the fitted law, and predictions."""

    def law(fit: Fit, workers: int) -> float:
        return (amdahl if fit.mode == "strong" else gustafson)(fit.serial_fraction.median, workers)

    def ideal(workers: int) -> float:
        return float(workers)

    return _against_workers(report, "speedup", lambda point: point.speedup, ideal, law)


def efficiency_figure(report: ScalingReport) -> "Figure":
    """Efficiency against workers: what part of each of them did what one did before."""
    from matplotlib.ticker import PercentFormatter

    def law(fit: Fit, workers: int) -> float:
        return efficiency((amdahl if fit.mode == "strong" else gustafson)(fit.serial_fraction.median, workers), workers)

    figure = _against_workers(report, "efficiency", lambda point: point.efficiency, lambda workers: 1.0, law)
    for axes in figure.axes:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.set_ylim(0, max(1.1, axes.get_ylim()[1]))
    return figure


def breakdown_figure(report: ScalingReport) -> "Figure":
    """Milliseconds of a step: compute, communication that nothing hides, waiting for the slowest rank."""
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(point.mode for point in report.points))
    shown = {mode: _bars(report, mode) for mode in modes}
    longest = max(len(bars) for bars in shown.values())
    figure = Figure(figsize=(8.5, (0.32 * longest + 1.4) * len(modes)), layout="constrained")
    for number, mode in enumerate(modes):
        axes = figure.add_subplot(len(modes), 1, number + 1)
        _stack(axes, shown[mode])
        axes.set_title(_mode_title(mode), loc="left", fontsize=10)
        axes.set_xlabel("milliseconds of a step")
    figure.axes[0].legend(frameon=False, ncols=len(PARTS), loc="lower right", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{report.program}: where a step's time goes", x=0.01, ha="left", fontsize=12)
    return figure


def _against_workers(
    report: ScalingReport,
    quantity: str,
    value: Value,
    ideal: Callable[[int], float],
    law: Callable[[Fit, int], float],
) -> "Figure":
    """A panel for each kind of scaling."""
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(point.mode for point in report.points))
    figure = Figure(figsize=(4.8 * len(modes) + 2.6, 4.6), layout="constrained")
    for number, mode in enumerate(modes):
        axes = figure.add_subplot(1, len(modes), number + 1)
        points = [point for point in report.points if point.mode == mode and value(point) is not None]
        predicted = [point for point in report.predictions if point.mode == mode]
        workers = sorted({1, *(point.workers for point in points), *(point.workers for point in predicted)})
        _measured(axes, points, value)
        _predicted(axes, predicted, value)
        axes.plot(workers, [ideal(w) for w in workers], color=GREY, linestyle=":", linewidth=1.2, label="ideal")
        for fit in report.fits:
            if fit.mode == mode and fit.over == "ranks":
                fitted = ", ".join(map(str, sorted({*fit.workers} - {1})))
                label = f"{fit.law}'s law, serial part {fit.serial_fraction.median:.1%}\n(fitted to {fitted} ranks)"
                shown = [(w, law(fit, w)) for w in workers if law(fit, w) > 0]  # beyond 1, it ends
                axes.plot(*zip(*shown, strict=True), color=GREY, linewidth=1, label=label)
        _dress(axes, workers, quantity, mode)
    _explain(figure)
    title = f"{report.program}: {quantity} against {report.base.program} on one core"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def _measured(axes: "Axes", points: Sequence[PointResult], value: Value) -> None:
    """A series for each number of threads, with the intervals of the medians."""
    for number, threads in enumerate(sorted({point.threads for point in points})):
        color, marker = STYLES[number % len(STYLES)]
        series = [point for point in points if point.threads == threads]
        found = [estimate for point in series if (estimate := value(point)) is not None]
        below = [estimate.median - estimate.low for estimate in found]
        above = [estimate.high - estimate.median for estimate in found]
        axes.errorbar(
            [point.workers for point in series],
            [estimate.median for estimate in found],
            yerr=[below, above],
            color=color,
            marker=marker,
            markersize=6,
            linewidth=1.6,
            capsize=3,
            zorder=3,
            label=f"measured, {threads} thread{'s' * (threads > 1)} a rank",
        )


def _predicted(axes: "Axes", points: Sequence[Predicted], value: Value) -> None:
    """A dashed, hollow series for each network and number of threads."""
    networks = list(dict.fromkeys(point.network for point in points))
    counts = sorted({point.threads for point in points})
    for network, threads in dict.fromkeys((point.network, point.threads) for point in points):
        color = STYLES[(networks.index(network) + 2) % len(STYLES)][0]
        marker = STYLES[counts.index(threads) % len(STYLES)][1]
        series = sorted(
            (point for point in points if (point.network, point.threads) == (network, threads)),
            key=lambda point: point.workers,
        )
        axes.plot(
            [point.workers for point in series],
            [estimate.median for point in series if (estimate := value(point)) is not None],
            color=color,
            marker=marker,
            markersize=5,
            markerfacecolor="white",
            linestyle="--",
            linewidth=1.2,
            label=f"predicted, {network}" + (f", {threads} threads" if threads > 1 else ""),
        )


def _dress(axes: "Axes", workers: Sequence[int], quantity: str, mode: str) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    if workers[-1] > 4:
        axes.set_xscale("log", base=2)
        if quantity == "speedup":
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_major_locator(FixedLocator(list(workers)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("workers (ranks x threads)")
    axes.set_ylabel(quantity)
    axes.set_title(_mode_title(mode), loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)


def _explain(figure: "Figure") -> None:
    """One legend beside the panels, what was measured first; what stands in several panels is named once."""
    named: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(str(label), handle)
    labels = sorted(named, key=lambda label: not label.startswith("measured"))
    handles = [named[label] for label in labels]
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8.5)


def _bars(report: ScalingReport, mode: str) -> list[tuple[str, PointResult | Predicted]]:
    """Every point that has a time, with what its bar is called."""
    bars: list[tuple[str, PointResult | Predicted]] = []
    for point in report.points:
        if point.mode == mode and point.parts is not None:
            note = f" (more than {report.cores} cores)" if point.oversubscribed else ""
            bars.append((f"{_name(point)}{note}", point))
    for prediction in report.predictions:
        if prediction.mode == mode:
            bars.append((f"{_name(prediction)} predicted, {prediction.network}", prediction))
    return bars


def _stack(axes: "Axes", bars: Sequence[tuple[str, PointResult | Predicted]]) -> None:
    places = range(len(bars))
    left = [0.0] * len(bars)
    for part, color in PARTS:
        widths = [getattr(point.parts, part) for _, point in bars]
        drawn = axes.barh(places, widths, left=left, color=color, height=0.66, label=part)
        for patch, (_, point) in zip(drawn, bars, strict=True):
            if isinstance(point, Predicted):
                patch.set(facecolor=_pale(color))
            elif point.oversubscribed:
                patch.set(hatch="///", edgecolor="white", linewidth=0)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in zip(places, left, strict=True):
        step = bars[place][1].milliseconds
        axes.text(total, place, "" if step is None else f" {step.median:.3g}", va="center", fontsize=8, color=GREY)
    axes.set_yticks(places, [name for name, _ in bars], fontsize=8.5)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 1.08 * max(left, default=1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _pale(color: str) -> tuple[float, float, float]:
    """The color on its way to white; nothing shines through."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - 0.45 * (1 - part) for part in to_rgb(color))
    return red, green, blue


def _name(point: PointResult | Predicted) -> str:
    return f"{point.ranks} x {point.threads}"


def _mode_title(mode: str) -> str:
    return {"strong": "strong scaling: one global batch", "weak": "weak scaling: the batch grows"}[mode]


def save_classic(comparison: Comparison, folder: Path) -> tuple[Path, ...]:
    """``classic.png``: the time of each configuration, and the loss curves, which lie on one another."""
    return plots.save(classic_figure(comparison), folder / "classic", ("png",))


def classic_figure(comparison: Comparison) -> "Figure":
    """Training time of each configuration, with its speedup where there is one, beside the training losses."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    configurations = comparison.configurations
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    times, losses = (figure.add_subplot(1, 2, number) for number in (1, 2))
    places = range(len(configurations))
    drawn = times.barh(places, [each.seconds.median for each in configurations], color=BLUE, height=0.66)
    for place, patch, each in zip(places, drawn, configurations, strict=True):
        note = "no speedup" if each.speedup is None else f"{each.speedup.median:.2f} times as fast"
        if each.oversubscribed:
            patch.set(color=GREY, alpha=0.5, hatch="///", edgecolor="white", linewidth=0)
            note = f"more than {comparison.cores} cores"
        times.text(each.seconds.median, place, f" {each.seconds.median:.3g} s, {note}", va="center", fontsize=8)
    times.set_yticks(places, [f"{each.name} ({each.ranks} x {each.threads})" for each in configurations])
    times.invert_yaxis()
    times.set_xlim(0, 1.7 * max(each.seconds.median for each in configurations))
    times.set_xlabel("seconds of training")
    for number, each in enumerate(configurations):
        color, marker = STYLES[number % len(STYLES)]
        epochs = range(1, len(each.losses) + 1)
        size = 13 - 2.2 * number  # rings around one another where the curves are the same
        losses.plot(epochs, each.losses, color=color, marker=marker, markersize=size, markerfacecolor="none",
                    linewidth=1, label=each.name)  # fmt: skip
    losses.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    losses.set_xlabel("epoch")
    losses.set_ylabel("training loss")
    losses.legend(frameon=False)
    for axes in (times, losses):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    times.grid(visible=False, axis="y")
    return figure
