"""What several verbs share on the command line: types of values, sections of ``--help``, common options.

An option's section is the class it is declared with, so that it stands beside the option and nowhere else. Numbers are
only parsed here; what they must hold is said by the dataclass that they end up in, once for Python and command line.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import click
from rich.console import Console

from convolt import engines
from convolt.config import canonical
from convolt.durable import encode_json
from convolt.engine import COMPILING
from convolt.errors import ConfigError, nearest

Command = TypeVar("Command", bound=Callable[..., Any] | click.Command)


class DataOption(click.Option):
    """Which images."""

    section: ClassVar[str] = "Data"


class ModelOption(click.Option):
    """Which network."""

    section: ClassVar[str] = "Model"


class RecipeOption(click.Option):
    """How it is trained: whatever changes the mathematics."""

    section: ClassVar[str] = "Training"


class EngineOption(click.Option):
    """How it is computed."""

    section: ClassVar[str] = "Engine"


class RunOption(click.Option):
    """Where the run goes and what is kept of it."""

    section: ClassVar[str] = "Run"


class Sectioned(click.Command):
    """A command whose help shows its options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections in the order in which they are met, then what is common to all verbs."""
        sections: dict[str, list[tuple[str, str]]] = {}
        common: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record and isinstance(parameter, click.Option):  # click writes the arguments itself
                title = getattr(parameter, "section", None)
                (sections.setdefault(title, []) if title else common).append(record)
        for title, records in (*sections.items(), ("Output", common)):
            with formatter.section(title):
                formatter.write_dl(records)


class Name(click.Choice[str]):
    """One of a family of names, spelled as config.py allows; an unknown one is answered with the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it stands in the family."""
        known = {canonical(choice): choice for choice in self.choices}
        if canonical(str(value)) not in known:
            self.fail(f"unknown name {value!r}; {nearest(str(value), self.choices)}", param, ctx)
        return known[canonical(str(value))]


class ImageSize(click.ParamType[tuple[int, int]]):
    """``32`` or ``32x48``, height first."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """(height, width)."""
        if isinstance(value, tuple):
            return value
        sides = str(value).lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() for side in sides):
            self.fail(f"must be an image size such as 32 or 32x48 (height x width); got {value!r}", param, ctx)
        return int(sides[0]), int(sides[-1])


def listed(names: Sequence[str]) -> str:
    """The names of a family in a line of help."""
    return ", ".join(names)


run_argument = click.argument(
    "folder", metavar="RUN", type=click.Path(path_type=Path), help="The folder that training wrote."
)
data_dir_option = click.option(
    "--data-dir", cls=DataOption, metavar="DIR", help="Folder of the files. [default: $CONVOLT_DATA_DIR or the cache]"
)
image_size_option = click.option(
    "--image-size", cls=DataOption, type=ImageSize(), metavar="HxW", help="Resize images in class folders, e.g. 32x32."
)
channels_option = click.option(
    "--channels",
    cls=DataOption,
    type=int,
    metavar="1|3",
    help="Convert images in class folders to gray (1) or RGB (3).",
)
threads_option = click.option(
    "--threads", cls=EngineOption, type=int, metavar="N", help="Threads that compute. [default: every allowed core]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")


def engine_option(default: str) -> Callable[[Command], Command]:
    """``--engine``, with what it is when it is not given."""
    text = f"How operations are computed: {listed(engines.names())}. [default: {default}]"
    return click.option("--engine", cls=EngineOption, type=Name(engines.names()), metavar="NAME", help=text)


def notes(quiet: bool = False) -> Console:
    """Standard error, for what is not a result."""
    return Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)


class _Compiling(logging.Handler):
    """Says on standard error what is compiled, once it has taken a while, and not more often than people read."""

    def __init__(self, patience: float, interval: float) -> None:
        logging.Handler.__init__(self)
        self._patience, self._interval = patience, interval
        self._began: float | None = None
        self._said = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        if now - self._began >= self._patience and now - self._said >= self._interval:
            self._said = now
            done, total, *_ = record.args  # type: ignore[misc]  # the logger's contract
            click.echo(f"compiling kernels {done}/{total} ...", err=True)


@contextmanager
def telling_of_compilation(quiet: bool = False, patience: float = 0.5, interval: float = 2.0) -> Iterator[None]:
    """While this is open, an engine that compiles for longer than ``patience`` seconds is not silent about it."""
    logger, handler = logging.getLogger(COMPILING), _Compiling(patience, interval)
    if quiet:
        yield
        return
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def results() -> Console:
    """Standard output for people; wide enough that no table is cut when it goes to a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def print_json(value: Any) -> None:
    """One JSON object on standard output; a number that is not finite is ``null``."""
    click.echo(encode_json(value))


def writable(path: Path, option: str) -> Path:
    """The path, if a file can be put there after hours of training. Raises ConfigError."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        wrong = "is a folder; name a file in it" if path.is_dir() else "its folder does not exist; make it first"
        raise ConfigError(f"{option} {path}: {wrong}")
    return path
