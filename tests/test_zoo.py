"""The networks by name: parameter counts and FLOPs that are known, and shapes for other data."""

import pytest

from convolt import zoo
from convolt.errors import ConfigError
from convolt.layers import Normalize

COUNTS = {
    "mnist-cnn": ((1, 28, 28), 805_066),
    "cifar-cnn": ((3, 32, 32), 1_070_794),
    "lenet5": ((1, 28, 28), 61_706),
    "vgg-small": ((3, 32, 32), 2_197_706),
    "resnet9": ((3, 32, 32), 6_573_130),
    "resnet18": ((3, 32, 32), 11_173_962),
}


def test_counts_are_of_all_models():
    assert set(COUNTS) == set(zoo.MODELS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    shape, count = COUNTS[name]
    model = zoo.build(name, shape, 10)
    assert model.parameter_count == count
    assert model.output_shape == (10,)


def test_flops_of_mnist_cnn():
    convolution = 32 * 28 * 28 * (2 * 25 + 1)
    relu, pool = 32 * 28 * 28, 32 * 14 * 14 * 4
    dense = 128 * (2 * 32 * 14 * 14 + 1) + 128 + 10 * (2 * 128 + 1)
    assert zoo.mnist_cnn().flops == convolution + relu + pool + dense == 2_938_122


def test_flops_of_cifar_cnn():
    first = 32 * 32 * 32 * (2 * 27 + 1) + 32 * 32 * 32 + 32 * 16 * 16 * 4
    second = 64 * 16 * 16 * (2 * 32 * 9 + 1) + 64 * 16 * 16 + 64 * 8 * 8 * 4
    dense = 256 * (2 * 4096 + 1) + 256 + 10 * (2 * 256 + 1)
    assert zoo.cifar_cnn().flops == first + second + dense == 13_456_906


def test_flops_of_resnet18():
    """555,422,720 multiply-adds in convolutions and the head, as published; the rest is elementwise."""
    elementwise = 3 * 65_536 + 14 * 65_536 + (14 + 2) * (32_768 + 16_384 + 8_192) + 512 * 16 + 10
    assert zoo.resnet18().flops == 2 * 555_422_720 + elementwise


@pytest.mark.parametrize("name", COUNTS)
def test_models_take_other_images_and_classes(name):
    normalize = Normalize((0.5,) * 2, (0.25,) * 2)
    model = zoo.build(name, (2, 33, 40), 7, normalize)
    assert model.output_shape == (7,)
    assert model.layers[0] == normalize


def test_every_model_has_its_line_of_help():
    assert all(entry.summary.endswith(".") for entry in zoo.MODELS.values())


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match=r"model: unknown name 'resnet-9'; did you mean 'resnet9'\?"):
        zoo.build("resnet-9", (3, 32, 32), 10)


def test_images_that_are_too_small_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"model lenet5 does not fit images of shape \(1, 4, 4\): .*window"):
        zoo.build("lenet5", (1, 4, 4), 10)
