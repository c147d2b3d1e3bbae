import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from millrace.stack import processes

STUBBORN_CHILD = """
import os, signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
made = subprocess.Popen([sys.executable, "-c", child], start_new_session=True, stdout=subprocess.PIPE)
made.stdout.readline()
print("up", flush=True)
time.sleep(600)
"""
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("run", "logs"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Start a Python program as a part and wait until it says `up`."""
    started = []

    def launch(part: str, code: str) -> "subprocess.Popen[bytes]":
        made = processes.launch(
            [sys.executable, "-c", code], dict(os.environ), home=home, part=part, user=None, cwd=home
        )
        started.append(made)
        deadline = time.monotonic() + 20
        while "up" not in processes.log_tail(home, part):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return made

    yield launch
    for made in started:
        with contextlib.suppress(ProcessLookupError):
            made.kill()
        made.wait()


def test_a_long_log_is_put_aside_while_its_part_goes_on_writing(
    home: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = start(
        "chatty",
        "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1}); print('up', flush=True); "
        "signal.sigwait({signal.SIGUSR1}); print('later', flush=True)",
    )
    processes.turn_log(home, "chatty")
    assert "up" in processes.log_tail(home, "chatty"), "it is short"
    monkeypatch.setattr(processes, "_LOG_BYTES", 2)
    processes.turn_log(home, "chatty")
    log = processes.log_path(home, "chatty")
    assert log.read_text() == ""
    assert log.with_suffix(".log.1").read_text() == "up\n"
    os.kill(made.pid, signal.SIGUSR1)
    made.wait()
    assert log.read_text() == "later\n"


@pytest.mark.slow
def test_a_child_in_a_session_of_its_own_that_ignores_term_is_ended_too(home: Path, start: Start) -> None:
    made = start("gateway", STUBBORN_CHILD)
    processes.record(home, "gateway", made.pid, signal.SIGTERM, False)
    members = processes.part_processes(home, processes.recorded(home))["gateway"]
    assert members[0].pid == made.pid
    assert len(members) == 2
    processes.end(home, ["gateway"], seconds=0.5)
    assert not [member for member in members if _runs(member)]
    assert processes.recorded(home) == {}


@pytest.mark.slow
def test_an_orphan_is_found_by_its_mark_after_its_parent_was_killed(home: Path, start: Start) -> None:
    made = start("gateway", STUBBORN_CHILD)
    made.kill()
    made.wait()
    orphans = processes.part_processes(home, {})["gateway"]
    assert len(orphans) == 1
    assert processes.end_leftovers(home, seconds=0.2) == ["gateway"]
    assert not _runs(orphans[0])


def test_a_part_of_another_home_is_left_alone(
    home: Path, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = start("gateway", "import time; print('up', flush=True); time.sleep(600)")
    other = tmp_path_factory.mktemp("other")
    for name in ("run", "logs"):
        (other / name).mkdir()
    assert processes.end_leftovers(other, seconds=0.2) == []
    assert made.poll() is None


def test_a_process_that_got_the_number_of_an_ended_part_is_left_alone(home: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        record = {"part": "spark", "pid": stranger.pid, "started": time.time() - 3600}
        (home / "run" / "spark.json").write_text(json.dumps(record | {"stop_signal": 15, "stop_main_only": False}))
        assert processes.end_leftovers(home, seconds=0.2) == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_record_that_was_cut_short_does_not_hide_its_process(home: Path, start: Start) -> None:
    made = start("mlflow", "import time; print('up', flush=True); time.sleep(600)")
    (home / "run" / "mlflow.json").write_text('{"part": "mlf')
    assert processes.end_leftovers(home, seconds=5) == ["mlflow"]
    assert made.wait(5) == -signal.SIGTERM


def test_hurry_does_not_wait_for_the_polite_end(home: Path, start: Start) -> None:
    start("gateway", STUBBORN_CHILD)
    began = time.monotonic()
    processes.end(home, ["gateway"], seconds=60, hurry=lambda: True)
    assert time.monotonic() - began < 5


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
