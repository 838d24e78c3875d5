import json
import stat
import sys
import tomllib
from pathlib import Path

import pytest

from convolt import machine
from convolt.machine import Cache, Gpu, Machine, allowed_cores


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def program(folder: Path, name: str, output: str) -> None:
    """A program that writes ``output``."""
    path = folder / name
    folder.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\nprint({output!r})\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


CPU = "sys/devices/system/cpu"
EIGHT_CORES = {
    f"{CPU}/online": "0-7\n",
    "proc/self/status": "Name:\tpython\nCpus_allowed_list:\t0-7\n",
    **{f"{CPU}/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}\n" for n in range(8)},
}


def test_this_machine_becomes_json():
    here = Machine.detect()
    plain = json.loads(json.dumps(here.to_plain()))
    assert plain["cores"]["allowed"] == here.cores.allowed == allowed_cores() >= 1
    assert plain["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert any(pool.api == "blas" for pool in here.pools)
    assert {package.name: package.version for package in here.required}["numpy"]


def test_an_empty_root_is_unknown_and_no_error(tmp_path):
    here = Machine.detect(tmp_path)
    assert (here.memory.total, here.memory.available, here.memory.limit) == (None, None, None)
    assert here.cpu.features == here.cpu.caches == ()
    assert here.cores.physical is None
    assert here.cores.quota is None


def test_x86_cpu(tmp_path):
    cpu = {
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 fma avx512f unheard_of\n\n",
        f"{CPU}/cpu0/cache/index0/level": "1\n",
        f"{CPU}/cpu0/cache/index0/type": "Data\n",
        f"{CPU}/cpu0/cache/index0/size": "48K\n",
        f"{CPU}/cpu0/cache/index0/shared_cpu_list": "0,4\n",
        f"{CPU}/cpu0/cache/index3/level": "3\n",
        f"{CPU}/cpu0/cache/index3/type": "Unified\n",
        f"{CPU}/cpu0/cache/index3/size": "32M\n",
        f"{CPU}/cpu0/cache/index3/shared_cpu_list": "0-7\n",
        f"{CPU}/cpu0/cache/index4/size": "",  # some sandboxes have the folder and nothing in it
    }
    here = Machine.detect(tree(tmp_path, cpu)).cpu
    assert here.model == "A CPU"
    assert here.features == ("avx2", "fma", "avx512f")
    assert here.amx_permitted is None
    assert here.caches == (Cache(1, "data", 48 * 1024, 2), Cache(3, "unified", 32 * 1024**2, 8))


def test_arm_cpu(tmp_path):
    here = Machine.detect(tree(tmp_path, {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimdhp bf16\n"}))
    assert here.cpu.features == ("asimd", "asimdhp", "bf16")


def test_cores_and_hyperthreads(tmp_path):
    cores = Machine.detect(tree(tmp_path, EIGHT_CORES)).cores
    assert (cores.logical, cores.affinity, cores.physical, cores.allowed) == (8, tuple(range(8)), 4, 8)


def test_affinity_narrows(tmp_path):
    narrow = EIGHT_CORES | {"proc/self/status": "Cpus_allowed_list:\t1,3-4\n"}
    cores = Machine.detect(tree(tmp_path, narrow)).cores
    assert (cores.logical, cores.affinity, cores.physical, cores.allowed) == (8, (1, 3, 4), 3, 3)


@pytest.mark.parametrize(
    ("files", "quota", "allowed"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000\n"}, 0.1, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 64.0, 8),
        (
            {  # the group around the process's own is tighter
                "proc/self/cgroup": "0::/user/job\n",
                "sys/fs/cgroup/user/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/user/job/cpu.max": "400000 100000\n",
            },
            2.0,
            2,
        ),
        (
            {  # version 1 in a container: the path is the host's, the mount is the group
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3.0,
            3,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
            8,
        ),
    ],
)
def test_cpu_quota(tmp_path, files, quota, allowed):
    root = tree(tmp_path, EIGHT_CORES | files)
    cores = Machine.detect(root).cores
    assert (cores.quota, cores.allowed) == (quota, allowed)
    assert allowed_cores(root) == allowed


MEMINFO = {"proc/meminfo": "MemTotal:       1000 kB\nMemFree: 10 kB\nMemAvailable:    600 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (1000, 600, None)),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, (1000, 600, None)),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "409600\n"}, (1000, 400, 400)),
        (
            {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "716800"},
            (1000, 600, 700),
        ),
        (
            {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"},
            (1000, 600, None),
        ),
    ],
)
def test_memory_in_kib(tmp_path, files, expected):
    memory = Machine.detect(tree(tmp_path, MEMINFO | files)).memory
    kib = tuple(None if n is None else n // 1024 for n in (memory.total, memory.available, memory.limit))
    assert kib == expected


def test_gpus_by_the_drivers_tool(tmp_path, monkeypatch):
    program(tmp_path / "bin", "nvidia-smi", "NVIDIA A, 81559, 550.1\nNVIDIA B, [N/A], 550.1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert Machine.detect(tmp_path).gpus == (
        Gpu("NVIDIA A", 81559 * 1024**2, "550.1"),
        Gpu("NVIDIA B", None, "550.1"),
    )


def test_gpus_by_the_drivers_files(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    tree(tmp_path, {"proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t NVIDIA C\nIRQ: 1\n"})
    assert Machine.detect(tmp_path).gpus == (Gpu("NVIDIA C", None, None),)


@pytest.mark.parametrize(
    ("banner", "vendor"),
    [
        ("HYDRA build details:\n    Version: 5.0.2", "MPICH"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.18 (HYDRA)", "Intel MPI"),
        ("mpiexec (OpenRTE) 4.1.4", "Open MPI"),
        ("mpiexec (Open MPI) 5.0.11", "Open MPI"),
        ("something else", None),
    ],
)
def test_mpi_launcher(tmp_path, monkeypatch, banner, vendor):
    program(tmp_path / "bin", "mpiexec", banner)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    mpi = Machine.detect(tmp_path).mpi
    assert (mpi.launcher, mpi.vendor) == (str(tmp_path / "bin" / "mpiexec"), vendor)


def test_missing_libraries_name_the_line_that_installs_them(monkeypatch):
    def version(name: str) -> str:
        raise machine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "version", version)
    here = Machine.detect()
    lines = {package.name: package.missing for package in (*here.required, *here.optional)}
    assert "pip install 'convolt[tune]'" in lines["optuna"]
    assert "pip install numpy" in lines["numpy"]
    assert all("\n" not in line for line in lines.values())


def test_thread_variables():
    here = Machine.detect(environ={"OMP_NUM_THREADS": "3", "HOME": "/"})
    assert here.thread_variables == {"OMP_NUM_THREADS": "3"}


def test_libraries_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    bare = [requirement.split(">")[0] for requirement in project["dependencies"]]
    assert sorted(machine.REQUIRED) == sorted(bare)
    for name, _, extra in machine.OPTIONAL:
        assert name in {requirement.split(">")[0] for requirement in project["optional-dependencies"][extra]}
