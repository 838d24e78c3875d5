"""Runs of seconds for the tests of training: a small data set, a network with everything in it, recipes of all kinds.

Also a module that fresh processes import, to be killed in the middle of ``fit``.
"""

import hashlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convolt.augment import Crop, Flip, Mixup
from convolt.callbacks import Callback, StepEvent
from convolt.data import Dataset
from convolt.early_stopping import EarlyStopping
from convolt.engines import engine_class
from convolt.layers import BatchNorm2d, Conv2d, Dense, Dropout, Flatten, MaxPool2d, ReLU, Residual
from convolt.loader import Batch, Loader
from convolt.losses import CrossEntropy
from convolt.model import Model
from convolt.optimizers import EMA, SGD, Adam, AdamW, RMSprop
from convolt.recipe import Recipe
from convolt.run import Run
from convolt.schedules import Cosine, Linear, OneCycle, Plateau, Step, Warmup
from convolt.train import fit

CLASSES, SIZE = 3, 8
BATCH, STEPS_PER_EPOCH, EPOCHS = 16, 6, 3
STEPS = STEPS_PER_EPOCH * EPOCHS

MODEL = Model(
    (1, SIZE, SIZE),
    (
        Conv2d(1, 4, 3, padding=1),
        BatchNorm2d(4),
        ReLU(),
        Residual((Conv2d(4, 4, 3, padding=1), BatchNorm2d(4))),
        MaxPool2d(2),
        Flatten(),
        Dropout(0.25),
        Dense(4 * SIZE * SIZE // 4, CLASSES),
    ),
)
#: Without statistics and masks, which the host would look after between two steps.
PLAIN = Model((1, SIZE, SIZE), (Conv2d(1, 4, 3, padding=1), ReLU(), Flatten(), Dense(4 * SIZE * SIZE, CLASSES)))


def dataset(dtype: type = np.uint8) -> Dataset:
    """Noise with a brighter band for each class; 92 training images, so that the last batch of an epoch is short."""
    generator = np.random.default_rng(0)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % CLASSES
        images = generator.integers(0, 160, (count, 1, SIZE, SIZE), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 2 * label : 2 * label + 2] += 60
        return images if dtype is np.uint8 else (images / 255).astype(dtype), labels

    train, valid, test = split(STEPS_PER_EPOCH * BATCH - 4), split(40), split(40)
    return Dataset.from_arrays(*train, valid=valid, test=test, name="bands")


def spoil_images(monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], value: float) -> None:
    """From now on a pixel of the first image of these steps, counted from 0, has this value."""
    batches = Loader.batches

    def spoiled(loader: Loader, first: int, count: int) -> list[Batch]:
        made = batches(loader, first, count)
        for step, batch in enumerate(made, first):
            if step in steps:
                batch.images[0, 0, 3, 3] = value
        return made

    monkeypatch.setattr(Loader, "batches", spoiled)


@dataclass(frozen=True)
class Case:
    """An engine, a recipe and a network."""

    engine: str
    recipe: Recipe
    threads: int = 1
    model: Model = MODEL


def _recipe(**changes: Any) -> Recipe:
    return Recipe(**{"epochs": EPOCHS, "batch_size": BATCH, "seed": 3, **changes})


CASES = {
    "momentum-cosine-augment-accumulate": Case(
        "im2col",
        _recipe(
            optimizer=SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
            schedule=Cosine(eta_min=1e-3),
            augment=(Flip(), Crop(1)),
            micro_batch_size=6,
            clip_norm=1.0,
        ),
    ),
    "adam-plateau-ema-early-stopping": Case(
        "im2col",
        _recipe(
            optimizer=Adam(lr=3e-3),
            schedule=Plateau(patience=0, threshold=0.5),
            ema=EMA(0.8, every="2ba"),
            early_stopping=EarlyStopping(patience=2, min_delta=0.5),
            dropout_from="1ep",
        ),
    ),
    "rmsprop-onecycle-mixup-momentum": Case(
        "im2col",
        _recipe(
            optimizer=RMSprop(lr=1e-3, momentum=0.5, centered=True),
            schedule=OneCycle(max_lr=5e-3),
            schedules={"momentum": Linear(1.0, 0.5)},
            augment=(Mixup(),),
            precision="fp32-master64",
        ),
    ),
    "jit-adam-plateau-augment": Case(
        "jit",
        _recipe(optimizer=Adam(lr=3e-3), schedule=Plateau(patience=0, threshold=0.5), augment=(Flip(), Crop(1))),
        threads=2,
    ),
    "jit-several-steps-in-one-call": Case(
        "jit", _recipe(optimizer=Adam(lr=3e-3), schedule=Cosine(), epochs=EPOCHS + 1), threads=2, model=PLAIN
    ),
    "torch-adamw-warmup-ema": Case(
        "torch",
        _recipe(optimizer=AdamW(lr=3e-3), schedule=Warmup("4ba", then=Cosine()), ema=EMA(0.9), augment=(Flip(),)),
    ),
    "torch-sgd-step-accumulate-smoothing": Case(
        "torch",
        _recipe(
            optimizer=SGD(lr=0.05, momentum=0.9),
            schedule=Step("1ep", 0.5),
            micro_batch_size=10,
            clip_value=0.5,
            loss=CrossEntropy(label_smoothing=0.1),
            early_stopping=EarlyStopping(patience=5, monitor="valid_accuracy"),
        ),
    ),
}


def start(name: str, folder: Path, *callbacks: Callback, checkpoint_every: str = "4ba") -> Run:
    """Begin the run of a case, or go on with it if its folder is there."""
    case = CASES[name]
    return fit(
        case.model,
        dataset(),
        case.recipe,
        engine=engine_class(case.engine)(threads=case.threads),
        out=folder,
        resume=(folder / "run.json").exists(),
        checkpoint_every=checkpoint_every,
        callbacks=callbacks,
    )


class SignalAt(Callback):
    """Sends this process a signal after a step."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_step(self, step: StepEvent) -> None:
        if step.step == self.step:
            os.kill(os.getpid(), self.number)


def start_and_die_after_step(name: str, folder: Path, step: int) -> None:
    """What kill -9 does between two steps."""
    start(name, folder, SignalAt(step, signal.SIGKILL))


class DieAfterCalls(Callback):
    """Kills this process after so many calls of functions, counted from its first step (which imports a lot)."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def on_step(self, step: StepEvent) -> None:
        sys.setprofile(self._count)

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def start_and_die_after_calls(name: str, folder: Path, calls: int) -> None:
    """What kill -9 does anywhere: in a step, in validation, in the middle of a save."""
    start(name, folder, DieAfterCalls(calls))


def fingerprint(folder: Path) -> dict[str, Any]:
    """All that interruptions must not change: hashes of the shipped weights and of the last checkpoint, the history."""
    run = Run.load(folder)
    last = run.checkpoints.load("last")
    state = {key: value for key, value in last.state.items() if key not in ("seconds", "total_seconds", "run")}
    assert run.result is not None
    measured = ("test_accuracy", "test_loss", "epochs", "weights")
    return {
        "shipped": digest(run.params.state_dict()),
        "model": digest(last.model),
        "optimizer": digest(last.optimizer),
        "state": state,
        "best": run.checkpoints.best_step,
        "history": [(epoch.train_loss, epoch.valid_loss, epoch.valid_accuracy, epoch.lr) for epoch in run.history],
        "result": [run.result[name] for name in measured],
    }


def digest(arrays: dict[str, np.ndarray]) -> str:
    """sha256 of names and bits."""
    sha = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        sha.update(name.encode() + array.tobytes())
    return sha.hexdigest()
