"""Mistakes in the look at a step, behind which it ends or weights are moved."""

from jit_mutant import JitMutant

LOSS, DRIVER, REFUSALS = "kernels/loss.py", "driver.py", "refusals"

STEPS = (
    JitMutant("numbers below all labels", LOSS, "def cross_entropy", "labels[n] < 0 or ", "", REFUSALS),
    JitMutant("numbers above all labels", LOSS, "def cross_entropy", "labels[n] >= C", "labels[n] > C", REFUSALS),
    JitMutant("labels unlooked at", LOSS, "def look", "found[WRONG_LABELS] > 0", "found[WRONG_LABELS] > 1e9", REFUSALS),
    JitMutant("any statistic", LOSS, "def look", "if not np.isfinite(statistics[i]):", "if False:", REFUSALS),
    JitMutant("any gradient", LOSS, "def look", "total += squares[i]", "pass", REFUSALS),
    JitMutant("a program without end", DRIVER, "def run(", "load(state + ENDED) != 0", "False", REFUSALS),
    JitMutant("ended for ever", DRIVER, "def start(", "exchange(state + ENDED, 0)", "pass", REFUSALS),
)
