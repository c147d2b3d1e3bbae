"""The life of one part: waiting, starting, ready, and started again after it died.

It does not know about other parts; `running.py` says when.
"""

import logging
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from millrace.errors import StackError
from millrace.stack import processes
from millrace.stack.part import Part

log = logging.getLogger("millrace.stack")

_LONGEST_WAIT = 60.0
_STEADY_SECONDS = 300.0
"""A part that lived this long starts counting its deaths from zero."""
_REVIVE_END_SECONDS = 5.0
_END_SECONDS = 20.0
_POLL_SECONDS = 0.1


class Runner:
    """One part and its process."""

    def __init__(self, part: Part, home: Path, cwd: Path) -> None:
        self.part = part
        self.state: Literal["waiting", "starting", "ready", "failed"] = "waiting"
        self._home = home
        self._cwd = cwd
        self._process: subprocess.Popen[bytes] | None = None
        self._launched = 0.0
        self._took = 0.0
        self._deaths = 0
        self._revive_at: float | None = None

    @property
    def seconds(self) -> float:
        if self.state == "starting":
            return time.time() - self._launched
        return self._took

    def launch(self) -> None:
        """Prepare the part and start its process.

        Raises:
            StackError: it can't be prepared or started.
        """
        part = self.part
        self._launched = time.time()
        self.state = "starting"
        part.prepare()
        if part.done and part.done.exists():
            self.state = "ready"
            return
        self._process = processes.launch(
            part.command, part.environment, home=self._home, part=part.name, user=part.user, cwd=self._cwd
        )
        processes.record(self._home, part.name, self._process.pid, part.stop_signal, part.stop_main_only)

    def check(self) -> None:
        """Notice that the part became ready, or that a ready one has ended.

        Raises:
            StackError: it ended, or did not become ready in time; the message has its last lines.
        """
        if self._process is None:
            return
        status = self._process.poll()
        if status is not None and not (self.part.once and status == 0):
            self._fail(f"{self.part.name} ended with status {status} while the stack started")
        if self.state != "starting":
            return
        if status == 0 and self.part.done:
            self.part.done.touch()
        if status == 0 or self.part.ready(self._launched):
            self.state, self._took = "ready", time.time() - self._launched
        elif time.time() - self._launched > self.part.deadline:
            self._fail(f"{self.part.name} did not answer within {self.part.deadline:.0f} s")

    def revive(self) -> None:
        """Start the part again if its process has ended and its time to wait is over.

        Raises:
            StackError: it can't be prepared or started.
        """
        if self.part.once or self._process is None or (status := self._process.poll()) is None:
            return
        now = time.time()
        if self._revive_at is None:
            self._deaths = 1 if now - self._launched > _STEADY_SECONDS else self._deaths + 1
            wait = min(_LONGEST_WAIT, 2.0 ** (self._deaths - 1))
            self._revive_at = now + wait
            log.error(
                "%s ended with status %s (death %d); it starts again in %.0f s; its log ends with:\n%s",
                self.part.name, status, self._deaths, wait, processes.log_tail(self._home, self.part.name),
            )  # fmt: skip
        if now < self._revive_at:
            return
        self._revive_at = None
        # Its orphans would hold its port.
        processes.end(self._home, [self.part.name], seconds=_REVIVE_END_SECONDS)
        self.launch()
        self.state = "ready"
        log.info("%s was started again", self.part.name)

    def reap(self) -> None:
        """Take the ended process's status, so that it doesn't stay as a zombie."""
        if self._process is not None:
            self._process.wait()

    def _fail(self, what: str) -> None:
        self.state, self._took = "failed", time.time() - self._launched
        tail = processes.log_tail(self._home, self.part.name)
        raise StackError(f"{what}; {processes.log_path(self._home, self.part.name)} ends with:\n{tail}")


@contextmanager
def running_alone(part: Part, home: Path, cwd: Path) -> Iterator[None]:
    """`part` without the rest of the stack, ready inside the block, with nothing left of it after. The caller holds
    the home's lock.

    Raises:
        StackError: it can't be started.
    """
    runner = Runner(part, home, cwd)
    try:
        runner.launch()
        while runner.state != "ready":
            runner.check()
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        processes.end(home, [part.name], seconds=_END_SECONDS)
        runner.reap()
