"""Optimizers, each written as the equations of its paper.

An optimizer is a frozen set of hyperparameters with PyTorch's names and defaults. It owns no arrays: the state is a
dictionary of flat vectors under PyTorch's names, made by ``init_state`` and saved as it is. A scheduled hyperparameter
is a new optimizer, ``dataclasses.replace(optimizer, lr=lr)``.

Two things are called weight decay and both exist here. L2 adds lambda w to the gradient, where momentum and the
adaptive scale see it. Decoupled decay (Loshchilov and Hutter 2019) shrinks the weights by lr lambda beside the step.
They are the same for plain SGD only. With ``decay_norm_and_bias=False`` both leave biases and norms alone.

``step_flat`` updates all parameters. It calls ``update`` on blocks that, with the block's gradient, state and the
temporaries of the equations, stay in the L2 cache. Every vector then crosses memory once, as in a fused kernel, and
the equations stay readable.

Notation: w weights, g gradient, t step from 1, lambda weight decay. All vectors are 1-D and of one type.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from convolt.checks import check, check_flag, check_number
from convolt.duration import check_length
from convolt.errors import ConfigError

Array = NDArray[Any]
State = dict[str, Array]

BLOCK = 16_384  # elements; 64 KiB in float32


class Optimizer(Protocol):
    """What the training loop needs of an optimizer."""

    @property
    def lr(self) -> float:
        """The learning rate."""
        ...

    @property
    def weight_decay(self) -> float:
        """The factor lambda, of L2 or of decoupled decay."""
        ...

    @property
    def decay_norm_and_bias(self) -> bool:
        """Whether biases and the parameters of norms decay as weights do."""
        ...

    @property
    def state_names(self) -> tuple[str, ...]:
        """The vectors of the state, under PyTorch's names."""
        ...

    def update(self, w: Array, g: Array, state: State, step: int, weight_decay: float) -> None:
        """One step of w and state, in place; g is left alone. ``step`` counts from 1."""
        ...


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum.

        b <- momentum b + (1 - dampening) g        (b <- g in the first step)
        w <- w - lr b                              (lr (g + momentum b) with Nesterov's momentum)

    The learning rate is outside the buffer, as in PyTorch, so that a change of it acts at once.
    Reference: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
    """

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    decoupled_weight_decay: bool = False
    decay_norm_and_bias: bool = True

    def __post_init__(self) -> None:
        _check_common(self)
        check_number(self, "momentum", at_least=0)
        check_number(self, "dampening")
        check_flag(self, "nesterov")
        check_flag(self, "decoupled_weight_decay")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ConfigError(
                "SGD: nesterov must have momentum > 0 and dampening 0; "
                f"got momentum={self.momentum}, dampening={self.dampening}"
            )

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def update(self, w: Array, g: Array, state: State, step: int, weight_decay: float) -> None:
        g = decay(w, g, self.lr, weight_decay, self.decoupled_weight_decay)
        if self.momentum:
            b = state["momentum_buffer"]
            if step == 1:
                b[...] = g
            else:
                b *= self.momentum
                b += (1 - self.dampening) * g if self.dampening else g
            g = g + self.momentum * b if self.nesterov else b
        w -= self.lr * g


@dataclass(frozen=True)
class Adam:
    """Adam: momentum divided by the root of the mean squared gradient.

        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
        w <- w - lr m^ / (sqrt(v^) + eps),    m^ = m / (1 - beta1^t),    v^ = v / (1 - beta2^t)

    Reference: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1. eps is added to the
    root of the corrected v, as in the paper and PyTorch.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    decay_norm_and_bias: bool = True

    def __post_init__(self) -> None:
        _check_common(self)
        _check_betas(self)
        check_number(self, "eps", at_least=0)
        check_flag(self, "decoupled_weight_decay")

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def update(self, w: Array, g: Array, state: State, step: int, weight_decay: float) -> None:
        g = decay(w, g, self.lr, weight_decay, self.decoupled_weight_decay)
        _adam(self, w, g, state, step)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay.

        w <- (1 - lr lambda) w, then Adam's step

    Reference: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2. As in PyTorch,
    the decay is multiplied by lr, which takes the place of the paper's schedule multiplier.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    decay_norm_and_bias: bool = True

    def __post_init__(self) -> None:
        _check_common(self)
        _check_betas(self)
        check_number(self, "eps", at_least=0)

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def update(self, w: Array, g: Array, state: State, step: int, weight_decay: float) -> None:
        g = decay(w, g, self.lr, weight_decay, decoupled=True)
        _adam(self, w, g, state, step)


@dataclass(frozen=True)
class RMSprop:
    """RMSprop: the gradient divided by the root of its mean square, or of its variance if ``centered``.

        s <- alpha s + (1 - alpha) g^2,    a <- alpha a + (1 - alpha) g    (a = 0 unless centered)
        b <- momentum b + g / (sqrt(s - a^2) + eps),    w <- w - lr b

    Reference: Tieleman and Hinton, lecture 6.5 of "Neural networks for machine learning", 2012; the centered form is
    Graves, "Generating sequences with recurrent neural networks", 2013, eqs. 38-41, with eps outside the root.
    """

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    decoupled_weight_decay: bool = False
    decay_norm_and_bias: bool = True

    def __post_init__(self) -> None:
        _check_common(self)
        check_number(self, "alpha", at_least=0, at_most=1)
        check_number(self, "eps", at_least=0)
        check_number(self, "momentum", at_least=0)
        check_flag(self, "centered")
        check_flag(self, "decoupled_weight_decay")

    @property
    def state_names(self) -> tuple[str, ...]:
        centered = ("grad_avg",) if self.centered else ()
        return ("square_avg", *centered, *(("momentum_buffer",) if self.momentum else ()))

    def update(self, w: Array, g: Array, state: State, step: int, weight_decay: float) -> None:
        g = decay(w, g, self.lr, weight_decay, self.decoupled_weight_decay)
        s = state["square_avg"]
        s *= self.alpha
        s += (1 - self.alpha) * np.square(g)
        if self.centered:
            a = state["grad_avg"]
            a *= self.alpha
            a += (1 - self.alpha) * g
            g = g / (np.sqrt(s - np.square(a)) + self.eps)
        else:
            g = g / (np.sqrt(s) + self.eps)
        if self.momentum:
            b = state["momentum_buffer"]
            b *= self.momentum
            b += g
            g = b
        w -= self.lr * g


OPTIMIZERS: tuple[Callable[..., Optimizer], ...] = (SGD, Adam, AdamW, RMSprop)


def decay(w: Array, g: Array, lr: float, weight_decay: float, decoupled: bool) -> Array:
    """Weight decay: w <- (1 - lr lambda) w in place if decoupled, else L2. Returns the gradient to step with.

    L2 is the gradient of lambda/2 |w|^2: g + lambda w, in a new array.
    """
    if decoupled:
        w *= 1 - lr * weight_decay
        return g
    return g + weight_decay * w if weight_decay else g


def init_state(optimizer: Optimizer, size: int, dtype: DTypeLike) -> State:
    """The state before the first step: a vector of zeros for each name."""
    return {name: np.zeros(size, dtype) for name in optimizer.state_names}


def step_flat(
    optimizer: Optimizer,
    params: Array,
    grads: Array,
    state: State,
    step: int,
    decays: Sequence[tuple[slice, bool]],
    part: slice | None = None,
) -> None:
    """One optimizer step of all parameters, in place, block by block.

    params, grads: (n,). step: from 1. decays: runs that tile the vector, True for weights, False for biases and norms.
    part: the parameters to move, if not all.
    Raises ConfigError when a scheduled hyperparameter needs a state that the run began without.
    """
    missing = set(optimizer.state_names) - state.keys()
    if missing:
        raise ConfigError(
            f"{type(optimizer).__name__}: the run began without {', '.join(sorted(missing))}; "
            "a momentum that is scheduled must not begin at 0"
        )
    state = {name: state[name] for name in optimizer.state_names}
    if optimizer.decay_norm_and_bias:
        decays = [(slice(0, len(params)), True)]
    for run, is_weight in runs_within(decays, part):
        weight_decay = optimizer.weight_decay if is_weight or optimizer.decay_norm_and_bias else 0.0
        for block in _blocks(run.start, run.stop):
            views = {name: vector[block] for name, vector in state.items()}
            optimizer.update(params[block], grads[block], views, step, weight_decay)


def runs_within(runs: Sequence[tuple[slice, bool]], part: slice | None) -> list[tuple[slice, bool]]:
    """Runs of the flat vector, cut to a part of it.

    >>> runs_within([(slice(0, 5), True), (slice(5, 9), False)], slice(3, 6))
    [(slice(3, 5, None), True), (slice(5, 6, None), False)]
    """
    if part is None:
        return list(runs)
    cut = [(slice(max(run.start, part.start), min(run.stop, part.stop)), kind) for run, kind in runs]
    return [(run, kind) for run, kind in cut if run.start < run.stop]


def clip_by_norm(grads: Array, max_norm: float, norm: float | None = None) -> float:
    """Scale the gradient, in place, so that its 2-norm is at most ``max_norm``. Returns the norm before.

        g <- g min(1, max_norm / (|g| + 1e-6))

    norm: of the whole gradient, where ``grads`` is a part of it.

    A norm that is not finite leaves the gradient as it is, for the caller to see and act on.
    Reference: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.
    """
    # Block by block in float64, so that the sum neither overflows nor depends on the threads of a BLAS.
    norm = norm or math.sqrt(sum(float(np.square(grads[b], dtype=np.float64).sum()) for b in _blocks(0, len(grads))))
    scale = max_norm / (norm + 1e-6)
    if scale < 1 and math.isfinite(norm):
        grads *= scale
    return norm


def clip_by_value(grads: Array, limit: float) -> None:
    """Clamp each element of the gradient to [-limit, limit], in place."""
    np.clip(grads, -limit, limit, out=grads)


@dataclass(frozen=True)
class EMA:
    """Exponential moving average of the weights, for evaluation.

        shadow <- decay shadow + (1 - decay) w        after every ``every``

    The shadow begins as a copy of the weights.
    Reference: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """

    decay: float = 0.999
    every: str = "1ba"

    def __post_init__(self) -> None:
        check_number(self, "decay", at_least=0, at_most=1)
        check_length(self, "every", positive=True)

    def update(self, shadow: Array, params: Array) -> None:
        """Move the average towards the weights, in place; both (n,)."""
        for block in _blocks(0, len(shadow)):
            average = shadow[block]
            average *= self.decay
            average += (1 - self.decay) * params[block]


def _adam(optimizer: Adam | AdamW, w: Array, g: Array, state: State, step: int) -> None:
    """Adam's step, with both bias corrections folded into two scalars (Kingma and Ba 2015, end of section 2).

    lr m^ / (sqrt(v^) + eps) = rate m / (sqrt(v) + eps root),  root = sqrt(1 - beta2^t),  rate = lr root / (1 - beta1^t)
    """
    m, v = state["exp_avg"], state["exp_avg_sq"]
    beta1, beta2 = optimizer.betas
    m *= beta1
    m += (1 - beta1) * g
    v *= beta2
    v += (1 - beta2) * np.square(g)
    root = math.sqrt(1 - beta2**step)
    rate = optimizer.lr * root / (1 - beta1**step)
    w -= rate * m / (np.sqrt(v) + optimizer.eps * root)


def _blocks(start: int, stop: int) -> Iterator[slice]:
    for begin in range(start, stop, BLOCK):
        yield slice(begin, min(begin + BLOCK, stop))


def _check_common(optimizer: Optimizer) -> None:
    check_number(optimizer, "lr", at_least=0)
    check_number(optimizer, "weight_decay", at_least=0)
    check_flag(optimizer, "decay_norm_and_bias")


def _check_betas(optimizer: Adam | AdamW) -> None:
    """Both in [0, 1), as Python numbers in a tuple."""
    betas = optimizer.betas
    pair = isinstance(betas, tuple | list) and len(betas) == 2 and all(isinstance(b, int | float) for b in betas)
    check(optimizer, "betas", pair and all(0 <= b < 1 for b in betas), "be two numbers >= 0 and < 1")
    object.__setattr__(optimizer, "betas", (float(betas[0]), float(betas[1])))
