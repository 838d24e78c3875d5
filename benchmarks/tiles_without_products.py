"""What all but the products cost in the kernels for AMX tiles, on a CPU that has none: two states of the code in turns.

    python benchmarks/tiles_without_products.py REVISION [--model resnet9] [--batch-size 128] [--rounds 9] [--threads 2]

Tiles are loaded and stored line by line, 64 bytes at a time, and nothing is multiplied: the results are wrong, and all
that stands around the products costs what it costs. The sources as they are and those of a git revision train in a
process each, one step after the other; printed are the medians of their steps, in milliseconds, and the interval of how
many times as fast this state is. Kernels are compiled into a temporary folder, by one process. Needs AVX512-BF16, which
the kernels for tiles use as well.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir

from convolt import zoo
from convolt.engines.jit import JIT, amx, compiler, isa
from convolt.engines.jit.vectors import I64
from convolt.losses import CrossEntropy
from convolt.optimizers import Adam
from convolt.recipe import Recipe
from convolt.stats import estimate, paired_ratio

LINE = ir.VectorType(ir.FloatType(), 16)
ROOT = Path(__file__).resolve().parents[1]


class Lines:
    """In the place of `amx.Tiles`: as many lines as the tiles of the block in hand have rows."""

    spec: Any = None

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def load(self, tile: int, address: Any, stride: int) -> None:
        """Into a register that nobody reads."""
        rows, _ = self._size(tile)
        consume = ir.FunctionType(ir.VoidType(), [LINE])
        for row in range(rows):
            value = self.builder.load(self._line(address, row * stride, LINE))
            value.align = 1
            self.builder.asm(consume, "", "x", [value], True)

    def store(self, tile: int, address: Any, stride: int) -> None:
        """Zeros."""
        rows, columns = self._size(tile)
        kind = ir.VectorType(ir.FloatType(), columns)
        for row in range(rows):
            self.builder.store(ir.Constant(kind, None), self._line(address, row * stride, kind)).align = 4

    def zero(self, tile: int) -> None:
        """Nothing."""

    def multiply_add(self, c: int, a: int, b: int) -> None:
        """Nothing."""

    def _line(self, address: Any, offset: int, kind: Any) -> Any:
        return self.builder.inttoptr(self.builder.add(address, I64(offset)), kind.as_pointer())

    def _size(self, tile: int) -> tuple[int, int]:
        """Rows, and float32 columns, of a tile."""
        spec = Lines.spec
        if tile < 4:
            return spec.row_tiles[tile // 2], spec.column_tiles[tile % 2]
        return (spec.row_tiles[tile - 4], 16) if tile < 6 else (spec.step // 2, spec.column_tiles[tile - 6])


def pretend() -> None:
    """Have this process take the CPU for one with tiles."""
    features, multiply = isa.host_features() | {"amx-tile": True, "amx-bf16": True}, amx.multiply

    def multiply_lines(spec: Any, *arguments: Any) -> None:
        Lines.spec = spec
        multiply(spec, *arguments)

    changed: dict[str, Any] = {
        "multiply": multiply_lines,
        "Tiles": Lines,
        "configure": lambda spec, builder: None,
        "release": lambda builder: None,
    }
    for name, value in changed.items():
        setattr(amx, name, value)
    for name, value in {"host_features": features.copy, "request_amx": lambda: True}.items():
        setattr(isa, name, value)
    compiler.MANY = sys.maxsize  # other processes have real tiles


def train(model: str, batch_size: int, threads: int) -> None:
    """A step for each line of standard input, and its milliseconds as a line of the answer."""
    pretend()
    network, generator = zoo.MODELS[model].build(), np.random.default_rng(0)
    x = generator.integers(0, 256, (batch_size, *network.input_shape), np.uint8)
    y = generator.integers(0, network.output_shape[0], batch_size)
    executor = JIT(threads=threads, unit="amx").executor(network, None, Recipe(precision="bf16"))

    def step() -> float:
        start = time.perf_counter()
        executor.train_step(x, y, CrossEntropy(), 1 / batch_size, Adam(lr=1e-3))
        return 1e3 * (time.perf_counter() - start)

    step(), step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)


def begin(sources: Path, cache: str, options: list[str]) -> "subprocess.Popen[str]":
    """A process that trains with these sources."""
    environment = os.environ | {"PYTHONPATH": str(sources), "XDG_CACHE_HOME": cache}
    command = [sys.executable, __file__, "--train", *options]
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def answer(process: "subprocess.Popen[str]", line: str = "") -> str:
    """What it says next, to a line of ours if there is one."""
    assert process.stdin is not None
    assert process.stdout is not None
    if line:
        print(line, file=process.stdin, flush=True)
    if not (said := process.stdout.readline().strip()):
        raise SystemExit("a process that trains has ended; what it said is above")
    return said


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default="HEAD")
    parser.add_argument("--model", default="resnet9", choices=zoo.MODELS)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        return train(options.model, options.batch_size, options.threads)
    here = isa.detect()
    if here.amx or not here.bf16_convert:
        raise SystemExit("tiles without products need a CPU with AVX512-BF16 and without AMX")
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", options.revision, "src"], cwd=ROOT, check=True, capture_output=True
        ).stdout
        subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
        sizes = ["--model", options.model, "--batch-size", str(options.batch_size), "--threads", str(options.threads)]
        processes = [begin(sources, folder, sizes) for sources in (Path(folder, "src"), ROOT / "src")]
        try:
            for process in processes:
                answer(process)
            steps = [[float(answer(process, "step")) for process in processes] for _ in range(options.rounds)]
        finally:
            for process in processes:
                process.kill()
                process.communicate()
    before, after = (list(column) for column in zip(*steps, strict=True))
    found = estimate(before), estimate(after), paired_ratio(before, after)
    print("{}: {} {} ms, as it is {} ms, {} times as fast".format(options.model, options.revision, *found))


if __name__ == "__main__":
    main()
