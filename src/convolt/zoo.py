"""Networks by name, each a function of the input shape and the number of classes.

``mnist-cnn`` and ``cifar-cnn`` are the two small networks that every benchmark of Convolt speaks of. The residual
networks are the forms for 32x32 images. ``normalize`` puts the data set's constants in front.
"""

from collections.abc import Callable
from dataclasses import dataclass

from convolt.errors import ConfigError, ShapeError, nearest
from convolt.layers import (
    BatchNorm2d,
    Conv2d,
    Dense,
    Flatten,
    GlobalAvgPool2d,
    Layer,
    MaxPool2d,
    Normalize,
    ReLU,
    Residual,
    Sequential,
    Shape,
)
from convolt.model import Model

Layers = tuple[Layer, ...]


def mnist_cnn(input_shape: Shape = (1, 28, 28), num_classes: int = 10, normalize: Normalize | None = None) -> Model:
    """Conv 5x5 to 32 (padding 2), ReLU, max-pool 2, dense 128, ReLU, dense: 805,066 parameters on MNIST."""
    features = (Conv2d(input_shape[0], 32, 5, padding=2), ReLU(), MaxPool2d(2))
    return _classifier(input_shape, features, (128,), num_classes, normalize)


def cifar_cnn(input_shape: Shape = (3, 32, 32), num_classes: int = 10, normalize: Normalize | None = None) -> Model:
    """Two times conv 3x3 ('same'), ReLU, max-pool 2, to 32 and 64 channels, dense 256: 1,070,794 parameters."""
    features = (
        *(Conv2d(input_shape[0], 32, 3, padding="same"), ReLU(), MaxPool2d(2)),
        *(Conv2d(32, 64, 3, padding="same"), ReLU(), MaxPool2d(2)),
    )
    return _classifier(input_shape, features, (256,), num_classes, normalize)


def lenet5(input_shape: Shape = (1, 28, 28), num_classes: int = 10, normalize: Normalize | None = None) -> Model:
    """LeCun et al. 1998 with today's ReLU and max-pooling: two 5x5 convolutions, then dense 120 and 84."""
    features = (
        *(Conv2d(input_shape[0], 6, 5, padding=2), ReLU(), MaxPool2d(2)),
        *(Conv2d(6, 16, 5), ReLU(), MaxPool2d(2)),
    )
    return _classifier(input_shape, features, (120, 84), num_classes, normalize)


def vgg_small(input_shape: Shape = (3, 32, 32), num_classes: int = 10, normalize: Normalize | None = None) -> Model:
    """Three pairs of 3x3 convolutions with BatchNorm (64, 128, 256), each pair pooled; Simonyan and Zisserman 2014."""
    features: Layers = ()
    channels = input_shape[0]
    for width in (64, 128, 256):
        features += (*_conv_bn_relu(channels, width), *_conv_bn_relu(width, width), MaxPool2d(2))
        channels = width
    return _classifier(input_shape, features, (256,), num_classes, normalize)


def resnet9(input_shape: Shape = (3, 32, 32), num_classes: int = 10, normalize: Normalize | None = None) -> Model:
    """Page 2018: eight 3x3 convolutions (64, 128, 256, 512) with two residual pairs, and a linear head."""
    layers = (
        *_conv_bn_relu(input_shape[0], 64),
        *(*_conv_bn_relu(64, 128), MaxPool2d(2)),
        Residual((*_conv_bn_relu(128, 128), *_conv_bn_relu(128, 128))),
        *(*_conv_bn_relu(128, 256), MaxPool2d(2)),
        *(*_conv_bn_relu(256, 512), MaxPool2d(2)),
        Residual((*_conv_bn_relu(512, 512), *_conv_bn_relu(512, 512))),
        *(GlobalAvgPool2d(), Dense(512, num_classes)),
    )
    return _model(input_shape, layers, normalize)


def resnet18(input_shape: Shape = (3, 32, 32), num_classes: int = 10, normalize: Normalize | None = None) -> Model:
    """He et al. 2016 in the form for CIFAR: a 3x3 stem, no pooling, four stages of two blocks (64 to 512)."""
    layers: Layers = _conv_bn_relu(input_shape[0], 64)
    channels = 64
    for width in (64, 128, 256, 512):
        stride = 1 if width == 64 else 2
        layers += (*_basic_block(channels, width, stride), *_basic_block(width, width, 1))
        channels = width
    return _model(input_shape, (*layers, GlobalAvgPool2d(), Dense(512, num_classes)), normalize)


def _conv_bn_relu(channels: int, width: int, stride: int = 1) -> Layers:
    return Conv2d(channels, width, 3, stride, padding=1, bias=False), BatchNorm2d(width), ReLU()


def _basic_block(channels: int, width: int, stride: int) -> Layers:
    body = (*_conv_bn_relu(channels, width, stride), *_conv_bn_relu(width, width)[:2])
    plain = channels == width and stride == 1
    shortcut = () if plain else (Conv2d(channels, width, 1, stride, bias=False), BatchNorm2d(width))
    return Residual(body, shortcut), ReLU()


def _classifier(
    input_shape: Shape, features: Layers, widths: tuple[int, ...], num_classes: int, normalize: Normalize | None
) -> Model:
    """Features, flattened, then dense layers with ReLU between them."""
    layers: Layers = (*features, Flatten())
    channels = Sequential(layers).output_shape(input_shape)[0]
    for width in widths:
        layers += (Dense(channels, width), ReLU())
        channels = width
    return _model(input_shape, (*layers, Dense(channels, num_classes)), normalize)


def _model(input_shape: Shape, layers: Layers, normalize: Normalize | None) -> Model:
    return Model(input_shape, layers if normalize is None else (normalize, *layers))


@dataclass(frozen=True)
class Entry:
    """A network of the zoo: its function and its first docstring line."""

    build: Callable[[Shape, int, Normalize | None], Model]

    @property
    def summary(self) -> str:
        """What the network is, in one line."""
        return (self.build.__doc__ or "").splitlines()[0]


MODELS: dict[str, Entry] = {
    "mnist-cnn": Entry(mnist_cnn),
    "cifar-cnn": Entry(cifar_cnn),
    "lenet5": Entry(lenet5),
    "vgg-small": Entry(vgg_small),
    "resnet9": Entry(resnet9),
    "resnet18": Entry(resnet18),
}


def build(name: str, input_shape: Shape, num_classes: int, normalize: Normalize | None = None) -> Model:
    """The network of that name for this data. Raises ConfigError for an unknown name or images it does not fit."""
    if name not in MODELS:
        raise ConfigError(f"model: unknown name {name!r}; {nearest(name, MODELS)}")
    try:
        return MODELS[name].build(input_shape, num_classes, normalize)
    except ShapeError as error:
        raise ConfigError(f"model {name} does not fit images of shape {input_shape}: {error}") from None
