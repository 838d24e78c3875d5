"""Plots of a run, made to be read: learning curves and confusion matrices.

Matplotlib's object interface only: no pyplot, no current figure, no backend chosen for the process, nothing to close.
It is imported on first use, because it costs more than everything else here together. Colors are from Okabe and Ito's
palette (distinct under every common color blindness); training and validation differ in dash and marker too.

Class names and titles come from folders and files, so they are drawn as they are: a dollar sign starts no formula.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from convolt import durable
from convolt.errors import RunError
from convolt.history import Epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VALID, RATE = "#0072B2", "#D55E00", "#595959"  # blue, vermilion, grey
FORMATS = ("png", "svg")
_MAX_ANNOTATED = 20  # classes; beyond, numbers in the cells are too small to read
_MAX_LABELS = 40
_MAX_MARKERS = 30  # epochs


def learning_curves(history: Sequence[Epoch], title: str = "") -> "Figure":
    """Loss and accuracy of training and validation against the epoch, and the learning rate below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9, 5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(4, 1))
    loss, accuracy = (figure.add_subplot(grid[0, column]) for column in range(2))
    _curves(loss, history, "loss")
    _curves(accuracy, history, "accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    rate = figure.add_subplot(grid[1, :])
    rate.plot(
        _epochs(history), [epoch.lr for epoch in history], color=RATE, linewidth=1.2, marker=_marker(history, ".")
    )
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.set_xlim(0.5, max(_epochs(history), default=1) + 0.5)  # one epoch is a point in the middle
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    if title:
        figure.suptitle(title, parse_math=False)
    return figure


def confusion_matrix(counts: NDArray[Any], classes: Sequence[str], title: str = "") -> "Figure":
    """A confusion matrix (K, K), row = true class, column = predicted class; color is the share of the row.

    Raises RunError if matrix and classes do not fit.
    """
    from matplotlib.figure import Figure

    number = len(classes)
    if counts.shape != (number, number):
        raise RunError(f"confusion matrix: {number} classes need a {number} x {number} matrix; got {counts.shape}")
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(4 + 0.4 * number, 12)
    figure = Figure(figsize=(size, size * 0.9), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    shown = range(0, number, math.ceil(number / _MAX_LABELS))
    names = [classes[index] for index in shown]
    for label in axes.set_xticks(shown, names, rotation=90 if max(map(len, names), default=0) > 2 else 0):
        label.label1.set_parse_math(False)
    for label in axes.set_yticks(shown, names):
        label.label1.set_parse_math(False)
    if number <= _MAX_ANNOTATED:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:d}", ha="center", va="center", color=color, fontsize=8)
    if title:
        figure.suptitle(title, parse_math=False)
    return figure


def save(figure: "Figure", path: Path, formats: Sequence[str] = FORMATS) -> tuple[Path, ...]:
    """Write ``path`` + ".png", ".svg"..., each whole or not at all, and without a date: the same figure, the same file.

    Raises RunError.
    """
    from matplotlib import rc_context

    written = []
    for form in formats:
        target = path.with_name(f"{path.name}.{form}")
        buffer = io.BytesIO()
        with rc_context({"svg.hashsalt": "convolt", "svg.fonttype": "path"}):
            figure.savefig(
                buffer, format=form, dpi=150, metadata={"Date": None} if form == "svg" else {"Software": None}
            )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            durable.write_bytes(target, buffer.getvalue())
        except OSError as error:
            raise RunError(f"cannot save the plot {target}: {durable.explain(error, target)}") from error
        written.append(target)
    return tuple(written)


def _curves(axes: "Axes", history: Sequence[Epoch], quantity: str) -> None:
    styles = (("train", "training", TRAIN, "-", "o"), ("valid", "validation", VALID, "--", "s"))
    for split, label, color, dash, shape in styles:
        values = [getattr(epoch, f"{split}_{quantity}") for epoch in history]
        if any(value is not None for value in values):
            numbers = [math.nan if value is None else value for value in values]
            marker = _marker(history, shape)
            axes.plot(
                _epochs(history), numbers, dash, color=color, label=label, linewidth=1.8, marker=marker, markersize=5
            )
    axes.set_ylabel(quantity)
    if history:
        axes.legend(frameon=False)


def _epochs(history: Sequence[Epoch]) -> list[int]:
    return [epoch.epoch for epoch in history]


def _marker(history: Sequence[Epoch], marker: str) -> str:
    return marker if len(history) <= _MAX_MARKERS else ""  # a single epoch would be an invisible line
