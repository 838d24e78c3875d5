"""The command line: one module per verb, loaded when the verb is invoked and not before.

``convolt --help`` answers from the table VERBS below, so it imports no engine and no library but click. The module
``convolt.cli.<verb>`` holds a click command of the same name.

Whatever the user can cause ends in one line on standard error, ``convolt: error: ...``, and an exit code: 2 for a
command line or a configuration that cannot be right, 1 for anything that fails later, 130 for Ctrl-C. A verb may exit
with a code of its own (``ctx.exit``). ``convolt --debug VERB ...`` shows the traceback instead of the line; an error
that Convolt does not raise on purpose is a defect and always shows it.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click

from convolt.errors import ConfigError, ConvoltError

#: Every verb and its line in ``convolt --help``.
VERBS = {
    "train": "Train a network on a data set.",
    "predict": "Classify image files with a trained network.",
    "evaluate": "Measure a trained network: accuracy, top-k, confusion matrix, per class.",
    "bench": "Compare engines side by side: speed, ratio to PyTorch, part of the peak.",
    "scale": "Measure and predict the speedup of more cores: ranks x threads, strong and weak.",
    "data": "List, fetch and check data sets.",
    "doctor": "Show what this machine offers and what is missing.",
}

FAILURE, USAGE, INTERRUPTED = 1, 2, 130
LESS_MEMORY = "--batch-size, --micro-batch-size, or --set engine.checkpoint_segments=4 with the jit engine"


class Verbs(click.Group):
    """A group whose commands are a name and a line of help until one is invoked."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order of the table, not of the alphabet."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb as click does, then load the module that holds it."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            command = getattr(import_module(f"convolt.cli.{name}"), name)
        return name, command, rest


@dataclass
class GlobalOptions:
    """What stands before the verb."""

    debug: bool = False
    arguments: tuple[str, ...] = ()


@click.group(
    cls=Verbs,
    commands=[click.Command(name, short_help=line) for name, line in VERBS.items()],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="convolt")
@click.pass_obj
def cli(options: GlobalOptions, debug: bool) -> None:
    """Train convolutional networks as fast as this machine allows."""
    options.debug = debug


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = GlobalOptions(arguments=tuple(sys.argv[1:] if args is None else args))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            code = cli.main(args, prog_name="convolt", standalone_mode=False, obj=options)
        sys.stdout.flush()  # a closed pipe shows here, not at the interpreter's exit
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt) as error:
        return fail(error)
    except BrokenPipeError:
        # The reader has left (convolt ... | head): what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except (click.ClickException, ConvoltError, OSError, MemoryError) as error:
        if options.debug:
            raise
        return fail(error)
    return code if isinstance(code, int) else 0


def fail(error: BaseException, who: str = "") -> int:
    """Say in one line what went wrong; returns the exit code."""
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return _fail(f"{who}interrupted", INTERRUPTED)
    return _fail(who + _message(error), USAGE if isinstance(error, click.UsageError | ConfigError) else FAILURE)


def _message(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"out of memory ({error or 'no size told'}); a smaller batch, images or layers need less: {LESS_MEMORY}"
    if not isinstance(error, click.ClickException):
        return str(error) or type(error).__name__
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f" See: {context.command_path} --help" if context else ""
    return error.format_message() + hint


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A warning in one line, in place of Python's two with a place in the source."""
    click.echo(f"convolt: warning: {message}", err=True)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    click.echo(f"convolt: error: {line}", err=True)
    return code
