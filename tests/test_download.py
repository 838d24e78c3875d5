"""Downloads from a server on the loopback that misbehaves on demand."""

import errno
import hashlib
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from convolt.datasets import download as downloads
from convolt.datasets import load_dataset
from convolt.datasets.download import download
from convolt.datasets.source import RemoteFile
from convolt.errors import DataError

CONTENT = bytes(range(256)) * 3000  # three blocks
SIZE = len(CONTENT)
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Mirror:
    """What a server sends, and what it was asked for."""

    content: bytes = CONTENT
    status: int = 200
    ranges: bool = True
    cut_after: list[int] = field(default_factory=list)  # bytes after which each connection breaks, in turn
    wrong_range: bool = False
    announces_length: bool = True
    asked: list[str | None] = field(default_factory=list)
    url: str = ""

    def answer(self, handler):
        asked = handler.headers.get("Range")
        self.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if start and start >= len(self.content):
            handler.send_error(416)
            return
        if self.status != 200:
            handler.send_error(self.status)
            return
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        if start:
            first = start + self.wrong_range
            handler.send_header("Content-Range", f"bytes {first}-{len(self.content) - 1}/{len(self.content)}")
        if self.announces_length:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: self.cut_after.pop(0)] if self.cut_after else body)


@contextmanager
def serving(mirror):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            mirror.answer(self)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    mirror.url = f"http://127.0.0.1:{server.server_port}/file.bin"
    try:
        yield mirror
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def mirror():
    with serving(Mirror()) as mirror:
        yield mirror


@pytest.fixture
def second():
    with serving(Mirror()) as mirror:
        yield mirror


def published(*mirrors, size=SIZE, md5=MD5, sha256=None):
    return RemoteFile("file.bin", tuple(mirror.url for mirror in mirrors), md5, size, sha256)


def fails(file, folder, *words):
    """The download is refused in one line, and no file appears under its own name."""
    with pytest.raises(DataError) as caught:
        download([file], folder)
    message = str(caught.value)
    assert message.isprintable()
    assert all(word in message for word in words), message
    assert not (folder / "file.bin").exists()
    return message


def is_whole(folder):
    return (folder / "file.bin").read_bytes() == CONTENT and os.listdir(folder) == ["file.bin"]


@pytest.mark.parametrize("size", [len(CONTENT), None])
@pytest.mark.parametrize("announces_length", [True, False])
def test_file_arrives_whole_in_a_new_folder(tmp_path, mirror, size, announces_length):
    mirror.announces_length = announces_length
    download([published(mirror, size=size)], tmp_path / "a" / "b")
    assert is_whole(tmp_path / "a" / "b")


def test_file_that_is_there_is_not_asked_for(tmp_path, mirror):
    (tmp_path / "file.bin").write_bytes(CONTENT)
    download([published(mirror)], tmp_path)
    assert mirror.asked == []


def test_damaged_file_is_replaced(tmp_path, mirror):
    (tmp_path / "file.bin").write_bytes(CONTENT[:-1] + b"?")
    download([published(mirror)], tmp_path)
    assert is_whole(tmp_path)


def test_broken_connections_are_resumed_where_they_broke(tmp_path, mirror):
    mirror.cut_after = [300_000, 200_000]
    download([published(mirror)], tmp_path)
    assert is_whole(tmp_path)
    assert mirror.asked == [None, "bytes=300000-", "bytes=500000-"]


def test_next_run_resumes(tmp_path, mirror):
    mirror.cut_after = [300_000, 0]
    message = fails(published(mirror), tmp_path, "file.bin", "run the command again", "300,000 bytes are kept")
    assert "connection ended" in message
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:300_000]
    download([published(mirror)], tmp_path)
    assert is_whole(tmp_path)
    assert mirror.asked[-1] == "bytes=300000-"


def test_server_without_ranges_sends_all_again(tmp_path, mirror):
    mirror.ranges = False
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    download([published(mirror)], tmp_path)
    assert is_whole(tmp_path)


def test_server_that_sends_another_range_is_not_believed(tmp_path, mirror, second):
    mirror.wrong_range = True
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    download([published(mirror, second)], tmp_path)
    assert is_whole(tmp_path)
    assert second.asked == ["bytes=1000-"]


def test_part_that_is_complete_is_only_verified(tmp_path, mirror):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    download([published(mirror)], tmp_path)
    assert is_whole(tmp_path)
    assert mirror.asked == []


@pytest.mark.parametrize("part", [b"x" * 1000, b"x" * len(CONTENT), b"x" * (len(CONTENT) + 1)])
@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_part_of_something_else_is_thrown_away(tmp_path, mirror, part, size):
    (tmp_path / "file.bin.part").write_bytes(part)
    download([published(mirror, size=size)], tmp_path)
    assert is_whole(tmp_path)


@pytest.mark.parametrize("status", [404, 403, 500, 503])
def test_dead_mirror_is_passed_over(tmp_path, mirror, second, status):
    mirror.status = status
    download([published(mirror, second)], tmp_path)
    assert is_whole(tmp_path)
    assert (len(mirror.asked), len(second.asked)) == (1, 1)


def test_mirror_that_is_not_there_is_passed_over(tmp_path, second):
    with serving(Mirror()) as gone:
        pass
    download([published(gone, second)], tmp_path)
    assert is_whole(tmp_path)


def test_second_mirror_goes_on_where_the_first_stopped(tmp_path, mirror, second):
    mirror.cut_after = [100_000, 0]
    download([published(mirror, second)], tmp_path)
    assert is_whole(tmp_path)
    assert second.asked == ["bytes=100000-"]


def test_all_mirrors_dead(tmp_path, mirror, second):
    mirror.status, second.status = 404, 503
    fails(published(mirror, second), tmp_path, "file.bin", "HTTP 404", "HTTP 503", f"put the file in {tmp_path}")


def test_wrong_checksum(tmp_path, mirror):
    mirror.content = b"?" + CONTENT[1:]
    fails(published(mirror), tmp_path, "file.bin", "wrong checksum", f"published is {MD5}")
    assert list(tmp_path.iterdir()) == []


def test_wrong_sha256(tmp_path, mirror):
    right = hashlib.sha256(CONTENT).hexdigest()
    fails(published(mirror, sha256="0" * 64), tmp_path, "wrong checksum", right)


def test_wrong_checksum_on_one_mirror_only(tmp_path, mirror, second):
    mirror.content = b"?" + CONTENT[1:]
    download([published(mirror, second)], tmp_path)
    assert is_whole(tmp_path)


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", b"<html>log in to the network</html>", b""])
@pytest.mark.parametrize("announces_length", [True, False])
def test_wrong_size(tmp_path, mirror, content, announces_length):
    mirror.content, mirror.announces_length = content, announces_length
    fails(published(mirror), tmp_path, "file.bin", f"has {len(content):,} bytes, published are {len(CONTENT):,}")
    assert list(tmp_path.iterdir()) == []


def test_server_that_never_ends_is_stopped(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(downloads, "MAX_BYTES", 300_000)
    fails(published(mirror, size=None), tmp_path, "more than 300,000 bytes")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path, mirror):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be made"):
        download([published(mirror)], tmp_path / "file" / "folder")


def test_full_disk_is_named_and_no_other_mirror_tried(tmp_path, mirror, second, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(downloads, "_copy", full)
    fails(published(mirror, second), tmp_path, "file.bin.part", "No space left on device", "free some space")
    assert second.asked == []


def test_processes_that_start_at_once_download_once(tmp_path, mirror):
    threads = [threading.Thread(target=download, args=([published(mirror)], tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_whole(tmp_path)
    assert mirror.asked == [None]


def test_load_dataset_downloads_when_asked(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(downloads, "download", lambda files, folder, progress: fetched.append((len(files), folder)))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is missing"):
        load_dataset("kmnist", root=tmp_path, download=True)
    assert fetched == [(4, tmp_path / "kmnist")]
