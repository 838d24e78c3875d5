"""Strong scaling on one machine: images a second of ranks and threads, in turns, with the same global batch.

    python benchmarks/ranks.py ENGINE [PRECISION [ROUNDS [STEPS]]]

cifar-cnn, batches of 256, Adam, on noise in the shape of CIFAR-10. Every run has two epochs, the second counts, and
the figure is the median over rounds. More threads than cores are marked: they show that nothing gets stuck, not how
fast it is.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from convolt import launch
from convolt.machine import allowed_cores

BATCH = 256
LAYOUTS = {  # ranks, threads of each, options
    "1 x 1": (1, 1, ()),
    "1 x 2": (1, 2, ()),
    "2 x 1": (2, 1, ()),
    "2 x 1 sharded optimizer": (2, 1, ("--set", "parallel.shard_optimizer=true")),
    "4 x 1": (4, 1, ()),
}


def data(folder: Path, images: int) -> Path:
    """Noise as an .npz file of labeled images."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (images, 3, 32, 32), dtype=np.uint8)
    np.savez(folder / "noise.npz", images=pixels, labels=np.arange(images) % 10)
    return folder / "noise.npz"


def measured(folder: Path, source: Path, engine: str, precision: str, layout: str) -> tuple[float, dict]:
    """Images a second of the second epoch, and where the ranks' time went."""
    ranks, threads, options = LAYOUTS[layout]
    out = tempfile.mkdtemp(dir=folder)
    words = ["train", "--data", str(source), "--valid", "0", "--model", "cifar-cnn", "--engine", engine]
    words += ["--precision", precision, "--threads", str(threads), "--batch-size", str(BATCH), "--epochs", "2"]
    words += ["--optimizer", "adam", "--quiet", "--json", "--out", str(Path(out) / "run"), *options]
    ended = launch.run(ranks, words, catch_output=True)
    result = json.loads(ended.output)
    lines = (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()
    epochs = [record for record in map(json.loads, lines) if record["event"] == "epoch"]
    return epochs[-1]["images_per_second"], result.get("ranks_seconds", {})


def main(engine: str = "jit", precision: str = "fp32", rounds: str = "5", steps: str = "20") -> None:
    """Print a line a run, then a line a layout."""
    rates: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = data(folder, BATCH * int(steps))
        for number in range(1, int(rounds) + 1):
            for layout in LAYOUTS:
                rate, seconds = measured(folder, source, engine, precision, layout)
                rates[layout].append(rate)
                shares = {kind: [round(value, 2) for value in values] for kind, values in seconds.items()}
                print(f"round {number}  {layout:<24} {rate:8.0f} images/s  {shares or ''}", flush=True)
    base = statistics.median(rates["1 x 1"])
    for layout, values in rates.items():
        ranks, threads, _ = LAYOUTS[layout]
        crowded = "  (oversubscribed)" if ranks * threads > allowed_cores() else ""
        median = statistics.median(values)
        print(f"{engine} {precision}  {layout:<24} {median:8.0f} images/s  {median / base:.2f}{crowded}")


if __name__ == "__main__":
    main(*sys.argv[1:])
