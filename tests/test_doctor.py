import dataclasses
import json

import pytest

from convolt import cli
from convolt.cli import doctor
from convolt.machine import Cores, Cpu, Gpu, Machine, Memory, Mpi, Package, ThreadPool

MACHINE = Machine(
    platform="Linux",
    python="3.11.2",
    cpu=Cpu("A CPU", "x86_64", ("avx2", "amx_tile"), True, ()),
    cores=Cores(logical=4, affinity=(0, 1, 2, 3), physical=4, quota=None, allowed=4),
    memory=Memory(total=8 * 1024**3, available=4 * 1024**3, limit=None),
    pools=(ThreadPool("blas", "openblas", "0.3", 4, "Haswell"),),
    gpus=(),
    mpi=Mpi("/lib/libmpi.so.12", "/bin/mpiexec", "MPICH"),
    required=(Package("numpy", "2.0"),),
    optional=(Package("torch", "2.13.0+cpu"), Package("mpi4py", "4.1")),
    thread_variables={},
)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `convolt doctor` on the given machine; returns what it printed."""

    def run(machine, *options):
        monkeypatch.setattr(Machine, "detect", lambda: machine)
        assert cli.main(["doctor", *options]) == 0
        return capsys.readouterr().out

    return run


def test_report_shows_every_section(run):
    out = run(MACHINE)
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        *("System", "CPU", "Cores", "Memory", "BLAS", "GPU", "MPI", "Libraries"),
    ]
    for fact in ("A CPU (x86_64)", "avx2 amx_tile", "8.0 GiB", "openblas", "/bin/mpiexec (MPICH)", "2.13.0+cpu"):
        assert fact in out


def test_missing_library_shows_its_line_whole(run):
    line = "the torch engine needs torch, which is not installed; run: pip install 'convolt[torch]' -c constraints.txt"
    lacking = dataclasses.replace(MACHINE, optional=(Package("torch", None, line), Package("mpi4py", None, "x" * 300)))
    lines = [text.strip() for text in run(lacking).splitlines()]
    assert line in lines  # neither wrapped nor read as markup
    assert "x" * 300 in lines
    assert "torch         not installed" in lines


def test_json_is_all_there_is(run):
    odd = dataclasses.replace(MACHINE, thread_variables={"OMP_NUM_THREADS": "64"})
    plain = json.loads(run(odd, "--json"))
    assert plain["cores"]["allowed"] == 4
    assert len(plain["warnings"]) == 1


def test_real_machine():
    assert dict(doctor.sections(Machine.detect())).keys() >= {"CPU", "Cores", "Memory"}


def test_nothing_to_say_about_a_sound_machine():
    assert list(doctor.advice(MACHINE)) == []


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"thread_variables": {"OMP_NUM_THREADS": "8"}}, ["OMP_NUM_THREADS=8", "4 usable"]),
        ({"thread_variables": {"OMP_NUM_THREADS": "5,1"}}, ["OMP_NUM_THREADS=5,1", "4 usable"]),
        ({"thread_variables": {"MKL_NUM_THREADS": "many"}}, ["MKL_NUM_THREADS=many", "unset"]),
        ({"thread_variables": {"MKL_NUM_THREADS": "0"}}, ["MKL_NUM_THREADS=0", "unset"]),
        ({"pools": (ThreadPool("blas", "openblas", None, 6, None),)}, ["openblas", "6 threads", "--threads 4"]),
        ({"cores": Cores(8, (0, 1, 2, 3), 4, None, 4)}, ["4 of 8 CPUs", "affinity"]),
        ({"cores": Cores(4, (0, 1, 2, 3), 4, 3.5, 4)}, ["3.5 cores of 4", "at most 4 threads"]),
        ({"cpu": Cpu("A CPU", "x86_64", ("amx_tile",), False, ())}, ["AMX", "Linux 5.16"]),
        ({"gpus": (Gpu("A GPU", 1, "1"),)}, ["2.13.0+cpu", "CUDA build"]),
        ({"mpi": Mpi(None, None, None)}, ["no MPI runtime", "pip install mpich"]),
        ({"mpi": Mpi("/lib/libmpi.so.40", "/bin/mpiexec", "Open MPI")}, ["Open MPI", "--bind-to none"]),
        ({"mpi": Mpi("/lib/libmpi.so.12", "/bin/mpiexec", "Intel MPI")}, ["Intel MPI", "I_MPI_PIN off"]),
    ],
)
def test_advice(changes, parts):
    (line,) = doctor.advice(dataclasses.replace(MACHINE, **changes))
    assert all(part in line for part in parts)


def test_more_threads_than_cores_is_no_matter_within_the_limit():
    fitting = dataclasses.replace(MACHINE, thread_variables={"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "1"})
    assert list(doctor.advice(fitting)) == []
