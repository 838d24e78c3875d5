"""Softmax and cross-entropy inside the step, for labels; other losses run on the host between two programs."""

from collections.abc import Callable
from typing import Any

import numpy as np

from convolt.engines.jit.kernels.loss_specs import (
    FINDINGS,
    LOSS,
    MOVED,
    NOT_FINITE,
    RIGHT,
    SAFE,
    UNBOUNDED,
    UNLABELED,
    VERDICT,
    WRONG_LABELS,
    LossSpec,
)
from convolt.engines.jit.kernels.specs import FLOAT
from convolt.engines.jit.memory import view

DOUBLE = 8


def cross_entropy(spec: LossSpec) -> Callable[..., None]:
    """Loss and its gradient: ``q = (1 - smoothing) onehot + smoothing/C``, ``dz = scale (softmax(z) - q)``.

    Arguments: state, logits, labels (int64), dlogits, findings (float64, see ``loss_specs``), scale (float64). Numbers
    that are no labels are counted, and what comes of them is for nobody to use. Samples behind the end of the batch get
    no gradient. One chunk. The same as ``convolt.losses.CrossEntropy``, and as ``convolt.metrics.correct`` where the
    loss is finite.
    """
    N, C = spec.N, spec.classes
    smooth, certain = spec.label_smoothing / C, 1.0 - spec.label_smoothing

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        count = view(arguments[0], (1,), np.int64)[0]
        labels = view(arguments[2], (N,), np.int64)
        scale = np.float32(view(arguments[5], (1,), np.float64)[0])
        total, right, wrong = 0.0, 0, 0
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
            wrong += labels[n] < 0 or labels[n] >= C
            exps = np.float32(0)
            for c in range(C):
                dz[c] = np.exp(z[c] - top)
                exps += dz[c]
            log_sum = np.log(exps)
            for c in range(C):
                q = np.float32(smooth + (certain if c == labels[n] else 0.0))
                total -= np.float64(q * (z[c] - top - log_sum)) if q > np.float32(0) else 0.0
                dz[c] = scale * (dz[c] / exps - q)
        found = view(arguments[4], (FINDINGS,), np.float64)
        found[LOSS], found[RIGHT], found[WRONG_LABELS] = total, right, wrong

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


def look(spec: LossSpec) -> Callable[..., None]:
    """The verdict on a step before anything is moved; unless it is ``MOVED`` the program ends here.

    Loss, gradient and running statistics must be finite, and labels be labels. Of a gradient that is made in the
    optimizer's pass a bound is looked at, samples times largest input times largest slope.
    Arguments: state, findings (float64), sums of squares (float64), how many, statistics, how many, operands of such
    gradients (int64 rows: samples, address of the largest inputs and, last, the largest slope, how many), how many, the
    word that ends the program.
    """

    def kernel(arguments: Any, chunk: int, thread: int) -> None:
        found, squares = view(arguments[1], (FINDINGS,), np.float64), view(arguments[2], (arguments[3],), np.float64)
        statistics = view(arguments[4], (arguments[5],), np.float32)
        rows = view(arguments[6], (arguments[7], 3), np.int64)
        sound, bounded, total = True, True, found[LOSS]
        for i in range(len(squares)):
            total += squares[i]
        for i in range(len(statistics)):
            if not np.isfinite(statistics[i]):
                sound = False
        for i in range(len(rows)):
            peaks, last = view(rows[i, 1], (rows[i, 2],), np.float32), rows[i, 2] - 1
            for j in range(last):  # a NaN is no bound
                if not np.float64(rows[i, 0]) * np.float64(peaks[j]) * np.float64(peaks[last]) < SAFE:
                    bounded = False
        verdict = MOVED if bounded else UNBOUNDED
        if not (sound and np.isfinite(total)):
            verdict = NOT_FINITE
        if found[WRONG_LABELS] > 0:
            verdict = UNLABELED
        found[VERDICT] = verdict
        view(arguments[8], (1,), np.int64)[0] = verdict != MOVED

    return kernel
