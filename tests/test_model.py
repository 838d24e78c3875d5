"""Models: shapes, names, FLOPs, the summary, and errors that say which layer is wrong and what to write instead."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_cases import CASES
from hypothesis import given
from hypothesis import strategies as st
from torch_oracle import Oracle

from convolt.errors import ConfigError, ShapeError
from convolt.layers import (
    GELU,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    MaxPool2d,
    Normalize,
    ReLU,
    Residual,
    Sequential,
    Window,
)
from convolt.model import Model

IMAGE = (4, 6, 5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shape_of_every_case_is_the_shape_that_comes_out(case):
    model = case.bare
    params = case.params()
    oracle = Oracle(case.model, params, case.rng)
    with torch.no_grad():
        assert tuple(oracle(case.deltas).shape[1:]) == case.model.output_shape == model.output_shape


sizes = st.integers(1, 9)


@given(
    size=st.tuples(sizes, sizes),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_size_of_windows_is_pytorchs(size, kernel, stride, padding, dilation):
    image, weight = torch.zeros(1, 1, *size), torch.zeros(1, 1, *kernel)
    window = Window(kernel, stride, padding, dilation)
    try:
        expected = tuple(F.conv2d(image, weight, None, stride, padding, dilation).shape[2:])
    except RuntimeError:  # not one window fits
        with pytest.raises(ShapeError, match="larger than the padded image"):
            window.output_size("Conv2d", *size)
        return
    assert window.output_size("Conv2d", *size) == expected


# Layers that do not fit on images (4, 6, 5), and the end of what is said about it.
MISFITS = {
    "channels": ((ReLU(), Conv2d(8, 4, 3)), r"layer 1: Conv2d\(in_channels=8\) got 4 channels; set in_channels=4"),
    "norm": ((BatchNorm2d(3),), r"layer 0: BatchNorm2d\(num_features=3\) got 4 channels; set num_features=4"),
    "normalize": ((Normalize((0,), (1,)),), r"layer 0: Normalize has constants for 1 channels and got 4; give 4"),
    "features": ((Flatten(), Dense(7, 2)), r"layer 1: Dense\(in_features=7\) got 120 features; set in_features=120"),
    "no flatten": (
        (Dense(120, 2),),
        r"layer 0: Dense takes features .*; put Flatten\(\) or GlobalAvgPool2d\(\) before",
    ),
    "flat": ((Flatten(), MaxPool2d(2)), r"layer 1: MaxPool2d takes an image .* got \(120,\); put it before Flatten"),
    "window": ((AvgPool2d(7),), r"layer 0: AvgPool2d has a window of 7x7, larger than the padded image 6x5; use a sm"),
    "dilated": ((Conv2d(4, 4, 3, dilation=3),), r"layer 0: Conv2d has a window of 7x7, larger than"),
    "sum": (
        (ReLU(), Residual((Conv2d(4, 8, 1),))),
        r"layer 1: Residual adds body \(8, 6, 5\) to shortcut \(4, 6, 5\); .* give a shortcut such as a 1x1 Conv2d",
    ),
    "body": (
        (ReLU(), ReLU(), ReLU(), Residual((Conv2d(8, 4, 1),))),
        r"layer 3\.body\.0: Conv2d\(in_channels=8\) got 4 channels; set in_channels=4",
    ),
    "shortcut": ((Residual((), (ReLU(), BatchNorm2d(5))),), r"layer 0\.shortcut\.1: BatchNorm2d"),
    "nested": ((Sequential((ReLU(), Sequential((Dense(3, 3),)))),), r"layer 0\.1\.0: Dense takes features"),
    "deep": (
        (Residual((Sequential((Residual((GELU(), Conv2d(1, 4, 1))),)),)),),
        r"layer 0\.body\.0\.0\.body\.1: Conv2d\(in_channels=1\)",
    ),
    "global": ((GlobalAvgPool2d(), GlobalAvgPool2d()), r"layer 1: GlobalAvgPool2d takes an image"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_error_names_the_layer_and_the_fix(name):
    layers, message = MISFITS[name]
    with pytest.raises(ShapeError, match=f"^{message}") as caught:
        Model(IMAGE, layers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv2d(3, 4, 0), r"Conv2d: kernel_size must be an integer >= 1 or a pair of them; got 0"),
        (lambda: Conv2d(3, 4, (1, 2, 3)), r"Conv2d: kernel_size must be .* got \(1, 2, 3\)"),
        (lambda: Conv2d(3, 4, 3, stride=0), r"Conv2d: stride must be an integer >= 1"),
        (lambda: Conv2d(3, 4, 3, padding=-1), r"Conv2d: padding must be an integer >= 0"),
        (
            lambda: Conv2d(3, 4, 3, padding="full"),
            r"Conv2d: padding must be an integer, a pair, 'same' or 'valid'; got 'f",
        ),
        (lambda: Conv2d(3, 4, 3, 2, "same"), r"Conv2d: padding='same' needs stride 1; got stride=\(2, 2\)"),
        (lambda: Conv2d(3, 4, 3, groups=2), r"Conv2d: in_channels=3 must be divisible by groups=2"),
        (lambda: Conv2d(4, 5, 3, groups=2), r"Conv2d: out_channels=5 must be divisible by groups=2"),
        (lambda: Conv2d(0, 4, 3), r"Conv2d: in_channels must be an integer >= 1; got 0"),
        (lambda: Conv2d(True, 4, 3), r"Conv2d: in_channels must be an integer >= 1; got True"),
        (lambda: Dense(3, 2.0), r"Dense: out_features must be an integer >= 1; got 2.0"),
        (lambda: MaxPool2d(3, padding=2), r"MaxPool2d: padding must be at most half of kernel_size; got \(2, 2\)"),
        (lambda: MaxPool2d(2, 0), r"MaxPool2d: stride must be an integer >= 1"),
        (lambda: BatchNorm2d(3, eps=0), r"BatchNorm2d: eps must be > 0 and momentum in \[0, 1\]"),
        (lambda: BatchNorm2d(3, momentum=2), r"BatchNorm2d: eps must be > 0 and momentum in \[0, 1\]"),
        (lambda: Dropout(1.0), r"Dropout: p must be in \[0, 1\); got 1.0"),
        (lambda: GELU("erf"), r"GELU: approximate must be 'none' or 'tanh'; got 'erf'"),
        (lambda: Normalize((0.5,), (0.0,)), r"Normalize: mean and std need one value a channel, std > 0"),
        (lambda: Normalize((0.5, 0.5), (1.0,)), r"Normalize: mean and std need one value a channel"),
        (
            lambda: Model((1, 0, 3), ()),
            r"Model: input_shape must be \(C, H, W\) or \(F,\), all positive; got \(1, 0, 3\)",
        ),
        (lambda: Model((1, 3), ()), r"Model: input_shape must be"),
        (lambda: Model((4,), ("relu",)), r"Model: layer 0 must be a convolt layer such as ReLU\(\); got 'relu'"),
        (lambda: Model((4,), (Sequential((ReLU(), 5)),)), r"Sequential: layer 1 must be a convolt layer .* got 5"),
        (lambda: Residual((ReLU,)), r"Residual: body\.0 must be a convolt layer such as ReLU\(\); got <class"),
        (lambda: Residual(ReLU()), r"Residual: body\.0 must be in a tuple of layers, such as \(ReLU\(\),\); got ReLU"),
        (lambda: Model((4,), 3), r"Model: layer 0 must be in a tuple of layers"),
        (lambda: Residual((), (None,)), r"Residual: shortcut\.0 must be a convolt layer"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(make, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_more_parameters_than_memory_can_have_are_refused():
    with pytest.raises(ShapeError, match=r"Model: 6.5e\+27 parameters are more than a machine can address"):
        Model((1, 8, 8), (Flatten(), Dense(64, 10**26)))


def test_names_are_those_of_nested_sequentials():
    def norm_block():
        return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1, bias=False), torch.nn.BatchNorm2d(3))

    net = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sequential(norm_block()), torch.nn.Conv2d(3, 2, 1))
    inner = Sequential((Conv2d(2, 3, 1, bias=False), BatchNorm2d(3)))
    model = Model((2, 4, 4), (ReLU(), Sequential((inner,)), Conv2d(3, 2, 1)))
    assert list(model.parameters()) == [name for name, _ in net.named_parameters()]
    assert list(model.buffers()) == [name for name, _ in net.named_buffers()]
    for name, parameter in net.named_parameters():
        assert model.parameters()[name].shape == tuple(parameter.shape)


def test_branches_of_a_residual_are_named():
    model = Model((2, 4, 4), (ReLU(), Residual((Conv2d(2, 3, 1),), (Sequential((Conv2d(2, 3, 1, bias=False),)),))))
    assert list(model.parameters()) == ["1.body.0.weight", "1.body.0.bias", "1.shortcut.0.0.weight"]


def test_parameters_of_all_layers():
    model = Model(IMAGE, (Conv2d(4, 6, (3, 2), groups=2), BatchNorm2d(6), BatchNorm2d(6, affine=False), Flatten()))
    specs = model.parameters()
    assert {name: spec.shape for name, spec in specs.items()} == {
        "0.weight": (6, 2, 3, 2),
        "0.bias": (6,),
        "1.weight": (6,),
        "1.bias": (6,),
    }
    assert [spec.is_weight for spec in specs.values()] == [True, False, False, False]
    assert specs["0.weight"].bound == specs["0.bias"].bound == pytest.approx(1 / np.sqrt(12))
    assert model.parameter_count == 72 + 6 + 12
    assert len(model.buffers()) == 6


def test_flops_are_counted_by_hand():
    """A multiply and an add are two, a bias is one."""
    conv = Conv2d(4, 6, 3, padding=1, groups=2)
    cases = {
        (conv,): 6 * 6 * 5 * (2 * 2 * 9 + 1),
        (ReLU(),): 120,
        (BatchNorm2d(4),): 240,
        (Normalize((0,) * 4, (1,) * 4),): 240,
        (MaxPool2d(2),): 4 * 3 * 2 * 4,
        (GlobalAvgPool2d(),): 120,
        (Flatten(), Dense(120, 7)): 7 * 241,
        (Residual((ReLU(),)),): 240,
        (Sequential((ReLU(), Sequential((ReLU(),)))),): 240,
    }
    for layers, flops in cases.items():
        assert Model(IMAGE, layers).flops == flops, layers


def test_summary_is_a_table_of_all_layers():
    body = (Conv2d(4, 4, 3, padding=1), BatchNorm2d(4))
    model = Model(IMAGE, (Residual(body), ReLU(), Sequential((Flatten(), Dense(120, 10)))))
    lines = model.summary().splitlines()
    assert lines[0].split() == ["layer", "type", "output", "parameters", "MFLOP", "activation", "bytes"]
    assert [line.split()[0] for line in lines[2:-2]] == ["0.body.0", "0.body.1", "0", "1", "2.0", "2.1"]
    assert lines[2].split() == ["0.body.0", "Conv2d", "4x6x5", "148", "0.009", "480"]
    assert lines[-1].split()[:2] == ["total", f"{model.parameter_count:,}"]
    assert len({len(line) for line in lines if line.startswith("-")}) == 1
    assert sum(int(line.split()[-3].replace(",", "")) for line in lines[2:-2]) == model.parameter_count


def test_model_is_a_value():
    layers = [Conv2d(4, 2, [3, 3]), ReLU()]
    model = Model([4, 6, 5], layers)
    assert model == Model((4, 6, 5), (Conv2d(4, 2, 3), ReLU()))
    assert hash(model) == hash(Model((4, 6, 5), (Conv2d(4, 2, (3, 3)), ReLU())))
    assert Model((4,), ()).output_shape == (4,)
    normalize = Normalize((0,) * 4, (1,) * 4)
    assert model.with_input(normalize).layers == (normalize, *model.layers)
