"""What killing, dying and stopping leave behind. Each of these tests starts a stack of its own."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from millrace.errors import StackError
from millrace.settings import PROJECT, Settings
from millrace.stack import down, status, up
from millrace.stack.environment import part_environment
from millrace.stack.processes import part_processes, recorded
from millrace.stack.running import read_state
from tests.conftest import stack_settings

pytestmark = pytest.mark.stack


@pytest.fixture
def own(open_folder: Path) -> Iterator[Settings]:
    """Settings of a stack that a test may ruin; whatever is left of it ends with the test."""
    settings = stack_settings(Path(tempfile.mkdtemp(dir=open_folder)))
    yield settings
    down(settings)
    assert _left(settings) == []


@pytest.mark.parametrize(
    ("seen", "sent"),
    [
        ("format.json", signal.SIGTERM),
        ("run/postgres.json", signal.SIGTERM),
        ("run/mlflow.json", signal.SIGINT),
        ("run/airflow-scheduler.json", signal.SIGTERM),
    ],
)
def test_a_signal_during_the_start_leaves_no_process(own: Settings, seen: str, sent: signal.Signals) -> None:
    owner = _start_owner(own)
    _until(lambda: (own.home / seen).exists() or owner.poll() is not None, 120)
    owner.send_signal(sent)
    assert owner.wait(90) != 0
    assert _left(own) == []
    assert read_state(own.home).get("state", "stopped") == "stopped"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_what_dies_is_started_again_and_a_killed_owner_leaves_nothing_for_long(own: Settings) -> None:
    up(own)
    first = status(own)
    assert first.healthy, first

    # A part that dies.
    scheduler = recorded(own.home)["airflow-scheduler"]
    os.kill(scheduler.pid, signal.SIGKILL)
    # Between its end and its start it has no record.
    _until(lambda: recorded(own.home).get("airflow-scheduler", scheduler).pid != scheduler.pid, 60)
    _until(lambda: status(own).healthy, 90)
    assert "airflow-scheduler ended with status -9" in (own.home / "logs" / "stack.log").read_text()

    # The owner that is killed: everything else still runs.
    assert first.pid
    os.kill(first.pid, signal.SIGKILL)
    _until(lambda: status(own).state == "left over", 10)
    before = {one.pid for one in _left(own)}
    assert before

    up(own)
    second = status(own)
    assert second.healthy, second
    assert second.pid != first.pid
    assert not before & {one.pid for one in _left(own)}

    assert down(own)
    assert _left(own) == []
    assert status(own).state == "stopped"
    assert not down(own)


def test_a_part_that_cannot_start_is_one_message_with_its_last_lines_and_nothing_is_left(own: Settings) -> None:
    (own.home / "postgres").mkdir(parents=True)
    (own.home / "postgres" / "data").mkdir()
    with pytest.raises(
        StackError, match=r"postgres ended with status 2 .*postgres\.log ends with:(.|\n)*configuration file"
    ):
        up(own)
    assert _left(own) == []
    said = status(own)
    assert said.state == "stopped"
    assert "postgres ended with status" in said.message


def test_status_and_down_before_any_start_say_that_nothing_runs(own: Settings) -> None:
    environment = part_environment(own, threads=1, keys=False)
    for arguments, code, expected in (
        (["status", "--json"], 1, '"state": "stopped"'),
        (["down"], 0, "Nothing was running"),
    ):
        answer = subprocess.run(
            [sys.executable, "-m", "millrace.cli", *arguments], env=environment, capture_output=True, text=True
        )
        assert (answer.returncode, answer.stderr) == (code, "")
        assert expected in answer.stdout
    assert not own.home.exists()


def _start_owner(settings: Settings) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "millrace.stack.supervisor"],
        env=part_environment(settings, threads=1, keys=False),
        cwd=PROJECT,
        stderr=subprocess.DEVNULL,
    )


def _left(settings: Settings) -> list[psutil.Process]:
    """Processes of this home, looked for by mark, by record, and by the home's path in command line or environment."""
    marked = [one for part in part_processes(settings.home, recorded(settings.home)).values() for one in part]
    named = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                told = [*process.cmdline(), *process.environ().values()]
                if any(str(settings.home) in text for text in told):
                    named.append(process)
        except psutil.Error:
            continue
    return list({*marked, *named})


def _until(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)
