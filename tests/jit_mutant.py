"""A mistake in the jit engine: a replacement of text in one of its files.

The changed text of a file is executed in its module and takes the place of the real one in every module that had
imported from it; classes stay and get new members. The cache of kernels is told of the text, so what depends on it is
compiled anew and nothing else.
"""

import inspect
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import FunctionType, ModuleType

from engine_cases import ON_TILES, UNITS

from convolt.engines.jit import compiler
from convolt.engines.jit.compiler import FOLDER
from convolt.engines.jit.isa import detect

PACKAGE = "convolt.engines.jit"


@dataclass(frozen=True)
class JitMutant:
    """``wrong`` in place of ``right``, at its one occurrence after ``inside``, in a file; ``by``: who notices.

    quick: one of the few that every run of the tests meets. unit: what multiplies bf16 numbers meanwhile. lanes: of the
    vectors for which the code is, 0 for any.
    """

    mistake: str
    file: str
    inside: str
    right: str
    wrong: str
    by: str
    quick: bool = False
    unit: str = ON_TILES
    lanes: int = 0

    @property
    def runs_here(self) -> bool:
        """Whether this CPU comes to the changed line."""
        return self.unit in UNITS and self.lanes in (0, detect().lanes)

    def text(self) -> str:
        """The file with the mistake."""
        before, place, rest = (FOLDER / self.file).read_text().partition(self.inside)
        body, end, after = rest.partition("\n\n\n")
        assert place, f"{self.inside} is gone from {self.file}"
        assert body.count(self.right) == 1, f"{self.right!r} is there {body.count(self.right)} times in {self.inside}"
        return before + place + body.replace(self.right, self.wrong) + end + after

    def apply(self) -> None:
        """Make this process use the file with the mistake."""
        name = self.file.removesuffix(".py").replace("/", ".")
        compiler.SOURCES[name] = self.text().encode()
        compiler.MANY = sys.maxsize  # other processes have the real file
        _put_in_place(import_module(f"{PACKAGE}.{name}"), self.text(), self.file)


def _put_in_place(module: ModuleType, text: str, file: str) -> None:
    """The changed text in a module, and with whoever imported a name from it."""
    before = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    path = Path(tempfile.mkdtemp()) / file.replace("/", ".")
    path.write_text(text)
    SourceFileLoader(module.__name__, str(path)).exec_module(module)  # functions see what is patched in the real module
    for name, real in before.items():
        changed = vars(module)[name]
        if inspect.isclass(real) and real.__module__ == module.__name__:
            _take_members(real, changed)
            setattr(module, name, real)
        elif changed is not real:
            for user in [user for key, user in sys.modules.items() if key.startswith(PACKAGE)]:
                if vars(user).get(name) is real:
                    setattr(user, name, changed)


def _take_members(real: type, changed: type) -> None:
    kinds = (FunctionType, property, cached_property, classmethod, staticmethod)
    for name, member in vars(changed).items():
        if isinstance(member, kinds):
            setattr(real, name, member)
