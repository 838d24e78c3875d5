"""``convolt`` with faults: ``failing_ranks.py WHAT@RANK:STEP[@FILE][,...] ARGUMENTS`` under mpiexec.

Rank -1 is every rank; a rank has one fault. The moment of the fault, on the clock that all processes of a machine
share, is written to FILE.
"""

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from convolt.cli import main
from convolt.errors import TrainingError
from convolt.launch import placement
from convolt.step import Stepper

where = placement()
correct_steps, correct_gradient = Stepper.steps, Stepper._gradient
taken: list[int] = []


def fail(fault: str) -> None:
    """From now on this rank has the fault."""
    what, place, *told = fault.split("@")
    step = int(place.split(":")[1])

    def failing(self: Stepper, *arguments: Any) -> Any:
        """The fault comes before the step of that number."""
        taken.append(1)
        if len(taken) == step:
            for name in told:
                Path(name).write_text(str(time.monotonic()))
            if what == "error":
                raise TrainingError("on purpose")
            if what == "defect":
                raise ValueError("a defect")
            if what in ("kill", "term"):
                os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGTERM)
        return correct_steps(self, *arguments)

    def not_finite(self: Stepper, *arguments: Any) -> Any:
        """The loss of this rank's samples is not a number, once."""
        results = correct_gradient(self, *arguments)
        return [result._replace(loss=math.nan) for result in results] if len(taken) == step else results

    Stepper.steps = failing
    if what == "nan":
        Stepper._gradient = not_finite


for one in sys.argv[1].split(","):
    rank = int(one.split("@")[1].split(":")[0])
    if where is not None and rank in (-1, where.rank):
        fail(one)
sys.exit(main(sys.argv[2:]))
