"""Networks to PyTorch and back: names, weights, statistics and the function itself."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convolt import layers as cl
from convolt import zoo
from convolt.convert import from_torch, to_torch
from convolt.engines.loops import Loops
from convolt.errors import ConfigError, ShapeError
from convolt.model import Model
from convolt.params import Params

SHAPE = (3, 8, 8)


def settled(net):
    """In float64, with statistics and affine parameters that are not the first ones, in prediction mode."""
    generator = torch.Generator().manual_seed(0)
    net = net.double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.num_batches_tracked.fill_(7)
            if module.affine:
                module.weight.data.uniform_(0.5, 2.0, generator=generator)
                module.bias.data.normal_(generator=generator)
    return net.eval()


def outputs(net, shape=SHAPE):
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x.numpy(), net(x.clone()).numpy()


def assert_same_function(net, shape=SHAPE):
    """The net, its conversion run by the reference engine, and the conversion converted back agree."""
    net = settled(net)
    model, params = from_torch(net, shape)
    x, expected = outputs(net, shape)
    executor = Loops().executor(model, params, Fp64)
    np.testing.assert_allclose(executor.predict(x), expected.reshape(2, -1), rtol=0, atol=1e-12)
    back = to_torch(model, params).eval()
    np.testing.assert_allclose(outputs(back, shape)[1], expected.reshape(2, -1), rtol=0, atol=1e-12)
    assert from_torch(back, shape)[0] == model
    return model, params


class Fp64:
    precision = "fp64"
    seed = 0


# --- to PyTorch ---


EVERY_LAYER = Model(
    SHAPE,
    (
        cl.Normalize((0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
        cl.Conv2d(3, 4, (3, 1), padding="same", bias=False),
        cl.BatchNorm2d(4, eps=1e-3, momentum=0.2),
        cl.Sequential((cl.LeakyReLU(0.3), cl.Sequential((cl.Conv2d(4, 4, 3, padding=1, groups=2),)))),
        cl.Residual(
            (cl.Conv2d(4, 6, 3, 2, 1), cl.BatchNorm2d(6), cl.GELU("tanh")),
            (cl.Conv2d(4, 6, 1, 2), cl.SiLU()),
        ),
        cl.Residual((cl.Residual((cl.Conv2d(6, 6, 1), cl.ReLU())),)),
        cl.MaxPool2d(3, 1, 1),
        cl.AvgPool2d(3, 2, 1, count_include_pad=False),
        cl.GlobalAvgPool2d(),
        cl.Flatten(),
        cl.Dropout(0.2),
        cl.Dense(6, 5, bias=False),
    ),
)


def test_every_layer_survives_both_ways():
    params = Params.init(EVERY_LAYER, 0, np.float64)
    net = settled(to_torch(EVERY_LAYER, params))
    model, back = from_torch(net, SHAPE)
    assert model == EVERY_LAYER
    assert list(net.state_dict()) == list(params.state_dict()) == list(back.state_dict())
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[name], tensor.numpy())
    assert back.buffers["2.num_batches_tracked"] == 7
    assert_same_function(net)


@pytest.mark.parametrize("make", [zoo.mnist_cnn, zoo.cifar_cnn, zoo.lenet5, zoo.vgg_small, zoo.resnet9, zoo.resnet18])
def test_zoo_survives_both_ways(make):
    model = make()
    params = Params.init(model, 0)
    net = to_torch(model, params)
    again, back = from_torch(net, model.input_shape)
    assert again == model
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back.flat, params.flat)
    net.load_state_dict({name: torch.from_numpy(array) for name, array in params.state_dict().items()})


def test_weights_are_copies():
    params = Params.init(EVERY_LAYER, 0)
    net = to_torch(EVERY_LAYER, params)
    with torch.no_grad():
        net[1].weight.zero_()
    assert params["1.weight"].any()
    _, back = from_torch(net, SHAPE)
    back.flat[...] = 1
    assert not net[1].weight.any()


def test_without_parameters_the_weights_are_those_of_pytorch():
    torch.manual_seed(0)
    net = to_torch(Model((4,), (cl.Dense(4, 3),)))
    torch.manual_seed(0)
    assert torch.equal(net[0].weight, nn.Linear(4, 3).weight)


# --- from PyTorch: structure ---


def test_nested_sequential_keeps_its_names():
    relu = nn.ReLU(inplace=True)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), relu),
        nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(4, 4, 2, stride=2), relu)),
        nn.Sequential(),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    _, params = assert_same_function(net)
    assert list(params.state_dict()) == list(net.state_dict())


def test_a_norm_without_weights_keeps_its_statistics():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.AvgPool2d(6), nn.Flatten())
    _, params = assert_same_function(net)
    np.testing.assert_array_equal(params.buffers["1.running_var"], net[1].running_var.numpy())


def test_named_children_become_indices():
    net = nn.Sequential(OrderedDict(first=nn.Conv2d(3, 2, 3), pool=nn.AvgPool2d(6), flat=nn.Flatten()))
    _, params = assert_same_function(net)
    assert list(params) == ["0.weight", "0.bias"]


def test_one_module_is_a_model():
    model, _ = assert_same_function(nn.Linear(4, 3), (4,))
    assert model.layers == (cl.Dense(4, 3),)


# --- from PyTorch: graphs ---


class BasicBlock(nn.Module):
    """As torchvision has it."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
        self.layer2 = nn.Sequential(BasicBlock(4, 6, 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PreActivation(nn.Module):
    """An in-place ReLU before the branch: the shortcut sees it too."""

    def __init__(self, inplace):
        super().__init__()
        self.relu = nn.ReLU(inplace)
        self.body = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        y = self.body(x)
        return y + self.relu(y)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2, stride=1)
        x = F.leaky_relu(torch.relu(x), 0.2)
        x = F.gelu(F.silu(x), approximate="tanh").relu()
        x = F.avg_pool2d(x, 2, 1, 1, False, True)
        x = F.dropout(x, 0.3, training=self.training)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.fc(x.view(x.size(0), -1))


class Shapes(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.fc = nn.Linear(144, 5)
        self.ending = forward

    def forward(self, x):
        return self.fc(self.ending(self.conv(x).relu_()))


class Branches(nn.Module):
    """Three branches, one of them inside another, and a sum of the input with itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x):
        x = x + x
        y = self.a(x)
        return torch.add(x, y + self.b(y)) + self.c(F.relu(x)).add(x)


@pytest.mark.parametrize(
    "net",
    [
        ResNet(),
        nn.Sequential(nn.Conv2d(3, 4, 3), BasicBlock(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Sequential(PreActivation(True), nn.Flatten()),
        nn.Sequential(PreActivation(False), nn.Flatten()),
        Functional(),
        nn.Sequential(Branches(), nn.Flatten()),
        Shapes(lambda x: x.flatten(1)),
        Shapes(lambda x: torch.flatten(x, start_dim=1)),
        Shapes(lambda x: x.view(-1, 144)),
        Shapes(lambda x: x.reshape(x.shape[0], x.shape[1] * x.size(2) * x.size()[3])),
        Shapes(lambda x: torch.reshape(x, (x.shape[0], -1))),
    ],
    ids=lambda net: type(net).__name__,
)
def test_foreign_net_is_the_same_function(net):
    assert_same_function(net)


def test_a_mean_over_the_image_is_a_pool():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean([-2, -1]) + torch.mean(x, (2, 3), keepdim=True).flatten(1)

    model, _ = assert_same_function(Mean())
    assert model.output_shape == (3,)


def test_a_block_is_a_residual_in_its_place():
    model, params = from_torch(nn.Sequential(nn.Conv2d(3, 4, 3), BasicBlock(4, 6, 2)), SHAPE)
    assert isinstance(model.layers[1], cl.Sequential)
    residual, relu = model.layers[1].layers
    assert isinstance(residual, cl.Residual)
    assert relu == cl.ReLU()
    assert len(residual.body) == 5
    assert len(residual.shortcut) == 2
    assert "1.0.shortcut.0.weight" in params


def test_converting_leaves_the_net_as_it_was():
    net = ResNet()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    _, params = from_torch(net, SHAPE)
    params.flat[...] = 0
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


# --- what cannot be converted ---


class Two(nn.Module):
    def forward(self, x, y):
        return x + y


class Depends(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Scaled(nn.Module):
    def forward(self, x):
        return 2 * x


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x + self.shift


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(self.conv(x))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


SHARED = nn.Conv2d(3, 3, 1)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Sequential(nn.Softmax(dim=1))), "0.0 is Softmax, which has no layer; supported: AdaptiveAvg"),
        (nn.Sequential(nn.Conv2d(3, 3, 1, padding_mode="reflect")), "0: Conv2d must have padding_mode='zeros'"),
        (nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)), "0: MaxPool2d must have ceil_mode=False; got True"),
        (nn.Sequential(nn.MaxPool2d(2, dilation=2)), "0: MaxPool2d must have dilation=1; got 2"),
        (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), "0: MaxPool2d must have return_indices=False; got True"),
        (nn.Sequential(nn.AvgPool2d(2, divisor_override=3)), "0: AvgPool2d must have divisor_override=None; got 3"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2)), "0: AdaptiveAvgPool2d must have output_size=1; got 2"),
        (nn.Sequential(nn.Flatten(0)), "0: Flatten must have start_dim=1; got 0"),
        (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "must have track_running_stats=True; got False"),
        (nn.Sequential(nn.BatchNorm2d(3, momentum=None)), "0: BatchNorm2d must have a number as momentum; got None"),
        (nn.Sequential(SHARED, SHARED), "1.weight and 0.weight are one tensor; a Model cannot share weights"),
        (nn.Sequential(Twice()), "0.conv is called twice; a Model cannot share weights"),
        (nn.Sequential(Depends()), "0 cannot be traced by torch.fx"),
        (nn.Sequential(Scaled()), "mul in the forward of 0, which has no layer"),
        (nn.Sequential(Constant()), "shift in the forward of 0, which has no layer"),
        (Two(), "y in the forward of Two, which has no layer"),
        (Pair(), r"Pair returns \(x, x\), which has no layer"),
        (Shapes(lambda x: x.view(2, -1)), r"view in the forward of Shapes to \(2, -1\), which has no layer"),
        (Shapes(torch.flatten), "flatten in the forward of Shapes: Flatten must have start_dim=1; got 0"),
        (Shapes(lambda x: x.mean(1)), "a mean over 1, which has no layer"),
        (Shapes(lambda x: x + 1), "add in the forward of Shapes of something else than two branches"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_has_no_layer_is_named(net, message):
    with pytest.raises(ConfigError, match=f"^from_torch: .*{message}") as caught:
        from_torch(net, SHAPE)
    assert "\n" not in str(caught.value)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match=r"from_torch: 0\.1: Dense takes features"):
        from_torch(nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(8, 5))), SHAPE)
    with pytest.raises(ShapeError, match=r"from_torch: conv: Conv2d\(in_channels=3\) got 1 channels"):
        from_torch(Functional(), (1, 8, 8))
