"""``convolt doctor``: what this machine offers, what is missing, and the line that mends it.

The facts come from machine.py; here they are put in order and judged. A missing optional library is no failure, so
the exit code is 0. Lines are never wrapped: a command that installs something must survive copy and paste.
"""

import json
from collections.abc import Iterator

import click
from rich.console import Console
from rich.text import Text

from convolt.machine import Cache, Machine, Memory, Package

_GIB = 1024**3


@click.command(short_help="Show what this machine offers and what is missing.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON and nothing else.")
def doctor(as_json: bool) -> None:
    """Show what this machine offers: CPU features, cores, memory, BLAS, GPU, MPI, libraries, and what is missing."""
    machine = Machine.detect()
    warnings = list(advice(machine))
    if as_json:
        click.echo(json.dumps(machine.to_plain() | {"warnings": warnings}, indent=2))
        return
    console = Console(soft_wrap=True, highlight=False)
    for title, rows in sections(machine):
        console.print(Text(title, style="bold"))
        for label, value in rows:
            console.print(Text(f"  {label:<14}"), Text(value), sep="")
    missing = [package.missing for package in (*machine.required, *machine.optional) if package.missing]
    for title, lines, style in (("Missing", missing, "cyan"), ("Warnings", warnings, "yellow")):
        if lines:
            console.print(Text(title, style="bold"))
        for line in lines:
            console.print(Text(f"  {line}", style=style))


def sections(machine: Machine) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The facts as titled lists of (label, value)."""
    cpu, cores, mpi = machine.cpu, machine.cores, machine.mpi
    yield "System", [("platform", machine.platform), ("python", machine.python)]
    yield (
        "CPU",
        [
            ("model", f"{cpu.model} ({cpu.architecture})"),
            ("features", " ".join(cpu.features) or "none that a kernel is chosen by"),
            ("caches", ", ".join(_cache(cache) for cache in cpu.caches) or "unknown"),
        ],
    )
    yield (
        "Cores",
        [
            ("usable", f"{cores.allowed} (the most that --threads can use)"),
            ("in machine", f"{cores.logical} logical"),
            ("by affinity", f"{len(cores.affinity)} logical, {cores.physical or 'an unknown number of'} physical"),
            ("by cgroup", "no limit" if cores.quota is None else f"{cores.quota:g}"),
        ],
    )
    yield "Memory", _memory(machine.memory)
    yield (
        "BLAS",
        [
            (pool.library, f"{pool.version or 'unknown version'}, {pool.threads} threads, {pool.architecture or '?'}")
            for pool in machine.pools
        ]
        or [("none", "NumPy's matrix products are not threaded")],
    )
    yield (
        "GPU",
        [(gpu.name, f"{_size(gpu.memory)}, driver {gpu.driver or 'unknown'}") for gpu in machine.gpus]
        or [("none", "no NVIDIA GPU with a driver was found")],
    )
    yield (
        "MPI",
        [
            ("library", mpi.library or "none found"),
            ("launcher", f"{mpi.launcher} ({mpi.vendor or 'unknown vendor'})" if mpi.launcher else "none found"),
        ],
    )
    yield "Libraries", [_version(package) for package in (*machine.required, *machine.optional)]


def advice(machine: Machine) -> Iterator[str]:
    """What will make a run slow or impossible here, each with its cure."""
    yield from _core_advice(machine)
    if machine.cpu.amx_permitted is False:
        yield "the CPU has AMX but the kernel does not permit it: bf16 runs without tiles; use Linux 5.16 or later"
    torch = next(package.version for package in machine.optional if package.name == "torch")
    if machine.gpus and torch is not None and torch.endswith("+cpu"):
        yield f"a GPU is here but torch {torch} is the CPU build: install the CUDA build of the same version"
    mpi = machine.mpi
    mpi4py = next(package.version for package in machine.optional if package.name == "mpi4py")
    if mpi4py and not (mpi.library and mpi.launcher):
        yield "mpi4py is installed but no MPI runtime was found; run: pip install mpich"
    if mpi.vendor in ("Open MPI", "Intel MPI"):
        cure = "mpiexec --bind-to none" if mpi.vendor == "Open MPI" else "mpiexec -genv I_MPI_PIN off"
        yield f"{mpi.vendor} binds every rank to one core, and its threads with it; start it as: {cure}"


def _core_advice(machine: Machine) -> Iterator[str]:
    cores = machine.cores
    for name, value in machine.thread_variables.items():
        threads = value.split(",")[0].strip()  # OpenMP takes a list, one number per nesting level
        if not threads.isdigit() or int(threads) < 1:
            yield f"{name}={value} is not a number of threads: unset it"
        elif int(threads) > cores.allowed:
            yield f"{name}={value} is more than the {cores.allowed} usable cores: unset it or set it to {cores.allowed}"
    for pool in machine.pools:
        if pool.threads > cores.allowed:
            yield (
                f"{pool.library} has {pool.threads} threads for {cores.allowed} usable cores: "
                f"pass --threads {cores.allowed}"
            )
    if len(cores.affinity) < cores.logical:
        yield (
            f"this process may run on {len(cores.affinity)} of {cores.logical} CPUs (taskset, a batch system or a "
            "container): widen its affinity to use the others"
        )
    if cores.quota is not None and cores.quota < len(cores.affinity):
        yield (
            f"a control group limits this process to {cores.quota:g} cores of {len(cores.affinity)}: "
            f"raise its CPU limit or use at most {cores.allowed} threads"
        )


def _memory(memory: Memory) -> list[tuple[str, str]]:
    return [
        ("total", _size(memory.total)),
        ("available", _size(memory.available)),
        ("cgroup limit", "none" if memory.limit is None else _size(memory.limit)),
    ]


def _cache(cache: Cache) -> str:
    size = f"{cache.bytes // 1024} KiB" if cache.bytes < 1024**2 else f"{cache.bytes / 1024**2:g} MiB"
    return f"L{cache.level} {cache.kind} {size}" + (f" shared by {cache.shared_by}" if cache.shared_by > 1 else "")


def _size(amount: int | None) -> str:
    return "unknown" if amount is None else f"{amount / _GIB:.1f} GiB"


def _version(package: Package) -> tuple[str, str]:
    return package.name, package.version or "not installed"
