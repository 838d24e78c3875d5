"""Kernels: compiled once, kept on disk, loaded in milliseconds.

A kernel is the C function ``void kernel(int64_t* arguments, int64_t chunk, int64_t thread)``. It is written as a Python
function by a *factory*, ``def relu(spec: ReluSpec) -> Callable``, in which what the frozen dataclass `spec` tells is
constant: every size and stride, but for kernels on filters of any size. Two specs that print alike give the same
kernel: ``repr(spec)`` is part of the key.

The cache holds one file a kernel: 32 bytes of SHA-256, then object code. The digest covers the key too, so a file under
another's name is as invalid as one with a flipped bit; both are compiled again and replaced. The key covers whatever
the code depends on: its sources, factory, spec, instruction set, CPU, and the versions of what compiles. Files are
written beside and renamed, so processes may compile at once: the last one wins, with the same code. A folder that
cannot be written, or that other users can, is not used. Above a bound the files that were used least recently go.

The sources a kernel depends on are those of the factory's module, of what makes object code, and of every module of
this folder that they import, directly or not: a change to the planner compiles nothing again.

A factory can be named, ``"module:function"``, instead of given: its module, which needs Numba, is then imported only if
the kernel must be compiled. Loading takes llvmlite alone.
"""

import hashlib
import importlib
import logging
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from convolt import durable
from convolt.engine import COMPILING
from convolt.engines.jit.isa import Isa, target
from convolt.engines.jit.processes import Workers
from convolt.errors import EngineError

Factory = Callable[[Any], Callable[..., None]] | str
Request = tuple[Factory, Any]
Progress = Callable[[int, int, str], None]

FOLDER = Path(__file__).parent
BOUND = 512 << 20  # bytes of a cache: some thousand kernels
MANY = 16  # missing kernels, three seconds, from which another process pays: it takes one second to import Numba
SYMBOL = "kernel"
"""What the C function is called in every object file."""

_DIGEST_BYTES = 32
_PACKAGE = "convolt.engines.jit."
_CODEGEN = "convolt.engines.jit.codegen"
_IMPORT = re.compile(r"^(?:from|import)\s+([\w.]+)(?:\s+import\s+(\([^)]*\)|[^\n]*))?", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """A C function in memory, unloaded when nothing refers to this any more; `seconds` it took to compile or load."""

    address: int
    name: str
    seconds: float
    from_cache: bool
    library: Any = field(repr=False, compare=False)


@dataclass
class Statistics:
    """What the cache did: kernels compiled and loaded, invalid files replaced, files not written, old ones removed.

    seconds: that compiling took, waiting for other processes that compile included.
    """

    compiled: int = 0
    loaded: int = 0
    rebuilt: int = 0
    unsaved: int = 0
    removed: int = 0
    seconds: float = 0.0


def cache_folder() -> Path:
    """Where kernels are kept: $XDG_CACHE_HOME/convolt/jit."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "convolt" / "jit"


class Compiler:
    """Makes kernels for one instruction set; asking twice for a kernel gives the same one.

    folder: where object code is kept (default: `cache_folder`). processes: that compile when much is missing. bound:
    bytes above which the least recently used files are removed, after something has been compiled. begin: the part of
    what is asked for with which to begin; processes that want the same at the same time, as ranks do, begin elsewhere,
    and find on disk what the others have made.
    """

    def __init__(
        self,
        isa: Isa,
        folder: Path | None = None,
        processes: int = 1,
        bound: int = BOUND,
        begin: float = 0.0,
    ):
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self.isa = isa
        self.statistics = Statistics()
        self._folder = _usable(cache_folder() if folder is None else folder)
        self._jit = llvm.create_lljit_compiler(use_jit_link=True, suppress_errors=True)
        self._processes, self._bound, self._begin = processes, bound, begin
        self._kernels: dict[str, Kernel] = {}
        self._damaged: set[str] = set()
        self._sources: dict[str, str] = {}
        self._environment = "\n".join(
            (
                *(platform.python_implementation(), platform.python_version(), platform.machine(), sys.platform),
                *(np.__version__, llvmlite.__version__, metadata.version("numba"), *target(isa), repr(isa)),
            )
        )

    def kernels(self, requests: Iterable[Request], progress: Progress | None = None) -> list[Kernel]:
        """The kernels of all (factory, spec); `progress` gets (done, total, name) of those that must be compiled.

        It is called before each of them and at the end, and not at all when every kernel is on disk or in memory.
        """
        wanted = list(requests)
        keys = [self.key(*request) for request in wanted]
        loaded = {key: self._load(key) for key in dict.fromkeys(keys) if key not in self._kernels}
        missing = {key: request for key, request in zip(keys, wanted, strict=True) if loaded.get(key, b"") is None}
        workers, tell, total = self._workers(missing), progress or _log, len(missing)
        pairs, start, made = list(zip(keys, wanted, strict=True)), int(len(wanted) * self._begin), {}
        for key, (factory, spec) in pairs[start:] + pairs[:start]:
            if missing.pop(key, None):
                tell(total - len(missing) - 1, total, _name(factory))
            waiting = time.perf_counter()
            workers.claim(key)
            self.statistics.seconds += time.perf_counter() - waiting
            made[key] = self.kernel(factory, spec, loaded.pop(key, None))
        if total:
            tell(total, total, "")
            self._prune()
        return [made[key] for key in keys]

    def _workers(self, missing: Mapping[str, Request]) -> Workers:
        """Processes that compile the last of these, if they are many and can be named."""
        named = {key: (factory, spec) for key, (factory, spec) in missing.items() if isinstance(factory, str)}
        if self._folder is None or len(named) < MANY:
            return Workers(0, self.isa, Path(), {})
        return Workers(self._processes - 1, self.isa, self._folder, named)

    def kernel(self, factory: Factory, spec: Any, code: bytes | None = None) -> Kernel:
        """The kernel ``factory(spec)``, from memory, from disk, or compiled; code: from disk. Raises EngineError."""
        start = time.perf_counter()
        key = self.key(factory, spec)
        if key not in self._kernels:
            code = code or self._load(key)
            from_cache = code is not None
            if code is None:
                self.statistics.rebuilt += key in self._damaged
                code = self._compile(factory, spec)
            library = self._link(key, _name(factory), code)
            if not from_cache:
                self._save(key, code)
            seconds = time.perf_counter() - start
            self.statistics.seconds += 0.0 if from_cache else seconds
            self._kernels[key] = Kernel(library[SYMBOL], _name(factory), seconds, from_cache, (self._jit, library))
        return self._kernels[key]

    def key(self, factory: Factory, spec: Any) -> str:
        """What names the kernel on disk: 64 hexadecimal digits that change with anything its code depends on."""
        qualified = _qualified(factory)
        module = qualified.partition(":")[0]
        if module not in self._sources:
            self._sources[module] = _digest_of_sources(module)
        text = "\n".join((self._environment, qualified, self._sources[module], repr(spec)))
        return hashlib.sha256(text.encode()).hexdigest()

    def _compile(self, factory: Factory, spec: Any) -> bytes:
        from convolt.engines.jit.codegen import object_code  # imports Numba

        self.statistics.compiled += 1
        return object_code(_resolve(factory)(spec), self.isa, SYMBOL)

    def _link(self, key: str, name: str, code: bytes) -> Any:
        builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process().export_symbol(SYMBOL)
        try:
            return builder.link(self._jit, key)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise EngineError(f"kernel {name}: it needs a symbol that no C library has ({reason})") from error

    def _load(self, key: str) -> bytes | None:
        if self._folder is None:
            return None
        try:
            data = (self._folder / key).read_bytes()
        except OSError:
            return None
        code = data[_DIGEST_BYTES:]
        if data[:_DIGEST_BYTES] != _checksum(key, code):
            self._damaged.add(key)
            return None
        self.statistics.loaded += 1
        with suppress(OSError):
            os.utime(self._folder / key)  # the least recently used are removed first
        return code

    def _prune(self) -> None:
        """Remove the least recently used files until the folder is within its bound.

        Another process may be doing the same, or about to load one of them: it will compile it again.
        """
        if self._folder is None:
            return
        files = []
        with suppress(OSError):  # who empties his cache meanwhile may do so
            for path in self._folder.iterdir():
                with suppress(OSError):
                    files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        excess = sum(size for _, size, _ in files) - self._bound
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
                self.statistics.removed += 1
            excess -= size

    def _save(self, key: str, code: bytes) -> None:
        if self._folder is None:
            self.statistics.unsaved += 1
            return
        try:
            durable.write_bytes(self._folder / key, _checksum(key, code) + code)
        except OSError:
            self.statistics.unsaved += 1


def compile_kernel(factory: Factory, spec: Any, isa: Isa) -> Kernel:
    """One kernel, without a `Compiler` to keep."""
    return Compiler(isa).kernel(factory, spec)


def _log(done: int, total: int, name: str) -> None:
    """What is told where nobody asked: a record of the logger that `convolt.engine` names."""
    logging.getLogger(COMPILING).info("compiling kernels %d/%d %s", done, total, name)


def _checksum(key: str, code: bytes) -> bytes:
    return hashlib.sha256(key.encode() + code).digest()


def _usable(folder: Path) -> Path | None:
    """The folder, made if need be; None, with a warning, where it cannot be or others could put code into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        why = f"cannot be made ({error.strerror}); let XDG_CACHE_HOME name another one"
    else:
        if status.st_uid in {0, os.geteuid()} and not status.st_mode & 0o022:
            return folder
        why = f"is another user's or can be written by others; run: chmod go-w {folder}"
    warnings.warn(f"kernels are compiled again at every start: their folder {folder} {why}", stacklevel=2)
    return None


def _name(factory: Factory) -> str:
    return _qualified(factory).rpartition(":")[2]


def _qualified(factory: Factory) -> str:
    return factory if isinstance(factory, str) else f"{factory.__module__}:{factory.__qualname__}"


def _resolve(factory: Factory) -> Callable[[Any], Callable[..., None]]:
    if not isinstance(factory, str):
        return factory
    module, _, function = factory.partition(":")
    found: Callable[[Any], Callable[..., None]] = getattr(importlib.import_module(module), function)
    return found


def _digest_of_sources(module: str) -> str:
    """The digest of the sources that kernels of this module depend on."""
    digest = hashlib.sha256()
    for name, text in sorted((_sources(module) | _sources(_CODEGEN)).items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(text).digest())
    return digest.hexdigest()


def _sources(module: str) -> dict[str, bytes]:
    """Names and texts of a module and, within this folder, of all that it imports, directly or not."""
    found: dict[str, bytes] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        text = _source(name)
        if name not in found and text is not None:
            found[name] = text
            pending.extend(_imports(text.decode()))
    return found


def _source(module: str) -> bytes | None:
    """A module's text; None for what is none, such as a function's name after its module's."""
    if module.startswith(_PACKAGE):
        return SOURCES.get(module.removeprefix(_PACKAGE))
    loaded = sys.modules.get(module)
    return Path(loaded.__file__).read_bytes() if loaded is not None and loaded.__file__ else None


def _imports(text: str) -> tuple[str, ...]:
    """Modules of this folder that a text imports at its top level; ``from package import module`` counts as both."""
    found = []
    for package, names in _IMPORT.findall(text):
        found += [package, *(f"{package}.{name}" for name in re.findall(r"\w+", names))]
    return tuple(name for name in found if name.startswith(_PACKAGE))


def read_sources(folder: Path) -> dict[str, bytes]:
    """The texts of all modules in a folder, by their dotted names."""
    return {
        ".".join(file.relative_to(folder).with_suffix("").parts): file.read_bytes() for file in folder.rglob("*.py")
    }


SOURCES = read_sources(FOLDER)
"""What this process imports: a file that is changed while it runs changes no key."""
