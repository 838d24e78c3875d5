"""What this machine offers, read and never guessed.

Three readers need it: an engine picks its kernels by CPU feature flags (model names lie under hypervisors), a run
records where its numbers come from, and ``convolt doctor`` explains what is missing. So this module only reads: it
prints nothing, changes nothing, and imports none of the libraries it reports on but NumPy, whose BLAS must be loaded
to be seen. What cannot be read is None or empty.

Files are read below ``root``, which tests point at a tree of their own: /proc for the CPU and the memory, /sys for the
caches, and the control groups (both versions) that hold a container to less than the machine has.
"""

import ctypes
import dataclasses
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

from convolt.errors import MissingDependency

#: The CPU features that a kernel may be chosen by: x86 vectors, x86 matrix tiles, Arm.
FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)

#: Environment variables that set the size of some thread pool.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")

#: Libraries that Convolt cannot work without.
REQUIRED = (
    *("click", "jinja2", "matplotlib", "msgspec", "numba", "numpy", "pillow", "psutil", "rich", "safetensors"),
    "threadpoolctl",
)

#: Optional libraries: (distribution, what needs it, the extra that installs it).
OPTIONAL = (
    ("torch", "the torch engine", "torch"),
    ("mpi4py", "training on several processes", "mpi"),
    ("onnx", "ONNX graphs, and ONNX Runtime in benchmarks", "export"),
    ("onnxscript", "ONNX export", "export"),
    ("onnxruntime", "ONNX Runtime in benchmarks", "export"),
    ("optuna", "hyperparameter search", "tune"),
    ("tensorboard", "TensorBoard logging", "tensorboard"),
)

#: What `mpiexec --version` says, and whose it is. Intel MPI starts ranks with Hydra too, so its own name comes first.
LAUNCHERS = (
    ("Intel(R) MPI", "Intel MPI"),
    ("HYDRA", "MPICH"),
    ("Open MPI", "Open MPI"),
    ("OpenRTE", "Open MPI"),
    ("prte", "Open MPI"),
)

_PROBE_SECONDS = 10


@dataclass(frozen=True)
class Cache:
    """One CPU cache as the first core sees it: its level, kind, size and how many logical CPUs share it."""

    level: int
    kind: str
    bytes: int
    shared_by: int


@dataclass(frozen=True)
class Cpu:
    """The processor: its name (for people), its features (for kernels) and its caches.

    ``amx_permitted`` tells whether the kernel lets a process use AMX tiles; None where that cannot be asked.
    """

    model: str
    architecture: str
    features: tuple[str, ...]
    amx_permitted: bool | None
    caches: tuple[Cache, ...]


@dataclass(frozen=True)
class Cores:
    """How many cores there are and how many this process may keep busy.

    ``affinity`` are the logical CPUs it may run on, ``physical`` the cores behind them (None if unknown), ``quota`` the
    control group's share in cores (None without one). ``allowed`` = min(len(affinity), ceil(quota)): with 1.5 cores two
    threads at three quarters each do more than one.
    """

    logical: int
    affinity: tuple[int, ...]
    physical: int | None
    quota: float | None
    allowed: int


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory: in the machine, available now, and the control group's limit (None without one)."""

    total: int | None
    available: int | None
    limit: int | None


@dataclass(frozen=True)
class ThreadPool:
    """A BLAS or OpenMP library that is loaded, and the size of its thread pool."""

    api: str
    library: str
    version: str | None
    threads: int
    architecture: str | None


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU; memory in bytes, None where the driver's tool does not tell."""

    name: str
    memory: int | None
    driver: str | None


@dataclass(frozen=True)
class Mpi:
    """The MPI runtime: the library mpi4py would load, the launcher, and whose it is (MPICH, Open MPI, Intel MPI)."""

    library: str | None
    launcher: str | None
    vendor: str | None
    version: str | None = None


@dataclass(frozen=True)
class Package:
    """A library: its version, or None and one line that says what needs it and how to install it."""

    name: str
    version: str | None
    missing: str | None = None


@dataclass(frozen=True)
class Machine:
    """Everything above, for one process on one machine."""

    platform: str
    python: str
    cpu: Cpu
    cores: Cores
    memory: Memory
    pools: tuple[ThreadPool, ...]
    gpus: tuple[Gpu, ...]
    mpi: Mpi
    required: tuple[Package, ...]
    optional: tuple[Package, ...]
    thread_variables: Mapping[str, str]

    @classmethod
    def detect(cls, root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> "Machine":
        """Read this machine; ``root`` is where /proc and /sys are looked for."""
        return cls(
            platform=platform.platform(),
            python=platform.python_version(),
            cpu=_cpu(root),
            cores=_cores(root),
            memory=_memory(root),
            pools=_pools(),
            gpus=_gpus(root),
            mpi=mpi_runtime(),
            required=tuple(_required(name) for name in REQUIRED),
            optional=tuple(_optional(*entry) for entry in OPTIONAL),
            thread_variables={name: environ[name] for name in THREAD_VARIABLES if name in environ},
        )

    def to_plain(self) -> dict[str, Any]:
        """The same facts as dicts, tuples, numbers and strings, ready for JSON."""
        return dataclasses.asdict(self)


def allowed_cores(root: Path = Path("/")) -> int:
    """The number of cores this process may keep busy: the default number of threads."""
    return _cores(root).allowed


def _read(path: Path) -> str:
    """The text of a small file, empty where there is none or it may not be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _fields(text: str) -> dict[str, str]:
    """The first value of every ``name: value`` line."""
    pairs: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            pairs.setdefault(name.strip(), value.strip())
    return pairs


def _cpu_list(text: str) -> tuple[int, ...]:
    """The kernel's list format: "0-2,8" is (0, 1, 2, 8)."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return tuple(numbers)


def _cpu(root: Path) -> Cpu:
    fields = _fields(_read(root / "proc/cpuinfo"))
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    architecture = platform.machine()
    return Cpu(
        model=fields.get("model name", platform.processor() or architecture),
        architecture=architecture,
        features=tuple(name for name in FEATURES if name in flags),
        amx_permitted=_amx_permitted() if "amx_tile" in flags else None,
        caches=tuple(_caches(root / "sys/devices/system/cpu/cpu0/cache")),
    )


def _caches(folder: Path) -> Iterator[Cache]:
    units = {"K": 1024, "M": 1024**2}
    for index in sorted(folder.glob("index[0-9]*")):
        size, level = _read(index / "size"), _read(index / "level")
        if size[:-1].isdigit() and size[-1] in units and level.isdigit():
            yield Cache(
                level=int(level),
                kind=_read(index / "type").lower(),
                bytes=int(size[:-1]) * units[size[-1]],
                shared_by=len(_cpu_list(_read(index / "shared_cpu_list"))) or 1,
            )


def _amx_permitted() -> bool | None:
    """Ask the Linux kernel which register states a process may request: bit 18 is AMX tile data.

    A flag in /proc/cpuinfo is not enough: an old kernel or a sandbox shows it and refuses the tiles.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    arch_prctl, get_supported, tile_data = 158, 0x1021, 1 << 18
    states = ctypes.c_uint64(0)
    if ctypes.CDLL(None).syscall(arch_prctl, get_supported, ctypes.byref(states)) != 0:
        return False
    return bool(states.value & tile_data)


def _cores(root: Path) -> Cores:
    folder = root / "sys/devices/system/cpu"
    online = _cpu_list(_read(folder / "online")) or tuple(range(os.cpu_count() or 1))
    affinity = _cpu_list(_fields(_read(root / "proc/self/status")).get("Cpus_allowed_list", "")) or online
    siblings = {_read(folder / f"cpu{cpu}/topology/thread_siblings_list") for cpu in affinity}
    quota = _cpu_quota(root)
    return Cores(
        logical=len(online),
        affinity=affinity,
        physical=None if "" in siblings else len(siblings),
        quota=quota,
        allowed=len(affinity) if quota is None else max(1, min(len(affinity), math.ceil(quota))),
    )


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of those around it, version 2 and version 1.

    Inside a container the path that the kernel tells may not exist, but its mount point is then the group itself.
    """
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if names == "":
            tops = (mount, mount / "unified")
        elif controller in names.split(","):
            tops = (mount / controller, mount / names)
        else:
            continue
        group = Path(path.lstrip("/"))
        for top in tops:
            yield from (top / inner for inner in (group, *group.parents))


def _cpu_quota(root: Path) -> float | None:
    """The tightest CPU bandwidth limit, in cores: quota / period."""
    shares = []
    for group in _control_groups(root, "cpu"):
        words = _read(group / "cpu.max").split() or [
            _read(group / "cpu.cfs_quota_us"),
            _read(group / "cpu.cfs_period_us"),
        ]
        if all(word.isdigit() for word in words):  # "max" and -1 mean no limit
            quota, period = (int(word) for word in words)
            shares.append(quota / period)
    return min(shares, default=None)


def _memory(root: Path) -> Memory:
    fields = _fields(_read(root / "proc/meminfo"))
    total, available = (_kilobytes(fields.get(name, "")) for name in ("MemTotal", "MemAvailable"))
    limits = []
    for group in _control_groups(root, "memory"):
        text = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        if text.isdigit() and (total is None or int(text) < total):  # version 1 writes "no limit" as a huge number
            limits.append(int(text))
    limit = min(limits, default=None)
    if limit is not None and available is not None:
        available = min(available, limit)
    return Memory(total, available, limit)


def _kilobytes(text: str) -> int | None:
    """Bytes of a /proc/meminfo value such as "16384 kB"."""
    number = text.removesuffix(" kB")
    return int(number) * 1024 if number.isdigit() else None


def _pools() -> tuple[ThreadPool, ...]:
    np.zeros((1, 1)) @ np.zeros((1, 1))  # a lazily loaded BLAS is loaded now
    return tuple(
        ThreadPool(
            api=info["user_api"],
            library=info["internal_api"],
            version=info.get("version"),
            threads=info["num_threads"],
            architecture=info.get("architecture"),
        )
        for info in threadpoolctl.threadpool_info()
    )


def _gpus(root: Path) -> tuple[Gpu, ...]:
    """NVIDIA GPUs by the driver's own tool, by the driver's files where the tool is not installed."""
    lines = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in lines.splitlines()]
    gpus = [Gpu(row[0], int(row[1]) * 1024**2 if row[1].isdigit() else None, row[2]) for row in rows if len(row) == 3]
    if not gpus:
        files = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
        gpus = [Gpu(_fields(_read(file)).get("Model", "NVIDIA GPU"), None, None) for file in files]
    return tuple(gpus)


def mpi_runtime() -> Mpi:
    """The MPI runtime of this environment, or else of the machine."""
    # An environment's own runtime comes first, also when the environment is not activated.
    environment = str(Path(sys.executable).parent)
    launcher = shutil.which("mpiexec", path=environment) or shutil.which("mpiexec")
    banner = _output(launcher, "--version") if launcher else ""
    folders = (f"{sys.prefix}/lib", "/usr/local/lib", f"/usr/lib/{platform.machine()}-linux-gnu", "/usr/lib64")
    sonames = ("libmpi.so.12", "libmpi.so.40")  # MPICH and Intel MPI; Open MPI
    libraries = (Path(folder) / name for folder in folders for name in sonames)
    version = re.search(r"\d+(\.\d+)+", banner)
    return Mpi(
        library=next((str(path) for path in libraries if path.exists()), None),
        launcher=launcher,
        vendor=next((vendor for mark, vendor in LAUNCHERS if mark in banner), None),
        version=None if version is None else version.group(),
    )


def _output(program: str, *arguments: str) -> str:
    """What a program writes, empty where it is absent, fails or does not answer."""
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _required(name: str) -> Package:
    version = _version(name)
    missing = None if version else f"convolt needs {name}, which is not installed; run: pip install {name}"
    return Package(name, version, missing)


def _optional(name: str, purpose: str, extra: str) -> Package:
    version = _version(name)
    return Package(name, version, None if version else str(MissingDependency(name, purpose, extra)))
