"""Signals that stop a training run."""

import signal
import threading

import pytest

from training.interrupt import SIGNALS, Interrupted, StopSignal


class Handled(Exception):
    """Raised by the handlers of these tests."""


@pytest.fixture(autouse=True)
def handlers():
    """Handlers of this file, so no signal ends the process that runs the tests."""

    def handle(number, frame):
        raise Handled(number)

    numbers = SIGNALS
    before = [signal.signal(number, handle) for number in numbers]
    yield handle
    assert [signal.getsignal(number) for number in numbers] == [handle] * len(numbers)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_reported_on_leaving(number):
    with pytest.raises(Interrupted, match=f"signal {int(number)}") as caught, StopSignal() as stop:
        assert stop.number is None
        signal.raise_signal(number)
        assert stop.number == number
    assert caught.value.number == number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_same_signal_again_acts_at_once(number):
    with pytest.raises(Handled) as caught, StopSignal():
        signal.raise_signal(number)
        signal.raise_signal(number)
        raise AssertionError("the second signal was only noted")
    assert caught.value.args == (number,)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals")
def test_terminals_and_batch_systems_may_repeat_themselves():
    assert {signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU} < set(SIGNALS)
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU):
        with pytest.raises(Interrupted), StopSignal() as stop:
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert stop.number == number


def test_an_ignored_signal_stays_ignored(handlers):
    number = SIGNALS[-1]
    signal.signal(number, signal.SIG_IGN)
    with StopSignal() as stop:
        assert signal.getsignal(number) == signal.SIG_IGN
        signal.raise_signal(number)
    assert stop.number is None
    signal.signal(number, handlers)


def test_a_signal_of_the_other_kind_does_not_cut_the_save_short(handlers):
    """A terminal's Ctrl-C and its wrapper's SIGTERM may come together."""
    with pytest.raises(Interrupted) as caught, StopSignal():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM


def test_an_error_inside_is_not_hidden_by_a_signal():
    with pytest.raises(KeyError), StopSignal():
        signal.raise_signal(signal.SIGTERM)
        raise KeyError


def test_without_a_signal_leaving_raises_nothing():
    with StopSignal() as stop:
        pass
    assert stop.number is None


def test_in_another_thread_no_handler_is_set_and_nothing_is_raised(handlers):
    seen = []

    def run():
        try:
            with StopSignal() as stop:
                seen.append(signal.getsignal(signal.SIGTERM))
            seen.append(stop.number)
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [handlers, None]
