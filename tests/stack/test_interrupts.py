import signal

import pytest

from millrace.stack.interrupts import Interrupts


def _receive(number: signal.Signals) -> None:
    # To this thread: threads of native libraries that earlier tests loaded must not receive it.
    signal.raise_signal(number)
    # Python runs a handler between two instructions of the main thread: give it some.
    for _ in range(1000):
        pass


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
)
def test_a_signal_becomes_an_exception(number: signal.Signals, expected: type[BaseException]) -> None:
    with Interrupts(), pytest.raises(expected):
        _receive(number)


def test_a_signal_waits_until_what_must_not_be_cut_short_is_done() -> None:
    done = []
    with Interrupts() as interrupts:

        def work() -> None:
            with interrupts.held():
                _receive(signal.SIGTERM)
                done.append("all of it")

        with pytest.raises(SystemExit) as ended:
            work()
    assert done == ["all of it"]
    assert ended.value.code == 128 + signal.SIGTERM


def test_a_second_signal_does_not_cut_the_way_out_short() -> None:
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            _receive(signal.SIGINT)
        _receive(signal.SIGINT)
        _receive(signal.SIGTERM)
        assert interrupts.count == 3


def test_the_callers_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
