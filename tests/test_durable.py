"""Writing that survives failures: the n-th system call fails, or the process dies at it, for every n there is."""

import errno
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from convolt import durable
from convolt.checkpoint import Checkpointer
from convolt.errors import CheckpointError, RunError
from convolt.history import Epoch, MetricsLog, epoch_record, read_history

WRITING = ("open", "write", "fsync", "replace", "rename", "mkdir", "ftruncate")
DELETING = ("unlink", "rmdir")
NEVER = 10**9
Failure = Callable[[], None]


class SystemCalls:
    """Counts the calls of some functions of ``os`` and lets the n-th one fail."""

    def __init__(self, nth: int, failure: Failure) -> None:
        self.nth, self.failure, self.count = nth, failure, 0

    @contextmanager
    def patched(self, names: tuple[str, ...] = WRITING) -> Iterator["SystemCalls"]:
        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                patch.setattr(os, name, self._wrap(getattr(os, name)))
            yield self

    def _wrap(self, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            self.count += 1
            if self.count == self.nth:
                self.failure()
            return real(*args, **kwargs)

        return call


def fail_with(number: int) -> Failure:
    def failure() -> None:
        raise OSError(number, os.strerror(number))

    return failure


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_calls(action: Callable[[], object], names: tuple[str, ...] = WRITING) -> int:
    with SystemCalls(NEVER, die).patched(names) as calls:
        action()
    return calls.count


def in_child(action: Callable[[], object]) -> int:
    """Run in a forked process; the status says how it ended."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)  # nothing leaves the child but its status
    return os.waitpid(child, 0)[1]


def arrays(value: float) -> dict[str, np.ndarray]:
    return {"0.weight": np.full((3, 4), value, np.float32), "0.bias": np.full(4, value, np.float32)}


def save(folder: Path, step: int, best: bool = False) -> None:
    Checkpointer(folder, keep_last=2).save(step, arrays(step), {"exp_avg": np.full(16, step)}, {"step": step}, best)


def prepare_next(folder: Path) -> Callable[[], None]:
    """A save with all there is: rotation deletes a step, the mark of the best moves."""
    for step in (1, 2, 3):
        save(folder, step, best=step == 2)
    return lambda: save(folder, 4, best=True)


def prepare_repeat(folder: Path) -> Callable[[], None]:
    """A resumed run saves a step that is there."""
    for step in (1, 2, 3, 4):
        save(folder, step, best=step == 3)
    return lambda: save(folder, 4)


def prepare_first(folder: Path) -> Callable[[], None]:
    return lambda: save(folder, 4)


SAVES = {"next": prepare_next, "repeat": prepare_repeat, "first": prepare_first}
BEFORE = {"next": 3, "repeat": 4, "first": None}


def make(kind: str, folder: Path) -> Callable[[], None]:
    folder.parent.mkdir()
    return SAVES[kind](folder)


def check_usable(folder: Path, kind: str, saved: bool) -> None:
    """Whatever happened: the old checkpoint or the new one loads without a warning, and the next save works."""
    checkpointer = Checkpointer(folder)
    for sweep in (False, True):
        if sweep:
            checkpointer.sweep()
        latest = checkpointer.load_latest()
        assert (latest and latest.step) in ({4} if saved else {BEFORE[kind], 4})
        if latest is not None:
            assert latest.warnings == ()
            assert latest.state == {"step": latest.step}
            np.testing.assert_array_equal(latest.model["0.weight"], arrays(latest.step)["0.weight"])
            assert checkpointer.load("best").warnings == ()
    assert not [path.name for path in folder.parent.rglob("*") if path.name.startswith(".")]
    for step in checkpointer.steps:
        checkpointer.load(step)  # nothing half deleted looks like a checkpoint
    save(folder, 5)
    assert checkpointer.load("last").step == 5


@pytest.mark.parametrize("kind", SAVES)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_checkpoint_survives_the_failure_of_every_system_call(tmp_path: Path, kind: str, number: int) -> None:
    total = count_calls(make(kind, tmp_path / "count" / "checkpoints"))
    assert total > 15
    for nth in range(1, total + 1):
        folder = tmp_path / str(nth) / "checkpoints"
        action, message = make(kind, folder), ""
        with SystemCalls(nth, fail_with(number)).patched():
            try:
                action()
            except CheckpointError as error:
                message = str(error)
        if message:
            assert str(folder) in message
            assert "\n" not in message
        check_usable(folder, kind, saved=not message)


@pytest.mark.parametrize("kind", SAVES)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_checkpoint_survives_death_at_every_system_call(tmp_path: Path, kind: str) -> None:
    names = WRITING + DELETING
    total = count_calls(make(kind, tmp_path / "count" / "checkpoints"), names)
    for nth in range(1, total + 1):
        folder = tmp_path / str(nth) / "checkpoints"
        action = make(kind, folder)
        with SystemCalls(nth, die).patched(names):
            status = in_child(action)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        check_usable(folder, kind, saved=False)


def test_everything_is_synced_before_its_rename_and_before_any_deletion(tmp_path: Path) -> None:
    """No test can pull the plug, so this one reads the order in which the kernel is asked."""
    folder = tmp_path / "checkpoints"
    action = prepare_next(folder)
    calls: list[tuple[str, str]] = []
    opened: dict[int, str] = {}
    real_open, real_fsync, real_rename, real_unlink = os.open, os.fsync, os.rename, os.unlink

    def note_open(path: Path, *args: object, **options: object) -> int:
        descriptor = real_open(path, *args, **options)
        opened[descriptor] = Path(path).name
        return descriptor

    def note_fsync(descriptor: int) -> None:
        calls.append(("fsync", opened[descriptor]))
        real_fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        calls.append(("rename", Path(target).name))
        real_rename(source, target)

    def note_unlink(path: Path, **options: object) -> None:
        calls.append(("unlink", Path(path).name))
        real_unlink(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name, noted in (
            ("open", note_open),
            ("fsync", note_fsync),
            ("rename", note_rename),
            ("unlink", note_unlink),
        ):
            patch.setattr(os, name, noted)
        action()
    published = calls.index(("rename", "step-000004"))
    synced_before = [name for call, name in calls[:published] if call == "fsync"]
    assert synced_before[:4] == ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]
    assert synced_before[4].startswith(".tmp-")  # the folder that names them
    assert calls[published + 1] == ("fsync", "checkpoints")
    assert "unlink" not in [call for call, _ in calls[: published + 2]]
    assert "unlink" in [call for call, _ in calls]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_failing_deletion_loses_no_new_checkpoint(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "checkpoints"
    action = prepare_next(folder)
    with SystemCalls(1, fail_with(number)).patched(DELETING) as calls:
        action()
    assert calls.count >= 1
    assert Checkpointer(folder).load("last").step == 4


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EINTR])
def test_file_is_old_or_new_whichever_system_call_fails(tmp_path: Path, number: int) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    total = count_calls(lambda: durable.write_text(path, "new"))
    assert total >= 5  # create, write, sync, rename, sync the folder
    for nth in range(1, total + 1):
        path.write_text("old")
        with SystemCalls(nth, fail_with(number)).patched(), pytest.raises(OSError, match=os.strerror(number)):
            durable.write_text(path, "new")
        renamed = nth > total - 2
        assert path.read_text() == ("new" if renamed else "old")
        assert os.listdir(tmp_path) == ["run.json"]


def test_file_system_that_cannot_sync_folders_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    durable.write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:3])))
    durable.write_bytes(tmp_path / "file", bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        durable.write_text(tmp_path / "file", "text")
        save(tmp_path / "checkpoints", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    for path in (tmp_path / "checkpoints" / "step-000001").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == mode


def epoch(number: int) -> Epoch:
    return Epoch(number, 0.5, 0.9, 0.6, 0.8, 1e-3, 2.0, 1000.0)


def test_metrics_line_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("epoch", epoch_record(epoch(1)))
    real, calls = os.write, []

    def write(descriptor: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, bytes(data[:10]))  # the disk takes ten bytes and is full

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(RunError, match=r"the disk mounted at / is full|the disk mounted at /.* is full"):
            log.append("epoch", epoch_record(epoch(2)))
    log.append("epoch", epoch_record(epoch(2)))
    log.close()
    assert read_history(tmp_path / "metrics.jsonl") == (epoch(1), epoch(2))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_file_size_limit_keeps_the_previous_checkpoint_and_names_the_disk(tmp_path: Path) -> None:
    folder, told = tmp_path / "checkpoints", tmp_path / "told"
    save(folder, 3)

    def save_under_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            Checkpointer(folder).save(4, {"0.weight": np.zeros(10_000)}, {}, {})
        except CheckpointError as error:
            told.write_text(str(error))

    assert in_child(save_under_limit) == 0
    message = told.read_text()
    assert str(durable.mount_point(folder)) in message
    assert "0.1 MB needed" in message
    assert "MB free" in message
    assert "ulimit -f" in message
    assert sorted(path.name for path in folder.iterdir()) == ["step-000003"]
    assert Checkpointer(folder).load("last").warnings == ()


def test_full_disk_is_noticed_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 3)
    monkeypatch.setattr(durable, "free_bytes", lambda path: 2_000_000)
    with SystemCalls(NEVER, die).patched(("write",)) as calls, pytest.raises(CheckpointError) as caught:
        Checkpointer(folder).save(4, {"0.weight": np.zeros(1_000_000, np.float32)}, {}, {})
    assert calls.count == 0
    assert "is full (4.0 MB needed, 2.0 MB free)" in str(caught.value)
    assert str(durable.mount_point(folder)) in str(caught.value)
    assert Checkpointer(folder).load("last").step == 3


def test_device_that_is_full_is_explained() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            durable.write_all(descriptor, b"x")
    finally:
        os.close(descriptor)
    assert "is full (1.0 MB needed" in durable.explain(caught.value, Path("/dev/full"), 1_000_000)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EDQUOT, "quota"), (errno.EACCES, "Permission denied"), (errno.EROFS, "Read-only file system")],
)
def test_other_errors_are_explained_with_the_disk(tmp_path: Path, number: int, words: str) -> None:
    line = durable.explain(OSError(number, os.strerror(number)), tmp_path / "not" / "there")
    assert words in line
    assert str(durable.mount_point(tmp_path)) in line


def test_json_holds_numpy_scalars_paths_and_no_nan() -> None:
    value = {"a": np.float32(0.5), "b": np.int64(3), "c": Path("x/y"), "d": (1.0, float("nan"), float("inf")), 5: "ä"}
    assert durable.encode_json(value) == '{"a": 0.5, "b": 3, "c": "x/y", "d": [1.0, null, null], "5": "ä"}'
