"""What the jit engine's planner finds: fusions, phases, and where memory is used again."""

from itertools import product

import numpy as np
import pytest
from engine_cases import CASES
from engine_checks import assert_near
from jit_cases import TILES

from convolt import zoo
from convolt.engines import JIT
from convolt.engines.jit.buffers import SCRATCH, Address
from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.graph import operations
from convolt.engines.jit.isa import FP32, Units, detect
from convolt.engines.jit.phases import Task, grouped, without_calls
from convolt.engines.jit.programs import Programs
from convolt.errors import EngineError
from convolt.layers import AvgPool2d, BatchNorm2d, Conv2d, Flatten, LeakyReLU, MaxPool2d, ReLU, Residual
from convolt.losses import MSE
from convolt.model import Model
from convolt.params import Params
from convolt.recipe import Recipe


def labels(model: Model, training: bool) -> list[str]:
    return [operation.label for operation in operations(model, training)[1]]


def test_fusions_in_training():
    assert labels(zoo.resnet9(), training=True)[:7] == [
        "0 Conv2d",
        "1-2 BatchNorm2d+ReLU",
        "3 Conv2d",
        "4-6 BatchNorm2d+ReLU+MaxPool2d",
        "7.body.0 Conv2d",
        "7.body.1-7.body.2 BatchNorm2d+ReLU",
        "7.body.3 Conv2d",
    ]
    found = labels(zoo.resnet18(), training=True)
    assert "3.body.4-4 BatchNorm2d+Add+ReLU" in found
    assert "7.shortcut.1-8 BatchNorm2d+Add+ReLU" in found
    assert not any(label.partition(" ")[2] == "Add" for label in found)


def test_fusions_in_prediction():
    assert labels(zoo.resnet9(), training=False)[:2] == [
        "0-2 Conv2d+BatchNorm2d+ReLU",
        "3-6 Conv2d+BatchNorm2d+ReLU+MaxPool2d",
    ]


@pytest.mark.parametrize(
    "behind",
    [
        (LeakyReLU(0.1), MaxPool2d(2)),  # its code of a dead ReLU says nothing
        (ReLU(), MaxPool2d(3, 2)),  # windows overlap
        (ReLU(), MaxPool2d((2, 3))),  # a column is left over
        (ReLU(), AvgPool2d(2)),
    ],
)
def test_pools_that_join_no_norm(behind):
    model = Model((2, 4, 4), (Conv2d(2, 3, 1), BatchNorm2d(3), *behind))
    assert len(operations(model, training=True)[1]) == 3


def test_two_readers_prevent_a_fusion():
    model = Model((2, 4, 4), (Conv2d(2, 2, 1), BatchNorm2d(2), Residual((ReLU(),))))
    assert labels(model, training=True)[:2] == ["0 Conv2d", "1 BatchNorm2d"]


class Tanh(ReLU):
    """A layer that the engine does not know."""


def test_an_unknown_layer_is_named():
    with pytest.raises(EngineError, match="layer 0: engine jit has no kernel for Tanh"):
        JIT(threads=1).explain(Model((2, 4, 4), (Tanh(), Flatten())))


# Kernels that write an image in the place of another, or a sum in that of one of its terms, when that is read last.
IN_PLACE = {
    *("conv:conv_backward", "winograd:backward", "normalization:normalize_backward"),
    *("tiles_backward:conv_backward", "tiles_shifted:conv_backward", "planes:conv_backward"),
    *("images:add", "images:add_backward"),
}


@pytest.mark.parametrize("units", [FP32, Units("dot", "dot"), Units("amx", "amx")], ids=str)
def test_no_memory_has_two_meanings_in_a_kernel(units):
    found, compiler = set(), Compiler(detect())
    for case, training in product((*CASES, *TILES.values()), (False, True)):
        model, grads = case.model, Params(case.model) if training else None
        programs = Programs(model, Params(model), grads, case.batch, True, units, detect(), 2, compiler)
        tasks = [*programs.forward_tasks]
        tasks += [task for task, _ in programs.backward_tasks(accumulate=False)] if training else []
        for task in without_calls(tasks):
            given = [one for one in task.arguments[1:] if one]
            kept = [one for one in given if not (isinstance(one, Address) and one.buffer.name == SCRATCH)]
            if len(set(kept)) < len(kept):
                found.add(task.factory)
    assert found <= IN_PLACE


def image(name: str, *addresses: int, chunks: int = 4) -> Task:
    return Task(name, "", None, (1, *addresses), chunks, by_image=True)


def whole(name: str, *addresses: int) -> Task:
    return Task(name, "", None, (1, *addresses), 2)


def names(tasks: list[Task]) -> list[list[str]]:
    return [[task.label for task in group] for group in grouped(tasks)]


def test_what_stands_between_tasks_by_image_makes_way():
    x, y, z, w, packed, parts, dw = range(10, 17)
    tasks = [
        image("a", x, y),
        whole("pack", w, packed),
        image("b", y, packed, parts),
        whole("dw", parts, dw),
        image("c", y, z),
    ]
    assert names(tasks) == [["pack"], ["a", "b", "c"], ["dw"]]


def test_a_barrier_stays_where_it_is():
    x, sums, constants, y = range(10, 14)
    assert names([image("sums", x, sums), whole("fold", sums, constants), image("apply", x, constants, y)]) == [
        ["sums"],
        ["fold"],
        ["apply"],
    ]
    assert names([image("a", x), whole("b", y), whole("c", sums), image("d", sums)]) == [["c"], ["a", "d"], ["b"]]
    assert names([image("a", x), whole("b", x, y), whole("c", y, sums), image("d", sums)]) == [
        ["a"],
        ["b"],
        ["c"],
        ["d"],
    ]
    assert names([image("a", x), image("b", x, chunks=5)]) == [["a"], ["b"]]


def test_variance_far_from_zero():
    """A thousand deviations from zero, the statistics are those of float64."""
    x = np.random.default_rng(0).normal(1000, 1, (5, 3, 7, 6)).astype(np.float32)
    model = Model(x.shape[1:], (BatchNorm2d(3, momentum=1.0), Flatten()))
    executor = JIT(threads=2).executor(model, Params.init(model, seed=0), Recipe())
    executor.loss_and_grads(x, np.zeros(x.shape[:1] + model.output_shape), MSE(), 1.0)
    exact = x.astype(np.float64)
    assert_near(executor.params.buffers["0.running_mean"], exact.mean((0, 2, 3)), 1e-6, "mean")
    assert_near(executor.params.buffers["0.running_var"], exact.var((0, 2, 3), ddof=1), 1e-5, "variance")
    executor.close()
