"""Starts the training program's processes, watches them, and leaves none behind.

By itself it has them meet through a file and talk over the loopback interface: no port is opened to others, none can
be taken. torchrun and DeepSpeed's launcher do the same over a port of the loopback interface; Spark puts them on its
workers (`spark_launch.py`). If this process ends in whatever way, even by SIGKILL, the kernel closes the pipe that is
their standard input, and they exit. It knows nothing of what the program learns.
"""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from millrace.errors import OutOfMemory, TrainingError
from millrace.settings import Launcher
from millrace.training.spec import OUT_OF_MEMORY, Spec

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.5
LOCK_SECONDS = 60
"""How long an earlier, killed attempt may take to disappear."""
TAIL_BYTES = 2000
"""Of the log, in an error message."""


def run_program(spec: Spec, *, threads: int, watch: Callable[[], None], launcher: Launcher, spark: str = "") -> None:
    """Run the program to its end in `spec.processes` processes.

    Args:
        spec: is written to `<folder>/spec.json`; what the processes print goes to `<folder>/program-<n>.log`.
        threads: of the machine, shared out over the processes.
        watch: called twice a second while they run, and once after.
        launcher: `local` starts the processes itself; the others start what starts them.
        spark: the Spark Connect server (`sc://…`), for the launcher of that name.

    Raises:
        OutOfMemory: a process could not have the memory that it needs.
        TrainingError: a process failed, with its reason; or an earlier attempt still runs in the folder.
    """
    spec.failure.unlink(missing_ok=True)
    path = spec.folder / "spec.json"
    path.write_text(spec.model_dump_json(indent=1))
    for stale in spec.folder.glob("rendezvous-*"):
        stale.unlink()
    rendezvous = spec.folder / f"rendezvous-{uuid.uuid4().hex}"
    running: list[subprocess.Popen[bytes]] = []
    with _sole_writer(spec.folder) as lock:
        try:
            for number, (command, variables) in enumerate(_commands(spec, path, rendezvous, threads, launcher, spark)):
                with (spec.folder / f"program-{number}.log").open("wb") as log:
                    running.append(
                        subprocess.Popen(
                            command,
                            stdin=subprocess.PIPE,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            env=os.environ | variables,
                            pass_fds=[lock.fileno()],
                        )
                    )
            _wait(running, spec, watch)
        finally:
            _end(running)
            rendezvous.unlink(missing_ok=True)


def _commands(
    spec: Spec, path: Path, rendezvous: Path, threads: int, launcher: Launcher, spark: str
) -> Iterator[tuple[list[str], dict[str, str]]]:
    """What to start on this machine: arguments, and variables on top of this process's own."""
    here = _variables(spec.processes, threads)
    program = ["millrace.training.program", "--leash", "--spec", str(path)]
    count = str(spec.processes)
    match launcher:
        case "local":
            for rank in map(str, range(spec.processes)):
                ranked = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
                yield [sys.executable, "-m", *program, "--rendezvous", rendezvous.as_uri()], here | ranked
        case "torchrun":
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            yield [*torchrun, f"--local-addr={LOOPBACK}", "--max-restarts=0", "-m", *program], here
        case "deepspeed":
            deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", f"--num_gpus={count}"]
            alone = [f"--master_port={_free_port()}", "--no_local_rank", "--module"]
            yield [*deepspeed, *alone, *program], here | _accelerator()
        case "spark":
            # Not as an argument, which all on this machine could read: it may hold a token.
            yield [sys.executable, "-m", "millrace.training.spark_launch", str(path)], {"SPARK_REMOTE": spark}


def _wait(running: list[subprocess.Popen[bytes]], spec: Spec, watch: Callable[[], None]) -> None:
    while any(process.poll() is None for process in running):
        if failed := [number for number, process in enumerate(running) if process.returncode]:
            break
        watch()
        time.sleep(POLL_SECONDS)
    else:
        failed = [number for number, process in enumerate(running) if process.returncode]
    watch()
    if failed:
        # One that fails takes the others with it; a sentence of its own is better than the end of a log.
        if spec.failure.exists():
            reason = spec.failure.read_text()
            raise (OutOfMemory if reason.startswith(OUT_OF_MEMORY) else TrainingError)(reason)
        log = spec.folder / f"program-{failed[0]}.log"
        tail = log.read_bytes()[-TAIL_BYTES:].decode(errors="replace")
        status = running[failed[0]].returncode
        killed = " (killed, perhaps because the machine was out of memory)" if status == -signal.SIGKILL else ""
        raise TrainingError(f"training process {failed[0]} ended with status {status}{killed}; {log} ends with: {tail}")
    if not spec.result.exists():
        raise TrainingError(f"the training processes ended without a result; see {spec.folder / 'program-0.log'}")


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


def _variables(processes: int, threads: int) -> dict[str, str]:
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    return {
        "GLOO_SOCKET_IFNAME": loopback,
        "OMP_NUM_THREADS": str(max(1, threads // processes)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _accelerator() -> dict[str, str]:
    """DeepSpeed's launcher takes a torch that was built for CUDA as a sign of GPUs, and then finds none."""
    import torch

    return {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind((LOOPBACK, 0))
        return int(listening.getsockname()[1])


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
