"""PyTorch's optimizers on the flat weights, with the semantics and the state names of ``convolt.optimizers``.

The state is flat vectors, as in every engine, so that a run may go on with another engine; PyTorch's optimizer gets
views of them. Hyperparameters have PyTorch's names and are set before each step from the optimizer at hand.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convolt.engines.torch.losses import to_numpy
from convolt.errors import ConfigError, EngineError
from convolt.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop, runs_within
from convolt.params import Array

# RMSprop has no fused form.
_NATIVE: dict[type, Callable[..., Any]] = {
    SGD: partial(torch.optim.SGD, fused=True),
    Adam: partial(torch.optim.Adam, fused=True),
    AdamW: partial(torch.optim.AdamW, fused=True),
    RMSprop: torch.optim.RMSprop,
}


@dataclass
class FlatOptimizer:
    """The optimizer's state for weights of ``size`` values; ``decays`` tells which runs of them are weights."""

    size: int
    decays: list[tuple[slice, bool]]
    steps: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    _native: Any = None
    _built_for: tuple[type, bool, slice | None] | None = None

    def save(self) -> dict[str, Array]:
        """Copies of the flat vectors, and ``step``."""
        vectors = {name: to_numpy(vector).copy() for name, vector in self.state.items()}
        return {**vectors, "step": np.array(self.steps)}

    def load(self, saved: dict[str, Array], like: Tensor) -> None:
        """Go on from the vectors of any engine, in the format and on the device of ``like``."""
        self.steps = int(saved["step"])
        self.state = {
            name: torch.tensor(array, dtype=like.dtype, device=like.device)
            for name, array in saved.items()
            if array.shape == (self.size,)
        }
        self._built_for = None

    def step(self, optimizer: Optimizer, weights: Tensor, gradient: Tensor, part: slice | None = None) -> None:
        """One step of ``weights``, or of a part of them, in place. Raises EngineError, ConfigError."""
        if self.steps == 0:
            for name in optimizer.state_names:
                self.state.setdefault(name, torch.zeros_like(weights))
        if missing := set(optimizer.state_names) - self.state.keys():
            raise ConfigError(
                f"{type(optimizer).__name__}: the run began without {', '.join(sorted(missing))}; "
                "a momentum that is scheduled must not begin at 0"
            )
        if self._built_for != (type(optimizer), optimizer.decay_norm_and_bias, part):
            self._build(optimizer, weights, gradient, part)
        for group in self._native.param_groups:
            self._set_hyperparameters(group, optimizer)
        self._native.step()
        self.steps += 1

    def _build(self, optimizer: Optimizer, weights: Tensor, gradient: Tensor, part: slice | None) -> None:
        """One segment for all, or one for each run of weights and of biases and norms if only weights decay."""
        make = _NATIVE.get(type(optimizer))
        if make is None:
            known = ", ".join(kind.__name__ for kind in _NATIVE)
            raise EngineError(f"engine torch: optimizer must be one of {known}; got {type(optimizer).__name__}")
        runs = [(slice(0, self.size), True)] if optimizer.decay_norm_and_bias else self.decays
        segments: dict[bool, list[Tensor]] = {}
        state: dict[Tensor, dict[str, Tensor]] = {}
        for run, is_weight in runs_within(runs, part):
            segment = weights[run]
            segment.grad = gradient[run]
            segments.setdefault(is_weight, []).append(segment)
            state[segment] = {name: vector[run] for name, vector in self.state.items()}
            state[segment]["step"] = torch.tensor(float(self.steps), device=weights.device)
        self._native = make([{"params": members, "decays": kind} for kind, members in segments.items()])
        self._native.state.update(state)
        self._built_for = type(optimizer), optimizer.decay_norm_and_bias, part

    def _set_hyperparameters(self, group: dict[str, Any], optimizer: Optimizer) -> None:
        """PyTorch knows decoupled decay in Adam and AdamW; elsewhere it is applied here."""
        group.update({name: value for name, value in vars(optimizer).items() if name in group})
        if not group["decays"]:
            group["weight_decay"] = 0.0
        if self.steps == 0 and "dampening" in group:
            group["dampening"] = 0.0  # PyTorch's first momentum is the gradient itself; here it starts from zeros
        if isinstance(optimizer, SGD | RMSprop) and optimizer.decoupled_weight_decay:
            for segment in group["params"]:
                segment.mul_(1 - optimizer.lr * group["weight_decay"])
            group["weight_decay"] = 0.0
