"""The speeds that Convolt promises on a CPU, each measured and held against its promise.

    python benchmarks/targets.py [--rounds 9] [--seconds 0.3] [--threads 2] [--data-dir DIR] [WORD...]

A row is a network, a precision and what it is compared with: whole training steps, batch 128, optimizer included,
against the fastest form of PyTorch, or predictions against the faster of PyTorch and ONNX Runtime. ``convolt bench``
has the way of measuring; a ratio is the median over rounds with its interval, and a row holds where the median reaches
what is promised. Rows of bf16 are promised for CPUs with AMX tiles: without, they are measured and marked, and decide
nothing. With --data-dir, a folder of MNIST, ten epochs of it are trained too: right answers, and seconds of training.
With words only rows that have one of them in their name are run. The exit code is 1 if a promise is broken.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from convolt import zoo
from convolt.bench import Report, Workload, bench
from convolt.contenders import assemble
from convolt.engines.jit.isa import detect, units

FP32 = ("torch", "torch-channels_last")
BF16 = (*FP32, "torch-fp32_precision=bf16", "torch-bf16", "torch-channels_last-bf16")
RECIPE = Path(__file__).parent.parent / "examples" / "mnist.toml"
RIGHT, SECONDS = 9868, 12.0  # of 10,000 test images, and of training


@dataclass(frozen=True)
class Row:
    """One promise: at least so many times the speed of the fastest peer."""

    model: str
    precision: str
    least: float
    batch_size: int = 128
    inference: bool = False

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.model} {self.precision}, {'inference' if self.inference else 'training'}, {self.batch_size}"

    @property
    def peers(self) -> tuple[str, ...]:
        """What it is compared with: forms that multiply in float32, and for bf16 all forms."""
        return (*(BF16 if self.precision == "bf16" else FP32), *(("onnxruntime",) if self.inference else ()))


ROWS = (
    Row("mnist-cnn", "bf16", 6.0),
    Row("cifar-cnn", "bf16", 5.0),
    Row("mnist-cnn", "fp32", 3.5),
    Row("cifar-cnn", "fp32", 2.0),
    Row("resnet9", "bf16", 2.0),
    Row("resnet18", "bf16", 1.5),
    *(
        Row(model, precision, 1.0, batch, inference=True)
        for precision in ("fp32", "bf16")
        for model in ("mnist-cnn", "cifar-cnn")
        for batch in (1, 256)
    ),
)


def measured(row: Row, rounds: int, seconds: float, threads: int) -> Report:
    """Ours and its peers in turns; who cannot take part is told."""
    contenders, absent = assemble([f"jit-{row.precision}", *row.peers], threads)
    for name, reason in absent.items():
        print(f"{name}: unavailable: {reason}", file=sys.stderr)
    return bench(Workload(zoo.MODELS[row.model].build(), row.batch_size, row.inference), contenders, rounds, seconds)


def verdict(precision: str, reached: bool, tiles: bool) -> str:
    """What became of a promise."""
    if precision == "bf16" and not tiles:
        return "no AMX here"
    return "holds" if reached else "BROKEN"


def compared(row: Row, report: Report, tiles: bool) -> tuple[str, str]:
    """A row's figures, and what became of its promise."""
    ours = report.results[0]
    if ours.ratio is None or ours.milliseconds is None:
        return f"{row.name:34}{ours.status}: {ours.reason or 'no peer was timed'}", "BROKEN"
    ratio = f"{ours.ratio.median:.2f} [{ours.ratio.low:.2f}, {ours.ratio.high:.2f}]"
    line = f"{row.name:34}{ours.milliseconds.median:10.3f} ms{ratio:>22} times {report.peer}, promised {row.least:g}"
    return line, verdict(row.precision, ours.ratio.median >= row.least, tiles)


def ten_epochs(folder: str, threads: int, tiles: bool) -> tuple[str, str]:
    """MNIST by ``convolt train``, ten epochs in bf16."""
    with tempfile.TemporaryDirectory() as runs:
        words = ["train", "--recipe", str(RECIPE), "--data-dir", folder, "--engine", "jit", "--precision", "bf16"]
        words += ["--threads", str(threads), "--quiet", "--json", "--out", f"{runs}/run"]
        done = subprocess.run([sys.executable, "-m", "convolt", *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return f"{'mnist-cnn bf16, ten epochs':34}convolt train ended with {done.returncode}", "BROKEN"
    told = json.loads(done.stdout)
    right, seconds = round(told["test_accuracy"] * 10_000), told["train_seconds"]
    figures = f"{right:,} of 10,000 right, {seconds:.1f} s of training, promised {RIGHT:,}, {SECONDS:g} s"
    line = f"{'mnist-cnn bf16, ten epochs':34}{figures}"
    if right < RIGHT:
        return line, "BROKEN"
    return line, verdict("bf16", seconds <= SECONDS, tiles)


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="run rows with one of these in their names")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a slice, of one step at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data-dir", help="MNIST, to train it for ten epochs too")
    options = parser.parse_args()
    tiles, found = "amx" in units(detect()), []
    for row in ROWS:
        if options.words and not any(word in row.name for word in options.words):
            continue
        report = measured(row, options.rounds, options.seconds, options.threads)
        for warning in report.warnings():
            print(f"{row.name}: {warning}", file=sys.stderr)
        found.append(compared(row, report, tiles))
        print("  ".join(found[-1]), flush=True)
    if options.data_dir is not None:
        found.append(ten_epochs(options.data_dir, options.threads, tiles))
        print("  ".join(found[-1]), flush=True)
    broken = sum(word == "BROKEN" for _, word in found)
    print(f"{sum(word == 'holds' for _, word in found)} of {len(found)} promises hold, {broken} are broken")
    return 1 if broken or not found else 0


if __name__ == "__main__":
    sys.exit(main())
