"""Checkpoints: what is saved comes back, and whatever was damaged is noticed."""

import json
import os
import random
import select
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from convolt.checkpoint import Checkpointer, read, shapes, verify
from convolt.errors import CheckpointError

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json")


def arrays(value: float) -> dict[str, np.ndarray]:
    return {"0.weight": np.full((3, 4), value, np.float32), "0.bias": np.full(4, value, np.float32)}


def save(folder: Path, *steps: int, best: int | None = None, keep_last: int = 2) -> Checkpointer:
    checkpointer = Checkpointer(folder, keep_last)
    for step in steps:
        checkpointer.save(step, arrays(step), {"exp_avg": np.full(16, step)}, {"step": step}, best=step == best)
    return checkpointer


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ 1 << bit % 8
        file.seek(bit // 8)
        file.write(bytes([byte]))


def test_layout(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 938, best=938)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["best.json", "step-000938"]
    folder = tmp_path / "checkpoints" / "step-000938"
    assert sorted(os.listdir(folder)) == sorted(FILES)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert manifest["step"] == 938
    assert manifest["files"].keys() == set(FILES[:3])
    for name, entry in manifest["files"].items():
        assert entry["size"] == (folder / name).stat().st_size
        assert len(entry["sha256"]) == 64


DTYPES = st.sampled_from(["float16", "float32", "float64", "int64", "int32", "uint8", "bool", ">f4"])


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
        DTYPES.flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
        ),
        max_size=4,
    )
)
def test_arrays_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, given_arrays: dict) -> None:
    folder = tmp_path_factory.mktemp("any")
    Checkpointer(folder).save(1, given_arrays, {}, {})
    loaded = read(folder / "step-000001").model
    assert loaded.keys() == given_arrays.keys()
    for name, array in given_arrays.items():
        assert loaded[name].shape == array.shape
        assert loaded[name].dtype == array.dtype.newbyteorder("=")
        assert loaded[name].tobytes() == array.astype(loaded[name].dtype).tobytes()


def test_views_that_are_not_contiguous_are_saved_by_value(tmp_path: Path) -> None:
    flat = np.arange(24, dtype=np.float32)
    views = {
        "transposed": flat.reshape(4, 6).T,
        "strided": flat[::3],
        "reversed": flat[::-1],
        "scalar": flat[5:6].reshape(()),
    }
    Checkpointer(tmp_path).save(1, views, {}, {})
    loaded = read(tmp_path / "step-000001").model
    for name, view in views.items():
        np.testing.assert_array_equal(loaded[name], view)
        assert loaded[name].shape == view.shape
        assert loaded[name].flags.writeable


def test_state_keeps_every_bit_of_a_number(tmp_path: Path) -> None:
    state = {"best": float("inf"), "x": 0.1 + 0.2, "none": None, "name": "ü", "n": 2**60, "list": [1, 2.5]}
    Checkpointer(tmp_path).save(1, {}, {}, state)
    assert read(tmp_path / "step-000001").state == state


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    assert checkpointer.load_latest() is None
    assert checkpointer.steps == ()
    checkpointer.sweep()
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpointer.load("last")


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_rotation_keeps_the_last_and_the_best(tmp_path: Path, keep_last: int) -> None:
    checkpointer = save(tmp_path, *range(10, 100, 10), best=20, keep_last=keep_last)
    assert checkpointer.steps == (20, *range(100 - 10 * keep_last, 100, 10))
    assert checkpointer.best_step == 20
    assert checkpointer.load("best").step == 20
    assert checkpointer.load("last").step == 90
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_a_new_best_frees_the_old_one(tmp_path: Path) -> None:
    checkpointer = save(tmp_path, 10, 20, 30, 40, best=10)
    checkpointer.mark_best(40)
    save(tmp_path, 50)
    assert checkpointer.steps == (40, 50)
    assert checkpointer.load("best").step == 40
    with pytest.raises(CheckpointError, match="step 7 cannot be the best"):
        checkpointer.mark_best(7)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpointer = save(tmp_path, 10, 20, best=20)
    checkpointer.save(20, arrays(7), {}, {"again": True})
    latest = checkpointer.load_latest()
    assert latest is not None
    assert (latest.step, latest.state, latest.model["0.bias"][0]) == (20, {"again": True}, 7)
    assert checkpointer.load("best").state == {"again": True}
    assert sorted(os.listdir(tmp_path)) == ["best.json", "step-000010", "step-000020"]


def test_large_steps_sort_as_numbers(tmp_path: Path) -> None:
    assert save(tmp_path, 999_999, 1_000_000, 10_000_000, keep_last=3).steps == (999_999, 1_000_000, 10_000_000)


def test_steps_passed_over_by_a_resume_do_not_push_out_good_ones(tmp_path: Path) -> None:
    checkpointer = save(tmp_path, 10, 20, 30, keep_last=3)
    for step in (20, 30):
        flip(tmp_path / f"step-{step:06d}" / "state.json", 9)
    assert checkpointer.load("last").step == 10
    save(tmp_path, 11, keep_last=2)
    assert checkpointer.steps == (10, 11)


def damage_truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 40)


def damage_empty(folder: Path) -> None:
    os.truncate(folder / "state.json", 0)


def damage_grow(folder: Path) -> None:
    with (folder / "optimizer.safetensors").open("ab") as file:
        file.write(b"\0")


def damage_swap(folder: Path) -> None:
    shutil.copy(folder.parent / "step-000010" / "model.safetensors", folder / "model.safetensors")


def damage_other_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step-000010", folder)


def damage_folder_for_file(folder: Path) -> None:
    (folder / "state.json").unlink()
    (folder / "state.json").mkdir()


def damage_manifest(folder: Path) -> None:
    (folder / "MANIFEST.json").write_text("[" * 100_000)


DAMAGES = [
    damage_truncate,
    damage_empty,
    damage_grow,
    damage_swap,
    damage_other_step,
    damage_folder_for_file,
    damage_manifest,
    *((lambda folder, name=name: (folder / name).unlink()) for name in FILES),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_and_the_one_before_is_taken_with_a_warning(tmp_path: Path, damage: Callable) -> None:
    checkpointer = save(tmp_path, 10, 20, best=20)
    damage(tmp_path / "step-000020")
    with pytest.raises(CheckpointError, match="step-000020"):
        verify(tmp_path / "step-000020")
    with pytest.raises(CheckpointError, match="step-000020"):
        checkpointer.load(20)
    for which in ("last", "best"):
        found = checkpointer.load(which)
        assert found.step == 10
        assert len(found.warnings) == 1
        assert "fell back to step-000010" in found.warnings[0]
        assert "step-000020" in found.warnings[0]
        assert "\n" not in found.warnings[0]


def test_no_valid_checkpoint_never_means_a_fresh_start(tmp_path: Path) -> None:
    checkpointer = save(tmp_path, 10, 20)
    for step in checkpointer.steps:
        damage_truncate(tmp_path / f"step-{step:06d}")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be trusted.*step-000020.*step-000010"):
        checkpointer.load_latest()


def test_extra_file_is_named_and_ignored(tmp_path: Path) -> None:
    checkpointer = save(tmp_path, 10)
    (tmp_path / "step-000010" / "notes.txt").write_text("mine")
    found = checkpointer.load("last")
    assert found.step == 10
    assert "notes.txt" in found.warnings[0]


def test_renamed_folder_is_not_taken_for_another_step(tmp_path: Path) -> None:
    save(tmp_path, 10)
    for name in ("step-000011", "mine"):
        shutil.copytree(tmp_path / "step-000010", tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            verify(tmp_path / name)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"step": 10}', '{"step": 10, "folder": "step-000020"}', "\xff"])
def test_damaged_mark_of_the_best_is_told(tmp_path: Path, text: str) -> None:
    checkpointer = save(tmp_path, 10, 20, 30, best=10)
    (tmp_path / "best.json").write_text(text, encoding="latin-1")
    found = checkpointer.load("best")
    assert found.step == 30
    assert "best.json is damaged" in found.warnings[0]
    save(tmp_path, 40)
    assert 10 in checkpointer.steps  # what may be the best is not deleted


def test_every_bit_of_the_best_mark_counts(tmp_path: Path) -> None:
    checkpointer = save(tmp_path, *range(10), best=4, keep_last=10)
    path = tmp_path / "best.json"
    for bit in range(path.stat().st_size * 8):
        flip(path, bit)
        with pytest.raises(CheckpointError, match=r"best\.json"):
            _ = checkpointer.best_step
        flip(path, bit)
    assert checkpointer.best_step == 4


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])  # 5: another bit in every byte
def test_every_bit_of_the_manifest_counts(tmp_path: Path, stride: int) -> None:
    save(tmp_path, 10)
    path = tmp_path / "step-000010" / "MANIFEST.json"
    for bit in range(0, path.stat().st_size * 8, stride):
        flip(path, bit)
        with pytest.raises(CheckpointError):
            verify(path.parent)
        flip(path, bit)
    assert verify(path.parent) == ()


@pytest.mark.parametrize("flips", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_no_flipped_bit_loads(tmp_path: Path, flips: int) -> None:
    save(tmp_path, 10)
    folder = tmp_path / "step-000010"
    draw = random.Random(flips)
    for _ in range(flips // len(FILES)):
        for name in FILES:
            bit = draw.randrange((folder / name).stat().st_size * 8)
            flip(folder / name, bit)
            with pytest.raises(CheckpointError):
                read(folder)
            flip(folder / name, bit)
    assert read(folder).step == 10


def test_other_model_is_refused_before_its_arrays_are_read(tmp_path: Path) -> None:
    checkpointer = save(tmp_path, 10, 20)
    expect = {name: array.shape for name, array in arrays(0).items()}
    assert shapes(tmp_path / "step-000020" / "model.safetensors") == expect
    assert checkpointer.load("last", expect).step == 20
    with pytest.raises(CheckpointError, match=r"tensor '0.bias' is \(4,\), the model needs \(5,\)"):
        checkpointer.load_latest({**expect, "0.bias": (5,)})
    with pytest.raises(CheckpointError, match=r"tensor '1.weight' is absent, the model needs \(2,\)"):
        checkpointer.load_latest({**expect, "1.weight": (2,)})
    with pytest.raises(CheckpointError, match=r"tensor '0.bias' is \(4,\), the model needs absent"):
        checkpointer.load_latest({"0.weight": (3, 4)})


def test_lying_header_takes_no_memory(tmp_path: Path) -> None:
    """A manifest can be made for any file, so the arrays' sizes are checked by themselves."""
    save(tmp_path, 10)
    folder = tmp_path / "step-000010"
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    lie = struct.pack("<Q", len(header)) + header
    liar = Checkpointer(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.numpy.save", lambda tensors: lie)
        liar.save(20, {}, {}, {})
    assert verify(tmp_path / "step-000020") == ()
    with pytest.raises(CheckpointError, match="step-000020"):
        read(tmp_path / "step-000020")
    assert read(folder).step == 10


def test_symbolic_link_is_no_checkpoint(tmp_path: Path) -> None:
    checkpointer = save(tmp_path, 10)
    (tmp_path / "step-000099").symlink_to(tmp_path / "step-000010")
    assert checkpointer.steps == (10,)


def test_run_needs_its_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep_last must be at least 1, not 0"):
        Checkpointer(tmp_path, keep_last=0)


def save_for_ever(folder: Path, started: int) -> None:
    checkpointer, model = Checkpointer(folder), {"w": np.arange(200_000, dtype=np.float32)}
    step = 0
    while True:
        step += 1
        os.write(started, b".")
        checkpointer.save(step, {"w": model["w"] + step}, {}, {"step": step}, best=step % 3 == 0)


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_random_moments_always_loads(tmp_path: Path, kills: int) -> None:
    draw = random.Random(kills)
    orphans = 0
    for kill in range(kills):
        folder = tmp_path / str(kill)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            try:
                save_for_ever(folder, writer)
            finally:
                os._exit(1)
        for _ in range(draw.randint(2, 6)):  # that many saves have begun: all but the last one are whole
            os.read(reader, 1)
        select.select([], [], [], draw.uniform(0, 0.01))  # the random moment
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(reader)
        os.close(writer)
        orphans += any(path.name.startswith(".") for path in folder.iterdir())
        checkpointer = Checkpointer(folder)
        checkpointer.sweep()
        latest = checkpointer.load_latest()
        assert latest is not None
        assert latest.warnings == ()
        assert latest.step == latest.state["step"]
        np.testing.assert_array_equal(latest.model["w"], np.arange(200_000, dtype=np.float32) + latest.step)
        assert checkpointer.load("best").warnings == ()
        assert not any(path.name.startswith(".") for path in folder.iterdir())
        shutil.rmtree(folder)
    assert orphans > 0  # some kills did hit a save
