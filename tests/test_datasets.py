import gzip
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_files import member, packed_tar, write_mnist, write_tree

from convolt.datasets import SOURCES, fetch, find_source, load_dataset
from convolt.datasets.check import check_dataset
from convolt.datasets.source import locate
from convolt.errors import DataError

RNG = np.random.default_rng(0)
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def shared_data():
    if not SHARED.is_dir():
        pytest.skip("needs the real data sets in ../shared/data")
    return SHARED


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
    """No test sees the data sets of the machine it runs on."""
    monkeypatch.delenv("CONVOLT_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def identical(split, images, labels):
    return (split.images == images).all() and (split.labels == labels).all()


# -- by name ----------------------------------------------------------------------------------------------------------


def test_digits_are_embedded():
    data = load_dataset("digits")
    assert {name: len(split) for name, split in data.splits()} == {"train": 1294, "valid": 144, "test": 359}
    assert (data.input_shape, data.classes) == ((1, 8, 8), tuple("0123456789"))
    assert (data.train.images.min(), data.train.images.max()) == (0, 255)
    assert data.train.images.flags.writeable


def test_digits_test_images_do_not_depend_on_the_seed():
    first, other = load_dataset("digits", seed=0), load_dataset("digits", seed=1)
    assert identical(first.test, other.test.images, other.test.labels)
    assert not (first.valid.images == other.valid.images).all()


def test_digits_come_with_their_license():
    text = (Path(load_dataset.__code__.co_filename).parent / "embedded" / "README.txt").read_text()
    assert "CC BY 4.0" in text
    assert "Alpaydin" in text


@pytest.fixture
def mnist_arrays():
    def split(n):
        return RNG.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n) % 10

    return {"train": split(60), "t10k": split(20)}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", "."),
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "."),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("kmnist", "KMNIST/raw"),
    ],
)
@pytest.mark.parametrize(("packed", "hyphen"), [(True, "-"), (False, "-"), (False, ".")])
def test_mnist_in_every_layout(tmp_path, mnist_arrays, name, place, packed, hyphen):
    write_mnist(tmp_path / place, mnist_arrays, packed, hyphen)
    data = load_dataset(name, root=tmp_path, valid=None)
    assert identical(data.train, mnist_arrays["train"][0][:, None], mnist_arrays["train"][1])
    assert identical(data.test, mnist_arrays["t10k"][0][:, None], mnist_arrays["t10k"][1])
    assert (data.name, data.num_classes) == (name, 10)
    assert data.train.images.flags.writeable


def test_class_names_of_fashion_mnist(tmp_path, mnist_arrays):
    write_mnist(tmp_path, mnist_arrays)
    assert load_dataset("fashion-mnist", root=tmp_path).classes[9] == "Ankle boot"


def test_unpacked_file_under_a_packed_name(tmp_path, mnist_arrays):
    write_mnist(tmp_path, mnist_arrays)
    for path in tmp_path.iterdir():
        path.write_bytes(gzip.decompress(path.read_bytes()))
    assert len(load_dataset("mnist", root=tmp_path, valid=None).train) == 60


def test_valid_seed_and_subset_apply_to_every_source(tmp_path, mnist_arrays):
    write_mnist(tmp_path, mnist_arrays)
    data = load_dataset("mnist", tmp_path, valid=0.5, seed=3, subset=20)
    assert [len(split) for _, split in data.splits()] == [20, 30, 20]
    assert (np.bincount(data.valid.labels) == 3).all()


def test_root_comes_before_the_variable_and_the_variable_before_the_cache(tmp_path, mnist_arrays, monkeypatch):
    source = find_source("mnist")
    cache, chosen, given = (tmp_path / name for name in ("cache", "chosen", "given"))
    for folder in (cache / "convolt" / "mnist", chosen / "mnist", given):
        write_mnist(folder, mnist_arrays)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert locate(source, None) == cache / "convolt" / "mnist"
    monkeypatch.setenv("CONVOLT_DATA_DIR", str(chosen))
    assert locate(source, None) == chosen / "mnist"
    assert locate(source, given) == given


def test_flat_folder_is_trusted_only_when_given(tmp_path, mnist_arrays, monkeypatch):
    write_mnist(tmp_path, mnist_arrays)
    monkeypatch.setenv("CONVOLT_DATA_DIR", str(tmp_path))
    assert locate(find_source("kmnist"), None) is None
    assert locate(find_source("kmnist"), tmp_path) == tmp_path


def test_missing_files_are_never_fetched_unasked(tmp_path):
    with pytest.raises(DataError, match=f"run: convolt data fetch mnist --data-dir {tmp_path}"):
        load_dataset("mnist", root=tmp_path)
    with pytest.raises(DataError, match=r"run: convolt data fetch cifar10 "):
        load_dataset("cifar10")


def test_what_is_there_is_not_fetched_again(tmp_path, mnist_arrays):
    write_mnist(tmp_path, mnist_arrays)
    assert fetch("mnist", tmp_path) == tmp_path
    assert len(load_dataset("mnist", tmp_path, download=True, valid=None).train) == 60


def test_every_source_says_what_it_is():
    assert len({source.name for source in SOURCES}) == len(SOURCES)
    for source in SOURCES:
        assert all((source.description, source.license, source.citation))
        assert all(file.urls and len(file.md5) == 32 for file in source.files)


@pytest.fixture
def cifar_records():
    """Records of 1 or 2 label bytes and the arrays they hold: (bytes, images, labels)."""

    def records(n, label_bytes, classes):
        images = RNG.integers(0, 256, (n, 3, 32, 32), np.uint8)
        labels = np.arange(n) % classes
        coarse = np.zeros((n, label_bytes - 1), np.uint8)
        content = np.concatenate([coarse, labels[:, None].astype(np.uint8), images.reshape(n, -1)], axis=1)
        return content.tobytes(), images, labels

    return records


def packed_cifar(inner, files):
    files = {"readme.html": b"<p>", **files}
    return packed_tar((member(f"{inner}/{name}", len(content)), content) for name, content in files.items())


@pytest.mark.parametrize("form", ["flat", "unpacked", "archive", "below"])
def test_cifar10_in_every_layout(tmp_path, cifar_records, form):
    parts = {f"data_batch_{batch}.bin": cifar_records(20, 1, 10) for batch in range(1, 6)}
    parts["test_batch.bin"] = cifar_records(10, 1, 10)
    files = {name: content for name, (content, _, _) in parts.items()}
    inner = "cifar-10-batches-bin"
    if form in ("flat", "unpacked"):
        write_tree(tmp_path / (inner if form == "unpacked" else "."), files)
    else:
        archive = {"cifar-10-binary.tar.gz": packed_cifar(inner, files)}
        write_tree(tmp_path / ("cifar10" if form == "below" else "."), archive)
    data = load_dataset("cifar10", tmp_path, valid=None)
    train = [parts[f"data_batch_{batch}.bin"] for batch in range(1, 6)]
    assert identical(data.train, *(np.concatenate(column) for column in list(zip(*train, strict=True))[1:]))
    assert identical(data.test, *parts["test_batch.bin"][1:])
    assert data.classes[:2] == ("airplane", "automobile")


def test_cifar100_uses_the_fine_labels(tmp_path, cifar_records):
    train, test = cifar_records(200, 2, 100), cifar_records(100, 2, 100)
    archive = packed_cifar("cifar-100-binary", {"train.bin": train[0], "test.bin": test[0]})
    write_tree(tmp_path, {"cifar-100-binary.tar.gz": archive})
    data = load_dataset("cifar100", tmp_path, valid=None)
    assert identical(data.train, *train[1:])
    assert (data.num_classes, data.classes[0], data.classes[99]) == (100, "apple", "worm")


# -- arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_images_and_labels_is_split_by_seed(tmp_path, save):
    images, labels = RNG.integers(0, 256, (50, 3, 8, 8), np.uint8), np.arange(50) % 5
    save(tmp_path / "mine.npz", images=images, labels=labels)
    data = load_dataset(tmp_path / "mine.npz", valid=0.25)
    assert (data.name, data.num_classes) == ("mine", 5)
    assert [len(split) for _, split in data.splits()] == [30, 10, 10]


def test_npz_as_keras_writes_it(tmp_path):
    color = RNG.integers(0, 256, (20, 8, 8, 3), np.uint8)
    np.savez(
        tmp_path / "k.npz", x_train=color, y_train=np.arange(20)[:, None] % 2, x_test=color, y_test=np.arange(20) % 2
    )
    data = load_dataset(tmp_path / "k.npz", valid=None)
    assert identical(data.train, color.transpose(0, 3, 1, 2), np.arange(20) % 2)
    assert len(data.test) == 20


def test_npz_of_floats_in_fortran_and_foreign_byte_order(tmp_path):
    images = RNG.standard_normal((20, 1, 8, 8))
    np.savez(tmp_path / "f.npz", images=np.asfortranarray(images.astype(">f8")), labels=np.arange(20).astype(">i4") % 2)
    data = load_dataset(tmp_path / "f.npz", valid=None)
    assert data.train.images.dtype == np.float64
    assert np.isin(data.train.images, images).all()


# -- the real ones ----------------------------------------------------------------------------------------------------


def test_real_mnist(shared_data):
    data = load_dataset("mnist", root=shared_data / "mnist")
    assert {name: len(split) for name, split in data.splits()} == {"train": 54_000, "valid": 6_000, "test": 10_000}
    whole = load_dataset("mnist", root=shared_data / "mnist", valid=None)
    assert np.bincount(whole.train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    mean, std = whole.mean_std()
    assert (round(mean[0], 4), round(std[0], 4)) == (0.1307, 0.3081)  # the constants that everybody quotes


def test_real_mnist_holds_what_was_published_although_recompressed(shared_data):
    report = check_dataset("mnist", shared_data / "mnist")
    assert {(finding.severity, finding.kind) for finding in report.findings} <= {("note", "recompressed")}


def test_real_cifar10_images_are_the_data_set_of_that_name(shared_data, tmp_path):
    for split, numbers in (("train", range(20)), ("test", range(20, 30))):  # all 60,000 take seconds
        with zipfile.ZipFile(shared_data / "cifar10-jpeg" / f"{split}.zip") as whole:
            names = [name for name in whole.namelist() if int(Path(name).stem) in numbers]
            write_tree(tmp_path / f"{split}.zip", {name: whole.read(name) for name in names})
    data = load_dataset("cifar10", root=tmp_path)
    assert {name: len(split) for name, split in data.splits()} == {"train": 180, "valid": 20, "test": 100}
    assert (np.bincount(data.test.labels) == 10).all()
    assert (data.input_shape, data.classes[6]) == ((3, 32, 32), "frog")
