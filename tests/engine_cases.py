"""What the engine suites run on: every engine, and one table of layers with the geometries that break kernels.

A new engine joins the suites by one line in ``ENGINES``; a new geometry is one line in ``CASES``.

The suites see an engine through the public executor alone. Its gradient of the *input* is nevertheless checked, by a
layer in front that turns weights into images: a convolution as large as the image, without bias, writes its weights out
when it meets images that are zero but for one pixel. So ``params["0.weight"]`` holds the images that the case sees, and
``grads["0.weight"]`` what the case sends back, both sample by sample.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convolt import engines
from convolt.engine import Engine
from convolt.engines.jit.isa import detect, units
from convolt.layers import (
    GELU,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    Layer,
    LeakyReLU,
    MaxPool2d,
    Normalize,
    ReLU,
    Residual,
    Sequential,
    Shape,
    SiLU,
)
from convolt.model import Model
from convolt.params import Params
from convolt.rng import SampleRng

Array = NDArray[Any]


@dataclass(frozen=True)
class Entry:
    """An engine under test, made for a number of threads.

    owner_computes: every number has one thread that computes it, so the number of threads leaves every bit as it is.
    exact_copies: a convolution with a single pixel copies its weights without rounding.
    compiles: half a second for each kernel that it has not met before; what is not in ``COMPILED`` is slow then.
    """

    name: str
    make: Callable[[int], Engine]
    owner_computes: bool = True
    exact_copies: bool = True
    compiles: bool = False

    @property
    def precisions(self) -> tuple[str, ...]:
        """What the engine can compute in here."""
        return self.make(1).PRECISIONS

    @property
    def finest(self) -> str:
        """float64 where there is one: the finest sieve."""
        return "fp64" if "fp64" in self.precisions else "fp32"

    def can_judge(self, case: "Case", precision: str) -> bool:
        """Whether equal values arrive as equal values; else the last bit decides which of them wins."""
        return not case.ties or (self.exact_copies and precision not in ("bf16", "fp16"))


#: What multiplies bf16 numbers here, the widest first. Forced, it does so even where float32 is faster.
UNITS = units(detect())
ON_TILES = next(unit for unit in UNITS if unit != "dot")  # the widest unit whose convolutions take tiles
ENGINES = (
    Entry("loops", lambda threads: engines.Loops(threads=threads)),
    Entry("im2col", lambda threads: engines.Im2col(threads=threads)),
    Entry("im2col-fft", lambda threads: engines.Im2col(threads=threads, conv="fft"), exact_copies=False),
    Entry("torch", lambda threads: engines.Torch(threads=threads), owner_computes=False),
    Entry(
        "torch-channels-last",
        lambda threads: engines.Torch(threads=threads, channels_last=True),
        owner_computes=False,
    ),
    Entry("jit", lambda threads: engines.JIT(threads=threads, unit=UNITS[0]), compiles=True),
)

# Largest relative error, in the norm of the whole array: a few roundings of the format, and room for the few masks and
# winners that a rounded value can change. Data is random, so errors and sums both grow with the root of their length.
TOLERANCE = {"fp64": 1e-11, "fp32": 2e-5, "fp32-master64": 2e-5, "bf16": 0.25, "fp16": 0.05}


@dataclass(frozen=True)
class Case:
    """Layers on images of one shape. ties: the images have few distinct values, so that maxima are not unique."""

    name: str
    shape: Shape
    layers: tuple[Layer, ...]
    batch: int = 3
    ties: bool = False

    @property
    def model(self) -> Model:
        """The layers behind the one that turns weights into images, with flat outputs."""
        return Model(self.deltas.shape[1:], (self._images_from_weights, *self.layers, *self._flat))

    @property
    def bare(self) -> Model:
        """The same layers, under the same names, as the first of a model: nobody reads their input's gradient."""
        return Model(self.shape, (Sequential(()), *self.layers, *self._flat))

    @property
    def deltas(self) -> Array:
        """Inputs of ``model``: sample n is zero but for one pixel of channel n."""
        if len(self.shape) == 1:
            return np.eye(self.batch)
        _, H, W = self.shape
        x = np.zeros((self.batch, self.batch, 2 * H - 1, 2 * W - 1))
        samples = np.arange(self.batch)
        x[samples, samples, H - 1, W - 1] = 1
        return x

    def weights_of(self, images: Array) -> Array:
        """``0.weight`` that makes ``model`` see these images (N, C, H, W); its own inverse."""
        return images.T if images.ndim == 2 else images.swapaxes(0, 1)[:, :, ::-1, ::-1]

    @property
    def rng(self) -> SampleRng:
        """The identity of the samples."""
        return SampleRng(seed=5, epoch=1, indices=np.arange(10, 10 + self.batch))

    def images(self) -> Array:
        """Distinct numbers in (-2, 2), none near zero or another: away from the kinks of ReLU and max-pooling."""
        generator = np.random.default_rng(_number(self.name))
        size = self.batch * math.prod(self.shape)
        values = 4 * (generator.permutation(size) + 0.3) / size - 2
        return (np.sign(np.round(values)) if self.ties else values).reshape(self.batch, *self.shape)

    def params(self) -> Params:
        """Random values everywhere, running statistics included, and the images as the first weights."""
        params = Params.init(self.model, seed=3, dtype=np.float64)
        generator = np.random.default_rng(_number(self.name) + 1)
        for name, array in params.items():
            if not params.specs[name].bound:  # norms start at ones and zeros, where mistakes hide
                array[...] = generator.uniform(0.5, 1.5, array.shape)
        params.buffers_flat[...] = generator.uniform(0.5, 1.5, params.buffers_flat.shape)
        params["0.weight"][...] = self.weights_of(self.images())
        return params

    def slopes(self) -> Array:
        """A gradient of the outputs (N, F) to start backward from."""
        return np.random.default_rng(_number(self.name) + 2).normal(size=(self.batch, *self.model.output_shape))

    @property
    def _images_from_weights(self) -> Layer:
        if len(self.shape) == 1:
            return Dense(self.batch, self.shape[0], bias=False)
        return Conv2d(self.batch, self.shape[0], self.shape[1:], bias=False)

    @property
    def _flat(self) -> tuple[Layer, ...]:
        output = Sequential(self.layers).output_shape(self.shape)
        return (Flatten(),) if len(output) == 3 else ()


def _number(name: str) -> int:
    """A number for a name, the same in every process."""
    return int.from_bytes(name.encode()[-6:], "little")


def operations(layers: tuple[Layer, ...]) -> Iterator[type[Layer]]:
    """The types of all layers, nested ones and their containers included."""
    for layer in layers:
        yield type(layer)
        for inner in ("layers", "body", "shortcut"):
            yield from operations(getattr(layer, inner, ()))


def conv(name: str, shape: Shape, *arguments: Any, batch: int = 3, **options: Any) -> Case:
    """A case of one convolution from ``shape[0]`` channels."""
    return Case(f"conv {name}", shape, (Conv2d(shape[0], *arguments, **options),), batch)


def alone(layer: Layer, shape: Shape = (3, 5, 4), batch: int = 3, ties: bool = False, note: str = "") -> Case:
    """A case of one layer, named as it is written."""
    return Case(f"{layer} {note}".strip(), shape, (layer,), batch, ties)


CONV = (
    conv("3x3", (2, 5, 6), 3, 3),
    conv("batch of one", (2, 5, 6), 3, 3, padding=1, batch=1),
    conv("one channel, one filter, one pixel", (1, 1, 1), 1, 1),
    conv("1x1", (3, 4, 5), 2, 1),
    conv("1x1 stride 2", (3, 5, 4), 2, 1, stride=2),
    conv("padding 1", (2, 5, 6), 3, 3, padding=1),
    conv("padding larger than the image", (2, 2, 3), 2, 3, padding=(3, 4)),
    conv("padding of one axis", (2, 5, 6), 2, (3, 5), padding=(0, 2)),
    conv("no bias", (2, 5, 6), 3, 3, bias=False),
    conv("valid", (1, 5, 7), 3, 5, padding="valid"),
    conv("same", (2, 5, 7), 3, (3, 5), padding="same"),
    conv("same, even kernel", (2, 5, 7), 2, (2, 4), padding="same"),
    conv("same, even kernel, dilation 3", (2, 5, 7), 2, 2, padding="same", dilation=3),
    conv("even kernel", (2, 6, 5), 3, 2),
    conv("4x2 padding 1", (2, 6, 5), 2, (4, 2), padding=1),
    conv("1x5 and 5 rows", (2, 5, 6), 2, (1, 5)),
    conv("5x1", (2, 6, 3), 2, (5, 1), padding=(2, 0)),
    conv("the whole image", (2, 4, 3), 5, (4, 3)),
    conv("stride 2, odd size", (2, 7, 5), 3, 3, stride=2, padding=1),
    conv("stride 2, a row left over", (2, 6, 6), 3, 3, stride=2),
    conv("stride 2x1", (2, 6, 5), 2, 3, stride=(2, 1)),
    conv("stride larger than kernel", (2, 8, 7), 3, 2, stride=3),
    conv("stride larger than kernel, padding 1", (2, 8, 7), 3, (1, 2), stride=(3, 4), padding=(0, 1)),
    conv("dilation 2", (2, 7, 6), 2, 3, dilation=2),
    conv("dilation 1x2, padding", (2, 5, 6), 2, 3, dilation=(1, 2), padding=(1, 2)),
    conv("dilation 2, stride 2, padding 2", (2, 7, 6), 3, 3, stride=2, padding=2, dilation=2),
    conv("groups 2", (4, 5, 4), 6, 3, groups=2, padding=1),
    conv("groups 2, stride 2, dilation 2", (4, 7, 6), 2, 2, groups=2, stride=2, dilation=2),
    conv("depthwise", (3, 5, 4), 3, 3, groups=3, padding=1),
    conv("depthwise, two filters a channel", (3, 5, 4), 6, 3, groups=3, bias=False),
    conv("depthwise, many channels", (19, 3, 3), 19, 3, groups=19, padding=1, batch=2),
    conv("depthwise, stride 2", (3, 5, 6), 3, 3, groups=3, stride=2, padding=1),
    conv("more than one tile", (20, 14, 14), 2, 5, padding=2),
    conv("channels that fill no vector", (17, 3, 4), 9, 3, padding=1, batch=2),
)
DENSE = (
    alone(Dense(5, 3), (5,)),
    alone(Dense(1, 1), (1,), batch=1),
    alone(Dense(7, 4, bias=False), (7,)),
    alone(Dense(600, 70), (600,), batch=2),
    alone(Dense(200, 70), (200,), batch=9, note="of a batch"),
    alone(Dense(70, 601), (70,), batch=8, note="of a batch"),
)
POOLING = (
    alone(MaxPool2d(2), (2, 4, 6)),
    alone(MaxPool2d(2), (2, 5, 7), note="odd size"),
    alone(MaxPool2d(3, 2, 1), (2, 5, 6)),
    alone(MaxPool2d(3, 1, 1), (2, 4, 4), batch=1),
    alone(MaxPool2d(3, 3, 1), (2, 6, 9)),
    alone(MaxPool2d((2, 3), (1, 2), (1, 0)), (2, 4, 7)),
    alone(MaxPool2d(2, 3), (2, 8, 7)),
    alone(MaxPool2d(1), (1, 3, 2)),
    alone(MaxPool2d(3, 2, 1), (2, 5, 6), ties=True, note="of equals"),
    alone(MaxPool2d((17, 16), 1), (1, 17, 18), batch=2, note="more taps than a byte counts"),
    Case("max-pool of negative numbers", (2, 4, 5), (Normalize((3, 3), (1, 1)), MaxPool2d(3, 2, 1))),
    alone(AvgPool2d(2), (2, 5, 6)),
    alone(AvgPool2d(3, 2, 1), (2, 5, 6)),
    alone(AvgPool2d(3, 2, 1, count_include_pad=False), (2, 5, 6)),
    alone(AvgPool2d((2, 3), (3, 1), (1, 0), count_include_pad=False), (2, 7, 4), batch=1),
    alone(GlobalAvgPool2d()),
    alone(GlobalAvgPool2d(), (2, 1, 1), batch=1, note="one pixel"),
    alone(Flatten()),
    alone(Flatten(), (4,), note="of features"),
)
ELEMENTWISE = (
    alone(ReLU()),
    alone(ReLU(), ties=True, note="at zero"),
    alone(ReLU(), (5,), note="of features"),
    alone(LeakyReLU()),
    alone(LeakyReLU(0.3), ties=True, note="at zero"),
    alone(GELU()),
    alone(GELU("tanh")),
    alone(SiLU()),
    alone(SiLU(), (6,), batch=1, note="of features"),
    alone(Dropout(0.3)),
    alone(Dropout(0.5), (6,), note="of features"),
    alone(Dropout(0.0)),
)
NORMALIZATION = (
    alone(BatchNorm2d(3)),
    alone(BatchNorm2d(3, eps=1e-2, momentum=0.3)),
    alone(BatchNorm2d(3, affine=False)),
    alone(BatchNorm2d(2), (2, 1, 1), note="one pixel"),
    alone(BatchNorm2d(2), (2, 2, 3), batch=1, note="batch of one"),
    alone(BatchNorm2d(2, momentum=0.0), (2, 2, 3), note="of frozen statistics"),
    alone(Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 2.0))),
)


def _nested(*layers: Layer) -> Sequential:
    return Sequential((Sequential(layers),))


NETWORKS = (
    Case("conv-relu-pool", (1, 6, 7), (Conv2d(1, 3, 3, padding=1), ReLU(), MaxPool2d(2))),
    Case("conv-bn-relu", (2, 5, 4), (Conv2d(2, 3, 3, bias=False), BatchNorm2d(3), ReLU())),
    Case("conv-bn-relu-pool", (2, 6, 4), (Conv2d(2, 19, 3, padding=1), BatchNorm2d(19), ReLU(), MaxPool2d((3, 2)))),
    Case("conv of one weight-bn", (3, 4, 5), (Conv2d(3, 6, 1, groups=3), BatchNorm2d(6), ReLU())),
    Case("conv-bn-pool", (2, 4, 4), (Conv2d(2, 3, 1), BatchNorm2d(3), MaxPool2d(2))),
    Case("conv-bn-relu-pool, a row left over", (2, 5, 4), (Conv2d(2, 3, 1), BatchNorm2d(3), ReLU(), MaxPool2d(2))),
    Case("conv-relu-bn", (2, 4, 4), (Conv2d(2, 3, 3), ReLU(), BatchNorm2d(3), LeakyReLU(0.1))),
    Case("bn-relu-conv-bn", (2, 4, 4), (BatchNorm2d(2), ReLU(), Conv2d(2, 3, 3), BatchNorm2d(3, affine=False))),
    Case("relu-normalize", (3, 3, 4), (ReLU(), Normalize((1, 1, 1), (2, 2, 2)), LeakyReLU())),
    Case("relu-dropout-relu", (2, 4, 4), (ReLU(), Dropout(0.4), ReLU(), Dropout(0.2))),
    Case("gelu-silu-leaky", (2, 4, 4), (GELU(), LeakyReLU(), SiLU(), ReLU())),
    Case("flatten-dense-relu-dense", (2, 3, 3), (Flatten(), Dense(18, 5), ReLU(), Dense(5, 4))),
    Case("pools in a row", (2, 9, 8), (MaxPool2d(3, 2, 1), AvgPool2d(2, 1), MaxPool2d(2), GlobalAvgPool2d())),
    Case("nested", (2, 4, 4), (_nested(Conv2d(2, 3, 3), ReLU()), Sequential(()), _nested(ReLU(), Flatten()))),
    Case("residual of nothing", (2, 3, 3), (Residual(()), ReLU())),
    Case("residual identity", (2, 4, 4), (Residual((Conv2d(2, 2, 3, padding=1), ReLU())), ReLU())),
    Case("residual identity, ends with convolution", (2, 4, 4), (Residual((ReLU(), Conv2d(2, 2, 1))), ReLU())),
    Case(
        "residual projection",
        (2, 5, 5),
        (Residual((Conv2d(2, 3, 3, 2, 1), BatchNorm2d(3), ReLU()), (Conv2d(2, 3, 1, 2), BatchNorm2d(3))), ReLU()),
    ),
    Case(
        "residual pre-activation",
        (2, 4, 4),
        (Conv2d(2, 2, 1), Residual((ReLU(), Conv2d(2, 2, 3, padding=1), ReLU()), (Conv2d(2, 2, 1),))),
    ),
    Case(
        "residual pre-activation, nested",
        (2, 4, 4),
        (Conv2d(2, 2, 1), Residual((_nested(ReLU(), Conv2d(2, 2, 1)), _nested(ReLU()), Sequential(())))),
    ),
    Case("residual in place on both sides", (2, 3, 4), (Residual((ReLU(), LeakyReLU()), (Dropout(0.5), ReLU())),)),
    Case(
        "residual in residual",
        (2, 4, 4),
        (Residual((Residual((ReLU(), Conv2d(2, 2, 3, padding=1))), ReLU()), (Residual((SiLU(),)), Flatten())[:1]),),
    ),
    Case(
        "residual of norms",
        (2, 4, 4),
        (Conv2d(2, 3, 1), Residual((Conv2d(3, 3, 3, padding=1), BatchNorm2d(3), LeakyReLU(0.2))), ReLU()),
    ),
    Case(
        "residual of norms in residual",
        (2, 4, 4),
        (Conv2d(2, 2, 1), Residual((Residual((Conv2d(2, 2, 3, padding=1), BatchNorm2d(2))), ReLU()))),
    ),
    Case("residual of two norms", (2, 4, 4), (Residual((BatchNorm2d(2),), (Conv2d(2, 2, 1), BatchNorm2d(2))),)),
    Case("residual that begins with a norm", (2, 4, 4), (Residual((BatchNorm2d(2), ReLU(), Conv2d(2, 2, 1))),)),
    Case(
        "residual of poolings",
        (2, 4, 5),
        (Residual((MaxPool2d(3, 1, 1),), (AvgPool2d(3, 1, 1),)), Residual((Normalize((0.1, 0.2), (0.5, 2)),))),
    ),
    Case("residual of features", (4,), (Residual((Dense(4, 4), ReLU(), Dropout(0.25))), Dense(4, 3))),
)
CASES = CONV + DENSE + POOLING + ELEMENTWISE + NORMALIZATION + NETWORKS

# Engines that compile meet these in every run of the tests, and the rest in slow ones: every kernel once, and every way
# through the planner.
COMPILED = frozenset(
    {
        "conv groups 2, stride 2, dilation 2",
        "conv channels that fill no vector",
        "conv depthwise, many channels",
        "conv-relu-pool",
        "conv-bn-relu",
        "conv-bn-relu-pool",
        "residual of norms in residual",
        "relu-normalize",
        "gelu-silu-leaky",
        "pools in a row",
        "flatten-dense-relu-dense",
        f"{Dense(70, 601)} of a batch",
        "residual identity",
        "residual in place on both sides",
        f"{MaxPool2d(3, 2, 1)} of equals",
    }
)
