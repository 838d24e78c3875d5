import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convolt.cli import main
from convolt.datasets import SOURCES


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes of three noisy images."""
    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(3):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.png")
    return tmp_path / "photos"


def answer(capsys, *args):
    """The exit code and what the verb prints with --json."""
    code = main(["data", *args, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_list_names_every_set(capsys):
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert all(source.name in out and source.description in out for source in SOURCES)


def test_list_tells_what_is_here(tmp_path, capsys):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "data_batch_1.bin").write_bytes(b"")
    code, entries = answer(capsys, "list", "--data-dir", str(tmp_path))
    found = {entry["name"]: entry["folder"] for entry in entries if entry["found"]}
    assert code == 0
    assert found == {"digits": "in the package", "cifar10": str(tmp_path / "cifar10")}


def test_list_says_how_to_get_the_others(tmp_path, capsys):
    assert main(["data", "list", "--data-dir", str(tmp_path)]) == 0
    assert f"convolt data fetch mnist --data-dir {tmp_path}" in capsys.readouterr().out


def test_embedded_set_needs_no_fetching(tmp_path, capsys):
    assert answer(capsys, "fetch", "digits", "--data-dir", str(tmp_path)) == (
        0,
        {"name": "digits", "folder": "in the package"},
    )
    assert list(tmp_path.iterdir()) == []


def test_fetch_leaves_files_that_are_there(tmp_path, capsys):
    random = np.random.default_rng(0)
    for name, count in (("train", 6), ("t10k", 4)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = (0x803).to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in images.shape)
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(count) % 2).astype(np.uint8)
        header = (0x801).to_bytes(4, "big") + count.to_bytes(4, "big")
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    assert main(["data", "fetch", "mnist", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"mnist: {tmp_path}\n"


def test_check_counts_images(photos, capsys):
    code, report = answer(capsys, "check", str(photos))
    assert code == 0
    assert report["ok"] is True
    assert report["counts"] == {"all": {"cat": 3, "dog": 3}}
    assert report["findings"] == []


def test_check_of_the_embedded_set(capsys):
    assert main(["data", "check", "digits"]) == 0
    out = capsys.readouterr().out
    assert "1,438" in out
    assert "359" in out
    assert out.endswith("digits: no problems\n")


def test_bad_image_is_named_and_fails(photos, capsys):
    bad = photos / "cat" / "3.png"
    bad.write_bytes((photos / "cat" / "1.png").read_bytes()[:60])
    assert main(["data", "check", str(photos)]) == 1
    out = capsys.readouterr().out
    assert out.count(str(bad)) == 1
    assert out.endswith("photos: 1 error\n")


def test_duplicate_is_a_warning_that_strict_fails_on(photos, capsys):
    (photos / "cat" / "3.png").write_bytes((photos / "cat" / "1.png").read_bytes())
    code, report = answer(capsys, "check", str(photos))
    assert (code, report["ok"]) == (0, True)
    assert [finding["kind"] for finding in report["findings"]] == ["duplicate"]
    code, report = answer(capsys, "check", str(photos), "--strict")
    assert (code, report["ok"]) == (1, False)


def test_other_sizes_are_errors_until_images_are_resized(photos, capsys):
    Image.new("RGB", (9, 8)).save(photos / "dog" / "3.png")
    assert answer(capsys, "check", str(photos))[0] == 1
    assert answer(capsys, "check", str(photos), "--image-size", "8")[0] == 0


def test_long_lists_are_cut_on_the_screen_alone(photos, capsys):
    for number in range(3, 33):
        (photos / "cat" / f"{number}.png").write_text("x")
    assert main(["data", "check", str(photos)]) == 1
    assert "10 more; --json lists them all" in capsys.readouterr().out
    assert len(answer(capsys, "check", str(photos))[1]["findings"]) == 30


@pytest.mark.parametrize(
    ("args", "code", "parts"),
    [
        (["fetch", "mnits"], 1, ["'mnits'", "'mnist'"]),
        (["fetch"], 2, ["NAME"]),
        (["check", "mnits"], 1, ["'mnits'", "'mnist'"]),
        (["check", "absent.zip"], 1, ["absent.zip", "no such file"]),
        (["check", "text.txt"], 1, ["text.txt", ".zip"]),
        (["check", "mnist", "--data-dir", "."], 1, ["mnist", "convolt data fetch mnist"]),
        (["check", "photos", "--image-size", "8x8x8"], 2, ["'8x8x8'", "32x48"]),
        (["check", "photos", "--channels", "red"], 2, ["--channels", "'red'"]),
        (["chek", "mnist"], 2, ["'chek'", "'check'"]),
        (["list", "--jsn"], 2, ["--jsn", "--json"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_ends_in_one_line(args, code, parts, photos, monkeypatch, capsys):
    monkeypatch.chdir(photos.parent)
    Path("text.txt").write_text("x")
    assert main(["data", *args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("convolt: error: ")
    assert err.count("\n") == 1
    assert all(part in err for part in parts), err
