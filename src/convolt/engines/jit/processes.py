"""Compiling in more than one process: Numba and LLVM work under a lock, so a second core needs a second process.

A worker (``python -m convolt.engines.jit.worker``) leaves object code in the cache, from where the process that asked
for it loads it. Kernels are named by their factories, and specs, frozen data classes of numbers, travel as JSON. A
worker that dies, or a kernel that it cannot make, costs nothing but time: whoever finds no object code compiles it.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from convolt.engines.jit.isa import Isa

PACKAGE = "convolt.engines.jit."


def encode(value: Any) -> Any:
    """A spec as JSON has it: data classes are objects with their name, tuples lists."""
    if is_dataclass(value) and not isinstance(value, type):
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"type": name, **{field.name: encode(getattr(value, field.name)) for field in fields(value)}}
    return [encode(item) for item in value] if isinstance(value, tuple) else value


def decode(plain: Any) -> Any:
    """The spec again; only data classes of this package are made."""
    if isinstance(plain, dict):
        module, _, name = plain["type"].partition(":")
        if not module.startswith(PACKAGE):
            raise ValueError(f"{module} is no module of kernels")
        cls = getattr(importlib.import_module(module), name)
        return cls(**{key: decode(item) for key, item in plain.items() if key != "type"})
    return tuple(decode(item) for item in plain) if isinstance(plain, list) else plain


class Workers:
    """Some workers that take kernels from the end of ``wanted`` (by key) while the caller goes from its beginning."""

    def __init__(self, count: int, isa: Isa, folder: Path, wanted: dict[str, tuple[str, Any]]) -> None:
        self._lock, self._wanted = threading.Lock(), wanted
        self._taken: dict[str, threading.Event] = {}
        self._greeting = json.dumps({"isa": asdict(isa), "folder": str(folder)})
        for _ in range(count):
            threading.Thread(target=self._feed, daemon=True).start()

    def claim(self, key: str) -> None:
        """Before the caller asks for a kernel: nobody else begins with it, and whoever has begun is waited for."""
        with self._lock:
            self._wanted.pop(key, None)
            taken = self._taken.get(key)
        if taken is not None:
            taken.wait()

    def _feed(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "convolt.engines.jit.worker"]
        worker = subprocess.Popen(
            command,
            text=True,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        done = threading.Event()
        try:
            print(self._greeting, file=worker.stdin, flush=True)
            while worker.stdout.readline():  # ready, or done with the one before
                done.set()
                done = threading.Event()
                if (request := self._take(done)) is None:
                    break
                print(request, file=worker.stdin, flush=True)
        except BrokenPipeError:
            pass  # it died: what it had begun is compiled here
        finally:
            done.set()
            worker.kill()  # idle, or dead
            with suppress(BrokenPipeError), worker:
                pass

    def _take(self, done: threading.Event) -> str | None:
        """The last kernel that nobody has begun with, as a line for a worker."""
        with self._lock:
            if not self._wanted:
                return None
            key, (factory, spec) = self._wanted.popitem()
            self._taken[key] = done
        return json.dumps([factory, encode(spec)])
