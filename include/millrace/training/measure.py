"""What a model file costs where it answers: memory, and tokens a second, measured in a process that does nothing else.

    python -m millrace.training.measure < request.json > measured.json

A process of its own: its memory is the model's, and an engine that dies on a file (OpenVINO does) takes nobody along.
Seconds are the processor's, divided by the threads: what a machine takes that has nothing else to do. The clock on the
wall would measure the neighbours.
It knows prompts, not what a good answer is.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from millrace.applications import Generation
from millrace.errors import EngineError

AT_ONCE = 8
"""Prompts that are answered together: what continuous batching is for."""
TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Measured:
    """Of one model file."""

    resident_mib: float
    """Memory of the process when it had answered everything: weights, key-value cache, engine and Python."""
    peak_mib: float
    """The most that it had at any time, loading included."""
    seconds_per_token: tuple[float | None, ...]
    """Of each answer that was asked for alone, from its first token on; None where it was the only one."""
    tokens_per_second_together: float
    """Of eight at once, prompts included."""
    answers: tuple[str, ...]
    """To the prompts, in their order, greedy."""

    @property
    def tokens_per_second(self) -> float:
        """Of one answer at a time, from its first token on; 0 if no answer had a second one."""
        paces = [pace for pace in self.seconds_per_token if pace]
        return len(paces) / sum(paces) if paces else 0.0


def measure(weights: Path, prompts: Sequence[str], *, max_new_tokens: int, alone: int, threads: int) -> Measured:
    """Load `weights` in another process and answer every prompt there.

    Args:
        prompts: user messages; all are answered eight at once, once.
        max_new_tokens: of an answer.
        alone: how many of them are answered one by one, before.

    Raises:
        EngineError: the file can't be loaded or a prompt not be answered, or the process died.
    """
    request = {
        "weights": str(weights),
        "prompts": list(prompts),
        "max_new_tokens": max_new_tokens,
        "alone": alone,
        "threads": threads,
    }
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "millrace.training.measure"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"{weights.name} has not answered after {TIMEOUT_SECONDS} s; use fewer prompts") from None
    if ran.returncode:
        lines = ran.stderr.strip().splitlines()
        told = lines[-1] if lines else f"its process ended with status {ran.returncode}"
        raise EngineError(f"{weights.name} can't be measured: {told}")
    # The engine may print lines of its own.
    values: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    for name in ("seconds_per_token", "answers"):
        values[name] = tuple(values[name])
    return Measured(**values)


def measured(request: dict[str, Any]) -> Measured:
    """The same in this process, of which then nothing else should be asked."""
    from millrace.engines.engine import Message
    from millrace.engines.openvino import OpenVinoEngine

    config = Generation(max_new_tokens=request["max_new_tokens"], temperature=0)
    prompts = [[Message("user", prompt)] for prompt in request["prompts"]]
    # A cache that grows with what is asked: one that is reserved is filled at once, and hides what the weights take.
    engine = OpenVinoEngine(Path(request["weights"]), cache_gb=0, threads=request["threads"])
    try:
        paces = []
        for prompt in prompts[: request["alone"]]:
            stream = engine.stream(prompt, config)
            next(stream, None)
            began = time.process_time()
            for _ in stream:
                pass
            seconds, tokens = (time.process_time() - began) / request["threads"], stream.result.completion_tokens - 1
            paces.append(seconds / tokens if tokens > 0 else None)
        began = time.process_time()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda prompt: engine.generate(prompt, config), prompts))
        together = (time.process_time() - began) / request["threads"]
        return Measured(
            resident_mib=_memory("VmRSS"),
            peak_mib=_memory("VmHWM"),
            seconds_per_token=tuple(paces),
            tokens_per_second_together=sum(answer.completion_tokens for answer in answers) / together,
            answers=tuple(answer.text.strip() for answer in answers),
        )
    finally:
        engine.close()


def _memory(field: str) -> float:
    """MiB of this process. Not `getrusage`: what it calls the peak begins with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def main() -> None:
    try:
        print(json.dumps(asdict(measured(json.load(sys.stdin)))))
    except EngineError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
