"""Two ranks on two machines that are not there: network namespaces, a veth pair, and a bandwidth that tbf shapes.

    sudo .venv/bin/python benchmarks/shaped_network.py [--model cifar-cnn] [--program jit-fp32] [--batch-size 256]
                                                       [--rates 1,10] [--rounds 7] [--seconds 2]

A prediction for another network is worth what it is worth where the network can be had. Here it can: each rank lives in
a namespace of its own, so that MPI must use TCP over the pair, and the kernel lets through so many bits a second. For
every rate the step is measured, and predicted in two ways: with the alpha and beta that sums on that network show, and
with the rate alone (``nominal``: the rate, alpha of the preset). Measured and predicted take turns in rounds. What a
prediction is made from is traced on both ranks at once, without a word between them: two real machines would not take
clock and memory from one another, these two do.

Needs root, ``ip``, ``tc`` and Linux; where they are missing it says so and ends with code 77, as a skipped test does.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from convolt.cli.bench import build_model
from convolt.errors import ConvoltError
from convolt.scaling.jobs import Job
from convolt.scaling.network import Network, fit
from convolt.scaling.prediction import Timeline, predict
from convolt.scaling.worker import run
from convolt.stats import estimate

SKIPPED = 77
ADDRESSES = ("10.77.0.1", "10.77.0.2")
BURST = 256 * 1024  # bytes that may pass at once: a few full segments, 0.2 ms at 10 Gb/s
ALPHA = 25e-6

# What Hydra calls in place of ssh: [options] HOST COMMAND...
ENTER = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
case $1 in {0}) space={2};; {1}) space={3};; *) echo "unknown host $1" >&2; exit 1;; esac
shift
exec ip netns exec "$space" sh -c "$*"
"""


def main() -> int:
    """Measure every rate; the exit code is 1 where a prediction is off by more than is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar-cnn")
    parser.add_argument("--program", default="jit-fp32", help="engine-precision")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rates", default="1,10", help="Gb/s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a slice")
    parser.add_argument("--within", type=float, default=0.15, help="relative error that is allowed")
    given = parser.parse_args()
    if reason := missing():
        print(f"skipped: {reason}")
        return SKIPPED
    good = True
    try:
        for rate in map(float, given.rates.split(",")):
            with two_machines(rate) as launcher:
                good &= compare(given, rate, launcher)
    except (ConvoltError, subprocess.CalledProcessError) as error:
        print(f"shaped_network: {error}", file=sys.stderr)
        return 1
    return 0 if good else 1


def missing() -> str | None:
    """Why this cannot run here."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "mpiexec.hydra"):
        if shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}") is None:
            return f"{tool} is not installed"
    try:
        shell(f"ip netns add cv-try-{os.getpid()}")
        shell(f"ip netns delete cv-try-{os.getpid()}")
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return None


@contextmanager
def two_machines(rate: float) -> Iterator[list[str]]:
    """Two namespaces with ``rate`` Gb/s between them; gives what starts one rank in each."""
    spaces = [f"cv-{os.getpid()}-{letter}" for letter in "ab"]
    ends = [f"cv{os.getpid()}{letter}" for letter in "ab"]
    with tempfile.TemporaryDirectory(prefix="convolt-shaped-") as folder:
        try:
            for space in spaces:
                shell(f"ip netns add {space}")
            shell(f"ip link add {ends[0]} netns {spaces[0]} type veth peer name {ends[1]} netns {spaces[1]}")
            for space, end, address in zip(spaces, ends, ADDRESSES, strict=True):
                shell(f"ip -n {space} addr add {address}/24 dev {end}")
                shell(f"ip -n {space} link set lo up")
                shell(f"ip -n {space} link set {end} up")
                shell(
                    f"ip netns exec {space} tc qdisc add dev {end} root tbf rate {rate}gbit burst {BURST} latency 50ms"
                )
            enter = Path(folder, "enter.sh")
            enter.write_text(ENTER.format(*ADDRESSES, *spaces))
            enter.chmod(0o755)
            hydra = shutil.which("mpiexec.hydra", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
            launcher = [
                *("ip", "netns", "exec", spaces[0], hydra or "mpiexec.hydra", "-launcher", "ssh"),
                *("-launcher-exec", str(enter), "-iface", ends[0], "-hosts", ",".join(ADDRESSES), "-ppn", "1"),
                *("-genv", "UCX_TLS", "tcp,self", "-genv", "FI_PROVIDER", "tcp", "-n", "2"),
            ]
            settle(launcher)
            yield launcher
        finally:
            for space in spaces:
                subprocess.run(["ip", "netns", "delete", space], capture_output=True, timeout=20, check=False)


def settle(launcher: list[str]) -> None:
    """Try until two ranks meet: MPI sees a new interface a second after it is up. Raises CalledProcessError."""
    words = [*launcher, sys.executable, "-c", "from mpi4py import MPI; MPI.COMM_WORLD.Barrier()"]
    for last in [False] * 30 + [True]:
        if not subprocess.run(words, capture_output=True, timeout=60, check=last).returncode:
            return


def compare(given: argparse.Namespace, rate: float, launcher: list[str]) -> bool:
    """Measure and predict on one network, print both; whether the better founded prediction is near enough."""
    model, batch, seconds = build_model(given.model, None, None), given.batch_size, given.seconds
    step = Job("step", model, given.program, 2, 1, batch, seconds)
    trace = Job("trace", model, given.program, 2, 1, -(-batch // 2), seconds, sharers=2)
    sums = Job("network", model, given.program, 2)
    nominal = Network("nominal", ALPHA, 8e-9 / rate)
    rows: list[tuple[Timeline, Timeline, Timeline]] = []
    networks = []
    for number in range(given.rounds):
        measured, samples, traced = run(step, launcher), run(sums, launcher), run(trace, launcher)
        found = fit(samples.samples, 2, "measured", samples.shared, samples.work)
        networks.append(found)
        rows.append(
            (measured.timeline, predict(traced, 2, found, seed=number), predict(traced, 2, nominal, seed=number))
        )
    print(f"{given.model}, {given.program}, batch {batch}, 2 ranks, {rate:g} Gb/s, {given.rounds} rounds")
    alpha, beta = (median(getattr(network, what) for network in networks) for what in ("alpha", "beta"))
    work = median(network.work for network in networks)
    print(f"  sums: alpha {1e6 * alpha:.3g} us, {8e-9 / beta:.3g} Gb/s; a byte takes {1e9 * work:.2g} ns of a core")
    for name, lines in zip(("measured", "predicted", "predicted, nominal"), zip(*rows, strict=True), strict=True):
        parts = (
            1e3 * median(getattr(line, part) for line in lines) for part in ("compute", "communication", "waiting")
        )
        times = estimate([1e3 * line.seconds for line in lines])
        compute, communication, waiting = parts
        print(f"  {name:20}{times} ms: compute {compute:.3g}, communication {communication:.3g}, waiting {waiting:.3g}")
    errors = [
        estimate([line.seconds / measured.seconds - 1 for measured, line in pairs])
        for pairs in ([(a, b) for a, b, _ in rows], [(a, c) for a, _, c in rows])
    ]
    for name, error in zip(("predicted", "predicted, nominal"), errors, strict=True):
        print(f"  error of {name}: {error.median:+.1%} [{error.low:+.1%}, {error.high:+.1%}]")
    return abs(errors[0].median) <= given.within


def shell(line: str) -> None:
    """Run a command line without quotes. Raises subprocess.CalledProcessError."""
    subprocess.run(line.split(), check=True, capture_output=True, text=True, timeout=20)


if __name__ == "__main__":
    sys.exit(main())
