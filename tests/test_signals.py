"""Signals ask the loop to stop; the second one does not ask."""

import os
import signal
import threading

import pytest

from convolt.signals import ExitCode, StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_flag_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signal == number
    assert signal.getsignal(number) is before


def test_handlers_come_back_after_an_error() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), StopRequest():
        _ = 1 // 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("second", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_second_signal_ends_at_once(first: signal.Signals, second: signal.Signals, code: int) -> None:
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            with StopRequest():
                os.kill(os.getpid(), first)
                os.kill(os.getpid(), second)
        finally:
            os._exit(0)  # reached only if the second signal was ignored
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


def test_in_another_thread_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=30)
    assert seen == [(False, before)]


def test_documented_exit_codes() -> None:
    assert {code.name: int(code) for code in ExitCode} == {"OK": 0, "ERROR": 1, "USAGE": 2, "INTERRUPTED": 75}
