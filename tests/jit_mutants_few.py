"""Mistakes in predictions of a few samples by dense layers whose weights are bf16."""

from engine_cases import UNITS
from jit_mutant import JitMutant

FEW_IN_BF16 = "few in bf16"
DENSE, MATRICES = "kernels/dense.py", "matrices.py"


def few(mistake: str, file: str, inside: str, right: str, wrong: str) -> JitMutant:
    return JitMutant(mistake, file, inside, right, wrong, FEW_IN_BF16, unit=UNITS[0])


FEW = (
    few("every row rounded to the first", DENSE, "def pack(", "BF16 * (first + row)", "BF16 * first"),
    few("rounded before they are in order", DENSE, "def pack(", "            rows = target\n", ""),
    few("the last inputs by the first weights", DENSE, "def dense_dots", "w + number * panels * panel", "w"),
    few("pixels out of order", MATRICES, "def dense_prediction", "source.image is None", "True"),
)
