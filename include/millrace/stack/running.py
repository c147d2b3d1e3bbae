"""`Stack`: starts the parts in order, restarts one that dies, and ends them all, whatever happens.

It does not know what a part does, nor who shows its progress.
"""

import atexit
import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from millrace.airflow_api import Airflow
from millrace.errors import StackError
from millrace.private_files import write_json
from millrace.settings import AIRFLOW_SERVICE, PROJECT, Settings
from millrace.stack import processes
from millrace.stack.home import (
    HomeLock,
    Secrets,
    bring_up_to_date,
    obtain_secrets,
    prepare_home,
    with_secrets,
)
from millrace.stack.interrupts import Interrupts
from millrace.stack.part import Part
from millrace.stack.parts import all_parts, with_keys_url
from millrace.stack.preflight import check_machine
from millrace.stack.runner import Runner

log = logging.getLogger("millrace.stack")

STATE_FILE = "stack.json"
HEAVY_POOL = "heavy"
"""One-slot pool of the tasks that fill the machine; `plugins/millrace_airflow.py` names it for DAGs."""
_END_SECONDS = 20.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Progress:
    """How far one part has come."""

    part: str
    state: Literal["waiting", "starting", "ready", "failed"]
    seconds: float
    """Since it was started, or what its start took."""


class Stack:
    """The stack of one home, for as long as the `with` block runs.

    INT, TERM and HUP end it from any moment on: the block gets KeyboardInterrupt or SystemExit, and no process
    is left. `settings` afterwards holds the keys of this home.
    """

    def __init__(
        self, settings: Settings, *, on_progress: Callable[[tuple[Progress, ...]], None] = lambda progress: None
    ) -> None:
        self.settings = settings
        self._on_progress = on_progress
        self._interrupts = Interrupts()
        self._lock = HomeLock(settings.home)
        self._runners: dict[str, Runner] = {}
        self._secrets: Secrets | None = None
        self._ending = threading.Event()
        self._watcher: threading.Thread | None = None
        self._log_file: logging.Handler | None = None
        self._started = time.time()

    def __enter__(self) -> Self:
        self._interrupts.__enter__()
        # For the few instructions between a signal and the block that would end the stack.
        atexit.register(self._end)
        try:
            self._start()
        except OSError as error:
            failed = StackError(
                f"{self.settings.home} can't be written: {error}; free or correct that, then start again"
            )
            self._finish(failed)
            raise failed from None
        except BaseException as error:
            self._finish(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(None)
        self._interrupts.raise_pending()

    @property
    def airflow_password(self) -> str:
        """Of Airflow's user `admin`, where there is one."""
        assert self._secrets is not None, "the stack has not been started"
        return self._secrets.airflow_password

    def airflow(self) -> Airflow:
        """A client of this stack's Airflow, as the stack itself; close it, or use it in a `with` block."""
        assert self._secrets is not None, "the stack has not been started"
        return Airflow(self.settings.airflow_url, AIRFLOW_SERVICE, self._secrets.airflow_service_password)

    def wait(self) -> None:
        """Until a signal ends the stack."""
        while True:
            time.sleep(3600)

    def _start(self) -> None:
        home = self.settings.home
        prepare_home(self.settings)
        if not self._lock.acquire():
            owner = read_state(home).get("pid", "unknown")
            raise StackError(
                f"a stack already runs on {home} (process {owner}); `millrace status` shows it, `millrace down` ends it"
            )
        # At once, so that `down` knows whom to ask.
        self._write_state("starting")
        self._open_log()
        leftovers = processes.end_leftovers(home, seconds=_END_SECONDS)
        if leftovers:
            log.warning("ended what a killed stack had left: %s", ", ".join(leftovers))
        check_machine(self.settings)
        bring_up_to_date(home)
        self._secrets = obtain_secrets(home)
        self.settings = with_keys_url(with_secrets(self.settings, self._secrets))
        parts = all_parts(self.settings, self._secrets)
        self._runners = {part.name: Runner(part, home, PROJECT) for part in parts}
        log.info("starting %s on %s", ", ".join(self._runners), home)
        while not all(runner.state == "ready" for runner in self._runners.values()):
            for runner in self._runners.values():
                self._advance(runner)
            self._report("starting")
            time.sleep(_POLL_SECONDS)
        with self.airflow() as airflow:
            airflow.ensure_pool(HEAVY_POOL, slots=1, description="Tasks that fill the machine, one at a time")
        self._report("ready")
        log.info("ready after %.0f s", time.time() - self._started)
        self._watcher = threading.Thread(target=self._watch, name="stack watcher", daemon=True)
        self._watcher.start()

    def _advance(self, runner: Runner) -> None:
        """One step of one part's start.

        Raises:
            StackError: it failed; the message has its last lines.
        """
        if runner.state == "waiting":
            if all(self._runners[name].state == "ready" for name in runner.part.after):
                with self._interrupts.held():
                    runner.launch()
            return
        try:
            runner.check()
        except StackError:
            self._report("starting")
            raise

    def _watch(self) -> None:
        """Restart parts that die, each after a wait that grows with every death."""
        while not self._ending.wait(1.0):
            for runner in self._runners.values():
                if self._ending.is_set():
                    return
                # The watcher must outlive a restart that fails: the next round tries again.
                try:
                    processes.turn_log(self.settings.home, runner.part.name)
                    runner.revive()
                except (StackError, OSError) as error:
                    log.error("%s can't be restarted, or its log put aside: %s", runner.part.name, error)

    def _finish(self, error: BaseException | None) -> None:
        """End everything, then give the signals and the lock back."""
        self._interrupts.hold()
        try:
            self._end()
            # A full disk must not keep the rest from being given back.
            with contextlib.suppress(OSError):
                if self._lock.held:
                    failed = isinstance(error, Exception)
                    self._write_state("failed" if failed else "stopped", str(error) if failed else "")
        finally:
            self._lock.release()
            self._close_log()
            self._interrupts.__exit__()

    def _end(self) -> None:
        atexit.unregister(self._end)
        if not self._lock.held:
            return
        self._ending.set()
        if self._watcher is not None:
            self._watcher.join()
        home = self.settings.home
        with contextlib.suppress(OSError):
            self._write_state("stopping")
        depths = {name: _depth(runner.part, self._runners) for name, runner in self._runners.items()}
        for depth in sorted(set(depths.values()), reverse=True):
            stage = [name for name, of in depths.items() if of == depth]
            processes.end(home, stage, seconds=_END_SECONDS, hurry=lambda: self._interrupts.count > 1)
        processes.end_leftovers(home, seconds=_END_SECONDS)
        for runner in self._runners.values():
            runner.reap()
        log.info("stopped")

    def _report(self, state: str) -> None:
        self._write_state(state)
        self._on_progress(self._progress())

    def _progress(self) -> tuple[Progress, ...]:
        return tuple(Progress(one.part.name, one.state, one.seconds) for one in self._runners.values())

    def _write_state(self, state: str, message: str = "") -> None:
        value = {
            "pid": os.getpid(),
            "started": self._started,
            "state": state,
            "message": message,
            "parts": [asdict(one) for one in self._progress()],
        }
        write_json(self.settings.home / "run" / STATE_FILE, value)

    def _open_log(self) -> None:
        self._log_file = logging.FileHandler(processes.log_path(self.settings.home, "stack"))
        self._log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._log_file)
        log.setLevel(logging.INFO)

    def _close_log(self) -> None:
        if self._log_file is not None:
            log.removeHandler(self._log_file)
            self._log_file.close()
            self._log_file = None


def read_state(home: Path) -> dict[str, object]:
    """What the owner of the stack last wrote about it; empty where nobody did."""
    try:
        state: dict[str, object] = json.loads((home / "run" / STATE_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return state


def _depth(part: Part, runners: dict[str, Runner]) -> int:
    """Parts end before those that they were started after."""
    return max((_depth(runners[name].part, runners) + 1 for name in part.after), default=0)
