"""The generator inside this process: OpenVINO GenAI on a GGUF file, on the CPU.

One thread owns the model and computes every running request together (continuous batching); prompts that begin
alike share their computation (prefix caching). Callers wait on a queue of their own. Greedy answers repeat exactly,
alone or in a batch: everything is computed in float32 (`_EXACT`). It does not know what a release is.
"""

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from millrace.applications import Generation
from millrace.engines.chat import chat_prompt
from millrace.engines.engine import FinishReason, Generated, Message
from millrace.engines.gguf_header import read_gguf_header
from millrace.engines.token_stream import Job, TokenStream, require_room
from millrace.errors import EngineError

_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Reduced precision rounds differently with what else is in the batch: half the answers then changed a word."""

READABLE = ("F16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
"""Types of a GGUF file's matrices that it computes with; with others it refuses to load (norms may also be F32). See
openvino.genai's `gguf_utils/building_blocks.cpp`, `make_weights_subgraph`."""

EXACT = ("F16", "Q8_0", "Q4_0")
"""Those of which it computes with the weights that the file holds. It rounds zero points, and so the others' blocks."""


def misread(reader: Any) -> set[str]:
    """Names of the tensors of a `gguf.GGUFReader` with whose weights it would not compute as the file holds them."""
    return {tensor.name for tensor in reader.tensors if tensor.tensor_type.name not in (*EXACT, "F32")}


class OpenVinoEngine:
    """A loaded GGUF model.

    Args:
        path: the file.
        cache_gb: memory for the keys and values of running and remembered prompts, GiB, taken at once; 0: as much as
            they need, as they come.
        threads: to compute with.

    Raises:
        EngineError: no such file, or one that OpenVINO can't load.
    """

    def __init__(self, path: Path, *, cache_gb: int, threads: int) -> None:
        header = read_gguf_header(path)
        self.path = path
        self._context_tokens = header.context_tokens
        self._pipeline: Any = _load(path, cache_gb, threads)
        self._tokenizer = self._pipeline.get_tokenizer()
        self._end = self._tokenizer.get_eos_token_id()
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._refusal: str | None = None
        self.broken: str | None = None
        self._thread = threading.Thread(target=self._compute, name=f"engine {path.name}", daemon=True)
        self._thread.start()

    @property
    def context_tokens(self) -> int:
        return self._context_tokens

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return int(self._encoded(messages).shape[1])

    def generate(self, messages: Sequence[Message], config: Generation) -> Generated:
        return self.stream(messages, config).drain()

    def stream(self, messages: Sequence[Message], config: Generation) -> TokenStream:
        prompt = self._encoded(messages)
        length = int(prompt.shape[1])
        require_room(length, config, self._context_tokens)
        job = Job(prompt, self._generation_config(config))
        with self._lock:
            if self._refusal:
                raise EngineError(self._refusal)
            self._inbox.put(job)
        return TokenStream(job, self._decoded, length)

    def close(self) -> None:
        with self._lock:
            if self._refusal is None:
                self._refusal = f"the engine of {self.path.name} is closed; load the release again"
            self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._pipeline = None

    def _encoded(self, messages: Sequence[Message]) -> Any:
        return self._tokenizer.encode([chat_prompt(messages)], add_special_tokens=False).input_ids

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([i for i in ids if i != self._end], skip_special_tokens=True))

    def _generation_config(self, config: Generation) -> Any:
        from openvino_genai import GenerationConfig

        wanted = GenerationConfig()
        wanted.max_new_tokens = config.max_new_tokens
        wanted.eos_token_id = self._end
        wanted.stop_token_ids = {self._end}
        wanted.do_sample = config.temperature > 0
        if wanted.do_sample:
            wanted.temperature = config.temperature
        return wanted

    def _compute(self) -> None:
        """The engine's thread: take what arrived, compute one token for all, hand out, until closed."""
        running: dict[int, tuple[Job, Any]] = {}
        sequence, closing = 0, False
        try:
            while not closing:
                for job in self._arrived(wait=not self._pipeline.has_non_finished_requests()):
                    if job is None:
                        closing = True
                        break
                    sequence += 1
                    try:
                        running[sequence] = job, self._pipeline.add_request(sequence, job.prompt, job.config)
                    except Exception as error:
                        job.tokens.put(EngineError(f"the request was refused: {_first_line(error)}"))
                        if not isinstance(error, RuntimeError):  # then this request is unusable, the others are not
                            raise
                if not closing and self._pipeline.has_non_finished_requests():
                    self._pipeline.step()
                for number in [n for n, (job, handle) in running.items() if _handed_out(job, handle)]:
                    del running[number]
        except Exception as error:  # Whatever it was: nobody may wait for ever on a thread that has ended.
            with self._lock:
                self.broken = f"the engine of {self.path.name} broke: {_first_line(error)}; load the release again"
                self._refusal = self.broken
        self._give_up(running)

    def _arrived(self, *, wait: bool) -> Iterator[Job | None]:
        try:
            yield self._inbox.get(block=wait)
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def _give_up(self, running: dict[int, tuple[Job, Any]]) -> None:
        error = EngineError(self._refusal or "the engine stopped")
        for job, handle in running.values():
            job.tokens.put(error)
            with contextlib.suppress(Exception):
                handle.cancel()
        for waiting in self._arrived(wait=False):
            if waiting is not None:
                waiting.tokens.put(error)


def _load(path: Path, cache_gb: int, threads: int) -> Any:
    from openvino_genai import ContinuousBatchingPipeline, SchedulerConfig

    scheduler = SchedulerConfig()
    scheduler.cache_size = cache_gb
    scheduler.enable_prefix_caching = True
    try:
        return ContinuousBatchingPipeline(str(path), scheduler, "CPU", {**_EXACT, "INFERENCE_NUM_THREADS": threads})
    except (RuntimeError, IndexError) as error:  # The latter for metadata that it looks for in vain.
        raise EngineError(f"OpenVINO can't load {path}: {_first_line(error)}; export the model again") from None


def _handed_out(job: Job, handle: Any) -> bool:
    """Give the caller its new tokens; True if these were the last."""
    from openvino_genai.py_openvino_genai import GenerationFinishReason, GenerationStatus

    if job.cancelled.is_set():
        handle.cancel()
        return True
    finished: FinishReason | None = None
    while handle.can_read():
        for output in handle.read().values():
            job.tokens.put(list(output.generated_ids))
            if output.finish_reason != GenerationFinishReason.NONE:
                finished = "length" if output.finish_reason == GenerationFinishReason.LENGTH else "stop"
    if finished:
        job.tokens.put(finished)
        return True
    if handle.get_status() == GenerationStatus.IGNORED:
        job.tokens.put(EngineError("the prompt doesn't fit the engine's cache; raise MILLRACE_ENGINE_CACHE_GB"))
        return True
    return False


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
