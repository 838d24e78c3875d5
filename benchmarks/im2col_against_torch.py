"""Training steps of the im2col engine against PyTorch eager in float32, both seed networks, in one process.

    python benchmarks/im2col_against_torch.py [rounds] [threads]

The two take turns; a round is five steps of each. Printed: images/s in the median and in the fastest round. On a busy
machine compare the fastest ones: PyTorch's threads wait for each other in a spin, and with more of them than free cores
it becomes ten times slower than it is. The peer is a plain ``torch.nn`` network with PyTorch's fused Adam, as one would
write it; both get the same uint8 images, and labels that change from step to step, so that gradients stay of a size.
"""

import sys
from itertools import count
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import nn

import convolt as cv

BATCH, STEPS, WARM_UP = 128, 5, 3


def main(rounds: int = 20, threads: int = 2) -> None:
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
        given = torch.from_numpy(images)

        def ours(labels: np.ndarray, executor=executor, images=images) -> None:
            executor.train_step(images, labels, cv.CrossEntropy(), 1 / BATCH, cv.Adam(lr=1e-3))

        def theirs(labels: np.ndarray, net=net, optimizer=optimizer, given=given) -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(given.float() / 255), torch.from_numpy(labels)).backward()
            optimizer.step()

        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        number = count()
        for turn in range(WARM_UP + rounds):
            for key, step in (("ours", ours), ("theirs", theirs)):
                began = perf_counter()
                for _ in range(STEPS):
                    step(np.roll(labels, next(number)))
                if turn >= WARM_UP:
                    seconds[key].append((perf_counter() - began) / STEPS)
        for kind, pick in (("median", median), ("fastest", min)):
            us, them = (BATCH / pick(seconds[key]) for key in ("ours", "theirs"))
            print(f"{name}, {threads} threads, {kind} of {rounds}: {us:,.0f}, torch {them:,.0f}, ratio {us / them:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
