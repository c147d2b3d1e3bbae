"""Each in an interpreter of its own: a signal to the suite's process would meet whatever native libraries it loaded."""

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

HEAD = """
import signal
from millrace.stack.interrupts import Interrupts

def receive(number):
    signal.raise_signal(number)
    # Python runs a handler between two instructions of the main thread: give it some.
    for _ in range(1000):
        pass

def ends_with(block):
    try:
        block()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")
"""


def run(code: str) -> None:
    """Run `code`, whose assertions must hold."""
    ended = subprocess.run([sys.executable, "-c", HEAD + code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
)
def test_a_signal_becomes_an_exception(number: signal.Signals, expected: type[BaseException]) -> None:
    run(f"""
with Interrupts():
    error = ends_with(lambda: receive({int(number)}))
assert type(error) is {expected.__name__}, error
""")


def test_a_signal_waits_until_what_must_not_be_cut_short_is_done() -> None:
    run("""
done = []
with Interrupts() as interrupts:
    def work():
        with interrupts.held():
            receive(signal.SIGTERM)
            done.append("all of it")
    error = ends_with(work)
assert done == ["all of it"]
assert error.code == 128 + signal.SIGTERM
""")


def test_a_second_signal_does_not_cut_the_way_out_short() -> None:
    run("""
with Interrupts() as interrupts:
    assert type(ends_with(lambda: receive(signal.SIGINT))) is KeyboardInterrupt
    receive(signal.SIGINT)
    receive(signal.SIGTERM)
    assert interrupts.count == 3
""")


def test_the_callers_handlers_come_back() -> None:
    run("""
before = signal.getsignal(signal.SIGTERM)
with Interrupts():
    assert signal.getsignal(signal.SIGTERM) != before
assert signal.getsignal(signal.SIGTERM) == before
""")
