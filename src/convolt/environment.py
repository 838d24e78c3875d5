"""Where a run's numbers come from: the part of the machine and of the installed versions that can change them.

Recorded in ``run.json`` when a run starts, compared when it is resumed: bits are promised only where nothing differs.
"""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

from convolt.machine import Machine

REPRODUCIBILITY = (
    "The same command on the same machine, with the same versions, engine, threads and ranks, gives the same bits; "
    "anything else changes results by rounding."
)
_DECISIVE = ("python", "convolt", "packages", "cpu")


def environment(threads: int | None = None) -> dict[str, Any]:
    """Versions, CPU, cores, BLAS and GPUs of this process as plain values; ``threads`` is what the engine uses."""
    machine = Machine.detect()
    packages = {package.name: package.version for package in (*machine.required, *machine.optional) if package.version}
    return {
        "host": platform.node(),
        "platform": machine.platform,
        "python": machine.python,
        "convolt": _own_version(),
        "packages": packages,
        "cpu": {"model": machine.cpu.model, "features": list(machine.cpu.features)},
        "cores_allowed": machine.cores.allowed,
        "threads": threads,
        "thread_variables": dict(machine.thread_variables),
        "blas": [asdict(pool) for pool in machine.pools],
        "gpus": [gpu.name for gpu in machine.gpus],
        "mpi": machine.mpi.vendor,
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """One warning that names what differs and ends exact reproduction; none if nothing does."""
    old, new = (flatten({key: side[key] for key in _DECISIVE if key in side}) for side in (before, now))
    keys = (key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key))
    changed = [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys]
    if not changed:
        return ()
    return (f"the run goes on under other conditions, results may differ by rounding: {'; '.join(changed)}",)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys: ``{"a": {"b": 1}}`` is ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat.update(flatten(item, f"{name}.") if isinstance(item, Mapping) and item else {name: item})
    return flat


def _own_version() -> str:
    try:
        return metadata.version("convolt")
    except metadata.PackageNotFoundError:
        return "not installed"
