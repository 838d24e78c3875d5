"""Batches as a pure function of the step: order, sizes, shards, micro-batches, augmentation."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convolt.augment import Crop, Flip, Mixup
from convolt.comms import Serial, shard
from convolt.data import Split
from convolt.loader import Batch, Loader
from convolt.losses import DistillationTargets
from convolt.recipe import Recipe
from convolt.rng import SampleRng, permutation
from convolt.teacher import with_teacher

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 1, 6, 6), np.uint8)
IMAGES[:, 0, 0, 0] = np.arange(23)  # who is who
SPLIT = Split(IMAGES, np.arange(23) % 5)


@dataclass
class Rank(Serial):
    """One of several processes, as far as a loader asks."""

    rank: int = 0
    size: int = 1


def loader(comm=None, **recipe) -> Loader:
    return Loader(SPLIT, Recipe(**{"batch_size": 7, "seed": 3, **recipe}), 5, comm or Serial())


def who(batch: Batch) -> list[int]:
    return batch.images[:, 0, 0, 0].tolist()


def test_an_epoch_is_a_permutation_in_batches():
    batches = loader()
    assert batches.steps_per_epoch == 4
    seen, sizes = [], []
    for step in range(4, 8):
        batch = batches.batch(step)
        seen += who(batch)
        sizes.append((len(batch.labels), batch.size))
        np.testing.assert_array_equal(batch.labels, SPLIT.labels[who(batch)])
        np.testing.assert_array_equal(batch.images, IMAGES[who(batch)])
        np.testing.assert_array_equal(batch.rng.indices, who(batch))
        assert (batch.rng.seed, batch.rng.epoch) == (3, 1)
    assert seen == permutation(3, 1, 23).tolist()
    assert sizes == [(7, 7), (7, 7), (7, 7), (2, 2)]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(who(loader(seed=seed).batch(step))) for seed in (0, 1) for step in (0, 4)}
    assert len(orders) == 4


@given(steps=st.lists(st.integers(0, 11), min_size=1, max_size=6))
def test_a_batch_depends_on_its_step_alone(steps):
    used = loader(augment=(Flip(), Crop(1)))
    for step in steps:
        batch, fresh = used.batch(step), loader(augment=(Flip(), Crop(1))).batch(step)
        np.testing.assert_array_equal(batch.images, fresh.images)
        np.testing.assert_array_equal(batch.targets, fresh.targets)


@given(steps=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), min_size=1, max_size=6))
def test_a_batch_made_after_it_leaves_the_one_in_use(steps):
    used, fresh = loader(augment=(Flip(), Crop(1))), loader(augment=(Flip(), Crop(1)))
    for step, ahead in steps:
        batch = used.batch(step)
        used.batch(ahead)
        expected = fresh.batch(step)
        np.testing.assert_array_equal(batch.images, expected.images)
        np.testing.assert_array_equal(batch.targets, expected.targets)
        np.testing.assert_array_equal(batch.rng.indices, expected.rng.indices)
        assert (batch.rng.epoch, batch.size) == (expected.rng.epoch, expected.size)


def test_two_buffers_are_used_in_turns_and_the_data_stays_as_it_is():
    batches, before = loader(), IMAGES.copy()
    first, second, third = (batches.batch(step).images for step in range(3))
    assert np.shares_memory(first, third)
    assert not np.shares_memory(first, second)
    third[...] = 0
    np.testing.assert_array_equal(IMAGES, before)


@pytest.mark.parametrize("augment", [(), (Flip(), Crop(1)), (Flip(), Mixup(0.4))], ids=["plain", "per sample", "mixup"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_share_the_batch_of_one_process(augment, size):
    for step in (0, 3):
        whole = loader(augment=augment).batch(step)
        parts = [loader(Rank(rank=rank, size=size), augment=augment).batch(step) for rank in range(size)]
        np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), whole.images)
        np.testing.assert_array_equal(np.concatenate([part.targets for part in parts]), whole.targets)
        np.testing.assert_array_equal(np.concatenate([part.rng.indices for part in parts]), whole.rng.indices)
        assert {part.size for part in parts} == {whole.size}
        assert max(len(part.labels) for part in parts) - min(len(part.labels) for part in parts) <= 1


@given(count=st.integers(0, 50), size=st.integers(1, 9))
def test_shards_tile_the_samples(count, size):
    parts = [shard(count, Rank(rank=rank, size=size)) for rank in range(size)]
    assert [index for part in parts for index in range(count)[part]] == list(range(count))


@given(most=st.none() | st.integers(1, 9))
def test_pieces_are_the_batch_in_micro_batches(most):
    batch = loader().batch(0)
    pieces = list(batch.pieces(most))
    assert all(len(piece.labels) <= (most or 7) for piece in pieces)
    assert [index for piece in pieces for index in who(piece)] == who(batch)
    assert [index for piece in pieces for index in piece.rng.indices] == batch.rng.indices.tolist()
    assert all(piece.size == 7 for piece in pieces), "the scale of a gradient is that of the global batch"


def test_a_batch_may_be_larger_than_the_split():
    batches = loader(batch_size=100)
    assert batches.steps_per_epoch == 1
    assert sorted(who(batches.batch(0))) == list(range(23))


def test_targets_of_a_student_are_cut_with_the_batch():
    batch = with_teacher(loader().batch(0), np.arange(35.0).reshape(7, 5))
    assert isinstance(batch.targets, DistillationTargets)
    piece = list(batch.pieces(3))[1]
    np.testing.assert_array_equal(piece.targets.teacher_logits, np.arange(35.0).reshape(7, 5)[3:6])
    np.testing.assert_array_equal(piece.targets.labels, batch.labels[3:6])
    assert isinstance(piece.rng, SampleRng)
