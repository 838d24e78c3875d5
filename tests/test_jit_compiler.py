import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from convolt.engine import COMPILING
from convolt.engines.jit import codegen, compiler, processes
from convolt.engines.jit.compiler import Compiler, cache_folder, compile_kernel
from convolt.engines.jit.isa import detect
from convolt.engines.jit.kernels.loss_specs import LossSpec
from convolt.engines.jit.kernels.specs import Frame, NormSpec, UpdateSpec
from convolt.engines.jit.runtime import Waiting
from convolt.errors import EngineError

ISA = detect("plain")


@dataclass(frozen=True)
class Scale:
    n: int
    factor: int = 2


def scale(spec):
    """arguments: n numbers of chunk 0, n of chunk 1, ..."""
    n, factor = spec.n, spec.factor

    def kernel(arguments, chunk, thread):
        for i in range(n):
            arguments[chunk * n + i] *= factor

    return kernel


def other(spec):
    return scale(spec)


def call(kernel, words, chunk=0, thread=0):
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(kernel.address)
    function(words.ctypes.data, chunk, thread)


def doubles(kernel):
    words = np.arange(8)
    call(kernel, words, chunk=1)
    return words.tolist() == [0, 1, 2, 3, 8, 10, 12, 14]


@pytest.fixture(scope="module")
def code():
    """Object code that need not be compiled for every test."""
    return codegen.object_code(scale(Scale(4)), ISA, compiler.SYMBOL)


@pytest.fixture
def compiled(monkeypatch, code):
    """Every compilation gives `code`, at once; the list tells how often."""
    calls = []
    monkeypatch.setattr(codegen, "object_code", lambda function, isa, symbol: calls.append(isa) or code)
    return calls


def test_a_kernel_is_compiled_then_loaded(tmp_path):
    cold = Compiler(ISA, tmp_path)
    first = cold.kernel(scale, Scale(4))
    assert doubles(first)
    assert (first.name, first.from_cache) == ("scale", False)
    assert first.seconds > 0
    assert cold.kernel(scale, Scale(4)) is first

    warm = Compiler(ISA, tmp_path)
    second = warm.kernel(scale, Scale(4))
    assert doubles(second)
    assert second.from_cache
    assert (warm.statistics.compiled, warm.statistics.loaded) == (0, 1)


def test_seconds_are_those_of_compiling_alone(tmp_path):
    cold, warm = Compiler(ISA, tmp_path), Compiler(ISA, tmp_path)
    (kernel,) = cold.kernels([(scale, Scale(4))])
    assert cold.statistics.seconds >= kernel.seconds > 0
    assert warm.kernel(scale, Scale(4)).from_cache
    assert warm.statistics.seconds == 0


def test_kernels_outlive_their_compiler(compiled, tmp_path):
    assert doubles(Compiler(ISA, tmp_path).kernel(scale, Scale(4)))


def test_a_cold_start_tells_its_progress(compiled, tmp_path):
    seen = []
    Compiler(ISA, tmp_path).kernels([(scale, Scale(4)), (other, Scale(4))], lambda *line: seen.append(line))
    assert seen == [(0, 2, "scale"), (1, 2, "other"), (2, 2, "")]


def test_damaged_files_are_missing_ones(compiled, tmp_path):
    """They are told of and shared among processes as if they were not there."""
    requests = [(scale, Scale(4)), (other, Scale(4))]
    Compiler(ISA, tmp_path).kernels(requests)
    for file in tmp_path.iterdir():
        file.write_bytes(b"garbage")
    seen, cache = [], Compiler(ISA, tmp_path)
    cache.kernels(requests, lambda *line: seen.append(line))
    assert [line[:2] for line in seen] == [(0, 2), (1, 2), (2, 2)]
    assert cache.statistics.rebuilt == 2


def test_a_folder_that_is_removed_meanwhile_is_done_without(compiled, tmp_path):
    cache = Compiler(ISA, tmp_path / "jit")
    cache.kernels([(scale, Scale(4))])
    shutil.rmtree(tmp_path / "jit")
    assert doubles(cache.kernels([(other, Scale(4))])[0])
    assert cache.statistics.unsaved == 1


def test_the_key_changes_with_everything_that_the_code_depends_on(tmp_path, monkeypatch):
    here = Compiler(ISA, tmp_path)
    keys = [
        here.key(scale, Scale(4)),
        here.key(scale, Scale(5)),
        here.key(scale, Scale(4, 3)),
        here.key(other, Scale(4)),
        here.key("a.module:scale", Scale(4)),
        Compiler(detect(), tmp_path).key(scale, Scale(4)),
        Compiler(replace(ISA, lanes=2), tmp_path).key(scale, Scale(4)),
    ]
    folder = tmp_path / "jit"
    shutil.copytree(compiler.FOLDER, folder)
    monkeypatch.setattr(compiler, "SOURCES", compiler.read_sources(folder))
    same = Compiler(ISA, tmp_path).key(scale, Scale(4))
    for name in ("codegen.py", "runtime.py"):
        with (folder / name).open("a") as file:
            file.write("#")
        assert Compiler(ISA, tmp_path).key(scale, Scale(4)) in (same, keys[-1])  # what has been imported counts
        monkeypatch.setattr(compiler, "SOURCES", compiler.read_sources(folder))
        keys.append(Compiler(ISA, tmp_path).key(scale, Scale(4)))
    monkeypatch.setattr(compiler.metadata, "version", lambda name: "0.0")
    keys.append(Compiler(ISA, tmp_path).key(scale, Scale(4)))
    assert same == keys[0]
    assert len(set(keys)) == len(keys)


def test_the_key_changes_with_the_source_of_a_factory_elsewhere(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    keys = set()
    for text in ("def factory(spec): return 1\n", "def factory(spec): return 2\n"):
        path.write_text(text)
        specification = importlib.util.spec_from_file_location("mine", path)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, "mine", module)
        keys.add(Compiler(ISA, tmp_path).key(module.factory, None))
    assert len(keys) == 2


def test_any_flipped_byte_is_found_and_the_file_rebuilt(compiled, tmp_path):
    Compiler(ISA, tmp_path).kernel(scale, Scale(4))
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    places = [*range(40), *range(40, len(good), 37), len(good) - 1]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        file.write_bytes(bad)
        again = Compiler(ISA, tmp_path)
        assert not again.kernel(scale, Scale(4)).from_cache
        assert again.statistics.rebuilt == 1
        assert file.read_bytes() == good
    assert len(compiled) == 1 + len(places)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:31], lambda b: b[:-1], lambda b: b + b"\0"])
def test_a_file_of_another_length_is_rebuilt(compiled, tmp_path, damage):
    Compiler(ISA, tmp_path).kernel(scale, Scale(4))
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert doubles(Compiler(ISA, tmp_path).kernel(scale, Scale(4)))
    assert Compiler(ISA, tmp_path).kernel(scale, Scale(4)).from_cache


def test_a_valid_file_under_another_name_is_rebuilt(compiled, tmp_path):
    cache = Compiler(ISA, tmp_path)
    cache.kernel(scale, Scale(5))
    shutil.copy(tmp_path / cache.key(scale, Scale(5)), tmp_path / cache.key(scale, Scale(4)))
    assert not cache.kernel(scale, Scale(4)).from_cache
    assert cache.statistics.rebuilt == 1


def test_a_folder_that_cannot_be_written_is_done_without(compiled, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"every start: .*/file/jit cannot be made \(Not a directory\)"):
        cache = Compiler(ISA, tmp_path / "file" / "jit")
    assert doubles(cache.kernel(scale, Scale(4)))
    assert cache.statistics.unsaved == 1


def test_a_full_disk_is_done_without(compiled, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler.durable, "write_bytes", full)
    cache = Compiler(ISA, tmp_path)
    assert doubles(cache.kernel(scale, Scale(4)))
    assert cache.statistics.unsaved == 1


def test_code_is_not_loaded_from_a_folder_that_others_can_write_to(compiled, tmp_path):
    Compiler(ISA, tmp_path).kernel(scale, Scale(4))
    tmp_path.chmod(0o777)
    with pytest.warns(UserWarning, match="run: chmod go-w"):
        assert not Compiler(ISA, tmp_path).kernel(scale, Scale(4)).from_cache
    tmp_path.chmod(0o700)
    assert Compiler(ISA, tmp_path).kernel(scale, Scale(4)).from_cache


def test_the_folder_is_the_users_cache(monkeypatch, compiled, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "convolt" / "jit"
    compile_kernel(scale, Scale(4), ISA)
    assert compile_kernel(scale, Scale(4), ISA).from_cache


PROGRAM = """
import sys
from pathlib import Path
from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.isa import detect
from convolt.engines.jit.runtime import Phase, Program, Team
compiler = Compiler(detect("plain"), Path(sys.argv[1]))
team = Team(2, compiler)
team.run(Program([Phase("nothing", (), 3)]))
print(compiler.statistics.compiled, compiler.statistics.loaded, compiler.statistics.rebuilt, "numba" in sys.modules)
"""


def test_processes_compile_at_once_and_a_warm_start_does_without_numba(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        compiled, loaded, rebuilt, _ = output.split()
        assert (int(compiled) + int(loaded), rebuilt) == (1, "0")
    third = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert third.stdout.split() == ["0", "1", "0", "False"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_arithmetic_never_stops_a_kernel(tmp_path):
    def divide(spec):
        def kernel(arguments, chunk, thread):
            zero = float(arguments[0])
            arguments[1] = 1.0 / zero == np.inf
            arguments[2] = np.isnan(zero / zero)
            arguments[3] = 7 // arguments[0]

        return kernel

    words = np.array([0, 5, 5, 5])
    call(Compiler(ISA, tmp_path).kernel(divide, None), words)
    assert words.tolist()[:3] == [0, 1, 1]


def test_a_kernel_that_could_raise_is_refused(tmp_path):
    def raising(spec):
        def kernel(arguments, chunk, thread):
            if arguments[0] > 3:
                raise ValueError("too large")

        return kernel

    with pytest.raises(EngineError, match=r"kernel .*raising.*could raise an exception"):
        Compiler(ISA, tmp_path).kernel(raising, None)
    assert list(tmp_path.iterdir()) == []


def test_a_raise_that_cannot_happen_is_none(tmp_path):
    def careful(spec):
        n, step = spec.n, spec.factor

        def kernel(arguments, chunk, thread):
            if n < 0:
                raise ValueError("n must not be negative")
            for i in range(0, n, step):
                arguments[i] = 1

        return kernel

    words = np.zeros(4, np.int64)
    call(Compiler(ISA, tmp_path).kernel(careful, Scale(4)), words)
    assert words.tolist() == [1, 0, 1, 0]


def test_a_kernel_that_holds_an_address_of_this_process_is_refused(tmp_path):
    large = np.zeros(1 << 20)

    def reading(spec):
        def kernel(arguments, chunk, thread):
            arguments[0] = int(large[arguments[0]])

        return kernel

    with pytest.raises(EngineError, match="by address"):
        Compiler(ISA, tmp_path).kernel(reading, None)


@intrinsic
def missing_function(typingctx):
    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "no_library_has_this"), [])
        return context.get_dummy_value()

    return types.void(), generate


def test_a_kernel_that_needs_what_no_library_has_is_refused(tmp_path):
    def lost(spec):
        def kernel(arguments, chunk, thread):
            missing_function()

        return kernel

    with pytest.raises(EngineError, match=r"kernel .*lost: it needs a symbol that no C library has"):
        Compiler(ISA, tmp_path).kernel(lost, None)
    assert list(tmp_path.iterdir()) == []


def test_a_factory_can_be_named(compiled, tmp_path):
    kernel = Compiler(ISA, tmp_path).kernel("convolt.engines.jit.driver:driver", Waiting())
    assert kernel.name == "driver"


# --- progress, and the cache's bound ---------------------------------------------------------------------------------


def test_a_warm_start_tells_nothing(compiled, tmp_path, caplog):
    caplog.set_level("INFO", COMPILING)
    cold = Compiler(ISA, tmp_path)
    cold.kernels([(scale, Scale(4))])
    assert [record.args for record in caplog.records] == [(0, 1, "scale"), (1, 1, "")]
    caplog.clear()
    cold.kernels([(scale, Scale(4))])
    Compiler(ISA, tmp_path).kernels([(scale, Scale(4))])
    assert caplog.records == []


def test_only_what_is_compiled_is_counted(compiled, tmp_path):
    seen = []
    Compiler(ISA, tmp_path).kernels([(scale, Scale(4))])
    warm = Compiler(ISA, tmp_path)
    warm.kernels([(scale, Scale(4)), (other, Scale(4)), (other, Scale(4))], lambda *line: seen.append(line))
    assert seen == [(0, 1, "other"), (1, 1, "")]


def test_above_its_bound_the_cache_forgets_what_was_used_least_recently(compiled, code, tmp_path):
    size = len(code) + 32
    first = Compiler(ISA, tmp_path, bound=3 * size)
    first.kernels([(scale, Scale(n)) for n in (1, 2, 3)])
    for age, n in enumerate((2, 3, 1)):
        os.utime(tmp_path / first.key(scale, Scale(n)), ns=(age, age))
    Compiler(ISA, tmp_path).kernel(scale, Scale(2))  # the oldest, used again
    second = Compiler(ISA, tmp_path, bound=3 * size)
    second.kernels([(scale, Scale(4))])
    assert second.statistics.removed == 1
    kept = {first.key(scale, Scale(n)) for n in (1, 2, 4)}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_file_that_another_process_removed_is_compiled_again(compiled, tmp_path):
    here = Compiler(ISA, tmp_path)
    here.kernels([(scale, Scale(4))])
    (tmp_path / here.key(scale, Scale(4))).unlink()
    there = Compiler(ISA, tmp_path, bound=0)
    assert doubles(there.kernels([(scale, Scale(4))])[0])
    assert there.statistics.removed == 1


def test_a_worker_leaves_kernels_in_the_cache(tmp_path):
    factory, spec = "convolt.engines.jit.kernels.weights:update", UpdateSpec("sgd", ISA.lanes, momentum=True)
    lines = [
        {"isa": asdict(ISA), "folder": str(tmp_path)},
        [factory, processes.encode(spec)],
        ["no.module:scale", None],
    ]
    done = subprocess.run(
        [sys.executable, "-m", "convolt.engines.jit.worker"],
        input="".join(f"{json.dumps(line)}\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["ready", "done", "failed"]
    assert Compiler(ISA, tmp_path).kernel(factory, spec).from_cache


def test_a_spec_travels_as_json():
    frame = Frame(3, 4, 5, 6, 7, 8)
    spec = NormSpec(frame, frame.bare, 1e-5, True, 0.1, 2, 16, (2, 2), frame)
    assert processes.decode(json.loads(json.dumps(processes.encode(spec)))) == spec
    with pytest.raises(ValueError, match="no module of kernels"):
        processes.decode({"type": "subprocess:Popen", "args": "true"})


@pytest.mark.parametrize("number", [1, 2])
def test_many_kernels_come_in_order(tmp_path, number):
    factory = "convolt.engines.jit.kernels.loss:square_sum"
    made = Compiler(ISA, tmp_path, number).kernels([(factory, LossSpec(N=n % 17)) for n in range(18)])
    assert len({kernel.address for kernel in made}) == 17
    assert made[0] is made[17]


def test_processes_that_want_the_same_begin_with_other_kernels(compiled, tmp_path):
    requests = [(factory, Scale(n)) for factory in (scale, other) for n in (4, 5)]
    for begin, first in ((0.0, 0), (0.5, 2)):
        seen = []
        made = Compiler(ISA, tmp_path / str(begin), begin=begin).kernels(
            requests, lambda done, total, name, seen=seen: seen.append(name)
        )
        assert seen[0] == requests[first][0].__name__
        assert [kernel.name for kernel in made] == ["scale", "scale", "other", "other"]


def test_a_worker_that_dies_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    requests = [("convolt.engines.jit.kernels.loss:square_sum", LossSpec(N=n)) for n in range(17)]
    assert not any(kernel.from_cache for kernel in Compiler(ISA, tmp_path, processes=2).kernels(requests))
