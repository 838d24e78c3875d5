"""One model on PyTorch: memory shared with ``Params``, autograd, half precision.

On CUDA every shared vector has a twin on the host, and whoever asks last, host or device, gets the newest values.

Half precision autocasts products and keeps float32 masters. fp16 scales its loss (Micikevicius et al. 2018): a
gradient that overflows is taken again with half the scale, from the same forward pass. So no step is ever skipped, and
``grads`` never holds a scaled value; clipping, accumulation and allreduce need not know.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convolt.convert.modules import Normalize, module_of
from convolt.engine import Executor, OnReady, StepResult
from convolt.engines.torch.losses import to_numpy, to_tensor, total_loss
from convolt.engines.torch.optimizers import FlatOptimizer
from convolt.engines.torch.synchronized import SynchronizedNorm
from convolt.errors import ConfigError, EngineError
from convolt.layers import BatchNorm2d, Dropout, Layer, Residual, Shape, walk
from convolt.losses import Loss
from convolt.model import Model
from convolt.optimizers import Optimizer
from convolt.params import Array, Params
from convolt.precision import precision
from convolt.rng import SampleRng

# fp16's loss scale: the values of torch.amp.GradScaler.
FIRST_LOSS_SCALE = 65_536.0
GROWTH_INTERVAL = 2_000


class _Twin:
    """A host array and its tensor on the device: one memory on the CPU, two on CUDA.

    Whoever asks last has the newest values; the handover costs a copy on CUDA and nothing on the CPU.
    """

    def __init__(self, host: Array, device: torch.device) -> None:
        self._host = torch.from_numpy(host)
        self._device = self._host.to(device)
        self._newest = self._device

    def on_host(self) -> None:
        """The host array is to be read or written."""
        self._hand_to(self._host)

    def on_device(self) -> Tensor:
        """The tensor, to be read or written."""
        return self._hand_to(self._device)

    def written_on_host(self) -> None:
        """The host array was written to through a reference kept from before."""
        self._newest = self._host

    def _hand_to(self, owner: Tensor) -> Tensor:
        if self._newest is not owner:
            owner.copy_(self._newest)
            self._newest = owner
        return owner


class _MaskedDropout(nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    """Dropout by a mask that the executor draws from the samples' identities; None is the identity."""

    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.mask is None else x * self.mask


class TorchExecutor(Executor):
    """A model as native modules around views of the flat weights."""

    def __init__(
        self,
        model: Model,
        params: Params,
        precision_name: str,
        device: torch.device,
        threads: int,
        memory_format: torch.memory_format,
        compiled: bool,
        fp32_precision: str,
    ) -> None:
        formats = precision(precision_name)
        self.model = model
        self._device, self._threads, self._memory_format = device, threads, memory_format
        self._fp32_precision = fp32_precision
        self._dtype = torch.float64 if formats.compute == np.float64 else torch.float32
        self._half = None if formats.half is None else getattr(torch, formats.half)
        self._params, self._grads = params, Params(model, formats.compute)
        self._weights, self._gradient = _Twin(params.flat, device), _Twin(self._grads.flat, device)
        self._statistics = {
            name: _Twin(array, device) for name, array in params.buffers.items() if array.dtype.kind == "f"
        }
        self._leaves = dict(_leaves(model.layers, model.input_shape))
        self._module = self._modules()
        self._dropouts = [
            (_MaskedDropout(), name, layer, shape)
            for name, (layer, shape) in self._leaves.items()
            if isinstance(layer, Dropout)
        ]
        for masked, name, _, _ in self._dropouts:
            self._module.set_submodule(name, masked)
        self._forward = torch.compile(self._module) if compiled else self._module
        self._parameters = dict(self._module.named_parameters())
        # CUDA runs ahead of the host, and fp16 may begin again: there no slice is final before the end of backward.
        self._streams = device.type == "cpu" and self._half is not torch.float16
        self._on_ready: OnReady | None = None
        for name, parameter in self._parameters.items():
            parameter.grad = self._view(self._gradient, name)
            parameter.register_post_accumulate_grad_hook(partial(self._announce, params.slices[name]))
        self._optimizer = FlatOptimizer(params.flat.size, params.decays())
        self._loss_scale, self._good_steps = FIRST_LOSS_SCALE, 0
        self._synchronized = False

    # --- memory ---

    def _modules(self) -> nn.Module:
        """Modules around views of the flat tensors; counters stay on the host, where nothing waits for them."""
        tensors = {name: torch.from_numpy(array) for name, array in self._params.buffers.items()}
        tensors |= {name: twin.on_device() for name, twin in self._statistics.items()}
        tensors |= {name: self._view(self._weights, name) for name in self._params}
        module = module_of(self.model, tensors)
        for part in module.modules():
            if isinstance(part, Normalize):
                part.to(self._device, self._dtype)
        return module

    def _view(self, twin: _Twin, name: str) -> Tensor:
        return twin.on_device()[self._params.slices[name]].view(self._params.specs[name].shape)

    @property
    def params(self) -> Params:  # type: ignore[override]  # reading may need a copy from the device
        """The master weights and the statistics, brought to the host."""
        for twin in (self._weights, *self._statistics.values()):
            twin.on_host()
        return self._params

    @property
    def grads(self) -> Params:  # type: ignore[override]  # as above
        """The gradients, brought to the host; what is written to them goes back to the device."""
        self._gradient.on_host()
        return self._grads

    def weights_changed(self) -> None:
        """The host's weights and statistics are the newest."""
        for twin in (self._weights, *self._statistics.values()):
            twin.written_on_host()

    def statistics(self) -> dict[str, Array]:
        """A copy of the buffers; the weights stay where they are."""
        for twin in self._statistics.values():
            twin.on_host()
        return self._params.statistics()

    def restore_statistics(self, statistics: dict[str, Array]) -> None:
        """Put back what ``statistics`` gave."""
        for twin in self._statistics.values():
            twin.on_host()
        self._params.restore_statistics(statistics)

    def synchronize_statistics(self, add: Callable[[Array], None]) -> None:
        """Every BatchNorm of the module is put into one that adds over ranks."""
        if self._half is torch.float16:
            raise EngineError("engine torch: sync_batch_norm needs another precision than fp16, whose backward repeats")
        for name, (layer, _) in self._leaves.items():
            if isinstance(layer, BatchNorm2d):
                self._module.set_submodule(name, SynchronizedNorm(self._module.get_submodule(name), name, add))
        self._synchronized = True

    def zero_grads(self) -> None:
        """Zeros, written where the gradients are."""
        with self._limited():
            self._gradient.on_device().zero_()

    def grad_norm(self) -> float:
        """Euclidean norm, taken where the gradients are."""
        with self._limited():
            return math.sqrt(_squared_norm(self._gradient.on_device()))

    # --- the contract ---

    def predict(self, x: Array) -> Array:
        """Logits (N, classes), without autograd."""
        with self._limited(), torch.inference_mode():
            self._prepare(training=False)
            return to_numpy(self._logits(x))

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
        """Forward, native loss and autograd; the loss is read after backward, so that CUDA waits once."""
        if fresh:
            self.zero_grads()
        with self._limited():
            self._prepare(training=True)
            self._check_batch(len(x))
            self._draw_masks(len(x), rng)
            logits = self._logits(x)
            total = total_loss(loss, logits, y)
            if total.requires_grad:  # a model may have no parameters
                self._backward(total * scale, on_ready)
            return StepResult(total.item(), to_numpy(logits))

    def update(self, optimizer: Optimizer, part: slice | None = None) -> None:
        """One step of PyTorch's optimizer on the flat weights."""
        with self._limited():
            self._optimizer.step(optimizer, self._weights.on_device(), self._gradient.on_device(), part)

    def optimizer_state(self) -> dict[str, Array]:
        """The optimizer's flat arrays and ``step``; with fp16 also the loss scale and how long it has been good."""
        state = self._optimizer.save()
        if self._half is torch.float16:
            state |= {"loss_scale": np.array(self._loss_scale), "good_steps": np.array(self._good_steps)}
        return state

    def load_optimizer_state(self, state: dict[str, Array]) -> None:
        """Go on from any engine's state."""
        self._optimizer.load(state, self._weights.on_device())
        self._loss_scale = float(state.get("loss_scale", FIRST_LOSS_SCALE))
        self._good_steps = int(state.get("good_steps", 0))

    # --- forward ---

    def _prepare(self, training: bool) -> None:
        """The device has the newest values, the modules are in the right mode, no mask is left from before."""
        for twin in (self._weights, self._gradient, *self._statistics.values()):
            twin.on_device()
        if self._module.training != training:
            self._module.train(training)
        for masked, *_ in self._dropouts:
            masked.mask = None

    def _check_batch(self, samples: int) -> None:
        for name, (layer, shape) in () if self._synchronized else self._leaves.items():
            if isinstance(layer, BatchNorm2d) and samples * math.prod(shape[1:]) < 2:
                raise ConfigError(
                    f"layer {name}: BatchNorm2d needs more than one value a channel to train; use a larger batch"
                )

    def _draw_masks(self, samples: int, rng: SampleRng | None) -> None:
        """0 or 1/(1 - p) for each element: the same draws as in every engine."""
        for masked, name, layer, shape in self._dropouts:
            if not (self.dropout and layer.p):
                continue
            if rng is None or len(rng) != samples:
                raise ConfigError(f"layer {name}: Dropout needs rng=SampleRng(seed, epoch, indices) in loss_and_grads")
            kept = to_tensor(rng.uniform(f"dropout:{name}", shape) >= layer.p, self._device)
            masked.mask = kept.to(self._dtype).mul_(1 / (1 - layer.p))

    def _logits(self, x: Array) -> Tensor:
        if x.shape[1:] != self.model.input_shape:
            raise ConfigError(f"images must have shape (N, {str(self.model.input_shape)[1:-1]}); got {x.shape}")
        images = to_tensor(x, self._device).to(self._dtype)
        if x.dtype == np.uint8:
            images.div_(255)
        if images.ndim == 4:
            images = images.contiguous(memory_format=self._memory_format)
        with self._autocast():
            logits = self._forward(images)
        return logits.to(self._dtype)

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._half is None else torch.autocast(self._device.type, dtype=self._half)

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """PyTorch keeps to ``threads`` and the precision inside and gets its own back: too cheap to be measured."""
        products = torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul
        before, kept = torch.get_num_threads(), [kind.fp32_precision for kind in products]
        torch.set_num_threads(self._threads)
        for kind in products:
            kind.fp32_precision = self._fp32_precision
        try:
            yield
        finally:
            torch.set_num_threads(before)
            for kind, own in zip(products, kept, strict=True):
                kind.fp32_precision = own

    # --- backward ---

    def _backward(self, objective: Tensor, on_ready: OnReady | None) -> None:
        """Add the gradient of ``objective``; its slices are announced as they become final."""
        self._on_ready = on_ready if self._streams else None
        if self._half is torch.float16:
            self._backward_scaled(objective)
        else:
            objective.backward()
        if on_ready is not None and not self._streams:
            on_ready(slice(0, self.grads.flat.size))

    def _announce(self, part: slice, parameter: Tensor) -> None:
        if self._on_ready is not None:
            self._on_ready(part)

    def _backward_scaled(self, objective: Tensor) -> None:
        """The gradient of ``loss_scale x objective``, over ``loss_scale``; an overflow halves the scale and repeats.

        At a scale of 1 an infinity is the network's own and is passed on, as is that of a loss that is not finite.
        """
        hopeless = not math.isfinite(objective.item())
        while True:
            parts = torch.autograd.grad(objective * self._loss_scale, self._parameters.values(), retain_graph=True)
            gradient = torch.cat([part.reshape(-1) for part in parts])
            good = math.isfinite(_squared_norm(gradient))
            if good or hopeless or self._loss_scale <= 1:
                break
            self._loss_scale, self._good_steps = self._loss_scale / 2, 0
        self._gradient.on_device().add_(gradient, alpha=1 / self._loss_scale)
        if hopeless:  # a step that is left out leaves the scale's state alone, too
            return
        self._good_steps = self._good_steps + 1 if good else 0
        if self._good_steps == GROWTH_INTERVAL:
            self._loss_scale, self._good_steps = self._loss_scale * 2, 0


def _squared_norm(v: Tensor) -> float:
    """One pass; not finite as soon as one element is not."""
    squared: float = torch.dot(v, v).item()
    return squared


def _leaves(members: tuple[Layer, ...], shape: Shape, prefix: str = "") -> Iterator[tuple[str, tuple[Layer, Shape]]]:
    """Every layer and its input shape, by name; Residual is opened."""
    for name, layer, before, _ in walk(members, shape, prefix):
        if isinstance(layer, Residual):
            yield from _leaves(layer.body, before, f"{name}.body.")
            yield from _leaves(layer.shortcut, before, f"{name}.shortcut.")
        else:
            yield name, (layer, before)
