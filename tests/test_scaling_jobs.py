"""Jobs: what is asked and answered, in this process and on two real ranks."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from convolt import durable, zoo
from convolt.comms import Serial
from convolt.errors import ConfigError, EngineError
from convolt.layers import BatchNorm2d, Conv2d, Dense, Flatten, ReLU
from convolt.model import Model
from convolt.scaling import worker
from convolt.scaling.jobs import WARM_UP, Job, Samples, Slice, answer_from_plain, perform, to_plain
from convolt.scaling.prediction import Trace

MODEL = Model((1, 4, 4), (Conv2d(1, 2, 3), ReLU(), Flatten(), Dense(8, 3)))
NORMALIZED = Model((1, 4, 4), (Conv2d(1, 2, 3), BatchNorm2d(2), ReLU(), Flatten(), Dense(8, 3)))
STEP = Job("step", MODEL, "im2col-fp32", batch_size=6, seconds=0.0)


def sent(job):
    return Job.from_plain(json.loads(durable.encode_json(job.to_plain())))


def received(job, answer):
    return answer_from_plain(job.kind, json.loads(durable.encode_json(to_plain(answer))))


@pytest.mark.parametrize("model", [MODEL, zoo.build("resnet9", (3, 32, 32), 10)], ids=["tiny", "resnet9"])
def test_a_job_arrives_as_it_was_sent(model):
    job = Job("trace", model, "jit-bf16", 1, 3, 17, 0.25, 5)
    assert sent(job) == job


def test_steps_are_timed_and_their_losses_told():
    answer = perform(STEP, Serial())
    assert isinstance(answer, Slice)
    assert received(STEP, answer) == answer
    assert (answer.steps, len(answer.losses)) == (1, WARM_UP)
    assert answer.timeline.compute > 0
    assert answer.timeline.waiting == 0
    assert perform(STEP, Serial()).losses == answer.losses
    assert perform(replace(STEP, seed=1), Serial()).losses != answer.losses


def test_more_seconds_are_more_steps():
    assert perform(replace(STEP, seconds=0.05), Serial()).steps > 3


def test_a_trace_has_every_parameter():
    job = replace(STEP, kind="trace")
    answer = perform(job, Serial())
    assert isinstance(answer, Trace)
    assert received(job, answer) == answer
    assert answer.size == 4 * MODEL.parameter_count
    assert (answer.batch, answer.threads) == (6, 1)


def test_a_job_needs_its_ranks():
    with pytest.raises(ConfigError, match="a job for 2 ranks was started on 1"):
        perform(replace(STEP, ranks=2), Serial())


# -------------------------------------------------------------------------------------------------- real processes


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(worker, "START_SECONDS", 60)


@pytest.mark.parametrize("model", [MODEL, NORMALIZED], ids=["plain", "batch-norm"])
def test_two_ranks_compute_what_one_does(impatient, model):
    pytest.importorskip("mpi4py")
    one, two = (worker.run(replace(STEP, ranks=ranks, model=model)) for ranks in (1, 2))
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert min(two.timeline.compute, two.timeline.communication) > 0


def test_ranks_are_traced_side_by_side(impatient):
    pytest.importorskip("mpi4py")
    job = replace(STEP, kind="trace", ranks=2, sharers=2, early=False)
    answer = worker.run(job)
    assert isinstance(answer, Trace)
    assert len(answer.steps) == 2  # one of each
    assert answer.slices == ((0, MODEL.parameter_count),)
    assert all(0 < step.ready[0] <= step.computed < step.seconds for step in answer.steps)


def test_two_ranks_measure_their_network(impatient):
    pytest.importorskip("mpi4py")
    answer = worker.run(Job("network", MODEL, "im2col-fp32", 2))
    assert isinstance(answer, Samples)
    assert (answer.ranks, answer.shared) == (2, True)
    assert all(sample.seconds > 0 for sample in answer.samples)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mistake_reaches_the_one_who_asked(ranks, impatient, capfd):
    if ranks > 1:
        pytest.importorskip("mpi4py")
    with pytest.raises(EngineError, match="unknown name 'nosuch'"):
        worker.run(replace(STEP, ranks=ranks, program="nosuch-fp32"))
    assert "Traceback" not in capfd.readouterr().err


def test_a_program_that_dies_is_told_apart(impatient):
    with pytest.raises(EngineError, match="step on 2 ranks x 1 threads: ended with code 3"):
        worker.run(replace(STEP, ranks=2), launcher=["sh", "-c", "exit 3"])


@pytest.mark.parametrize(
    ("while_starting", "job"),
    [("", "kill -INT $PPID; exec sleep 60"), ("os.kill(os.getpid(), signal.SIGINT)", "exec sleep 60")],
    ids=["from the job", "between fork and exec"],
)
def test_a_signal_ends_it_and_what_would_follow(while_starting, job):
    """Whoever asked for the job is interrupted, by the job itself or before it has begun."""
    script = (
        f"import os, signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_scaling_jobs as t\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it\n"
        f"os.register_at_fork(after_in_parent=lambda: {while_starting or None})\n"
        "try:\n"
        f"    t.worker.run(t.replace(t.STEP, ranks=2), launcher=['sh', '-c', {job!r}])\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(42)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == 42


def test_a_signal_is_not_lost_when_nothing_starts():
    script = (
        "import os, signal; from convolt import launch\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "launch.run_command(['/no/such/launcher'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_a_program_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(worker, "START_SECONDS", 0.2)
    with pytest.raises(EngineError, match="no answer within 0 s"):
        worker.run(replace(STEP, ranks=2), launcher=["sh", "-c", "exec sleep 60"])
