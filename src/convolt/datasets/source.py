"""A named data set: what it is, where it comes from, how its files are read.

Each module of this package that stands for data sets ends in one ``Source`` per data set. ``Source.load`` gets a folder
and returns the official training and test splits; holding out validation images, subsets and downloads are the same
for all and happen once, in ``convolt.datasets.load_dataset``.

Files are looked for below ``root`` when it is given, else below $CONVOLT_DATA_DIR, else below $XDG_CACHE_HOME/convolt
(~/.cache/convolt). The environment is read at the call, not at import.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from convolt.data import Dataset


@dataclass(frozen=True)
class RemoteFile:
    """A published file. ``md5`` and ``size`` are those of the file, ``content_md5`` is that of what it unpacks to."""

    name: str
    urls: tuple[str, ...]  # mirrors, the most reliable first
    md5: str
    size: int | None = None
    sha256: str | None = None
    content_md5: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set that has a name."""

    name: str
    description: str
    license: str
    citation: str
    load: Callable[[Path], Dataset]
    files: tuple[RemoteFile, ...] = ()  # empty: embedded in the package
    markers: tuple[str, ...] = ()  # a folder with one of these in it holds the data set
    layouts: tuple[str, ...] = ()  # folders below the root where other libraries put it


def data_root(root: str | os.PathLike[str] | None) -> Path:
    """The folder that data sets are looked for and fetched to."""
    if root is not None:
        return Path(root).expanduser()
    if chosen := os.environ.get("CONVOLT_DATA_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "convolt"


def locate(source: Source, root: str | os.PathLike[str] | None) -> Path | None:
    """The folder that holds the data set, or None. A root given by the caller may be that folder itself."""
    for folder in _candidates(source, root):
        if any((folder / marker).exists() for marker in source.markers):
            return folder
    return None


def _candidates(source: Source, root: str | os.PathLike[str] | None) -> Iterator[Path]:
    base = data_root(root)
    yield base / source.name
    for layout in source.layouts:
        yield base / layout
    if root is not None:  # mnist, fashion-mnist and kmnist share their file names: such a folder is trusted as named
        yield base
