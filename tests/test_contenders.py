"""Names of contenders: what they say, and what is said of wrong ones."""

import itertools

import pytest

from convolt import engines
from convolt.contenders import Contender, assemble, contender
from convolt.engines import Im2col
from convolt.engines.torch import Torch
from convolt.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "engine", "precision", "products"),
    [
        ("im2col", Im2col(threads=2), "fp32", "fp32"),
        ("im2col-conv=fft-fp64", Im2col(threads=2, conv="fft"), "fp64", "fp64"),
        ("torch-channels_last-bf16", Torch(threads=2, channels_last=True), "bf16", "bf16"),
        ("torch-bf16-channels_last", Torch(threads=2, channels_last=True), "bf16", "bf16"),
        ("torch-fp32_precision=bf16", Torch(threads=2, fp32_precision="bf16"), "fp32", "bf16"),
    ],
)
def test_name_says_engine_options_and_precision(name, engine, precision, products):
    assert contender(name, 2) == Contender(name, engine, precision, products)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["troch"], "unknown name 'troch'; did you mean 'torch'"),
        (["torch-chanels_last"], "unknown word 'chanels_last'; did you mean 'channels_last'"),
        (["im2col-conv=ftt"], "unknown word 'ftt'; did you mean 'fft'"),
        (["torch", "torch"], "contenders must be different; got torch, torch"),
    ],
)
def test_wrong_name_is_answered_with_the_nearest(names, message):
    with pytest.raises(ConfigError, match=message):
        assemble(names, 1)


def test_default_contenders_are_names():
    assert {c.engine.NAME for c in map(contender, engines.CONTENDERS, itertools.repeat(1))} < set(engines.names())
