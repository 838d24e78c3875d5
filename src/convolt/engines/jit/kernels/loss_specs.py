"""What the loss's kernels are compiled for, and what they and the host tell each other."""

from dataclasses import dataclass

LOSS, RIGHT, WRONG_LABELS, VERDICT = range(4)
"""What a step has found, float64: the sum over samples, how many logits name their label, labels that are none."""
FINDINGS = 4

MOVED, NOT_FINITE, UNBOUNDED, UNLABELED = range(4)
"""The verdict: weights are moved; or not, as something is not finite, might not be, or a label is none."""

SAFE = 1e15  # a gradient up to here is finite and so is the sum of its squares; beyond, it is looked at first


@dataclass(frozen=True)
class LossSpec:
    """Cross-entropy of N samples at most, or (``square_sum``, ``look``) nothing that depends on the model."""

    N: int = 0
    classes: int = 0
    label_smoothing: float = 0.0
