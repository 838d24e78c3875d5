"""What convolutions on tiles, BatchNorm and dense layers hand on in bf16: cases, and checks for tests and mutants."""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from engine_cases import Case
from engine_checks import Step, adds_gradients, assert_near, executor_of, oracle_of, reuses_buffers, step_on
from jit_cases import empty_batch_has_no_gradient, poisoned
from numpy.typing import NDArray

from convolt.engines import JIT
from convolt.engines.jit import buffers, programs
from convolt.engines.jit.buffers import Buffer
from convolt.layers import BatchNorm2d, Conv2d, Dense, Flatten, LeakyReLU, MaxPool2d, ReLU, Residual
from convolt.model import Model
from convolt.params import ALIGNMENT, Params


def conv(channels: int, filters: int, stride=1, bias=True) -> Conv2d:
    """3x3, padded."""
    return Conv2d(channels, filters, 3, stride, padding=1, bias=bias)


@dataclass(frozen=True)
class Whole(Case):
    """A case of small whole numbers: sums of products are bf16 numbers, so that what is equal when rounded always was.

    Pools on tiles compare what is rounded (``half_pool``).
    """

    ties: bool = True

    def params(self) -> Params:
        """Whole numbers, most of them zero."""
        params, generator = Case.params(self), np.random.default_rng(7)
        for name, array in params.items():
            if name != "0.weight":  # the images
                array[...] = generator.choice([-1, 0, 1], array.shape, p=[0.06, 0.88, 0.06])
        return params


# Planes, direct and gathered rows, a stride, a maximum, a slope that the output decides, a gradient that is added.
CONVOLUTIONS = {
    case.name: case
    for case in (
        Whole("direct rows", (3, 12, 18), (conv(3, 32), ReLU(), conv(32, 64), ReLU(), MaxPool2d(2), conv(64, 20)), 5),
        Case("gathered rows", (4, 6, 7), (conv(4, 32), LeakyReLU(0.25), conv(32, 32), MaxPool2d(3), conv(32, 9)), 19),
        Case("rows behind the last pool", (3, 11, 12), (conv(3, 32), ReLU(), conv(32, 32), ReLU(), MaxPool2d(5)), 3),
        Case("output of a stride", (32, 9, 11), (conv(32, 64), ReLU(), conv(64, 33, 2), LeakyReLU(0.5)), 5),
        Case("a stride of few pixels", (32, 4, 5), (conv(32, 64), ReLU(), Conv2d(64, 20, 2, 2), LeakyReLU(0.5)), 18),
        Case("two readers", (32, 6, 6), (conv(32, 32), ReLU(), Residual((conv(32, 40),), (Conv2d(32, 40, 1),))), 3),
        Case("windows that overlap", (32, 9, 8), (conv(32, 32), ReLU(), MaxPool2d(3, 2), conv(32, 20)), 6),
        Whole("flattened", (32, 6, 12), (conv(32, 32), ReLU(), MaxPool2d(2), Flatten(), Dense(576, 40)), 35),
        Case(
            "flattened without a pool",
            (32, 4, 9),
            (conv(32, 32), LeakyReLU(0.5), Flatten(), Dense(1152, 32), Dense(32, 9)),
            33,
        ),
        Case("an odd number of pixels", (32, 5, 7), (conv(32, 32), ReLU(), Flatten(), Dense(1120, 24)), 5),
    )
}
_DOWN = (conv(32, 64, 2, bias=False), BatchNorm2d(64), ReLU(), conv(64, 64), BatchNorm2d(64))
NORMS = {
    case.name: case
    for case in (
        Case(
            "norms without activation",
            (32, 6, 9),
            (conv(32, 32), BatchNorm2d(32), conv(32, 64), BatchNorm2d(64), conv(64, 32, 2)),
            7,
        ),
        Case(
            "norm behind planes",
            (3, 8, 12),
            (conv(3, 20, bias=False), BatchNorm2d(20), ReLU(), conv(20, 32), BatchNorm2d(32)),
            5,
        ),
        Case(
            "norm and maximum",
            (32, 8, 10),
            (conv(32, 32), BatchNorm2d(32), ReLU(), MaxPool2d(2), conv(32, 32, bias=False), BatchNorm2d(32), ReLU()),
            19,
        ),
        Case(
            "norm with two readers",
            (32, 6, 6),
            (conv(32, 32), BatchNorm2d(32), ReLU(), Residual((conv(32, 40),), (Conv2d(32, 40, 1),))),
            3,
        ),
        Case(
            "norm of a maximum",
            (32, 6, 8),
            (conv(32, 40), MaxPool2d(2), BatchNorm2d(40), ReLU(), conv(40, 64), BatchNorm2d(64), conv(64, 20)),
            7,
        ),
        Case(
            "norm of windows that overlap",
            (32, 9, 8),
            (conv(32, 40), MaxPool2d(3, 2), BatchNorm2d(40), ReLU(), conv(40, 20)),
            6,
        ),
        Case(
            "a branch without norm",
            (32, 5, 6),
            (Residual((conv(32, 64), ReLU()), (Conv2d(32, 64, 1), BatchNorm2d(64))), ReLU(), conv(64, 20)),
            3,
        ),
        Case(
            "norms around groups",
            (32, 6, 7),
            (
                *(conv(32, 32), BatchNorm2d(32), ReLU()),
                *(Conv2d(32, 64, 3, padding=1, groups=4, bias=False), BatchNorm2d(64), ReLU(), conv(64, 20)),
            ),
            5,
        ),
        Case("norm flattened", (32, 4, 7), (conv(32, 32), BatchNorm2d(32), ReLU(), Flatten(), Dense(896, 24)), 6),
        Case(
            "residual of norms",
            (32, 6, 9),
            (Residual(_DOWN, (conv(32, 64, 2), BatchNorm2d(64))), ReLU(), conv(64, 32), BatchNorm2d(32)),
            6,
        ),
    )
}
HALF = CONVOLUTIONS | NORMS
#: The operations of each case whose output is bf16; layer 0 makes the images of weights.
KEPT = {
    "direct rows": {"1-2 Conv2d+ReLU", "3-5 Conv2d+ReLU+MaxPool2d"},
    "gathered rows": {"1-2 Conv2d+LeakyReLU", "3-4 Conv2d+MaxPool2d"},
    "rows behind the last pool": {"1-2 Conv2d+ReLU"},
    "output of a stride": {"0 Conv2d", "1-2 Conv2d+ReLU"},
    "a stride of few pixels": {"0 Conv2d", "1-2 Conv2d+ReLU"},
    "two readers": {"0 Conv2d", "1-2 Conv2d+ReLU"},
    "windows that overlap": {"0 Conv2d", "1-3 Conv2d+ReLU+MaxPool2d"},
    "flattened": {"0 Conv2d", "1-3 Conv2d+ReLU+MaxPool2d"},
    "flattened without a pool": {"0 Conv2d", "1-2 Conv2d+LeakyReLU"},
    "an odd number of pixels": {"0 Conv2d"},
    "norms around groups": {
        *("0 Conv2d", "1 Conv2d", "2-3 BatchNorm2d+ReLU", "4 Conv2d", "5-6 BatchNorm2d+ReLU"),
    },
    "norm flattened": {"0 Conv2d", "1 Conv2d", "2-3 BatchNorm2d+ReLU"},
    "norms without activation": {"0 Conv2d", "1 Conv2d", "2 BatchNorm2d", "3 Conv2d", "4 BatchNorm2d"},
    "norm behind planes": {"1 Conv2d", "4 Conv2d"},
    "norm and maximum": {"0 Conv2d", "1 Conv2d", "2-4 BatchNorm2d+ReLU+MaxPool2d", "5 Conv2d"},
    "norm with two readers": {"0 Conv2d", "1 Conv2d", "2-3 BatchNorm2d+ReLU"},
    "norm of a maximum": {"0 Conv2d", "5 Conv2d", "6 BatchNorm2d"},
    "norm of windows that overlap": {"0 Conv2d"},
    "a branch without norm": {"0 Conv2d", "1.shortcut.0 Conv2d"},
    "residual of norms": {
        *("0 Conv2d", "1.body.0 Conv2d", "1.body.1-1.body.2 BatchNorm2d+ReLU", "1.body.3 Conv2d"),
        *("1.shortcut.0 Conv2d", "3 Conv2d"),
    },
}


@contextmanager
def guarded() -> Iterator[None]:
    """Behind every buffer that has a place of its own lies a page that cannot be read: who does ends the process."""
    held: list[mmap.mmap] = []

    def allocate(buffer: Buffer) -> NDArray[Any]:
        if buffer.array is None:
            count = buffer.size + buffers.SLACK
            size = -(-count * np.dtype(buffer.dtype).itemsize // ALIGNMENT) * ALIGNMENT
            pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
            held.append(memory)
            whole = np.frombuffer(memory, np.uint8)
            guard = ctypes.c_void_p(whole.ctypes.data + pages)
            assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
            buffer.array = whole[pages - size : pages].view(buffer.dtype)[:count]
        return buffer.array

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Buffer, "allocate", allocate)
        yield


def step_of(case: Case, engine: JIT, half: bool = True, bare: bool = False) -> Step:
    """A step; half: as it is, or with all images in float32. bare: as a first layer, which may read planes."""
    with pytest.MonkeyPatch.context() as patch:
        if not half:
            patch.setattr(programs, "keep_half", lambda plan, tensor: None)
        model, params, x = _of(case, bare)
        executor = executor_of(engine, "bf16", model, params)
        step = step_on(executor, x, case.slopes(), case.rng)
        executor.close()
    return step


def _of(case: Case, bare: bool) -> tuple[Model, Params, NDArray[Any]]:
    if not bare:
        return case.model, case.params(), case.deltas
    params, full = Params(case.bare, np.float64), case.params().state_dict()
    params.load_state_dict({name: array for name, array in full.items() if name != "0.weight"})
    return case.bare, params, case.images()


def has_the_bits_of(got: Step, want: Step) -> None:
    """Of everything."""
    for name in ("outputs", "prediction", "gradient"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)


def equals_float32(case: Case, unit: str, bare: bool) -> None:
    """Convolutions and dense layers round what they read: whether it was rounded before makes no difference.

    But to biases, whose gradient is a sum of slopes, and behind a LeakyReLU whose slope is no power of two. What
    BatchNorm reads has a rounding of 2^-9 more; a ReLU or a maximum that changes its mind weighs more.
    """
    slack = 2**-6 if "without activation" in case.name else 2**-3
    got, want = (step_of(case, JIT(threads=2, unit=unit), half, bare) for half in (True, False))
    np.testing.assert_array_equal(got.prediction, want.prediction)
    model, params, x = _of(case, bare)
    if case.name in CONVOLUTIONS:
        np.testing.assert_array_equal(got.outputs, want.outputs, "outputs")
        for name, part in params.slices.items():
            if not name.endswith("bias"):
                np.testing.assert_array_equal(got.gradient[part], want.gradient[part], name)
    for other in (want, oracle_of(model, params, x, case.slopes(), case.rng)):
        assert_near(got.outputs, other.outputs, 2**-6, "outputs")
        assert_near(got.gradient, other.gradient, slack, "gradient")


def reads_what_was_written(case: Case, unit: str) -> None:
    """Memory that has not been written, or was by a larger batch, is not looked at; gradients are added."""
    engine = JIT(threads=2, unit=unit)
    want = step_of(case, engine)
    with poisoned():
        has_the_bits_of(step_of(case, engine), want)
    with guarded():
        step_of(case, engine)
    reuses_buffers(engine, "bf16", case)
    adds_gradients(engine, "bf16", case)
    if case.name in CONVOLUTIONS:
        empty_batch_has_no_gradient("bf16", case, unit)
