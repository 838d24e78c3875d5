"""Mistakes in the look at a step, behind which it ends or weights are moved, and in calls of several steps."""

from jit_mutant import JitMutant

LOSS, DRIVER, REFUSALS = "kernels/loss.py", "driver.py", "refusals"
COPIES, STRETCH, EXECUTOR = "kernels/stretch.py", "stretch.py", "executor.py"
STRETCHES, IN_BF16 = "several steps in one call", "several steps in one call, bf16"

STEPS = (
    JitMutant("numbers below all labels", LOSS, "def cross_entropy", "labels[n] < 0 or ", "", REFUSALS),
    JitMutant("numbers above all labels", LOSS, "def cross_entropy", "labels[n] >= C", "labels[n] > C", REFUSALS),
    JitMutant("labels unlooked at", LOSS, "def look", "found[WRONG_LABELS] > 0", "found[WRONG_LABELS] > 1e9", REFUSALS),
    JitMutant("any statistic", LOSS, "def look", "if not np.isfinite(statistics[i]):", "if False:", REFUSALS),
    JitMutant("any gradient", LOSS, "def look", "total += squares[i]", "pass", REFUSALS),
    JitMutant("a program without end", DRIVER, "def run(", "load(state + ENDED) != 0", "False", REFUSALS),
    JitMutant("ended for ever", DRIVER, "def start(", "exchange(state + ENDED, 0)", "pass", REFUSALS),
    JitMutant("a row uncopied", COPIES, "def copies", "range(len(rows))", "range(len(rows) - 1)", STRETCHES),
    JitMutant("a word uncopied", COPIES, "def copies", "range(len(source))", "range(len(source) - 1)", STRETCHES),
    JitMutant("half of the numbers", STRETCH, "class Stretch", "b.nbytes // 4", "b.nbytes // 8", STRETCHES),
    JitMutant("findings a row late", STRETCH, "class Stretch", "row[number - 1]", "row[number]", STRETCHES),
    JitMutant("the first of all begun", STRETCH, "class Stretch", "numbers[number:]", "numbers", STRETCHES),
    JitMutant("begun for ever", EXECUTOR, "def _at_once", "stretch.begun[0] = 0", "pass", STRETCHES),
    JitMutant("everybody's scale", STRETCH, "class Stretch", "desks.scale[number] = scale", "pass", STRETCHES),
    JitMutant(
        "batches of one size",
        STRETCH,
        "class Stretch",
        "= len(images), addr",
        "= len(desks.labels[0]), addr",
        STRETCHES,
    ),
    JitMutant("results that are lent", STRETCH, "class Stretch", ":images].copy()", ":images]", STRETCHES),
    JitMutant("one rate for two steps", EXECUTOR, "def _at_once", "step + 1 + number", "step + number", STRETCHES),
    JitMutant("a state of before", EXECUTOR, "def _at_once", "began and not results", "began", STRETCHES),
    JitMutant("steps uncounted", EXECUTOR, "def _moved", "_updater.step += steps", "_updater.step += 1", STRETCHES),
    JitMutant(
        "copies of old weights", EXECUTOR, "def _at_once", "renews=not whole.rounds_all", "renews=False", IN_BF16
    ),
    JitMutant("copies for new ones", EXECUTOR, "def _moved", "self._changes += steps", "self._changes += 0", IN_BF16),
)
