"""Random numbers as pure functions of (seed, epoch, sample): no stream, no state.

A stream of random numbers ties a sample's augmentation to everything drawn before it: to the batch it sits in, to the
rank that computes it, to the step where a run was resumed. A counter-based generator has no stream. It is a keyed
bijection of 128-bit counters whose outputs pass every statistical test; here

    key     = seed                                                    (64 bits)
    counter = (block of four draws, sample index, epoch, purpose)     (4 x 32 bits)

so that each sample, in each epoch, for each purpose ("flip", "dropout:3"), has its own 2^34 draws, in any order, on
any number of ranks. Nothing is saved; resuming a run needs the seed and the step.

Reference: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10).
"""

import math
import zlib
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convolt.errors import ConfigError

Words = NDArray[np.uint64]  # 32-bit words, each in the low half of 64 bits so that a product keeps its high half

ROUNDS = 10
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85  # golden ratio and sqrt(3) - 1: what the key grows by from round to round
MASK = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)

# Blocks worked on at once: the eight temporaries of a round, 96 KiB each, stay in the L2 cache.
CHUNK = 12_288


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The Philox4x32-10 bijection: four random words for each counter of four words.

    counter: (..., 4) uint32. key: (2,) uint32. Returns (..., 4) uint32.
    Reference: Salmon et al. 2011, section 3.3; checked against the known answers of Random123.
    """
    c0, c1, c2, c3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    return np.stack(_rounds(c0, c1, c2, c3, (int(key[0]), int(key[1]))), axis=-1).astype(np.uint32)


def _rounds(c0: Words, c1: Words, c2: Words, c3: Words, key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Ten rounds on counter words of any shapes that broadcast.

    A word that is the same along an axis has length 1 there: the first rounds then cost next to nothing.
    """
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (product1 >> HALF) ^ c1 ^ np.uint64(k0), product1 & MASK
        c2, c3 = (product0 >> HALF) ^ c3 ^ np.uint64(k1), product0 & MASK
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


@dataclass(frozen=True, eq=False)
class SampleRng:
    """The random draws of a batch's samples, each a pure function of (seed, epoch, sample index, purpose).

    seed: 64 bits. epoch: 32 bits. indices: (N,) the samples' positions in the data set, 32 bits each.
    Raises ConfigError when one of them does not fit.

    >>> batch = SampleRng(seed=0, epoch=3, indices=np.array([7, 2, 5]))
    >>> bool((batch.uniform("flip")[1:] == batch[1:].uniform("flip")).all())
    True
    """

    seed: int
    epoch: int
    indices: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name, value, bits in (("seed", self.seed, 64), ("epoch", self.epoch, 32)):
            if not 0 <= value < 2**bits:
                raise ConfigError(f"SampleRng: {name} must be >= 0 and < 2^{bits}; got {value}")
        if not self._fit():
            raise ConfigError(
                f"SampleRng: indices must be >= 0 and < 2^32; got {self.indices.min()} to {self.indices.max()}"
            )

    def _fit(self) -> bool:
        """Whether the indices have 32 bits."""
        return not self.indices.size or 0 <= int(self.indices.min()) <= int(self.indices.max()) < 2**32

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: slice) -> "SampleRng":
        """The same draws for some of the samples: a batch of an epoch, a rank's shard or a micro-batch."""
        some = copy(self)  # whose parts fit, as the whole does: nothing is looked at again
        object.__setattr__(some, "indices", self.indices[part])
        return some

    def words(self, purpose: str, count: int) -> NDArray[np.uint32]:
        """``count`` random 32-bit words for each sample: (N, count) uint32. More words begin with the same ones."""
        blocks = -(-count // 4)
        drawn = np.empty((len(self), blocks, 4), np.uint32)
        block = np.arange(blocks, dtype=np.uint64)[None, :]
        sample = self.indices.astype(np.uint64)[:, None]
        epoch = np.full((1, 1), self.epoch, np.uint64)
        stream = np.full((1, 1), zlib.crc32(purpose.encode()), np.uint64)
        key = self.seed & 0xFFFFFFFF, self.seed >> 32
        rows = max(1, CHUNK // max(1, blocks))
        for start in range(0, len(self), rows):
            part = slice(start, start + rows)
            for position, word in enumerate(_rounds(block, sample[part], epoch, stream, key)):
                drawn[part, :, position] = word
        return drawn.reshape(len(self), 4 * blocks)[:, :count]

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> NDArray[np.float32]:
        """Uniform numbers in [0, 1), multiples of 2^-24: (N, *shape) float32."""
        mantissa = self.words(purpose, math.prod(shape)) >> np.uint32(8)
        draws: NDArray[np.float32] = np.multiply(mantissa, np.float32(2**-24), dtype=np.float32)
        return draws.reshape(len(self), *shape)

    def integers(self, purpose: str, low: int, high: int, shape: tuple[int, ...] = ()) -> NDArray[np.int64]:
        """Integers in [low, high): (N, *shape) int64. Their probabilities differ by at most 2^-32."""
        if not 0 < high - low <= 2**32:
            raise ConfigError(f"SampleRng.integers: high must be > low by at most 2^32; got low={low}, high={high}")
        words = self.words(purpose, math.prod(shape)).astype(np.uint64)
        scaled = (words * np.uint64(high - low)) >> HALF
        return (scaled.astype(np.int64) + low).reshape(len(self), *shape)


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of an epoch's n samples: (n,) int64.

    Samples are sorted by a random 64-bit key of their own, so each order is equally likely but for ties (probability
    n^2 / 2^65), and leaving out samples does not change the order of the others.
    """
    words = SampleRng(seed, epoch, np.arange(n)).words("permutation", 2).astype(np.uint64)
    return sorted_by((words[:, 0] << HALF) | words[:, 1])


def sorted_by(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Their stable order, five times as fast where no two are equal: any way of sorting finds the same one then."""
    order: NDArray[np.int64] = np.argsort(keys)
    ranked = keys[order]
    return np.argsort(keys, kind="stable") if (ranked[1:] == ranked[:-1]).any() else order
