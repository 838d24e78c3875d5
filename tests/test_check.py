from pathlib import Path

import numpy as np
import pytest
from data_files import noise, picture, tree, write_mnist, write_tree

from convolt.datasets.check import check_dataset
from convolt.errors import DataError

RNG = np.random.default_rng(0)


def found(report):
    return sorted((finding.severity, finding.kind, Path(finding.where).name) for finding in report.findings)


def test_finds_nothing_wrong_with_the_digits():
    report = check_dataset("digits")
    assert report.ok
    assert report.findings == ()
    assert sum(report.counts["train"].values()) + sum(report.counts["test"].values()) == 1797


def test_names_every_image_with_a_problem(tmp_path):
    whole = noise("JPEG", size=(64, 64))
    files = tree("train/") | tree("test/", n=2, start=200)
    files |= {
        "train/cat/broken.png": b"not an image",
        "train/cat/cut.jpg": whole[:-30],
        "train/cat/copy.png": files["train/cat/0.png"],
        "train/dog/relabeled.png": files["train/cat/1.png"],
        "test/dog/leaked.png": files["train/dog/1.png"],
        "train/dog/large.png": picture(99, size=(8, 8)),
        "train/dog/gray.png": picture(99, mode="L"),
        "train/stray.png": picture(98),
        "train/cat/notes.txt": b"",
    }
    path = write_tree(tmp_path, files)
    (tmp_path / "train" / "cow").mkdir()
    report = check_dataset(path)
    assert not report.ok
    assert found(report) == [
        ("error", "empty class", f"{tmp_path.name}: cow (train)"),
        ("error", "mixed modes", "gray.png"),
        ("error", "mixed sizes", "large.png"),
        ("error", "stray", "stray.png"),
        ("error", "truncated", "cut.jpg"),
        ("error", "unreadable", "broken.png"),
        ("note", "ignored", "notes.txt"),
        ("warning", "duplicate", "copy.png"),
        ("warning", "duplicate", "relabeled.png"),
        ("warning", "leak", "leaked.png"),
    ]
    details = {Path(finding.where).name: finding.detail for finding in report.findings}
    assert "another label (dog, cat)" in details["relabeled.png"]
    assert "train/dog/1.png" in details["leaked.png"]


def test_reads_zips(tmp_path):
    write_tree(tmp_path / "train.zip", tree() | {"cat/x.png": b"?"})
    write_tree(tmp_path / "test.zip", tree(n=1))
    assert {kind for _, kind, _ in found(check_dataset(tmp_path))} == {"unreadable", "leak"}


def test_finds_imbalance_and_a_single_class(tmp_path):
    path = write_tree(tmp_path / "a", tree(n=20) | {"rare/0.png": picture(250)})
    assert ("warning", "imbalance") in {finding[:2] for finding in found(check_dataset(path))}
    path = write_tree(tmp_path / "b", tree(classes=("cat",)))
    assert ("error", "one class") in {finding[:2] for finding in found(check_dataset(path))}


def test_reports_what_makes_loading_fail(tmp_path):
    split = RNG.integers(0, 256, (20, 28, 28), np.uint8), np.arange(20) % 10
    write_mnist(tmp_path, {"train": split, "t10k": split})
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b")
    report = check_dataset("mnist", tmp_path)
    assert not report.ok
    assert "t10k-images-idx3-ubyte.gz" in report.findings[0].detail


def test_finds_leaks_between_arrays(tmp_path):
    images, labels = RNG.integers(0, 256, (20, 8, 8), np.uint8), np.arange(20) % 2
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images[3:4], y_test=labels[3:4])
    report = check_dataset(tmp_path / "a.npz")
    assert [(f.kind, f.where, f.detail) for f in report.findings] == [
        ("leak", "test[0]", "has the same pixels as train[3]")
    ]


def test_of_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match="convolt data fetch mnist"):
        check_dataset("mnist", tmp_path)
