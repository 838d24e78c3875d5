"""The embedded data set: 1,797 handwritten digits of 8x8 pixels, for a first run that needs no download.

They are the test set of the UCI digits. Pixels count the ink in a 4x4 block, 0 to 16, and are stretched to 0 to 255.
A fixed fifth is held out for testing, the same whatever the seed of a run, so that accuracies can be compared.
"""

from pathlib import Path

import numpy as np

from convolt.data import TEST_FRACTION, Dataset, Split
from convolt.datasets.idx import read_idx
from convolt.datasets.source import Source

EMBEDDED = Path(__file__).with_name("embedded")
INK_LEVELS = 16


def load(folder: Path = EMBEDDED) -> Dataset:
    """The digits, split in training and test images."""
    ink = read_idx(folder / "digits-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / "digits-labels-idx1-ubyte.gz", 1)
    pixels = np.rint(ink * (255 / INK_LEVELS)).astype(np.uint8)
    whole = Split.of(pixels, labels, str(folder))
    return Dataset("digits", whole, None, None, tuple("0123456789")).hold_out("test", TEST_FRACTION)


DIGITS = Source(
    name="digits",
    description="1,797 digits, 8x8 gray, 10 classes, embedded",
    license="CC BY 4.0",
    citation="E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998",
    load=lambda _folder: load(),
)
