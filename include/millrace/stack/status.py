"""The stack seen from outside: start it in the background, ask how it is, end it. It holds no process itself."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from millrace.airflow_api import Airflow
from millrace.errors import StackError
from millrace.secret_sources import variable_for
from millrace.settings import AIRFLOW_SERVICE, PROJECT, Settings
from millrace.stack import processes
from millrace.stack.environment import part_environment
from millrace.stack.home import HomeLock, Secrets, obtain_secrets, prepare_home, read_format
from millrace.stack.parts import all_parts
from millrace.stack.running import Progress, read_state

_DOWN_SECONDS = 120.0
_LEFTOVER_SECONDS = 20.0


@dataclass(frozen=True)
class PartStatus:
    """One part now."""

    part: str
    pid: int | None
    healthy: bool
    url: str
    memory_mb: int
    """With its children, shared memory counted once."""
    processes: int
    up_seconds: int
    start_seconds: float | None
    """What its start took, where its owner said."""


@dataclass(frozen=True)
class Status:
    """The stack of one home now."""

    home: Path
    state: Literal["stopped", "starting", "ready", "stopping", "left over"]
    """`left over`: its owner was killed and parts still run; the next `up` or `down` ends them."""
    pid: int | None
    """Process that owns the stack."""
    message: str
    """Why the last start failed, if it did."""
    parts: tuple[PartStatus, ...]

    @property
    def healthy(self) -> bool:
        return self.state == "ready" and all(part.healthy for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"home": str(self.home), "healthy": self.healthy}


def status(settings: Settings) -> Status:
    """Ask every part of the stack on `settings.home`. Takes a second or two; changes nothing.

    Raises:
        StackError: a newer Millrace wrote that home.
    """
    home = settings.home
    read_format(home)
    if not (home / "secrets.json").exists() or not (home / "run").exists():
        said = read_state(home)
        return Status(home, "stopped", None, str(said.get("message", "")), ())
    said = read_state(home)
    owned = _is_owned(home)
    records = processes.recorded(home)
    alive = processes.part_processes(home, records)
    took = {one["part"]: one["seconds"] for one in _said_parts(said)}
    parts = []
    for part in all_parts(settings, obtain_secrets(home)):
        if part.once:
            continue
        members = alive.get(part.name, [])
        one = records.get(part.name)
        started = one.started if one and members else time.time()
        parts.append(
            PartStatus(
                part=part.name,
                pid=members[0].pid if members else None,
                healthy=bool(members) and part.ready(started),
                url=part.url,
                memory_mb=round(processes.memory_bytes(members) / 2**20),
                processes=len(members),
                up_seconds=round(time.time() - started),
                start_seconds=took.get(part.name),
            )
        )
    state = str(said.get("state")) if owned else ("left over" if alive else "stopped")
    pid = said.get("pid") if owned else None
    return Status(
        home=home,
        state=state if state in ("starting", "ready", "stopping", "left over") else "stopped",  # type: ignore[arg-type]
        pid=pid if isinstance(pid, int) else None,
        message=str(said.get("message", "")),
        parts=tuple(parts),
    )


def up(settings: Settings, *, on_progress: Callable[[tuple[Progress, ...]], None] = lambda progress: None) -> None:
    """Start the stack in the background, under a process that restarts what dies; return when all of it works.

    Raises:
        StackError: it runs already, or can't start; then nothing of it is left running.
    """
    prepare_home(settings)
    home = settings.home
    if _is_owned(home):
        raise StackError(
            f"a stack already runs on {home} (process {read_state(home).get('pid')}); "
            "`millrace status` shows it, `millrace down` ends it"
        )
    with processes.log_path(home, "supervisor").open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "millrace.stack.supervisor"],
            # It sets Airflow's passwords; its parts aren't told them.
            env=part_environment(settings, threads=1, keys=True)
            | dict([variable_for("MILLRACE_AIRFLOW_PASSWORDS", settings.airflow_passwords)]),
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        while True:
            ended = supervisor.poll() is not None
            said = read_state(home)
            ours = said.get("pid") == supervisor.pid
            if ours:
                on_progress(tuple(Progress(**one) for one in _said_parts(said)))
            if ours and said["state"] == "ready":
                return
            if ended:
                why = str(said["message"]) if ours and said["message"] else processes.log_tail(home, "supervisor")
                raise StackError(why)
            time.sleep(0.2)
    except BaseException:
        if supervisor.poll() is None:
            supervisor.send_signal(signal.SIGTERM)
            supervisor.wait(_DOWN_SECONDS)
        raise


def down(settings: Settings) -> bool:
    """End the stack of `settings.home`, whoever started it, and what a killed owner left. False: nothing ran.

    Raises:
        StackError: something outlives KILL, or a newer Millrace wrote that home.
    """
    home = settings.home
    read_format(home)
    if not (home / "run").exists():
        return False
    lock = HomeLock(home)
    if lock.acquire():
        try:
            return bool(processes.end_leftovers(home, seconds=_LEFTOVER_SECONDS))
        finally:
            lock.release()
    owner = read_state(home).get("pid")
    if not isinstance(owner, int) or owner == os.getpid():
        raise StackError(f"somebody holds {home / 'run' / 'lock'} and doesn't say who; end that process by hand")
    _end_owner(owner)
    deadline = time.monotonic() + _LEFTOVER_SECONDS
    # Whoever asks whether the home is owned holds the lock too, for a moment.
    while not lock.acquire():
        if time.monotonic() > deadline:
            raise StackError(f"process {owner} has ended, and somebody else holds {home / 'run' / 'lock'} since")
        time.sleep(0.1)
    try:
        processes.end_leftovers(home, seconds=_LEFTOVER_SECONDS)
    finally:
        lock.release()
    return True


def known_secrets(settings: Settings) -> Secrets | None:
    """The secrets of a home that was started before; None before the first start."""
    return obtain_secrets(settings.home) if (settings.home / "secrets.json").exists() else None


def _is_owned(home: Path) -> bool:
    lock = HomeLock(home)
    if not lock.acquire():
        return True
    lock.release()
    return False


def _said_parts(said: dict[str, object]) -> list[dict[str, Any]]:
    parts = said.get("parts")
    return parts if isinstance(parts, list) else []


def _end_owner(pid: int) -> None:
    """Until its process is gone, which is a moment after it gave the lock back. Where it hangs it is killed, and
    its parts are left-overs then."""
    deadline = time.monotonic() + _DOWN_SECONDS
    with suppress(psutil.NoSuchProcess):
        owner = psutil.Process(pid)
        owner.send_signal(signal.SIGTERM)
        while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                owner.kill()
            time.sleep(0.1)


def airflow_of(settings: Settings) -> Airflow:
    """A client of the Airflow on `settings.home`; close it, or use it in a `with` block."""
    return Airflow(settings.airflow_url, AIRFLOW_SERVICE, obtain_secrets(settings.home).airflow_service_password)
