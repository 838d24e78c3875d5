"""The jit engine against PyTorch on networks that nobody tuned it for: none may be slower.

    python benchmarks/jit_against_torch.py [--rounds 7] [--seconds 0.15] [--threads 2] [--profile] [WORD...]

Whole training steps with Adam, all contenders checked first and then taking turns in one process, as ``convolt bench``
does it. ``fp32`` holds the engine's float32 against the fastest of PyTorch's forms that multiply in float32, ``bf16``
holds its bf16 against the fastest of all of them. A ratio is the median over rounds, with its interval. With words only
the cases that have one of them in their name are run. The exit code is 1 if any median is below 1 or a contender of
ours is wrong.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from convolt import zoo
from convolt.bench import Report, Workload, bench
from convolt.contenders import assemble
from convolt.layers import (
    BatchNorm2d,
    Conv2d,
    Dense,
    Flatten,
    GlobalAvgPool2d,
    Layer,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    Shape,
)
from convolt.model import Model

PEERS = ("torch", "torch-channels_last", "torch-fp32_precision=bf16", "torch-bf16", "torch-channels_last-bf16")
OURS = {"fp32": "jit-fp32", "bf16": "jit-bf16"}
Layers = tuple[Layer, ...]


def classifier(shape: Shape, *features: Layer, width: int = 64) -> Model:
    """Features, flattened, a hidden dense layer and ten classes."""
    size = Sequential((*features, Flatten())).output_shape(shape)[0]
    return Model(shape, (*features, Flatten(), Dense(size, width), ReLU(), Dense(width, 10)))


def averaged(shape: Shape, *features: Layer) -> Model:
    """Features, averaged over the image, and ten classes."""
    channels = Sequential(features).output_shape(shape)[0]
    return Model(shape, (*features, GlobalAvgPool2d(), Dense(channels, 10)))


def plain(shape: Shape, kernel: int, *channels: int) -> Model:
    """Convolution, ReLU and max-pool, so many times."""
    layers: Layers = ()
    for before, after in zip((shape[0], *channels), channels, strict=False):
        layers += (Conv2d(before, after, kernel, padding=kernel // 2), ReLU(), MaxPool2d(2))
    return classifier(shape, *layers)


def normed(before: int, after: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> Layers:
    """Convolution, BatchNorm, ReLU."""
    conv = Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, BatchNorm2d(after), ReLU()


def strided(shape: Shape, *channels: int) -> Model:
    """Convolutions with stride 2 instead of pooling."""
    pairs = zip((shape[0], *channels), channels, strict=False)
    layers = (layer for before, after in pairs for layer in (Conv2d(before, after, 3, 2, 1), ReLU()))
    return classifier(shape, *layers)


def separable(shape: Shape, *channels: int) -> Model:
    """Howard et al. 2017: a depthwise 3x3 and a 1x1 convolution, each with BatchNorm."""
    layers: Layers = normed(shape[0], channels[0])
    for number, (before, after) in enumerate(pairwise(channels)):
        layers += (*normed(before, before, 3, 1 + number % 2, before), *normed(before, after, 1))
    return averaged(shape, *layers)


def grouped(shape: Shape, channels: int, groups: int) -> Model:
    """Xie et al. 2017: residual blocks of 1x1, grouped 3x3 and 1x1."""
    inner = channels // 2
    body = (*normed(channels, inner, 1), *normed(inner, inner, 3, groups=groups), *normed(inner, channels, 1)[:2])
    return averaged(shape, *normed(shape[0], channels, 3, 2), Residual(body), ReLU(), Residual(body), ReLU())


def narrow(shape: Shape, channels: int) -> Model:
    """Lin et al. 2014: a 5x5 convolution and 1x1 convolutions behind it, twice."""
    one = (Conv2d(channels, channels, 1), ReLU())
    first = (Conv2d(shape[0], channels, 5, padding=2), ReLU(), *one, *one, MaxPool2d(2))
    second = (Conv2d(channels, channels, 5, padding=2), ReLU(), *one, *one)
    return averaged(shape, *first, *second)


def vgg(shape: Shape, *channels: int) -> Model:
    """Pairs of 3x3 convolutions with BatchNorm, each pair pooled."""
    layers: Layers = ()
    for before, after in zip((shape[0], *channels), channels, strict=False):
        layers += (*normed(before, after), *normed(after, after), MaxPool2d(2))
    return averaged(shape, *layers)


def residual(shape: Shape, *channels: int) -> Model:
    """He et al. 2016, one block a stage."""
    layers: Layers = normed(shape[0], channels[0])
    for before, after in pairwise(channels):
        body = (*normed(before, after, 3, 2), *normed(after, after)[:2])
        layers += (Residual(body, (Conv2d(before, after, 1, 2, bias=False), BatchNorm2d(after))), ReLU())
    return averaged(shape, *layers)


def dilated(shape: Shape, channels: int) -> Model:
    """Yu and Koltun 2016: 3x3 convolutions with dilation 1, 2 and 4."""
    layers: Layers = (Conv2d(shape[0], channels, 3, padding=1), ReLU())
    for dilation in (2, 4):
        layers += (Conv2d(channels, channels, 3, padding=dilation, dilation=dilation), ReLU())
    return averaged(shape, *layers)


#: name -> (network, batch size)
CASES: dict[str, tuple[Callable[[], Model], int]] = {
    "mnist-cnn, batch 96": (zoo.mnist_cnn, 96),
    "mnist-cnn, batch 500": (zoo.mnist_cnn, 500),
    "cifar-cnn, batch 96": (zoo.cifar_cnn, 96),
    "cifar-cnn, batch 500": (zoo.cifar_cnn, 500),
    "cifar-cnn, batch 8": (zoo.cifar_cnn, 8),
    "lenet5, batch 128": (zoo.lenet5, 128),
    "24 channels, 3x20x20, batch 96": (partial(plain, (3, 20, 20), 3, 24, 48), 96),
    "48 channels, 3x32x32, batch 96": (partial(plain, (3, 32, 32), 3, 48, 48), 96),
    "100 channels, 3x32x32, batch 96": (partial(plain, (3, 32, 32), 3, 100, 100), 96),
    "5x5, 24 to 48 channels, 3x40x40, batch 96": (partial(plain, (3, 40, 40), 5, 24, 48), 96),
    "5x5, 48 to 100 channels, 1x20x20, batch 500": (partial(plain, (1, 20, 20), 5, 48, 100), 500),
    "7x7, 24 to 48 channels, 3x32x32, batch 96": (partial(plain, (3, 32, 32), 7, 24, 48), 96),
    "7x7, 16 channels, 1x64x64, batch 32": (partial(plain, (1, 64, 64), 7, 16, 32), 32),
    "3x3, four stages, 3x64x64, batch 32": (partial(plain, (3, 64, 64), 3, 24, 48, 48, 100), 32),
    "stride 2, 3x40x40, batch 96": (partial(strided, (3, 40, 40), 24, 48, 100), 96),
    "stride 2, 1x28x28, batch 500": (partial(strided, (1, 28, 28), 32, 64), 500),
    "depthwise, 3x32x32, batch 96": (partial(separable, (3, 32, 32), 24, 48, 48, 100), 96),
    "depthwise, 3x40x40, batch 32": (partial(separable, (3, 40, 40), 32, 64, 128), 32),
    "groups 4, 3x32x32, batch 96": (partial(grouped, (3, 32, 32), 128, 4), 96),
    "groups 8, 3x40x40, batch 32": (partial(grouped, (3, 40, 40), 96, 8), 32),
    "1x1, 48 channels, 3x20x20, batch 96": (partial(narrow, (3, 20, 20), 48), 96),
    "BatchNorm, 24 to 100 channels, 3x32x32, batch 96": (partial(vgg, (3, 32, 32), 24, 48, 100), 96),
    "BatchNorm, 48 channels, 1x20x20, batch 500": (partial(vgg, (1, 20, 20), 48, 48), 500),
    "residual, 24 to 100 channels, 3x40x40, batch 96": (partial(residual, (3, 40, 40), 24, 48, 100), 96),
    "dilation, 48 channels, 3x20x20, batch 96": (partial(dilated, (3, 20, 20), 48), 96),
}


@dataclass(frozen=True)
class Line:
    """One comparison: its ratio with the interval, who was compared, and milliseconds of both."""

    case: str
    precision: str
    text: str
    ratio: float


def lines(case: str, report: Report) -> list[Line]:
    """The comparisons of one case; the ratio of ours that was not timed is 0, unless it cannot run here."""
    results, found = {result.name: result for result in report.results}, []
    for precision, name in OURS.items():
        ours = results.get(name)
        if ours is None or ours.status == "unavailable":
            continue
        ratio = ours.ratio_alike if precision == "fp32" else ours.ratio
        peer = ours.peer_alike if precision == "fp32" else report.peer
        if ratio is None or peer is None or ours.milliseconds is None:
            found.append(Line(case, precision, f"{ours.status}: {ours.reason}", 0.0))
            continue
        theirs = results[peer].milliseconds
        times = f"{ours.milliseconds.median:8.2f} ms, {peer} {theirs.median if theirs else 0:.2f} ms"
        found.append(
            Line(case, precision, f"{ratio.median:6.2f} [{ratio.low:.2f}, {ratio.high:.2f}]  {times}", ratio.median)
        )
    return found


def stages(report: Report) -> None:
    """Where the steps of ours spend their time."""
    for result in report.results:
        for stage in result.stages:
            rate = "" if stage.gflops is None else f"{stage.gflops:8.1f} GFLOP/s"
            kernels = ", ".join(f"{name or 'itself'} {ms:.3f}" for name, ms in stage.kernels.items())
            print(f"    {result.name} {stage.direction:9}{stage.milliseconds:8.3f} ms {rate} {stage.stage} ({kernels})")


def main() -> int:
    """Run the cases; a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="run cases with one of these in their names")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.15, help="of a slice, of one step at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="also print the stages of a step")
    options = parser.parse_args()
    contenders, absent = assemble([*OURS.values(), *PEERS], options.threads)
    for reason in absent.values():
        print(reason, file=sys.stderr)
    found: list[Line] = []
    for case, (build, batch) in CASES.items():
        if options.words and not any(word in case for word in options.words):
            continue
        workload = Workload(build(), batch)
        report = bench(workload, contenders, options.rounds, options.seconds, profiled=options.profile)
        fresh = lines(case, report)
        found += fresh
        for line in fresh:
            print(f"{line.case:52}{line.precision:6}{line.text}", flush=True)
        stages(report)
    slower = [line for line in found if line.ratio < 1]
    print(f"\n{'case':52}{'':6}{'times PyTorch':>14}")
    for line in sorted(found, key=lambda line: line.ratio):
        print(f"{line.case:52}{line.precision:6}{line.text}{'   SLOWER' if line in slower else ''}")
    print(f"{len(found)} comparisons, {len(slower)} slower than PyTorch")
    return 1 if slower or not found else 0


if __name__ == "__main__":
    sys.exit(main())
