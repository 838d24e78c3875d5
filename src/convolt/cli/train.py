"""``convolt train``: put the settings together, load the data, train, say how it went.

Everything that happens here is ``fit`` with what settings.py resolved. A signal ends it with the exit code 75 and the
line that goes on with the run; see signals.py.
"""

import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import click

from convolt import plots, zoo
from convolt.augment import AUGMENTS
from convolt.callbacks import ProgressBar
from convolt.cli import GlobalOptions, fail
from convolt.cli.options import (
    DataOption,
    EngineOption,
    ModelOption,
    Name,
    RecipeOption,
    RunOption,
    Sectioned,
    channels_option,
    data_dir_option,
    engine_option,
    image_size_option,
    json_option,
    listed,
    notes,
    print_json,
    telling_of_compilation,
    threads_option,
    writable,
)
from convolt.cli.ranks import OfFirst, Ranks, describe, oversubscribed, start, wanted
from convolt.cli.settings import DEFAULT_MODEL, Settings, defaults, merge, put, read_recipe, recorded, resolve
from convolt.comms import whereabouts
from convolt.config import Plain, build, parse_assignment, plain_name
from convolt.data import Dataset
from convolt.datasets import SOURCES
from convolt.datasets.spec import DataSpec
from convolt.directory import PLOTS, RECORD
from convolt.errors import ConfigError, Interrupted
from convolt.launch import threads_per_rank
from convolt.losses import LOSSES
from convolt.model import Model
from convolt.optimizers import OPTIMIZERS
from convolt.precision import PRECISIONS
from convolt.recipe import Recipe
from convolt.run import Run
from convolt.schedules import SCHEDULES
from convolt.signals import ExitCode
from convolt.train import fit

# The key that an option assigns, where it is not the option's own name.
KEYS = {
    "data": "data.name",
    "data_dir": "data.root",
    "valid": "data.valid",
    "subset": "data.subset",
    "image_size": "data.image_size",
    "channels": "data.channels",
    "threads": "engine.threads",
    "elastic": "parallel.elastic",
    "lr": "optimizer.lr",
    "momentum": "optimizer.momentum",
    "weight_decay": "optimizer.weight_decay",
}

# What --json prints of result.json.
RESULT = (
    *("test_accuracy", "test_loss", "epochs", "train_seconds", "images_per_second"),
    *("engine", "precision", "threads", "ranks", "seed", "run"),
)

DEFAULT = Recipe()

EPILOG = """\b
Examples:
  convolt train
  convolt train --data mnist --data-dir DIR --epochs 10 --schedule cosine --set schedule.eta_min=1e-5
  convolt train --data train.zip --image-size 32 --model resnet9 --augment flip --augment crop
  convolt train --recipe runs/NAME/run.json --seed 1
  convolt train --resume runs/NAME
  convolt train --model resnet9 --precision bf16 --explain
  convolt train --ranks 2 --threads 4

Any key of a recipe can be set: --set optimizer.betas=(0.9,0.95), --set early_stopping.patience=5, --set ema.decay=0.99,
and those of the data and the engine: --set data.seed=7, --set engine.KEY=VALUE. A recipe file is TOML with the same
keys. Later ones win: defaults, recipe file, options, --set.

Exit codes: 0 done, 1 failed, 2 wrong command line, 75 interrupted by a signal and saved.
"""


def names(family: tuple[Any, ...]) -> tuple[str, ...]:
    """The names of a family's classes, as the command line takes them."""
    return tuple(plain_name(member) for member in family)


@click.command(cls=Sectioned, epilog=EPILOG, short_help="Train a network on a data set.")
@click.option(
    "--data",
    cls=DataOption,
    metavar="NAME|PATH",
    help=f"{listed([source.name for source in SOURCES])}; or a folder, zip or .npz. [default: {DataSpec.name}]",
)
@data_dir_option
@click.option("--valid", cls=DataOption, type=float, metavar="X", help="Part held out for validation. [default: 0.1]")
@click.option("--subset", cls=DataOption, type=int, metavar="N", help="Train on N images, chosen by the seed.")
@image_size_option
@channels_option
@click.option(
    "--model",
    cls=ModelOption,
    metavar="NAME|FILE",
    help=f"{listed([*zoo.MODELS])}; or a file with input_shape and layers. [default: {DEFAULT_MODEL}]",
)
@click.option(
    "--normalize/--no-normalize",
    cls=ModelOption,
    default=None,
    help="Begin a network of the zoo by subtracting the data's mean and dividing by its deviation. [default: yes]",
)
@click.option(
    "--epochs", cls=RecipeOption, type=int, metavar="N", help=f"Times through the images. [default: {DEFAULT.epochs}]"
)
@click.option(
    "--batch-size", cls=RecipeOption, type=int, metavar="N", help=f"Images in a step. [default: {DEFAULT.batch_size}]"
)
@click.option(
    "--micro-batch-size",
    cls=RecipeOption,
    type=int,
    metavar="N",
    help="Compute at most N images at a time, with the same result.",
)
@click.option(
    "--optimizer",
    cls=RecipeOption,
    type=Name(names(OPTIMIZERS)),
    metavar="NAME",
    help=f"{listed(names(OPTIMIZERS))}. [default: {plain_name(type(DEFAULT.optimizer))}]",
)
@click.option("--lr", cls=RecipeOption, type=float, metavar="X", help="Learning rate. [default: the optimizer's]")
@click.option("--momentum", cls=RecipeOption, type=float, metavar="X", help="Of sgd and rmsprop. [default: 0]")
@click.option(
    "--weight-decay",
    cls=RecipeOption,
    type=float,
    metavar="X",
    help="L2 in the gradient; adamw decouples it. [default: the optimizer's]",
)
@click.option(
    "--schedule",
    cls=RecipeOption,
    type=Name(names(SCHEDULES)),
    metavar="NAME",
    help=f"How the learning rate moves: {listed(names(SCHEDULES))}. [default: {plain_name(type(DEFAULT.schedule))}]",
)
@click.option(
    "--loss",
    cls=RecipeOption,
    type=Name(names(LOSSES)),
    metavar="NAME",
    help=f"{listed(names(LOSSES))}. [default: {plain_name(type(DEFAULT.loss))}]",
)
@click.option(
    "--augment",
    cls=RecipeOption,
    type=Name(names(AUGMENTS)),
    multiple=True,
    metavar="NAME",
    help=f"{listed(names(AUGMENTS))}; give it again for more of them, applied in that order.",
)
@click.option(
    "--precision",
    cls=RecipeOption,
    type=Name(tuple(PRECISIONS)),
    metavar="NAME",
    help=f"{listed(tuple(PRECISIONS))}, as far as the engine has it. [default: {DEFAULT.precision}]",
)
@click.option(
    "--seed", cls=RecipeOption, type=int, metavar="N", help=f"Of weights, order and splits. [default: {DEFAULT.seed}]"
)
@click.option(
    "--recipe",
    "recipe_file",
    cls=RecipeOption,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML or JSON with keys of a recipe, or the run.json of a run to repeat.",
)
@click.option(
    "--set",
    "assignments",
    cls=RecipeOption,
    multiple=True,
    metavar="KEY=VALUE",
    help="Set any key; may be given again.",
)
@engine_option("the fastest")
@threads_option
@click.option(
    "--ranks",
    cls=EngineOption,
    type=int,
    metavar="N",
    help="Processes that share every batch, by MPI, each with --threads. [default: 1, or those of mpiexec]",
)
@click.option(
    "--elastic/--no-elastic",
    cls=EngineOption,
    default=None,
    help="When ranks die, go on with the others from the same step; needs Open MPI 5. [default: end, to be resumed]",
)
@click.option("--out", cls=RunOption, metavar="DIR", help="Folder of the run. [default: a new one in --runs-dir]")
@click.option("--runs-dir", cls=RunOption, metavar="DIR", help="Folder of all runs. [default: runs]")
@click.option(
    "--resume",
    cls=RunOption,
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Go on with a run; data, model and recipe are its own, --engine, --threads and --data-dir may change.",
)
@click.option("--checkpoint-every", cls=RunOption, metavar="LENGTH", help="Such as 200ba or 2ep. [default: 1ep]")
@click.option("--keep-last", cls=RunOption, type=int, default=2, metavar="N", help="Checkpoints to keep. [default: 2]")
@click.option(
    "--save-metrics",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Also write what was measured in each epoch as .npz arrays.",
)
@click.option("--explain", is_flag=True, help="Print which kernel computes each stage, and why; train nothing.")
@json_option
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.pass_context
def train(
    ctx: click.Context,
    /,
    recipe_file: Path | None,
    assignments: tuple[str, ...],
    ranks: int | None,
    out: str | None,
    runs_dir: str | None,
    resume: Path | None,
    keep_last: int,
    save_metrics: Path | None,
    explain: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a network on a data set, and leave a folder with its weights, metrics and plots.

    Without options: mnist-cnn on the embedded digits.
    """
    own: GlobalOptions = ctx.obj
    with Ranks(own.debug, fail) as comm:
        if keep_last < 1:
            raise ConfigError(f"--keep-last must be at least 1; got {keep_last}")
        if resume is not None and (out is not None or runs_dir is not None):
            raise ConfigError("--resume goes on in the run's own folder; leave out --out and --runs-dir")
        if save_metrics is not None:
            writable(save_metrics, "--save-metrics")
        to_start = 1 if explain else wanted(ranks)
        if to_start > 1:
            asked = collect(resume, recipe_file, options, assignments, to_start)  # a mistake is told before MPI starts
            folder = str(out or resume) if out or resume else None
            ctx.exit(start(to_start, own.arguments, folder, asked.parallel.elastic))
        settings = collect(resume, recipe_file, options, assignments, comm.size, comm.node_size)
        console = notes(quiet or comm.rank > 0)
        ctx.with_resource(telling_of_compilation(quiet or comm.rank > 0))
        with console.status(f"loading {settings.data.name}"):
            data = settings.data.load()
            model = settings.build_model(data)
        if explain:
            if comm.rank == 0:
                tell_kernels(settings, model, as_json)
            return
        console.print(headline(settings, model, data), markup=False)
        if comm.size > 1:
            places = whereabouts(comm, settings.engine.threads)
            console.print(describe(places), markup=False)
            if (crowd := oversubscribed(places)) is not None:
                warnings.warn(crowd, stacklevel=1)
        try:
            run = fit(
                model,
                data,
                settings.recipe,
                engine=settings.engine,
                comm=comm,
                parallel=settings.parallel,
                out=out if resume is None else resume,
                root=runs_dir or "runs",
                resume=resume is not None,
                checkpoint_every=settings.checkpoint_every,
                keep_last=keep_last,
                callbacks=() if quiet else (OfFirst(comm, ProgressBar()),),
                source=settings.data,
            )
        except Interrupted as interrupted:
            if comm.rank == 0:
                click.echo(f"convolt: {interrupted}", err=True)
            ctx.exit(ExitCode.INTERRUPTED)
        if comm.rank == 0:
            report(run, save_metrics, as_json)


def tell_kernels(settings: Settings, model: Model, as_json: bool) -> None:
    """Which kernel computes each stage, and why, instead of a training."""
    recipe = settings.recipe
    explanation = settings.engine.explain(model, recipe.precision, recipe.micro_batch_size or recipe.batch_size)
    if as_json:
        print_json(asdict(explanation))
    else:
        click.echo(explanation)


def report(run: Run, save_metrics: Path | None, as_json: bool) -> None:
    """What is left of a finished run: plots, metrics as arrays, its result on standard output."""
    if run.history:
        plots.save(plots.learning_curves(run.history, run.folder.name), run.folder / PLOTS / "learning-curves")
    if save_metrics is not None:
        run.save_metrics(save_metrics)
    result = run.result or {}
    if as_json:
        print_json({key: result[key] for key in (*RESULT, "ranks_seconds") if key in result})
    else:
        click.echo(summary(run, result))


def collect(
    resume: Path | None,
    recipe_file: Path | None,
    options: Plain,
    assignments: tuple[str, ...],
    ranks: int = 1,
    node_size: int | None = None,
) -> Settings:
    """Defaults, the run to resume, the recipe file, the options and ``--set``, in this order. Raises ConfigError.

    node_size: how many of the ranks are on this machine, which share its cores if nobody says otherwise.
    """
    settings = defaults()
    run = None if resume is None else Run.load(resume)
    if run is not None:
        record = run.folder / RECORD
        merge(settings, recorded(run.config, record), str(record))
        if run.config.get("ranks") != ranks:
            settings["engine"].pop("threads", None)
    if recipe_file is not None:
        merge(settings, read_recipe(recipe_file), str(recipe_file))
    keys = {name: KEYS.get(name, name) for name in options}
    for name in sorted(keys, key=lambda name: "." in keys[name]):  # a new engine drops the fields of the old one
        if options[name] is not None and options[name] != ():
            put(settings, keys[name], options[name], f"--{name}")
    for text in assignments:
        put(settings, *parse_assignment(text), "--set")
    if ranks > 1 and isinstance(settings["engine"], dict) and not settings["engine"].get("threads"):
        put(settings, "engine.threads", threads_per_rank(node_size or ranks), "--ranks")
    resolved = resolve(settings)
    if run is not None:
        require_same_data(run, resolved.data)
    return resolved


def require_same_data(run: Run, given: DataSpec) -> None:
    """Raise ConfigError unless a resumed run gets the data it had; its files may lie elsewhere."""
    source = run.config["data"]["source"]
    if source is None:
        return
    had = build(DataSpec, source, f"{run.folder / RECORD}: data", {})
    moved = Path(given.name).name == Path(had.name).name
    wanted = replace(had, root=given.root, name=given.name if moved else had.name)
    for field in fields(DataSpec):
        if getattr(given, field.name) != getattr(wanted, field.name):
            raise ConfigError(
                f"data.{field.name}: the run in {run.folder} has {getattr(wanted, field.name)!r}, given was "
                f"{getattr(given, field.name)!r}; resume with the run's own value, or start a new run"
            )


def headline(settings: Settings, model: Model, data: Dataset) -> str:
    """What is about to be trained, in one line."""
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in data.splits())
    name = settings.model if isinstance(settings.model, str) else "model"
    engine = settings.engine
    return (
        f"{data.name}: {sizes}; {name}: {model.parameter_count:,} parameters; "
        f"{engine.NAME}: {engine.threads} threads, {settings.recipe.precision}"
    )


def summary(run: Run, result: Plain) -> str:
    """How it went, in three lines."""
    lines = []
    if run.test_accuracy is not None:
        loss = "not finite" if run.test_loss is None else f"{run.test_loss:.4f}"
        lines.append(f"test accuracy  {run.test_accuracy:.2%}  (loss {loss})")
    elif run.history and run.history[-1].valid_accuracy is not None:
        lines.append(f"valid accuracy {run.history[-1].valid_accuracy:.2%}  (no test images)")
    lines.append(
        f"trained        {result['epochs']} epoch{'s' * (result['epochs'] != 1)} in {result['train_seconds']:.1f} s, "
        f"{result['images_per_second']:,.0f} images/s  ({result['engine']}, {result['threads']} threads, "
        f"{result['precision']})"
    )
    return "\n".join([*lines, f"run            {run.folder}"])
