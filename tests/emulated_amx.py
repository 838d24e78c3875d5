"""AMX tiles on a CPU that has none, for one process: a pytest plugin around ``amx_emulator.c``.

    PYTHONPATH=tests python -m pytest -p emulated_amx tests/test_jit_bf16.py -k amx

The engine is told that the CPU has tiles, so that it makes the code that it makes where that is true. LLVM is told the
name of a CPU with tiles: for some others it renames registers once they are allocated, tiles among them, without regard
to their shapes (seen with Zen 4's).
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import llvmlite.binding as llvm
import pytest

from convolt.engines.jit import isa

SOURCE = Path(__file__).with_name("amx_emulator.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")


def missing() -> str | None:
    """Why tiles cannot be emulated here; None if they can."""
    here = isa.detect()
    if sys.platform != "linux" or not here.bf16_convert or here.name != "avx512":
        return "emulating AMX needs Linux and a CPU with AVX512-BF16, which kernels for tiles use as well"
    if here.amx and isa.request_amx():
        return "this CPU has AMX: nothing is emulated"
    return None if shutil.which("cc") else "emulating AMX needs a C compiler: apt-get install gcc"


def emulate() -> ctypes.CDLL:
    """Have this process use tiles, before it makes its first kernel."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "amx_emulator.so")
        subprocess.run(["cc", *FLAGS, str(SOURCE), "-o", str(library), "-lm"], check=True, timeout=60)
        emulator = ctypes.CDLL(str(library))
    emulator.amx_emulated.restype = ctypes.c_uint64
    emulator.amx_emulate()
    isa.host_features = (isa.host_features() | {"amx-tile": True, "amx-bf16": True}).copy
    isa.request_amx = lambda: True
    llvm.get_host_cpu_name = lambda: "sapphirerapids"
    return emulator


EMULATOR = pytest.StashKey[ctypes.CDLL]()


@pytest.hookimpl(trylast=True)  # behind pytest's fault handler, which wants the signal too
def pytest_configure(config: pytest.Config) -> None:
    config.stash[EMULATOR] = emulate()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests that came to no tile have shown nothing."""
    if not session.exitstatus and not session.config.stash[EMULATOR].amx_emulated():
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
