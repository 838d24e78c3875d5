"""Softmax and cross-entropy inside the step, for labels; other losses run on the host between two programs."""

from collections.abc import Callable
from typing import Any

import numpy as np

from convolt.engines.jit.kernels.specs import FLOAT, LossSpec
from convolt.engines.jit.memory import view

DOUBLE = 8


def cross_entropy(spec: LossSpec) -> Callable[..., None]:
    """Loss and its gradient: ``q = (1 - smoothing) onehot + smoothing/C``, ``dz = scale (softmax(z) - q)``.

    Arguments: state, logits, labels (int64), dlogits, loss and how many logits name their label (float64), scale
    (float64). Samples behind the end of the batch get no gradient. One chunk. The same as
    ``convolt.losses.CrossEntropy``, and as ``convolt.metrics.correct`` where the loss is finite.
    """
    N, C = spec.N, spec.classes
    smooth, certain = spec.label_smoothing / C, 1.0 - spec.label_smoothing

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        labels = view(arguments[2], (N,), np.int64)
        scale = np.float32(view(arguments[5], (1,), np.float64)[0])
        total, right = 0.0, 0
        for n in range(N):
            z = view(arguments[1] + FLOAT * n * C, (C,), np.float32)
            dz = view(arguments[3] + FLOAT * n * C, (C,), np.float32)
            if n >= count:
                dz[:] = np.float32(0)
                continue
            top, best = z[0], 0
            for c in range(C):
                if z[c] > top:
                    top, best = z[c], c
            right += best == labels[n]
            exps = np.float32(0)
            for c in range(C):
                dz[c] = np.exp(z[c] - top)
                exps += dz[c]
            log_sum = np.log(exps)
            for c in range(C):
                q = np.float32(smooth + (certain if c == labels[n] else 0.0))
                total -= np.float64(q * (z[c] - top - log_sum)) if q > np.float32(0) else 0.0
                dz[c] = scale * (dz[c] / exps - q)
        found = view(arguments[4], (2,), np.float64)
        found[0], found[1] = total, right

    return kernel


def square_sum(spec: LossSpec) -> Callable[..., None]:
    """The sum of squares of a run of the gradient: arguments: state, g, sums (float64), runs as ``weights.update``.

    A chunk is a run; not finite as soon as one element is not.
    """

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        run = view(arguments[3] + 3 * DOUBLE * chunk, (3,), np.int64)
        g = view(arguments[1] + FLOAT * run[0], (run[1] - run[0],), np.float32)
        total = np.float32(0)
        for i in range(len(g)):
            total += g[i] * g[i]
        view(arguments[2] + DOUBLE * chunk, (1,), np.float64)[0] = np.float64(total)

    return kernel
