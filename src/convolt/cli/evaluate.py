"""``convolt evaluate``: a trained network measured on a split of its data set, or of another with the same classes.

The test split is the default because it is what a result is of; choosing anything by it is another matter. Everything
is computed from one pass: the logits of the whole split.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from convolt import metrics, plots
from convolt.cli.options import (
    DataOption,
    Name,
    Sectioned,
    data_dir_option,
    engine_option,
    json_option,
    notes,
    print_json,
    results,
    run_argument,
    telling_of_compilation,
    threads_option,
)
from convolt.cli.settings import located, run_engine
from convolt.config import build
from convolt.data import Dataset, Split
from convolt.datasets.spec import DataSpec
from convolt.directory import PLOTS, RECORD
from convolt.engine import Engine
from convolt.errors import ConfigError, DataError
from convolt.evaluation import BATCH, on_labels
from convolt.evaluation import predict as predict_logits
from convolt.run import Run

SPLITS = ("test", "valid", "train")
MAX_COLUMNS = 20  # classes; a wider matrix is for --plot or --json

EPILOG = """\b
Examples:
  convolt evaluate runs/NAME
  convolt evaluate runs/NAME --split valid --plot
  convolt evaluate runs/NAME --data DIR --json
"""


@dataclass(frozen=True)
class Measured:
    """What one pass over a split shows. loss and accuracy are means; top_accuracy counts the ``top`` first classes."""

    run: str
    data: str
    split: str
    images: int
    loss: float
    accuracy: float
    top: int
    top_accuracy: float
    confusion: NDArray[np.int64]
    classes: tuple[str, ...]

    @property
    def per_class(self) -> metrics.PerClass:
        """Precision, recall, F1 and support of each class."""
        return metrics.per_class(self.confusion)


@click.command(cls=Sectioned, epilog=EPILOG, short_help="Measure a trained network.")
@run_argument
@click.option("--data", cls=DataOption, metavar="NAME|PATH", help="Data set. [default: the one of the run]")
@data_dir_option
@click.option(
    "--split",
    cls=DataOption,
    type=Name(SPLITS),
    default="test",
    metavar="NAME",
    help="test, valid or train. [default: test]",
)
@engine_option("the one that trained the run")
@threads_option
@click.option("--top", type=int, metavar="K", help="Also count labels among the K first. [default: 5, or all]")
@click.option("--plot", is_flag=True, help="Draw the confusion matrix into the run's plots.")
@json_option
def evaluate(
    folder: Path,
    data: str | None,
    data_dir: str | None,
    split: str,
    engine: str | None,
    threads: int | None,
    top: int | None,
    plot: bool,
    as_json: bool,
) -> None:
    """Measure a trained network: accuracy, loss, top-k, confusion matrix, precision, recall and F1 of each class."""
    run = Run.load(folder)
    classes = run.model.output_shape[0]
    if top is not None and not 1 <= top <= classes:
        raise ConfigError(f"--top must be from 1 to the {classes} classes of the run; got {top}")
    click.get_current_context().with_resource(telling_of_compilation())
    chosen = run_engine(run, engine, threads)
    console = notes()
    with console.status("loading the data"):
        dataset = load(run, data, data_dir, console)
    images = dict(dataset.splits()).get(split)
    if images is None:
        there = ", ".join(name for name, _ in dataset.splits())
        raise DataError(f"{dataset.name} has no {split} split; choose --split from: {there}")
    measured = measure(run, chosen, dataset, split, images, top or min(5, classes))
    drawn: tuple[Path, ...] = ()
    if plot:
        title = f"{dataset.name}, {split}: accuracy {measured.accuracy:.2%}"
        figure = plots.confusion_matrix(measured.confusion, dataset.classes, title)
        drawn = plots.save(figure, folder / PLOTS / f"confusion-matrix-{split}")
    if as_json:
        print_json(to_json(measured, drawn))
    else:
        show(measured, drawn, results())


def load(run: Run, name: str | None, root: str | None, console: Console) -> Dataset:
    """The data set of the run, or another that its network can be measured on. Raises ConfigError, DataError."""
    recorded = run.config["data"]
    where = run.folder / RECORD
    if name is not None:
        spec = located(DataSpec(name, root, seed=run.recipe.seed))
    elif recorded["source"] is None:
        raise ConfigError(f"{where}: the run was trained on arrays in memory; name a data set with --data")
    else:
        own = build(DataSpec, recorded["source"], f"{where}: data.source", {})
        spec = located(own if root is None else replace(own, root=root))
    data = spec.load()
    if data.input_shape != run.model.input_shape:
        raise ConfigError(f"{data.name} has images {data.input_shape}, the network takes {run.model.input_shape}")
    if list(data.classes) != recorded["classes"]:
        raise ConfigError(
            f"{data.name} has other classes than the run: {', '.join(data.classes[:4])}, ... instead of "
            f"{', '.join(recorded['classes'][:4])}, ..."
        )
    sizes = {split_name: len(split) for split_name, split in data.splits()}
    if name is None and sizes != recorded["splits"]:
        console.print(f"note: {data.name} has changed since the run: {sizes}, then {recorded['splits']}", markup=False)
    return data


def measure(run: Run, engine: Engine, data: Dataset, name: str, split: Split, top: int) -> Measured:
    """One pass over the split, with a progress bar on standard error if that is a terminal."""
    executor = run.executor(engine)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = notes()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{data.name} {name}", total=len(split))
        logits = predict_logits(executor, split.images, partial(progress.advance, task, BATCH))
    executor.close()
    loss, _ = on_labels(run.recipe.loss)(logits, split.labels)
    return Measured(
        run=str(run.folder),
        data=data.name,
        split=name,
        images=len(split),
        loss=loss / len(split),
        accuracy=metrics.accuracy(logits, split.labels),
        top=top,
        top_accuracy=metrics.top_k(logits, split.labels, top),
        confusion=metrics.confusion_matrix(logits, split.labels, data.num_classes),
        classes=data.classes,
    )


def to_json(measured: Measured, drawn: tuple[Path, ...]) -> dict[str, Any]:
    """Plain values: the numbers, the matrix as rows of the true class, one object for each class."""
    columns = [array.tolist() for array in measured.per_class]
    return {
        **{name: getattr(measured, name) for name in ("run", "data", "split", "images", "accuracy", "loss")},
        "top_k": {"k": measured.top, "accuracy": measured.top_accuracy},
        "confusion_matrix": measured.confusion.tolist(),
        "classes": [
            {"class": label, "precision": precision, "recall": recall, "f1": f1, "support": support}
            for label, precision, recall, f1, support in zip(measured.classes, *columns, strict=True)
        ],
        "plots": [str(path) for path in drawn],
    }


def show(measured: Measured, drawn: tuple[Path, ...], console: Console) -> None:
    """The numbers and the tables."""
    console.print(Text(f"{measured.data} {measured.split}: {measured.images:,} images"))
    console.print(Text(f"accuracy {measured.accuracy:8.2%}"))
    console.print(Text(f"{f'top-{measured.top}':<8} {measured.top_accuracy:8.2%}"))
    console.print(Text(f"loss     {measured.loss:8.4f}"))
    console.print(per_class_table(measured))
    if len(measured.classes) <= MAX_COLUMNS:
        console.print(confusion_table(measured))
    else:
        console.print(Text(f"The confusion matrix of {len(measured.classes)} classes: see --plot or --json."))
    for path in drawn:
        console.print(Text(f"plot     {path}"))


def per_class_table(measured: Measured) -> Table:
    """Precision, recall, F1 and support of each class."""
    table = Table("class", box=SIMPLE_HEAD, title="Each class", title_justify="left")
    for column in ("precision", "recall", "F1", "support"):
        table.add_column(column, justify="right")
    for label, precision, recall, f1, support in zip(measured.classes, *measured.per_class, strict=True):
        table.add_row(Text(label), f"{precision:.2%}", f"{recall:.2%}", f"{f1:.2%}", f"{support:,}")
    return table


def confusion_table(measured: Measured) -> Table:
    """Row = true class, column = predicted class, by number; hits in bold, nothing where there is nothing."""
    title = "Row: true class, column: predicted"
    table = Table("", box=SIMPLE_HEAD, title=title, title_justify="left")
    for number in range(len(measured.classes)):
        table.add_column(str(number), justify="right")
    for number, (label, counts) in enumerate(zip(measured.classes, measured.confusion.tolist(), strict=True)):
        cells = [Text(f"{n or '.'}", style="bold" if k == number else "") for k, n in enumerate(counts)]
        table.add_row(Text(label if label == str(number) else f"{number} {label}"), *cells)
    return table
