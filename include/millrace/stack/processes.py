"""Start, record, find and end processes, so that none is left behind: not by a crash, a kill, or a child that
moved to a session of its own.

A part's processes are those that descend from it, share its session, or carry its mark in their environment.
A recorded process is the same one only if its start time matches too: process ids are used again. This module
does not know what a part is for.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from millrace.errors import StackError
from millrace.private_files import write_json

MARK = "_MILLRACE_PART"
_SAME_START_SECONDS = 2.0
"""psutil derives start times from the clock, which may be adjusted between two readings."""
_KILL_SECONDS = 15.0
_LOG_BYTES = 20_000_000
"""A log longer than this is put aside; the one put aside before goes."""


@dataclass(frozen=True)
class Record:
    """One started part, as `run/<part>.json` keeps it."""

    part: str
    pid: int
    started: float
    """Seconds since 1970."""
    stop_signal: int
    stop_main_only: bool
    """Whether only the first process is told to stop, and ends its own children."""

    def process(self) -> psutil.Process | None:
        """The recorded process, if it still runs."""
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.started) < _SAME_START_SECONDS
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def launch(
    arguments: Iterable[str], environment: Mapping[str, str], *, home: Path, part: str, user: str | None, cwd: Path
) -> "subprocess.Popen[bytes]":
    """Start a process in a session of its own, marked as `part` of `home`, its output in the part's log.

    Raises:
        StackError: the program can't be started.
    """
    with log_path(home, part).open("ab") as log:
        try:
            return subprocess.Popen(
                tuple(arguments),
                env=dict(environment) | {MARK: _mark(home, part)},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=[] if user else None,
            )
        except OSError as error:
            raise StackError(f"{part} can't be started: {error}") from None


def turn_log(home: Path, part: str) -> None:
    """Put a part's log aside if it is long. The part has it open and goes on at its end, so it is copied and emptied;
    a line that is written between the two is lost."""
    path = log_path(home, part)
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        shutil.copyfile(path, path.with_suffix(".log.1"))
        os.truncate(path, 0)


def record(home: Path, part: str, pid: int, stop_signal: signal.Signals, stop_main_only: bool) -> Record:
    """Write down a started process, so that whoever comes after a crash finds it."""
    made = Record(part, pid, psutil.Process(pid).create_time(), int(stop_signal), stop_main_only)
    write_json(home / "run" / f"{part}.json", asdict(made))
    return made


def recorded(home: Path) -> dict[str, Record]:
    """Part → its record. A record that can't be read is passed over: the mark finds the process too."""
    found = {}
    for path in sorted((home / "run").glob("*.json")):
        try:
            one = Record(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        found[one.part] = one
    return found


def forget(home: Path, part: str) -> None:
    (home / "run" / f"{part}.json").unlink(missing_ok=True)


def part_processes(home: Path, records: Mapping[str, Record]) -> dict[str, list[psutil.Process]]:
    """Part → its living processes, first one first; marked processes without a record are there too."""
    sessions = {one.pid: one.part for one in records.values() if _session_is_its_own(one)}
    living: dict[int, psutil.Process] = {}
    parents: dict[int, int] = {}
    part_of: dict[int, str] = {}
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            living[process.pid], parents[process.pid] = process, process.ppid()
            part = sessions.get(os.getsid(process.pid)) or _marked_part(process, home)
        except (psutil.Error, OSError):
            continue
        if part is not None:
            part_of[process.pid] = part
    # What descends from a part belongs to it, however far it has moved.
    for pid in living:
        line = [pid]
        while line[-1] not in part_of and parents.get(line[-1], 0) in living:
            line.append(parents[line[-1]])
        if line[-1] in part_of:
            part_of.update(dict.fromkeys(line, part_of[line[-1]]))
    found: dict[str, list[psutil.Process]] = {}
    for pid, part in part_of.items():
        found.setdefault(part, []).append(living[pid])
    first = {part: one.pid for part, one in records.items()}
    return {
        part: sorted(members, key=lambda member: (member.pid != first.get(part), member.pid))
        for part, members in found.items()
    }


def end(home: Path, parts: Iterable[str], *, seconds: float, hurry: Callable[[], bool] = lambda: False) -> None:
    """End every process of `parts` together: each part's own signal first, then, after `seconds` or as soon as
    `hurry()` says so, KILL. Returns when none is left.

    Raises:
        StackError: a process outlives KILL.
    """
    wanted = set(parts)
    records = {name: one for name, one in recorded(home).items() if name in wanted}
    told: set[psutil.Process] = set()
    started = time.monotonic()
    while True:
        left = {name: members for name, members in part_processes(home, records).items() if name in wanted}
        if not left:
            break
        waited = time.monotonic() - started
        kill = waited > seconds or hurry()
        if waited > seconds + _KILL_SECONDS:
            names = ", ".join(f"{part} (pid {p.pid})" for part, members in left.items() for p in members)
            raise StackError(f"these processes outlive KILL: {names}; end them by hand")
        for part, members in left.items():
            one = records.get(part)
            for member in members:
                if kill:
                    _send(member, signal.SIGKILL)
                elif member not in told and not (one and one.stop_main_only and member.pid != one.pid):
                    told.add(member)
                    _send(member, signal.Signals(one.stop_signal) if one else signal.SIGTERM)
        time.sleep(0.1)
    for part in wanted:
        forget(home, part)


def end_leftovers(home: Path, *, seconds: float) -> list[str]:
    """End whatever an owner that was killed left running, and say which parts those were."""
    records = recorded(home)
    alive = part_processes(home, records)
    # The database last: the others close their sessions first.
    database = [name for name in alive if records.get(name) and records[name].stop_main_only]
    end(home, [name for name in {*alive, *records} if name not in database], seconds=seconds)
    end(home, database, seconds=seconds)
    return sorted(alive)


def log_path(home: Path, part: str) -> Path:
    return home / "logs" / f"{part}.log"


def log_tail(home: Path, part: str, lines: int = 15) -> str:
    """The last lines that `part` wrote."""
    try:
        with log_path(home, part).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def memory_bytes(members: Iterable[psutil.Process]) -> int:
    """Memory of these processes, what they share counted once (PSS), or resident memory where PSS isn't known."""
    total = 0
    for member in members:
        try:
            known = member.memory_full_info()
            total += getattr(known, "pss", known.rss)
        except psutil.AccessDenied:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _mark(home: Path, part: str) -> str:
    return f"{part}@{home}"


def _marked_part(process: psutil.Process, home: Path) -> str | None:
    try:
        value = process.environ().get(MARK, "")
    except (psutil.Error, OSError):
        return None
    part, _, of = value.partition("@")
    return part if part and of == str(home) else None


def _session_is_its_own(one: Record) -> bool:
    """A session keeps its number from being used again: if the number is another process's, the session is gone."""
    try:
        return abs(psutil.Process(one.pid).create_time() - one.started) < _SAME_START_SECONDS
    except psutil.NoSuchProcess:
        return True


def _send(process: psutil.Process, sent: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(sent)
