"""Strong scaling on one machine: images a second of ranks and threads, in turns, with the same global batch.

    python benchmarks/ranks.py [ENGINE [PRECISION [ROUNDS [STEPS]]]]

cifar-cnn, batches of 256, Adam, on noise in the shape of CIFAR-10, trained by ``convolt.fit``; a step is timed from the
end of the last one to its own, by rank 0. In every round all layouts take a turn, in another order, and a speedup is a
ratio within rounds: medians with their intervals. ``1 x 1 twice`` is two trainings that know nothing of one another, at
the same time: what the machine gives to two processes, and no ranks can be expected to beat.

Only runs on free cores count: a run during which other programs used the cores, or before or behind which arithmetic
ran slower than it can (another guest of the hypervisor had its hand on a core), is printed and made again; a round that
has no such run for each layout does not count, for it says nothing about ranks. Within a run such moments go unseen.
They can only make a step longer, of whatever layout. So there are two speedups: of a run's median step, which has them
in it, and of the step that a tenth are faster than, as on cores that nobody touches.
"""

import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import numpy as np
import psutil

import convolt as cv
from convolt import launch, zoo
from convolt.callbacks import Callback, StepEvent
from convolt.comms.mpi import world
from convolt.contenders import contender
from convolt.data import Dataset, Split
from convolt.engines.jit.peaks import Pace
from convolt.load import LoadMeter
from convolt.machine import allowed_cores
from convolt.parallel import Parallel
from convolt.rng import permutation
from convolt.stats import paired_ratio

BATCH, WARM_UP = 256, 5
QUIET, LEAST_PACE = 0.1, 0.95  # of a core: what others may take; of the cores' own best
TRIES, LIMIT = 20, 300  # runs; seconds of one
BASE = "1 x 1"
LAYOUTS = {  # processes at once, ranks, threads of each, whether each rank moves its part of the weights
    BASE: (1, 1, 1, True),
    "1 x 1 twice": (2, 1, 1, True),
    "1 x 2": (1, 1, 2, True),
    "2 x 1": (1, 2, 1, True),
    "2 x 1, all weights": (1, 2, 1, False),
}


class Run(NamedTuple):
    """Images a second of a median step and of one that a tenth are faster than; where the ranks' seconds went."""

    usual: float
    quiet: float
    seconds: dict[str, list[float]]


class Clock(Callback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step(self, step: StepEvent) -> None:
        self.ends.append(time.perf_counter())


def train(out: str, name: str, threads: str, steps: str, shards: str) -> None:
    """On each rank: one epoch; rank 0 prints the seconds of its steps, and where the ranks' time went."""
    images = np.random.default_rng(0).integers(0, 256, (BATCH * (WARM_UP + int(steps)), 3, 32, 32), dtype=np.uint8)
    data = Dataset("noise", Split(images, np.arange(len(images)) % 10), None, None, tuple("0123456789"))
    clock, comm, program = Clock(), world(), contender(name, int(threads))
    recipe = cv.Recipe(batch_size=BATCH, epochs=1, precision=program.precision, optimizer=cv.Adam())
    model, parallel = zoo.build("cifar-cnn", (3, 32, 32), 10), Parallel(shard_optimizer=None if shards else False)
    run = cv.fit(model, data, recipe, engine=program.engine, comm=comm, parallel=parallel, out=out, callbacks=[clock])
    if comm.rank == 0:
        seconds = np.diff(clock.ends[WARM_UP - 1 :]).tolist()
        print(json.dumps({"steps": seconds, "ranks": run.result.get("ranks_seconds", {})}))


def trained(ranks: int, words: Sequence[str], folder: Path) -> Run:
    """A training in processes of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        started = [*launch.launcher(ranks), sys.executable, "-m", "mpi4py"] if ranks > 1 else [sys.executable]
        line = [*started, __file__, "--train", f"{out}/run", *words]
        ended = launch.run_command(line, catch_output=True, timeout=LIMIT)
    if ended.code:
        sys.exit(f"a training on {ranks} ranks ended with code {ended.code}: no result")
    said = json.loads(ended.output.splitlines()[-1])
    steps = said["steps"]
    return Run(BATCH / median(steps), BATCH / quantiles(steps, n=10)[0], said["ranks"])


def measured(folder: Path, engine: str, layout: str, steps: str, pace: Pace) -> Run | None:
    """A layout, all its processes together; None if others never let it alone. Prints every try."""
    processes, ranks, threads, shards = LAYOUTS[layout]
    words = [engine, str(threads), steps, "shards" if shards else ""]
    for _ in range(TRIES):
        before, meter = pace.read(), LoadMeter(children=True)
        with ThreadPoolExecutor(processes) as pool:
            runs = list(pool.map(lambda _: trained(ranks, words, folder), range(processes)))
        others, slowest = meter.read().others or 0.0, min(before, pace.read())
        usual, quiet = (sum(run[which] for run in runs) for which in range(2))
        shares = {kind: [round(value, 2) for value in values] for kind, values in runs[0].seconds.items()}
        said = f"others used {others:.2f} cores, pace {slowest:.2f}"
        print(f"  {layout:<20} {usual:8.0f} images/s, {quiet:8.0f} quiet; {said}  {shares or ''}", flush=True)
        if others <= QUIET and slowest >= LEAST_PACE:
            return Run(usual, quiet, runs[0].seconds)
    return None


def main(engine: str = "jit", precision: str = "fp32", rounds: str = "7", steps: str = "25") -> None:
    """Print a line a run, then a line a layout."""
    kept: dict[str, list[Run]] = {layout: [] for layout in LAYOUTS}
    pace = Pace(allowed_cores())
    with tempfile.TemporaryDirectory() as name:
        for number in range(int(rounds)):
            print(f"round {number + 1}", flush=True)
            order = [list(LAYOUTS)[place] for place in permutation(0, number, len(LAYOUTS))]
            found = {each: measured(Path(name), f"{engine}-{precision}", each, steps, pace) for each in order}
            if None not in found.values():
                for layout, run in found.items():
                    kept[layout] += [run] if run is not None else []
    pace.close()
    if not kept[BASE]:
        sys.exit("the cores were never free: no result")
    for layout, runs in kept.items():
        _, ranks, threads, _ = LAYOUTS[layout]
        crowded = "  (oversubscribed)" if ranks * threads > allowed_cores() else ""
        usual = paired_ratio([run.usual for run in runs], [run.usual for run in kept[BASE]])
        quiet = paired_ratio([run.quiet for run in runs], [run.quiet for run in kept[BASE]])
        rate = f"{median(run.usual for run in runs):8.0f} images/s"
        said = f"median steps {usual}, quiet steps {quiet}, of {usual.n} rounds"
        print(f"{engine} {precision}  {layout:<20} {rate}  {said}{crowded}")


def stop(number: int, frame: object) -> None:
    """End the trainings under way, and then this."""
    for training in psutil.Process().children():
        training.send_signal(number)
    sys.exit(f"stopped by {signal.Signals(number).name}: no result")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(*sys.argv[2:])
    else:
        for stopping in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stopping, stop)
        main(*sys.argv[1:])
