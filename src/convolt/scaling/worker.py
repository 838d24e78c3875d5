"""Jobs as processes: how one is started, and what each of its ranks does.

    python -m convolt.scaling JOB.json ANSWER.json

The first rank writes the answer. A mistake is written there as well, by the rank that made it, so that it reaches the
one who asked as what it is; anything else shows its traceback.
"""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from convolt import durable, launch
from convolt.comms.mpi import world
from convolt.errors import ConvoltError, EngineError
from convolt.scaling.jobs import Answer, Job, answer_from_plain, perform, to_plain

START_SECONDS = 300  # what a job may take beside its measurement: imports, and kernels that are compiled first


def run(job: Job, launcher: Sequence[str] = ()) -> Answer:
    """Do the job on as many ranks as it needs. launcher: what starts them, if not this machine's ``mpiexec``.

    Raises EngineError, MissingDependency, ConfigError; KeyboardInterrupt when a signal ended it, so that no other job
    follows.
    """
    where = f"{job.kind} on {job.ranks} ranks x {job.threads} threads"
    with tempfile.TemporaryDirectory(prefix="convolt-scale-") as folder:
        question, answer = Path(folder, "job.json"), Path(folder, "answer.json")
        question.write_text(durable.encode_json(job.to_plain()))
        try:
            words = command(job.ranks, question, answer, launcher)
            ended = launch.run_command(words, timeout=START_SECONDS + 20 * job.seconds)
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"{where}: no answer within {error.timeout:.0f} s") from None
        given = json.loads(answer.read_text()) if answer.exists() else {}
    if ended.signal is not None:
        raise KeyboardInterrupt
    if "error" in given:
        raise EngineError(given["error"])
    if ended.code or not given:
        raise EngineError(f"{where}: ended with code {ended.code}")
    return answer_from_plain(job.kind, given)


def command(ranks: int, question: Path, answer: Path, launcher: Sequence[str] = ()) -> list[str]:
    """The command line of a job; one rank needs no launcher and no MPI."""
    program = ["-m", "convolt.scaling", str(question), str(answer)]
    if ranks == 1:
        return [sys.executable, *program]
    return [*(launcher or launch.launcher(ranks)), sys.executable, "-m", "mpi4py", *program]


def main(question: Path, answer: Path) -> int:
    """Read the job, do it, write the answer; returns the exit code."""
    try:
        comm = world()
        found = perform(Job.from_plain(json.loads(question.read_text())), comm)
    except ConvoltError as error:
        durable.write_json(answer, {"error": str(error)})
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if comm.rank == 0:
        durable.write_json(answer, to_plain(found))
    return 0
