"""``convolt data``: which data sets there are, fetching one, and checking one before training meets its faults.

Nothing is downloaded but by ``fetch``. ``check`` ends with 1 when it finds what makes loading fail, so that it can
stand before training in a script; ``--strict`` makes it as hard on what only makes results doubtful.
"""

from collections import Counter
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from convolt.cli.options import (
    Sectioned,
    channels_option,
    data_dir_option,
    image_size_option,
    json_option,
    notes,
    print_json,
    results,
)
from convolt.datasets import SOURCES, fetch, find_source
from convolt.datasets.check import Finding, Report, check_dataset
from convolt.datasets.source import Source, locate
from convolt.signals import ExitCode

SEVERITIES = {"error": "red", "warning": "yellow", "note": "cyan"}
SHOWN = 20  # findings of one kind; --json has them all

LIST_EPILOG = """\b
Example:
  convolt data list --data-dir DIR
"""
FETCH_EPILOG = """\b
Example:
  convolt data fetch mnist
"""
CHECK_EPILOG = """\b
Examples:
  convolt data check cifar10 --data-dir DIR
  convolt data check photos.zip --image-size 64

Exit codes: 0 nothing that makes loading fail (with --strict: nothing doubtful either), 1 something does.
"""


@click.group(short_help="List, fetch and check data sets.")
def data() -> None:
    """List, fetch and check data sets."""


@data.command("list", cls=Sectioned, epilog=LIST_EPILOG, short_help="Show which data sets there are, and where.")
@data_dir_option
@json_option
def list_(data_dir: str | None, as_json: bool) -> None:
    """Show the data sets that have a name, and which of them are here.

    Besides these, --data takes any folder or zip of images in class folders, and any .npz of arrays.
    """
    found = [(source, place(source, data_dir)) for source in SOURCES]
    if as_json:
        print_json(
            [
                {
                    "name": source.name,
                    "description": source.description,
                    "license": source.license,
                    "citation": source.citation,
                    "found": where is not None,
                    "folder": where,
                }
                for source, where in found
            ]
        )
        return
    folder = "" if data_dir is None else f" --data-dir {data_dir}"
    table = Table("name", "what it is", "found", box=SIMPLE_HEAD)
    for source, where in found:
        missing = Text(f"no; run: convolt data fetch {source.name}{folder}", style="dim")
        table.add_row(source.name, source.description, missing if where is None else Text(where))
    results().print(table)


@data.command("fetch", cls=Sectioned, epilog=FETCH_EPILOG, short_help="Download a data set.")
@click.argument("name", help="A name in `convolt data list`.")
@data_dir_option
@json_option
def fetch_(name: str, data_dir: str | None, as_json: bool) -> None:
    """Download what is missing of the data set NAME, and verify it; an interrupted download goes on."""
    source = find_source(name)
    where = place(source, data_dir) if not source.files else str(fetch(name, data_dir))
    if as_json:
        print_json({"name": name, "folder": where})
    else:
        click.echo(f"{name}: {where}")


@data.command("check", cls=Sectioned, epilog=CHECK_EPILOG, short_help="Name every bad image of a data set.")
@click.argument("name", metavar="NAME|PATH", help="A name in `convolt data list`; or a folder, zip or .npz.")
@data_dir_option
@image_size_option
@channels_option
@click.option("--strict", is_flag=True, help="Fail on warnings as well: duplicates, leaks, imbalance.")
@json_option
@click.pass_context
def check(
    ctx: click.Context,
    name: str,
    data_dir: str | None,
    image_size: tuple[int, int] | None,
    channels: int | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Name every unreadable, truncated, duplicate or leaking (train = test) image of a data set."""
    with notes().status(f"checking {name}"):
        report = check_dataset(name, data_dir, image_size, channels)
    doubtful = any(finding.severity == "warning" for finding in report.findings)
    good = report.ok and not (strict and doubtful)
    if as_json:
        findings = [asdict(finding) for finding in report.findings]
        print_json({"name": report.name, "ok": good, "counts": report.counts, "findings": findings})
    else:
        show(report, results())
    ctx.exit(ExitCode.OK if good else ExitCode.ERROR)


def place(source: Source, root: str | None) -> str | None:
    """Where a data set is, or None."""
    if not source.files:
        return "in the package"
    folder: Path | None = locate(source, root)
    return None if folder is None else str(folder)


def show(report: Report, console: Console) -> None:
    """Images by split and class, then the findings, the worst first."""
    table = Table("class", box=SIMPLE_HEAD)
    for split in report.counts:
        table.add_column(split, justify="right")
    for label in next(iter(report.counts.values()), {}):
        table.add_row(Text(label), *(f"{counts[label]:,}" for counts in report.counts.values()))
    table.add_section()
    table.add_row("all", *(f"{sum(counts.values()):,}" for counts in report.counts.values()))
    if report.counts:
        console.print(table)
    order = list(SEVERITIES)
    ranked = sorted(report.findings, key=lambda finding: (order.index(finding.severity), finding.kind))
    for (severity, kind), group in groupby(ranked, key=lambda finding: (finding.severity, finding.kind)):
        findings = list(group)
        for finding in findings[:SHOWN]:
            console.print(line(finding), soft_wrap=True)
        if len(findings) > SHOWN:
            console.print(Text(f"{severity}: {kind}: {len(findings) - SHOWN:,} more; --json lists them all"))
    tally = Counter(str(finding.severity) for finding in report.findings)
    found = ", ".join(f"{tally[name]:,} {name}{'s' * (tally[name] > 1)}" for name in order if tally[name])
    console.print(Text(f"{report.name}: {found or 'no problems'}"))


def line(finding: Finding) -> Text:
    """A finding in one line; an error of loading names its file itself."""
    text = finding.detail if finding.where in finding.detail else f"{finding.where}: {finding.detail}"
    return Text.assemble((f"{finding.severity}: ", SEVERITIES[finding.severity]), f"{finding.kind}: {text}")
