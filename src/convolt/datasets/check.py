"""What is wrong with a data set, all of it at once, before training meets the first of it.

Loading stops at the first image that cannot be used; this reads on and names every one. An error makes loading fail,
a warning makes results doubtful (an image twice, an image in both training and test), a note is worth knowing.

Two images are the same when their pixels are: they are compared by SHA-256 after decoding, so a copy under another
name or in another lossless format is found.
"""

import gzip
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from convolt.data import Dataset
from convolt.datasets import arrays, folder, resolve
from convolt.datasets.archive import DAMAGED
from convolt.datasets.download import mismatch
from convolt.datasets.idx import GZIP_MAGIC
from convolt.datasets.images import ImageFile, decode, strict_decoding
from convolt.datasets.source import RemoteFile, Source, data_root, locate
from convolt.errors import DataError

IMBALANCE = 3.0  # the largest class over the smallest above which accuracy begins to mislead
MAX_CONTENT = 2**28  # bytes that a published file may unpack to


@dataclass(frozen=True)
class Finding:
    """One thing found: ``where`` names the file or the sample, ``kind`` says in a word what it is."""

    severity: Literal["error", "warning", "note"]
    kind: str
    where: str
    detail: str


@dataclass(frozen=True)
class Report:
    """A data set as it was found. counts: images that can be read, by split and class."""

    name: str
    counts: dict[str, dict[str, int]]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True when nothing was found that makes loading fail."""
        return not any(finding.severity == "error" for finding in self.findings)


@dataclass(frozen=True)
class _Sample:
    where: str
    split: str
    label: str
    shape: tuple[int, ...]
    digest: bytes

    @property
    def pixels(self) -> int:
        return self.shape[1] * self.shape[2]


def check_dataset(
    name: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
) -> Report:
    """Inspect a data set by name or path; arguments as for ``load_dataset``.

    Raises DataError only when there is nothing to inspect.
    """
    found = resolve(name, root)
    if isinstance(found, Path):
        return _check_arrays(found) if found.suffix.lower() == ".npz" else _check_images(found, image_size, channels)
    place = locate(found, root)
    if place is None and found.files:
        raise DataError(f"{found.name}: not found in {data_root(root)}; run: convolt data fetch {found.name}")
    if place is not None and folder.is_split(place) and not any((place / file.name).exists() for file in found.files):
        return _check_images(place, image_size, channels)
    return _check_source(found, place or data_root(root))


def _check_source(source: Source, place: Path) -> Report:
    findings = [finding for file in source.files for finding in _compare(place, file)]
    try:
        data = source.load(place)
    except DataError as error:
        return Report(source.name, {}, (_failure(place, error), *findings))
    return _report(data, findings)


def _check_arrays(path: Path) -> Report:
    try:
        return _report(arrays.load(path, seed=0), [])
    except DataError as error:
        return Report(path.stem, {}, (_failure(path, error),))


def _check_images(path: Path, image_size: tuple[int, int] | None, channels: int | None) -> Report:
    findings: list[Finding] = []
    samples: list[_Sample] = []
    with folder.scan(path) as layout, strict_decoding():
        for file in layout.stray:
            findings.append(Finding("error", "stray", file.where, "is not in a class folder; move it into one"))
        for where in layout.ignored:
            findings.append(Finding("note", "ignored", where, "is hidden or not an image by its extension"))
        for split, classes in layout.splits.items():
            for label, files in classes.items():
                if not files:
                    findings.append(Finding("error", "empty class", f"{path}: {label} ({split})", "has no images"))
                inspect = partial(_inspect, split=split, label=label, image_size=image_size, channels=channels)
                pixels = samples[-1].pixels if samples else 0
                for outcome in folder.run_parallel(inspect, files, pixels):
                    if isinstance(outcome, Finding):
                        findings.append(outcome)
                    else:
                        samples.append(outcome)
    counts = {split: dict.fromkeys(layout.classes, 0) for split in layout.splits}
    for sample in samples:
        counts[sample.split][sample.label] += 1
    if samples or not findings:
        findings += _untrainable(path, samples, counts)
    found = (*findings, *_mixed(samples), *_repeated(samples), *_imbalanced(counts))
    return Report(folder.name_of(path), counts, found)


def _untrainable(path: Path, samples: Sequence[_Sample], counts: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    """What keeps a sound set of images from being trained on: none at all, or a class without training images."""
    if not samples:
        return [Finding("error", "no images", str(path), "has no images in class folders")]
    trained = counts.get("train")
    return [
        Finding("error", "class not trained", f"{path}: {label} ({split})", "has no training images")
        for split, by_class in counts.items()
        for label, count in by_class.items()
        if trained is not None and count and not trained.get(label)
    ]


def _inspect(
    file: ImageFile, split: str, label: str, image_size: tuple[int, int] | None, channels: int | None
) -> _Sample | Finding:
    try:
        pixels = decode(file, image_size, channels)
    except DataError as error:
        return _failure(file.where, error)
    return _Sample(file.where, split, label, pixels.shape, hashlib.sha256(pixels.tobytes()).digest())


def _report(data: Dataset, findings: Iterable[Finding]) -> Report:
    samples, counts = [], {}
    for split_name, split in data.splits():
        labels = [data.classes[label] for label in split.labels.tolist()]
        tally = Counter(labels)
        counts[split_name] = {name: tally[name] for name in data.classes}
        for i, label in enumerate(labels):
            digest = hashlib.sha256(split.images[i].tobytes()).digest()
            samples.append(_Sample(f"{split_name}[{i}]", split_name, label, data.input_shape, digest))
    return Report(data.name, counts, (*findings, *_repeated(samples), *_imbalanced(counts)))


def _failure(where: Path | str, error: DataError) -> Finding:
    return Finding("error", "truncated" if "truncated" in str(error).lower() else "unreadable", str(where), str(error))


def _mixed(samples: list[_Sample]) -> Iterator[Finding]:
    """Images unlike the most common size and mode."""
    sizes = Counter(sample.shape[1:] for sample in samples)
    modes = Counter(sample.shape[0] for sample in samples)
    if len(sizes) > 1:
        height, width = sizes.most_common(1)[0][0]
        for sample in samples:
            if sample.shape[1:] != (height, width):
                is_size = f"is {sample.shape[1]} x {sample.shape[2]} (H x W), most images are {height} x {width}"
                yield Finding("error", "mixed sizes", sample.where, f"{is_size}; resize with image_size=(H, W)")
    if len(modes) > 1:
        kinds = {1: "grayscale", 3: "color"}
        usual = modes.most_common(1)[0][0]
        for sample in samples:
            if sample.shape[0] != usual:
                is_mode = f"is {kinds[sample.shape[0]]}, most images are {kinds[usual]}"
                yield Finding("error", "mixed modes", sample.where, f"{is_mode}; convert with channels=1 or channels=3")


def _repeated(samples: list[_Sample]) -> Iterator[Finding]:
    """Each image whose pixels came before: a leak when that was in another split, else a duplicate."""
    first: dict[tuple[tuple[int, ...], bytes], _Sample] = {}
    for sample in samples:
        earlier = first.setdefault((sample.shape, sample.digest), sample)
        if earlier is sample:
            continue
        detail = f"has the same pixels as {earlier.where}"
        if earlier.label != sample.label:
            detail += f", under another label ({sample.label}, {earlier.label})"
        yield Finding("warning", "duplicate" if earlier.split == sample.split else "leak", sample.where, detail)


def _imbalanced(counts: dict[str, dict[str, int]]) -> Iterator[Finding]:
    for split, by_class in counts.items():
        present = {label: count for label, count in by_class.items() if count}
        if not present:
            continue
        small, large = min(present, key=present.__getitem__), max(present, key=present.__getitem__)
        if present[large] > IMBALANCE * present[small]:
            detail = f"{large} has {present[large]:,} images, {small} has {present[small]:,}; look at per-class results"
            yield Finding("warning", "imbalance", split, detail)
        if len(present) == 1 and split != "test":
            yield Finding("error", "one class", split, f"all images are of class {large}; add images of another")


def _compare(place: Path, file: RemoteFile) -> Iterator[Finding]:
    """A note on a local file that is not the published one, byte for byte or in what it unpacks to."""
    path = place / file.name
    if not path.is_file():
        return
    difference = mismatch(path, file)
    if difference is None:
        return
    if file.content_md5 is not None and _content_md5(path) == file.content_md5:
        yield Finding("note", "recompressed", str(path), "is packed anew; its content is the published one")
    elif file.content_md5 is not None:
        yield Finding("warning", "not as published", str(path), f"{difference}; its content differs as well")
    else:
        yield Finding("note", "not as published", str(path), f"{difference}; its content cannot be compared")


def _content_md5(path: Path) -> str | None:
    with path.open("rb") as stream:
        if stream.read(2) != GZIP_MAGIC:
            return None
    digest, left = hashlib.md5(usedforsecurity=False), MAX_CONTENT
    try:
        with gzip.open(path) as stream:
            while left > 0 and (block := stream.read(2**20)):
                digest.update(block)
                left -= len(block)
    except DAMAGED:
        return None
    return digest.hexdigest()
