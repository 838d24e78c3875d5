"""Which data set a run was started with, so that it can be loaded again: by ``--resume``, ``evaluate`` and reports."""

from dataclasses import dataclass

from convolt.data import Dataset
from convolt.datasets import load_dataset
from convolt.errors import ConfigError


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

    def __post_init__(self) -> None:
        for field in ("name", "root"):
            value = getattr(self, field)
            if not (isinstance(value, str) and value) and not (field == "root" and value is None):
                raise ConfigError(f"data.{field} must be a name or a path; got {value!r}")

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
