"""Convolt trains convolutional networks as fast as the hardware at hand allows, and proves what it buys.

Names are imported when they are first used: ``convolt --help`` and ``import convolt`` cost no engine, no plots and
no arrays. The imports below are for type checkers and readers; ``_HOMES`` says the same at run time, and a test
holds the two together.

>>> import convolt as cv
>>> cv.zoo.mnist_cnn().parameter_count
805066
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convolt import engines, scaling, zoo
    from convolt.augment import AlternatingFlip, Crop, Cutout, Flip, Mixup
    from convolt.callbacks import Callback, ProgressBar, StepEvent
    from convolt.comms.mpi import world
    from convolt.convert import from_torch, to_torch
    from convolt.data import Dataset, Split
    from convolt.datasets import load_dataset
    from convolt.datasets.spec import DataSpec
    from convolt.duration import Time
    from convolt.early_stopping import EarlyStopping
    from convolt.engine import Engine, Executor, StepResult
    from convolt.errors import ConvoltError
    from convolt.evaluation import Evaluation, evaluate
    from convolt.history import Epoch
    from convolt.layers import (
        GELU,
        AvgPool2d,
        BatchNorm2d,
        Conv2d,
        Dense,
        Dropout,
        Flatten,
        GlobalAvgPool2d,
        LeakyReLU,
        MaxPool2d,
        Normalize,
        ReLU,
        Residual,
        Sequential,
        SiLU,
    )
    from convolt.losses import MSE, CrossEntropy, Distillation, DistillationTargets
    from convolt.model import Model
    from convolt.optimizers import EMA, SGD, Adam, AdamW, RMSprop
    from convolt.parallel import Parallel
    from convolt.params import Params
    from convolt.recipe import NonFinite, Recipe
    from convolt.rng import SampleRng
    from convolt.run import Run
    from convolt.schedules import (
        Constant,
        Cosine,
        CosineCyclic,
        Exponential,
        Linear,
        MultiStep,
        OneCycle,
        Piecewise,
        Plateau,
        Step,
        Triangular,
        WarmRestarts,
        Warmup,
    )
    from convolt.train import fit

_HOMES: dict[str, str] = {
    "Adam": "convolt.optimizers",
    "AdamW": "convolt.optimizers",
    "AlternatingFlip": "convolt.augment",
    "AvgPool2d": "convolt.layers",
    "BatchNorm2d": "convolt.layers",
    "Callback": "convolt.callbacks",
    "Constant": "convolt.schedules",
    "Conv2d": "convolt.layers",
    "ConvoltError": "convolt.errors",
    "Cosine": "convolt.schedules",
    "CosineCyclic": "convolt.schedules",
    "Crop": "convolt.augment",
    "CrossEntropy": "convolt.losses",
    "Cutout": "convolt.augment",
    "DataSpec": "convolt.datasets.spec",
    "Dataset": "convolt.data",
    "Dense": "convolt.layers",
    "Distillation": "convolt.losses",
    "DistillationTargets": "convolt.losses",
    "Dropout": "convolt.layers",
    "EMA": "convolt.optimizers",
    "EarlyStopping": "convolt.early_stopping",
    "Engine": "convolt.engine",
    "Epoch": "convolt.history",
    "Evaluation": "convolt.evaluation",
    "Executor": "convolt.engine",
    "Exponential": "convolt.schedules",
    "Flatten": "convolt.layers",
    "Flip": "convolt.augment",
    "GELU": "convolt.layers",
    "GlobalAvgPool2d": "convolt.layers",
    "LeakyReLU": "convolt.layers",
    "Linear": "convolt.schedules",
    "MSE": "convolt.losses",
    "MaxPool2d": "convolt.layers",
    "Mixup": "convolt.augment",
    "Model": "convolt.model",
    "MultiStep": "convolt.schedules",
    "NonFinite": "convolt.recipe",
    "Normalize": "convolt.layers",
    "OneCycle": "convolt.schedules",
    "Parallel": "convolt.parallel",
    "Params": "convolt.params",
    "Piecewise": "convolt.schedules",
    "Plateau": "convolt.schedules",
    "ProgressBar": "convolt.callbacks",
    "RMSprop": "convolt.optimizers",
    "ReLU": "convolt.layers",
    "Recipe": "convolt.recipe",
    "Residual": "convolt.layers",
    "Run": "convolt.run",
    "SGD": "convolt.optimizers",
    "SampleRng": "convolt.rng",
    "Sequential": "convolt.layers",
    "SiLU": "convolt.layers",
    "Split": "convolt.data",
    "Step": "convolt.schedules",
    "StepEvent": "convolt.callbacks",
    "StepResult": "convolt.engine",
    "Time": "convolt.duration",
    "Triangular": "convolt.schedules",
    "WarmRestarts": "convolt.schedules",
    "Warmup": "convolt.schedules",
    "engines": "convolt.engines",
    "evaluate": "convolt.evaluation",
    "fit": "convolt.train",
    "from_torch": "convolt.convert",
    "load_dataset": "convolt.datasets",
    "scaling": "convolt.scaling",
    "to_torch": "convolt.convert",
    "world": "convolt.comms.mpi",
    "zoo": "convolt.zoo",
}

__all__ = [
    "EMA",
    "GELU",
    "MSE",
    "SGD",
    "Adam",
    "AdamW",
    "AlternatingFlip",
    "AvgPool2d",
    "BatchNorm2d",
    "Callback",
    "Constant",
    "Conv2d",
    "ConvoltError",
    "Cosine",
    "CosineCyclic",
    "Crop",
    "CrossEntropy",
    "Cutout",
    "DataSpec",
    "Dataset",
    "Dense",
    "Distillation",
    "DistillationTargets",
    "Dropout",
    "EarlyStopping",
    "Engine",
    "Epoch",
    "Evaluation",
    "Executor",
    "Exponential",
    "Flatten",
    "Flip",
    "GlobalAvgPool2d",
    "LeakyReLU",
    "Linear",
    "MaxPool2d",
    "Mixup",
    "Model",
    "MultiStep",
    "NonFinite",
    "Normalize",
    "OneCycle",
    "Parallel",
    "Params",
    "Piecewise",
    "Plateau",
    "ProgressBar",
    "RMSprop",
    "ReLU",
    "Recipe",
    "Residual",
    "Run",
    "SampleRng",
    "Sequential",
    "SiLU",
    "Split",
    "Step",
    "StepEvent",
    "StepResult",
    "Time",
    "Triangular",
    "WarmRestarts",
    "Warmup",
    "engines",
    "evaluate",
    "fit",
    "from_torch",
    "load_dataset",
    "scaling",
    "to_torch",
    "world",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'convolt' has no attribute {name!r}")
    module = import_module(_HOMES[name])
    value = module if _HOMES[name] == f"convolt.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
