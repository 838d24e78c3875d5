"""How the ranks of a run work together: what of it may be chosen.

The gradient of a step is the sum over ranks, whatever is chosen here but ``local_steps``. `overlap` and
`shard_optimizer` change when numbers travel and who moves which weights, and no result; nor does `elastic`. The others
change the mathematics, and stand in the run's configuration.
"""

from dataclasses import dataclass
from typing import Literal

from convolt.checks import check_choice, check_flag, check_integer
from convolt.errors import ConfigError


@dataclass(frozen=True)
class Parallel:
    """What ranks do together.

    sync_batch_norm: BatchNorm takes mean and variance over the whole batch; without it over each rank's part, and the
    running ones are averaged over ranks. overlap: gradients leave while backward goes on. shard_optimizer: each rank
    moves its part of the weights and sends it to all; None: wherever that sends no more bytes. wire: "bf16" sends
    gradients in two bytes a number.
    local_steps: so many steps on its own part of the batches before the ranks average their weights (local SGD: Stich,
    ICLR 2019); 1 adds gradients in every step. elastic: when ranks die, the others go on from the step they are in;
    that needs the whole state on every rank.
    Raises ConfigError.
    """

    sync_batch_norm: bool = False
    overlap: bool = True
    shard_optimizer: bool | None = None
    wire: Literal["fp32", "bf16"] = "fp32"
    local_steps: int = 1
    elastic: bool = False

    def __post_init__(self) -> None:
        for name in ("sync_batch_norm", "overlap", "elastic"):
            check_flag(self, name)
        if self.shard_optimizer is not None:
            check_flag(self, "shard_optimizer")
        check_choice(self, "wire", ("fp32", "bf16"))
        check_integer(self, "local_steps", at_least=1)
        if self.local_steps > 1 and (self.shard_optimizer or self.wire != "fp32"):
            raise ConfigError(
                f"Parallel: local_steps={self.local_steps} sends no gradients: leave out shard_optimizer and wire"
            )
        if self.elastic and (self.shard_optimizer or self.local_steps > 1):
            given = "shard_optimizer" if self.shard_optimizer else f"local_steps={self.local_steps}"
            raise ConfigError(
                f"Parallel: elastic needs the whole state on every rank, and with {given} a part of it dies with each:"
                " leave out one of the two"
            )

    @property
    def shards(self) -> bool:
        """Whether each rank moves its part of the weights alone: as chosen, or where that sends no more bytes.

        Sums in bf16 are half as long as weights, and local steps move all weights everywhere; elastic ranks have to.
        """
        if self.shard_optimizer is not None:
            return self.shard_optimizer
        return self.wire == "fp32" and self.local_steps == 1 and not self.elastic


#: The fields that a resumed run may change: they do not change what is computed.
FREE = ("parallel.overlap", "parallel.shard_optimizer", "parallel.elastic")
