"""The driver: the one compiled function in which every thread of a team lives.

There is no barrier that threads arrive at. One 64-bit *ticket* says all: ``phase << 32 | chunks not yet claimed``. A
thread claims a chunk by lowering the ticket with a compare-and-swap, runs the phase's kernels on it and counts it as
done; whoever finishes the last chunk of a phase publishes the ticket of the next. So a phase waits for its chunks,
never for a thread: one that another process keeps off its core, or that still sleeps, holds up nobody unless it holds
a chunk. The program is read only while a claimed chunk keeps it alive.

Order of memory: counting a chunk releases its writes, the last count acquires them all, the ticket releases them and
claiming acquires them: a phase sees every write of the phases before.

A thread with nothing to claim spins for some microseconds, then lends its core to others (``sched_yield``), and after
a millisecond sleeps on a semaphore, having said so in its `ASLEEP` word; whoever publishes a ticket wakes as many
sleepers as there are chunks to spare. Setting the word and looking at the ticket again, against publishing the ticket
and then looking at the words, is Dekker's handshake and needs sequential consistency: no wake-up is lost.

A thread that is put off its core in the middle of a chunk does hold up the others, for a time slice of some
milliseconds, and on a core that another process wants this happens every few milliseconds: two threads then do less
than one. So a thread that notices (a good part of the chunk's time was not its own CPU time) makes the team smaller by
one thread for a while, and the cores that are really free work on without a stop. When the rest is over, the end of the
next chunk brings the thread back: a phase of a large network lasts longer than a rest.
"""

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from convolt.engines.jit.denormals import flush_denormals, restore_mode
from convolt.engines.jit.inlined import inlined
from convolt.engines.jit.runtime import (
    ABSENT,
    ACTIVE,
    ASLEEP,
    CLOCK,
    DONE,
    ENDED,
    FINISHED,
    PROGRAM,
    REST_UNTIL,
    SEMAPHORE,
    STOP,
    THREAD_LINE,
    THREAD_LINES,
    THREADS,
    TICKET,
    TIMINGS,
    Waiting,
)

_I64 = ir.IntType(64)
_KERNEL = ir.FunctionType(ir.VoidType(), [_I64.as_pointer(), _I64, _I64])
_PAUSE = {"x86_64": ("llvm.x86.sse2.pause", ()), "aarch64": ("llvm.aarch64.hint", (1,))}  # 1 is YIELD
_ORDER = "seq_cst"
_MONOTONIC, _THREAD_CPU = 1, 3  # clocks of Linux
_CPU_CLOCK_EVERY = 200_000  # nanoseconds: that clock is a system call
_CHUNKS = (1 << 32) - 1  # the chunks of a ticket
_SPINS = 16  # looks at the ticket between two looks at the clock


def _word(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I64.as_pointer())


@intrinsic
def load(typingctx: Any, address: Any) -> Any:
    """The word at `address`, atomically."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_word(builder, args[0]), _ORDER, 8)

    return types.int64(types.int64), generate


@intrinsic
def exchange(typingctx: Any, address: Any, value: Any) -> Any:
    """Write the word at `address`, atomically; the one before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", _word(builder, args[0]), args[1], _ORDER)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def fetch_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to the word at `address`, atomically; the one before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _word(builder, args[0]), args[1], _ORDER)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def compare_exchange(typingctx: Any, address: Any, expected: Any, value: Any) -> Any:
    """Write the word at `address` if it is the expected one; whether it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        result = builder.cmpxchg(_word(builder, args[0]), args[1], args[2], _ORDER, _ORDER)
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), generate


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the core that this is a spin loop, where it has an instruction for that."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if hint := _PAUSE.get(platform.machine()):
            name, numbers = hint
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)] * len(numbers))
            builder.call(
                cgutils.get_or_insert_function(builder.module, kind, name), [ir.IntType(32)(n) for n in numbers]
            )
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call(typingctx: Any, address: Any, arguments: Any, chunk: Any, thread: Any) -> Any:
    """Call the kernel at `address`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, arguments, chunk, thread = args
        builder.call(builder.inttoptr(address, _KERNEL.as_pointer()), [_word(builder, arguments), chunk, thread])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def _declare(builder: Any, name: str, kinds: list[Any]) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), kinds), name)


@intrinsic
def sched_yield(typingctx: Any) -> Any:
    """Let another thread have the core, if one waits for it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(_declare(builder, "sched_yield", []), [])

    return types.int32(), generate


@intrinsic
def sem_wait(typingctx: Any, semaphore: Any) -> Any:
    """Sleep until someone posts; not 0 if a signal came first."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(_declare(builder, "sem_wait", [_I64.as_pointer()]), [_word(builder, args[0])])

    return types.int32(types.int64), generate


@intrinsic
def sem_post(typingctx: Any, semaphore: Any) -> Any:
    """Wake whoever waits, or will."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(_declare(builder, "sem_post", [_I64.as_pointer()]), [_word(builder, args[0])])

    return types.int32(types.int64), generate


@intrinsic
def nanoseconds(typingctx: Any, scratch: Any, clock: Any) -> Any:
    """What a clock of the system shows; `scratch` is the address of two words."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        time = _word(builder, args[0])
        clock_gettime = _declare(builder, "clock_gettime", [ir.IntType(32), _I64.as_pointer()])
        builder.call(clock_gettime, [builder.trunc(args[1], ir.IntType(32)), time])
        seconds, rest = builder.load(time), builder.load(builder.gep(time, [_I64(1)]))
        return builder.add(builder.mul(seconds, _I64(10**9)), rest)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def address_of(typingctx: Any, words: Any) -> Any:
    """The address that a pointer holds."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], _I64)

    return types.int64(types.CPointer(types.int64)), generate


@intrinsic
def words(typingctx: Any, address: Any) -> Any:
    """A pointer to the words at `address`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _word(builder, args[0])

    return types.CPointer(types.int64)(types.int64), generate


@inlined
def wake(state: Any, threads: Any, count: Any) -> None:
    """Wake up to `count` sleepers among the first `threads`."""
    for thread in range(threads):
        own = state + THREAD_LINES + thread * THREAD_LINE
        if count > 0 and load(own + ASLEEP) == 1 and compare_exchange(own + ASLEEP, 1, 0):
            sem_post(own + SEMAPHORE)
            count -= 1


@inlined
def publish(state: Any, ticket: Any, thread: Any) -> None:
    """Write a ticket and wake those who can use it; a thread that publishes takes a chunk itself unless it sits out."""
    exchange(state + TICKET, ticket)
    active = load(state + ACTIVE)
    if ticket == FINISHED:
        wake(state, 1, 1)
    else:
        wake(state, active, (ticket & _CHUNKS) - (1 if thread < active else 0))


@inlined
def come_back(state: Any, now: Any) -> None:
    """Let threads that sat out for long enough take part again."""
    threads = load(state + THREADS)
    if load(state + ACTIVE) < threads and now > load(state + REST_UNTIL):
        exchange(state + ACTIVE, threads)
        wake(state, threads, threads)


@inlined
def start(state: Any, now: Any, program: Any, thread: Any) -> None:
    """Publish the first phase of a program; thread 0 takes part at once, an `ABSENT` caller does not."""
    table, timings = words(program), load(state + TIMINGS)
    come_back(state, now)
    if timings != 0:
        words(timings)[load(state + THREADS) * table[1]] = now
    exchange(state + PROGRAM, program)
    exchange(state + ENDED, 0)
    publisher = 0 if thread == 0 else load(state + THREADS)  # of one that takes no chunk, no thread has the number
    publish(state, table[2], publisher)


@inlined
def run(state: Any, phase: Any, remaining: Any, thread: Any) -> None:
    """Run the kernels of a phase on one claimed chunk; publish the next phase if that was the last one."""
    table, timings = words(load(state + PROGRAM)), load(state + TIMINGS)
    phases, kernels = table[0], table[1]
    chunks, first, last = table[2 + 3 * phase], table[3 + 3 * phase], table[4 + 3 * phase]
    own = state + THREAD_LINES + thread * THREAD_LINE
    for kernel in range(first, last):
        pair = 2 + 3 * phases + 2 * kernel
        began = nanoseconds(own + CLOCK, _MONOTONIC) if timings != 0 else 0
        call(table[pair], table[pair + 1], chunks - remaining, thread)
        if timings != 0:
            words(timings)[thread * kernels + kernel] += nanoseconds(own + CLOCK, _MONOTONIC) - began
    if fetch_add(state + DONE, 1) + 1 < chunks:
        return
    exchange(state + DONE, 0)
    following = phase + 1
    if timings != 0:
        ends = load(state + THREADS) * kernels
        words(timings)[ends + following] = nanoseconds(own + CLOCK, _MONOTONIC)
    ended = timings == 0 and load(state + ENDED) != 0  # a profile is of all phases
    publish(state, FINISHED if ended or following == phases else following << 32 | table[2 + 3 * following], thread)


@inlined
def may_go_on(state: Any, thread: Any) -> Any:
    """Whether there is something to claim for a thread, or nothing more to wait for."""
    ticket = load(state + TICKET)
    over = ticket == FINISHED if thread == 0 else load(state + STOP) != 0
    return over or (ticket & _CHUNKS != 0 and thread < load(state + ACTIVE))


@inlined
def wait(state: Any, thread: Any, yield_after: Any, sleep_after: Any) -> None:
    """Wait until a thread may go on: spin, then yield, then sleep."""
    own = state + THREAD_LINES + thread * THREAD_LINE
    since = nanoseconds(own + CLOCK, _MONOTONIC)
    while True:
        for _ in range(_SPINS):
            if may_go_on(state, thread):
                return
            pause()
        waited = nanoseconds(own + CLOCK, _MONOTONIC) - since
        if waited > sleep_after:
            break
        if waited > yield_after:
            sched_yield()
    exchange(own + ASLEEP, 1)
    # Whoever publishes from here on sees the word. If someone has taken it back already, a post is on its way.
    if may_go_on(state, thread) and compare_exchange(own + ASLEEP, 1, 0):
        return
    while sem_wait(own + SEMAPHORE) != 0:
        pass


@inlined
def kept_off(elapsed: Any, used: Any, preempted: Any) -> Any:
    """Whether another process had the core: more than `preempted` nanoseconds and a quarter of all were not used."""
    return elapsed - used > preempted + elapsed // 4


@inlined
def step_back(state: Any, until: Any) -> None:
    """Let one thread less take part, but one always; the others wake up, for it may have been about to claim."""
    active = load(state + ACTIVE)
    exchange(state + REST_UNTIL, until)  # first, or ``come_back`` would see the one before
    if active > 1 and compare_exchange(state + ACTIVE, active, active - 1):
        wake(state, active - 1, active - 1)


def driver(waiting: Waiting) -> Callable[..., None]:
    """``driver(state, program, thread)``: thread 0 runs `program` and returns; the others help until told to stop.

    An `ABSENT` caller leaves a program to the others; as thread 0 with program 0 it joins them.
    """
    yield_after, sleep_after = waiting.yield_after, waiting.sleep_after
    preempted, rest = waiting.preempted, waiting.rest

    def kernel(arguments: Any, program: Any, thread: Any) -> None:
        state = address_of(arguments)
        own = state + THREAD_LINES + max(thread, 0) * THREAD_LINE
        mode = flush_denormals()
        now = nanoseconds(own + CLOCK, _MONOTONIC)
        since, cpu = now, nanoseconds(own + CLOCK, _THREAD_CPU)
        if program != 0:
            start(state, now, program, thread)
        if thread == ABSENT:
            restore_mode(mode)
            return
        while True:
            ticket = load(state + TICKET)
            remaining = ticket & _CHUNKS
            if ticket == FINISHED if thread == 0 else load(state + STOP) != 0:
                restore_mode(mode)
                return
            if remaining == 0 or thread >= load(state + ACTIVE):
                wait(state, thread, yield_after, sleep_after)
            elif compare_exchange(state + TICKET, ticket, ticket - 1):
                began = nanoseconds(own + CLOCK, _MONOTONIC)
                if began - since > _CPU_CLOCK_EVERY:
                    since, cpu = began, nanoseconds(own + CLOCK, _THREAD_CPU)
                run(state, ticket >> 32, remaining, thread)
                now = nanoseconds(own + CLOCK, _MONOTONIC)
                come_back(state, now)
                if now - began > preempted:
                    used = nanoseconds(own + CLOCK, _THREAD_CPU) - cpu
                    if kept_off(now - since, used, preempted):
                        step_back(state, now + rest)

    return kernel
