"""Images in class folders: a folder, a zip, or a folder of zips.

    cat/1.jpg dog/1.jpg                             split by seed
    train/cat/1.jpg ... test/cat/9.jpg ...          as given; valid/ or val/ likewise
    train.zip test.zip                              as given, class folders inside

A zip of any of these is the same data set. Class names are the sorted folder names. Hidden files and files that are
not images by their extension are passed over; an image outside a class folder and an empty class are errors.

Every image must have the size of the first and be gray or color like the first, unless ``image_size`` or ``channels``
say what to make of them: silent resizing has spoiled more experiments than it has saved. Archives are read member by
member in memory and never extracted.

Large images are decoded on all cores (Pillow releases the GIL); for small ones the Python around each image dominates
and threads only get in each other's way. The 60,000 JPEGs of CIFAR-10 take about 7 seconds, which is not worth a cache
of decoded arrays that could go stale or fill a disk.
"""

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import psutil
from numpy.typing import NDArray

from convolt.data import TEST_FRACTION, Dataset, Split
from convolt.datasets.archive import open_zip, read_member, shown
from convolt.datasets.images import EXTENSIONS, MAX_FILE_BYTES, ImageFile, decode, strict_decoding
from convolt.errors import DataError

#: Folder names that are splits, not classes.
SPLIT_NAMES = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
ALL = "all"  # the split of images that are not split yet

Parts = tuple[str, ...]  # a path below the data set: ("train", "cat", "1.jpg")
T = TypeVar("T")
R = TypeVar("R")

CHUNK = 64  # images that a thread decodes at a time
PARALLEL_PIXELS = 128 * 128  # below, two threads decode no faster than one


@dataclass(frozen=True)
class Layout:
    """The images of a data set by split and class, before any is decoded.

    classes may have no images, stray images no class: ``load`` refuses both, ``convolt data check`` lists them.
    """

    splits: dict[str, dict[str, tuple[ImageFile, ...]]]
    stray: tuple[ImageFile, ...]
    ignored: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """All class names, sorted."""
        return tuple(sorted({name for classes in self.splits.values() for name in classes}))


def load(path: Path, seed: int = 0, image_size: tuple[int, int] | None = None, channels: int | None = None) -> Dataset:
    """The data set in a folder or zip; without test images a part is held out by seed.

    image_size: (H, W) to resize to. channels: 1 for grayscale, 3 for RGB. Raises DataError.
    """
    with scan(path) as layout:
        _refuse_gaps(path, layout)
        loaded = {
            split: _load_split(classes, layout.classes, image_size, channels)
            for split, classes in layout.splits.items()
        }
    train = loaded.get(ALL) or loaded["train"]
    data = Dataset(name_of(path), train, loaded.get("valid"), loaded.get("test"), layout.classes)
    return data if data.test is not None else data.hold_out("test", TEST_FRACTION, seed)


@contextmanager
def scan(path: Path) -> Iterator[Layout]:
    """What there is in a folder or zip; its images can be read within the context. Raises DataError."""
    with ExitStack() as stack:
        if path.is_dir():
            zips = {path / f"{name}.zip": split for name, split in SPLIT_NAMES.items()}
            zips = {file: split for file, split in zips.items() if file.is_file()}
            tree = _folder_tree(path)
            if "train" in zips.values():
                tree = _Tree([], set(), [])
                for file, split in zips.items():
                    tree.add((split,), _zip_tree(stack.enter_context(open_zip(file))).stripped())
        else:
            tree = _zip_tree(stack.enter_context(open_zip(path))).stripped()
        yield _arrange(path, tree)


def name_of(path: Path) -> str:
    """The name of the data set in a folder or zip: the folder's, also of "." and "..", or the zip's without .zip."""
    absolute = Path(os.path.abspath(path))
    return absolute.name if path.is_dir() else absolute.stem


def is_split(path: Path) -> bool:
    """True when a folder holds train.zip or train/."""
    return (path / "train.zip").is_file() or (path / "train").is_dir()


def run_parallel(function: Callable[[T], R], items: Sequence[T], pixels: int) -> Iterator[R]:
    """The results in order, computed on all cores if images of so many pixels gain by it; the first error ends it."""
    if pixels < PARALLEL_PIXELS:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(function, items)  # map cancels what has not begun when an error leaves it


@dataclass
class _Tree:
    """Paths below a data set: image files, folders, and what is passed over."""

    images: list[tuple[Parts, ImageFile]]
    folders: set[Parts]
    ignored: list[str]

    def put(self, parts: Parts, file: ImageFile) -> None:
        if _hidden(parts) or not parts[-1].lower().endswith(EXTENSIONS):
            self.ignored.append(file.where)
        else:
            self.images.append((parts, file))

    def add(self, prefix: Parts, other: "_Tree") -> None:
        self.images += [(prefix + parts, file) for parts, file in other.images]
        self.folders |= {prefix + parts for parts in other.folders}
        self.ignored += other.ignored

    def stripped(self) -> "_Tree":
        """Without folders at the top that hold everything, as archives of a folder have."""
        tops = {parts[0] for parts, _ in self.images} | {parts[0] for parts in self.folders}
        if len(tops) != 1 or not self.images or min(len(parts) for parts, _ in self.images) < 3:
            return self
        images = [(parts[1:], file) for parts, file in self.images]
        return _Tree(images, {parts[1:] for parts in self.folders if len(parts) > 1}, self.ignored).stripped()


def _hidden(parts: Parts) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _folder_tree(path: Path) -> _Tree:
    tree = _Tree([], set(), [])

    def give_up(error: OSError) -> None:
        raise DataError(f"{shown(error.filename)}: cannot be read ({shown(error.strerror)}); check its permissions")

    for folder, subfolders, files in os.walk(path, onerror=give_up, followlinks=True):
        parts = Path(folder).relative_to(path).parts
        if len(parts) > 8:
            raise DataError(f"{shown(folder)}: is nested too deep or links to a folder above it; remove the link")
        subfolders[:] = sorted(name for name in subfolders if not _hidden((name,)))
        tree.folders |= {(*parts, name) for name in subfolders}
        for name in sorted(files):
            file = Path(folder, name)
            tree.put((*parts, name), ImageFile.at(file))
    return tree


def _zip_tree(archive: zipfile.ZipFile) -> _Tree:
    tree = _Tree([], set(), [])
    for member in archive.infolist():
        parts = PurePosixPath(member.filename).parts
        if not member.is_dir():
            read = partial(read_member, archive, member, MAX_FILE_BYTES)
            tree.put(parts, ImageFile(f"{archive.filename}/{member.filename}", read))
        elif not _hidden(parts):
            tree.folders |= {parts[:depth] for depth in range(1, len(parts) + 1)}
    tree.images.sort(key=lambda image: image[0])
    return tree


def _arrange(path: Path, tree: _Tree) -> Layout:
    tops = {parts[0] for parts, _ in tree.images if len(parts) > 1} | {parts[0] for parts in tree.folders}
    named = {name for name in tops if name.lower() in SPLIT_NAMES}
    others = sorted(tops - named)
    is_split = "train" in {SPLIT_NAMES[name.lower()] for name in named}
    if is_split and len(named) > 1 and others:
        raise DataError(
            f"{shown(path)}: has {shown(', '.join(sorted(named)))} and also {shown(', '.join(others))}: splits or "
            "classes? Move the others out of the way"
        )
    is_split = is_split and not others
    gathered: dict[str, dict[str, list[ImageFile]]] = {}
    stray = []
    for parts in sorted(tree.folders):
        if len(parts) == 1 + is_split:
            split = SPLIT_NAMES[parts[0].lower()] if is_split else ALL
            gathered.setdefault(split, {}).setdefault(parts[-1], [])
    for parts, file in tree.images:
        if len(parts) < 2 + is_split:
            stray.append(file)
            continue
        split = SPLIT_NAMES[parts[0].lower()] if is_split else ALL
        gathered.setdefault(split, {}).setdefault(parts[is_split], []).append(file)
    splits = {
        split: {name: tuple(files) for name, files in gathered[split].items()}
        for split in (ALL, "train", "valid", "test")
        if split in gathered
    }
    return Layout(splits, tuple(stray), tuple(tree.ignored))


def _refuse_gaps(path: Path, layout: Layout) -> None:
    if layout.stray:
        raise DataError(f"{shown(layout.stray[0].where)}: is not in a class folder; move it into one")
    if not any(files for classes in layout.splits.values() for files in classes.values()):
        found = ", ".join(Path(name).name for name in layout.ignored[:3])
        raise DataError(
            f"{shown(path)}: has no images in class folders{shown(f' (it has {found})') if found else ''}; for a data "
            "set that has a name, give the name and this folder as its root (--data NAME --data-dir FOLDER)"
        )
    known = layout.splits.get(ALL) or layout.splits["train"]
    for split, classes in layout.splits.items():
        for name, files in classes.items():
            place = shown(f"{path}: class {name!r}" + ("" if split == ALL else f" of {split}"))
            if not files:
                raise DataError(
                    f"{place} is empty: it has no file that ends in {' '.join(EXTENSIONS)}; add images or remove it"
                )
            if name not in known:
                raise DataError(f"{place} has no training images; add some or remove the folder")


def _load_split(
    classes: dict[str, tuple[ImageFile, ...]],
    names: tuple[str, ...],
    image_size: tuple[int, int] | None,
    channels: int | None,
) -> Split:
    files = [file for name in names for file in classes.get(name, ())]
    labels = np.repeat(np.arange(len(names), dtype=np.int64), [len(classes.get(name, ())) for name in names])
    with strict_decoding():
        first = decode(files[0], image_size, channels)
        images = _reserve((len(files), *first.shape), files[0])

        def fill(start: int) -> None:
            for position in range(start, min(start + CHUNK, len(files))):
                pixels = decode(files[position], image_size, channels)
                if pixels.shape != first.shape:
                    raise _mixed(files[position], pixels.shape, files[0], first.shape)
                images[position] = pixels

        for _ in run_parallel(fill, range(0, len(files), CHUNK), first.shape[1] * first.shape[2]):
            pass
    return Split(images, labels)


def _reserve(shape: tuple[int, ...], first: ImageFile) -> NDArray[np.uint8]:
    needed, available = int(np.prod(shape, dtype=object)), psutil.virtual_memory().available
    if needed > available:
        raise DataError(
            f"{shown(first.where)} and {shape[0] - 1:,} more of its size need {needed / 2**30:.1f} GiB as uint8, "
            f"{available / 2**30:.1f} GiB are free; resize them with image_size=(H, W)"
        )
    return np.empty(shape, np.uint8)


def _mixed(file: ImageFile, shape: tuple[int, ...], first: ImageFile, first_shape: tuple[int, ...]) -> DataError:
    if shape[1:] != first_shape[1:]:
        (height, width), (first_height, first_width) = shape[1:], first_shape[1:]
        return DataError(
            f"{shown(file.where)}: is {height} x {width} (H x W), {shown(first.where)} is {first_height} x "
            f"{first_width}; all images must have one size: resize them with image_size=({first_height}, {first_width})"
        )
    kinds = {1: "grayscale", 3: "color"}
    return DataError(
        f"{shown(file.where)}: is {kinds[shape[0]]}, {shown(first.where)} is {kinds[first_shape[0]]}; all images must "
        "be alike: convert them with channels=1 (grayscale) or channels=3 (RGB)"
    )
