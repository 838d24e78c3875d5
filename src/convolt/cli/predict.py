"""``convolt predict``: image files in, classes and probabilities out.

Images are made what the model takes, its channels and its size, and a note on standard error says so: a photograph
that is squeezed to 28x28 pixels may be classified with confidence and mean nothing. All files are read before the
first is classified, so a bad one ends the command before it has printed half an answer.
"""

from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from convolt.cli.options import (
    Sectioned,
    engine_option,
    json_option,
    notes,
    print_json,
    results,
    run_argument,
    telling_of_compilation,
    threads_option,
)
from convolt.cli.settings import run_engine
from convolt.datasets.images import ImageFile, decode, strict_decoding
from convolt.errors import ConfigError
from convolt.run import Run

KINDS = {1: "grayscale", 3: "color"}

EPILOG = """\b
Example:
  convolt predict runs/NAME seven.png four.jpg --top 2
"""


@click.command(cls=Sectioned, epilog=EPILOG, short_help="Classify image files with a trained network.")
@run_argument
@click.argument(
    "images", metavar="IMAGE...", type=click.Path(path_type=Path), nargs=-1, required=True, help="Image files."
)
@engine_option("the one that trained the run")
@threads_option
@click.option("--top", type=int, default=3, metavar="K", help="Classes to show for each image. [default: 3]")
@json_option
def predict(
    folder: Path, images: tuple[Path, ...], engine: str | None, threads: int | None, top: int, as_json: bool
) -> None:
    """Classify image files with a trained network.

    An image is converted to the channels and the size that the network takes.
    """
    if top < 1:
        raise ConfigError(f"--top must be at least 1; got {top}")
    run = Run.load(folder)
    channels, *size = run.model.input_shape
    if len(size) != 2 or channels not in KINDS:
        raise ConfigError(
            f"{folder}: the network takes {run.model.input_shape}, image files have 1 or 3 channels (C, H, W); "
            "use Run.predict in Python"
        )
    click.get_current_context().with_resource(telling_of_compilation())
    batch = read_images(images, (channels, size[0], size[1]))
    probabilities = run.predict(batch, run_engine(run, engine, threads))
    classes = run.config["data"]["classes"]
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    rows = [
        (str(path), [(classes[k], float(own[k])) for k in order])
        for path, own, order in zip(images, probabilities, best.tolist(), strict=True)
    ]
    if as_json:
        print_json(
            {
                "run": str(folder),
                "predictions": [
                    {"image": name, "classes": [{"class": label, "probability": p} for label, p in ranking]}
                    for name, ranking in rows
                ],
            }
        )
        return
    table = Table(box=SIMPLE_HEAD)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for name, ranking in rows:
        for place, (label, p) in enumerate(ranking):
            table.add_row(Text("" if place else name), Text(label), f"{p:.2%}")
    results().print(table)


def read_images(paths: tuple[Path, ...], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The images as (N, C, H, W) uint8 of the shape (C, H, W). Raises DataError that names the first bad file."""
    channels, height, width = shape
    console = notes()
    batch = np.empty((len(paths), *shape), np.uint8)
    with strict_decoding():
        for position, path in enumerate(paths):
            file = ImageFile.at(path)
            pixels = decode(file)
            changes = []
            if len(pixels) != channels:
                changes.append(f"{KINDS[len(pixels)]} converted to {KINDS[channels]}")
            if pixels.shape[1:] != (height, width):
                changes.append(f"{pixels.shape[2]}x{pixels.shape[1]} resized to {width}x{height}")
            if changes:
                console.print(f"{path}: {', '.join(changes)}", markup=False)
                pixels = decode(file, (height, width), channels)
            batch[position] = pixels
    return batch
