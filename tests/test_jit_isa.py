import platform
import re

import pytest

from convolt.engines import JIT
from convolt.engines.jit import codegen, isa
from convolt.engines.jit.isa import Isa, detect
from convolt.errors import EngineError

SERVER = dict.fromkeys([*isa.REQUIRED["avx512"], "amx-tile", "amx-bf16", "avx512bf16"], True)
X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 registers")


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (SERVER, Isa("avx512", 16, 32, amx=True, bf16_convert=True)),
        (SERVER | {"amx-bf16": False, "avx512bf16": False}, Isa("avx512", 16, 32)),
        (SERVER | {"avx512vl": False}, Isa("avx2", 8, 16)),
        ({"avx2": True, "fma": False}, Isa("plain", 4, 16)),
        ({"neon": True}, Isa("neon", 4, 32)),
        ({"neon": True, "bf16": True}, Isa("neon", 4, 32, bf16_convert=True)),
        ({}, Isa("plain", 4, 16)),
    ],
)
def test_features_decide(features, expected):
    assert detect(features=features) == expected


def test_a_narrower_one_is_forced_without_the_extras_of_the_wider():
    assert detect("avx2", SERVER) == Isa("avx2", 8, 16)
    assert detect("plain", SERVER) == Isa("plain", 4, 16)


def test_one_beyond_the_cpu_is_refused_with_what_is_missing():
    with pytest.raises(EngineError, match=r"isa='avx512' needs .*missing here \(avx512vl\); use one of avx2, plain"):
        detect("avx512", SERVER | {"avx512vl": False})


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(EngineError, match="unknown isa 'avx-2'; did you mean 'avx2'"):
        detect("avx-2", SERVER)


@pytest.mark.parametrize(("field", "value"), [("isa", "avx-2"), ("isa", 5), ("unit", "dots"), ("unit", 5)])
def test_a_wrong_name_is_refused_before_anything_is_done(field, value):
    with pytest.raises(EngineError, match=f"engine jit: unknown {field} {value!r}; .*valid: "):
        JIT(**{field: value})


def test_this_cpu_has_one_and_can_be_forced_to_each_that_it_has():
    widest = detect()
    assert detect(widest.name) == widest
    assert detect("plain").name == "plain"


def test_permission_for_tiles_is_asked_for_twice_without_harm():
    assert isa.request_amx() == isa.request_amx()


def multiply(arguments, chunk, thread):
    for i in range(arguments[0]):
        arguments[i + 64] = arguments[i] * arguments[i + 32]


@X86
@pytest.mark.parametrize(
    ("name", "forbidden", "expected"),
    [
        ("avx2", r"zmm|xmm(1[6-9]|2\d|3\d)|%k[0-7]|vpmullq", r"ymm"),
        ("plain", r"[yz]mm|xmm(1[6-9]|2\d|3\d)|%k[0-7]|\bv[a-z]", r"xmm"),
    ],
)
def test_a_forced_one_is_all_that_llvm_uses(name, forbidden, expected):
    if name == "avx2" and detect().name not in {"avx2", "avx512"}:
        pytest.skip("this CPU has no AVX2")
    text = codegen.assembly(multiply, detect(name))
    instructions = "\n".join(line for line in text.splitlines() if line.startswith("\t") and line[1] != ".")
    assert re.search(expected, instructions)
    assert not re.search(forbidden, instructions)


@X86
@pytest.mark.skipif(detect().name != "avx512", reason="this CPU has no AVX-512")
def test_the_widest_does_use_what_the_narrower_must_not():
    assert "vpmullq" in codegen.assembly(multiply, detect())
