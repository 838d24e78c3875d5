"""Conversion from and to PyTorch modules, with weights both ways.

``to_torch`` makes an ``nn.Sequential`` whose state dict has the names and values of ``Params``. ``from_torch`` reads
any ``nn.Sequential`` as it stands, so names are kept, and traces every other module into a graph, which must be a chain
of layers with residual additions. This is the one place that finds PyTorch missing for either.
"""

from convolt.errors import MissingDependency

try:
    import torch as _  # noqa: F401  # the modules below need it
except ImportError:
    raise MissingDependency("torch", "conversion from and to PyTorch", "torch") from None

from convolt.convert.modules import to_torch
from convolt.convert.tracing import from_torch

__all__ = ["from_torch", "to_torch"]
