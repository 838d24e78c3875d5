"""Training steps of the im2col engine against PyTorch eager in float32, both seed networks, in one process.

    python benchmarks/im2col_against_torch.py [rounds]

The two take turns, so that a busy machine slows both; a round is five steps of each. Printed: the medians of images/s
over all rounds, and the median and range of the ratio within a round. The peer is a plain ``torch.nn`` network with
PyTorch's fused Adam, as one would write it; both get the same uint8 images.
"""

import sys
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import nn

import convolt as cv

BATCH, STEPS, WARM_UP = 128, 5, 3


def main(rounds: int, threads: int = 2) -> None:
    """Measure and print one line for each network."""
    torch.set_num_threads(threads)
    for name, shape in (("mnist-cnn", (1, 28, 28)), ("cifar-cnn", (3, 32, 32))):
        model = cv.zoo.build(name, shape, 10)
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (BATCH, *shape), dtype=np.uint8)
        labels = generator.integers(0, 10, BATCH)

        executor = cv.engines.Im2col(threads=threads).executor(model, None, cv.Recipe())
        net = cv.to_torch(model, executor.params)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
        given, targets = torch.from_numpy(images), torch.from_numpy(labels)

        def ours(executor=executor, images=images, labels=labels) -> None:
            executor.train_step(images, labels, cv.CrossEntropy(), 1 / BATCH, cv.Adam(lr=1e-3))

        def theirs(net=net, optimizer=optimizer, given=given, targets=targets) -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(given.float() / 255), targets).backward()
            optimizer.step()

        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for turn in range(WARM_UP + rounds):
            for key, step in (("ours", ours), ("theirs", theirs)):
                began = perf_counter()
                for _ in range(STEPS):
                    step()
                if turn >= WARM_UP:
                    seconds[key].append((perf_counter() - began) / STEPS)
        ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
        print(
            f"{name}: im2col {BATCH / median(seconds['ours']):,.0f} images/s, torch"
            f" {BATCH / median(seconds['theirs']):,.0f} images/s, ratio {median(ratios):.2f}"
            f" ({ratios[0]:.2f} to {ratios[-1]:.2f}, {rounds} rounds, {threads} threads)"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
