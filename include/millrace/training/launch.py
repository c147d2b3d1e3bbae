"""Starts the training program's processes on this machine, watches them, and leaves none behind.

They meet through a file and talk over the loopback interface: no port is opened to others, none can be taken. If
this process ends in whatever way, even by SIGKILL, the kernel closes the pipe that is their standard input, and
they exit. It knows nothing of what the program learns.
"""

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from millrace.errors import TrainingError
from millrace.training.spec import Spec

POLL_SECONDS = 0.5
LOCK_SECONDS = 60
"""How long an earlier, killed attempt may take to disappear."""
TAIL_BYTES = 2000
"""Of the log, in an error message."""


def run_program(spec: Spec, *, threads: int, watch: Callable[[], None]) -> None:
    """Run the program to its end in `spec.processes` processes.

    Args:
        spec: is written to `<folder>/spec.json`; the processes' output goes to `<folder>/program-<rank>.log`.
        threads: of the machine, shared out over the processes.
        watch: called twice a second while they run, and once after.

    Raises:
        TrainingError: a process failed, with its reason; or an earlier attempt still runs in the folder.
    """
    spec.failure.unlink(missing_ok=True)
    path = spec.folder / "spec.json"
    path.write_text(spec.model_dump_json(indent=1))
    for stale in spec.folder.glob("rendezvous-*"):
        stale.unlink()
    rendezvous = spec.folder / f"rendezvous-{uuid.uuid4().hex}"
    command = [
        *(sys.executable, "-m", "millrace.training.program", "--leash"),
        *("--spec", str(path), "--rendezvous", rendezvous.as_uri()),
    ]
    running: list[subprocess.Popen[bytes]] = []
    with _sole_writer(spec.folder) as lock:
        try:
            for rank in range(spec.processes):
                with (spec.folder / f"program-{rank}.log").open("wb") as log:
                    running.append(
                        subprocess.Popen(
                            command,
                            stdin=subprocess.PIPE,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            env=os.environ | _variables(rank, spec.processes, threads),
                            pass_fds=[lock.fileno()],
                        )
                    )
            _wait(running, spec, watch)
        finally:
            _end(running)
            rendezvous.unlink(missing_ok=True)


def _wait(running: list[subprocess.Popen[bytes]], spec: Spec, watch: Callable[[], None]) -> None:
    while any(process.poll() is None for process in running):
        if failed := [rank for rank, process in enumerate(running) if process.returncode]:
            break
        watch()
        time.sleep(POLL_SECONDS)
    else:
        failed = [rank for rank, process in enumerate(running) if process.returncode]
    watch()
    if failed:
        # One that fails takes the others with it; a sentence of its own is better than the end of a log.
        if spec.failure.exists():
            raise TrainingError(spec.failure.read_text())
        log = spec.folder / f"program-{failed[0]}.log"
        tail = log.read_bytes()[-TAIL_BYTES:].decode(errors="replace")
        raise TrainingError(
            f"training process {failed[0]} ended with status {running[failed[0]].returncode}; {log} ends with: {tail}"
        )


def _end(running: list[subprocess.Popen[bytes]]) -> None:
    for process in running:
        if process.stdin:
            process.stdin.close()  # the leash
    for process in running:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _variables(rank: int, processes: int, threads: int) -> dict[str, str]:
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "GLOO_SOCKET_IFNAME": loopback,
        "OMP_NUM_THREADS": str(max(1, threads // processes)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[IO[bytes]]:
    """A lock on `folder`, which the processes inherit: it is free when the last of them is gone."""
    with (folder / "lock").open("wb") as lock:
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise TrainingError(
                        f"another fine-tune still writes into {folder}; wait for it, or end its processes"
                    ) from None
                time.sleep(POLL_SECONDS)
        yield lock
