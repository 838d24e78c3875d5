"""Images in class folders and zips: the layouts that are read, and the files that are refused."""

import os
import stat
import struct
import zipfile
import zlib

import numpy as np
import pytest
from data_files import MIB, RNG, encoded, noise, packed_zip, picture, refused, tree, write_tree
from PIL import Image

from convolt.datasets import load_dataset, resolve
from convolt.errors import ConfigError

# -- folders and zips of images ---------------------------------------------------------------------------------------


def values(split):
    return sorted(split.images[:, 0, 0, 0].tolist())


@pytest.mark.parametrize("form", ["pets", "pets.zip"])
def test_classes_without_splits_are_split_by_seed(tmp_path, form):
    path = write_tree(tmp_path / form, tree())
    data = load_dataset(path, valid=None)
    assert (data.name, data.classes, data.input_shape) == ("pets", ("cat", "dog"), (3, 6, 5))
    assert (len(data.train), len(data.test)) == (8, 2)
    assert sorted(values(data.train) + values(data.test)) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    for _, split in data.splits():
        assert (split.labels == split.images[:, 0, 0, 0] // 10).all()
    assert any(values(load_dataset(path, seed=seed, valid=None).test) != values(data.test) for seed in range(1, 6))


@pytest.mark.parametrize("form", ["pets", "pets.zip"])
@pytest.mark.parametrize("valid", ["valid", "val", "Validation"])
def test_splits_that_are_given_are_kept(tmp_path, form, valid):
    files = tree("train/") | tree(f"{valid}/", n=2, start=100) | tree("test/", n=3, start=200)
    data = load_dataset(write_tree(tmp_path / form, files), valid=0.4)
    assert [len(split) for _, split in data.splits()] == [10, 4, 6]
    assert values(data.valid) == [100, 101, 110, 111]
    assert values(data.test) == [200, 201, 202, 210, 211, 212]


@pytest.mark.parametrize("inner", ["", "train/", "data/train/"])
def test_two_zips_in_a_folder_are_one_data_set(tmp_path, inner):
    write_tree(tmp_path / "train.zip", tree(inner))
    write_tree(tmp_path / "test.zip", tree(n=2, start=200))
    data = load_dataset(tmp_path, valid=None)
    assert (len(data.train), values(data.test)) == (10, [200, 201, 210, 211])


def test_folder_that_holds_everything_in_a_zip_is_passed_through(tmp_path):
    path = write_tree(tmp_path / "a.zip", tree("pets/train/") | tree("pets/test/", n=1) | {"__MACOSX/x.png": b""})
    assert load_dataset(path).classes == ("cat", "dog")


def test_current_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write_tree(tmp_path / "pets.v2", tree()))
    assert load_dataset(".").name == "pets.v2"


def test_class_called_train_is_a_class(tmp_path):
    assert load_dataset(write_tree(tmp_path / "v", tree(classes=("car", "train")))).classes == ("car", "train")


def test_hidden_files_and_other_files_are_passed_over(tmp_path):
    extra = {"cat/.hidden.png": b"", "cat/notes.txt": b"", "README.md": b"", ".git/x.png": b""}
    assert len(load_dataset(write_tree(tmp_path / "pets", tree() | extra), valid=None).train) == 8


def test_relative_path_is_looked_for_below_root(tmp_path):
    write_tree(tmp_path / "pets", tree())
    assert resolve("pets", root=tmp_path) == tmp_path / "pets"


@pytest.mark.parametrize(
    ("mode", "kind", "suffix", "channels"),
    [
        ("L", "PNG", ".png", 1),
        ("L", "JPEG", ".jpg", 1),
        ("L", "PPM", ".pgm", 1),
        ("RGB", "JPEG", ".JPEG", 3),
        ("RGB", "BMP", ".bmp", 3),
        ("RGB", "TIFF", ".tif", 3),
        ("RGB", "WEBP", ".webp", 3),
        ("RGBA", "PNG", ".png", 3),
        ("P", "PNG", ".png", 3),
    ],
)
def test_modes_and_formats(tmp_path, mode, kind, suffix, channels):
    content = picture((90, 2, 3, 128) if mode == "RGBA" else 90, mode=mode, kind=kind)
    files = {f"{name}/{i}{suffix}": content for name in ("cat", "dog") for i in range(5)}
    assert load_dataset(write_tree(tmp_path, files)).input_shape == (channels, 6, 5)


def test_pixels_are_those_of_pillow_in_channel_order(tmp_path):
    pixels = RNG.integers(0, 256, (6, 5, 3), np.uint8)
    files = {f"{name}/{i}.png": encoded(Image.fromarray(pixels)) for name in ("cat", "dog") for i in range(5)}
    assert (load_dataset(write_tree(tmp_path, files)).train.images[0] == pixels.transpose(2, 0, 1)).all()


def test_large_images_are_decoded_in_order(tmp_path):
    files = {f"{'cat' if i % 2 else 'dog'}/{i}.png": picture(i, size=(130, 130)) for i in range(200)}
    data = load_dataset(write_tree(tmp_path, files), valid=None)
    assert sorted(values(data.train) + values(data.test)) == list(range(200))
    assert (data.train.labels == 1 - data.train.images[:, 0, 0, 0] % 2).all()


def test_images_of_several_sizes_and_modes_are_converted_when_asked(tmp_path):
    files = tree() | {"cat/9.png": picture(9, size=(12, 10)), "dog/9.png": picture(9, mode="L")}
    path = write_tree(tmp_path, files)
    assert load_dataset(path, image_size=(6, 5), channels=3).input_shape == (3, 6, 5)
    assert load_dataset(path, image_size=(3, 4), channels=1).input_shape == (1, 3, 4)


@pytest.mark.parametrize("options", [{"image_size": (0, 5)}, {"image_size": (5,)}, {"channels": 2}])
def test_impossible_conversions_are_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        load_dataset(write_tree(tmp_path, tree()), **options)


def test_conversions_are_for_image_folders_only():
    with pytest.raises(ConfigError, match="class folders"):
        load_dataset("digits", image_size=(16, 16))


# -- zips of images ---------------------------------------------------------------------------------------------------


def write_zip(path, *extra, compression=zipfile.ZIP_STORED):
    path.write_bytes(packed_zip((*tree().items(), *extra), compression))
    return path


def symlink(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("../../evil.png", b""), ("../../evil.png", "inside the archive")),
        (("/evil.png", b""), ("/evil.png", "inside the archive")),
        (("cat\\..\\..\\evil.png", b""), ("inside the archive",)),
        (("C:/evil.png", b""), ("inside the archive",)),
        ((symlink("cat/link.png"), b"/etc/passwd"), ("symbolic link",)),
        (("cat/\x1b[2Jx\n.png", b""), (r"cat/\x1b[2Jx\n.png", "unreadable")),
    ],
)
def test_zip_members(tmp_path, extra, words):
    path = write_zip(tmp_path / "pets.zip", extra)
    with refused("pets.zip", *words):
        load_dataset(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["pets.zip"]


def test_zip_with_a_compression_not_in_use(tmp_path):
    path = write_zip(tmp_path / "pets.zip", compression=zipfile.ZIP_LZMA)
    with refused("pets.zip", "deflated"):
        load_dataset(path)


def patched(path, offset, content):
    """Overwrite bytes of the last entry of a zip's directory."""
    whole = bytearray(path.read_bytes())
    start = whole.rfind(b"PK\x01\x02") + offset
    whole[start : start + len(content)] = content
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize(
    ("offset", "content", "words"),
    [
        (8, struct.pack("<H", 1), ("encrypted",)),
        (20, struct.pack("<I", 2**31), ("overlap",)),
        (24, struct.pack("<I", 2**31), ("claims 2,147,483,648 bytes", "bomb")),
        (24, struct.pack("<I", 9999), ("dog/4.png",)),
        (16, struct.pack("<I", 1), ("dog/4.png", "CRC")),
        (42, struct.pack("<I", 5), ("dog/4.png",)),
    ],
)
def test_zip_directory_that_lies(tmp_path, offset, content, words):
    path = patched(write_zip(tmp_path / "pets.zip"), offset, content)
    with refused("pets.zip", *words):
        load_dataset(path)


def test_zip_that_is_cut_or_something_else(tmp_path):
    whole = write_zip(tmp_path / "pets.zip").read_bytes()
    for content in (whole[:-30], b"text", b"", whole[: len(whole) // 2]):
        (tmp_path / "pets.zip").write_bytes(content)
        with refused("pets.zip", "not a readable zip archive"):
            load_dataset(tmp_path / "pets.zip")


def test_zip_member_that_inflates(tmp_path):
    path = write_zip(tmp_path / "pets.zip", ("cat/z.bmp", bytes(70 * MIB)), compression=zipfile.ZIP_DEFLATED)
    with refused("pets.zip/cat/z.bmp", "bomb"):
        load_dataset(path)


# -- images -----------------------------------------------------------------------------------------------------------


def png_claiming(width, height):
    """A PNG whose header claims a size and whose data inflates to nothing but zeros."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def pets(tmp_path):
    return write_tree(tmp_path, tree())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.jpg", b"hello", ("not an image in a known format",)),
        ("empty.png", b"", ("not an image in a known format",)),
        ("cut.jpg", noise("JPEG")[:-20], ("unreadable", "truncated")),
        ("cut.png", picture()[:-30], ("unreadable",)),
        ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n", ("not an image in a known format",)),
        ("bomb.png", png_claiming(20_000, 20_000), ("unreadable", "bomb")),
        ("warned.png", png_claiming(12_000, 12_000), ("unreadable", "bomb")),
        ("map.png", png_claiming(8_000, 8_000), ("8000 x 8000 pixels", "bomb")),
        ("short.png", png_claiming(500, 500), ("unreadable", "truncated")),
        ("deep.png", picture(mode="I;16"), ("mode I;16", "convert")),
        ("large.png", picture(size=(7, 9)), ("7 x 9", "cat/0.png is 6 x 5", "image_size=(6, 5)")),
        ("gray.png", picture(mode="L"), ("grayscale", "channels=3")),
    ],
)
def test_images(pets, name, content, words):
    (pets / "cat" / name).write_bytes(content)
    with refused(f"cat/{name}", *words):
        load_dataset(pets)


def test_image_file_that_is_huge_unreadable_or_a_pipe(pets):
    path = pets / "cat" / "x.png"
    with path.open("wb") as file:
        file.truncate(65 * MIB)
    with refused(str(path), "larger than"):
        load_dataset(pets)
    path.unlink()
    os.mkfifo(path)
    with refused(str(path), "not a regular file"):
        load_dataset(pets)
    path.unlink()
    path.symlink_to(pets / "nowhere.png")
    with refused(str(path), "missing"):
        load_dataset(pets)


def test_classes_that_are_empty_alone_unknown_or_ambiguous(pets):
    (pets / "cow").mkdir()
    with refused(str(pets), "'cow'", "empty", ".png"):
        load_dataset(pets)
    (pets / "cow" / "notes.txt").write_text("no image")
    with refused("'cow'", "empty"):
        load_dataset(pets)
    (pets / "cow" / "notes.txt").unlink()
    (pets / "cow").rmdir()
    (pets / "stray.png").write_bytes(picture())
    with refused("stray.png", "not in a class folder"):
        load_dataset(pets)
    (pets / "stray.png").unlink()
    (pets / "train").mkdir()
    (pets / "test").mkdir()
    with refused("test, train", "cat, dog", "splits or classes"):
        load_dataset(pets)


def test_one_class_only(tmp_path):
    write_tree(tmp_path, tree(classes=("cat",)))
    with refused("two classes", "'cat'"):
        load_dataset(tmp_path)


def test_test_class_without_training_images(tmp_path):
    write_tree(tmp_path, tree("train/") | tree("test/", classes=("cat", "cow")))
    with refused("'cow' of test", "no training images"):
        load_dataset(tmp_path)


def test_folder_that_links_to_itself(pets):
    (pets / "cat" / "again").symlink_to(pets)
    with refused("nested too deep or links", "remove the link"):
        load_dataset(pets)


def test_folder_of_another_kind(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"")
    with refused(str(tmp_path), "train-images-idx3-ubyte", "--data NAME --data-dir FOLDER"):
        load_dataset(tmp_path)
