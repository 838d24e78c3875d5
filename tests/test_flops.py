"""FLOPs of a training step, by layer."""

from convolt import zoo
from convolt.flops import layer_work, training_flops
from convolt.layers import BatchNorm2d, Conv2d, Normalize, ReLU, Residual
from convolt.model import Model


def test_flops_of_a_training_step():
    """mnist-cnn by hand: the first convolution has no dx, the dense layers have."""
    conv, relu, pool = 28 * 28 * 32 * (2 * 25 + 1), 28 * 28 * 32, 14 * 14 * 32 * 4
    dense = 128 * (2 * 6272 + 1), 128, 10 * (2 * 128 + 1)
    model = zoo.build("mnist-cnn", (1, 28, 28), 10)
    works = {work.name: work for work in layer_work(model)}
    assert (works["0"].forward_flops, works["0"].backward_flops) == (conv, conv)
    assert works["1"].backward_flops == relu
    assert works["4"].backward_flops == 2 * dense[0]
    pooled = works["2"].forward_flops
    assert pooled > 0
    assert pool >= pooled
    assert training_flops(model) == 2 * (conv + relu + pooled) + 3 * dense[0] + 2 * dense[1] + 3 * dense[2]
    assert model.flops == conv + relu + pooled + sum(dense)


def test_no_gradient_before_the_first_parameters():
    layers = (Normalize((0.5,), (0.5,)), ReLU(), Conv2d(1, 2, 1))
    assert [(work.backward_flops > 0, work.has_dx) for work in layer_work(Model((1, 4, 4), layers))] == [
        *((False, False), (False, False), (True, False)),
    ]


def test_branches_are_both_counted():
    body, shortcut = (Conv2d(2, 2, 1), BatchNorm2d(2)), (Conv2d(2, 2, 1),)
    works = {work.name: work for work in layer_work(Model((2, 4, 4), (Residual(body, shortcut), ReLU())))}
    assert list(works) == ["0.body.0", "0.body.1", "0.shortcut.0", "0", "1"]
    assert [works[name].has_dx for name in ("0.body.0", "0.body.1", "0.shortcut.0", "1")] == [False, True, False, True]
    model = Model((2, 4, 4), (Residual(body, shortcut), ReLU()))
    assert sum(work.forward_flops for work in works.values()) == model.flops
