"""Where data sets come from: pick one of these.

    digits          embedded            mnist           MNIST, Fashion-MNIST, KMNIST
    cifar           CIFAR-10, -100      folder          any images in class folders, also zipped
    arrays          any .npz

A new data set is one new module that ends in a ``Source`` (see ``source``), plus its name in SOURCES below. ``load`` of
the source turns files into a ``Dataset`` with the official splits; all else is done here, once for all of them.

The other modules serve these: ``download`` fetches, ``check`` inspects, ``archive``, ``idx`` and ``images`` read files
that nobody vouches for.
"""

import os
from dataclasses import replace
from pathlib import Path

from convolt.data import Dataset
from convolt.datasets import arrays, cifar, digits, folder, mnist
from convolt.datasets.archive import shown
from convolt.datasets.source import Source, data_root, locate
from convolt.errors import ConfigError, DataError, nearest

__all__ = ["SOURCES", "fetch", "find_source", "load_dataset", "resolve"]

SOURCES: tuple[Source, ...] = (
    digits.DIGITS,
    mnist.MNIST,
    mnist.FASHION_MNIST,
    mnist.KMNIST,
    cifar.CIFAR10,
    cifar.CIFAR100,
)


def load_dataset(
    name: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    valid: float | None = 0.1,
    seed: int = 0,
    subset: int | None = None,
    download: bool = False,
    *,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
) -> Dataset:
    """A data set in memory, by its name or by the path of a folder, a zip or a .npz.

    root: the folder of the files, or one above it; see ``source`` for the default. valid: the stratified part of the
    training images held out for validation, unless the data set has validation images. seed: of every split.
    subset: train on that many images. download: fetch missing files; never happens otherwise.
    image_size, channels: for images in class folders only: resize to (H, W); 1 for grayscale, 3 for RGB.
    Raises DataError, ConfigError.
    """
    found = resolve(name, root)
    if isinstance(found, Source):
        if image_size is not None or channels is not None:
            raise ConfigError(f"image_size and channels are for images in class folders; {name} has one format")
        data = found.load(fetch(found.name, root) if download else _located(found, root))
    elif found.suffix.lower() == ".npz":
        if image_size is not None or channels is not None:
            raise ConfigError(f"image_size and channels are for images in class folders; {name} holds arrays")
        data = arrays.load(found, seed)
    else:
        data = folder.load(found, seed, _checked_size(image_size), _checked_channels(channels))
    data = data if data.valid is not None else data.hold_out("valid", valid, seed)
    data = data if subset is None else data.subset(subset, seed)
    own = os.fspath(name) if isinstance(found, Source) else os.path.abspath(found)
    origin = {"name": own, "root": None if root is None else os.path.abspath(root), "valid": valid, "seed": seed}
    return replace(data, origin={**origin, "subset": subset, "image_size": image_size, "channels": channels})


def resolve(name: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Source | Path:
    """What a name stands for: a registered data set, or the path of a folder, a zip or a .npz. Raises DataError."""
    text = os.fspath(name)
    registered = {source.name: source for source in SOURCES}
    if text in registered:
        return registered[text]
    candidates = [Path(text).expanduser()] + ([] if root is None else [data_root(root) / text])
    for path in candidates:
        if path.is_dir() or (path.is_file() and path.suffix.lower() in (".zip", ".npz")):
            return path
        if path.exists():
            raise DataError(f"{shown(path)}: a data set is a folder, a .zip or a .npz; give one of these")
    if len(Path(text).parts) == 1 and not Path(text).suffix:
        raise DataError(f"data set '{shown(text)}' is neither known nor a path; {nearest(text, registered)}")
    raise DataError(f"{shown(candidates[-1])}: no such file or folder; check the path")


def find_source(name: str) -> Source:
    """The registered data set of this name. Raises DataError."""
    for source in SOURCES:
        if source.name == name:
            return source
    raise DataError(f"data set '{shown(name)}' is not known; {nearest(name, [source.name for source in SOURCES])}")


def fetch(name: str, root: str | os.PathLike[str] | None = None, progress: bool = True) -> Path:
    """Download what is missing of a registered data set and return its folder. Raises DataError.

    Files that are there already, in any layout, are left alone. progress: a bar on standard error, on terminals only.
    """
    from convolt.datasets.download import download

    source = find_source(name)
    present = locate(source, root)
    if present is not None and not _lacking(source, present):
        return present
    target = data_root(root) / source.name
    download(source.files, target, progress)
    return target


def _lacking(source: Source, folder: Path) -> bool:
    try:
        source.load(folder)
    except DataError:
        return True
    return False


def _located(source: Source, root: str | os.PathLike[str] | None) -> Path:
    if root is not None and not data_root(root).is_dir():
        raise DataError(f"{shown(data_root(root))}: no such folder; check the path given as root (--data-dir)")
    found = locate(source, root)
    if found is None and source.files:
        command = f"convolt data fetch {source.name}" + ("" if root is None else f" --data-dir {shown(root)}")
        raise DataError(
            f"{source.name}: {source.files[0].name} not found in {shown(data_root(root))}; run: {command}  "
            "(or pass download=True)"
        )
    return found or data_root(root)


def _checked_size(image_size: tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is not None and not (
        len(image_size) == 2 and all(isinstance(side, int) and 0 < side <= 4096 for side in image_size)
    ):
        raise ConfigError(f"image_size={image_size} must be (H, W), two integers from 1 to 4096")
    return image_size


def _checked_channels(channels: int | None) -> int | None:
    if channels not in (None, 1, 3):
        raise ConfigError(f"channels={channels} must be 1 (grayscale) or 3 (RGB)")
    return channels
