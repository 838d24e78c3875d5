import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from convolt.engines.jit.compiler import Compiler
from convolt.engines.jit.driver import address_of, exchange, kept_off, load
from convolt.engines.jit.isa import detect
from convolt.engines.jit.memory import bits_of_float32, float32_of_bits
from convolt.engines.jit.runtime import Phase, Program, Team, Waiting
from convolt.errors import EngineError

ALWAYS = -(10**15)
RESTLESS = {
    "default": Waiting(),
    "sleep at once": Waiting(yield_after=0, sleep_after=0),
    "sit out at once": Waiting(sleep_after=0, preempted=ALWAYS, rest=0),
    "sit out for long": Waiting(preempted=ALWAYS),
}


def count(spec):
    """arguments: the address of nothing, then one counter for each chunk, then one for each thread."""
    chunks = spec

    def kernel(arguments, chunk, thread):
        arguments[chunk] += 1
        arguments[chunks + thread * 16] += 1  # a line of its own

    return kernel


def stir(spec):
    """arguments: which half is read, then two halves of `chunks` numbers; each number depends on both neighbours'."""
    chunks = spec

    def kernel(arguments, chunk, thread):
        read, write = arguments[0] * chunks + 2, (1 - arguments[0]) * chunks + 2
        left, right = arguments[read + (chunk - 1) % chunks], arguments[read + (chunk + 1) % chunks]
        arguments[write + chunk] = 3 * left + 5 * right + chunk

    return kernel


def halve(spec):
    """arguments: for each chunk the bits of a float32 number."""

    def kernel(arguments, chunk, thread):
        arguments[chunk] = bits_of_float32(float32_of_bits(np.uint32(arguments[chunk])) * np.float32(0.5))

    return kernel


def swap(spec):
    """One chunk: the halves change roles."""

    def kernel(arguments, chunk, thread):
        arguments[0] = 1 - arguments[0]

    return kernel


def until_released(spec):
    """Wait for the caller's other thread."""

    def kernel(arguments, chunk, thread):
        while load(address_of(arguments)) == 0:
            pass

    return kernel


@intrinsic
def nanosleep(typingctx, time):
    """Off the core for the time at this address, a timespec."""

    def generate(context, builder, signature, args):
        word = ir.IntType(64).as_pointer()
        kind = ir.FunctionType(ir.IntType(32), [word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "nanosleep")
        builder.call(function, [builder.inttoptr(args[0], word), ir.Constant(word, None)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def order(spec):
    """arguments: one number for each chunk; `spec` is appended as a decimal digit."""

    def kernel(arguments, chunk, thread):
        arguments[chunk] = arguments[chunk] * 10 + spec

    return kernel


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    return Compiler(detect(), tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=[1, 2, 4])
def team(request, compiler):
    team = Team(request.param, compiler)
    yield team
    team.close()


def pair(compiler, factory, spec, words):
    return compiler.kernel(factory, spec).address, int(words.ctypes.data)


@pytest.mark.parametrize("chunks", [1, 2, 3, 64, 1000])
def test_every_chunk_runs_exactly_once(team, compiler, chunks):
    words = np.zeros(chunks + 16 * team.threads, np.int64)
    program = Program([Phase("count", (pair(compiler, count, chunks, words),), chunks)], keep=words)
    for repeat in range(1, 51):
        team.run(program)
        assert np.all(words[:chunks] == repeat)
    assert words[chunks:].sum() == 50 * chunks


def stirred(words, chunks, times):
    now = words[2 : 2 + chunks].copy()
    for _ in range(times):
        now = 3 * np.roll(now, 1) + 5 * np.roll(now, -1) + np.arange(chunks)
    return now


@pytest.mark.parametrize("waiting", RESTLESS.values(), ids=RESTLESS)
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("chunks", [2, 7, 40])
def test_a_phase_sees_all_that_the_phases_before_it_wrote(compiler, threads, chunks, waiting):
    times = 1000
    words = np.zeros(2 + 2 * chunks, np.int64)
    words[2:] = np.arange(2 * chunks)
    expected = stirred(words, chunks, 3 * times)
    phases = [
        Phase("stir", (pair(compiler, stir, chunks, words),), chunks),
        Phase("swap", (pair(compiler, swap, None, words),), 1),
    ]
    program = Program(phases * times, keep=words)
    team = Team(threads, compiler, waiting)
    for _ in range(3):
        team.run(program)
    team.close()
    np.testing.assert_array_equal(words[2 + words[0] * chunks :][:chunks], expected)


def test_the_kernels_of_a_chunk_run_in_their_order(team, compiler):
    words = np.zeros(30, np.int64)
    kernels = tuple(pair(compiler, order, digit, words) for digit in (1, 2, 3))
    team.run(Program([Phase("a", kernels, 30), Phase("none", (), 5), Phase("b", kernels[::-1], 30)]))
    assert np.all(words == 123321)


def test_denormal_numbers_are_zeros_in_kernels_and_stay_what_they_are_in_python(team, compiler):
    words = np.full(100, np.float32(1e-38).view(np.uint32), np.int64)
    team.run(Program([Phase("halve", (pair(compiler, halve, None, words),), len(words))]))
    assert not words.any()
    assert np.float32(1e-38) * np.float32(0.5) > 0


def test_other_programs_follow_at_once(team, compiler):
    """A thread that is late must not run a chunk of the new program with the old one's kernels."""
    ones, twos = np.zeros(9, np.int64), np.zeros(3, np.int64)
    for _ in range(300):
        team.run(Program([Phase("one", (pair(compiler, order, 1, ones),), 9)] * 3))
        team.run(Program([Phase("two", (pair(compiler, order, 2, twos),), 3)]))
        assert np.all(ones == 111)
        assert np.all(twos == 2)
        ones[:] = twos[:] = 0


@pytest.mark.parametrize("waiting", RESTLESS.values(), ids=RESTLESS)
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("chunks", [1, 7])
def test_the_caller_may_do_something_else_first(compiler, threads, chunks, waiting):
    words, done = np.zeros(chunks, np.int64), []
    kernels = [pair(compiler, order, digit, words) for digit in (1, 2, 3)]
    program = Program([Phase("order", (kernel,), chunks) for kernel in kernels], keep=words)
    team = Team(threads, compiler, waiting)
    for repeat in range(200):
        words[:] = 0
        team.run(program, lambda: done.append(repeat))  # noqa: B023 - called before this goes on
        assert words.tolist() == [123] * chunks
    team.close()
    assert done == list(range(200))


@pytest.mark.parametrize("waiting", [Waiting(), RESTLESS["sleep at once"]], ids=["awake", "asleep"])
def test_a_program_ends_without_its_caller(compiler, waiting):
    """One chunk a phase: whoever begins it takes no part, so a sleeping thread must be woken."""
    words = np.zeros(1, np.int64)
    program = Program([Phase("order", (pair(compiler, order, 1, words),), 1)] * 3, keep=words)
    team = Team(2, compiler, waiting)

    def until_done():
        deadline = time.monotonic() + 60
        while words[0] != 111 and time.monotonic() < deadline:
            pass
        assert words[0] == 111

    for _ in range(50):
        words[0] = 0
        team.run(program, until_done)
    team.close()


def test_what_the_caller_raises_is_raised_when_the_program_is_done(team, compiler):
    words = np.zeros(40, np.int64)
    program = Program([Phase("order", (pair(compiler, order, 1, words),), 40)] * 3, keep=words)

    def fails():
        raise ValueError("of the caller's own")

    with pytest.raises(ValueError, match="of the caller's own"):
        team.run(program, fails)
    assert np.all(words == 111)
    team.run(program)
    assert np.all(words == 111111)


def test_python_goes_on_while_a_program_runs(compiler):
    words = np.zeros(1, np.int64)
    program = Program([Phase("wait", (pair(compiler, until_released, None, words),), 1)])
    team = Team(1, compiler)
    runner = threading.Thread(target=team.run, args=(program,))
    runner.start()
    words[0] = 1
    runner.join(timeout=60)
    assert not runner.is_alive()


def test_a_sleeping_thread_is_woken_when_its_help_is_needed(compiler):
    """Two chunks that wait for each other end only if two threads run them (and none has to sit out)."""

    def meet(spec):
        def kernel(arguments, chunk, thread):
            arguments[1 + 16 * chunk] = 1
            while load(address_of(arguments) + 8 * (1 + 16 * (1 - chunk))) == 0:
                pass
            arguments[40 + chunk] = thread

        return kernel

    words = np.zeros(64, np.int64)
    team = Team(2, compiler, Waiting(yield_after=0, sleep_after=0, preempted=10**18))
    program = Program([Phase("meet", (pair(compiler, meet, None, words),), 2)])
    for _ in range(200):
        words[:] = 0
        team.run(program)
        assert set(words[40:42].tolist()) == {0, 1}
    team.close()


def test_a_thread_that_sat_out_comes_back_within_a_program(compiler):
    """One chunk is kept off its core; two later chunks of the same program meet, which takes two threads.

    A host that is busy may keep a thread off for as long as the other one waits, so one of twenty programs is enough:
    without a way back none would do.
    """

    def blocked(spec):
        def kernel(arguments, chunk, thread):
            nanosleep(address_of(arguments))

        return kernel

    def meet(spec):
        def kernel(arguments, chunk, thread):
            words = address_of(arguments)
            exchange(words + 8 * (16 + 16 * chunk), 1)
            for _ in range(50_000_000):
                if load(words + 8 * (16 + 16 * (1 - chunk))) != 0:
                    exchange(words + 8 * (48 + chunk), 1)
                    return

        return kernel

    words = np.zeros(64, np.int64)
    words[1] = 20_000_000  # a timespec: seconds, nanoseconds
    phases = (("blocked", blocked, 1), ("count", count, 4), ("meet", meet, 2))
    counted = np.zeros(64, np.int64)
    places = {"count": (4, counted)}
    kernels = [(name, pair(compiler, make, *places.get(name, (None, words))), n) for name, make, n in phases]
    program = Program([Phase(name, (kernel,), n) for name, kernel, n in kernels], keep=words)
    team = Team(2, compiler, Waiting(rest=0))
    met = []
    for _ in range(20):
        words[16:] = 0
        team.run(program)
        met.append(words[48:50].tolist() == [1, 1])
    team.close()
    assert any(met)


@pytest.mark.parametrize(
    ("elapsed", "used", "expected"),
    [
        (2_000_000, 2_000_000, False),
        (900_000, 0, False),
        (8_000_000, 4_000_000, True),
        (50_000_000, 40_000_000, False),
        (50_000_000, 30_000_000, True),
    ],
)
def test_a_long_chunk_may_lose_some_of_its_time(compiler, elapsed, used, expected):
    """A team became smaller for a whole step of a large network when one of 50 ms was lost."""

    def judge(spec):
        def kernel(arguments, chunk, thread):
            arguments[2] = 1 if kept_off(arguments[0], arguments[1], 1_000_000) else 0

        return kernel

    words = np.array([elapsed, used, -1], np.int64)
    team = Team(1, compiler)
    team.run(Program([Phase("judge", (pair(compiler, judge, None, words),), 1)], keep=words))
    team.close()
    assert words[2] == expected


def test_programs_from_several_python_threads_take_turns(compiler):
    chunks = 50
    words = np.zeros(chunks + 32, np.int64)
    program = Program([Phase("count", (pair(compiler, count, chunks, words),), chunks)] * 20, keep=words)
    team = Team(2, compiler)
    runners = [threading.Thread(target=lambda: [team.run(program) for _ in range(20)]) for _ in range(3)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(timeout=60)
    team.close()
    assert np.all(words[:chunks] == 3 * 20 * 20)


def test_a_profile_has_a_row_for_each_phase_and_a_figure_for_each_kernel(team, compiler):
    words = np.zeros(64, np.int64)
    one, two = (pair(compiler, order, digit, words) for digit in (1, 2))
    program = Program([Phase("a", (one, two), 8), Phase("b", (), 3), Phase("c", (two,), 4)])
    profile = team.profile(program)
    assert [(row.name, len(row.kernels)) for row in profile] == [("a", 2), ("b", 0), ("c", 1)]
    assert all(row.wall > 0 and sum(row.kernels) <= team.threads * row.wall for row in profile)
    assert all(seconds > 0 for row in profile for seconds in row.kernels)
    assert words[:8].tolist() == [122] * 4 + [12] * 4
    team.run(program)  # and measures no more
    assert words[0] == 122122


def test_a_closed_team_refuses(team, compiler):
    team.close()
    team.close()
    with pytest.raises(EngineError, match="closed"):
        team.run(Program([Phase("nothing", (), 1)]))


def test_threads_end_with_the_team(compiler):
    before = threading.active_count()
    team = Team(3, compiler)
    assert threading.active_count() == before + 2
    del team
    assert threading.active_count() == before


def test_a_process_ends_without_close(tmp_path):
    text = (
        "import sys; from pathlib import Path\n"
        "from convolt.engines.jit.compiler import Compiler\n"
        "from convolt.engines.jit.isa import detect\n"
        "from convolt.engines.jit.runtime import Phase, Program, Team\n"
        "team = Team(3, Compiler(detect('plain'), Path(sys.argv[1])))\n"
        "team.run(Program([Phase('nothing', (), 100)]))\n"
    )
    subprocess.run([sys.executable, "-c", text, str(tmp_path)], timeout=60, check=True)


@pytest.mark.parametrize("chunks", [0, -1, 1 << 31])
def test_a_phase_needs_chunks(chunks):
    with pytest.raises(EngineError, match="phase conv: chunks must be from 1"):
        Phase("conv", (), chunks)


def test_a_program_needs_a_phase():
    with pytest.raises(EngineError, match="at least one phase"):
        Program([])


def test_a_team_needs_a_thread(compiler):
    with pytest.raises(EngineError, match="threads must be at least 1, got 0"):
        Team(0, compiler)
