"""Parameters: one flat vector with named views, first values from the seed, state dicts that are checked."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from convolt import zoo
from convolt.convert import to_torch
from convolt.errors import ConfigError
from convolt.layers import BatchNorm2d, Conv2d, Dense, Flatten, ReLU, Residual, Sequential
from convolt.model import Model
from convolt.params import ALIGNMENT, Params, aligned_zeros

MODEL = Model(
    (2, 4, 4),
    (
        *(Conv2d(2, 3, 3, padding=1), BatchNorm2d(3)),
        Residual((Sequential((BatchNorm2d(3), Conv2d(3, 3, 1, bias=False))),)),
        *(ReLU(), Flatten(), Dense(48, 5)),
    ),
)


def test_views_tile_the_flat_vector_in_order():
    params = Params.init(MODEL, seed=0)
    assert list(params) == list(MODEL.parameters())
    assert np.concatenate([params[name].ravel() for name in params]).tolist() == params.flat.tolist()
    ends = [part.stop for part in params.slices.values()]
    assert [part.start for part in params.slices.values()] == [0, *ends[:-1]]
    assert ends[-1] == params.flat.size == MODEL.parameter_count
    params.flat[params.slices["5.bias"]] = 7
    assert (params["5.bias"] == 7).all()
    params["0.weight"][...] = -1
    assert (params.flat[params.slices["0.weight"]] == -1).all()


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_memory_begins_on_a_cache_line(size, dtype):
    array = aligned_zeros(size, dtype)
    assert array.ctypes.data % ALIGNMENT == 0
    assert array.shape == (size,)
    assert array.dtype == dtype
    assert not array.any()


def test_flat_vectors_begin_on_a_cache_line():
    params = Params(MODEL)
    assert params.flat.ctypes.data % ALIGNMENT == params.buffers_flat.ctypes.data % ALIGNMENT == 0


def test_first_weights_are_a_function_of_the_seed():
    first, again, other = (Params.init(MODEL, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.flat, again.flat)
    assert (first["0.weight"] != other["0.weight"]).all()
    np.testing.assert_array_equal(Params.init(MODEL, 3, np.float64).flat.astype(np.float32), first.flat)


def test_first_weights_have_pytorchs_distribution():
    params = Params.init(zoo.mnist_cnn(), seed=1)
    net = to_torch(zoo.mnist_cnn())
    for name, parameter in net.named_parameters():
        mine, theirs = params[name], parameter.detach().numpy()
        bound = params.specs[name].bound
        assert np.abs(mine).max() <= bound
        if mine.size > 1000:
            assert np.abs(mine).max() == pytest.approx(bound, rel=1e-2)
            assert mine.std() == pytest.approx(theirs.std(), rel=0.05)
            assert abs(mine.mean()) < 5 * mine.std() / np.sqrt(mine.size)


def test_layers_do_not_start_alike():
    params = Params.init(Model((4,), (Dense(4, 4), Dense(4, 4))), seed=0)
    assert (params["0.weight"] != params["1.weight"]).all()


def test_norms_start_as_the_identity():
    params = Params.init(MODEL, seed=0)
    assert (params["1.weight"] == 1).all()
    assert not params["1.bias"].any()
    assert not params.buffers["1.running_mean"].any()
    assert (params.buffers["2.body.0.0.running_var"] == 1).all()
    assert params.buffers["1.num_batches_tracked"] == 0
    assert params.buffers["1.num_batches_tracked"].dtype == np.int64


def test_decay_tells_weights_from_the_rest():
    params = Params(MODEL)
    runs = params.decays()
    kinds = np.zeros(params.flat.size, int)
    for part, is_weight in runs:
        kinds[part] += 1 + is_weight
    assert runs[0][0].start == 0
    assert all(left[0].stop == right[0].start and left[1] != right[1] for left, right in pairwise(runs))
    for name, part in params.slices.items():
        weight = name in {"0.weight", "2.body.0.1.weight", "5.weight"}
        assert (kinds[part] == 1 + weight).all(), name


def test_state_dict_is_pytorchs():
    params = Params.init(MODEL, seed=2)
    params.buffers_flat[...] = np.arange(params.buffers_flat.size)
    params.buffers["1.num_batches_tracked"][...] = 5
    net = to_torch(MODEL, params)
    theirs, mine = net.state_dict(), params.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(mine[name], tensor.numpy())
    assert isinstance(net, torch.nn.Sequential)


def test_state_dict_is_a_copy_and_goes_back():
    params, other = Params.init(MODEL, seed=2), Params.init(MODEL, seed=3)
    state = params.state_dict()
    params.flat[...] = 0
    params.buffers["1.running_mean"][...] = 9
    other.load_state_dict(state)
    assert all((other.state_dict()[name] == array).all() for name, array in state.items())
    assert other.flat.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("5.bias"),
            r"load_state_dict: '5.bias' is missing; the names must be those of the mod",
        ),
        (lambda state: state.pop("1.running_var"), r"load_state_dict: '1.running_var' is missing"),
        (
            lambda state: state.update({"5.wieght": np.zeros(3)}),
            r"load_state_dict: '5.wieght' is unknown \(did you mean '5.weight'\?",
        ),
        (lambda state: state.update({"5.bias": np.zeros(6)}), r"'5.bias' must have shape \(5,\); got \(6,\)"),
        (lambda state: state.update({"5.bias": 1.0}), r"'5.bias' must have shape \(5,\); got \(\)"),
    ],
)
def test_a_wrong_state_dict_is_refused_and_changes_nothing(change, message):
    params = Params.init(MODEL, seed=2)
    before, state = params.state_dict(), Params.init(MODEL, seed=3).state_dict()
    change(state)
    with pytest.raises(ConfigError, match=message) as caught:
        params.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert all((params.state_dict()[name] == array).all() for name, array in before.items())


def test_statistics_can_be_put_back():
    params = Params(MODEL)
    kept = params.statistics()
    params.buffers["1.running_mean"][...] = np.nan
    params.buffers["1.num_batches_tracked"][...] += 1
    params.restore_statistics(kept)
    assert not params.buffers["1.running_mean"].any()
    assert params.buffers["1.num_batches_tracked"] == 0
    assert not params.buffers_flat[:3].any(), "the flat vector is the same memory"


def test_a_model_may_have_no_parameters():
    params = Params.init(Model((3,), (ReLU(),)), seed=0)
    assert len(params) == params.flat.size == len(params.state_dict()) == len(params.decays()) == 0
