"""How an engine is built from a table of kernels.

A table maps a layer type, or a run of types, to a ``Kernel``: a pair (forward, backward). An engine's table is the
one before it plus overrides, and a fusion is nothing but a longer key: at every place of the model the longest
matching run wins. ``Chain`` is a model cut into such stages; ``TableExecutor`` is the executor around it.

``ctx`` is a stage's memory: what forward leaves for backward, and buffers that are reused from step to step. Arrays
between stages have the engine's layout, either NCHW or CHWN (batch innermost); a table must not mix the two.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from threadpoolctl import ThreadpoolController

from convolt.engine import EngineRecipe, Executor, OnReady, StepResult
from convolt.errors import ConfigError, EngineError
from convolt.layers import Layer, Shape, walk
from convolt.losses import Loss
from convolt.model import Model
from convolt.optimizers import Optimizer, init_state, step_flat
from convolt.params import Params, aligned_zeros
from convolt.precision import precision
from convolt.rng import SampleRng
from convolt.workers import Workers

Array = NDArray[Any]
Layout = Literal["NCHW", "CHWN"]

# Elements of a ufunc's buffer. NumPy 2.4 copies rows that are shorter than a quarter of it into it before it adds them:
# of its own 8,192, rows of 2,040 numbers take four times as long as rows of 2,060.
BUFFER = 1024


class Kernel(NamedTuple):
    """Forward and backward of one layer type, or of a run of types.

    forward(ctx, layer, params, x) -> y
    backward(ctx, layer, params, grads, dy) -> dx; gradients are ADDED into ``grads``.

    For a run of types ``layer``, ``params`` and ``grads`` are tuples with one entry for each layer.
    """

    forward: Callable[["Context", Any, Any, Array], Array]
    backward: Callable[["Context", Any, Any, Any, Array], Array]


Table = Mapping[tuple[type[Layer], ...], Kernel]


class Scope:
    """The arrays of one layer, by local name: ``scope["weight"]``, and ``scope.at("body")`` for what is inside."""

    def __init__(self, arrays: Mapping[str, Array], prefix: str = "") -> None:
        self._arrays = arrays
        self._prefix = prefix
        self._inner: dict[str, Scope] = {}

    def __getitem__(self, name: str) -> Array:
        return self._arrays[self._prefix + name]

    def at(self, name: str) -> "Scope":
        """The scope of a layer or branch inside this one."""
        if name not in self._inner:
            self._inner[name] = Scope(self._arrays, f"{self._prefix}{name}.")
        return self._inner[name]


@dataclass
class Phase:
    """What all stages of an executor must know of the step at hand."""

    layout: Layout
    workers: Workers
    training: bool = False
    dropout: bool = True
    rng: SampleRng | None = None
    add_ranks: Callable[[Array], None] | None = None


class Context:
    """A stage's memory.

    name: of the first layer, such as ``"3"``. state: the layer's buffers (running mean and variance).
    needs_dx: false for the first stage with parameters, whose input gradient nobody reads.
    """

    def __init__(self, name: str, phase: Phase, table: Table, state: Scope) -> None:
        self.name = name
        self.phase = phase
        self.state = state
        self.needs_dx = True
        self.saved: dict[str, Any] = {}
        self._table = table
        self._buffers: dict[str, Array] = {}
        self._chains: dict[str, Chain] = {}

    @property
    def training(self) -> bool:
        """Whether this is a training step."""
        return self.phase.training

    @property
    def workers(self) -> Workers:
        """The threads that share a kernel's tiles."""
        return self.phase.workers

    @property
    def synchronized(self) -> bool:
        """Whether statistics are taken over the samples of all ranks."""
        return self.phase.add_ranks is not None

    def over_ranks(self, *sums: Array | float) -> list[Array]:
        """Each of these sums over one rank's samples as that over all ranks' samples, in float64."""
        parts = [np.atleast_1d(np.asarray(part, np.float64)) for part in sums]
        numbers = np.concatenate(parts)
        if self.phase.add_ranks is not None:
            self.phase.add_ranks(numbers)
        return np.split(numbers, np.cumsum([len(part) for part in parts])[:-1])

    def buffer(self, key: str, shape: Shape, dtype: DTypeLike) -> Array:
        """An array whose memory is kept from step to step; its content is what was left there, zeros at first.

        A smaller batch gets a view of the same memory.
        """
        size = int(np.prod(shape))
        held = self._buffers.get(key)
        if held is None or held.size < size or held.dtype != dtype:
            held = self._buffers[key] = aligned_zeros(size, dtype)
        return held[:size].reshape(shape)

    def chain(self, branch: str, layers: tuple[Layer, ...], shape: Shape) -> "Chain":
        """The stages of a branch inside this layer, such as a Residual's body."""
        if branch not in self._chains:
            name = f"{self.name}.{branch}."
            self._chains[branch] = Chain(layers, shape, self._table, self.phase, self.state.at(branch), name)
        return self._chains[branch]


@dataclass
class Stage:
    """One kernel's place in a chain: local names of its layers, the layers, the kernel and its memory."""

    names: tuple[str, ...]
    layers: tuple[Layer, ...]
    kernel: Kernel
    ctx: Context
    has_parameters: bool = field(init=False)

    def __post_init__(self) -> None:
        self.has_parameters = any(layer.parameters() for layer in self.layers)

    def forward(self, params: Scope, x: Array) -> Array:
        """Run the kernel's forward."""
        return self.kernel.forward(self.ctx, self._one(self.layers), self._one(self._scopes(params)), x)

    def backward(self, params: Scope, grads: Scope, dy: Array) -> Array:
        """Run the kernel's backward."""
        scopes = self._one(self._scopes(params)), self._one(self._scopes(grads))
        return self.kernel.backward(self.ctx, self._one(self.layers), *scopes, dy)

    def _scopes(self, arrays: Scope) -> tuple[Scope, ...]:
        return tuple(arrays.at(name) for name in self.names)

    def _one(self, items: tuple[Any, ...]) -> Any:
        return items[0] if len(items) == 1 else items


class Chain:
    """Layers cut into stages, each the longest run that the table has a kernel for. Raises EngineError."""

    def __init__(
        self, layers: tuple[Layer, ...], shape: Shape, table: Table, phase: Phase, state: Scope, prefix: str = ""
    ) -> None:
        flat = [(name, layer) for name, layer, _, _ in walk(layers, shape)]
        longest = max(len(key) for key in table)
        self.stages: list[Stage] = []
        start = 0
        while start < len(flat):
            run = flat[start : start + longest]
            while run and tuple(type(layer) for _, layer in run) not in table:
                run.pop()
            if not run:
                name, layer = flat[start]
                raise EngineError(f"layer {prefix}{name}: this engine has no kernel for {type(layer).__name__}")
            names, members = tuple(name for name, _ in run), tuple(layer for _, layer in run)
            ctx = Context(prefix + names[0], phase, table, state.at(names[0]))
            self.stages.append(Stage(names, members, table[tuple(type(layer) for layer in members)], ctx))
            start += len(run)

    def forward(self, params: Scope, x: Array) -> Array:
        """All stages in order."""
        for stage in self.stages:
            x = stage.forward(params, x)
        return x

    def backward(
        self, params: Scope, grads: Scope, dy: Array, first: int = 0, done: Callable[[Stage], None] | None = None
    ) -> Array:
        """All stages from the last down to ``first``; ``done`` is told of each."""
        for stage in reversed(self.stages[first:]):
            dy = stage.backward(params, grads, dy)
            if done is not None:
                done(stage)
        return dy


class TableExecutor(Executor):
    """An executor from a table of NumPy kernels.

    workers: threads among which the kernels share their tiles. blas_threads: what BLAS may take during a call.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        recipe: EngineRecipe,
        table: Table,
        layout: Layout,
        workers: int = 1,
        blas_threads: int = 1,
    ) -> None:
        formats = precision(recipe.precision)
        self.model = model
        self.params = params
        self._dtype = formats.compute
        self._work = params if formats.master == formats.compute else Params(model, formats.compute)
        if self._work is not params:
            self._work.buffers, self._work.buffers_flat = params.buffers, params.buffers_flat
        self.grads = Params(model, formats.compute)
        self._phase = Phase(layout, Workers(workers))
        self._blas_threads = blas_threads
        self._blas = ThreadpoolController().select(user_api="blas")
        self._chain = Chain(model.layers, model.input_shape, table, self._phase, Scope(params.buffers))
        self._first = next((i for i, stage in enumerate(self._chain.stages) if stage.has_parameters), 0)
        for stage in self._chain.stages[: self._first + 1]:
            stage.ctx.needs_dx = False
        self._scopes = Scope(self._work), Scope(self.grads)
        self._state: dict[str, Array] = {}
        self._step = 0
        self._decays = params.decays()
        self._input = Context("input", self._phase, table, Scope({}))
        self.weights_changed()

    def weights_changed(self) -> None:
        """Round the master weights into the compute format again."""
        if self._work is not self.params:
            self._work.flat[...] = self.params.flat

    def predict(self, x: Array) -> Array:
        """Logits (N, classes)."""
        self._phase.training = False
        with self._limited():
            return self._rows(self._chain.forward(self._scopes[0], self._unpack(x))).copy()

    def loss_and_grads(
        self,
        x: Array,
        y: Any,
        loss: Loss,
        scale: float,
        rng: SampleRng | None = None,
        on_ready: OnReady | None = None,
        fresh: bool = False,
    ) -> StepResult:
        """Forward, loss and backward through the table's kernels."""
        if fresh:
            self.zero_grads()
        self._phase.training, self._phase.rng, self._phase.dropout = True, rng, self.dropout
        params, grads = self._scopes
        with self._limited():
            logits = self._rows(self._chain.forward(params, self._unpack(x))).copy()
            total, dlogits = loss(logits, y)
            dlogits = (dlogits * scale).astype(self._dtype, copy=False)
            dy = dlogits if self._phase.layout == "NCHW" else np.ascontiguousarray(dlogits.T)
            ready = None if on_ready is None else self._announce(on_ready)
            self._chain.backward(params, grads, dy, self._first, ready)
        return StepResult(total, logits)

    def move(self, weights: Array, gradient: Array) -> bool:
        """Kernels ask for arrays by name in every call."""
        self.params.move(weights)
        self.grads.move(gradient)
        return True

    def synchronize_statistics(self, add: Callable[[Array], None]) -> None:
        """BatchNorm's kernels add over ranks."""
        self._phase.add_ranks = add

    def update(self, optimizer: Optimizer, part: slice | None = None) -> None:
        """The optimizer's equations on the master weights."""
        if not self._state:
            self._state = init_state(optimizer, self.params.flat.size, self.params.dtype)
        self._step += 1
        step_flat(optimizer, self.params.flat, self.grads.flat, self._state, self._step, self._decays, part)
        self.weights_changed()

    def optimizer_state(self) -> dict[str, Array]:
        """The optimizer's flat arrays and ``step``."""
        return {**self._state, "step": np.array(self._step)}

    def load_optimizer_state(self, state: dict[str, Array]) -> None:
        """Go on from a checkpoint's optimizer state."""
        self._step = int(state["step"])
        self._state = {
            name: array.astype(self.params.dtype)
            for name, array in state.items()
            if array.shape == self.params.flat.shape
        }

    def close(self) -> None:
        """End the worker threads."""
        self._phase.workers.close()

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """BLAS keeps to its threads; a number that overflows is the loop's business, which checks, and no warning."""
        with self._blas.limit(limits=self._blas_threads), np.errstate(over="ignore", invalid="ignore"):
            np.setbufsize(BUFFER)  # as long as errstate holds
            yield

    def _unpack(self, x: Array) -> Array:
        """Images as the kernels take them: the compute format, the engine's layout, uint8 scaled to [0, 1]."""
        if x.shape[1:] != self.model.input_shape:
            raise ConfigError(f"images must have shape (N, {str(self.model.input_shape)[1:-1]}); got {x.shape}")
        given = x if self._phase.layout == "NCHW" else np.moveaxis(x, 0, -1)
        y = self._input.buffer("x", given.shape, self._dtype)
        if x.dtype == np.uint8:
            np.divide(given, self._dtype.type(255), out=y)
        else:
            y[...] = given
        return y

    def _rows(self, y: Array) -> Array:
        return y if self._phase.layout == "NCHW" else y.T

    def _announce(self, on_ready: OnReady) -> Callable[[Stage], None]:
        def done(stage: Stage) -> None:
            names = [
                f"{name}.{local}"
                for name, layer in zip(stage.names, stage.layers, strict=True)
                for local in layer.parameters()
            ]
            if names:
                on_ready(slice(self.grads.slices[names[0]].start, self.grads.slices[names[-1]].stop))

        return done
