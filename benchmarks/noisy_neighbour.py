"""What the jit engine loses to a process that uses one of its cores.

    python benchmarks/noisy_neighbour.py [--model mnist-cnn] [--engine jit-bf16] [--rounds 7] [--seconds 0.5]

Training steps with Adam, images a second: one thread and all threads on quiet cores, then all threads while another
process burns one core. The neighbour takes part of a core from us, so what is left is at least all cores but one, and
at most (the scheduler shares that one in halves) half a core more. Speed for each free core must stay within 15 % of
the quiet one. The states take turns, and each round gives one ratio; printed are medians and intervals. The exit code
is 1 if the median is below 0.85.
"""

import argparse
import multiprocessing
import multiprocessing.synchronize
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from convolt import zoo
from convolt.bench import LOSS, OPTIMIZER, Workload
from convolt.contenders import contender
from convolt.engine import Executor, resolve_threads
from convolt.load import LoadMeter
from convolt.recipe import Recipe
from convolt.stats import estimate, paired_ratio

LEAST = 0.85
QUIET = 0.1  # of a core


def burn(ready: "multiprocessing.synchronize.Event") -> None:
    """Use one core until ended."""
    ready.set()
    while True:
        sum(range(10_000))


@contextmanager
def neighbour() -> Iterator[None]:
    """Another process that never waits."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=burn, args=(ready,), daemon=True)
    process.start()
    ready.wait(30)
    try:
        yield
    finally:
        process.kill()
        process.join()


def seconds_of_step(executor: Executor, workload: Workload, length: float) -> float:
    """Mean seconds of a step over about so many seconds; some steps before do not count."""
    steps, start, warm = 0, time.perf_counter(), length / 5
    while True:
        x, y = workload.batches[steps % len(workload.batches)]
        executor.train_step(x, y, LOSS, 1 / len(x), OPTIMIZER, workload.samples)
        steps += 1
        now = time.perf_counter()
        if warm and now - start >= warm:
            steps, start, warm = 0, now, 0.0
        elif not warm and now - start >= length:
            return (now - start) / steps


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mnist-cnn", choices=tuple(zoo.MODELS))
    parser.add_argument("--engine", default="jit-fp32", help="as convolt bench names contenders")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each state in each round")
    options = parser.parse_args()
    threads = resolve_threads(options.threads)
    if threads < 2:
        print("one core alone has no free one beside a neighbour: nothing to measure")
        return 0
    shape = (1, 28, 28) if options.model in ("mnist-cnn", "lenet5") else (3, 32, 32)
    workload = Workload(zoo.build(options.model, shape, 10), options.batch_size)
    executors = {}
    for count in (1, threads):
        each = contender(options.engine, count)
        executors[count] = each.engine.executor(workload.model, workload.weights, Recipe(precision=each.precision))
        seconds_of_step(executors[count], workload, options.seconds)
    states: dict[str, list[float]] = {"1 thread, quiet": [], f"{threads} threads, quiet": [], "with a neighbour": []}
    one, quiet, noisy = states.values()
    others = 0.0
    for _ in range(options.rounds):
        meter = LoadMeter()
        one.append(seconds_of_step(executors[1], workload, options.seconds))
        quiet.append(seconds_of_step(executors[threads], workload, options.seconds))
        others = max(others, meter.read().others or 0.0)
        with neighbour():
            noisy.append(seconds_of_step(executors[threads], workload, options.seconds))
    for name, seconds in states.items():
        print(f"{name:24}{estimate([options.batch_size / s for s in seconds])} images/s")
    kept = paired_ratio(quiet, noisy)
    free = paired_ratio([s * threads / (threads - 1) for s in quiet], noisy)
    print(f"speed kept               {kept}")
    print(f"for each free core       {free} of the quiet speed; at least {LEAST}")
    print(f"against one quiet thread {paired_ratio(one, noisy)}")
    if others > QUIET:
        print(f"warning: the quiet cores were not quiet: others used up to {others:.2f} of them; repeat this")
    for executor in executors.values():
        executor.close()
    return 0 if free.median >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
