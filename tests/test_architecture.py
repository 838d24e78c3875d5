"""The rules that keep the code small, layered and plain, checked on the syntax trees of the sources.

Every rule is a function from a source file to its violations, and every rule is shown to notice a bad snippet.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from convolt import engines

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "convolt"
CHECKED = ("src", "tests", "examples", "benchmarks")

# The order of the tree in ARCHITECTURE.md: a module imports from its own line and from the lines above it.
# `machine` stands at the top because engines choose their kernels by it, `plots` with runs, which draw their curves.
LAYERS = """
errors checks config duration durable load machine peaks rng stats
layers model flops params zoo convert
losses optimizers schedules metrics augment precision
data datasets
explanation engine chain workers engines
comms launch
recipe parallel loader teacher evaluation step progress course elastic preconditions train follower callbacks early_stopping signals run directory environment checkpoint history plots
compress export ensemble
profile contenders bench ladder scaling
search study studies report
cli __main__
"""  # noqa: E501

# Imports inside a function hide a dependency; these libraries are worth it.
LAZY = {
    "convolt.engines.jit.codegen": "it imports numba, and a warm start compiles nothing",
    "convolt.datasets.download": "it imports HTTP and TLS, and most data is already there",
    "PIL": "0.03 s, and most data sets hold no image files",
    "matplotlib": "0.45 s, and only plots need it",
    "mpi4py": "optional, and importing it initializes MPI",
    "numba": "0.24 s, and only compiled kernels need it",
    "onnx": "optional",
    "onnxruntime": "optional",
    "onnxscript": "optional",
    "optuna": "optional",
    "tensorboard": "optional",
    "torch": "optional, 1 s",
}

# What `convolt --help` must not import besides engines: it would take longer than the answer may.
HEAVY = {"PIL", "llvmlite", "matplotlib", "mpi4py", "numba", "onnx", "torch"}

FILE_LINES, FUNCTION_LINES = 450, 80


@dataclass(frozen=True)
class Source:
    """One Python file: its dotted name (the path for files outside the package), text and tree."""

    name: str
    text: str
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def word(self) -> str:
        """The word of the domain it belongs to: convolt.engines.loops -> engines; the facade is convolt itself."""
        return self.name.removeprefix("convolt.").split(".")[0]


def read(path: Path) -> Source:
    if not path.is_relative_to(PACKAGE):
        return Source(str(path.relative_to(ROOT)), path.read_text())
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    return Source(".".join(parts[:-1] if is_package else parts), path.read_text(), is_package)


MODULES = {source.name: source for source in map(read, sorted(PACKAGE.rglob("*.py")))}
FILES = [read(path) for folder in CHECKED for path in sorted((ROOT / folder).rglob("*.py"))]
ENGINES = {path.stem for path in (PACKAGE / "engines").iterdir() if path.name[0] not in "._"}
ENGINE_CLASSES = {name for name in engines.__all__ if name.lower() in ENGINES}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def imports(source: Source, tree: ast.AST | None = None) -> Iterator[str]:
    """The modules that a tree imports, `from package import module` resolved to the module.

    Imports for the type checker alone do not count: they are not there at run time.
    """
    tree = tree or source.tree
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    for_types = {node for guard in guards for node in ast.walk(guard)}
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from imported_from(source, node)


def imported_from(source: Source, node: ast.ImportFrom) -> Iterator[str]:
    base = node.module or ""
    if node.level:
        package = source.name.split(".") if source.is_package else source.name.split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
    for alias in node.names:
        inner = f"{base}.{alias.name}"
        yield inner if inner in MODULES else base


def line_of(word: str) -> int | None:
    lines = (line.split() for line in LAYERS.strip().splitlines())
    return next((number for number, words in enumerate(lines) if word in words), None)


# -- the rules: from a source file to its violations ------------------------------------------------------------------


def has_its_place(source: Source) -> Iterator[str]:
    if source.word != "convolt" and line_of(source.word) is None:
        yield f"{source.word} is in no line of LAYERS: give it the place it has in the design"


def imports_downwards(source: Source) -> Iterator[str]:
    own = line_of(source.word)
    if own is None:  # the facade may import everything
        return
    for name in imports(source):
        parts = name.split(".")
        if parts[0] != "convolt":
            continue
        other = line_of(parts[1]) if len(parts) > 1 else None
        if len(parts) == 1:
            yield "imports the facade `convolt`: import the module that holds the name"
        elif other is not None and other > own:
            yield f"{source.word} imports {parts[1]}, which stands below it"


def names_no_engine(source: Source) -> Iterator[str]:
    """Neither the module of an engine, nor its class, nor its name (`torch` in quotes is also a library)."""
    if source.word == "engines":
        return
    for name in imports(source):
        if name.startswith("convolt.engines."):
            yield f"imports {name}: ask the registry convolt.engines"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and node.value in ENGINES - {"torch"}:
            yield f"line {node.lineno}: names the engine {node.value!r}"
        word = getattr(node, "attr", getattr(node, "id", None))  # engines.Loops, or Loops
        if word in ENGINE_CLASSES:
            yield f"line {node.lineno}: names the engine class {word}"


def is_a_word_of_the_domain(source: Source) -> Iterator[str]:
    for part in source.name.replace("/", ".").split("."):
        if part.strip("_") in {"utils", "util", "helpers", "misc", "common"}:
            yield f"{part} says nothing about what is in it"


def file_is_short(source: Source) -> Iterator[str]:
    lines = source.text.count("\n")
    if lines > FILE_LINES:
        yield f"{lines} lines, at most {FILE_LINES}"


def functions_are_short(source: Source) -> Iterator[str]:
    for node in functions(source.tree):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > FUNCTION_LINES:
            yield f"line {node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES}"


def catches_what_it_names(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"all"}
            if caught & {"all", "Exception", "BaseException"}:
                yield f"line {node.lineno}: catches everything"


def runs_no_data(source: Source) -> Iterator[str]:
    """No code from data: pickle and its kin, eval, exec."""
    for name in imports(source):
        if name.split(".")[0] in {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}:
            yield f"imports {name}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
                yield f"line {node.lineno}: calls {node.func.id}"
            if any(k.arg == "allow_pickle" and getattr(k.value, "value", 1) is not False for k in node.keywords):
                yield f"line {node.lineno}: allows pickle"


def imports_at_the_top(source: Source) -> Iterator[str]:
    for function in functions(source.tree):
        for name in imports(source, function):
            if name not in LAZY and name.split(".")[0] not in LAZY:
                yield f"line {function.lineno}: {function.name} imports {name}, which is not in LAZY"


def passes_no_kwargs_through(source: Source) -> Iterator[str]:
    for function in functions(source.tree):
        if function.args.kwarg is None:
            continue
        for node in ast.walk(function):
            spread = node.value if isinstance(node, ast.keyword) and node.arg is None else None
            if isinstance(spread, ast.Name) and spread.id == function.args.kwarg.arg:
                yield f"line {spread.lineno}: {function.name} passes **{spread.id} on: name the arguments"


def documents_what_is_public(source: Source) -> Iterator[str]:
    """A module, class or function; a method is documented where its family is defined."""
    tree = source.tree
    if ast.get_docstring(tree) is None:
        yield "the module has no docstring"
    for node in tree.body:
        is_public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
        if is_public and ast.get_docstring(node) is None:
            yield f"line {node.lineno}: {node.name} has no docstring"


# A rule for the package, and a snippet (with the module it stands in) that breaks it.
PACKAGE_RULES: dict[Callable[[Source], Iterator[str]], tuple[str, str]] = {
    has_its_place: ("convolt.attic", ""),
    imports_downwards: ("convolt.layers", "from convolt import train\n"),
    names_no_engine: ("convolt.train", "engine = 'loops'\n"),
    passes_no_kwargs_through: ("convolt.train", "def f(**kw): return g(1, **kw)\n"),
    imports_at_the_top: ("convolt.train", "def f():\n    import json\n"),
    documents_what_is_public: ("convolt.train", "'A module.'\ndef f(): return 1\n"),
}
# Rules for every file of the repository.
FILE_RULES: dict[Callable[[Source], Iterator[str]], tuple[str, str]] = {
    is_a_word_of_the_domain: ("convolt.utils", ""),
    file_is_short: ("convolt.train", "x = 1\n" * (FILE_LINES + 1)),
    functions_are_short: ("convolt.train", "def f():\n" + "    x = 1\n" * FUNCTION_LINES),
    catches_what_it_names: ("convolt.train", "try: f()\nexcept (OSError, Exception): pass\n"),
    runs_no_data: ("convolt.train", "import numpy\nnumpy.load(path, allow_pickle=True)\n"),
}


@pytest.mark.parametrize("rule", PACKAGE_RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule):
    assert broken(rule, MODULES.values()) == []


@pytest.mark.parametrize("rule", FILE_RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps(rule):
    assert broken(rule, FILES) == []


def broken(rule, sources):
    return [f"{source.name}: {violation}" for source in sources for violation in rule(source)]


@pytest.mark.parametrize("rule", PACKAGE_RULES | FILE_RULES, ids=lambda rule: rule.__name__)
def test_rule_notices(rule):
    name, text = (PACKAGE_RULES | FILE_RULES)[rule]
    assert broken(rule, [Source(name, text)])


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (imports_downwards, "import convolt as cv\n"),
        (imports_downwards, "from .train import fit\n"),
        (imports_downwards, "def f():\n    from convolt.cli import main\n"),
        (names_no_engine, "from convolt.engines.loops import Loops\n"),
        (names_no_engine, "from convolt.engines import loops\n"),
        (names_no_engine, "from convolt import engines\nengine = engines.Loops()\n"),
        (catches_what_it_names, "try: f()\nexcept: pass\n"),
        (catches_what_it_names, "try: f()\nexcept BaseException: pass\n"),
        (runs_no_data, "from pickle import load\n"),
        (runs_no_data, "eval(text)\n"),
        (documents_what_is_public, "class C: pass\n"),
    ],
)
def test_rule_notices_also(rule, text):
    assert broken(rule, [Source("convolt.layers", text)])


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A cycle of imports, empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_have_no_cycle():
    # A package's __init__ runs before its modules do, so importing one of them from it is no cycle.
    graph = {
        name: {other for other in imports(source) if other in MODULES and not other.startswith(f"{name}.")}
        for name, source in MODULES.items()
    }
    assert cycle(graph) == []


def test_cycle_is_noticed():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def test_every_engine_is_registered():
    assert set(engines.names()) == ENGINES


def test_help_imports_no_engine():
    script = (
        "import sys, json, convolt.cli; code = convolt.cli.main(['--help']); print(json.dumps([code, *sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    code, *loaded = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert [name for name in loaded if name in HEAVY or name.startswith("convolt.engines.")] == []
    assert "convolt.cli" in loaded
