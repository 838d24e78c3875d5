"""Which data set a run was started with, so that it can be loaded again: by ``--resume``, ``evaluate`` and reports."""

from dataclasses import dataclass

from convolt.data import Dataset
from convolt.datasets import load_dataset


@dataclass(frozen=True)
class DataSpec:
    """The arguments of ``load_dataset``."""

    name: str = "digits"
    root: str | None = None
    valid: float | None = 0.1
    seed: int = 0
    subset: int | None = None
    image_size: tuple[int, int] | None = None
    channels: int | None = None

    def load(self) -> Dataset:
        """The data set. Raises DataError, ConfigError."""
        return load_dataset(
            self.name,
            self.root,
            self.valid,
            self.seed,
            self.subset,
            image_size=self.image_size,
            channels=self.channels,
        )
