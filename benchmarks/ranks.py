"""Strong scaling on one machine: images a second of ranks and threads, in turns, with the same global batch.

    python benchmarks/ranks.py [ENGINE [PRECISION [ROUNDS [STEPS]]]]

cifar-cnn, batches of 256, Adam, on noise in the shape of CIFAR-10. Every run has two epochs, and the second counts. In
every round all layouts take a turn, in another order, and a speedup is a ratio within rounds: medians with their
intervals. ``1 x 1 twice`` is two trainings that know nothing of one another, at the same time: what the machine gives
to two processes, and no ranks can be expected to beat. A run during which other programs used the cores is printed
and made again; a round that has none that was left alone does not count, for it says nothing about ranks. What a
hypervisor's other guests take is not seen by that. It can only lower a rate: so the best run of a layout against the
best of the base stands beside the medians.
"""

import json
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from convolt import launch
from convolt.load import LoadMeter
from convolt.machine import allowed_cores
from convolt.rng import permutation
from convolt.stats import estimate, paired_ratio

BATCH = 256
QUIET = 0.1  # of a core: what others may take
TRIES = 3
BASE = "1 x 1"
LAYOUTS = {  # processes at once, ranks, threads of each, options
    BASE: (1, 1, 1, ()),
    "1 x 1 twice": (2, 1, 1, ()),
    "1 x 2": (1, 1, 2, ()),
    "2 x 1": (1, 2, 1, ()),
    "2 x 1, all weights": (1, 2, 1, ("--set", "parallel.shard_optimizer=false")),
}


def data(folder: Path, images: int) -> Path:
    """Noise as an .npz file of labeled images."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (images, 3, 32, 32), dtype=np.uint8)
    np.savez(folder / "noise.npz", images=pixels, labels=np.arange(images) % 10)
    return folder / "noise.npz"


def trained(words: list[str], ranks: int, folder: Path) -> tuple[float, dict[str, list[float]]]:
    """Images a second of the second epoch, and where the ranks' time went in both."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        ended = launch.run(ranks, [*words, "--out", f"{out}/run"], catch_output=True)
        if ended.code:
            sys.exit(f"a training on {ranks} ranks ended with code {ended.code}: no result")
        result = json.loads(ended.output)
        lines = Path(out, "run", "metrics.jsonl").read_text().splitlines()
    epochs = [record for record in map(json.loads, lines) if record["event"] == "epoch"]
    return epochs[-1]["images_per_second"], result.get("ranks_seconds", {})


def measured(folder: Path, source: Path, engine: str, precision: str, layout: str) -> float | None:
    """Images a second of a layout, None if others never let it alone; prints every try."""
    processes, ranks, threads, options = LAYOUTS[layout]
    words = ["train", "--data", str(source), "--valid", "0", "--model", "cifar-cnn", "--engine", engine]
    words += ["--precision", precision, "--threads", str(threads), "--batch-size", str(BATCH), "--epochs", "2"]
    words += ["--optimizer", "adam", "--quiet", "--json", *options]
    for _ in range(TRIES):
        meter = LoadMeter(children=True)
        with ThreadPoolExecutor(processes) as pool:
            answers = list(pool.map(lambda _: trained(words, ranks, folder), range(processes)))
        others, rate = meter.read().others or 0.0, sum(rate for rate, _ in answers)
        shares = {kind: [round(value, 2) for value in values] for kind, values in answers[0][1].items()}
        print(f"  {layout:<20} {rate:8.0f} images/s; others used {others:.2f} cores  {shares or ''}", flush=True)
        if others <= QUIET:
            return rate
    return None


def main(engine: str = "jit", precision: str = "fp32", rounds: str = "5", steps: str = "12") -> None:
    """Print a line a run, then a line a layout."""
    rates: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    with tempfile.TemporaryDirectory() as name:
        source = data(Path(name), BATCH * int(steps))
        for number in range(int(rounds)):
            print(f"round {number + 1}", flush=True)
            order = [list(LAYOUTS)[place] for place in permutation(0, number, len(LAYOUTS))]
            found = {layout: measured(Path(name), source, engine, precision, layout) for layout in order}
            if None not in found.values():
                for layout, rate in found.items():
                    rates[layout].append(rate or 0.0)
    if not rates[BASE]:
        sys.exit("the cores were never free: no result")
    for layout, values in rates.items():
        _, ranks, threads, _ = LAYOUTS[layout]
        crowded = "  (oversubscribed)" if ranks * threads > allowed_cores() else ""
        speedup, best = paired_ratio(values, rates[BASE]), max(values) / max(rates[BASE])
        rate = f"{estimate(values).median:8.0f} images/s"
        print(f"{engine} {precision}  {layout:<20} {rate}  {speedup} of {speedup.n}, best {best:.3f}{crowded}")


def stop(number: int, frame: object) -> None:
    """End the trainings under way, and then this."""
    for training in psutil.Process().children():
        training.send_signal(number)
    sys.exit(f"stopped by {signal.Signals(number).name}: no result")


if __name__ == "__main__":
    for stopping in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stopping, stop)
    main(*sys.argv[1:])
