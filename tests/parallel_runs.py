"""A program for several ranks: the runs that tests/test_parallel.py compares with those of one process.

    mpiexec -n 3 python -m mpi4py tests/parallel_runs.py FOLDER SUITE

Rank 0 writes FOLDER/curves.json: for each case the loss of every step and what the epochs measured. Every rank checks
that its weights, statistics and optimizer state are those of rank 0, bit by bit.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from small_runs import BATCH, CLASSES, MODEL, SIZE, dataset

from convolt.augment import Flip, Mixup
from convolt.callbacks import Callback, StepEvent
from convolt.comms import Communicator, texts
from convolt.comms.mpi import Mpi
from convolt.engines import engine_class
from convolt.layers import Conv2d, Dense, Dropout, Flatten, MaxPool2d, ReLU
from convolt.model import Model
from convolt.optimizers import EMA, SGD, Adam, AdamW, RMSprop
from convolt.parallel import Parallel
from convolt.recipe import Recipe
from convolt.train import fit

PLAIN = Model(
    (1, SIZE, SIZE),
    (
        Conv2d(1, 4, 3, padding=1),
        ReLU(),
        MaxPool2d(2),
        Flatten(),
        Dropout(0.25),
        Dense(4 * SIZE * SIZE // 4, CLASSES),
    ),
)
EPOCHS = 9  # of 6 steps: 54 of them
OPTIMIZERS = {
    "sgd": SGD(lr=0.05),
    "nesterov": SGD(lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": Adam(lr=3e-3),
    "adamw": AdamW(lr=3e-3, decay_norm_and_bias=False),
    "rmsprop": RMSprop(lr=1e-3, momentum=0.5, centered=True),
}


@dataclass(frozen=True)
class Case:
    """A run: engine, recipe, model, and what ranks do together."""

    engine: str = "im2col"
    recipe: Recipe = field(default_factory=Recipe)
    model: Model = PLAIN
    parallel: Parallel = field(default_factory=Parallel)
    through_memory: bool = True


def recipe(optimizer: str = "nesterov", precision: str = "fp64", **changes: Any) -> Recipe:
    return Recipe(
        **{"epochs": EPOCHS, "batch_size": BATCH, "seed": 3, "optimizer": OPTIMIZERS[optimizer], "precision": precision}
        | changes
    )


SHARDED, WHOLE = Parallel(shard_optimizer=True), Parallel(shard_optimizer=False)
SYNCED = Parallel(sync_batch_norm=True)
QUICK = {
    **{f"im2col {name}": Case(recipe=recipe(name)) for name in OPTIMIZERS},
    "im2col fp32": Case(recipe=recipe(precision="fp32"), parallel=WHOLE),
    "im2col master64 sharded": Case(recipe=recipe("adam", "fp32-master64"), parallel=SHARDED),
    "im2col clipped": Case(recipe=recipe(clip_norm=0.5, clip_value=0.1), parallel=WHOLE),
    "im2col sharded, clipped": Case(recipe=recipe("adamw", clip_norm=0.5, clip_value=0.1), parallel=SHARDED),
    "im2col messages": Case(recipe=recipe("adam"), parallel=WHOLE, through_memory=False),
    "im2col messages, sharded": Case(recipe=recipe("adam"), parallel=SHARDED, through_memory=False),
    "im2col no overlap": Case(recipe=recipe("adam"), parallel=Parallel(overlap=False)),
    "im2col micro-batches": Case(recipe=recipe(micro_batch_size=3, augment=(Flip(), Mixup())), parallel=WHOLE),
    "im2col tiny batches": Case(recipe=recipe(batch_size=3, epochs=2)),
    "im2col average": Case(recipe=recipe(ema=EMA(0.9, every="2ba")), parallel=SHARDED),
    # Not Adam: the gradient of a bias in front of BatchNorm is zero but for rounding, which Adam would blow up.
    "im2col synced": Case(recipe=recipe(), model=MODEL, parallel=SYNCED),
    "im2col synced, tiny batches": Case(recipe=recipe(batch_size=3, epochs=2), model=MODEL, parallel=SYNCED),
    "loops synced": Case("loops", recipe(epochs=1), MODEL, SYNCED),
    "loops": Case("loops", recipe(epochs=1)),
    "jit adam": Case("jit", recipe("adam", "fp32"), parallel=WHOLE),
    "jit by itself": Case("jit", recipe("adam", "fp32")),
    "jit sharded": Case("jit", recipe("rmsprop", "fp32"), parallel=SHARDED),
    "jit synced": Case("jit", recipe("nesterov", "fp32"), MODEL, SYNCED),
    "jit synced, tiny batches": Case("jit", recipe(precision="fp32", batch_size=3, epochs=1), MODEL, SYNCED),
}
TORCH = {
    "torch": Case("torch", recipe("adam"), parallel=WHOLE),
    "torch sharded": Case("torch", recipe("adamw"), parallel=SHARDED),
    "torch synced": Case("torch", recipe(), MODEL, SYNCED),
    "torch synced, tiny batches": Case("torch", recipe(batch_size=3, epochs=1), MODEL, SYNCED),
}
PRECISIONS = {"loops": ("fp64",), "im2col": ("fp32", "fp64"), "jit": ("fp32",), "torch": ("fp32", "fp64")}
# Every batch has uneven parts on three ranks, the last one of an epoch on any number; half of the runs accumulate.
EVERY = {
    f"{engine} {name} {precision}, {'sharded' if sharded else 'micro-batches'}": Case(
        engine,
        recipe(name, precision, epochs=EPOCHS if engine != "loops" else 2, micro_batch_size=None if sharded else 3),
        parallel=SHARDED if sharded else WHOLE,
    )
    for engine, precisions in PRECISIONS.items()
    for precision in precisions
    for name in OPTIMIZERS
    for sharded in (False, True)
}
# What is not the serial curve, and must only be the same on all ranks.
OWN = {
    "averaged statistics": Case(recipe=recipe("adam"), model=MODEL),
    "averaged statistics, jit": Case("jit", recipe("adam", "fp32"), MODEL),
    "averaged statistics, tiny batches": Case(recipe=recipe(batch_size=5, epochs=2), model=MODEL),
    "local": Case(recipe=recipe("nesterov"), parallel=Parallel(local_steps=4)),
    "local, tiny batches": Case(recipe=recipe("adam", batch_size=3, epochs=2), parallel=Parallel(local_steps=3)),
    "bf16 wire": Case(recipe=recipe("adam", "fp32"), parallel=Parallel(wire="bf16")),
    "bf16 wire, sharded": Case(recipe=recipe("adam", "fp32"), parallel=Parallel(wire="bf16", shard_optimizer=True)),
}
SUITES = {"quick": QUICK, "torch": TORCH, "every": EVERY, "own": OWN}


class Losses(Callback):
    """The mean loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step(self, step: StepEvent) -> None:
        self.values.append(step.loss)


def curve(case: Case, folder: Path, comm: Communicator) -> dict[str, Any]:
    """The run of a case; its curve."""
    losses = Losses()
    run = fit(
        case.model,
        dataset(),
        case.recipe,
        engine=engine_class(case.engine)(threads=1),
        comm=comm,
        parallel=case.parallel,
        out=folder,
        callbacks=(losses,),
    )
    assert run.result is not None
    if comm.size > 1:
        held = hashlib.sha256(b"".join(array.tobytes() for array in run.params.state_dict().values())).hexdigest()
        assert len(set(texts(comm, held + str(losses.values)))) == 1, f"{folder.name}: ranks differ"
    return {
        "losses": losses.values,
        "valid": [epoch.valid_loss for epoch in run.history],
        "accuracy": [epoch.train_accuracy for epoch in run.history],
        "test": run.result["test_loss"],
    }


def curves(suite: str, folder: Path, comm: Communicator, messages: Communicator) -> dict[str, Any]:
    """All cases of a suite."""
    found = {}
    for name, case in SUITES[suite].items():
        chosen = comm if case.through_memory else messages
        found[name] = curve(case, folder / name.replace(" ", "-"), chosen)
    return found


if __name__ == "__main__":
    here = Path(sys.argv[1])
    ranks = Mpi()
    result = curves(sys.argv[2], here, ranks, Mpi(through_memory=False))
    if ranks.rank == 0:
        (here / "curves.json").write_text(json.dumps(result))
