"""``convolt scale``: how much faster more cores are, measured, and what other machines would do, predicted.

What is measured, and how, is in ``convolt.scaling``; here options become a plan, and results tables and plots.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from convolt import durable, zoo
from convolt.cli.bench import ShapeType, build_model, load_line, setting
from convolt.cli.options import (
    DataOption,
    EngineOption,
    ModelOption,
    Name,
    Sectioned,
    data_dir_option,
    engine_option,
    json_option,
    listed,
    notes,
    print_json,
    results,
)
from convolt.cli.settings import located
from convolt.config import Plain
from convolt.datasets import SOURCES
from convolt.datasets.spec import DataSpec
from convolt.engines import default_engine
from convolt.errors import ConfigError
from convolt.launch import placement
from convolt.machine import Machine
from convolt.model import Model
from convolt.precision import PRECISIONS
from convolt.scaling import classic, plots, tables, worker
from convolt.scaling.grid import MODES, THIS_MACHINE, Mode, Plan
from convolt.scaling.grid import scale as measure
from convolt.scaling.network import NETWORKS, parse

ROUNDS, SLICE_SECONDS, BATCH_SIZE = 7, 1.0, 256
MODEL, CLASSIC_DATA, CLASSIC_EPOCHS = "cifar-cnn", "cifar10", 5
PREDICTED_ON = ("10gbe",)
GRID_ONLY = {
    *("ranks", "threads", "strong", "weak", "base", "predict_ranks", "networks", "input_shape", "classes"),
}
CLASSIC_ONLY = {"subset", "epochs", "assignments"}

EPILOG = """\b
Examples:
  convolt scale
  convolt scale --model mnist-cnn --engine jit --ranks 1,2,4 --threads 1,2 --strong --weak --out scaling
  convolt scale --engine jit --predict-ranks 2,4,8,16 --network 1gbe --network 10gbe --network 30us:25Gb/s
  convolt scale --classic --data cifar10 --data-dir DIR --epochs 5 --subset 5000 --out classic

The base of every speedup is the fastest serial program: of --base, or the engine itself on one thread without MPI.
Points with more workers than cores are timed and marked, and no speedup is made of them.
"""


class GridOption(click.Option):
    """What is measured, and for how long."""

    section = "Measuring"


class PredictionOption(click.Option):
    """What is computed from it."""

    section = "Prediction"


class ClassicOption(click.Option):
    """Real trainings instead of a grid."""

    section = "The classic comparison"


class Numbers(click.ParamType[tuple[int, ...]]):
    """``1,2,4``."""

    name = "N,N..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The numbers."""
        if isinstance(value, tuple):
            return value
        words = str(value).split(",")
        if not all(word.strip().isdecimal() for word in words):
            self.fail(f"must be numbers such as 1,2,4; got {value!r}", param, ctx)
        return tuple(int(word) for word in words)


@click.command(cls=Sectioned, epilog=EPILOG, short_help="Measure and predict the speedup of more cores.")
@click.option(
    "--data",
    cls=DataOption,
    metavar="NAME|PATH",
    help=f"{listed([source.name for source in SOURCES])}; or a folder, zip or .npz. A grid takes its shape of image "
    f"from it and computes on random ones. [default: the network's own shape; {CLASSIC_DATA} with --classic]",
)
@data_dir_option
@click.option("--subset", cls=DataOption, type=int, metavar="N", help="With --classic: train on N images.")
@click.option(
    "--model",
    "model_name",
    cls=ModelOption,
    default=MODEL,
    metavar="NAME|FILE",
    help=f"{listed([*zoo.MODELS])}; or a file with input_shape and layers. [default: {MODEL}]",
)
@click.option("--input-shape", cls=ModelOption, type=ShapeType(), metavar="CxHxW", help="[default: the network's own]")
@click.option("--classes", cls=ModelOption, type=int, metavar="N", help="Classes to tell apart. [default: 10]")
@engine_option("the fastest")
@click.option(
    "--precision",
    cls=EngineOption,
    type=Name(tuple(PRECISIONS)),
    default="fp32",
    metavar="NAME",
    help=f"{listed(tuple(PRECISIONS))}, as far as the engine has it. [default: fp32]",
)
@click.option(
    "--ranks", cls=GridOption, type=Numbers(), metavar="N,N...", help="[default: 1, 2, 4... as far as the cores go]"
)
@click.option("--threads", cls=GridOption, type=Numbers(), metavar="N,N...", help="Of each rank. [default: 1]")
@click.option("--strong", cls=GridOption, is_flag=True, help="Keep the global batch. The default.")
@click.option("--weak", cls=GridOption, is_flag=True, help="Let the batch grow with the workers.")
@click.option(
    "--base",
    cls=GridOption,
    metavar="NAME,NAME...",
    help="Serial programs, named as by convolt bench; the fastest one is the base. [default: the engine itself]",
)
@click.option(
    "--batch-size",
    cls=GridOption,
    type=int,
    metavar="N",
    help=f"Images in a step: of all, or of each worker in weak scaling. [default: {BATCH_SIZE}; 128 with --classic]",
)
@click.option(
    "--rounds", cls=GridOption, type=int, metavar="N", help=f"Slices of each point. [default: {ROUNDS}; --classic: 1]"
)
@click.option(
    "--seconds-per-slice",
    cls=GridOption,
    type=float,
    default=SLICE_SECONDS,
    metavar="X",
    help=f"Length of a slice, of one step at least. [default: {SLICE_SECONDS:g}]",
)
@click.option("--seed", cls=GridOption, type=int, default=0, metavar="N", help="Of weights, images and turns.")
@click.option("--predict-ranks", cls=PredictionOption, type=Numbers(), default=(), metavar="N,N...")
@click.option(
    "--network",
    "networks",
    cls=PredictionOption,
    multiple=True,
    metavar="NAME",
    help=f"{listed([*NETWORKS])}, ALPHA:RATE such as 30us:10Gb/s, or {THIS_MACHINE}: as measured between two ranks; "
    f"may be given more than once. [default: {listed(PREDICTED_ON)}]",
)
@click.option(
    "--classic",
    "is_classic",
    cls=ClassicOption,
    is_flag=True,
    help="Train serially, on 2 and 4 ranks, on 2x2 and 2x4 ranks x threads, and compare.",
)
@click.option("--epochs", cls=ClassicOption, type=int, metavar="N", help=f"[default: {CLASSIC_EPOCHS}]")
@click.option(
    "--set", "assignments", cls=ClassicOption, multiple=True, metavar="KEY=VALUE", help="Any key of convolt train."
)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Also write scale.json and plots there.")
@json_option
def scale(out: Path | None, as_json: bool, is_classic: bool, **options: Any) -> None:
    """Measure strong and weak scaling over ranks x threads, and predict more ranks and other networks."""
    if placement() is not None:
        raise ConfigError("scale starts its ranks itself: leave out mpiexec, and give --ranks")
    given = {name: value for name, value in options.items() if not (value is None or value is False or value == ())}
    wrong = given.keys() & (GRID_ONLY if is_classic else CLASSIC_ONLY)
    if wrong:
        option = "--" + min(wrong).replace("_", "-")
        raise ConfigError(
            f"{option}: --classic trains five configurations of its own; leave it out"
            if is_classic
            else f"{option}: is for --classic alone"
        )
    folder = None if out is None else writable_folder(out)
    if is_classic:
        compare_classic(given, folder, as_json)
    else:
        measure_grid(given, folder, as_json)


def measure_grid(given: Plain, folder: Path | None, as_json: bool) -> None:
    """Measure, predict, show."""
    plan, cores = make_plan(given), workers_at_once()
    with notes().status("measuring") as status:
        report = measure(plan, worker.run, cores, lambda what, done, total: status.update(f"{what} ({done}/{total})"))
    plain = {**setting(given["model_name"], plan.model), **report.to_plain()}
    if folder is not None:
        durable.write_json(folder / "scale.json", plain)
        plots.save_all(report, folder)
    if as_json:
        print_json(plain)
        return
    console = results()
    console.print(Text(f"{given['model_name']}, {report.program}: {report.parameters:,} parameters", style="bold"))
    for part in tables.of_report(report):
        console.print(part)
    console.print(Text(load_line(report.load)))
    for warning in report.warnings():
        console.print(Text(f"warning: {warning}", style="yellow"))


def make_plan(given: Plain) -> Plan:
    """What the options ask for. Raises ConfigError."""
    if "networks" in given and "predict_ranks" not in given:
        raise ConfigError("--network is for predictions: give the ranks as well, --predict-ranks 2,4,8")
    modes: tuple[Mode, ...] = tuple(mode for mode in MODES if mode in given) or MODES[:1]
    engine = given.get("engine", default_engine().NAME)
    return Plan(
        shaped_model(given),
        f"{engine}-{given['precision']}",
        base=tuple(given["base"].split(",")) if "base" in given else (),
        ranks=given.get("ranks", powers_of_two(workers_at_once())),
        threads=given.get("threads", (1,)),
        modes=modes,
        batch_size=given.get("batch_size", BATCH_SIZE),
        rounds=given.get("rounds", ROUNDS),
        seconds=given["seconds_per_slice"],
        predict_ranks=given.get("predict_ranks", ()),
        networks=tuple(None if name == THIS_MACHINE else parse(name) for name in given.get("networks", PREDICTED_ON)),
        seed=given.get("seed", 0),
    )


def shaped_model(given: Plain) -> Model:
    """A network for the shape that is asked for, that of a data set, or its own. Raises ConfigError, DataError."""
    shape, classes = given.get("input_shape"), given.get("classes")
    if "data" in given:
        if shape is not None or classes is not None:
            raise ConfigError("--input-shape and --classes come from --data; give one or the other")
        loaded = located(DataSpec(given["data"], root=given.get("data_dir"))).load()
        shape, classes = loaded.input_shape, loaded.num_classes
    return build_model(given["model_name"], shape, classes)


def compare_classic(given: Plain, folder: Path | None, as_json: bool) -> None:
    """Train the five, compare, show."""
    cores, rounds = workers_at_once(), given.get("rounds", 1)
    with ExitStack() as closing:
        place = Path(closing.enter_context(tempfile.TemporaryDirectory())) if folder is None else folder
        status = closing.enter_context(notes().status("training"))
        comparison = classic.compare(
            classic.trainer(train_arguments(given)),
            place,
            rounds,
            cores,
            given.get("seed", 0),
            lambda what, done, total: status.update(f"{what} ({done}/{total})"),
        )
    plain = {"model": given["model_name"], **comparison.to_plain()}
    if folder is not None:
        durable.write_json(folder / "classic.json", plain)
        plots.save_classic(comparison, folder)
    if as_json:
        print_json(plain)
        return
    console = results()
    console.print(tables.of_comparison(comparison, given["model_name"]))
    console.print(Text(load_line(comparison.load)))
    for warning in comparison.warnings():
        console.print(Text(f"warning: {warning}", style="yellow"))


def train_arguments(given: Plain) -> list[str]:
    """What each of the five trainings is told."""
    options = {
        "--data": given.get("data", CLASSIC_DATA),
        "--data-dir": given.get("data_dir"),
        "--subset": given.get("subset"),
        "--model": given["model_name"],
        "--engine": given.get("engine", default_engine().NAME),
        "--precision": given["precision"],
        "--epochs": given.get("epochs", CLASSIC_EPOCHS),
        "--batch-size": given.get("batch_size"),
        "--seed": given.get("seed", 0),
    }
    words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return [*words, *(word for text in given.get("assignments", ()) for word in ("--set", text))]


def workers_at_once() -> int:
    """Ranks times threads that this machine can have without taking turns: cores, not their hardware threads."""
    cores = Machine.detect().cores
    return cores.allowed if cores.physical is None else min(cores.allowed, cores.physical)


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4... up to ``most``."""
    return tuple(2**k for k in range(most.bit_length()))


def writable_folder(path: Path) -> Path:
    """The folder, made if it is not there. Raises ConfigError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror}; name a folder") from None
    return path
