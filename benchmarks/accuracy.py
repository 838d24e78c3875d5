"""Accuracy of several precisions: the same model, data and seeds, trained in each, and the differences seed by seed.

    python benchmarks/accuracy.py DATA [--data-dir DIR] [--model NAME] [--epochs 2] [--optimizer adam] [--lr 1e-3]
        [--batch-size 128] [--precisions fp32,bf16] [--seeds 5] [--threads 2] [--unit dot] [--kept FILE]

The jit engine, all training images, the test set once, at the end. A seed decides the first weights and the order of
the samples, so runs of one seed differ by rounding alone. Printed are a line a run, mean and standard deviation of each
precision over the seeds, and how far each lies from the first: mean, median and interval of the paired differences. A
difference is noise where its interval holds 0. With --kept a run's result is added to a file and not made again: the
same call goes on where it was ended.
"""

import argparse
import json
import statistics
import tempfile
import warnings
from pathlib import Path

import convolt as cv
from convolt.stats import estimate

OPTIMIZERS = {"adam": lambda lr: cv.Adam(lr=lr), "sgd": lambda lr: cv.SGD(lr=lr, momentum=0.9)}


def accuracy(model: cv.Model, data: cv.Dataset, recipe: cv.Recipe, engine: cv.Engine) -> float:
    """Per cent of the test images that are right at the end of a run."""
    with tempfile.TemporaryDirectory() as folder:
        run = cv.fit(model, data, recipe, engine=engine, root=folder)
        assert run.test_accuracy is not None, f"{data.name} has no test images"
        return 100 * run.test_accuracy


def results(file: Path | None) -> dict[tuple[int, str], float]:
    """What earlier calls found, by seed and precision."""
    lines = file.read_text().splitlines() if file is not None and file.exists() else []
    return {(seed, precision): value for seed, precision, value in map(json.loads, lines)}


def main() -> None:
    """Train, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="a name that convolt knows, or a path")
    parser.add_argument("--data-dir")
    parser.add_argument("--model", default="mnist-cnn", choices=tuple(cv.zoo.MODELS))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--optimizer", default="adam", choices=tuple(OPTIMIZERS))
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--seeds", type=int, default=5, help="how many: 0, 1, ...")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--unit", help="what multiplies in bf16")
    parser.add_argument("--kept", type=Path, help="a file of results, one a line; for one set of options")
    options = parser.parse_args()
    warnings.simplefilter("always")  # float32 in place of bf16 would be no comparison, and is told by a warning
    data = cv.load_dataset(options.data, options.data_dir, valid=0)
    model = cv.zoo.build(options.model, data.train.images.shape[1:], data.num_classes)
    engine = cv.engines.JIT(threads=options.threads, unit=options.unit)
    found: dict[str, list[float]] = {precision: [] for precision in options.precisions.split(",")}
    kept = results(options.kept)
    for seed in range(options.seeds):
        for precision, values in found.items():
            if (seed, precision) not in kept:
                optimizer = OPTIMIZERS[options.optimizer](options.lr)
                size, epochs = options.batch_size, options.epochs
                recipe = cv.Recipe(epochs, size, optimizer=optimizer, precision=precision, seed=seed)
                kept[seed, precision] = accuracy(model, data, recipe, engine)
                if options.kept is not None:
                    with options.kept.open("a") as file:
                        print(json.dumps([seed, precision, kept[seed, precision]]), file=file)
            values.append(kept[seed, precision])
            print(f"seed {seed}  {precision:<14} {values[-1]:6.2f} %", flush=True)
    first = next(iter(found))
    for precision, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{precision:<14} mean {statistics.mean(values):.3f} %, standard deviation {spread:.3f}")
        if precision != first:
            differences = [value - base for value, base in zip(values, found[first], strict=True)]
            interval = estimate(differences)
            print(
                f"{precision} - {first}: mean {statistics.mean(differences):+.3f}, median {interval.median:+.3f} "
                f"[{interval.low:+.3f}, {interval.high:+.3f}] with probability {interval.coverage:.2f}"
            )


if __name__ == "__main__":
    main()
