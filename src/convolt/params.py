"""Parameters: one flat buffer with named views, and the buffers beside it.

One contiguous vector makes the optimizer one pass, the allreduce one call and a checkpoint one copy. Names are those
of ``torch.nn.Sequential``. Gradients are a second ``Params`` of the same shape. Buffers (BatchNorm's statistics) live
outside the trainable vector, in a flat vector of their own so that a step can be undone by one copy.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from convolt.errors import ConfigError, nearest
from convolt.layers import BufferSpec, ParamSpec
from convolt.model import Model

Array = NDArray[Any]
ALIGNMENT = 64


def aligned_zeros(size: int, dtype: DTypeLike) -> Array:
    """Zeros on a 64-byte boundary: a cache line, an AVX-512 register, an AMX tile row."""
    dtype = np.dtype(dtype)
    raw = np.zeros(size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size * dtype.itemsize].view(dtype)


class Params(Mapping[str, Array]):
    """Named views of one flat vector: ``params["0.weight"]`` is a view of ``params.flat``.

    flat: 1-D, every trainable value, in the model's order.
    buffers: name -> array, not trained; ``buffers_flat`` holds them all but the integer counters.
    """

    def __init__(self, model: Model, dtype: DTypeLike = np.float32) -> None:
        self.specs: dict[str, ParamSpec] = model.parameters()
        self._buffer_specs: dict[str, BufferSpec] = model.buffers()
        self.slices: dict[str, slice] = {}
        start = 0
        for name, spec in self.specs.items():
            self.slices[name] = slice(start, start + spec.size)
            start += spec.size
        self._lie_in(aligned_zeros(start, dtype))
        self._names = model.state_names()
        self._make_buffers(dtype)

    def move(self, memory: Array) -> None:
        """Lie in this memory from now on, of the same length and type; values and names stay, addresses do not."""
        memory[...] = self.flat
        self._lie_in(memory)

    def _lie_in(self, memory: Array) -> None:
        self.flat: Array = memory
        self._views = {name: memory[part].reshape(self.specs[name].shape) for name, part in self.slices.items()}

    def _make_buffers(self, dtype: DTypeLike) -> None:
        floats = {name: spec for name, spec in self._buffer_specs.items() if not spec.integer}
        sizes = {name: int(np.prod(spec.shape)) for name, spec in floats.items()}
        self.buffers_flat: Array = aligned_zeros(sum(sizes.values()), dtype)
        self.buffers: dict[str, Array] = {}
        start = 0
        for name, spec in self._buffer_specs.items():
            if spec.integer:
                self.buffers[name] = np.zeros(spec.shape, np.int64)
                continue
            view = self.buffers_flat[start : start + sizes[name]].reshape(spec.shape)
            view[...] = spec.value
            self.buffers[name] = view
            start += sizes[name]

    @classmethod
    def init(cls, model: Model, seed: int, dtype: DTypeLike = np.float32) -> "Params":
        """First values of every parameter: ``value + U(-bound, bound)``, a pure function of (seed, position).

        Drawn in float64 and rounded, so that every precision starts from the same point.
        """
        params = cls(model, dtype)
        for position, (name, spec) in enumerate(params.specs.items()):
            if spec.bound:
                generator = np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))
                params[name][...] = spec.value + generator.uniform(-spec.bound, spec.bound, spec.shape)
            else:
                params[name][...] = spec.value
        return params

    def __getitem__(self, name: str) -> Array:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the trainable values."""
        return self.flat.dtype

    def decays(self) -> list[tuple[slice, bool]]:
        """Runs of the flat vector, each with True when it holds weights and False for biases and norms."""
        runs: list[tuple[slice, bool]] = []
        for name, spec in self.specs.items():
            here = self.slices[name]
            if runs and runs[-1][1] == spec.is_weight:
                here = slice(runs.pop()[0].start, here.stop)
            runs.append((here, spec.is_weight))
        return runs

    def state_dict(self) -> dict[str, Array]:
        """Copies of every parameter and buffer under PyTorch's names."""
        return {name: array.copy() for name, array in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take every value from ``state``. Raises ConfigError when a name or a shape does not agree."""
        mine = self._state()
        for name in [*(mine.keys() - state.keys()), *(state.keys() - mine.keys())]:
            problem = "is missing" if name in mine else f"is unknown ({nearest(name, mine)})"
            raise ConfigError(f"load_state_dict: {name!r} {problem}; the names must be those of the model")
        for name, array in mine.items():
            given = np.asarray(state[name])
            if given.shape != array.shape:
                raise ConfigError(f"load_state_dict: {name!r} must have shape {array.shape}; got {given.shape}")
        for name, array in mine.items():
            array[...] = state[name]

    def statistics(self) -> dict[str, Array]:
        """A copy of the buffers, to undo a step with."""
        return {name: array.copy() for name, array in self.buffers.items()}

    def restore_statistics(self, statistics: Mapping[str, Array]) -> None:
        """Put back what ``statistics`` gave."""
        for name, array in self.buffers.items():
            array[...] = statistics[name]

    def _state(self) -> dict[str, Array]:
        """Parameters and buffers in PyTorch's order: layer by layer, a layer's parameters before its buffers."""
        return {name: self._views[name] if name in self._views else self.buffers[name] for name in self._names}
