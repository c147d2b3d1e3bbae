"""The training program. One copy of it runs in every process of a fine-tune.

Run under any launcher that sets RANK, LOCAL_RANK and WORLD_SIZE:
`python -m millrace.training.program --spec spec.json`. It reads the spec and the examples that it names and writes
into the spec's folder: progress, the last checkpoint, what was trained, the result. It knows no lake, no MLflow and
no release. Killed at any step, it goes on from the last checkpoint when it is started again.
"""

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from millrace.errors import MillraceError, TrainingError
from millrace.training.files import replace_text
from millrace.training.loop import train
from millrace.training.spec import OUT_OF_MEMORY, Spec, read_spec

HEARTBEAT_SECONDS = 60
"""Without a sign of the launcher, after which it is taken for gone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when the result is written, 2 when the program gave up (then the failure's file says why)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--rendezvous", help="where the processes meet (file:///…); left out: MASTER_ADDR, MASTER_PORT")
    parser.add_argument("--leash", action="store_true", help="die when standard input closes: the launcher is gone")
    parser.add_argument("--heartbeat", type=Path, help="die when nobody touches this file any more")
    parser.add_argument("--deepspeed", action="store_true", help="Spark's launcher says so; nothing else is done here")
    parser.add_argument("--deepspeed_config", type=Path, help="refused if it is not what the spec says")
    given = parser.parse_args(arguments)
    if given.leash:
        threading.Thread(target=die_with_launcher, daemon=True).start()
    if given.heartbeat:
        threading.Thread(target=_die_without, args=[given.heartbeat], daemon=True).start()
    try:
        spec = read_spec(given.spec)
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        if given.deepspeed_config:
            require_same_config(spec, given.deepspeed_config)
        train(spec, given.rendezvous)
    except (MillraceError, ValidationError, MemoryError, RuntimeError) as error:
        reason = out_of_memory(spec, error)
        if reason is None and not isinstance(error, (MillraceError, ValidationError)):
            raise
        print(reason or error, file=sys.stderr)
        with contextlib.suppress(OSError):  # the disk may be what is full
            replace_text(spec.failure, reason or str(error))
        # Not sys.exit: the other processes may wait in a collective operation that never completes.
        sys.stderr.flush()
        os._exit(2)
    return 0


def out_of_memory(spec: Spec, error: Exception) -> str | None:
    """One sentence, if that is what the error means: torch and oneDNN say it in their own ways."""
    signs = ("out of memory", "can't allocate memory", "bad_alloc", "Cannot allocate memory")
    if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in signs):
        return None
    return (
        f"{OUT_OF_MEMORY} with {spec.micro_batch} examples in a micro-batch, of at most {spec.max_tokens} tokens each; "
        "lower training.micro_batch, training.max_tokens or training.lora_layers, or raise the ZeRO stage"
    )


def require_same_config(spec: Spec, given: Path) -> None:
    """Raises:
    TrainingError: the launcher's DeepSpeed configuration isn't the spec's, so one of them would be ignored.
    """
    try:
        told = json.loads(given.read_text())
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"the DeepSpeed configuration {given} can't be read: {error}; leave the option out"
        ) from None
    if told != spec.deepspeed_config(total_steps=1).model_dump(mode="json", exclude_none=True):
        raise TrainingError(
            f"the DeepSpeed configuration {given} isn't the one that the spec makes; change [training.deepspeed] of "
            "the declaration instead"
        )


def die_with_launcher() -> None:
    """Wait until standard input closes, then end this process."""
    # Not sys.stdin: a thread that waits in its buffer makes the interpreter abort when the program ends.
    while os.read(0, 4096):
        pass
    os._exit(3)


def _die_without(heartbeat: Path) -> None:
    """End this process when the file hasn't changed for a while. No clocks are compared: machines differ."""
    seen, since = 0, time.monotonic()
    while time.monotonic() - since < HEARTBEAT_SECONDS:
        time.sleep(1)
        with contextlib.suppress(OSError):
            if (now := heartbeat.stat().st_mtime_ns) != seen:
                seen, since = now, time.monotonic()
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
