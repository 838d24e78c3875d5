"""Which operation has its backward checked on which engine: the table of docs/coverage.md.

``python tests/engine_coverage.py`` writes the file again; tests/test_coverage.py holds it true, and holds that every
engine and every operation is in it. That the checks notice a wrong backward is shown by tests/test_mutants.py.
"""

from pathlib import Path

from engine_cases import CASES, ENGINES, Entry, operations
from engine_checks import CHECKS, Check, applies

from convolt.layers import LAYERS, Layer

FILE = Path(__file__).parents[1] / "docs" / "coverage.md"

TEXT = """\
# Which operation is checked on which engine

Each cell is the number of cases, that is of geometries and neighbors, in which the operation's outputs and gradients
(of every parameter and of the input) are compared with PyTorch's functions and autograd in float64, and in how many of
them the gradients are compared with finite differences too. All cases also check that gradients are added, that
buffers survive a change of the batch size, and that leaving out the first layer's input gradient changes nothing.

Every kernel is known to be looked at: `tests/test_mutants.py` and `tests/test_jit_mutants.py` break each of them and
see the checks fail. Of the engine that compiles, `make test` runs some cases and `make test-slow` all of them, on every
set of vectors that the CPU has.

{table}

Written by `python tests/engine_coverage.py`; a test holds it to what is run.
"""


def checked(entry: Entry, operation: type[Layer], check: Check) -> int:
    """The number of cases in which a check looks at an operation on an engine."""
    return sum(
        operation in operations(case.layers)
        and applies(check, entry.finest, case)
        and entry.can_judge(case, entry.finest)
        for case in CASES
    )


def render() -> str:
    """The text of docs/coverage.md."""
    against_pytorch, *_, against_differences = CHECKS
    rows = [["operation", *(entry.name for entry in ENGINES)], ["---", *("---:" for _ in ENGINES)]]
    for operation in LAYERS:
        counts = [
            f"{checked(entry, operation, against_pytorch)} ({checked(entry, operation, against_differences)})"
            for entry in ENGINES
        ]
        rows.append([operation.__name__, *counts])
    return TEXT.format(table="\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    FILE.write_text(render())
