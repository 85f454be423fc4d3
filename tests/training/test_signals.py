"""Stop requests: Ctrl-C, SIGTERM, SIGHUP, SIGUSR1."""

import copy
import itertools
import os
import signal
import threading
import time

import pytest

from baby_xp.training.signals import SIGNALS, Interrupted, Stop, interruptible, interruption

needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
each_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # until Python calls the handler


@needs_signals
@each_signal
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_the_first_signal_requests_a_stop_and_the_second_interrupts(signals, number, second):
    """The fixture checks that the handlers are restored at the end."""
    calls = []
    with Stop(lambda: calls.append("once")) as stop:
        assert not stop.asked
        send(number)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt) as caught:
            send(second)
    assert calls == ["once"]
    assert [getattr(one, "number", signal.SIGINT) for one in (caught.value, interruption())] == [number, number]


@needs_signals
def test_the_handlers_are_restored_even_after_an_error(signals):
    with pytest.raises(KeyboardInterrupt), Stop():
        send(signal.SIGTERM, signal.SIGTERM)


@needs_signals
def test_closing_the_terminal_interrupts_nothing(signals):
    """The system and the shell may both send SIGHUP: only the first one counts."""
    with Stop() as stop:
        send(*[signal.SIGHUP] * 3)
        assert stop.asked


@needs_signals
@each_signal
def test_an_ignored_signal_stays_ignored(signals, number):
    """As under nohup."""
    usual = signal.signal(number, signal.SIG_IGN)
    with interruptible(), Stop() as stop:
        send(number)
        assert not stop.asked
    assert signal.signal(number, usual) == signal.SIG_IGN


@needs_signals
@pytest.mark.parametrize("number", SIGNALS[1:], ids=lambda number: number.name)
def test_outside_training_a_signal_interrupts_and_cleanup_runs(signals, monkeypatch, number):
    cleaned = []
    monkeypatch.setattr("baby_xp.training.signals.ONCE_SECONDS", 1000.0)

    def command():
        try:
            send(number)
        finally:
            send(number, number)  # the same request, from the system and from a shell
            cleaned.append(True)

    with interruptible(), pytest.raises(KeyboardInterrupt, match=f"by {number.name}") as caught:
        command()
    assert (caught.value.number, cleaned) == (number, [True])
    monkeypatch.setattr("baby_xp.training.signals.ONCE_SECONDS", 0.0)
    with interruptible():  # a later request counts again
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                send(number)


def test_signals_are_unchanged_in_other_threads(signals):
    seen = []

    def elsewhere():
        with interruptible(), Stop() as stop:
            seen.append({number: signal.getsignal(number) for number in SIGNALS})
            seen.append(stop.asked)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signals, False]


def test_a_stop_request_ends_a_loop_over_items():
    stop, done = Stop(), []
    assert list(stop.over("abc")) == ["a", "b", "c"]

    def work(item):
        done.append(item)
        stop.asked = item == 3

    with pytest.raises(KeyboardInterrupt):
        list(map(work, stop.over(itertools.count())))
    assert done == [0, 1, 2, 3]


def test_an_interrupt_can_be_copied():
    """As when a rank sends it to the one that waits for its result."""
    copied = copy.copy(Interrupted(signal.SIGTERM))
    assert (str(copied), copied.number) == ("by SIGTERM", signal.SIGTERM)
