"""What the books of killed_ranks.py say: which samples a step was made of, what it gave, when ranks died."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from killed_ranks import EPOCHS, SAMPLES, STEPS
from small_runs import STEPS_PER_EPOCH

from convolt.run import Run


class Ledger:
    """The books of all ranks of all attempts."""

    def __init__(self, folder: Path) -> None:
        takes: dict[int, dict[tuple[int, int], dict[int, list[int]]]] = defaultdict(lambda: defaultdict(dict))
        losses: dict[int, dict[int, float]] = defaultdict(dict)
        self.deaths: dict[int, list[float]] = defaultdict(list)
        steps_at: list[float] = []
        for path in sorted((folder / "books").iterdir()):
            attempt = int(path.stem.split("-")[0])
            for line in path.read_text().splitlines():
                record: dict[str, Any] = json.loads(line)
                if "takes" in record:
                    # Ranks become fewer only: of an attempt the last group that took a step is the smallest.
                    group = (attempt, -record["size"])
                    takes[record["takes"]][group][record["rank"]] = record["samples"]
                elif "done" in record:
                    losses[record["done"]][attempt] = record["loss"]
                    steps_at.append(record["at"])
                else:
                    self.deaths[attempt].append(record["died"])
        self._takes = takes
        later = [(death, [at for at in steps_at if at > death]) for deaths in self.deaths.values() for death in deaths]
        self.pauses = [min(moments) - death for death, moments in later if moments]  # until a step was done again
        self.losses = [losses[step][max(losses[step])] for step in sorted(losses)]

    def samples(self, step: int) -> list[int]:
        """Those of all ranks of the group that did this step last, by rank; all of its ranks must have told."""
        group = max(self._takes[step])
        by_rank = self._takes[step][group]
        assert sorted(by_rank) == list(range(-group[1])), f"step {step}: ranks {sorted(by_rank)} of {-group[1]}"
        return [sample for rank in sorted(by_rank) for sample in by_rank[rank]]


def assert_same_samples(folder: Path, twin: Path) -> None:
    """Every sample once an epoch, in the step where it belongs; and the history has every epoch once."""
    ours, theirs = ([Ledger(each).samples(step) for step in range(STEPS)] for each in (folder, twin))
    assert ours == theirs
    for epoch in range(EPOCHS):
        steps = ours[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]
        assert sorted(sample for samples in steps for sample in samples) == list(range(SAMPLES))
    run = Run.load(folder / "run")
    assert run.finished
    assert [epoch.epoch for epoch in run.history] == list(range(1, EPOCHS + 1))
