"""Plots: the right numbers in the right curves, in files that any viewer takes."""

import io
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convolt import plots
from convolt.errors import RunError
from convolt.history import Epoch

HOSTILE = ["<script>alert(1)</script>", r"$\frac$", "a&b", "$x$"]


def history(epochs: int, valid: bool = True) -> list[Epoch]:
    return [
        Epoch(i, 1 / i, 1 - 1 / (i + 1), 2 / i if valid else None, 0.5 if valid else None, 1e-3 / i, 1.0, 100.0)
        for i in range(1, epochs + 1)
    ]


def test_curves_show_the_history() -> None:
    loss, accuracy, rate = plots.learning_curves(history(5)).axes
    assert [axes.get_ylabel() for axes in (loss, accuracy, rate)] == ["loss", "accuracy", "learning rate"]
    train, valid = loss.get_lines()
    np.testing.assert_array_equal(train.get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(train.get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    np.testing.assert_allclose(valid.get_ydata(), [2, 1, 2 / 3, 1 / 2, 2 / 5])
    np.testing.assert_allclose(rate.get_lines()[0].get_ydata(), [1e-3 / i for i in range(1, 6)])
    assert train.get_linestyle() != valid.get_linestyle()  # not by color alone
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation"]


def test_without_validation_there_is_one_curve() -> None:
    loss, accuracy, _ = plots.learning_curves(history(5, valid=False)).axes
    assert len(loss.get_lines()) == len(accuracy.get_lines()) == 1


def test_one_epoch_is_a_visible_point() -> None:
    (line, _) = plots.learning_curves(history(1)).axes[0].get_lines()
    assert line.get_marker() not in ("", "None")


@pytest.mark.parametrize("epochs", [0, 1, 200])
def test_files_can_be_opened(tmp_path: Path, epochs: int) -> None:
    written = plots.save(plots.learning_curves(history(epochs), HOSTILE[1]), tmp_path / "plots" / "learning")
    assert [path.name for path in written] == ["learning.png", "learning.svg"]
    with Image.open(written[0]) as image:
        image.load()
        assert image.size == (1350, 750)
    assert ET.parse(written[1]).getroot().tag.endswith("svg")


def test_the_same_history_gives_the_same_file(tmp_path: Path) -> None:
    first, second = (plots.save(plots.learning_curves(history(3)), tmp_path / name) for name in "ab")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_confusion_matrix_shows_counts_and_hostile_names_as_they_are(tmp_path: Path) -> None:
    counts = np.arange(16).reshape(4, 4)
    figure = plots.confusion_matrix(counts, HOSTILE, title="$\\bad")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == HOSTILE
    assert [text.get_text() for text in axes.texts] == [str(count) for count in range(16)]
    np.testing.assert_allclose(axes.images[0].get_array(), counts / counts.sum(axis=1, keepdims=True))
    _, svg = plots.save(figure, tmp_path / "confusion")
    assert b"<script" not in svg.read_bytes()


def test_many_classes_have_fewer_labels_and_an_absent_class_is_empty() -> None:
    counts = np.diag(np.arange(100))
    figure = plots.confusion_matrix(counts, [f"class {i}" for i in range(100)])
    axes = figure.axes[0]
    assert len(axes.texts) == 0
    assert 0 < len(axes.get_xticks()) <= 40
    np.testing.assert_array_equal(axes.images[0].get_array()[0], np.zeros(100))


def test_matrix_must_fit_the_classes() -> None:
    with pytest.raises(RunError, match=r"3 classes need a 3 x 3 matrix; got \(2, 2\)"):
        plots.confusion_matrix(np.eye(2), ["a", "b", "c"])


def test_plot_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot save the plot"):
        plots.save(plots.learning_curves(history(1)), tmp_path / "file" / "learning")


def test_nothing_global_is_touched() -> None:
    code = """
import sys
from convolt import plots
assert "matplotlib" not in sys.modules
plots.learning_curves([])
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)


def test_figures_take_any_stream() -> None:
    stream = io.BytesIO()
    plots.learning_curves(history(2)).savefig(stream, format="png")
    assert stream.getvalue().startswith(b"\x89PNG")
