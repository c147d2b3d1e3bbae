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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from millrace.applications import Generation
from millrace.errors import EngineError

AT_ONCE = 8
"""Prompts that are answered together: what continuous batching is for."""
TIMEOUT_SECONDS = 1800
PROBES = tuple(
    f"The option {name} has the default {value}. {about}\n\nQuestion: What is the default of {name}?\n"
    "Answer in one short sentence, only from the text above."
    for name, value, about in (
        ("parallelism", "32", "It limits how many tasks may run at once on all schedulers together."),
        ("smtp_port", "25", "Mail is sent to this port of the server that smtp_host names."),
        ("executor", "LocalExecutor", "It says where tasks run: on this machine, or on workers elsewhere."),
        ("load_examples", "True", "With it the examples that come with the package are shown."),
        ("job_heartbeat_sec", "5", "Seconds between two signs of life that a job gives."),
        ("dags_folder", "/opt/airflow/dags", "Every file in it is read, again and again."),
        ("default_timezone", "utc", "Dates that name no zone are in this one."),
        ("max_active_runs_per_dag", "16", "More runs of one DAG wait until others have ended."),
    )
)
"""What models are asked that are compared; one of any use copies the value."""
PROBE_TOKENS = 32


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


def side_by_side(before: tuple[Path, Measured], after: tuple[Path, Measured]) -> dict[str, float]:
    """`bytes`, `resident_mib` and `tokens_per_second` of the second file, and with `_before` of the first."""
    told: dict[str, float] = {}
    for name, (path, one) in (("_before", before), ("", after)):
        told |= {
            f"bytes{name}": path.stat().st_size,
            f"resident_mib{name}": one.resident_mib,
            f"tokens_per_second{name}": one.tokens_per_second,
        }
    return told


def as_tags(told: Mapping[str, float]) -> dict[str, str]:
    """For a registered version, four digits each."""
    return {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in told.items()}


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
